"""Owns the 4-bit copies of bases that are kept on disk: a later start reads 3.9 GB of a 7B instead of 13.5.

A copy is made once a base has been quantised, and is the very bytes that the first run computed with. It is sealed
and verified as a checkpoint is. Knows neither adapters nor what a base is used for.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from lit_qlora.errors import UserError
from lit_qlora.model.base import Base, commit, find_base
from lit_qlora.model.fingerprint import fingerprint, shown, write_original
from lit_qlora.storage.folders import DamagedFolderError, remove_folder, verify_folder, write_folder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

KEPT_FROM = 500_000_000
"""Weights from which quantising takes long enough to be worth the disk."""
RESERVE_BYTES = 5_000_000_000
"""Left free on the disk, for checkpoints and whatever else a run makes."""


class Copies:
    """The copies below one folder.

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
        """``base`` as the copy that computes in ``dtype`` (None: in any); None where there is no whole one."""
        if self.root is None or not self.root.is_dir() or base.in_4_bits:
            return None
        for folder in sorted(self.root.glob(self._name(base, dtype, device_type))):
            try:
                verify_folder(folder)
                return Base(base.name, str(folder), find_base(str(folder)).config)
            except (DamagedFolderError, UserError):
                remove_folder(folder)
        return None

    def keep(self, model: "LlamaForCausalLM", base: Base, dtype: torch.dtype, device_type: str) -> str | None:
        """Keeps ``model``, which was just loaded from ``base`` and has no adapter yet; says so, or why not."""
        num_weights = base.shape.num_parameters
        if self.root is None or base.in_4_bits:
            return None
        if num_weights < KEPT_FROM and not self.keeps_small:
            return None
        target = self.root / self._name(base, dtype, device_type)
        needed_bytes = sum(value.numel() * value.element_size() for value in model.state_dict().values())

        def fill(folder: Path) -> None:
            model.save_pretrained(str(folder), max_shard_size="1GB")
            write_original(folder, find_base(str(folder)), base)

        try:
            self.root.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self.root).free
            if free_bytes < needed_bytes + RESERVE_BYTES:
                return f"no 4-bit copy kept: {needed_bytes / 1e9:.1f} GB, and {free_bytes / 1e9:.1f} GB are free"
            write_folder(target, fill)
        except OSError as error:
            if target.is_dir():
                return None  # another process was quicker
            return f"no 4-bit copy kept: {error.strerror or error}"
        return f"a 4-bit copy ({needed_bytes / 1e9:.1f} GB) is kept in {target}; the next start reads that"

    def _name(self, base: Base, dtype: torch.dtype | None, device_type: str) -> str:
        """Of a copy's folder: which base, in which state, and how it was quantised."""
        # A commit is known before any weight is here; a folder's content tells by itself.
        state = commit(base) or shown(fingerprint(base))
        kind = "*" if dtype is None else str(dtype).removeprefix("torch.")
        return f"{base.public_name.replace('/', '--')}-{state[:12]}-nf4-{kind}-{device_type}"
