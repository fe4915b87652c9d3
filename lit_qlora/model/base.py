"""Owns the recognition of a base model before anything of it is loaded: is it there, open, a Llama, safe?

Reads config.json and the list of files only. Knows no torch and no weights.
"""

import difflib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_qlora import demo
from lit_qlora.errors import UserError, require
from lit_qlora.model.shape import Shape


@dataclass(frozen=True)
class Base:
    """A Llama that can be loaded. ``location`` is a folder or a hub id; ``name`` is what the user wrote."""

    name: str
    location: str
    config: Mapping[str, Any]

    @property
    def shape(self) -> Shape:
        """The sizes that config.json tells."""
        return Shape.of(self.config)

    @property
    def context_tokens(self) -> int:
        """The longest sequence that it was made for; without a word of it, as transformers has it."""
        return int(self.config.get("max_position_embeddings") or 2048)

    @property
    def public_name(self) -> str:
        """The name that may be published: a hub id or ``demo`` as it is, of a local folder its last part only."""
        if self.name == "demo" or not Path(self.name).expanduser().is_dir():
            return self.name
        return Path(self.name).expanduser().resolve().name


def find_base(name: str, weights: bool = True) -> Base:
    """Recognises ``name``: ``demo``, a local folder, or a hub id.

    Raises UserError when it does not exist, is gated without access, is not a Llama, is quantised in
    another way, or, unless ``weights`` is False, has no weights as safetensors.
    """
    require(bool(name.strip()), "model.base", "demo, a folder or a hub id (owner/name)", name)
    location = str(demo.BASE) if name == "demo" else name
    folder = Path(location).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.base: {name} has no config.json; a Hugging Face model folder is expected")
        config_file, files = folder / "config.json", {path.name for path in folder.iterdir()}
        location = str(folder)
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model.base: no folder {name!r}{_nearest(folder)}; give a hub id (owner/name) or a folder")
    else:
        config_file, files = _ask_hub(name)
    config = _read_config(name, config_file)
    if weights and files and not any(file.endswith(".safetensors") for file in files):
        raise UserError(
            f"model.base: {name} has no .safetensors weights, and pickled ones are never read; "
            "convert it (save_pretrained writes safetensors) or take another copy"
        )
    return Base(name, location, config)


def _read_config(name: str, file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"model.base: {name}: config.json can't be read: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "llama" or "LlamaForCausalLM" not in (config.get("architectures") or ["LlamaForCausalLM"]):
        raise UserError(f"model.base: {name} is a {kind or 'model of unknown type'}, expected a Llama")
    try:
        Shape.of(config)
    except KeyError as error:
        raise UserError(f"model.base: {name}: config.json has no {error.args[0]}") from error
    quantized = config.get("quantization_config")
    if quantized and not quantized.get("load_in_4bit"):
        method = quantized.get("quant_method", "in an unknown way")
        raise UserError(
            f"model.base: {name} is already quantised ({method}); give the 16-bit weights or a bitsandbytes 4-bit copy"
        )
    return dict(config)


def _ask_hub(name: str) -> tuple[Path, set[str]]:
    """config.json of a hub id (from the cache where the hub can't be reached) and the names of its files."""
    from huggingface_hub import HfApi, errors, hf_hub_download

    try:
        config_file = Path(hf_hub_download(name, "config.json"))
    except errors.GatedRepoError as error:
        raise UserError(
            f"model.base: {name} is gated: accept its licence on the hub, then set HF_TOKEN in the environment "
            "to a token of that account; or take an open copy such as NousResearch/Llama-2-7b-hf"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"model.base: {name!r} is no folder here and no model on the hub (a private one needs HF_TOKEN)"
        ) from error
    except (errors.HFValidationError, errors.RemoteEntryNotFoundError) as error:
        raise UserError(f"model.base: {name!r} is no folder here, and on the hub it has no config.json") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"model.base: {name!r} is no folder here, not in the cache, and the hub can't be reached; "
            "check the network or give a local folder"
        ) from error
    except Exception as error:  # a refused token, a broken proxy: which class depends on the hub library's version
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.base: {name!r} can't be had from the hub (check HF_TOKEN): {reason}") from error
    try:
        return config_file, {sibling.rfilename for sibling in HfApi().model_info(name).siblings or ()}
    except Exception:  # cached, and the hub is silent or refuses: loading will tell what is missing
        return config_file, set()


def missing_bytes(base: Base) -> int:
    """What is still to come before loading: the 16-bit weights that are in neither folder nor cache."""
    is_here = stored_file(base, "model.safetensors.index.json") or stored_file(base, "model.safetensors")
    return 0 if is_here else 2 * base.shape.num_parameters


def commit(base: Base) -> str | None:
    """The commit of a base on the hub; None for a local one."""
    config = None if Path(base.location).is_dir() else stored_file(base, "config.json")
    return config.parent.name if config and config.parent.parent.name == "snapshots" else None


def check_weights(base: Base) -> None:
    """Compares names and sizes of a base's matrices with its config.json; says nothing of a base still to come.

    Raises UserError for the first that differs: the library would fill it with chance, or fail deep inside.
    """
    try:
        files = weight_files(base)
    except FileNotFoundError:
        return
    stored: dict[str, list[int]] = {}
    for file in files:
        stored |= _stored_shapes(base, file)
    in_4_bits = "quantization_config" in base.config  # which makes one column of a linear layer, and of nothing else
    for key, expected in _matrices(base.shape).items():
        found = stored.get(key)
        if found is None or (found != expected and not (in_4_bits and ".layers." in key)):
            raise UserError(
                f"model.base: {base.name}: the weights are not those of its config.json: {key} is "
                f"{found or 'missing'}, expected {expected}; take another copy"
            )


def _matrices(shape: Shape) -> dict[str, list[int]]:
    """Name and size of each stored matrix; a tied head is none of its own."""
    sizes = {"model.embed_tokens.weight": [shape.vocabulary, shape.hidden]}
    for number in range(shape.num_layers):
        for name, (inputs, outputs) in shape.linears.items():
            part = "self_attn" if name[0] in "qkvo" else "mlp"
            sizes[f"model.layers.{number}.{part}.{name}.weight"] = [outputs, inputs]
    return sizes if shape.tied else sizes | {"lm_head.weight": [shape.vocabulary, shape.hidden]}


def weight_files(base: Base) -> set[Path]:
    """The files that hold the weights. Raises FileNotFoundError where one is still to come."""
    index = stored_file(base, "model.safetensors.index.json")
    names = _shards(index) if index else {"model.safetensors"}
    files = {name: stored_file(base, name) for name in names}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        raise FileNotFoundError(f"{base.location} has no {missing[0]}")
    return {file for file in files.values() if file is not None}


def _shards(index: Path) -> set[str]:
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())


def _stored_shapes(base: Base, file: Path) -> dict[str, list[int]]:
    """Sizes by name, of a safetensors file's header."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.base: the weights of {base.name} can't be loaded: {file.name}: {reason}") from error
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def stored_file(base: Base, name: str) -> Path | None:
    """The file ``name`` of a base, in its folder or in the hub's cache; None where it is not there."""
    if Path(base.location).is_dir():
        path = Path(base.location) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(base.location, name)
    return Path(cached) if isinstance(cached, str) else None


def _nearest(folder: Path) -> str:
    if not folder.parent.is_dir():
        return ""
    near = difflib.get_close_matches(folder.name, [path.name for path in folder.parent.iterdir()], 1, 0.75)
    return f" (did you mean {folder.parent / near[0]}?)" if near else ""
