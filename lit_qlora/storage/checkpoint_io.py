"""Owns how Lightning's checkpoints reach the disk: as whole, verified folders without pickle.

Given to the Trainer as a plugin, `Trainer(plugins=[FolderCheckpointIO()])`; from then on every path of a
checkpoint is a folder. Knows nothing of when to save, which to keep and what is in a checkpoint.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from lit_qlora.storage.folders import DamagedFolderError, checkpoint_folder, remove_folder, verify_folder, write_folder
from lit_qlora.storage.state import SKELETON, check_tensors, load_state, num_bytes, save_state

RUN = "run"
"""The part of a checkpoint that identifies its run."""
_NEEDED = {
    *("callbacks", "epoch", "global_step", "loops", "lr_schedulers", "optimizer_states", "state_dict"),  # Lightning's
    *("metrics_line", RUN),  # our own callbacks'
}
"""Parts of every training checkpoint: no run resumes from one that lacks any."""


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
            weights_only: Lightning's, likewise: nothing in these files can run code.

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
