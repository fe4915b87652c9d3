"""Owns sealed folders that several processes share, as those of a cache: none is removed while a process uses it.

The time of a folder's manifest is that of its last use. Knows nothing of what the folders hold.
"""

import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from weakref import finalize

from lit_qlora.storage.folders import MANIFEST, remove_folder, write_folder
from lit_qlora.storage.lock import TRIES, flock, is_still


def write_once(target: Path, fill: Callable[[Path], None]) -> bool:
    """Write a folder by `write_folder`, unless another process is quicker.

    Args:
        target: the folder to write.
        fill: called with the empty temporary folder.

    Returns:
        True if this process wrote it. Where another did, a third may have removed it since.

    Raises:
        OSError: it can't be written, and no other process did.
    """
    try:
        write_folder(target, fill)
    except OSError as error:
        was_removed = isinstance(error, FileExistsError) and not os.path.lexists(target)
        if not target.is_dir() and not was_removed:
            raise
        return False
    return True


class Held:
    """A use of a folder, which keeps others from removing it until this is closed or garbage-collected.

    Waits for a removal in progress, and holds the folder that was made anew meanwhile.

    Args:
        folder: made by `write_folder`.

    Attributes:
        found: False if there is no such folder; nothing is held then.
    """

    def __init__(self, folder: Path) -> None:
        self.close: Callable[[], object] = lambda: None
        self.found, self._folder = True, folder
        self._descriptor: int | None = None
        manifest = folder / MANIFEST
        for _ in range(TRIES):
            self.close()
            try:
                self._descriptor = os.open(manifest, os.O_RDONLY)
            except OSError as error:  # a manifest that can't be read is there all the same
                self.found, self._descriptor = not isinstance(error, FileNotFoundError), None
                return
            self.close = finalize(self, os.close, self._descriptor)
            with suppress(OSError):  # of another user
                os.utime(manifest)
            with suppress(OSError):  # a file system without locks
                flock(self._descriptor, shared=True, wait=True)
            if is_still(manifest, os.fstat(self._descriptor)):
                return

    def discard(self) -> None:
        """Close, and remove the folder, which is damaged, even if others use it; one made anew meanwhile stays.

        Raises:
            OSError: it can't be removed.
        """
        held = None if self._descriptor is None else os.fstat(self._descriptor)
        self.close()

        def is_that(manifest: Path) -> bool:
            return is_still(manifest, held) if held else self.found or not manifest.is_file()

        with suppress(FileNotFoundError):
            _remove_if(self._folder, is_that)


def remove_unused(folder: Path) -> bool:
    """Remove a ``folder`` unless it is, or may be, in use; without a manifest nobody can use it. True if it is gone."""

    def is_unused(manifest: Path) -> bool:
        if os.name == "nt" or not manifest.is_file():  # Windows renames no folder of which a process has a file open
            return True
        opened = files.enter_context(manifest.open("rb")).fileno()
        return flock(opened) and is_still(manifest, os.fstat(opened))

    with suppress(OSError), ExitStack() as files:
        _remove_if(folder, is_unused)
    return not folder.exists()


def _remove_if(folder: Path, may_go: Callable[[Path], bool]) -> None:
    """Remove a folder if its manifest says that it may go, and the folder is the same as before that was asked."""
    state = folder.stat()
    if may_go(folder / MANIFEST) and is_still(folder, state):
        remove_folder(folder)


def prune(
    folders: Iterable[Path], *, most: float = math.inf, most_bytes: float = math.inf, unused_s: float = 0.0
) -> dict[Path, int]:
    """Remove the folders that were used longest ago, but none in use.

    Args:
        folders: all that count.
        most: number of folders that may stay.
        most_bytes: bytes that these may take together.
        unused_s: seconds for which a folder must not have been used to be removed.

    Returns:
        The removed folders, with their bytes.
    """
    found = []
    for folder in folders:
        with suppress(OSError):  # another process removes, too
            num_bytes = sum(file.stat().st_size for file in folder.iterdir())
            manifest = folder / MANIFEST
            found.append((manifest.stat().st_mtime if manifest.is_file() else 0.0, num_bytes, folder))
    removed, latest = {}, time.time() - unused_s
    for used, num_bytes, folder in sorted(found, reverse=True):
        most, most_bytes = most - 1, most_bytes - num_bytes
        if min(most, most_bytes) < 0 and used < latest and remove_unused(folder):
            removed[folder] = num_bytes
    return removed
