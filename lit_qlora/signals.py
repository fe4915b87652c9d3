"""Owns the default action of signals: the process exits with one line, and status 128 + the signal's number.

That is 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP (the terminal is gone) and 138 for SIGUSR1 (a batch system's
warning); the latter two stay ignored if they were, as under nohup. Files are cleaned up on the way out, since the
signal raises SystemExit where it arrives; but not inside of an import, where it could be swallowed. Knows no training.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from shutil import get_terminal_size
from types import FrameType
from typing import Any

URGENT = (signal.SIGINT, signal.SIGTERM)
"""Signals that exit at once when repeated."""
PATIENT = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Signals not sent by a person: a lost connection brings several, and a session's end one after SIGTERM. None on
Windows."""
SIGNALS = (*URGENT, *PATIENT)
WARNING = getattr(signal, "SIGUSR1", 0)
"""A batch system's warning that time is almost over: `sbatch --signal=USR1@120`."""
IMPORT = ModuleSpec.__init__.__code__.co_filename
"""What frames of Python's import give as their file: it is frozen, and has none."""
Handler = Callable[[int, FrameType | None], None]


class LeftAtOnce(SystemExit):
    """A signal that exits at once, without waiting for the current step or a copy."""


_resumes = [True]
"""True if the running command, given again, resumes."""
_is_ending = [False]
"""True if the running command already ends by a signal; see `hold_off`."""


@contextmanager
def leave_in_one_line(resumes: bool = True, ends_process: bool = False) -> Iterator[None]:
    """A context that handles the signals, in the main thread only.

    Args:
        resumes: the line says that the command, given again, resumes.
        ends_process: the process ends behind it, with the command's status: `PATIENT` signals no longer change that.
    """
    before, _resumes[:], _is_ending[:] = [*_resumes], [resumes], [False]
    previous = take_over(leave_at_once)
    try:
        yield
    finally:
        give_back(previous)
        if ends_process:
            take_over(signal.SIG_IGN, PATIENT)
        _resumes[:], _is_ending[:] = before, [False]


@contextmanager
def nothing_open() -> Iterator[None]:
    """A context for the imports at the start of a command, which take seconds: a signal exits at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        say_stopped(number)
        _exit(number, frame)

    previous = take_over(handle)
    try:
        yield
    finally:
        give_back(previous)


@contextmanager
def no_signals_for_children() -> Iterator[None]:
    """A context in which started processes block signals: a terminal and `timeout` send them to all, and only one must
    answer.

    Blocked and not ignored, so that signals meanwhile still reach this process. Does nothing on Windows.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def hear() -> None:
    """Unblock the signals in a process started under `no_signals_for_children`, once it handles them."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def take_over(handler: Handler | signal.Handlers, numbers: Iterable[int] = SIGNALS) -> dict[int, Any]:
    """Set a handler for signals; does nothing outside of the main thread.

    Args:
        handler: for each of them.
        numbers: of the signals; those of `PATIENT` that are ignored stay so.

    Returns:
        The earlier handlers, for `give_back`.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    ignored = {number for number in PATIENT if signal.getsignal(number) is signal.SIG_IGN}
    return {number: signal.signal(number, handler) for number in numbers if number not in ignored}


def give_back(previous: dict[int, Any]) -> None:
    """Restore earlier handlers.

    Args:
        previous: as `take_over` returned them.
    """
    for number, handler in previous.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def hold_off() -> None:
    """Have `leave_at_once` ignore `PATIENT` signals until the command ends: it ends by a signal, and saves or copies.

    They are not ignored by the system's means, since Lightning puts back the handlers that it found.
    """
    _is_ending[:] = [True]


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Exit with one line, after an import in progress; a second signal does not wait for files either.

    Args:
        number: of the signal.
        frame: not used.
    """
    if number in PATIENT and _is_ending[0]:
        return
    take_over(_exit, URGENT)
    take_over(signal.SIG_IGN, PATIENT)
    say_stopped(number)
    _leave(number, frame)


def _leave(number: int, frame: FrameType | None) -> None:
    if not _is_in_import(frame):
        raise LeftAtOnce(128 + number)
    # A library may catch the exception, or be left with half a module: retry a little later.
    is_again = threading.Event()

    def again() -> None:
        is_again.set()
        signal.raise_signal(number)

    def handle(number: int, frame: FrameType | None) -> None:
        leave = _leave if is_again.is_set() else _exit
        leave(number, frame)

    signal.signal(number, handle)
    timer = threading.Timer(0.02, again)
    timer.daemon = True
    timer.start()


def _is_in_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORT:
            return True
        frame = frame.f_back
    return False


def _exit(number: int, frame: FrameType | None) -> None:
    sys.stderr.flush()
    os._exit(128 + number)


def say_stopped(number: int) -> None:
    """Print that the signal ``number`` has ended the command."""
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first does
        return
    then = "; given again, the same command resumes from what is saved" if _resumes[0] else ""
    print_now(f"stopped by {signal_name(number)}{then}", sys.stderr)


def signal_name(number: int) -> str:
    """The common name of the signal ``number``: Ctrl-C, SIGTERM."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def print_now(line: str, stream: Any = None) -> None:
    """Print a line from within a handler, which may interrupt another print that it can't wait for.

    On a terminal it takes the place of a progress bar and of the ^C behind that.

    Args:
        line: without its end.
        stream: stream to print to; standard output by default.
    """
    stream = stream or sys.stdout
    start = f"\r{'':{get_terminal_size().columns - 1}}\r" if stream.isatty() else "\n"
    with suppress(RuntimeError):
        print(f"{start}{line}", file=stream, flush=True)
