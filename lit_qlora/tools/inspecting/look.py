"""Owns the look at a fit's rows: every batch of an epoch is read as training reads it, and counted.

Rows come from the DataModule, its encoder and its loaders, as in training. Knows no words and no page.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_qlora.batch import Batch
from lit_qlora.console import progress_bar
from lit_qlora.data.batching import BatchPlan, epoch_steps, sizes_of
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.data.records import LeftOut, Lost, Records, is_at, no_row
from lit_qlora.data.view import Token, tokens
from lit_qlora.errors import UserError
from lit_qlora.text.conversation import Conversation
from lit_qlora.text.formats import SHORTEST_MARK
from lit_qlora.tools.inspecting.doubles import Double, find_doubles
from lit_qlora.tools.inspecting.verdict import Batched, Fault, Judge

PARTS = {"train": "training", "validation": "held out"}


class Found(NamedTuple):
    """A ``fault``, and ``where`` its row is, such as ``rows.jsonl:17``."""

    where: str
    fault: Fault


@dataclass
class Part:
    """The rows that are learned, or those that are held out.

    Args:
        name: of the part, as it is printed.
        source: where its rows come from.
        conversations: one per row that is not left out.
        where: the place of the row of each of these.
        left_out: rows that are not taken, with the reason.
    """

    name: str
    source: str
    conversations: list[Conversation]
    where: list[str]
    dropped: list[tuple[int, str]]
    """Number of rows, and what was dropped of them or not used; of several sources, with the name of each."""
    left_out: list[LeftOut]
    sources: list[tuple[str, int, int]]
    """Name, number of conversations and number of rows left out of each source, if there are several."""
    notes: list[str]
    """Remarks on the rows beside their counts, such as splits that were not read."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each conversation before any cut."""
    kept: list[int] = field(default_factory=list)
    """Tokens of each conversation in the batches; 0 if it is in none."""
    learned: list[int] = field(default_factory=list)
    """Learned tokens of each conversation."""
    num_in_batches: list[int] = field(default_factory=list)
    """Rows that each conversation takes."""
    spelled: list[tuple[str, str]] = field(default_factory=list)
    """Places of texts that spell a special token, and which; it is learned as letters, never as that token."""

    @property
    def num_rows(self) -> int:
        """Rows that were read, with those that are left out."""
        return len(self.conversations) + len(self.left_out)

    @property
    def num_turns(self) -> int:
        """Turns of the conversations, system texts not counted."""
        return sum(len(conversation.turns) for conversation in self.conversations)

    @property
    def num_divided(self) -> int:
        """Plain texts that stand in several rows."""
        return sum(number > 1 for number in self.num_in_batches)

    @property
    def num_cut(self) -> int:
        """Conversations that lost tokens to the cap, but not all of them."""
        return sum(0 < kept < length for kept, length in zip(self.kept, self.lengths, strict=True))


class Batching(NamedTuple):
    """A way to batch the training rows, and what an epoch comes to by it.

    Args:
        plan: the way.
        micro_batches: of an epoch.
        steps: optimizer steps of an epoch.
        padding: share of all tokens, from 0 to below 1.
        is_chosen: True if the run batches so.
    """

    plan: BatchPlan
    micro_batches: int
    steps: int
    padding: float
    is_chosen: bool


class Shown(NamedTuple):
    """A row to be shown.

    Args:
        where: the row's place, such as ``rows.jsonl:17``.
        part: name of its `Part`.
        tokens: as they stand in a batch.
    """

    where: str
    part: str
    tokens: list[Token]


@dataclass(frozen=True)
class Look:
    """All that was seen of a fit's rows.

    Args:
        parts: what is learned, and what is held out if anything is.
        max_length: tokens to which conversations are cut.
        batchings: the run's own, and others to compare.
        doubles: held-out conversations that are in training, too.
        found: faults of rows.
        shown: rows to be shown token by token.
    """

    parts: list[Part]
    max_length: int
    batchings: list[Batching]
    num_steps: int
    """Optimizer steps of the whole run."""
    num_taken: int
    """Micro-batches of an epoch that the run takes."""
    doubles: list[Double]
    found: list[Found]
    shown: list[Shown]
    notes: list[str]
    """Remarks on the prompt format."""


def look(trainer: Any, data: ChatDataModule, num_shown: int, shown_row: str | None) -> Look:
    """Read all rows of a fit.

    Args:
        trainer: of the run; the DataModule is attached to it.
        data: the rows; detached from the Trainer afterwards.
        num_shown: number of training rows to show, from the first on.
        shown_row: the one to show instead: its number in the file, or ``file:number``.

    Returns:
        All that was seen, for the terminal and the page.

    Raises:
        UserError: as a fit does for rows, format and options; and if there is no such row to show.
    """
    data.setup("fit")
    num_steps, accumulate = data.num_optimizer_steps(), trainer.accumulate_grad_batches
    num_taken = data.train_dataloader().length
    data.trainer, data.num_workers = None, 0  # every row of an epoch, whatever a Trainer takes of it
    parts, found, in_batches = list[Part](), list[Found](), list[list[_Row | None]]()
    judge = Judge(data.encoder)
    for name in PARTS:
        part, rows = _judge_part(data, name, judge, found)
        parts.append(part)
        in_batches.append(rows)
    shown = [
        Shown(parts[side].where[number], parts[side].name, tokens(data.tokenizer, *row.batched()))
        for side, number in _choose(parts, num_shown, shown_row)
        if (row := in_batches[side][number]) is not None
    ]
    lengths = data.rows("train")[1].lengths
    batchings = [_batching(plan, data, lengths, accumulate) for plan in _plans(data, lengths)]
    doubles = find_doubles(parts[0].conversations, parts[1].conversations)
    notes = data.format_notes()
    return Look(parts, data.max_length, batchings, num_steps, num_taken, doubles, found, shown, notes)


class _Row(NamedTuple):
    """A row of a batch: ids and whether they are learned, ``[T]`` each."""

    ids: Tensor
    learned: Tensor

    def batched(self) -> Batched:
        return Batched(self.ids.tolist(), self.learned.tolist())


def _judge_part(data: ChatDataModule, name: str, judge: Judge, found: list[Found]) -> tuple[Part, list[_Row | None]]:
    """Count a part's rows, and add their faults to ``found``; also return them, by conversation."""
    records, encoded = data.rows(name)
    sources = [(one.name, len(one.conversations), len(one.left_out)) for one in records.parts]
    part = Part(
        PARTS[name], records.name, records.conversations, records.where, _losses_of(records), records.left_out, sources,
        data.notes[name],
    )  # fmt: skip
    part.dropped.append(judge.encoder.context_only(records.conversations))
    for where, reason, lost in records.left_out:
        if lost not in (Lost.ALL_NOT_LEARNED, Lost.OTHER_SPLIT):  # as its weights or its column ask for
            kind = "nothing" if lost is Lost.ALL_UNANSWERED else "unread"
            found.append(Found(where, Fault(kind, reason)))
    loader = data.train_dataloader() if name == "train" else data.val_dataloader()
    by_row = {number: row for batch in loader for number, row in _batch_rows(batch, encoded.lengths)}
    named = [token for token in judge.encoder.prompt_format.spelled.all if len(token) >= SHORTEST_MARK]
    spelled = re.compile("|".join(map(re.escape, named)) or r"(?!)")
    rows, number = list[_Row | None](), 0
    written_back = judge.read_back(judge.encoder.written(records.conversations))
    seen = zip(records.where, records.conversations, written_back, strict=True)
    bar = progress_bar(f"{part.name} rows", iterable=seen, total=len(records.conversations), leave=False)
    for where, conversation, (written, came_back) in bar:
        texts = [conversation.system or "", *(turn.content for turn in conversation.turns)]
        part.spelled += [(where, token[0]) for text in texts if (token := spelled.search(text))][:1]
        examples = judge.encoder.rows(written)
        row = _as_one_row([by_row.get(number + place) for place in range(len(examples))])
        number += len(examples)
        rows.append(row)
        found += (Found(where, fault) for fault in judge.faults(written, came_back, examples, row and row.batched()))
        part.lengths.append(sum(len(one.ids) for one in written))
        part.num_in_batches.append(len(examples))
        part.kept.append(0 if row is None else len(row.ids))
        part.learned.append(0 if row is None else int(row.learned.sum()))
    return part, rows


def _as_one_row(rows: Sequence[_Row | None]) -> _Row | None:
    """The rows of one conversation as one; None if no batch holds one of them."""
    found = [row for row in rows if row is not None]
    if not found or len(found) < len(rows):
        return None
    return _Row(*(torch.cat([one[0], *(more[1:] for more in one[1:])]) for one in zip(*found, strict=True)))


def _losses_of(records: Records) -> list[tuple[int, str]]:
    of_sources = [(count, f"{what} ({one.name})") for one in records.parts for what, count in one.dropped.items()]
    known = {what for one in records.parts for what in one.dropped}
    return [*of_sources, *((count, what) for what, count in records.dropped.items() if what not in known)]


def _batch_rows(batch: Batch, lengths: Sequence[int]) -> Iterator[tuple[int, _Row]]:
    """The rows of a batch by their numbers, as the loss sees them: without padding, unless some of it is learned."""
    ids = batch.input_ids.flatten().clone()
    learned = torch.zeros(len(ids), dtype=torch.bool)
    ids[batch.positions + 1], learned[batch.positions + 1] = batch.targets, True
    start, width = 0, batch.input_ids.shape[1]
    for place, number in enumerate(batch.rows):
        size = room = batch.lengths[place] if batch.lengths else width
        if not batch.lengths:
            own = learned[start : start + width]
            size = max(lengths[number], int(own.nonzero().max()) + 1 if own.any() else 0)
        yield number, _Row(ids[start : start + size].int(), learned[start : start + size])
        start += room


def _choose(parts: Sequence[Part], count: int, row: str | None) -> list[tuple[int, int]]:
    """The conversations to show, each as its part and its number there.

    Raises UserError where there is no such row, or no conversation was made of it.
    """
    if row is None:
        return [(0, number) for number, kept in enumerate(parts[0].kept) if kept][:count]
    for side, part in enumerate(parts):
        for number, where in enumerate(part.where):
            if is_at(where, row):
                if not part.kept[number]:
                    raise UserError("nothing of it is learned, so no batch holds it", option="row", place=where)
                return [(side, number)]
    for part in parts:
        for where, reason, _ in part.left_out:
            if is_at(where, row):
                raise UserError(f"it is left out: {reason}", option="row", place=where)
    raise no_row(parts[0].source, row)


def _plans(data: ChatDataModule, lengths: Sequence[int]) -> list[BatchPlan]:
    """The ways to batch, with the rows and tokens that are chosen; without tokens, as many as the largest batch has."""
    by_rows = BatchPlan(data.plan.rows)
    sizes = sizes_of(by_rows.epoch(lengths, data.seed, 0), lengths, packed=False)
    budget = data.plan.tokens or max(data.max_length, *sizes)
    return [by_rows, BatchPlan(data.plan.rows, budget), BatchPlan(data.plan.rows, budget, packed=True)]


def _batching(plan: BatchPlan, data: ChatDataModule, lengths: Sequence[int], accumulate: int) -> Batching:
    batches = plan.epoch(lengths, data.seed, 0)
    places = sum(sizes_of(batches, lengths, plan.packed))
    steps = epoch_steps(len(batches), accumulate)
    return Batching(plan, len(batches), steps, 1 - sum(lengths) / places, plan == data.plan)
