"""Owns the way from rows to conversations that can be trained on.

Rows are recognised by what they hold; what is left out is counted, what is wrong is an error that
names its place. Knows no prompt format, no tokens, and not where rows come from.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from lit_qlora.data.files import COLUMNS, EXAMPLE, Row, excerpt, kind, nearest
from lit_qlora.data.sources import read_source
from lit_qlora.errors import UserError
from lit_qlora.text import guanaco, llama2, messages
from lit_qlora.text.conversation import Conversation

Form = Literal["auto", "guanaco", "llama2", "messages", "sharegpt"]
FORMS: dict[str, tuple[str, Callable[[Any], Conversation]]] = {
    "guanaco": ("text", guanaco.parse),
    "llama2": ("text", llama2.parse),
    "messages": ("messages", messages.parse),
    "sharegpt": ("conversations", messages.parse),
}
FORM_OF_COLUMN = {"messages": "messages", "conversations": "sharegpt"}

UNANSWERED = "unanswered last turns dropped"
NOTHING_ANSWERED = "rows left out: nothing answered"
HOLDS_A_TAG = "rows left out: a Llama 2 tag inside a turn"
REFUSED = "rows left out: data.template can't hold them, such as "
BROKEN = "rows left out: no whole conversation"


Fits = Callable[[Conversation], object]
"""Raises ValueError for a conversation that the prompt format can't hold."""


@dataclass(frozen=True)
class Records:
    """Conversations that all end on an answer, their source's name, and what was left out, in words.

    ``unanswered`` are the places of those that lost a last turn; ``dropped`` has their number.
    """

    name: str
    conversations: list[Conversation]
    dropped: dict[str, int]
    unanswered: frozenset[int] = field(default=frozenset(), compare=False)


def count_unanswered(unanswered: Collection[int]) -> dict[str, int]:
    """The count of conversations that lost a last turn, as `Records.dropped` has it; empty without any."""
    return {UNANSWERED: len(unanswered)} if unanswered else {}


def load_records(source: str, split: str = "train", form: Form = "auto", fits: Fits = llama2.segments) -> Records:
    """Loads one split of ``demo``, a local file or folder, or a dataset on the hub.

    ``form`` is the rows' form: guanaco, llama2, messages or sharegpt; "auto" looks at each row. Rows that the prompt
    format can't hold, by ``fits``, are left out and counted.

    A row that is no conversation is an error where its file can be mended in an editor. In parquet
    and on the hub it can't: there it is left out and counted, up to one row in ten.

    Raises:
        UserError: when the source or the split isn't found, a row is wrong (naming its place), or
            no row is left.
    """
    known = get_args(Form)
    if form not in known:
        raise UserError(f"data.form: {form!r} is unknown, expected {', '.join(known)}{nearest(form, list(known))}")
    rows, mendable = read_source(source, split)
    return _to_records(source if split == "train" else f"{source} ({split})", rows, form, mendable, fits)


def _to_records(name: str, rows: list[Row], form: Form, mendable: bool, fits: Fits) -> Records:
    dropped: Counter[str] = Counter()
    conversations: list[Conversation] = []
    unanswered: set[int] = set()
    first_fault: UserError | None = None
    refused = HOLDS_A_TAG if fits is llama2.segments else ""
    for row in rows:
        try:
            conversation = _to_conversation(row, form)
        except ValueError as error:
            fault = UserError(f"{row.where}: {error}; got {excerpt(row.value)}; mend or delete this row")
            if mendable:
                raise fault from error
            first_fault = first_fault or fault
            dropped[BROKEN] += 1
            continue
        if not conversation.is_answered and len(conversation.turns) == 1:
            dropped[NOTHING_ANSWERED] += 1
            continue
        is_answered = conversation.is_answered
        if not is_answered:
            conversation = replace(conversation, turns=conversation.turns[:-1])
        try:
            fits(conversation)
        except ValueError as error:  # one hostile row must not stop a run
            refused = refused or f"{REFUSED}{row.where}: {error}"
            dropped[refused] += 1
        else:
            if not is_answered:
                unanswered.add(len(conversations))
            conversations.append(conversation)
    if first_fault and dropped[BROKEN] > len(rows) / 10:  # so many are no stray rows, but a form misread
        raise first_fault
    if not conversations:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in dropped.items()) or "no rows"
        raise UserError(f"{name}: nothing to train on ({reasons}); expected conversations that end on an answer")
    return Records(name, conversations, count_unanswered(unanswered) | dropped, frozenset(unanswered))


def _to_conversation(row: Row, form: Form) -> Conversation:
    """Raises UserError when the column is missing, ValueError when what it holds is no conversation."""
    wanted = COLUMNS if form == "auto" else (FORMS[form][0],)
    present = [column for column in wanted if column in row.value]
    column = next((column for column in present if row.value[column] not in (None, "")), next(iter(present), None))
    if column is None:
        meant = ((name, known) for name in row.value for known in wanted if nearest(name.lower(), [known]))
        near = next(meant, None)
        raise UserError(
            f"{row.where}: no column {' or '.join(map(repr, wanted))}, columns found:"
            f" {excerpt(list(row.value))}; got {excerpt(row.value)};"
            f" {f'rename {near[0]!r} to {near[1]!r}' if near else f'write rows such as {EXAMPLE}'}"
        )
    content = row.value[column]
    if column == "text" and not isinstance(content, str):
        raise ValueError(f"column 'text' holds {kind(content)}, expected text")
    if column != "text" and isinstance(content, str):  # a .csv has no other way to hold a list
        content = _list_in(content)
    name = form if form != "auto" else FORM_OF_COLUMN.get(column) or _form_of_text(content)
    conversation = FORMS[name][1](content)
    for text in (conversation.system or "", *(turn.content for turn in conversation.turns)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(r"a lone surrogate such as '\ud800' is no character: no token stands for it") from None
    return conversation


def _list_in(text: str) -> Any:
    """What ``text`` is the JSON of, if that is a list; else the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) else text


def _form_of_text(text: str) -> str:
    """Whichever marker comes first decides, so that a turn may quote the other form."""
    marker = guanaco.MARKER.search(text)
    prompt = text.find("[INST]")
    if marker is None and prompt < 0:
        raise ValueError("column 'text' has neither '### Human:' nor '[INST]', expected a conversation")
    return "llama2" if marker is None or 0 <= prompt < marker.start() else "guanaco"
