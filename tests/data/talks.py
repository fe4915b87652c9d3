"""Owns the short conversations and files of rows that the tests of data/ are made of."""

import json
from pathlib import Path

from lit_qlora.data.records import Kept, Records
from lit_qlora.text.conversation import Conversation, Turn


def said(*contents: str, system: str | None = None) -> Conversation:
    """A conversation in which user and assistant take turns."""
    turns = (Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(contents))
    return Conversation(tuple(turns), system)


def text(*contents: str) -> dict[str, str]:
    """A row in Guanaco's form."""
    marks = ("### Human: ", "### Assistant: ")
    return {"text": "".join(marks[index % 2] + content for index, content in enumerate(contents))}


def write(name: str, *rows: object) -> str:
    """A file of rows, a line each; returns its name."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return name


def kept(name: str, conversations: list[Conversation], dropped: dict[str, int]) -> Records:
    """What `load_records` gives of these."""
    return Records(name, [Kept(conversation) for conversation in conversations], dropped)
