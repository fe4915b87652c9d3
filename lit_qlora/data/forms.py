"""Owns the way from one row to a conversation: which column holds it, in which form, and what stands beside it.

Whatever of a row is not used is named. Knows no file, no prompt format, no tokens.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from lit_qlora.data.files import COLUMNS, EXAMPLE, kind, nearest
from lit_qlora.errors import excerpt
from lit_qlora.text import edges, guanaco, llama2, messages
from lit_qlora.text.conversation import Conversation, Turn

Form = Literal["auto", "guanaco", "llama2", "messages", "sharegpt"]
FORMS: dict[str, tuple[str, Callable[[Any], Conversation]]] = {
    "guanaco": ("text", guanaco.parse),
    "llama2": ("text", llama2.parse),
    "messages": ("messages", messages.parse),
    "sharegpt": ("conversations", messages.parse),
}
FORM_OF_COLUMN = {"messages": "messages", "conversations": "sharegpt"}
PROMPT = "prompt"
"""A column with a single question, in a file of prompts."""
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
"""Columns with the system text of a conversation that brings none."""

QUESTIONS, GIVEN = ("instruction", "prompt", "question", "query", "user", "human", "input"), ("input", "context")
ANSWERS = ("output", "response", "completion", "answer", "answers", "assistant", "chosen")
KNOWN_ELSEWHERE = {
    ("instruction", "context", "response"): "Dolly's form",
    ("instruction", "input", "output"): "Alpaca's form",
    ("instruction", "output"): "Alpaca's form",
    ("prompt", "chosen"): "a form of preferences",
}
MARKERS_ELSEWHERE = {
    "<|im_start|>": "ChatML",
    "<|start_header_id|>": "Llama 3's format",
    "<start_of_turn>": "Gemma's format",
    "### Instruction:": "Alpaca's format",
    "<|user|>": "Zephyr's format",
    "USER:": "Vicuna's format",
    "Human:": "plain Human: and Assistant:",
}
SHOWN = 60
"""Characters of a text in a row that is shown as an example."""


class Read(NamedTuple):
    """A row's conversation; what of the row is not used, in words; and the special tokens that were taken off it."""

    conversation: Conversation
    unused: tuple[str, ...]
    taken_off: tuple[str, ...]


class RowError(ValueError):
    """A row that is no conversation, and what to do with it."""

    def __init__(self, problem: str, remedy: str = "mend or delete this row") -> None:
        super().__init__(problem)
        self.remedy = remedy


def read_row(
    row: Mapping[str, Any],
    form: Form = "auto",
    marks: Sequence[str] = edges.WRITTEN_OUT,
    columns: Sequence[str] = COLUMNS,
) -> Read:
    """Reads the conversation of a row.

    Args:
        row: values by column.
        form: the row's form; "auto" looks at the first of ``columns`` that holds something.
        marks: special tokens, which are taken off where they are written out at the edges of a turn.
        columns: those that may hold a conversation, the preferred one first.

    Raises:
        RowError: when there is no such column, or what it holds is no conversation.
    """
    wanted = columns if form == "auto" else (FORMS[form][0],)
    present = [name for name in wanted if name in row]
    column = next((name for name in present if messages.is_there(row[name])), next(iter(present), None))
    if column is None:
        raise _no_column(row, wanted)
    content = row[column]
    if column in ("text", PROMPT) and not isinstance(content, str):
        raise RowError(f"column {column!r} holds {kind(content)}, expected text")
    if column not in ("text", PROMPT):
        content = list_in(content)
    try:
        conversation = _parse(column, content, form)
        conversation, notes = _with_system(row, conversation)
        conversation, taken_off = edges.clean(conversation, marks)
        conversation.check_characters()
    except RowError:
        raise
    except ValueError as error:
        raise RowError(str(error)) from error
    notes += [
        f"column {excerpt(name)}" + (f" beside {column!r}" if name in columns else "")
        for name, value in row.items()
        if name not in (column, *SYSTEM_COLUMNS) and messages.is_there(value)
    ]
    if isinstance(content, list):
        notes += messages.unused(content)
    return Read(conversation, tuple(notes), tuple(taken_off))


def list_in(value: Any) -> Any:
    """The list that a text is: as JSON, or as pandas and numpy write one into a .csv; all else as it is."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval, _as_numpy_writes):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(found, list):
            return found
    return value


def _as_numpy_writes(text: str) -> Any:
    """An array's text has no commas between its objects, and ``nan`` for nothing; its repr has a name around it."""
    text = re.sub(r"^array\((.*), dtype=object\)$", r"\1", text.strip(), flags=re.DOTALL)
    quoted = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
    known = {"nan": "None"}
    return ast.literal_eval(
        re.sub(rf"({quoted})|\}}\s+\{{|\bnan\b", lambda found: found[1] or known.get(found[0], "}, {"), text)
    )


def _parse(column: str, content: Any, form: Form) -> Conversation:
    if column == PROMPT:
        return Conversation((Turn("user", content),))
    name = form if form != "auto" else FORM_OF_COLUMN.get(column) or _form_of_text(content)
    return FORMS[name][1](content)


def _with_system(row: Mapping[str, Any], conversation: Conversation) -> tuple[Conversation, list[str]]:
    """``conversation`` with the system text that stands beside it, if it brings none; and a word where it does."""
    notes = []
    for name in SYSTEM_COLUMNS:
        text = row.get(name)
        if not messages.is_there(text):
            continue
        if not isinstance(text, str):
            raise ValueError(f"column {name!r} holds {kind(text)}, expected text")
        if not (conversation.system or "").strip():
            conversation = replace(conversation, system=text)
        elif (conversation.system or "").strip() != text.strip():
            notes.append(f"column {name!r} where another system text stands already")
    return conversation, notes


def _form_of_text(text: str) -> str:
    """Whichever marker comes first decides, so that a turn may quote the other form."""
    marker = guanaco.MARKER.search(text)
    prompt = text.find("[INST]")
    if marker is not None or prompt >= 0:
        return "llama2" if marker is None or 0 <= prompt < marker.start() else "guanaco"
    problem = "column 'text' has neither '### Human:' nor '[INST]', expected a conversation"
    for mark, name in MARKERS_ELSEWHERE.items():
        if mark in text:
            raise RowError(
                f"column 'text' is written in {name} ({mark}), which is not read",
                f"write its turns as rows such as {_messages('…', '…')}",
            )
    raise RowError(problem)


def _no_column(row: Mapping[str, Any], wanted: Sequence[str]) -> RowError:
    """Names the form that the row seems to have, and the row to write in its place."""
    problem = f"no column {' or '.join(map(repr, wanted))}, columns found: {excerpt(list(row))}"
    names = {name.lower(): name for name in reversed(list(row)) if isinstance(name, str)}
    question = next((names[name] for name in QUESTIONS if name in names), None)
    answer = next((names[name] for name in ANSWERS if name in names), None)
    if question and PROMPT in wanted:
        return RowError(
            problem, f"write rows such as {json.dumps({PROMPT: _cut(str(row[question]))}, ensure_ascii=False)}"
        )
    if question and answer:
        given = [names[name] for name in GIVEN if name in names and names[name] != question]
        used = [question, *given, answer]
        known = KNOWN_ELSEWHERE.get(tuple(name.lower() for name in used), "a form of questions and answers")
        asked = "\n\n".join(_text_of(row[name]) for name in (question, *given) if messages.is_there(row[name]))
        system = next((row[name] for name in SYSTEM_COLUMNS if messages.is_there(row.get(name))), None)
        return RowError(
            f"{known} ({', '.join(used)}) is not read",
            f"write each row as {_messages(asked, _text_of(row[answer]), system)}",
        )
    for name, value in row.items():
        is_list = isinstance(list_in(value), list)
        for known in wanted:
            near = nearest(str(name).lower(), [known], cutoff=0.8)
            if near and is_list == (known in FORM_OF_COLUMN):
                return RowError(problem, f"rename {name!r} to {known!r}")
        if is_list and "messages" in wanted and _holds_messages(list_in(value)):
            return RowError(problem, f"rename {name!r} to 'messages'")
    return RowError(problem, f"write rows such as {EXAMPLE if 'text' in wanted else _messages('…', '…')}")


def _holds_messages(value: list[Any]) -> bool:
    first = value[0] if value else None
    return isinstance(first, dict) and bool({*messages.ROLE} & {*first}) and bool({*messages.CONTENT} & {*first})


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _text_of(value: Any) -> str:
    """A text, or the last one of messages."""
    found = list_in(value)
    if isinstance(found, list) and _holds_messages(found):
        return str(next((found[-1][key] for key in messages.CONTENT if key in found[-1]), "…"))
    return "…" if isinstance(value, dict | list) else str(value)


def _messages(question: str, answer: str, system: object = None) -> str:
    """The row that says these, long texts cut."""
    said = [("system", str(system))] if system else []
    rows = [{"role": role, "content": _cut(text)} for role, text in (*said, ("user", question), ("assistant", answer))]
    return json.dumps({"messages": rows}, ensure_ascii=False)
