"""Owns the reading of chats as lists of messages, and so of every list of (role, content).

Dialects are told apart by their keys: OpenAI's ``{"role": …, "content": …}``, ShareGPT's ``{"from": …, "value": …}``,
pairs such as ``{"input": …, "output": …}``, and bare texts, user and assistant by turns. What is not learned (tool
calls, images) and what is changed (turns joined, an opening of the assistant's) is named. Knows no file, no prompt
format, no tokens.
"""

import json
import math
import reprlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lit_qlora.text import edges
from lit_qlora.text.conversation import Conversation, Role, Turn
from lit_qlora.wording import kind

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "developer": "system", "prompter": "user", "model": "assistant", "bot": "assistant", "chatbot": "assistant",
    "chatgpt": "assistant", "ai": "assistant", "function_call": "call", "tool_call": "call",
    "tool": "result", "function": "result", "observation": "result", "function_response": "result",
    "tool_response": "result", "tool_result": "result", "ipython": "result",
}  # fmt: skip
"""Who speaks, by the name of the role: a tool's call is the assistant's, its result is read by the assistant."""
SHOWN_ROLES = ("system", "user", "human", "assistant", "gpt", "tool")
"""The roles that an error about an unknown role names."""

ROLE, CONTENT = ("role", "from"), ("content", "value")
PAIRS = (
    ("input", "output"), ("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("prompt", "response"),
    ("question", "answer"), ("query", "response"), ("instruction", "output"),
)  # fmt: skip
"""Keys of a question and its answer, in lists of such pairs."""
WEIGHTS, SWITCHES = ("weight", "loss_weight"), ("train", "training", "trainable", "loss", "loss_mask")
"""Keys that say whether a turn is learned; what a switch holds may mean something else, what a weight holds may not."""
LEARNED = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
CALLS = ("tool_calls", "function_call")
"""Keys of an assistant's message that hold tool calls."""
TEXT_TYPES = ("text", "input_text", "output_text")
"""Types of content parts whose text is what is said."""
TOOL_RESULT = "tool_result"
"""Type of a part that holds what a tool gave: a text, or parts; Anthropic's API has it in a message of the user."""
JOINT = "\n\n"
"""The text between those that are joined into one turn."""

CALLED = "rows with tool calls, which are not learned"
ANSWERED_BY_TOOL = "rows with results of tools, which stand in the prompt"
JOINED = {
    "system": "rows with messages of the system in a row, joined",
    "user": "rows with turns of the user in a row, joined",
    "assistant": "rows with turns of the assistant in a row, joined",
}
PARTLY = "rows with turns of the assistant in a row of which one is not to be learned: joined, so none of them is"
OPENING_LEFT_OUT = "rows that the assistant begins: what it says before the user is left out (or give data.opening)"
OPENING_KEPT = "rows that the assistant begins, with data.opening put before"
SYSTEM_LATER = "rows with messages of the system behind the first turn, which stand in the prompt"
SYSTEM_REPEATED = "rows with the system text repeated, which stands once"
WITHOUT_TEXT = "rows with answers without a text, left out"
UNSEEN = "rows with turns of the user without a text, left out with their answers"
LAST_UNSEEN = "rows whose last turn of the user has no text, left out with its answer"


class Read(NamedTuple):
    """A list of messages, or a row, as a conversation.

    Args:
        conversation: the conversation; None if nothing that can be learned is left of it, such as of an image's
            question.
        changed: how it differs from the messages or the row, in words.
        unused: the keys or columns that are not used, in words.
        taken_off: the special tokens that were taken off what is said.
    """

    conversation: Conversation | None
    changed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    taken_off: tuple[str, ...] = ()


class OpeningError(ValueError):
    """A conversation in which nobody but the assistant speaks."""


class _Message(NamedTuple):
    """One message: ``text`` is None where it says nothing that can be learned; ``taken_off`` it, as in `Read`."""

    role: str
    text: str | None
    learned: bool
    taken_off: tuple[str, ...] = ()


def is_there(value: object) -> bool:
    """True unless ``value`` is null, NaN, blank, or a container of only such."""
    if isinstance(value, dict):
        return any(map(is_there, value.values()))
    if isinstance(value, list | tuple):
        return any(map(is_there, value))
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not _is_nan(value)


def _is_nan(value: object) -> bool:
    """True for what pandas writes for nothing."""
    return isinstance(value, float) and math.isnan(value)


def holds_messages(value: object) -> bool:
    """True if ``value`` is a list that begins with a message, or with a pair of `PAIRS`."""
    return holds_turns(value) or (isinstance(value, list) and bool(value) and _pair_in(value[0]) is not None)


def holds_turns(value: object) -> bool:
    """True if ``value`` is a list that begins with a message with a role, and not with a pair, which may be a row."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool({*ROLE} & {*first} and {*CONTENT} & {*first})


def is_answer(value: object) -> bool:
    """True if ``value`` is a list of messages of the assistant only."""
    return (
        isinstance(value, list)
        and holds_turns(value)
        and all(isinstance(one, dict) and _role(_value("", one, ROLE)) == "assistant" for one in value)
    )


def parse(rows: Any, opening: str | None = None, marks: Sequence[str] = ()) -> Read:
    """Read messages into a conversation.

    What the system says before the first turn becomes the system text; its message is not counted as a turn. What it
    says later stands in the prompt of the answer behind it, unless it only says the system text again. Turns of one
    role in a row are joined. A turn whose weight is 0, or whose ``train`` is false, is context only; so is the prompt
    in which such a system text stands. Tool calls, and parts that are no text, are left out; the result of a tool
    stands in the prompt of the answer behind it. A turn of the user with nothing but an image goes with its answer.

    Args:
        rows: the messages. The texts of a content that is a tuple are joined by `JOINT`.
        opening: what the user is taken to have said where the assistant begins; None leaves out what the assistant
            says before the user.
        marks: special tokens, which are taken off the edges of each text before it is joined with others.

    Returns:
        The conversation, and what was changed or not used to make it.

    Raises:
        OpeningError: nobody but the assistant speaks, and there is no ``opening``.
        ValueError: naming the turn, when a message is no object, its role is unknown, its content is no text or
            blank, or its weight is neither 0 nor 1.
    """
    listed = _listed(rows)
    changed: dict[str, None] = {}
    system: list[_Message] = []
    said: list[_Message] = []
    taken_off: dict[str, None] = {}
    for row in listed:
        message = _read_message(f"turn {len(said) + 1}", row, changed, marks)
        taken_off |= dict.fromkeys(message.taken_off)
        if message.role != "system":
            said.append(message)
        elif message.text in [first.text for first in system]:
            changed |= {SYSTEM_REPEATED: None} if is_there(message.text) else {}
        elif not said:
            system.append(message)
        elif is_there(message.text):
            changed[SYSTEM_LATER] = None
            said.append(message)
    texts = [message.text for message in system if is_there(message.text)]
    if len(texts) > 1:
        changed[JOINED["system"]] = None
    turns = _turns(said, changed, is_first_learned=all(message.learned for message in system))
    is_opening = bool(turns) and turns[0].role == "assistant"
    if (said and not turns) or (
        is_opening and opening is None and len(turns) == 1 and {UNSEEN, LAST_UNSEEN} & {*changed}
    ):
        return Read(None, tuple(changed), tuple(_unused(listed)), tuple(taken_off))
    if is_opening:
        if opening is None and len(turns) == 1:
            raise OpeningError("only the assistant speaks, expected something that it answers")
        changed[OPENING_LEFT_OUT if opening is None else OPENING_KEPT] = None
        turns = turns[1:] if opening is None else [Turn("user", opening, learned=False), *turns]
    conversation = Conversation(tuple(turns), JOINT.join(map(str, texts)) if texts else None)
    return Read(conversation, tuple(changed), tuple(_unused(listed)), tuple(taken_off))


def _listed(rows: Any) -> list[Any]:
    """The messages of a list, whichever way it is written; all else of it as it is."""
    if isinstance(rows, dict) and rows and all(isinstance(part, list) for part in rows.values()):
        # As `datasets` gives a sequence of objects: a list for each key.
        counts = {key: len(values) for key, values in rows.items()}
        if len({*counts.values()}) > 1:
            raise ValueError(f"expected lists of one length, one entry per message, got {reprlib.repr(counts)}")
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    if not isinstance(rows, list):
        raise ValueError(f"expected a list of messages, got {kind(rows)}")
    if rows and all(isinstance(row, str) for row in rows):
        return [{"role": "assistant" if place % 2 else "user", "content": row} for place, row in enumerate(rows)]
    return [message for row in rows for message in _unfolded(row)]


def _unfolded(row: Any) -> list[Any]:
    """The messages of a pair; any other row by itself."""
    pair = _pair_in(row)
    if pair is None:
        return [row]
    beside = {key: value for key, value in row.items() if key not in (*pair, "system")}
    found = [("system", row.get("system")), ("user", row[pair[0]]), ("assistant", row[pair[1]])]
    return [
        {"role": role, "content": text, **(beside if role == "assistant" else {})}
        for role, text in found
        if role != "system" or is_there(text)
    ]


def _pair_in(row: Any) -> tuple[str, str] | None:
    if not isinstance(row, dict) or {*ROLE} & {*row}:
        return None
    return next((pair for pair in PAIRS if {*pair} <= {*row}), None)


def _read_message(where: str, row: Any, changed: dict[str, None], marks: Sequence[str]) -> _Message:
    """A message; what of it can't be learned is added to ``changed``."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with a role and a content, got {kind(row)}")
    said_by = _value(where, row, ROLE)
    role = _role(said_by)
    if role is None:
        keys = "" if {*ROLE} & {*row} else f"; its keys are {reprlib.repr([*row])}, expected 'role' and 'content'"
        expected = f"expected one of {', '.join(SHOWN_ROLES)}{keys}"
        raise ValueError(f"{where}: unknown role {reprlib.repr(said_by)}, {expected}")
    text, found = _said_in(where, role, row, changed, marks)
    is_call = role == "call" or (role == "assistant" and any(is_there(row.get(key)) for key in CALLS))
    if is_call:
        changed[CALLED] = None
    if role == "call" or (is_call and not is_there(text)):
        return _Message("assistant", None, learned=True, taken_off=found)
    if role == "result":
        changed[ANSWERED_BY_TOOL] = None
        return _Message(role, text if is_there(text) else None, _is_learned(where, row), found)
    if text is None and role == "assistant":
        changed[WITHOUT_TEXT] = None
    if text is not None and not text.strip() and role != "system":
        marked = f"the {role} holds nothing but {' '.join(found)}"
        raise ValueError(f"{where}: {marked if found else f'a turn of the {role} is empty'}")
    return _Message(role, text, _is_learned(where, row), found)


def _role(said_by: Any) -> str | None:
    return ROLES.get(said_by.strip().lower().replace("-", "_")) if isinstance(said_by, str) else None


def _said_in(
    where: str, role: str, row: dict[str, Any], changed: dict[str, None], marks: Sequence[str]
) -> tuple[str | None, tuple[str, ...]]:
    """The text of a message, and the marks taken off; None if its content is null, or holds no text."""
    content = _value(where, row, CONTENT)
    if content is None and (any(name in row for name in CONTENT) or any(is_there(row.get(key)) for key in CALLS)):
        return None, ()
    if isinstance(content, tuple) and all(isinstance(text, str) for text in content):
        return _join_said(JOINT, content, marks)
    whole = content if isinstance(content, list) else [content]
    if any(_type_of(part) == TOOL_RESULT for part in whole):
        changed[ANSWERED_BY_TOOL] = None
    parts = [own for part in whole for own in _own_parts(part)]
    if isinstance(content, list | dict) and all(isinstance(part, str) or _type_of(part) for part in parts):
        others = [one for part in parts if not isinstance(part, str) and (one := _type_of(part)) not in TEXT_TYPES]
        changed |= dict.fromkeys(f"rows with parts of type {one!r}, which are not learned" for one in others)
        texts = [part if isinstance(part, str) else part.get("text") for part in parts]
        texts = [text for text in texts if is_there(text)]
        if all(isinstance(text, str) for text in texts):
            return _join_said("\n", texts, marks) if texts else (None, ())
    if role == "result" and content is not None and not isinstance(content, str):
        return json.dumps(content, ensure_ascii=False), ()
    if not isinstance(content, str):
        keys = f"; its keys are {reprlib.repr([*row])}, expected 'content'" if content is None else ""
        raise ValueError(f"{where}: the {_ROLE_NAMES.get(role, role)}'s content is text, got {kind(content)}{keys}")
    return _join_said("", [content], marks)


def _own_parts(part: Any) -> list[Any]:
    """A part of a content, or the parts of a tool's result, which holds no other result."""
    own = [part] if _type_of(part) != TOOL_RESULT else part.get("content") or []
    return own if isinstance(own, list) else [own]


def _join_said(joint: str, texts: Sequence[str], marks: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """``texts`` in one, without those that are nothing but ``marks``; and what was taken off."""
    cleaned = [edges.take_off(text, marks) for text in texts]
    found = dict.fromkeys(mark for _, some in cleaned for mark in some)
    return joint.join(text for text, some in cleaned if text or not some), tuple(found)


_ROLE_NAMES = {"call": "assistant", "result": "tool"}


def _type_of(part: Any) -> str | None:
    """The type of a content part; None where it is none."""
    if not isinstance(part, dict):
        return None
    kind = part.get("type")
    return kind if isinstance(kind, str) else "text" if isinstance(part.get("text"), str) else None


def _turns(said: Sequence[_Message], changed: dict[str, None], is_first_learned: bool) -> list[Turn]:
    """The turns of messages: those without a text are left out, those of one role in a row are one."""
    spoken = [message for message in said if message.text is not None or message.role == "user"]
    turns: list[Turn] = []
    is_seen = is_all_seen = True
    for role, run in groupby(spoken, lambda message: _speaker(message.role)):
        heard = [*run]
        group = [message for message in heard if message.text is not None]
        if role == "user":  # what the system says is no question
            asked = [message for message in group if message.role != "system"]
            is_seen = bool(asked) or (bool(group) and len(heard) == len(group))
        if not is_seen:
            is_all_seen = False
            continue
        if sum(message.role == role for message in group) > 1:
            changed[JOINED[role]] = None
        if role == "assistant" and len({message.learned for message in group}) > 1:
            changed[PARTLY] = None
        learned = all(message.learned for message in group) and (is_first_learned or bool(turns))
        turns.append(Turn(role, JOINT.join(str(message.text) for message in group), learned))
    if not is_all_seen:
        changed[UNSEEN if is_seen else LAST_UNSEEN] = None
    return turns


def _speaker(role: str) -> Role:
    return "assistant" if role == "assistant" else "user"


def _unused(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The keys of messages that are not used, in words, each once."""
    found: dict[str, None] = {}
    for row in rows:
        role = _role(_value("", row, ROLE))
        known = (*ROLE, *CONTENT, *(CALLS if role in ("assistant", "call") else ()))
        for key, value in row.items():
            if key in known or not is_there(value):
                continue
            if key not in (*WEIGHTS, *SWITCHES) or str(value).lower() not in LEARNED:
                found[f"key {key!r} of a turn"] = None
            elif role != "assistant" and LEARNED[str(value).lower()]:
                found[f"key {key!r} of a turn that is not the assistant's"] = None
        content = _value("", row, CONTENT)
        for part in content if isinstance(content, list) else [content]:
            if _type_of(part) in TEXT_TYPES:
                others = (key for key, value in part.items() if key not in ("type", "text") and is_there(value))
                found |= {f"key {key!r} of a part of a turn": None for key in others}
    return [*found]


def _value(where: str, row: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value under one of ``names``; parquet fills up the other dialect's with nulls, pandas with NaN."""
    there = [value for name in names if (value := row.get(name)) is not None and not _is_nan(value)]
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
