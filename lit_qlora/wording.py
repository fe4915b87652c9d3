"""Owns how numbers of things are written, 1 row, 2 rows, and what a value of a file is called.

Words are given in the plural. Knows nothing of what is counted.
"""

import re
from collections.abc import Mapping
from types import NoneType

_NOUNS = (
    "GPU answer character checkpoint conversation device epoch file layer machine prompt question row sample source "
    "step text token turn"
)
NOUNS = {f"{noun}s": noun for noun in _NOUNS.split()} | {"micro-batches": "micro-batch", "processes": "process"}
VERBS = {"are": "is", "were": "was", "do": "does", "hold": "holds", "have": "has", "stand": "stands", "spell": "spells"}
_END = re.compile(r"[:,]|\b(?:at|by|in|of|than|to|with)\b")
"""Where a phrase ends: what stands behind it has a number of its own."""


def number_of(count: int, words: str) -> str:
    """A number of things in words; see `of_number`.

    Args:
        count: how many of them there are.
        words: begin with what they are, such as ``rows left out: no answer``.
    """
    return f"{count:,} {of_number(count, words)}"


def of_number(count: int, words: str) -> str:
    """``words`` in the number of ``count``: for 1, the first phrase's noun and verb are in the singular.

    Words such as ``of 20 rows are`` keep their noun.

    Args:
        count: how many of them there are.
        words: in the plural.
    """
    if count != 1:
        return words
    of_all = "of " if words.startswith("of ") else ""
    phrase = _END.split(words.removeprefix(of_all), maxsplit=1)[0]
    rest = words[len(of_all + phrase) :]
    return of_all + _singular(phrase if of_all else _singular(phrase, NOUNS), VERBS) + rest


def _singular(phrase: str, known: Mapping[str, str]) -> str:
    """``phrase`` with the first of the ``known`` words in the singular."""
    return re.sub(rf"\b(?:{'|'.join(known)})\b", lambda found: known[found[0]], phrase, count=1)


def kind(value: object) -> str:
    """The kind of a value, in words of the files."""
    kinds = {
        bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "one object",
        NoneType: "null",
    }  # fmt: skip
    return kinds.get(type(value), type(value).__name__)
