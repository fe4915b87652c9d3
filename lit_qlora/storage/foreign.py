"""Owns how JSON files written by other programs are read: an object, and the kinds of its values.

Any content is read, or refused in one line that names the file and the key. Knows no key.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lit_qlora.errors import UserError, cut
from lit_qlora.ranges import BELOW_ONE
from lit_qlora.storage.files import parse_json, unreadable

LARGEST_FILE = 10_000_000
"""Bytes of a file; the longest known config.json has 100,000."""
ANEW = "put another copy of it there"
"""The remedy for a file that is not as its program wrote it."""


class Kind(NamedTuple):
    """A kind of value: in words, what is ``expected``, and as a check, what it ``holds``."""

    expected: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    """A whole number from ``low`` to ``high``."""
    return Kind(f"a whole number from {low} to {high:,}", lambda value: type(value) is int and low <= value <= high)


def number(above: float, most: float = 1e30) -> Kind:
    """A finite number.

    Args:
        above: what it is above.
        most: what it is at most.
    """
    words = f"a number above {above:g}" if most == 1e30 else f"a number above {above:g}, at most {most:g}"
    return Kind(words, lambda value: type(value) in (int, float) and above < value <= most)


def one_of(*words: str) -> Kind:
    """One of some words."""
    return Kind(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


SHARE = Kind(BELOW_ONE[0], lambda value: type(value) in (int, float) and BELOW_ONE[1](value))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("a JSON object", lambda value: isinstance(value, dict))


def read_object(file: Path, place: str | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        file: of another program.
        place: base or folder that it belongs to; messages name that and the file in it, or without it the file's path.

    Raises:
        UserError: for an unreadable file, one that holds no object, and one above `LARGEST_FILE`.
    """
    name = file.name if place else str(file)
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for without a word
            raise UserError(f"{name} is a folder, a pipe or a device, expected a file", place=place)
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(f"{name} has {file.stat().st_size:,} bytes, expected at most {LARGEST_FILE:,}", place=place)
        found = parse_json(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{name} can't be read: {unreadable(error)}", place=place, remedy=ANEW) from error
    if not isinstance(found, dict):
        raise UserError(f"{name}: expected a JSON object, got {shown(found)}", place=place, remedy=ANEW)
    return found


def object_in(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; empty where there is none, or it can't be read."""
    try:
        return read_object(file)
    except UserError:
        return {}


def chat_template_in(folder: Path) -> str | None:
    """The chat template of the tokenizer in the ``folder`` of a base or an adapter; None without any.

    Raises:
        UserError: a file that should hold it can't be read.
    """
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if alone.is_file():
            return alone.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise UserError(f"{alone.name} can't be read: {unreadable(error)}", place=folder) from error
    found = read_object(config, str(folder)).get("chat_template") if config.is_file() else None
    if isinstance(found, list):  # of several: [{"name": …, "template": …}]
        found = next(
            (one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), ""
        )
    return found if isinstance(found, str) and found.strip() else None


def check(place: str, key: str, kind: Kind, value: Any) -> None:
    """Check that a value is of its kind.

    Args:
        place: the file that holds it, for messages.
        key: its name there.
        kind: kind that the value is to be of.
        value: value that was found.

    Raises:
        UserError: it is not.
    """
    if not kind.holds(value):
        raise wrong(place, key, kind.expected, value)


def wrong(place: str, key: str, expected: str, value: Any) -> UserError:
    """The error for a value of the wrong kind.

    Args:
        place: the file that holds it.
        key: its name there.
        expected: the kind in words.
        value: value that was found.
    """
    return UserError(f"{key}: expected {expected}, got {shown(value)}", place=place)


def shown(value: Any) -> str:
    """A ``value`` as JSON, shortened for a message."""
    try:
        return cut(json.dumps(value))
    except RecursionError:  # as deep as could just be read
        return "…"
