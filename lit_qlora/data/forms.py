"""Owns the conversion of one row to a conversation: the forms of rows, and what of a row is not used.

`FORMS` is the one table of them: a new form is an entry there. Whatever of a row is not used is named. Knows no file,
no prompt format, no tokens.
"""

import ast
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lit_qlora.data.files import EXAMPLE
from lit_qlora.errors import UserError, excerpt, nearest, suggestion
from lit_qlora.text import edges, guanaco, llama2, messages
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.wording import kind

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
"""Columns with the system text for a conversation without one, in every form."""
Use = Literal["training", "prompts"]


class RowForm(NamedTuple):
    """A way to write a conversation into a row.

    Args:
        name: as in ``data.form``.
        title: what a row of this form is known by, in messages.
        needs: the columns that it is made of.
        parse: what they hold, then what those of ``may_have`` hold (None where there is nothing), to the messages of
            the conversation, as `messages.parse` takes them, or to the conversation itself. Raises ValueError.
        may_have: columns that it uses where they are there, beside `SYSTEM_COLUMNS`; None for one that is not mapped.
        aka: other names of its only column.
        holds: what the columns that it needs hold: a text (in a prompt or an answer, messages too; then the last of
            ``may_have`` is a list), or a list, which may be written out as text.
        opens: what the form begins with, where others are made of the same columns: the one that opens first is it.
        is_whole: whether it is a plain text, which is read only where all of it is to be learned.
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

    def of(self, columns: Mapping[str, str]) -> "RowForm":
        """The same with its columns by other names, and without those that ``columns`` does not name."""
        needs = tuple(columns[name] for name in self.needs)
        return self._replace(needs=needs, may_have=tuple(columns.get(str(name)) for name in self.may_have), aka=())


GIVEN = ("input", "context")
"""Columns with what is given to a question."""


def _pair(name: str, question: str, answer: str) -> RowForm:
    """The form of a question and its answer, with what is given to it, and with the pairs before it."""
    title = f"{question} and {answer}"
    beside = (*(given for given in GIVEN if given != question), "history")
    return RowForm(name, title, (question, answer), _answered, beside, holds="messages")


def _answered(question: Any, answer: Any, *beside: Any) -> list[Any]:
    question = _rounds_in(question)
    answer = _messages_written_in(answer) if isinstance(question, list) else answer
    return [*_asked(question, *beside), *(answer if isinstance(answer, list) else [_said("assistant", answer)])]


def _asked(question: Any, *beside: Any) -> list[Any]:
    """The messages of a question, with what is given to it, and last the pairs before it."""
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
    """The messages of a prompt that is a list of them, or has a system text or rounds before it in the Llama 2 format;
    any other as it is.
    """
    prompt = _messages_written_in(prompt)
    opening = _OPENING.match(prompt) if isinstance(prompt, str) else None
    rest = prompt[opening.end() :].rstrip() if opening else ""
    if not (rest.startswith("<<SYS>>") or (opening and opening[1] and "[INST]" in rest)):
        return prompt
    return llama2.parse(f"[INST]{rest}{'' if rest.endswith('[/INST]') else '[/INST]'}")


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
_OPENING = re.compile(r"\s*(?:<s>)?\s*(\[INST\])?\s*")


def _is_round(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _whole(text: str) -> Conversation:
    return Conversation((Turn("text", text),))


FORMS: list[RowForm] = [
    RowForm("messages", "messages", ("messages",), _messages_written_in, holds="a list"),
    RowForm("sharegpt", "messages", ("conversations",), _messages_written_in, holds="a list",
            aka=("conversation", "dialog", "dialogue")),
    RowForm("guanaco", "### Human:", ("text",), guanaco.parse, opens=guanaco.MARKER),
    RowForm("llama2", "[INST]", ("text",), llama2.parse, opens=re.compile(r"\[INST\]")),
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
    """The forms of prompts to answer: of a pair, its question, ``prompt`` before others; written texts come last."""
    given = dict[str, list[str | None]]()
    for pair in (form for form in FORMS if len(form.needs) > 1):
        given.setdefault(pair.needs[0], []).extend(name for name in pair.may_have[:-1] if name != pair.needs[0])
    asked = [
        RowForm(name, name, (name,), _asked, (*dict.fromkeys(given[name]), "history"), holds="messages")
        for name in sorted(given, key=lambda name: name != "prompt")
    ]
    lists, texts = ([form for form in FORMS if (form.holds == "a list") is is_list] for is_list in (True, False))
    return [*lists, *asked, *(form for form in texts if form.opens)]


def columns_of(forms: Sequence[RowForm]) -> list[str]:
    """The columns that ``forms`` are made of, each once."""
    return [*dict.fromkeys(name for form in forms for name in form.needs)]


def form_names() -> list[str]:
    """The values of ``data.form``."""
    return ["auto", *sorted({form.name for form in forms_for("training")})]


def check_columns(
    columns: Mapping[str, str], form: str = "auto", option: str = "data.columns", use: Use = "training"
) -> None:
    """Check that an option which names columns makes up a form of rows.

    Args:
        columns: names of columns, by what they hold.
        form: as in ``data.form``.
        option: that the columns are of, for messages.
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
        remedy = f"give the others, too, such as {_written(option, example)}"
        raise UserError(problem, option=option, remedy=remedy)


if TYPE_CHECKING:
    Form = str
else:
    Form = Literal[tuple(form_names())]

SYSTEM = "system"
"""What the column with the system text is called in ``data.columns``."""
LABEL_COLUMNS = ("label", "kto_tag")
"""Columns that call an answer good (true) or bad (false) in preference data, such as KTO's."""
LABELS = {"true": True, "false": False}
"""What it holds; other labels, such as a class's number, say nothing of the answer."""
LABELLED_BAD = "rows with label false, which calls the answer bad: not learned"
QUESTIONS = ("instruction", "prompt", "question", "query", "user", "human", "input", "inputs")
ANSWERS = ("output", "response", "completion", "answer", "answers", "assistant", "chosen", "target", "targets")
MARKERS_ELSEWHERE = {
    "<|im_start|>": "ChatML",
    "<|start_header_id|>": "Llama 3's format",
    "<start_of_turn>": "Gemma's format",
    "### Instruction:": "Alpaca's format",
    "<|user|>": "Zephyr's format",
    "USER:": "Vicuna's format",
    "Human:": "plain Human: and Assistant:",
}
_COLUMNS: Mapping[Use, str] = {"training": "data.columns", "prompts": "columns"}
"""The option that names columns, by what the rows are for."""
WRITE_TURNS = (
    'write its turns as rows such as {"messages": [{"role": "user", "content": "…"}, '
    '{"role": "assistant", "content": "…"}]}'
)
"""What to do with a conversation that is written out in a prompt format."""
NAMED = 3
"""Forms whose columns are named where a row has none of them."""
WHOLE = "rows of plain text, which is learned whole"


class Read(NamedTuple):
    """A row's conversation.

    Args:
        conversation: that one; None where nothing that can be learned is left of its messages.
        unused: what of the row is not used, in words.
        taken_off: the special tokens that were taken off it.
        changed: how else the conversation differs from the row, in words, as `messages.Parsed` has it.
    """

    conversation: Conversation | None
    unused: tuple[str, ...] = ()
    taken_off: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


class RowError(ValueError):
    """An error for a row that is no conversation, with its remedy.

    Args:
        problem: what is wrong with the row.
        remedy: what to do about it.
    """

    def __init__(self, problem: str, remedy: str = "mend or delete this row") -> None:
        super().__init__(problem)
        self.remedy = remedy


def read_row(
    row: Mapping[str, Any],
    form: Form = "auto",
    marks: Sequence[str] = edges.WRITTEN_OUT,
    use: Use = "training",
    columns: Mapping[str, str] | None = None,
    opening: str | None = None,
    is_whole: bool = False,
    option: str = "",
) -> Read:
    """Read the conversation of a row.

    Args:
        row: values by column.
        form: the row's form; "auto" takes the first of those for ``use`` whose columns all hold something.
        marks: special tokens, which are taken off where they are written out at the edges of a turn.
        use: what the row is for.
        columns: what the columns of `FORMS` are called in the row; None: the same. No others are used then.
        opening: as in `messages.parse`.
        is_whole: whether a text without a form may be read, to be learned whole.
        option: that names columns, for remedies; default: that of the ``use``.

    Raises RowError when it has no such columns, or what they hold is no conversation.
    """
    known = forms_for(use, columns)
    forms = known if form == "auto" else [one for one in known if one.name == form]
    chosen = _form_of(row, forms, is_whole, use, option or _COLUMNS[use])
    used = [*chosen.needs, *chosen.may_have]
    system_columns = [columns[SYSTEM]] if columns and SYSTEM in columns else [] if columns else [*SYSTEM_COLUMNS]
    content = [_content(row, name, chosen) for name in used]
    try:
        made = chosen.parse(*content)
        parsed = messages.Parsed(made) if isinstance(made, Conversation) else messages.parse(made, opening, marks)
        if parsed.conversation is None:
            return Read(None, parsed.unused, parsed.taken_off, parsed.changed)
        conversation, notes = _with_system(row, llama2.without_block(parsed.conversation), system_columns)
        conversation = llama2.without_block(conversation)  # one that a column has around its text
        conversation, taken_off = edges.clean(conversation, marks)  # what parse did not see, such as a system column
        conversation.check_characters()
    except messages.OpeningError as error:
        remedy = "give data.opening, what the user is taken to have said, or delete this row"
        raise RowError(str(error), remedy) from error
    except edges.WrittenOutError as error:
        raise RowError(str(error), WRITE_TURNS) from error
    except ValueError as error:
        raise RowError(str(error)) from error
    labels = {
        name: LABELS[label]
        for name in LABEL_COLUMNS
        if name not in used and (label := str(row.get(name)).strip().lower()) in LABELS
    }
    if use != "training" or conversation.is_text:
        labels = {}
    if is_bad := False in labels.values():
        conversation = replace(conversation, turns=tuple(replace(turn, learned=False) for turn in conversation.turns))
    beside = f" beside {' and '.join(map(repr, chosen.needs))}"
    notes += [
        f"column {excerpt(name)}" + (beside if name in columns_of(known) else "")
        for name, value in row.items()
        if name not in (*used, *system_columns, *labels) and messages.is_there(value)
    ]
    own = [WHOLE] if conversation.is_text else [LABELLED_BAD] if is_bad else []
    changed = (*own, *parsed.changed)
    taken_off = [*dict.fromkeys([*parsed.taken_off, *taken_off])]
    return Read(conversation, (*notes, *parsed.unused), tuple(taken_off), changed)


def _content(row: Mapping[str, Any], column: str | None, form: RowForm) -> Any:
    """What a column holds, as ``form`` has it. Raises RowError where it is no text and is to be one."""
    value = None if column is None else row.get(column)
    if column in form.may_have and not messages.is_there(value):
        return None
    if form.holds == "a list":
        return list_in(value)
    if form.holds == "messages" and messages.holds_turns([value]):
        return [value]
    takes_list = form.holds == "messages" and (column in form.may_have[-1:] or messages.holds_messages(value))
    if not isinstance(value, str) and not (takes_list and isinstance(value, list)):
        problem = f"column {column!r} holds {kind(value)}, expected text"
        if not messages.is_there(value):
            raise RowError(problem)
        shown = "" if isinstance(value, dict | list) else f", such as {json.dumps(str(value))}"
        raise RowError(problem, f"write it as one text{shown}, or delete this row")
    return value


def _form_of(row: Mapping[str, Any], forms: Sequence[RowForm], is_whole: bool, use: Use, option: str) -> RowForm:
    """The one of ``forms`` that ``row`` has. Raises RowError where it has none."""
    found = [form for form in forms if all(name in row for name in form.needs)]
    if not found:
        raise _no_column(row, forms, use, option)
    if len(forms) == 1:
        return found[0]
    found = [form for form in found if all(messages.is_there(row[name]) for name in form.needs)] or found
    first = _first_opened(row, found)
    usable = [form for form in found if (form is first if form.opens else is_whole or not form.is_whole)]
    if usable and not usable[0].is_whole:
        return usable[0]
    texts = [form for form in found if form.opens]
    _refuse_elsewhere(_content(row, texts[0].needs[0], texts[0]), texts[0].needs[0], bool(usable))
    if usable:
        return usable[0]
    titles = " nor ".join(repr(form.title) for form in texts)
    whole = "; plain text is learned whole with data.train_on all" if use == "training" else ""
    problem = f"column {texts[0].needs[0]!r} has neither {titles}, expected a conversation"
    raise RowError(problem, f"mend or delete this row{whole}")


def _first_opened(row: Mapping[str, Any], forms: Sequence[RowForm]) -> RowForm | None:
    """Whichever opens first decides, so that a turn may quote another form; None where none does."""
    opened = {
        found.start(): form
        for form in forms
        if form.opens and isinstance(text := row[form.needs[0]], str) and (found := form.opens.search(text))
    }
    return opened[min(opened)] if opened else None


def _refuse_elsewhere(text: str, column: str, is_whole: bool) -> None:
    """Raises RowError for a text in a known format that is not read; ``is_whole`` where a plain one would be."""
    for mark, name in MARKERS_ELSEWHERE.items():
        if mark in text:
            is_plain = is_whole and not mark.startswith("<")  # as text, special tokens are none
            remedy = WRITE_TURNS + (", or learn it whole as it is with data.form text" if is_plain else "")
            raise RowError(f"column {column!r} is written in {name} ({mark}), which is not read", remedy)


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
    """An array's text has no commas between its parts, and ``nan`` for nothing; its repr has a name around it."""
    quoted = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
    known = {"nan": "None", "array(": "", ", dtype=object)": ""}
    for others in (r"\bnan\b|\barray\(|, dtype=object\)", r"[}\]]\s+[{\[]"):
        text = re.sub(
            rf"({quoted})|{others}",
            lambda found: found[1] or known.get(found[0], f"{found[0][0]}, {found[0][-1]}"),
            text.strip(),
        )
    return ast.literal_eval(text)


def _with_system(
    row: Mapping[str, Any], conversation: Conversation, columns: Sequence[str]
) -> tuple[Conversation, list[str]]:
    """``conversation`` with the system text that stands in ``columns``, if it brings none; and a word where it does."""
    notes = []
    for name in columns:
        text = row.get(name)
        if not messages.is_there(text):
            continue
        if conversation.is_text:
            notes.append(f"column {name!r} beside a plain text")
            continue
        if not isinstance(text, str):
            raise ValueError(f"column {name!r} holds {kind(text)}, expected text")
        if not (conversation.system or "").strip():
            conversation = replace(conversation, system=text)
        elif (conversation.system or "").strip() != text.strip():
            notes.append(f"column {name!r} where another system text stands already")
    return conversation, notes


def _no_column(row: Mapping[str, Any], forms: Sequence[RowForm], use: Use, option: str) -> RowError:
    """Names what the forms are made of, and the options that read the row, or the row to write in its place."""

    def named(columns: Mapping[str, str | None]) -> RowError:
        columns = {**columns, SYSTEM: next((one for one in SYSTEM_COLUMNS if messages.is_there(row.get(one))), None)}
        return RowError(problem, f"give {_written(option, {name: one for name, one in columns.items() if one})}")

    problem = f"no column {_wanted(forms)}, columns found: {excerpt(list(row))}"
    names = {
        name.strip().lower(): name for name in reversed(list(row)) if isinstance(name, str) and _holds_turn(row[name])
    }
    question, answer = (_named_like(names, known) for known in (QUESTIONS, ANSWERS))
    is_to_train = use == "training"
    lists = [name for name in row if name != "rejected" and messages.holds_messages(list_in(row[name]))]
    is_pair = is_to_train and question != answer and {question, answer} <= {*lists}
    asked = [name for name in lists if not messages.is_answer(list_in(row[name]))]
    if asked and not is_pair and (not is_to_train or answer in (None, *lists)):
        return named({"messages": asked[0]})
    if question and (answer or not is_to_train):
        given = next((names[name] for name in GIVEN if name in names and names[name] != question), None)
        return named({"user": question, "context": given, "assistant": answer if is_to_train else None})
    for name, value in row.items():
        is_list = isinstance(list_in(value), list)
        alone = [form.needs[0] for form in forms if len(form.needs) == 1 and is_list == (form.holds == "a list")]
        if known := nearest(str(name).lower(), alone, 0.8):
            return named({known: str(name)})
    for name, value in row.items():
        within = value if isinstance(value, dict) else {}
        others = [form.needs for form in forms if form.needs != ("text",)]
        if not lists and any(all(_holds_turn(within.get(need, {})) for need in needs) for needs in others):
            return RowError(problem, f"write what stands in column {name!r} as the row itself")
        if isinstance(value, str) and any(form.opens and form.opens.search(value) for form in forms):
            return named({"text": str(name)})
        if isinstance(value, str) and value.lstrip().startswith((*MARKERS_ELSEWHERE,)):
            _refuse_elsewhere(value, str(name), is_whole=False)
    texts = sum(isinstance(value, str) and bool(value.strip()) for value in row.values())
    wanted = dict.fromkeys(("user", "assistant") if is_to_train else ("user",), "COLUMN")
    first = f"name them with {_written(option, wanted)}, or " if texts > 1 or not is_to_train else ""
    example = EXAMPLE if is_to_train else json.dumps({"prompt": "…"}, ensure_ascii=False)
    return RowError(problem, f"{first}write rows such as {example}")


def _named_like(names: Mapping[str, str], known: Sequence[str]) -> str | None:
    """The column, by its name in small letters, that is called as one of ``known``, or the only one that nearly is."""
    near = [column for name, column in names.items() if nearest(name, known, 0.8)]
    return next((names[name] for name in known if name in names), near[0] if len(near) == 1 else None)


def _holds_turn(value: Any) -> bool:
    """Whether ``value`` may be a prompt or an answer: a text, or messages."""
    return not isinstance(value, dict | list) or messages.holds_messages(value)


def _wanted(forms: Sequence[RowForm]) -> str:
    """The columns of some of ``forms``, those that are made of one before others."""
    needs = {form.name: form.needs for form in reversed(forms)}
    alone = [*dict.fromkeys(needs[form.name] for form in forms if len(form.needs) == 1)]
    several = [*dict.fromkeys(form.needs for form in forms if len(form.needs) > 1)]
    shown = [" and ".join(map(repr, one)) for one in (*alone, *several)]
    return " or ".join(shown[:NAMED]) + (f" or {shown[NAMED]} (or others)" if len(shown) > NAMED else "")


def _written(option: str, columns: Mapping[str, str]) -> str:
    """How ``columns`` are given: as options, or by one of a source within the source itself."""
    if option in _COLUMNS.values():
        return " ".join(f"--{option}.{name} {shlex.quote(column)}" for name, column in columns.items())
    table = ", ".join(f"{name}: {json.dumps(column, ensure_ascii=False)}" for name, column in columns.items())
    return f"{{path: …, columns: {{{table}}}}}"
