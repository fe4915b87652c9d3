"""Owns how a text fits into the columns of a terminal, in any script: its width, where its lines break, what is cut.

Knows nothing of what it says.
"""

import re
import unicodedata
from collections.abc import Iterator

_MARKS = {"\n": "↵", "\t": "⇥"}


def printable(text: str) -> str:
    """``text`` on one line, with marks for line ends and tabs, and codes for whatever a terminal would obey."""
    return "".join(
        _MARKS.get(character) or (character if character.isprintable() else ascii(character)[1:-1])
        for character in text
    )


def columns(text: str) -> int:
    """Columns of a terminal that a printable ``text`` takes."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def shortened(text: str, width: int) -> str:
    """A printable text without its middle, if it is too long.

    Args:
        text: a printable text; returned as it is if it fits.
        width: columns that it may take.
    """
    if columns(text) <= width:
        return text
    head = first_columns(text, (width - 1) * 2 // 3)
    tail = first_columns(text[::-1], width - 1 - columns(head))[::-1]
    return f"{head}…{tail}"


def first_columns(text: str, width: int) -> str:
    """The beginning of ``text`` that takes at most ``width`` columns."""
    taken, end = 0, 0
    for end, character in enumerate(text):
        taken += columns(character)
        if taken > width:
            return text[:end]
    return text


def in_column(text: str, width: int) -> str:
    """A printable ``text``, with spaces behind it up to ``width`` columns."""
    return text + " " * (width - columns(text))


def lines_of(text: str, width: int) -> Iterator[str]:
    """A printable text in lines; none for an empty one.

    They break at spaces, and within a word only if it is longer than a line, or in a script without spaces.

    Args:
        text: a printable text; its first line keeps its indentation.
        width: columns of a line, at most.
    """
    line = ""
    for found in re.finditer(r"(\s*)(\S+)", text):
        gap, word = found[1] if line or not found.start() else "", found[2]
        is_whole = columns(word) == len(word) <= width
        if columns(line + gap + word) <= width:
            line += gap + word
        elif is_whole:
            yield from [line] if line else []
            line = word
        else:
            for one in gap + word:
                if columns(line + one) > width:
                    yield line
                    line = one.strip()
                else:
                    line += one
    if line:
        yield line
