"""Owns atomic writes of folders: written aside, sealed by a manifest, renamed into place.

Called by whatever keeps something on disk; at the start of a run, `recover` and `clear_leftovers` repair what a kill
left behind. Beside a target `name` may stand `.name.tmp-…` (being written), `.name.old-…` (being replaced)
and `.name.gone-…` (being deleted), never a symbolic link: Google Drive has none. Knows nothing of what the files hold,
but that people may edit a model card, and leaves it to the run's lock that one process writes at a time.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath

from lit_qlora.errors import UserError, excerpt
from lit_qlora.storage.files import SaveError, listing, parse_json, sync_file, sync_folder, unreadable
from lit_qlora.storage.lock import folder_lock

MANIFEST = "manifest.json"
CARD = "README.md"
"""The model card of an adapter or a merged model; editing it is no damage, since it does not alter the model."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS, RESULT = "adapter_config.json", "adapter_model.safetensors", "result.json"
"""The files of an adapter: peft's two, and the step and held-out figures of one that a run saved."""
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights of a whole model, as in transformers: one file, else those that the index names."""
MANIFEST_VERSION = 1
ABANDONED_S = 86_400
"""Seconds after which an unfinished folder counts as left by a kill, even where several processes write."""
_LEFTOVER = re.compile(r"\.(?P<target>.+)\.(?P<kind>old|tmp|gone)-\d+-[0-9a-f]{8}")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How a URL begins: pathlib makes "https:/…" of "https://…"; a single letter before the colon is a Windows drive."""
_PICKLES = {".ckpt", ".pt", ".pth", ".bin"}


class DamagedFolderError(UserError):
    """A folder that differs from its manifest, with the file, what was expected and what was found.

    Args:
        folder: the folder.
        file: name of the file in it; None for the folder itself.
        expected: what was expected, in words.
        found: what was found.
    """

    def __init__(self, folder: Path, file: str | None, expected: str, found: str) -> None:
        what = f"expected {expected}, found {found}"
        super().__init__(f"{excerpt(file)}: {what}" if file else what, place=folder)


def write_folder(
    target: Path, fill: Callable[[Path], None], *, replace: bool = False, needed_bytes: int | None = None
) -> None:
    """Let `fill` write files into a temporary folder, then rename that folder to the target.

    A `manifest.json` with the size and sha256 of every file is added last. After any error, one of `fill` too, the
    temporary folder is removed and the target is unchanged.

    Args:
        target: the folder to write; missing parents are created.
        fill: called with the empty temporary folder.
        replace: True to replace an existing folder.
        needed_bytes: size of the files, for the message of a failed write.

    Raises:
        FileExistsError: the target exists, and `replace` is not set or the target is not a folder.
        SaveError: the system refused a write; the message has the bytes needed and the bytes free.
        ValueError: `fill` wrote something other than regular files with portable names.
    """
    with _written_aside(target, replace, needed_bytes, parents=True) as temporary:
        fill(temporary)
        _seal(temporary)


def copy_folder(source: Path, target: Path, *, replace: bool = False) -> None:
    """Copy the files named in a folder's manifest, verify the copy, and rename it to the target.

    No parent is created: where a drive was unmounted, nothing may be written to the disk below it.

    Args:
        source: a folder that `write_folder` made.
        target: the folder to write; its parent exists.
        replace: True to replace an existing folder.

    Raises:
        DamagedFolderError: the source or the copy differs from the manifest.
        SaveError: something could not be read or written.
    """
    files = _read_manifest(source)
    with _written_aside(target, replace, sum(int(entry["bytes"]) for entry in files.values())) as temporary:
        for name in (*files, MANIFEST):
            for folder in reversed(Path(name).parents[:-1]):
                (temporary / folder).mkdir(exist_ok=True)
            shutil.copyfile(source / name, temporary / name)
            sync_file(temporary / name)
        verify_folder(temporary)


@contextmanager
def _written_aside(target: Path, replace: bool, needed_bytes: int | None, *, parents: bool = False) -> Iterator[Path]:
    """An empty folder beside ``target`` that takes its place once it is written; after any error it is gone.

    Raises FileExistsError if there is one already, and it is not to be replaced.
    """
    if os.path.lexists(target) and not (replace and target.is_dir()):
        raise _already_there(target)
    temporary = _aside(target, "tmp")
    try:
        temporary.mkdir(parents=parents)
        with folder_lock(temporary, wait=True):  # by which others see that it is no leftover
            yield temporary
            _put(temporary, target, replace)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            if not replace and error.errno in {errno.EEXIST, errno.ENOTEMPTY}:  # made by another process meanwhile
                raise _already_there(target) from error
            raise SaveError(target, error, needed_bytes) from error
        raise


def _already_there(target: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "already exists and is not overwritten", str(target))


def verify_folder(path: Path) -> dict[str, int]:
    """Compare every file of a folder's manifest with it; returns their sizes in bytes, by name.

    Other files in the folder (desktop.ini, .DS_Store) are allowed: they are never read.

    Args:
        path: a folder that `write_folder` made; its `CARD` may have been edited since.

    Raises:
        DamagedFolderError: the folder, its manifest or a file is missing, unreadable, of another size or content, or
            outside the folder.
    """
    while True:
        seal = _seal_now(path)
        try:
            return _verify_once(path)
        except DamagedFolderError:
            if _seal_now(path) == seal:
                raise  # else another process, such as the run's fit, replaced it meanwhile


def _seal_now(path: Path) -> bytes | None:
    with suppress(OSError):
        return read_seal(path)
    return None


def _verify_once(path: Path) -> dict[str, int]:
    if not path.is_dir():
        raise DamagedFolderError(path, None, "a folder", "a file" if path.exists() else "nothing")
    files, sizes = _read_manifest(path), {}
    for name, entry in files.items():
        found = _measure(path, name)
        sizes[name] = int(found["bytes"])
        for unit, expected in entry.items():
            if found[unit] != expected and name != CARD:
                raise DamagedFolderError(path, name, f"{unit}={expected}", f"{unit}={found[unit]}")
    return sizes


def read_seal(path: Path) -> bytes | None:
    """The bytes of the manifest of the folder at ``path``, equal for equal files; None without a manifest."""
    try:
        return (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def remove_folder(path: Path) -> None:
    """Delete the folder or file at ``path`` so that a kill never leaves a partial one under its name.

    Raises:
        FileNotFoundError: there is none.
    """
    gone = _aside(path, "gone")
    path.rename(gone)
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()


def recover(target: Path) -> None:
    """Finish or undo a `write_folder` of ``target`` that was killed.

    An intact target stays. Otherwise the newest intact temporary folder becomes the target, or else the replaced one.
    If none is intact, no finished folder is touched.
    """
    new, old = _leftovers(target, "tmp"), _leftovers(target, "old")
    if not new and not old:
        return
    whole = next((folder for folder in (target, *new, *old) if is_whole(folder)), None)
    if whole is not None and whole != target:
        if target.exists():
            remove_folder(target)
        whole.rename(target)
        sync_folder(target.parent)
    for leftover in [*new, *(old if whole else [])]:
        shutil.rmtree(leftover, ignore_errors=True)


def clear_leftovers(parent: Path, *, several_write: bool = False) -> None:
    """Remove what killed writes and deletions left in a folder; a replaced folder is recovered first.

    Args:
        parent: where they stand.
        several_write: True where several processes write: what is younger than `ABANDONED_S` may be another's.
    """
    # Sorted, "old" comes before "tmp": a whole new folder is put in place before it could be removed.
    for path in listing(parent):
        match = _LEFTOVER.fullmatch(path.name)
        if not match or _is_locked(path) or (several_write and time.time() - _modified(path) <= ABANDONED_S):
            continue
        if match["kind"] == "old":
            recover(parent / match["target"])
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    with folder_lock(path) as is_free:
        return not is_free


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process was quicker
        return math.inf


def _put(temporary: Path, target: Path, replace: bool) -> None:
    old = _aside(target, "old")
    try:
        if replace and target.exists():
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)
    # The write is done: an old folder that can't be deleted now is no reason to fail, `recover` tries again.
    shutil.rmtree(old, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Write the manifest, sync everything to the disk and make it readable for others."""
    names = sorted(_names(folder))
    for name in names:
        if not _is_portable(name) or not _is_inside(folder, name) or not (folder / name).is_file():
            raise ValueError(f"{folder / name}: only plain files with portable names can be kept")
        sync_file(folder / name)
    files = {name: _measure(folder, name) for name in names}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=1) + "\n", encoding="utf-8")
    sync_file(manifest)
    for subfolder in (path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(subfolder)
    sync_folder(folder)


def _read_manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    expected = f"a manifest of version {MANIFEST_VERSION}"
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise DamagedFolderError(folder, MANIFEST, expected, "no such file") from None
    except (OSError, ValueError) as error:
        raise DamagedFolderError(folder, MANIFEST, expected, unreadable(error)) from error
    match manifest:
        case {"version": int(version), "files": dict(files)} if version == MANIFEST_VERSION:
            pass
        case {"version": version} if version != MANIFEST_VERSION:
            raise DamagedFolderError(folder, MANIFEST, expected, f"version {excerpt(version)}")
        case _:
            raise DamagedFolderError(folder, MANIFEST, expected, "JSON of another kind")
    for name, entry in files.items():
        kinds = {unit: type(value) for unit, value in entry.items()} if isinstance(entry, dict) else None
        if kinds != {"bytes": int, "sha256": str}:
            raise DamagedFolderError(folder, MANIFEST, f"bytes and sha256 of {excerpt(name)}", excerpt(entry))
        if not _is_portable(name) or not _is_inside(folder, name):
            raise DamagedFolderError(folder, name, "a path inside of the folder", "one that leads outside")
    return files


def _measure(folder: Path, name: str) -> dict[str, int | str]:
    try:
        with (folder / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except FileNotFoundError:
        raise DamagedFolderError(folder, name, "a file", "no such file") from None
    except OSError as error:
        raise DamagedFolderError(folder, name, "a readable file", unreadable(error)) from error


def _names(folder: Path) -> set[str]:
    """Names of all files below a folder except the manifest."""
    below = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in below} - {MANIFEST}


def _is_portable(name: str) -> bool:
    """True if a name in a manifest means the same file, below the folder, on every system."""
    plain = name.isprintable() and "\\" not in name and not PureWindowsPath(name).drive
    return plain and not {"", ".", ".."} & set(name.split("/"))


def _is_inside(folder: Path, name: str) -> bool:
    """True if no symbolic link leads from the folder to the file."""
    return Path(os.path.realpath(folder / name)) == Path(os.path.realpath(folder)) / name


def is_whole(folder: Path, check: Callable[[Path], object] = verify_folder) -> bool:
    """True unless a check finds a folder damaged.

    Args:
        folder: a folder that `write_folder` made.
        check: raises DamagedFolderError if it is; default: by its manifest.
    """
    try:
        check(folder)
    except DamagedFolderError:
        return False
    return True


def _aside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _leftovers(target: Path, kind: str) -> list[Path]:
    """The folders beside a target that `_aside` named, and that no process writes, the newest first."""
    matches = ((path, _LEFTOVER.fullmatch(path.name)) for path in listing(target.parent))
    found = [path for path, match in matches if match and match.groups() == (target.name, kind)]
    return sorted((path for path in found if not _is_locked(path)), key=_modified, reverse=True)


def checkpoint_folder(path: str | Path) -> Path:
    """The folder that ``path`` names. Raises UserError for a URL or a file."""
    wanted = "give the path of a checkpoint folder, such as runs/demo/checkpoints/step-00000500"
    if URL.match(str(path)):
        raise UserError(f"{path} is a URL, and checkpoints are only read from this machine: {wanted}")
    folder = Path(path)
    if folder.suffix in _PICKLES or folder.is_file():
        raise UserError(f"{path} is a file, and checkpoints are folders, without pickle: {wanted}")
    return folder
