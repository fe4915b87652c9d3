"""Owns the recognition of a base model before anything of it is loaded: is it there, open, a Llama, safe?

Reads config.json and the list of files only. Knows no torch and no weights.
"""

import difflib
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_qlora import demo
from lit_qlora.errors import UserError, require
from lit_qlora.model.shape import Shape

FINAL_NORM = "model.norm.weight"
"""A weight that no quantisation touches, so that every copy of a base has the same one."""


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
    def public_name(self) -> str:
        """The name that may be published: a hub id or ``demo`` as it is, of a local folder its last part only."""
        if self.name == "demo" or not Path(self.name).expanduser().is_dir():
            return self.name
        return Path(self.name).expanduser().resolve().name


def find_base(name: str) -> Base:
    """Recognises ``name``: ``demo``, a local folder, or a hub id.

    Raises UserError when it does not exist, is gated without access, is not a Llama, is quantised in
    another way, or has no weights as safetensors.
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
    if files and not any(file.endswith(".safetensors") for file in files):
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
    """What loading will have to download: the 16-bit weights of a hub id that is not in the cache, else nothing."""
    is_here = _file(base, "model.safetensors.index.json") or _file(base, "model.safetensors")
    return 0 if is_here or Path(base.location).is_dir() else 2 * base.shape.num_parameters


def fingerprint(base: Base) -> str:
    """What makes a base this one and no other: a sha256 over what config.json computes with, and its final norm.

    The same for a copy in a folder, on the hub, in shards, quantised, or in another float type of the same
    values. Call it once the weights are at hand (in the folder or in the cache).
    """
    digest = hashlib.sha256(repr((base.shape, _rules(base.config))).encode())
    digest.update(_stored_tensor(base, FINAL_NORM))
    return digest.hexdigest()


def identity(base: Base) -> dict[str, str | None]:
    """A base's public name, its commit on the hub where that is known, and its `fingerprint`."""
    return {"name": base.public_name, "commit": commit(base), "fingerprint": fingerprint(base)}


def commit(base: Base) -> str | None:
    """The commit of a base on the hub; None for a local one."""
    config = None if Path(base.location).is_dir() else _file(base, "config.json")
    return config.parent.name if config and config.parent.parent.name == "snapshots" else None


def _rules(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of config.json changes the output at equal widths, whichever version of transformers wrote it."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    scaling = sorted((name, float(value)) for name, value in rope.items()) if kind != "default" else []
    return (
        config["num_attention_heads"],
        theta,
        kind,
        scaling,
        float(config.get("rms_norm_eps", 1e-6)),
        config.get("hidden_act", "silu"),
        bool(config.get("attention_bias", False)),
        bool(config.get("mlp_bias", False)),
    )


def check_weights(base: Base) -> None:
    """Compares names and sizes of a base's matrices with its config.json; says nothing of a base still to come.

    Raises UserError for the first that differs: the library would fill it with chance, or fail deep inside.
    """
    index = _file(base, "model.safetensors.index.json")
    files = {_file(base, name) for name in _shards(index)} if index else {_file(base, "model.safetensors")}
    if None in files:
        return
    stored: dict[str, list[int]] = {}
    for file in files:
        assert file is not None
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


def _stored_tensor(base: Base, name: str) -> bytes:
    """One tensor's values in fp32, read without loading the rest: safetensors is a JSON header and plain bytes."""
    import numpy as np

    index = _file(base, "model.safetensors.index.json")
    file = json.loads(index.read_text())["weight_map"][name] if index else "model.safetensors"
    path = _file(base, file)
    assert path is not None, f"{base.location} has no {file}"
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entry = json.loads(stream.read(length))[name]
        start, end = entry["data_offsets"]
        stream.seek(8 + length + start)
        stored = stream.read(end - start)
    if entry["dtype"] == "BF16":  # the upper half of an fp32
        return (np.frombuffer(stored, "<u2").astype("<u4") << 16).tobytes()
    if entry["dtype"] in ("F16", "F32"):
        return np.frombuffer(stored, {"F16": "<f2", "F32": "<f4"}[entry["dtype"]]).astype("<f4").tobytes()
    return f"{entry['dtype']} ".encode() + stored


def _file(base: Base, name: str) -> Path | None:
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
