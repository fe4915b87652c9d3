"""Owns single files that are whole or as they were: written aside, synced, renamed; and what a failed save says.

Syncing a folder and setting a mode are left out where a file system knows no such thing (Google Drive).
Knows nothing of what the files hold.
"""

import errno
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_qlora.errors import UserError, excerpt

_UNKNOWN_HERE = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF, errno.EISDIR}
"""What a mounted file system may answer to something that only real disks know."""


def size(num_bytes: float) -> str:
    """A number of bytes for people: in GB, MB or kB."""
    unit, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= pair[0]), (1e3, "kB"))
    return f"{num_bytes / unit:,.1f} {name}"


def output_path(output: str, what: str = "file") -> Path:
    """The ``what``, file or folder, that an option ``output`` names.

    Raises UserError for a name that is none, and where a file is to be written and it names a folder.
    """
    path = Path(output)
    try:
        is_folder = what == "file" and (output.endswith(("/", os.sep)) or path.is_dir())
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, below a file, a zero byte in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{excerpt(output)} can't be a {what} ({reason})", option="output", remedy="give another name"
        ) from error
    if not output.strip() or is_folder:
        raise UserError(
            f"expected a {what} to write, got {excerpt(output)}", option="output", remedy=f"give a {what}'s name"
        )
    return path


class SaveError(OSError):
    """Something could not be saved: names the path, the reason, the bytes needed and the bytes free."""

    def __init__(self, path: Path, error: OSError, needed_bytes: int | None = None) -> None:
        self.reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        needs = "" if needed_bytes is None else f"{needed_bytes / 1e6:,.1f} MB needed, "
        super().__init__(f"{path} could not be saved: {self.reason} ({needs}{_free(path)})")
        self.errno = error.errno


def write_file(path: Path, text: str) -> None:
    """Puts ``text`` into ``path`` in one step.

    Raises:
        SaveError: it could not be written; what stood there still does.
    """
    replace_file(path, text.encode())


def replace_file(path: Path, content: bytes) -> None:
    """Puts ``content`` into ``path`` in one step.

    Raises:
        SaveError: it could not be written; what stood there still does.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # the next write takes the same name
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SaveError(path, error, len(content)) from error
        raise


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`. Raises ValueError for what is nested deeper than Python's stack, too: files come from anywhere."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def sync_file(path: Path) -> None:
    """Has a file on the disk, and readable by others: safetensors makes 0600."""
    try:
        path.chmod(0o644)
    except OSError as error:
        if error.errno not in _UNKNOWN_HERE:
            raise
    with path.open("r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Has a folder's names on the disk, where the file system can."""
    if os.name == "nt":  # which can't open a folder
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _UNKNOWN_HERE:
            raise
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNKNOWN_HERE:
            raise
    finally:
        os.close(descriptor)


def disk_error(error: Exception, path: Path) -> OSError:
    """The OSError that safetensors wraps into words: ``I/O error: … (os error 28)``."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else OSError(str(error))


def _free(path: Path) -> str:
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free"
    except OSError:
        return "free space unknown"
