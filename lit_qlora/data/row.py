"""Owns how a row is read: which form it has, its conversation, and what of it is not used, which is named.

Knows no file, no prompt format, no tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lit_qlora.data.forms import (
    CHOSEN,
    COLUMN_OPTIONS,
    FORMS,
    INPUT_COLUMNS,
    MARKERS_ELSEWHERE,
    REJECTED,
    SYSTEM,
    SYSTEM_COLUMNS,
    Form,
    RowForm,
    Use,
    as_options,
    columns_of,
    forms_for,
    list_in,
)
from lit_qlora.data.row_files import EXAMPLE
from lit_qlora.errors import excerpt, nearest
from lit_qlora.text import edges, llama2_rows, messages
from lit_qlora.text.conversation import Conversation
from lit_qlora.wording import kind

LABEL_COLUMNS = ("label", "kto_tag")
"""Columns that call an answer good (true) or bad (false) in preference data, such as KTO's."""
LABELS = ("true", "false")
"""Values of these columns; other labels, such as a class's number, don't judge the answer."""
LABELLED_BAD = "rows with label false, which calls the answer bad: not learned"
_PAIRS = [form.needs for form in FORMS if len(form.needs) == 2]
QUESTIONS = sorted([*dict.fromkeys(one for one, _ in _PAIRS), "human", "inputs"], key=INPUT_COLUMNS.__contains__)
ANSWERS = [*dict.fromkeys(one for _, one in _PAIRS), "answers", CHOSEN, "target", "targets"]
"""Names of columns that probably hold a question, or an answer: the forms' own, and others."""
NO_INPUT = ("nan", "<noinput>")
"""Texts that stand for no input to a question: pandas' NaN as text, and that of data made by a model."""
WRITE_TURNS = (
    'write its turns as rows such as {"messages": [{"role": "user", "content": "…"}, '
    '{"role": "assistant", "content": "…"}]}'
)
"""The remedy for a conversation that is written out in a prompt format."""
MOST_FORMS = 3
"""Forms whose columns are named where a row has none of them."""
LEARNED_WHOLE = "rows of plain text, which is learned whole"


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
) -> messages.Read:
    """Read the conversation of a row.

    Args:
        row: values by column.
        form: the row's form; "auto" takes the first of those for ``use`` whose columns all hold something.
        marks: special tokens, which are taken off where they are written out at the edges of a turn.
        use: what the row is for.
        columns: what the columns of `FORMS` are called in the row; None: the same. No others are used then.
        opening: as in `messages.parse`.
        is_whole: True if a text without a form may be read, to be learned whole.
        option: option that names columns, for remedies; default: that of the ``use``.

    Raises RowError when it has no such columns, or what they hold is no conversation.

    Returns:
        The conversation, and what was changed or not used to make it.
    """
    known = forms_for(use, columns)
    forms = known if form == "auto" else [one for one in known if one.name == form]
    chosen = _form_of(row, forms, is_whole, use, option or COLUMN_OPTIONS[use])
    used = [*chosen.needs, *chosen.may_have]
    system_columns = [columns[SYSTEM]] if columns and SYSTEM in columns else [] if columns else [*SYSTEM_COLUMNS]
    content = [_content(row, name, chosen) for name in used]
    try:
        made = chosen.parse(*content)
        read = messages.Read(made) if isinstance(made, Conversation) else messages.parse(made, opening, marks)
        if read.conversation is None:
            return read
        conversation, notes = _with_system(row, llama2_rows.without_block(read.conversation), system_columns)
        conversation = llama2_rows.without_block(conversation)  # one that a column has around its text
        conversation, taken_off = edges.clean(conversation, marks)  # what parse did not see, such as a system column
        conversation.check_characters()
    except messages.OpeningError as error:
        if use == "prompts":  # which have no such option
            raise RowError(str(error)) from error
        remedy = "give data.opening, what the user is taken to have said, or delete this row"
        raise RowError(str(error), remedy) from error
    except edges.WrittenOutError as error:
        raise RowError(str(error), WRITE_TURNS) from error
    except ValueError as error:
        raise RowError(str(error)) from error
    labels = {
        name: label
        for name in LABEL_COLUMNS
        if name not in used and (label := str(row.get(name)).strip().lower()) in LABELS
    }
    if use != "training" or conversation.is_text:
        labels = {}
    if is_bad := "false" in labels.values():
        conversation = replace(conversation, turns=tuple(replace(turn, learned=False) for turn in conversation.turns))
    beside = f" beside {' and '.join(map(repr, chosen.needs))}"
    notes += [
        f"column {excerpt(name)}" + (beside if name in columns_of(known) else "")
        for name, value in row.items()
        if name not in (*used, *system_columns, *labels) and messages.is_there(value)
    ]
    blank = [name for name in chosen.may_have if name and _says_nothing(row.get(name))]
    own = [
        *((LEARNED_WHOLE,) if conversation.is_text else (LABELLED_BAD,) if is_bad else ()),
        *(f"rows with {row[name].strip()!r} in column {name!r}, left out as nothing" for name in blank),
    ]
    all_taken_off = tuple(dict.fromkeys([*read.taken_off, *taken_off]))
    return messages.Read(conversation, (*own, *read.changed), (*notes, *read.unused), all_taken_off)


def _says_nothing(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() in NO_INPUT


def _content(row: Mapping[str, Any], column: str | None, form: RowForm) -> Any:
    """The content of a column, as ``form`` takes it. Raises RowError for one that is to be a text and is none."""
    value = None if column is None else row.get(column)
    if column in form.may_have and (not messages.is_there(value) or _says_nothing(value)):
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
        shown = "" if isinstance(value, dict | list | bytes) else f", such as {json.dumps(str(value))}"
        raise RowError(problem, f"write it as one text{shown}, or delete this row")
    return value


def _form_of(row: Mapping[str, Any], forms: Sequence[RowForm], is_whole: bool, use: Use, option: str) -> RowForm:
    """The one of ``forms`` that ``row`` has. Raises RowError where it has none."""
    found = [form for form in forms if all(name in row for name in form.needs)]
    if not found:
        raise _no_column(row, forms, is_whole, use, option)
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
    raise RowError(problem, f"{_name_them(row, use, option)}mend or delete this row{whole}")


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
    for mark, (name, _) in MARKERS_ELSEWHERE.items():
        if mark in text:
            is_plain = is_whole and not mark.startswith("<")  # as text, special tokens are none
            remedy = WRITE_TURNS + (", or learn it whole as it is with data.form text" if is_plain else "")
            raise RowError(f"column {column!r} is written in {name} ({mark}), which is not read", remedy)


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


def _no_column(row: Mapping[str, Any], forms: Sequence[RowForm], is_whole: bool, use: Use, option: str) -> RowError:
    """The error for a row without a form's columns, with the options that read it, or the row to write in its place."""

    def named(columns: Mapping[str, str | None]) -> RowError:
        columns = {**columns, SYSTEM: next((one for one in SYSTEM_COLUMNS if messages.is_there(row.get(one))), None)}
        return RowError(problem, f"give {as_options(option, {name: one for name, one in columns.items() if one})}")

    problem = f"no column {_wanted(forms)}, columns found: {excerpt(list(row))}"
    names = {
        name.strip().lower(): name for name in reversed(list(row)) if isinstance(name, str) and _holds_turn(row[name])
    }
    question, answer = (_named_like(names, known) for known in (QUESTIONS, ANSWERS))
    is_to_train = use == "training"
    lists = [name for name in row if name != REJECTED and messages.holds_messages(list_in(row[name]))]
    is_pair = is_to_train and question != answer and {question, answer} <= {*lists}
    asked = [name for name in lists if not messages.is_answer(list_in(row[name]))]
    if asked and not is_pair and (not is_to_train or answer in (None, *lists)):
        return named({"messages": asked[0]})
    if question and (answer or not is_to_train):
        given = next((names[name] for name in INPUT_COLUMNS if name in names and names[name] != question), None)
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
    example = EXAMPLE if is_to_train else json.dumps({"prompt": "…"}, ensure_ascii=False)
    plain = f"; for plain text, give {as_options(option, {'text': 'COLUMN'})}" if is_whole else ""
    return RowError(problem, f"{_name_them(row, use, option)}write rows such as {example}{plain}")


def _name_them(row: Mapping[str, Any], use: Use, option: str) -> str:
    """The remedy that gives names of columns, where there are as many texts as a row of this ``use`` needs."""
    texts = sum(isinstance(value, str) and bool(value.strip()) for value in row.values())
    wanted = dict.fromkeys(("user", "assistant") if use == "training" else ("user",), "COLUMN")
    return f"name them with {as_options(option, wanted)}, or " if texts > 1 or use == "prompts" else ""


def _named_like(names: Mapping[str, str], known: Sequence[str]) -> str | None:
    """The column, by its name in small letters, that is called as one of ``known``, or the only one that nearly is."""
    near = [column for name, column in names.items() if nearest(name, known, 0.8)]
    return next((names[name] for name in known if name in names), near[0] if len(near) == 1 else None)


def _holds_turn(value: Any) -> bool:
    """True if ``value`` may be a prompt or an answer: a text, or messages."""
    return not isinstance(value, dict | list) or messages.holds_messages(value)


def _wanted(forms: Sequence[RowForm]) -> str:
    """The columns of some of ``forms``, those that are made of one before others."""
    needs = {form.name: form.needs for form in reversed(forms)}
    alone = [*dict.fromkeys(needs[form.name] for form in forms if len(form.needs) == 1)]
    several = [*dict.fromkeys(form.needs for form in forms if len(form.needs) > 1)]
    shown = [" and ".join(map(repr, one)) for one in (*alone, *several)]
    return " or ".join(shown[:MOST_FORMS]) + (f" or {shown[MOST_FORMS]} (or others)" if len(shown) > MOST_FORMS else "")
