"""Owns what Ctrl-C and SIGTERM do wherever nothing else is said: the process leaves with one line, 130 or 143.

Files are put right on the way out, for the signal becomes a SystemExit where it arrives. Knows no training.
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


@contextmanager
def leave_in_one_line() -> Iterator[None]:
    """Takes over the signals until it closes; only a main thread may."""
    previous = take_over(leave_at_once)
    try:
        yield
    finally:
        give_back(previous)


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
    """Leaves with one line; one more signal doesn't even wait for the files."""
    take_over(lambda number, frame: os._exit(128 + number))
    print(f"\nstopped by {NAMES[signal.Signals(number)]}; given again, the same command goes on", file=sys.stderr)
    raise LeftAtOnce(128 + number)
