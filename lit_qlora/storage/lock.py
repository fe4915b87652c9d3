"""Owns locks: the one by which one process at a time uses a run folder, and those that several may share.

`with RunLock(run): …` stands around a whole run. The operating system releases the lock when the process ends, however
it ends, so no lock is ever stale; the file `.lock` stays, and its text only serves the message. Knows nothing of what
the run does.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from lit_qlora.console import complain
from lit_qlora.errors import UserError

LOCK = ".lock"
TRIES = 100
"""Times that a file made anew meanwhile is looked at; where a file system numbers its files anew, it is held."""
_NO_LOCKS_HERE = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}
"""Errors of network and mounted file systems without locks: the run starts there with a warning."""


class RunLock:
    """An exclusive lock on a run folder, which is created if missing.

    Args:
        run: the folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        """Take the lock, without waiting.

        Raises:
            UserError: another process holds it; the message says which.
        """
        path = self._run / LOCK
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected a file (the run's lock): remove it", option="run")
        for tries_left in reversed(range(TRIES)):  # again if another process's start failed, which removed it
            with ExitStack() as until_locked:
                try:
                    self._run.mkdir(parents=True, exist_ok=True)
                    file = until_locked.enter_context(path.open("a+", encoding="utf-8", errors="replace"))
                except (FileNotFoundError, FileExistsError):  # pathlib's, of a folder that is gone by the second look
                    if not tries_left:
                        raise
                    continue
                if not _try_lock(file.fileno()):
                    raise self._in_use(file)
                if is_still(path, os.fstat(file.fileno())) or not tries_left:
                    until_locked.pop_all()
                    break
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        with suppress(OSError):  # a full disk: what is held is the file, whatever it says
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
        if hasattr(os, "register_at_fork"):
            # A data loader's worker inherits the file: it must not keep the lock of a killed process.
            os.register_at_fork(after_in_child=file.close)
        self._file = file
        return self

    def check(self) -> None:
        """Raises UserError if another process holds it now; passes a file system without locks."""
        with suppress(OSError), (self._run / LOCK).open(encoding="utf-8", errors="replace") as file:
            if not flock(file.fileno()):
                raise self._in_use(file)

    def _in_use(self, file: IO[str]) -> UserError:
        file.seek(0)
        holder = file.readline().strip() or "another process"
        return UserError(f"{self._run} is in use by {holder}: wait for it, stop it, or give another --run")

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Lock a ``folder``, where the system can; False if another process has it locked, unless that is to ``wait``."""
    with ExitStack() as stack:
        is_free = True
        with suppress(OSError):  # of another user; Windows, which opens no folder; a file system without locks
            descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
            stack.callback(os.close, descriptor)
            is_free = flock(descriptor, wait=wait)
        yield is_free


def is_still(path: Path, state: os.stat_result) -> bool:
    """True if ``path`` is still the file that had ``state``; False if it was removed since, even if made anew."""
    with suppress(OSError):
        return os.path.samestat(state, path.stat())
    return False


def _try_lock(descriptor: int) -> bool:
    """Lock an open file; False if another process holds it."""
    if os.name == "nt":
        import msvcrt

        # Windows keeps others from reading what is locked: lock one byte far behind the text.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except PermissionError:
            return False
        return True
    try:
        return flock(descriptor)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        complain(
            "warning: the file system of this run folder has no locks; make sure that no second process trains in it"
        )
    return True


def flock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False if another process's lock conflicts.

    Args:
        descriptor: of the open file.
        shared: True for a lock that several may hold.
        wait: True to wait for conflicting locks.

    Raises OSError where such locks are not supported: Windows, some mounted file systems.
    """
    if os.name == "nt":
        raise OSError(errno.ENOSYS, "no locks that several can hold")
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
