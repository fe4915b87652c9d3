"""Owns the reading of chats kept as lists of messages, and so of every list of (role, content).

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


def parse(rows: list[Any]) -> Conversation:
    """Reads messages into a conversation; a first message of the system becomes its system text.

    The system's message is not counted as a turn, and a blank one is none at all.

    Raises:
        ValueError: naming the turn, when a message is no object, its role is unknown, its content
            is no text or blank, the system speaks later than first, or the turns don't alternate
            from the user.
    """
    if not isinstance(rows, list):
        raise ValueError(f"expected a list of messages, got {type(rows).__name__}")
    system: str | None = None
    turns: list[Turn] = []
    for index, row in enumerate(rows):
        where = f"turn {len(turns) + 1}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with a role and a content, got {type(row).__name__}")
        said_by, content = row.get("role", row.get("from")), row.get("content", row.get("value"))
        role = ROLES.get(said_by) if isinstance(said_by, str) else None
        if role is None:
            raise ValueError(f"{where}: unknown role {reprlib.repr(said_by)}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"{where}: the {role}'s content is text, got {type(content).__name__}")
        if role != "system":
            turns.append(_turn(where, role, content))
        elif index == 0:
            system = content if content.strip() else None
        else:
            raise ValueError(f"{where}: the system speaks, which it may only before the first turn")
    return Conversation(tuple(turns), system)


def _turn(where: str, role: str, content: str) -> Turn:
    try:
        return Turn("user" if role == "user" else "assistant", content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
