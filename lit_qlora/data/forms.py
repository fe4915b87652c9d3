"""Owns the forms of rows: the columns of each, and how these make the messages of a conversation.

`FORMS` is the one table of them: a new form is an entry there. Knows no file, no prompt format, no tokens.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lit_qlora.errors import UserError, excerpt, suggestion
from lit_qlora.storage.files import parse_list
from lit_qlora.text import edges, guanaco, llama2_rows, messages
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.wording import kind

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
"""Columns with the system text for a conversation without one, in every form."""
Use = Literal["training", "prompts"]
COLUMN_OPTIONS: Mapping[Use, str] = {"training": "data.columns", "prompts": "columns"}
"""The option that names columns, by what the rows are for."""


class RowForm(NamedTuple):
    """A way to write a conversation into a row.

    Args:
        name: as in ``data.form``.
        title: the name of such a row in messages.
        needs: the columns that it is made of.
        parse: what they hold, then what those of ``may_have`` hold (None where there is nothing), to the messages of
            the conversation, as `messages.parse` takes them, or to the conversation itself. Raises ValueError.
        may_have: columns that it uses where they are there, beside `SYSTEM_COLUMNS`; None for one that is not mapped.
        aka: other names of its only column.
        holds: what the columns that it needs hold: a text (in a prompt or an answer, messages too; then the last of
            ``may_have`` is a list), or a list, which may be written out as text.
        opens: the beginning of its text, where other forms have the same columns: the one that opens first counts.
        is_whole: True for a plain text, which is read only if all of it is to be learned.
        is_pair: True for a question and its answer, as `_pair` makes them: the first column alone is a prompt.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    parse: Callable[..., Any]
    may_have: tuple[str | None, ...] = ()
    aka: tuple[str, ...] = ()
    holds: Literal["text", "messages", "a list"] = "text"
    opens: re.Pattern[str] | None = None
    is_whole: bool = False
    is_pair: bool = False

    def of(self, columns: Mapping[str, str]) -> "RowForm":
        """This form with its columns under other names, and without those that ``columns`` does not name."""
        needs = tuple(columns[name] for name in self.needs)
        return self._replace(needs=needs, may_have=tuple(columns.get(str(name)) for name in self.may_have), aka=())


INPUT_COLUMNS = ("input", "context")
"""Columns with an input that a question is about."""


def _pair(name: str, question: str, answer: str) -> RowForm:
    """The form of a question and its answer, with an input to the question, and with earlier pairs."""
    title = f"{question} and {answer}"
    beside = (*(given for given in INPUT_COLUMNS if given != question), "history")
    return RowForm(name, title, (question, answer), _answered, beside, holds="messages", is_pair=True)


def _answered(question: Any, answer: Any, *beside: Any) -> list[Any]:
    question = _rounds_in(question)
    answer = _messages_written_in(answer) if isinstance(question, list) else answer
    return [*_asked(question, *beside), *(answer if isinstance(answer, list) else [_said("assistant", answer)])]


def _asked(question: Any, *beside: Any) -> list[Any]:
    """The messages of a question; ``beside`` are its inputs and, last, the earlier pairs."""
    *given, history = beside
    question = _rounds_in(question)
    before = list_in(history)
    if isinstance(before, list) and before and all(isinstance(one, dict) for one in before):
        return [*before, *_asked(question, *given, None)]
    if before is not None and not (isinstance(before, list) and all(_is_round(pair) for pair in before)):
        raise ValueError(f"the history is {kind(history)}, expected a list of pairs of texts")
    said = [text for pair in before or () for text in pair]
    rows = [_said("assistant" if place % 2 else "user", text) for place, text in enumerate(said)]
    if isinstance(question, list):
        return [*rows, *question, *(_said("user", text) for text in given if text)]
    asked = tuple(str(text) for text in (question, *given) if messages.is_there(text))
    return [*rows, _said("user", asked or "")]


def _rounds_in(prompt: Any) -> Any:
    """The messages of a prompt that is a list of them, or is written in Guanaco's or Llama 2's form; else what it is.

    Raises WrittenOutError for one in a format that is not read.
    """
    prompt = _messages_written_in(prompt)
    if not isinstance(prompt, str):
        return prompt
    if guanaco.MARKER.match(prompt.lstrip()):
        return guanaco.parse(prompt)
    for mark, (name, end) in MARKERS_ELSEWHERE.items():
        if end and mark in prompt and prompt.rstrip().endswith(end):
            raise edges.WrittenOutError(f"the prompt is written in {name}, up to {end!r}, expected the question alone")
    return llama2_rows.rounds_in(prompt) or prompt


def _messages_written_in(written: Any) -> Any:
    """The messages of a text that is a list of them, as a .csv has one, or of a list of such texts; else what it is."""
    is_texts = isinstance(written, list) and all(isinstance(one, str) for one in written)
    text = f"[{','.join(written)}]" if is_texts else written
    if not isinstance(text, str) or not _LISTED.match(text):
        return written
    found = list_in(text)
    return found if messages.holds_turns(found) else written


def _said(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


_LISTED = re.compile(r"\s*\[\s*\{")


def _is_round(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _whole(text: str) -> Conversation:
    return Conversation((Turn("text", text),))


FORMS: list[RowForm] = [
    RowForm("messages", "messages", ("messages",), _messages_written_in, holds="a list"),
    RowForm("sharegpt", "messages", ("conversations",), _messages_written_in, holds="a list",
            aka=("conversation", "dialog", "dialogue")),
    RowForm("guanaco", "### Human:", ("text",), guanaco.parse, opens=guanaco.MARKER),
    RowForm("llama2", "[INST]", ("text",), llama2_rows.parse, opens=re.compile(r"\[INST\]")),
    _pair("alpaca", "instruction", "output"),
    _pair("dolly", "instruction", "response"),
    _pair("prompt_completion", "prompt", "completion"),
    _pair("prompt_response", "prompt", "response"),
    _pair("question_answer", "question", "answer"),
    _pair("question_response", "question", "response"),
    _pair("query_response", "query", "response"),
    _pair("input_output", "input", "output"),
    _pair("user_assistant", "user", "assistant"),
    RowForm("text", "plain text", ("text",), _whole, is_whole=True),
]  # fmt: skip
"""All supported forms; of several that match a row, the first is used."""


def forms_for(use: Use, columns: Mapping[str, str] | None = None) -> list[RowForm]:
    """The forms that a row may have.

    Args:
        use: whether rows are to be learned, or to be answered.
        columns: what the columns of a form are called, as in ``data.columns``: the forms that are made of these, by
            these names; None: all of `FORMS`.
    """
    known = FORMS if use == "training" else _prompts()
    if columns:
        return [form.of(columns) for form in known if {*form.needs} <= {*columns}]
    return [one for form in known for one in (form, *(form._replace(needs=(name,), aka=()) for name in form.aka))]


def _prompts() -> list[RowForm]:
    """The forms of prompts to answer: of a pair, its question, ``prompt`` before others; other forms as they are."""
    given = dict[str, list[str | None]]()
    for pair in (form for form in FORMS if form.is_pair):
        given.setdefault(pair.needs[0], []).extend(name for name in pair.may_have[:-1] if name != pair.needs[0])
    asked = [
        RowForm(name, name, (name,), _asked, (*dict.fromkeys(given[name]), "history"), holds="messages")
        for name in sorted(given, key=lambda name: name != "prompt")
    ]
    others = [form for form in FORMS if not form.is_pair and not form.is_whole]
    lists, texts = ([form for form in others if (form.holds == "a list") is is_list] for is_list in (True, False))
    return [*lists, *asked, *texts]


def columns_of(forms: Sequence[RowForm]) -> list[str]:
    """The columns that ``forms`` are made of, each once."""
    return [*dict.fromkeys(name for form in forms for name in form.needs)]


def form_names() -> list[str]:
    """The values of ``data.form``."""
    return ["auto", *sorted({form.name for form in forms_for("training")})]


def check_columns(
    columns: Mapping[str, str], form: str = "auto", option: str = COLUMN_OPTIONS["training"], use: Use = "training"
) -> None:
    """Check that an option which names columns makes up a form of rows.

    Args:
        columns: names of columns, by what they hold.
        form: as in ``data.form``.
        option: option that gives the columns, for messages.
        use: whether rows are to be learned, or to be answered.

    Raises:
        UserError: it does not.
    """
    forms = [one for one in forms_for(use) if form in ("auto", one.name)]
    known = [*dict.fromkeys(name for one in forms for name in (*one.needs, *one.may_have) if name), SYSTEM]
    if use == "prompts":  # an answer that is there is none of the prompt
        known += [name for one in FORMS for name in one.needs if name not in known]
    for name, column in columns.items():
        if name not in known:
            expected = f"expected {', '.join(known)}{suggestion(name, known)}"
            raise UserError(f"{excerpt(name)} is unknown, {expected}", option=option)
        if not column.strip():
            raise UserError("is blank, expected the name of a column", option=f"{option}.{name}")
    if not any({*one.needs} <= {*columns} for one in forms):
        near = [one for one in forms if {*one.needs} & {*columns}] or forms
        wanted = dict.fromkeys(" and ".join(one.needs) for one in near)
        example = {"user": "question"} | ({"assistant": "answer"} if use == "training" else {})
        problem = f"names {' and '.join(columns) or 'no column'}, expected {' or '.join(wanted)}"
        remedy = f"give the others, too, such as {as_options(option, example)}"
        raise UserError(problem, option=option, remedy=remedy)


if TYPE_CHECKING:
    Form = str
else:
    Form = Literal[tuple(form_names())]

SYSTEM = "system"
"""What the column with the system text is called in ``data.columns``."""
PREFERENCES = CHOSEN, REJECTED = "chosen", "rejected"
"""Columns of preference data, which are not read: a file whose first line has one does name its columns there."""
MARKERS_ELSEWHERE = {
    "<|im_start|>": ("ChatML", ""),
    "<|start_header_id|>": ("Llama 3's format", ""),
    "<start_of_turn>": ("Gemma's format", ""),
    "### Instruction:": ("Alpaca's format", "### Response:"),
    "<|user|>": ("Zephyr's format", ""),
    "USER:": ("Vicuna's format", "ASSISTANT:"),
    "Human:": ("plain Human: and Assistant:", "Assistant:"),
}
"""Marks of formats that are not read: the format's name, and on what a prompt in it ends. Empty where that is a special
token, which is taken off there."""


def list_in(value: Any) -> Any:
    """The list that a text ``value`` is: as JSON, or as pandas and numpy write one into a .csv; all else as it is."""
    if not isinstance(value, str):
        return value
    found = parse_list(value) or parse_list(_as_python_writes(value))
    return value if found is None else found


def _as_python_writes(text: str) -> str:
    """``text`` of numpy's as Python's: lists without commas, ``nan`` for nothing, an array's name around its parts."""
    quoted = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
    known = {"nan": "None", "array(": "", ", dtype=object)": ""}
    for others in (r"\bnan\b|\barray\(|, dtype=object\)", r"[}\]]\s+[{\[]"):
        text = re.sub(
            rf"({quoted})|{others}",
            lambda found: found[1] or known.get(found[0], f"{found[0][0]}, {found[0][-1]}"),
            text.strip(),
        )
    return text


def as_options(option: str, columns: Mapping[str, str]) -> str:
    """How a user gives ``columns``: as options, or in the table of a source.

    Args:
        option: option that names columns: of all rows, or of one source.
        columns: names of columns, by what they hold.
    """
    if option in COLUMN_OPTIONS.values():
        return " ".join(f"--{option}.{name} {shlex.quote(column)}" for name, column in columns.items())
    table = ", ".join(f"{name}: {json.dumps(column, ensure_ascii=False)}" for name, column in columns.items())
    return f"{{path: …, columns: {{{table}}}}}"
