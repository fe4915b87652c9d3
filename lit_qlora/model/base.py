"""Owns the checks of a base model before anything of it is loaded: that it exists, is open, of a kind known, and safe.

And the one rule for which of its files are the weights, and whether options fit its sizes. Reads only config.json, the
index of the weights and the list of files. Knows no torch; what stands in the weights is `lit_qlora.model.weights`'s.
"""

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from lit_qlora import demo
from lit_qlora.console import complain
from lit_qlora.errors import UserError, excerpt, likely_meant, nearest, one_line, require
from lit_qlora.model.architectures import Architecture, architecture_of
from lit_qlora.model.config import read_config
from lit_qlora.model.shape import Shape, known_config, target_names
from lit_qlora.storage.files import LFS, LFS_POINTER, names_around, parse_json, unreadable
from lit_qlora.storage.folders import ADAPTER_CONFIG, INDEX, ONE_FILE
from lit_qlora.storage.reach import HUB_ID, stored_file, use_cache_if_silent

base_error = partial(UserError, option="model.base")
"""An error about the base."""


@dataclass(frozen=True)
class Base:
    """A base that can be loaded.

    Args:
        name: what the user wrote.
        location: a folder, or a hub id.
        config: its config.json, as `model.config.read_config` returns it.
    """

    name: str
    location: str
    config: Mapping[str, Any]

    @property
    def shape(self) -> Shape:
        """The sizes in config.json."""
        return Shape.of(self.config)

    @property
    def in_4_bits(self) -> bool:
        """True if the base was saved in 4 bits."""
        return "quantization_config" in self.config

    @property
    def context_tokens(self) -> int:
        """The longest sequence, in tokens, that the base was made for and that every program computes alike.

        Behind a sliding window each layer would have to forget, which our own layers don't; within it there is nothing
        to forget, and every program computes the same.
        """
        return min(int(self.config["max_position_embeddings"]), self.window or 2**31)

    @property
    def window(self) -> int | None:
        """The longest sequence of which every layer sees all, in tokens; None if there is no other limit to it."""
        return self.architecture.window(self.config)

    @property
    def architecture(self) -> Architecture:
        """The entry of the base's architecture."""
        return architecture_of(self.config)

    @property
    def public_name(self) -> str:
        """The name that may be published: a hub id or ``demo`` as it is, the last part only of a local folder."""
        if self.name == "demo" or not Path(self.name).expanduser().is_dir():
            return self.name
        return Path(self.name).expanduser().resolve().name


def find_base(name: str, weights: bool = True) -> Base:
    """Find the base ``name``: ``demo``, a local folder, or a hub id.

    Args:
        name: as in ``model.base``.
        weights: False if nothing of it will be loaded: the hub is not contacted if the sizes are known.

    Raises:
        UserError: it does not exist, is gated without access, is of another architecture or quantised in another way,
            or, unless ``weights`` is False, has no safetensors weights.
    """
    require(bool(name.strip()), "model.base", "demo, a folder or a hub id (owner/name)", name)
    location = str(demo.BASE) if name == "demo" else name
    folder = Path(location).expanduser()
    known = None if weights or folder.exists() else known_config(name)
    if known:
        return Base(name, name, known)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise _no_base(name, folder)
        config_file, files = folder / "config.json", {path.name for path in folder.iterdir()}
        location = str(folder)
        _check_cloned(name, folder)
    elif page := re.match(rf"https?://[^/]+/({HUB_ID.pattern})", name, re.ASCII):
        raise base_error(f"{name} is an address", remedy=f"of a model on the hub, give the id alone, {page[1]}")
    elif not HUB_ID.fullmatch(name):
        near = nearest(folder.name, names_around(folder))
        likely = folder.parent / near if near else nearest(name, ["demo"])
        meant = f" ({likely_meant(likely)})" if likely else ""
        raise base_error(f"no folder {excerpt(name)}{meant}", remedy="give a hub id (owner/name) or a folder")
    else:
        config_file, files = _ask_hub(name)
    config = read_config(name, config_file)
    if ADAPTER_CONFIG in files:
        raise base_error(
            f"{name} holds an adapter beside its config.json ({ADAPTER_CONFIG}), which would be applied to it unasked",
            remedy="take that file out, or give the adapter by itself",
        )
    base = Base(name, location, config)
    if weights and files:
        _check_files(base, files)
    return base


def _no_base(name: str, path: Path) -> UserError:
    """The error for what is there without a config.json: often something that belongs to a base, or was made of it."""
    if path.is_file():
        return base_error(f"{name} is a file, expected a Hugging Face model folder", remedy="give the folder")
    for adapter in (path, path / "adapter"):
        if (adapter / ADAPTER_CONFIG).is_file():
            what = "an adapter" if adapter == path else "the folder of a run"
            remedy = f"give its base here, and to train it further --model.adapter {quote(str(adapter))}"
            return base_error(f"{name} is {what}, expected a base", remedy=remedy)
    return base_error(f"{name} has no config.json", remedy="a Hugging Face model folder is expected")


def _check_cloned(name: str, folder: Path) -> None:
    """Raises UserError if files of a cloned folder are what git leaves of them without git-lfs."""
    for path in sorted(filter(Path.is_file, folder.iterdir())):
        with suppress(OSError), path.open("rb") as file:  # one that can't be read may not be needed
            if file.read(len(LFS)) == LFS:
                problem, remedy = LFS_POINTER
                raise base_error(f"{name}: {path.name} {problem}", remedy=remedy)


def _check_files(base: Base, files: Collection[str]) -> None:
    """Raises UserError if none of ``files`` holds loadable weights, or a folder lacks some of them."""
    tensors = sorted(file for file in files if file.endswith(".safetensors"))
    if not tensors and INDEX not in files:
        problem, remedy = f"{base.name} has no .safetensors weights", "download all of its files, or take another copy"
        if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
            problem += ", and pickled ones are never read"
            remedy = "convert it (save_pretrained writes safetensors) or take another copy"
        raise base_error(problem, remedy=remedy)
    if not {ONE_FILE, INDEX} & {*files}:
        raise base_error(
            f"{base.name} has neither {ONE_FILE} nor {INDEX}, and {tensors[0]} is no name that transformers loads",
            remedy=f"if it holds the weights of this config.json, rename it to {ONE_FILE}",
        )
    if Path(base.location).is_dir():
        try:
            weight_files(base)
        except FileNotFoundError as error:
            raise base_error(str(error), remedy="copy it there, or take another copy") from error


def _ask_hub(name: str) -> tuple[Path, set[str]]:
    """The config.json of a hub id (cached if the hub can't be reached) and the names of its files."""
    from huggingface_hub import HfApi, errors, hf_hub_download

    is_silent = use_cache_if_silent()
    try:
        config_file = Path(hf_hub_download(name, "config.json"))
    except errors.GatedRepoError as error:
        raise base_error(
            f"{name} is gated: accept its licence on the hub, then set HF_TOKEN in the environment "
            "to a token of that account",
            remedy="or take an open copy such as NousResearch/Llama-2-7b-hf",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise base_error(
            f"{excerpt(name)} is no folder here and no model on the hub (a private one needs HF_TOKEN)"
        ) from error
    except (errors.HFValidationError, errors.RemoteEntryNotFoundError) as error:
        raise base_error(f"{excerpt(name)} is no folder here, and on the hub it has no config.json") from error
    except errors.LocalEntryNotFoundError as error:
        raise base_error(
            f"{excerpt(name)} is no folder here, not in the cache, and the hub can't be reached",
            remedy="check the network or give a local folder",
        ) from error
    except Exception as error:  # a refused token, a broken proxy: which class depends on the hub library's version
        reason = one_line(error)
        raise base_error(f"{excerpt(name)} can't be loaded from the hub (check HF_TOKEN): {reason}") from error
    if is_silent:
        complain(f"note: the hub can't be reached; what its cache has of {name} is used")
    try:
        return config_file, {sibling.rfilename for sibling in HfApi().model_info(name).siblings or ()}
    except Exception:  # cached, and the hub is silent or refuses: loading will report what is missing
        return config_file, set()


def missing_bytes(base: Base) -> int:
    """Bytes of ``base`` still to download before loading: 16-bit weights that are in neither folder nor cache."""
    is_here = stored_file(base.location, ONE_FILE) or stored_file(base.location, INDEX)
    return 0 if is_here else 2 * base.shape.num_parameters


def commit(base: Base) -> str | None:
    """The commit of a ``base`` on the hub; None for a local one."""
    config = None if Path(base.location).is_dir() else stored_file(base.location, "config.json")
    return config.parent.name if config and config.parent.parent.name == "snapshots" else None


def weight_files(base: Base, find: Callable[[str, str], Path | None] = stored_file) -> list[Path]:
    """The files that hold the weights, in order of their names: the one file where it is there, else the index's.

    Args:
        base: in a folder or on the hub.
        find: looks up a file by the base's location and its name, and may download it.

    Raises:
        FileNotFoundError: one is not downloaded yet.
        UserError: the index can't be read, or names a file that is not beside it.
    """
    index = None if find(base.location, ONE_FILE) else find(base.location, INDEX)
    names = _shards(base, index) if index else [ONE_FILE]
    files = {name: find(base.location, name) for name in names}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        raise FileNotFoundError(f"{base.location} has no {missing[0]}" + (f", which {INDEX} names" if index else ""))
    return [file for file in files.values() if file is not None]


def _shards(base: Base, index: Path) -> list[str]:
    try:
        content = parse_json(index.read_text(encoding="utf-8"))
        names, has_metadata = {*content["weight_map"].values()}, isinstance(content.get("metadata"), dict)
        plain = names and all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = unreadable(error)
        raise base_error(f"{base.name}: {INDEX} can't be read: {reason}", remedy="take another copy") from error
    if not plain:
        raise base_error(
            f"{base.name}: {INDEX} names something other than .safetensors files beside it", remedy="take another copy"
        )
    if not has_metadata:  # transformers adds to it
        raise base_error(f"{base.name}: {INDEX} has no table called metadata", remedy='add "metadata": {}')
    return sorted(names)


def split_names(target_modules: str | list[str]) -> str | list[str]:
    """Names of linear layers, ``target_modules``, as a list, also if given as one text with commas or spaces."""
    if isinstance(target_modules, str) and not re.search(r"[\s,\[]", target_modules):
        return target_modules
    texts = [target_modules] if isinstance(target_modules, str) else target_modules
    names = [name for text in texts for name in re.findall(r"[^\s,\[\]'\"]+", text)]
    return "all-linear" if names == ["all-linear"] else names


def check_lora(base: Base, rank: int, target_modules: str | list[str]) -> None:
    """Check that LoRA is not larger than the layers themselves, and the names of those that get it.

    Args:
        base: base to train.
        rank: of LoRA.
        target_modules: names of linear layers, or ``all-linear``.

    Raises:
        UserError: the rank is above the base's hidden size, a name is no linear layer of a decoder layer, or there is
            none.
    """
    names, known = target_names(target_modules), base.shape.linears
    for name in names:
        if name not in known:
            if name == "all-linear":
                raise UserError(
                    "all-linear stands for every name", option="model.target_modules", remedy="give it, or names, alone"
                )
            near = nearest(name.rpartition(".")[2], ["all-linear", *known], 0.4)
            raise UserError(
                f"{excerpt(name)} is none of all-linear, {', '.join(known)}",
                option="model.target_modules",
                remedy=likely_meant(near),
            )
    if not names:
        raise UserError("expected all-linear or at least one name, got none", option="model.target_modules")

    hidden = base.shape.hidden
    require(rank <= hidden, "model.rank", f"at most {hidden:,}, the hidden size of {base.name}", rank)


def check_context(base: Base, max_length: int) -> None:
    """Check that a base knows the positions of the longest rows: beyond, it has never seen them, or sees them cut.

    Args:
        base: base to train or to ask.
        max_length: tokens of one row.

    Raises:
        UserError: they are more than its context.
    """
    context = base.context_tokens
    key = "sliding_window" if context == base.window else "max_position_embeddings"
    require(
        max_length <= context, "data.max_length", f"at most {context:,} tokens, the {key} of {base.name}", max_length
    )
