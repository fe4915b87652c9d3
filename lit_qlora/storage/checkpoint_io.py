"""Owns how Lightning's checkpoints reach the disk: as whole, verified folders without pickle.

Given to the Trainer as a plugin, `Trainer(plugins=[FolderCheckpointIO()])`; from then on every path of a
checkpoint is a folder. Knows nothing of when to save, which to keep and what is in a checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from lit_qlora.errors import UserError, excerpt
from lit_qlora.storage.folders import DamagedFolderError, checkpoint_folder, remove_folder, verify_folder, write_folder
from lit_qlora.storage.foreign import Kind, whole
from lit_qlora.storage.state import SKELETON, check_tensors, load_state, num_bytes, save_state

RUN = "run"
"""The part of a checkpoint that identifies its run."""
_NEEDED = {
    *("callbacks", "epoch", "global_step", "loops", "lr_schedulers", "optimizer_states", "state_dict"),  # Lightning's
    *("metrics_line", RUN),  # our own callbacks'
}
"""Parts of every training checkpoint: no run resumes from one that lacks any."""

LENGTH = ("max_epochs", "max_steps")
"""The options of trainer that say how long a run is."""


def _are_settings(value: Any) -> bool:
    if not (isinstance(value, dict) and all(isinstance(value.get(one, {}), dict) for one in ("model", "trainer"))):
        return False
    return all(type(value.get("trainer", {}).get(name, 0)) in (int, NoneType) for name in LENGTH)


_TEXT = Kind("a text", lambda value: isinstance(value, str))
_OF_RUN = dict.fromkeys(
    ("base", "base_name", "tokenizer", "prompt_format", "train_rows", "held_out_rows", "precision"), _TEXT
) | {
    "adapter": Kind("a text or null", lambda value: isinstance(value, str | None)),
    "steps": whole(0, 10**15),
    "settings": Kind("the settings of a run", _are_settings),
}
"""The keys that identify a run in its checkpoints, with their kinds."""


def run_record(checkpoint: Mapping[str, Any], folder: object) -> dict[str, Any]:
    """The record of the run in a checkpoint.

    Args:
        checkpoint: its state.
        folder: where it was read, for messages.

    Raises:
        UserError: the record is not as it was saved.
    """
    found = checkpoint.get(RUN)
    record = found if isinstance(found, dict) else {}
    for name, kind in _OF_RUN.items():
        if name not in record or not kind.holds(record[name]):
            got = excerpt(record[name]) if name in record else "nothing"
            raise UserError(
                f"{folder} was altered: in its record of the run, {name}: expected {kind.expected}, got {got}",
                option="run",
                remedy="remove that folder, to resume from the one before",
            )
    return record


class FolderCheckpointIO(CheckpointIO):
    """Saves, loads and removes checkpoints that are folders."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: of Lightning's: plain values and tensors.
            path: of its folder.
            storage_options: Lightning's; has no meaning here.

        Raises:
            UserError: the path is a URL or a file.
            FileExistsError: there is one of that name already.
            SaveError: it could not be written; nothing of it is left behind.
            TypeError: the checkpoint holds something other than plain values and tensors.
        """
        write_folder(
            checkpoint_folder(path), lambda folder: save_state(checkpoint, folder), needed_bytes=num_bytes(checkpoint)
        )

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify a checkpoint, then read it onto the CPU; Lightning moves the tensors where they belong.

        Args:
            path: of its folder.
            map_location: Lightning's; has no meaning here.
            weights_only: Lightning's; has no meaning here: nothing in these files can run code.

        Raises:
            UserError: the path is a URL or a file; as DamagedFolderError: the folder is missing or not intact.
        """
        folder = checkpoint_folder(path)
        verify_folder(folder)
        return load_state(folder)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, if there is one.

        Raises:
            UserError: the path is a URL or a file.
        """
        folder = checkpoint_folder(path)
        if folder.exists():
            remove_folder(folder)


def check_checkpoint(folder: Path) -> None:
    """Verify that ``folder`` is intact and that training can resume from it.

    Raises DamagedFolderError, for an intact folder that holds no checkpoint, too.
    """
    verify_folder(folder)
    missing = sorted(_NEEDED - load_state(folder, with_tensors=False).keys())
    if missing:
        raise DamagedFolderError(folder, SKELETON, "a training's state", f"no {missing[0]}")
    check_tensors(folder)
