"""Owns the cache of 4-bit copies of bases on disk: a later start reads 3.9 GB of a 7B instead of 13.5.

A copy is written weight by weight before a base is first loaded, which is from the copy then, so that every start
computes with the same bytes. It is sealed as a checkpoint is, and verified in full once; later starts compare sizes,
times and samples with those of then, and verify it in full again if one differs. The newest few stay, and those in use.
Knows neither adapters nor what a base is used for.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from lit_qlora.console import counted
from lit_qlora.errors import UserError
from lit_qlora.model.base import Base, commit, find_base
from lit_qlora.model.config import for_transformers
from lit_qlora.model.device import dtype_name
from lit_qlora.model.fingerprint import ORIGINAL, fingerprint, short, write_original
from lit_qlora.model.load import nf4, quantise, read_tensor
from lit_qlora.model.weights import BUFFER, LM_HEAD, check_weights, fetch, is_linear, stored_tensors
from lit_qlora.storage.files import free_bytes, parse_json, size
from lit_qlora.storage.folders import MANIFEST, DamagedFolderError, clear_leftovers, verify_folder
from lit_qlora.storage.in_use import Held, prune, remove_unused, write_once
from lit_qlora.storage.weight_files import write_shards

KEPT_FROM = 500_000_000
"""Number of weights from which quantising takes long enough to be worth the disk space."""
RESERVE_BYTES = 5_000_000_000
"""Bytes left free on the disk, for checkpoints and other files of a run."""
FILE_BYTES = 1_000_000_000
"""Bytes of a copy's file; so much waits in the host's memory."""
KEPT = 3
"""Number of copies kept in one folder; the least recently used go first."""

CHECKED = "checked.json"
"""The file in a copy that records its state when it was last verified in full."""
FILE_PLACES, BYTES_PER_PLACE = 32, 16_384
"""A file's sample: places, beginning and end among them, and bytes at each."""

_COPY = re.compile(r".+-[0-9a-f]+-nf4-\w+-\w+")
_in_use: dict[Path, Held] = {}
"""The copies that this process uses, until it ends."""


class Copies:
    """The 4-bit copies below one folder.

    Args:
        place: ``auto``, beside the hub's own cache; ``none``; or a folder, one on a mounted Google Drive for example.
    """

    def __init__(self, place: Literal["auto", "none"] | str) -> None:  # the words are meant to be seen
        self.keeps_small = place not in ("auto", "none")
        self.root = None if place == "none" else Path(place).expanduser()
        if place == "auto":
            from huggingface_hub.constants import HF_HOME

            self.root = Path(HF_HOME) / "lit_qlora" / "4bit"

    def find(self, base: Base, dtype: torch.dtype | None, device_type: str) -> Base | None:
        """A base as its 4-bit copy; None without an intact one.

        Args:
            base: a base in 16 bits.
            dtype: dtype that the copy is to compute in; None for any.
            device_type: type of the device that it was quantised on; ``*`` for any.
        """
        if self.root is None or not self.root.is_dir() or base.in_4_bits:
            return None
        for folder in sorted(self.root.glob(_name(base, "*" if dtype is None else dtype, device_type))):
            _in_use[folder] = Held(folder)
            try:
                _verify(folder)
                return Base(base.name, str(folder), find_base(str(folder)).config)
            except UserError:  # also a DamagedFolderError
                _in_use.pop(folder).close()
                remove_unused(folder)
        return None

    def keep(self, base: Base, dtype: torch.dtype, device: torch.device) -> str | None:
        """Keep a 4-bit copy of a base, written weight by weight.

        Args:
            base: downloaded first where it is on the hub, even if no copy of it is kept.
            dtype: dtype that the copy is to compute in.
            device: device to quantise on.

        Returns:
            A line that reports it, or says why not; None where there is nothing to say.

        Raises:
            UserError: its weights can't be read.
        """
        fetch(base)
        shape = base.shape
        is_small = shape.num_parameters < KEPT_FROM and not self.keeps_small
        if self.root is None or base.in_4_bits or is_small:
            return None
        check_weights(base)
        needed_bytes = shape.num_layers * shape.layer_bytes + shape.unshared_bytes(dtype.itemsize)
        target = self.root / _name(base, dtype, device.type)

        def fill(folder: Path) -> None:
            _write_copy(folder, base, dtype, device)
            write_original(folder, find_base(str(folder)), base)

        try:
            self.root.mkdir(parents=True, exist_ok=True)
            gone = ""
            if free_bytes(self.root) < needed_bytes + RESERVE_BYTES:
                gone = self._prune(target)
            free = free_bytes(self.root)
            if free < needed_bytes + RESERVE_BYTES:
                return f"no 4-bit copy kept: {size(needed_bytes)}, and {size(free)} are free{gone}"
            if not write_once(target, fill):
                return None
            _note(target)
            gone += self._prune(target)
        except OSError as error:
            if target.is_dir():
                return None
            return f"no 4-bit copy kept: {error.strerror or error}"
        return f"a 4-bit copy ({size(needed_bytes)}) is kept in {target}; the next start reads that{gone}"

    def _prune(self, new: Path) -> str:
        """Make room for a ``new`` copy: at most `KEPT` stay, besides those in use. Return the removed, in words."""
        assert self.root is not None
        clear_leftovers(self.root, several_write=True)
        copies = [path for path in self.root.iterdir() if _COPY.fullmatch(path.name) and (path / ORIGINAL).is_file()]
        removed = prune((path for path in copies if path != new), most=KEPT - 1)
        gone = [f"{path.name} ({size(taken)})" for path, taken in removed.items()]
        return f"; {', '.join(gone)} removed: the {KEPT} last used stay" if gone else ""


def _write_copy(folder: Path, base: Base, dtype: torch.dtype, device: torch.device) -> None:
    """Write ``base`` in 4 bits as transformers does, in files of about `FILE_BYTES`."""
    config = for_transformers(base.config)
    config.quantization_config = nf4(dtype).to_dict()
    config.architectures, config.dtype = [base.architecture.class_name], dtype
    config.save_pretrained(str(folder))
    tensors = ((name, value.cpu().contiguous()) for name, value in _in_4_bits(base, dtype, device))
    write_shards(folder, tensors, FILE_BYTES)


def _in_4_bits(base: Base, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a 16-bit base's copy: each as it is, or of a linear layer the weight and its state."""
    tensors = sorted(stored_tensors(base).items())
    for name, stored in counted("keep", tensors, len(tensors), " weights"):
        if name.endswith(BUFFER) or (name == LM_HEAD and base.shape.tied):
            continue
        if not is_linear(name):
            yield name, read_tensor(stored).to(dtype)
            continue
        weight = quantise(stored, dtype, device)
        yield name, weight.data
        for key, value in weight.quant_state.as_dict(packed=True).items():
            yield f"{name}.{key}", value


def _name(base: Base, dtype: torch.dtype | Literal["*"], device_type: str) -> str:
    """The name of a copy's folder: which base, in which state, and how it was quantised."""
    # A commit is known before any weight is downloaded; a folder is known by its content.
    state = commit(base) or short(fingerprint(base))
    name = re.sub(r"[*?\[]", "_", base.public_name.replace("/", "--"))  # which have a meaning in a glob pattern
    return f"{name}-{state[:12]}-nf4-{dtype if isinstance(dtype, str) else dtype_name(dtype)}-{device_type}"


def _verify(folder: Path) -> None:
    """Raises DamagedFolderError unless a copy is unchanged since it was last verified in full, or verifies now."""
    try:
        seen = parse_json((folder / CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        seen = None
    if seen is None or seen != _state(folder):
        known = verify_folder(folder)
        more = {path.name for path in folder.iterdir()} - {MANIFEST, CHECKED, *known}
        if more:
            raise DamagedFolderError(folder, min(more), "only the files of the manifest", "one more")
        _note(folder)


def _note(folder: Path) -> None:
    """Record the state of an intact copy."""
    with suppress(OSError):  # it will be verified in full again
        state = json.dumps(_state(folder))
        (folder / CHECKED).write_text(state, encoding="utf-8")


def _state(folder: Path) -> dict[str, Any] | None:
    """Size, time and a sample's sha256 of each file by name; None if one can't be read."""
    found: dict[str, Any] = {}
    try:
        for path in sorted(path for path in folder.rglob("*") if path.name != CHECKED):
            name, state = path.relative_to(folder).as_posix(), path.stat()
            time = 0 if name == MANIFEST else state.st_mtime_ns  # a manifest's time is that of the last use
            found[name] = [state.st_size, time, _sample(path)] if path.is_file() else []
    except OSError:
        return None
    return found


def _sample(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        last = max(os.fstat(file.fileno()).st_size - BYTES_PER_PLACE, 0)
        for place in range(FILE_PLACES):
            file.seek(last * place // (FILE_PLACES - 1))
            digest.update(file.read(BYTES_PER_PLACE))
    return digest.hexdigest()
