"""Owns how the rows of one split become conversations that can be trained on, and a look ahead for what would fail.

`load_records` and `check_early` are its interface; `sources` gives the rows, `row` reads one. What is left out, removed
or not used is counted; errors name their place. Holds a prompt format without asking which. Knows no tokens.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

from lit_qlora.console import counted
from lit_qlora.data import splits
from lit_qlora.data.forms import COLUMN_OPTIONS, Form, check_columns, form_names
from lit_qlora.data.row import RowError, read_row
from lit_qlora.data.row_files import Row, SourceError, split_place
from lit_qlora.data.sources import Source, local_bytes, read_source, sources_of
from lit_qlora.errors import UserError, excerpt, suggestion
from lit_qlora.text.conversation import Conversation
from lit_qlora.text.formats import PromptFormat, make_format
from lit_qlora.text.messages import Read

BROKEN = "rows left out: no whole conversation, the first at "
TAKEN_OFF = "rows had special tokens written out at the edges of turns, which were taken off: "
UNUSED = "rows with what is not used: "

MOST_NAMED = 24
"""Most columns, keys and tokens to name; of more, their number."""

EARLY_BYTES = 2**25
"""Most bytes of a split that `check_early` reads: a third of a second."""
EARLY_ROWS = 100
"""Rows that `check_early` looks at while none has a fault."""
MOST_EARLY_ROWS = 10_000
"""Most rows that `check_early` looks at: half a second."""


OWN_COLUMNS = "give a source of other columns its own: {path: …, columns: {…}}"


class Reading(NamedTuple):
    """The settings for reading rows.

    Args:
        form: the rows' form, such as messages or alpaca; "auto" looks at each row.
        strict: True to make the first unusable row an error.
        prompt_format: the prompt format; conversations that it can't hold are left out.
        columns: what the columns of a form are called in the rows; None: as in `forms.FORMS`.
        opening: text of the user for a conversation that the assistant begins; None leaves its opening out.
        is_whole: True if plain text may be read, to be learned whole.
        any_number: True to leave out any number of unusable rows but all, not one in ten at most.
        columns_option: option that gives the columns, or would give them.
    """

    form: Form = "auto"
    strict: bool = False
    prompt_format: PromptFormat = make_format()
    columns: Mapping[str, str] | None = None
    opening: str | None = None
    is_whole: bool = False
    any_number: bool = False
    columns_option: str = COLUMN_OPTIONS["training"]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Reading":
        """The settings by the options of the section ``data``, of which a value of another type counts as not given."""
        types = {"form": str, "strict": bool, "columns": dict, "opening": str}
        given = {name: data[name] for name, kind in types.items() if isinstance(data.get(name), kind)}
        if not all(isinstance(one, str) for pair in given.get("columns", {}).items() for one in pair):
            given.pop("columns")
        return cls(**given, is_whole=data.get("train_on") == "all")

    def check(self) -> None:
        """Raises UserError for an unknown form or unknown columns."""
        known = form_names()
        if self.form not in known:
            expected = f"expected {', '.join(known)}{suggestion(self.form, known)}"
            raise UserError(f"{excerpt(self.form)} is unknown, {expected}", option="data.form")
        if self.columns is not None:
            check_columns(self.columns, self.form, self.columns_option)


ANY_FORM = Reading()


class Lost(Enum):
    """What a conversation lost to become one that can be learned, or why it can't become one; its value is in words."""

    NOTHING = ""
    UNANSWERED = "unanswered last turns dropped"
    NOT_LEARNED = "last answers dropped: not to be learned"
    ALL_UNANSWERED = "nothing answered"
    ALL_NOT_LEARNED = "no answer is to be learned"
    OTHER_SPLIT = "for another split"


class LeftOut(NamedTuple):
    """Where a row stands that no conversation was made of, and why.

    Args:
        where: its place, such as ``rows.jsonl:17``.
        reason: the error, in words.
        lost: how all of it was lost; nothing for a row that can't be read or held.
    """

    where: str
    reason: str
    lost: Lost = Lost.NOTHING


@dataclass(frozen=True)
class Kept:
    """A ``conversation`` that ends on an answer, ``where`` its row stands, such as ``rows.jsonl:17``, and its loss if
    any.
    """

    conversation: Conversation
    where: str = field(default="", compare=False)
    lost_turn: bool = field(default=False, compare=False)
    """True if its last turn was dropped, for nobody answered it."""


@dataclass(frozen=True)
class Records:
    """The conversations of a source, and what was left out or not used.

    Args:
        name: the source's name in messages.
        kept: the conversations, in the order of their rows.
        dropped: number of rows by what was changed, left out or not used, in words.
        left_out: rows that no conversation was made of.
        parts: each source's own, where there are several; else empty.
    """

    name: str
    kept: list[Kept]
    dropped: dict[str, int]
    left_out: list[LeftOut] = field(default_factory=list, compare=False)
    parts: tuple["Records", ...] = field(default=(), compare=False)

    @cached_property
    def conversations(self) -> list[Conversation]:
        """The conversations that are kept, in order."""
        return [one.conversation for one in self.kept]

    @cached_property
    def where(self) -> list[str]:
        """Where the row of each conversation stands."""
        return [one.where for one in self.kept]


def count_unanswered(kept: Iterable[Kept]) -> dict[str, int]:
    """The count of conversations in ``kept`` that lost a last turn, as `Records.dropped` has it; empty without any."""
    count = sum(one.lost_turn for one in kept)
    return {Lost.UNANSWERED.value: count} if count else {}


def load_records(
    source: str | Source, split: str = "train", reading: Reading = ANY_FORM, seed: int | None = None
) -> Records:
    """Load one split of ``demo``, a local file or folder, or a dataset on the hub.

    A row that is no conversation is left out and counted, up to one row in ten, and so is any that the prompt format
    can't hold; with ``reading.strict``, the first of them is an error. With a ``seed``, only the source's share of the
    rows is read, drawn by it.

    Args:
        source: where rows come from.
        split: name of the split there.
        reading: how rows are read.
        seed: of the share; None for all rows, also those that a column names for another split.

    Returns:
        The conversations, and what became of the other rows.

    Raises:
        UserError: when the source or the split isn't found, a row is wrong (naming its place), or
            no row is left.
    """
    (source,) = sources_of(source)
    reading = _reading_of(source, reading)
    rows, unused, others = _rows_of(source, split, reading, seed)
    records = _to_records(source.called(split), rows, reading)
    return replace(records, dropped=records.dropped | unused, left_out=[*records.left_out, *others])


def check_early(source: Source, split: str, reading: Reading = ANY_FORM, seed: int | None = None) -> None:
    """Look at one split for what `load_records` would refuse, before a prompt format and a tokenizer are known.

    Most wrong files are found so: what is no data, and, by its beginning, what has rows of no known form. Passes the
    hub's, and what is too large to be read twice.

    Args:
        source: where rows come from.
        split: name of the split there.
        reading: how rows are read.
        seed: of the source's share; None for all rows.

    Raises:
        UserError: as `load_records`.
    """
    reading = _reading_of(source, reading)
    if not _is_quick(source, split):
        return
    rows, _, _ = _rows_of(source, split, reading, seed)
    _check_columns(source.called(split), rows, reading)
    faults, counts, num_unused = list[UserError](), Counts(), 0
    for number, row in enumerate(rows[:MOST_EARLY_ROWS]):
        if number >= EARLY_ROWS and not faults:
            return
        try:
            read = _conversation_of(row, reading)
            conversation, lost = _trainable(read.conversation)
            if conversation is None:
                counts.dropped[lost.value] += 1
                counts.add(read)
                num_unused += 1
        except UserError as fault:
            faults.append(fault)
            if reading.strict or _is_misread(len(faults), len(rows), reading):
                raise faults[0] from None
    if num_unused == len(rows):
        raise _nothing(source.called(split), counts)


def _nothing(name: str, counts: "Counts") -> SourceError:
    """The error for the source ``name`` of which no row is left, with what became of them."""
    reasons = ", ".join(f"{reason}: {number}" for reason, number in counts.in_words().items()) or "no rows"
    remedy = "expected conversations that end on an answer"
    if counts.has_unused:
        remedy += ", or name the columns of both with data.columns.user and data.columns.assistant"
    return SourceError(name, f"no row to train on or score ({reasons})", remedy)


def places_early(source: Source, split: str, reading: Reading) -> list[str] | None:
    """Where the rows of a split stand; None for the hub's, and for what is too large to be read twice.

    Args:
        source: where rows come from.
        split: name of the split there.
        reading: how rows are read.
    """
    if not _is_quick(source, split):
        return None
    return [row.where for row in _rows_of(source, split, _reading_of(source, reading), None)[0]]


def is_at(where: str, row: str) -> bool:
    """True if a row stands at a place.

    Args:
        where: the place, ``rows.jsonl:17`` or ``rows.parquet: row 17``.
        row: ``17``, ``rows.jsonl:17`` or such.
    """
    file, number = split_place(where)
    if row.isdecimal():
        return number == row
    its_file, its_number = split_place(row)
    return number == its_number and f"/{file}".endswith(f"/{its_file.removeprefix('./')}")


def no_row(name: str, row: str) -> UserError:
    """The error for a row to show that is not there.

    Args:
        name: of the source.
        row: as in `is_at`.
    """
    return UserError(f"there is no such row, expected a line or row of {name}, got {row!r}", option="row")


def _is_quick(source: Source, split: str) -> bool:
    num_bytes = local_bytes(source, split)
    return num_bytes is not None and num_bytes <= EARLY_BYTES


def _reading_of(source: Source, reading: Reading) -> Reading:
    """``reading`` with the source's own columns, if it has any. Raises UserError as `Reading.check`."""
    if source.columns is not None:
        reading = reading._replace(columns=dict(source.columns))
    if source.columns is not None or reading.columns is None:
        reading = reading._replace(columns_option=source.columns_option)
    try:
        reading.check()
    except UserError as error:
        raise error.replace(place=source if source.columns else None) from None
    return reading


def _rows_of(
    source: Source, split: str, reading: Reading, seed: int | None
) -> tuple[list[Row], dict[str, int], list[LeftOut]]:
    """The rows of one split that are used, the number of others, in words, and those that are for another split."""
    rows = read_source(source, split, [*(reading.columns or {}).values()])
    if seed is None:
        return rows, {}, []
    rows, unused, others = _named_for_training(rows)
    count = len(rows)
    if source.share == 1:
        return rows, unused, others
    number = max(1, round(source.share * count))
    rows = [rows[place] for place in sorted(random.Random(seed).sample(range(count), number))]
    unused |= {f"rows not used, for its share is {source.share:g}": count - number} if number < count else {}
    return rows, unused, others


def _named_for_training(rows: list[Row]) -> tuple[list[Row], dict[str, int], list[LeftOut]]:
    """The rows but those of other splits, where a column names the split of each; and these, as `_rows_of`."""
    for column in dict.fromkeys(name for row in rows for name in row.value if str(name).lower() in splits.COLUMNS):
        kinds = [splits.kind_named(row.value.get(column)) for row in rows]
        if others := [kind for kind in splits.HELD_KINDS if kind in kinds and "train" in kinds]:
            kept = [
                row._replace(value={name: value for name, value in row.value.items() if name != column})
                for row, kind in zip(rows, kinds, strict=True)
                if kind not in others
            ]
            files = " and ".join(f"{kind}.jsonl" for kind in others)
            what = f"rows left out: column {column!r} says {' or '.join(others)} (to score them, put them into {files}"
            unused = {f"{what} beside train.jsonl, and give the folder)": len(rows) - len(kept)}
            lost = [(row.where, kind) for row, kind in zip(rows, kinds, strict=True) if kind in others]
            reason = f"column {column!r} says"
            return kept, unused, [LeftOut(where, f"{reason} {kind}", Lost.OTHER_SPLIT) for where, kind in lost]
    return rows, {}, []


def _is_misread(num_faults: int, num_rows: int, reading: Reading) -> bool:
    """True if so many rows have faults that these are no stray ones, but a form misread."""
    return num_faults == num_rows > 0 if reading.any_number else num_faults > num_rows / 10


def joined_sources(parts: Sequence[Records]) -> Records:
    """The conversations of several sources, ``parts``, in their order, with all that became of their rows."""
    if len(parts) == 1:
        return parts[0]
    kept, left_out = ([one for part in parts for one in getattr(part, name)] for name in ("kept", "left_out"))
    dropped: Counter[str] = Counter()
    for part in parts:
        dropped.update(part.dropped)
    flat = tuple(one for part in parts for one in part.parts or (part,))
    return Records(joined_name([part.name for part in flat]), kept, dict(dropped), left_out, flat)


def joined_name(names: Sequence[str]) -> str:
    """The joint name of sources called ``names``."""
    return " and ".join(names) if len(names) <= 2 else f"{len(names)} sources"


class Counts:
    """Counts of what became of rows, except the conversations."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self._named: dict[str, Counter[str]] = {TAKEN_OFF: Counter(), UNUSED: Counter()}
        self._rows: Counter[str] = Counter()

    def add(self, read: Read) -> None:
        """Count how a row that was ``read`` was changed, what was removed from it, and what of it is not used."""
        self.dropped.update(read.changed)
        for what, names in ((TAKEN_OFF, read.taken_off), (UNUSED, read.unused)):
            self._named[what].update(names)
            self._rows[what] += bool(names)

    @property
    def has_unused(self) -> bool:
        """True if something of a row was not used."""
        return bool(self._rows[UNUSED])

    def in_words(self) -> dict[str, int]:
        """All counts, as `Records.dropped` has them; names with the number of their rows."""
        named = {what + _listed_names(names): self._rows[what] for what, names in self._named.items() if names}
        return self.dropped | named


def _listed_names(names: Counter[str]) -> str:
    named = [f"{name} ({count:,})" for name, count in names.most_common(MOST_NAMED)]
    return ", ".join([*named, *([f"and {len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else [])])


def _to_records(name: str, rows: list[Row], reading: Reading) -> Records:
    counts = Counts()
    kept, others = list[Kept](), list[LeftOut]()
    faults: list[tuple[str, UserError]] = []
    left_out = ""
    _check_columns(name, rows, reading)
    for row in counted("read", rows, len(rows)):
        try:
            read = _conversation_of(row, reading)
        except UserError as fault:
            if reading.strict:
                raise
            why = fault.__cause__ if isinstance(fault.__cause__, RowError) else fault.problem
            faults.append((f"{row.where} ({why})", fault))
            others.append(LeftOut(row.where, str(why)))
            continue
        counts.add(read)
        conversation, lost = _trainable(read.conversation)
        if conversation is None:
            counts.dropped[f"rows left out: {lost.value}"] += 1
            others.append(LeftOut(row.where, lost.value, lost))
            continue
        try:
            reading.prompt_format.pieces(conversation)
        except ValueError as error:  # one hostile row must not stop a run
            if reading.strict:
                raise SourceError(row.where, str(error), "mend or delete this row, or leave out data.strict") from error
            left_out = left_out or reading.prompt_format.left_out(row.where, error)
            counts.dropped[left_out] += 1
            others.append(LeftOut(row.where, str(error)))
            continue
        kept.append(Kept(conversation, row.where, lost is Lost.UNANSWERED))
        if lost is Lost.NOT_LEARNED:
            counts.dropped[lost.value] += 1
    if _is_misread(len(faults), len(rows), reading):
        raise faults[0][1]
    if faults:
        counts.dropped[f"{BROKEN}{faults[0][0]}"] = len(faults)
    if not kept:
        raise _nothing(name, counts)
    return Records(name, kept, count_unanswered(kept) | counts.in_words(), others)


def _check_columns(name: str, rows: list[Row], reading: Reading) -> None:
    """Raises UserError for one of ``reading.columns`` that no row of the source ``name`` has."""
    found = dict.fromkeys(column for row in rows for column in row.value)
    for known, column in (reading.columns or {}).items():
        if found and column not in found:
            near = suggestion(column, [*map(str, found)])
            problem = f"no column {excerpt(column)}, columns found: {excerpt([*found])}{near}"
            is_of_all = reading.columns_option == COLUMN_OPTIONS["training"]
            option, remedy = f"{reading.columns_option}.{known}", OWN_COLUMNS if is_of_all and not near else None
            raise UserError(problem, option=option, place=name, remedy=remedy)


def _conversation_of(row: Row, reading: Reading) -> Read:
    """Raises UserError, with the row's place, for what is no conversation."""
    if row.fault:
        raise row.fault
    try:
        return read_row(
            row.value,
            reading.form,
            reading.prompt_format.marks,
            columns=reading.columns,
            opening=reading.opening,
            is_whole=reading.is_whole,
            option=reading.columns_option,
        )
    except RowError as error:
        raise SourceError(row.where, f"{error}; got {excerpt(row.value)}", error.remedy) from error


def _trainable(conversation: Conversation | None) -> tuple[Conversation | None, Lost]:
    """``conversation`` up to its last answer that is learned; without any, None. And what was lost."""
    if conversation is None:
        return None, Lost.ALL_UNANSWERED
    turns = conversation.turns
    answered = turns if conversation.is_answered else turns[:-1]
    if not answered:
        return None, Lost.ALL_UNANSWERED
    lost = Lost.UNANSWERED if len(answered) < len(turns) else Lost.NOTHING
    while answered and not answered[-1].learned:
        answered, lost = answered[:-2], Lost.NOT_LEARNED
    return (replace(conversation, turns=answered), lost) if answered else (None, Lost.ALL_NOT_LEARNED)
