"""Owns single files: atomic writes, what an option may name to be written, JSON and UTF-8 read, and the words for each
failure.

A file is written aside, synced and renamed; folder syncs and file modes are skipped on file systems without them
(Google Drive). Knows nothing of what the files hold.
"""

import ast
import errno
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from warnings import catch_warnings

from lit_qlora.errors import UserError, excerpt, one_line

GIB = 1024**3
NO_VALUE = "it holds a number, a date or a tag that can't be one"
"""The problem if YAML's reader fails by an error of Python's."""
_UNKNOWN_HERE = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF, errno.EISDIR}
"""Errors by which a mounted file system refuses what only local disks support."""


def size(num_bytes: float) -> str:
    """``num_bytes`` in words, in GB, MB or kB, of 1000 each."""
    unit, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= pair[0]), (1e3, "kB"))
    return f"{num_bytes / unit:,.1f} {name}"


def output_path(output: str, what: str = "file", option: str = "output") -> Path:
    """The path that an option names.

    Args:
        output: its value.
        what: kind of the output: a file or a folder.
        option: its name, for messages.

    Raises:
        UserError: for an invalid name, and for a folder where a file is to be written.
    """
    path = Path(output)
    try:
        is_folder = what == "file" and (output.endswith(("/", os.sep)) or path.is_dir())
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, below a file, a zero byte in it
        reason = getattr(error, "strerror", None) or error
        problem = f"{excerpt(output)} can't be a {what} ({reason})"
        raise UserError(problem, option=option, remedy="give another name") from error
    if output.strip() in ("", "-") or is_folder or len(output.splitlines()) > 1:  # nothing goes to the terminal
        problem = f"expected a {what} to write, got {excerpt(output)}"
        raise UserError(problem, option=option, remedy=f"give a {what}'s name")
    return path


def page_path(page: str) -> Path:
    """The path of the ``page`` that the option ``html`` names.

    Raises UserError as `output_path`, and where its folder is missing.
    """
    path = output_path(page, option="html")
    require_folder(path, "html")
    return path


def require_folder(path: Path, option: str = "output") -> None:
    """Check that what an option names is in a folder that is there.

    Args:
        path: path that the option names.
        option: its name, for messages.

    Raises:
        UserError: it is not.
    """
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}", option=option, remedy="make it, or give another name")


def require_new(path: Path, why: str = "") -> None:
    """Check that what the option ``output`` names is not there.

    Args:
        path: path that the option names.
        why: what is there is not taken, in brackets; or nothing.

    Raises:
        UserError: it is there.
    """
    if path.exists():
        raise UserError(f"{path} exists already{why}", option="output", remedy="give another name or remove it")


class SaveError(OSError):
    """A failed save, with its path, the reason, the bytes needed and the bytes free.

    Args:
        path: what was to be written.
        error: why it failed.
        needed_bytes: size of what was to be written; None if unknown.
    """

    def __init__(self, path: Path, error: OSError, needed_bytes: int | None = None) -> None:
        self.reason = error.strerror or one_line(error) or type(error).__name__
        needs = "" if needed_bytes is None else f"{needed_bytes / 1e6:,.1f} MB needed, "
        super().__init__(f"{path} could not be saved: {self.reason} ({needs}{_free(path)})")
        self.errno = error.errno


@contextmanager
def saved_by(option: str, remedy: str | None = None) -> Iterator[None]:
    """Name the option that says where a file goes if its save fails.

    Args:
        option: the option.
        remedy: what to do, where there is more than to make room.

    Raises:
        UserError: in place of a SaveError.
    """
    try:
        yield
    except SaveError as error:
        raise UserError(str(error), option=option, remedy=remedy) from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically.

    Args:
        path: the file; its folder exists.
        content: bytes, or a text, which is written in UTF-8.

    Raises:
        SaveError: it could not be written; the previous file is unchanged.
    """
    content = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.unlink(missing_ok=True)  # in a folder from elsewhere, it may be a link
        with aside.open("xb") as file:
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


LFS = b"version https://git-lfs"
"""The beginning of what git leaves in place of a large file where git-lfs is missing."""
LFS_POINTER = "is a git-LFS pointer, not the file itself", "run 'git lfs pull' where it was cloned"
"""Problem and remedy of a file that begins so."""


def decoded(content: bytes, *, remedy: str = "save it as UTF-8", **fields: Any) -> str:
    """The text in UTF-8 bytes, without a mark at their start.

    Args:
        content: the bytes.
        remedy: of the error.
        **fields: of the error, such as ``place``.

    Raises:
        UserError: they are no UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start})", remedy=remedy, **fields) from error


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads` whose only error is ValueError: files come from anywhere.

    Args:
        text: JSON; in UTF-8, if bytes.
        **options: as of `json.loads`.

    Raises:
        ValueError: with a reason of `unreadable`.
    """
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        is_number = type(error) is ValueError  # the one thing of which the parser raises no class of its own
        raise ValueError("it holds a number of too many digits" if is_number else unreadable(error)) from error


def parse_list(text: str) -> list[Any] | None:
    """The list that a ``text`` spells, as JSON or as Python writes one; None for any other text."""
    for read in (parse_json, ast.literal_eval):
        # Of a backslash without a meaning, Python warns.
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError), catch_warnings(action="ignore"):
            found = read(text)
            if isinstance(found, list):
                return found
    return None


_OPEN_STRING = re.compile(r'"(?:[^"\\]|\\.)*\\?', re.DOTALL)
"""A JSON string without its end."""


def unreadable(error: Exception) -> str:
    """The reason why a file can't be read, from the ``error``: Python's own words name types, positions and limits."""
    match error:
        case UnicodeDecodeError():
            reason = f"it is not UTF-8 (byte {error.start:,})"
        case json.JSONDecodeError() if not error.doc.strip():
            reason = "it is empty"
        case json.JSONDecodeError():
            is_cut = error.pos >= len(error.doc.rstrip()) or _OPEN_STRING.fullmatch(error.doc, error.pos)
            reason = f"it is no JSON: {'its end is missing' if is_cut else f'see line {error.lineno:,}'}"
        case struct.error():
            reason = "its end is missing"
        case RecursionError():
            reason = "it is nested too deeply"
        case KeyError():
            reason = f"it has no {error}"
        case TypeError() | AttributeError() | LookupError():
            reason = "it holds values of another kind"
        case _:
            reason = getattr(error, "strerror", None) or one_line(error)
    return reason


def sync_file(path: Path) -> None:
    """Sync the file at ``path`` to the disk and make it readable for others: safetensors creates it with mode 0600."""
    with _if_supported():
        path.chmod(0o644)
    with path.open("r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Sync the entries of the folder at ``path`` to the disk, where the file system can."""
    if os.name == "nt":  # which can't open a folder
        return
    with _if_supported():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _if_supported() -> Iterator[None]:
    """Do without what the file system does not support."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNKNOWN_HERE:
            raise


def disk_error(error: Exception, path: Path) -> OSError:
    """The OSError in a safetensors message such as ``I/O error: … (os error 28)``.

    Args:
        error: of safetensors.
        path: path that was to be written.
    """
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else OSError(str(error))


def existing_folder(path: Path) -> Path:
    """``path``, or its nearest parent that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def listing(folder: Path) -> list[Path]:
    """The entries of a ``folder``, by name; empty if there is none, or another process has just removed it."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def names_around(path: Path) -> list[str]:
    """The names in the folder of ``path``, which may not be there itself; empty without that folder."""
    return [one.name for one in listing(path.parent)]


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of ``path``, which may not exist yet. Raises OSError."""
    return shutil.disk_usage(existing_folder(path)).free


def require_room(path: Path, needed_bytes: int, what: str, *, option: str, remedy: str) -> None:
    """Raises UserError if a disk has too little room.

    Args:
        path: on that disk; it may not exist yet.
        needed_bytes: for ``what``.
        what: needs them, in words.
        option: option that the error names.
        remedy: beside freeing some.
    """
    free = free_bytes(path)
    if free < needed_bytes:
        problem = f"{what} needs {size(needed_bytes)}, and the disk has {size(free)} left"
        raise UserError(problem, option=option, remedy=f"free some, or {remedy}")


def _free(path: Path) -> str:
    try:
        return f"{free_bytes(path.parent) / 1e6:,.1f} MB free"
    except OSError:
        return "free space unknown"
