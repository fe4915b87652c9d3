"""Owns what signals do wherever nothing else is said: the process leaves with one line, and 128 + the signal's number.

That is 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP (the terminal is gone) and 138 for SIGUSR1 (a batch system's
warning); the latter two stay ignored where they are, as under nohup. Files are put right on the way out, for the signal
becomes a SystemExit where it arrives; but not inside of an import, where it could be swallowed. Knows no training.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

URGENT = (signal.SIGINT, signal.SIGTERM)
"""Given again, they wait for nothing."""
PATIENT = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Sent by no person: a line that drops brings several, and a session's end one behind SIGTERM. None on Windows."""
SIGNALS = (*URGENT, *PATIENT)
WARNING = getattr(signal, "SIGUSR1", 0)
"""Of a batch system, that the time is almost over: `sbatch --signal=USR1@120`."""
Handler = Callable[[int, FrameType | None], None]


class LeftAtOnce(SystemExit):
    """A signal that waits for nothing: neither for the step under way nor for a copy."""


_resumes = [True]
"""Whether the command that runs, given again, goes on."""


@contextmanager
def leave_in_one_line(resumes: bool = True) -> Iterator[None]:
    """Takes over the signals until it closes; only a main thread may. The line says so of a command that resumes."""
    before, _resumes[:] = [*_resumes], [resumes]
    previous = take_over(leave_at_once)
    try:
        yield
    finally:
        give_back(previous)
        _resumes[:] = before


@contextmanager
def nothing_open() -> Iterator[None]:
    """Around imports with which a command begins, for seconds: a signal leaves right there, with its one line."""
    previous = take_over(_exit_in_one_line)
    try:
        yield
    finally:
        give_back(previous)


@contextmanager
def no_signals_for_children() -> Iterator[None]:
    """Processes begun within it hear no signal: a terminal and `timeout` send them to all, and one is to answer.

    Blocked and not ignored, so that what comes meanwhile still reaches this process. Does nothing on Windows.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def take_over(handler: Handler | signal.Handlers, numbers: Iterable[int] = SIGNALS) -> dict[int, Any]:
    """Sets ``handler`` for signals, and returns what was there; nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    ignored = {number for number in PATIENT if signal.getsignal(number) is signal.SIG_IGN}
    return {number: signal.signal(number, handler) for number in numbers if number not in ignored}


def give_back(previous: dict[int, Any]) -> None:
    """Sets what `take_over` returned."""
    for number, handler in previous.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Leaves with one line, behind an import that is under way; one more doesn't even wait for the files."""
    take_over(_exit, URGENT)
    take_over(signal.SIG_IGN, PATIENT)
    _say(number)
    _leave(number, frame)


def _leave(number: int, frame: FrameType | None) -> None:
    if not _is_in_import(frame):
        raise LeftAtOnce(128 + number)
    # A library may catch what is raised there, or be left with half a module: once more, a little later.
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
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _exit_in_one_line(number: int, frame: FrameType | None) -> None:
    _say(number)
    _exit(number, frame)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.stderr.flush()
    os._exit(128 + number)


def _say(number: int) -> None:
    then = "; given again, the same command goes on" if _resumes[0] else ""
    say(f"\nstopped by {name_of(number)}{then}", sys.stderr)


def name_of(number: int) -> str:
    """A signal as people call it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def say(line: str, stream: Any = None) -> None:
    """Prints a line from within a handler: it may have come in the middle of another print, which it can't wait for."""
    with suppress(RuntimeError):
        print(line, file=stream, flush=True)
