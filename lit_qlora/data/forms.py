"""Owns the conversion of one row to a conversation: the forms of rows, and what of a row is not used.

`FORMS` is the one table of them: a new form is an entry there. Whatever of a row is not used is named. Knows no file,
no prompt format, no tokens.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lit_qlora.data.files import EXAMPLE, kind, nearest
from lit_qlora.errors import excerpt
from lit_qlora.text import edges, guanaco, llama2, messages
from lit_qlora.text.conversation import Conversation, Turn

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
"""Columns with the system text for a conversation without one, in every form."""


class RowForm(NamedTuple):
    """A way to write a conversation into a row.

    Args:
        name: as in ``data.form``.
        title: what a row of this form is known by, in messages.
        needs: the columns that it is made of.
        parse: what they hold, then what those of ``may_have`` hold (None where there is nothing), to a conversation.
            Raises ValueError.
        may_have: columns that it uses where they are there, beside `SYSTEM_COLUMNS`.
        holds: what each column holds; a list may be written out as text.
        opens: what the form begins with, where others are made of the same columns: the one that opens first is it.
        use: whether it is a form of rows to train on, of prompts to answer, or of both.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    parse: Callable[..., Conversation]
    may_have: tuple[str, ...] = ()
    holds: Literal["text", "a list"] = "text"
    opens: re.Pattern[str] | None = None
    use: tuple[Literal["training", "prompts"], ...] = ("training",)


def _question(text: str) -> Conversation:
    return Conversation((Turn("user", text),))


BOTH: tuple[Literal["training", "prompts"], ...] = ("training", "prompts")
FORMS: list[RowForm] = [
    RowForm("messages", "messages", ("messages",), messages.parse, holds="a list", use=BOTH),
    RowForm("sharegpt", "messages", ("conversations",), messages.parse, holds="a list", use=BOTH),
    RowForm("guanaco", "### Human:", ("text",), guanaco.parse, opens=guanaco.MARKER),
    RowForm("llama2", "[INST]", ("text",), llama2.parse, opens=re.compile(r"\[INST\]")),
    RowForm("prompt", "a question", ("prompt",), _question, use=("prompts",)),
]
"""All supported forms; of several that match a row, the first is used."""


def forms_for(use: Literal["training", "prompts"]) -> list[RowForm]:
    """Those of `FORMS` that are for ``use``."""
    return [form for form in FORMS if use in form.use]


def columns_of(forms: Sequence[RowForm]) -> list[str]:
    """The columns that ``forms`` are made of, each once."""
    return [*dict.fromkeys(name for form in forms for name in form.needs)]


def form_names() -> list[str]:
    """The values of ``data.form``."""
    return ["auto", *sorted(form.name for form in forms_for("training"))]


if TYPE_CHECKING:
    Form = str
else:
    Form = Literal[tuple(form_names())]

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
"""Most characters of a text in a row shown as an example."""


class Read(NamedTuple):
    """A row's conversation; what of the row is not used, in words; and the special tokens that were removed."""

    conversation: Conversation
    unused: tuple[str, ...]
    taken_off: tuple[str, ...]


class RowError(ValueError):
    """An error for a row that is no conversation, with its remedy."""

    def __init__(self, problem: str, remedy: str = "mend or delete this row") -> None:
        super().__init__(problem)
        self.remedy = remedy


def read_row(
    row: Mapping[str, Any],
    form: Form = "auto",
    marks: Sequence[str] = edges.WRITTEN_OUT,
    use: Literal["training", "prompts"] = "training",
) -> Read:
    """Read the conversation of a row.

    Args:
        row: values by column.
        form: the row's form; "auto" takes the first of those for ``use`` whose columns all hold something.
        marks: special tokens, which are taken off where they are written out at the edges of a turn.
        use: what the row is for.

    Raises:
        RowError: when it has no such columns, or what they hold is no conversation.
    """
    known = forms_for(use)
    chosen = _form_of(row, known if form == "auto" else [one for one in known if one.name == form])
    columns = (*chosen.needs, *chosen.may_have)
    content = [_content(row, name, chosen) for name in columns]
    try:
        conversation, notes = _with_system(row, chosen.parse(*content))
        conversation, taken_off = edges.clean(conversation, marks)
        conversation.check_characters()
    except ValueError as error:
        raise RowError(str(error)) from error
    beside = f" beside {' and '.join(map(repr, chosen.needs))}"
    notes += [
        f"column {excerpt(name)}" + (beside if name in columns_of(known) else "")
        for name, value in row.items()
        if name not in (*columns, *SYSTEM_COLUMNS) and messages.is_there(value)
    ]
    notes += [note for part in content if isinstance(part, list) for note in messages.unused(part)]
    return Read(conversation, tuple(notes), tuple(taken_off))


def _content(row: Mapping[str, Any], column: str, form: RowForm) -> Any:
    """What a column holds, as ``form`` has it. Raises RowError where it is no text and is to be one."""
    value = row.get(column)
    if column in form.may_have and not messages.is_there(value):
        return None
    if form.holds == "a list":
        return list_in(value)
    if not isinstance(value, str):
        raise RowError(f"column {column!r} holds {kind(value)}, expected text")
    return value


def _form_of(row: Mapping[str, Any], forms: Sequence[RowForm]) -> RowForm:
    """The one of ``forms`` that ``row`` has. Raises RowError where it has none."""
    found = [form for form in forms if all(name in row for name in form.needs)]
    if not found:
        raise _no_column(row, forms)
    found = [form for form in found if all(messages.is_there(row[name]) for name in form.needs)] or found
    alike = [form for form in found if form.needs == found[0].needs]
    return alike[0] if len(alike) == 1 else _first_opened(row, alike)


def _first_opened(row: Mapping[str, Any], forms: Sequence[RowForm]) -> RowForm:
    """The first to open decides, so that a turn may quote another form."""
    column = forms[0].needs[0]
    text = _content(row, column, forms[0])
    opened = {found.start(): form for form in forms if form.opens and (found := form.opens.search(text))}
    if opened:
        return opened[min(opened)]
    for mark, name in MARKERS_ELSEWHERE.items():
        if mark in text:
            raise RowError(
                f"column {column!r} is written in {name} ({mark}), which is not read",
                f"write its turns as rows such as {_messages('…', '…')}",
            )
    titles = " nor ".join(repr(form.title) for form in forms)
    raise RowError(f"column {column!r} has neither {titles}, expected a conversation")


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


def _no_column(row: Mapping[str, Any], forms: Sequence[RowForm]) -> RowError:
    """The error for an unsupported row, with the form that it seems to have, and the row to write instead."""
    wanted = dict.fromkeys(" and ".join(map(repr, form.needs)) for form in forms)
    problem = f"no column {' or '.join(wanted)}, columns found: {excerpt(list(row))}"
    names = {name.lower(): name for name in reversed(list(row)) if isinstance(name, str)}
    question = next((names[name] for name in QUESTIONS if name in names), None)
    answer = next((names[name] for name in ANSWERS if name in names), None)
    if question and "prompt" in columns_of(forms):
        return RowError(
            problem, f"write rows such as {json.dumps({'prompt': _cut(str(row[question]))}, ensure_ascii=False)}"
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
        for form in forms:
            for known in form.needs:
                if is_list == (form.holds == "a list") and nearest(str(name).lower(), [known], cutoff=0.8):
                    return RowError(problem, f"rename {name!r} to {known!r}")
        if is_list and "messages" in columns_of(forms) and _holds_messages(list_in(value)):
            return RowError(problem, f"rename {name!r} to 'messages'")
    return RowError(problem, f"write rows such as {EXAMPLE if 'text' in columns_of(forms) else _messages('…', '…')}")


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
    """A row with these texts, long ones cut."""
    said = [("system", str(system))] if system else []
    rows = [{"role": role, "content": _cut(text)} for role, text in (*said, ("user", question), ("assistant", answer))]
    return json.dumps({"messages": rows}, ensure_ascii=False)
