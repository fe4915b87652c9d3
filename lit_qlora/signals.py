"""Owns what Ctrl-C and SIGTERM do wherever nothing else is said: the process leaves with one line, 130 or 143.

Files are put right on the way out, for the signal becomes a SystemExit where it arrives; but not inside of an
import, where it could be swallowed. Knows no training.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
Handler = Callable[[int, FrameType | None], None]


class LeftAtOnce(SystemExit):
    """A signal that waits for nothing: neither for the step under way nor for a copy."""


_resumes = [True]
"""Whether the command that runs, given again, goes on."""


@contextmanager
def leave_in_one_line(resumes: bool = True) -> Iterator[None]:
    """Takes over the signals until it closes; only a main thread may. The line says so of a command that resumes."""
    _resumes[:] = [resumes]
    previous = take_over(leave_at_once)
    try:
        yield
    finally:
        give_back(previous)


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
    """Processes begun within it hear neither signal: a terminal and `timeout` send them to all, and one is to answer.

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


def take_over(handler: Handler) -> dict[int, Any]:
    """Sets ``handler`` for both signals, and returns what was there; nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in SIGNALS}


def give_back(previous: dict[int, Any]) -> None:
    """Sets what `take_over` returned."""
    for number, handler in previous.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Leaves with one line, behind an import that is under way; one more signal doesn't even wait for the files."""
    take_over(_exit)
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
    print(f"\nstopped by {NAMES[signal.Signals(number)]}{then}", file=sys.stderr)
