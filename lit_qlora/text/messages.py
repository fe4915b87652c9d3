"""Owns the reading of chats as lists of messages, and so of every list of (role, content).

Two dialects, told apart by their keys: OpenAI's ``{"role": …, "content": …}`` and ShareGPT's
``{"from": …, "value": …}``. Knows no file, no prompt format, no tokens.
"""

import reprlib
from typing import Any

from lit_qlora.text.conversation import Conversation, Turn

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

ROLE, CONTENT = ("role", "from"), ("content", "value")
WEIGHTS, SWITCHES = ("weight", "loss_weight"), ("train", "training", "trainable", "loss")
"""Keys that say whether a turn is learned; what a switch holds may mean something else, what a weight holds may not."""
LEARNED = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def is_there(value: object) -> bool:
    """True unless a value is null, NaN, blank, or a container of only such."""
    if isinstance(value, dict):
        return any(map(is_there, value.values()))
    if isinstance(value, list | tuple):
        return any(map(is_there, value))
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and str(value) != "nan"  # what pandas writes for nothing


def parse(rows: list[Any]) -> Conversation:
    """Reads messages into a conversation; a first message of the system becomes its system text.

    The system's message is not counted as a turn, and a blank one is none at all. A turn whose weight is 0, or whose
    ``train`` is false, is context only; so is the prompt in which such a system text stands.

    Raises:
        ValueError: naming the turn, when a message is no object, its role is unknown, its content
            is no text or blank, its weight is neither 0 nor 1, the system speaks later than first, or the turns don't
            alternate from the user.
    """
    if not isinstance(rows, list):
        raise ValueError(f"expected a list of messages, got {type(rows).__name__}")
    system: str | None = None
    turns: list[Turn] = []
    is_learned = True
    for index, row in enumerate(rows):
        where = f"turn {len(turns) + 1}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with a role and a content, got {type(row).__name__}")
        said_by, content = _value(where, row, ROLE), _value(where, row, CONTENT)
        role = ROLES.get(said_by) if isinstance(said_by, str) else None
        if role is None:
            raise ValueError(f"{where}: unknown role {reprlib.repr(said_by)}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"{where}: the {role}'s content is text, got {type(content).__name__}")
        is_learned = _is_learned(where, row) and (is_learned or bool(turns))
        if role != "system":
            turns.append(_turn(where, role, content, is_learned))
        elif index == 0:
            system = content if content.strip() else None
        elif not turns:
            raise ValueError("two messages of the system stand before the first turn; join the two into one")
        else:
            raise ValueError(f"{where}: the system speaks, which it may only before the first turn")
    return Conversation(tuple(turns), system)


def unused(rows: list[Any]) -> list[str]:
    """The keys of messages that `parse` could read and does not use, in words, each once."""
    found: dict[str, None] = {}
    for row in rows:
        is_answer = ROLES.get(str(_value("", row, ROLE))) == "assistant"
        for key, value in row.items():
            if key in (*ROLE, *CONTENT) or not is_there(value):
                continue
            if key not in (*WEIGHTS, *SWITCHES) or str(value).lower() not in LEARNED:
                found[f"key {key!r} of a turn"] = None
            elif not is_answer and LEARNED[str(value).lower()]:
                found[f"key {key!r} of a turn that is not the assistant's"] = None
    return [*found]


def _value(where: str, row: dict[str, Any], names: tuple[str, ...]) -> Any:
    """What stands under one of ``names``; parquet fills up the other dialect's with nulls."""
    there = [row[name] for name in names if row.get(name) is not None]
    if any(value != there[0] for value in there):
        raise ValueError(f"{where}: {' and '.join(names)} hold different things, expected one of the two")
    return there[0] if there else None


def _is_learned(where: str, row: dict[str, Any]) -> bool:
    """False where one of the keys says so."""
    found = [True]
    for key in (*WEIGHTS, *SWITCHES):
        value = row.get(key)
        if is_there(value) and (known := LEARNED.get(str(value).lower())) is not None:
            found.append(known)
        elif is_there(value) and key in WEIGHTS:
            raise ValueError(f"{where}: its {key} is {reprlib.repr(value)}, expected 0 (context only) or 1 (learned)")
    return all(found)


def _turn(where: str, role: str, content: str, is_learned: bool) -> Turn:
    try:
        return Turn("user" if role == "user" else "assistant", content, is_learned)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
