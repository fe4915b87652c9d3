"""Owns how numbers of things are written, 1 row, 2 rows, how long something takes, and what a value is called.

Words are given in the plural. Knows nothing of what is counted.
"""

import re
from types import NoneType

_NOUNS = (
    "GPU answer character checkpoint conversation device epoch file layer line machine prompt question row sample "
    "source step text token turn"
)
NOUNS = {f"{noun}s": noun for noun in _NOUNS.split()} | {"micro-batches": "micro-batch", "processes": "process"}


def number_of(count: int, words: str) -> str:
    """A number of things in words; see `of_number`.

    Args:
        count: how many of them there are.
        words: begin with what they are, such as ``rows left out: no answer``.
    """
    return f"{count:,} {of_number(count, words)}"


def of_number(count: int, words: str) -> str:
    """``words`` in the number of ``count``: for 1, the first noun is in the singular.

    Args:
        count: how many of them there are.
        words: in the plural, without a verb that would have a number, too.
    """
    return words if count != 1 else re.sub(rf"\b(?:{'|'.join(NOUNS)})\b", lambda found: NOUNS[found[0]], words, count=1)


def duration(least: float, most: float | None = None) -> str:
    """A time in words: under 1 s, 90 s, 14 min, 2.3 h; or a span, 1.6 to 2.3 h, unless both ends look alike.

    Args:
        least: seconds.
        most: the span's end in seconds, which chooses the unit; default: ``least``.
    """
    most = least if most is None else most
    if most < 1:
        return "under 1 s"
    unit, digits, name = (1, 0, "s") if most < 120 else (60, 0, "min") if most < 7200 else (3600, 1, "h")
    ends = f"{least / unit:.{digits}f}", f"{most / unit:.{digits}f}"
    return f"{' to '.join(dict.fromkeys(ends))} {name}"


def kind(value: object) -> str:
    """The kind of a ``value``, in words of the files."""
    kinds = {
        bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "one object",
        NoneType: "null",
    }  # fmt: skip
    return kinds.get(type(value), type(value).__name__)
