"""Owns sealed folders that several processes share, as those of a cache: none is removed while a process uses it.

The time of a folder's manifest is that of its last use. Knows nothing of what the folders hold.
"""

import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from weakref import finalize

from lit_qlora.storage.folders import MANIFEST, remove_folder
from lit_qlora.storage.lock import flock


class Held:
    """A use of a folder, which keeps others from removing it until this is closed or garbage-collected.

    Waits for a removal in progress. Holds nothing for a missing folder.

    Args:
        folder: made by `write_folder`.
    """

    def __init__(self, folder: Path) -> None:
        self.close: Callable[[], object] = lambda: None
        with suppress(OSError):  # not there, or a file system without locks
            descriptor = os.open(folder / MANIFEST, os.O_RDONLY)
            self.close = finalize(self, os.close, descriptor)
            with suppress(OSError):  # of another user
                os.utime(folder / MANIFEST)
            flock(descriptor, shared=True, wait=True)


def remove_unused(folder: Path) -> bool:
    """Remove a folder unless it is, or may be, in use; without a manifest nobody can use it. True if it is gone."""
    manifest = folder / MANIFEST
    with suppress(OSError):
        if os.name == "nt" or not manifest.is_file():  # Windows renames no folder of which a process has a file open
            remove_folder(folder)
        else:
            with manifest.open("rb") as file:
                is_alone = flock(file.fileno())
                if is_alone and os.path.samestat(os.fstat(file.fileno()), manifest.stat()):  # or it was made anew
                    remove_folder(folder)
    return not folder.exists()


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
