"""Owns which rows form a batch, their order, and the loader that can resume anywhere.

The order is a function of (seed, epoch) and nothing else, so a loader's whole state is two numbers.
Knows lengths and ids; not what they say, nor what is computed of them.
"""

import atexit
import math
import os
import random
import threading
import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils.data import DataLoader

from lit_qlora.batch import IGNORE_INDEX, Batch, answer_targets
from lit_qlora.devices.dealing import deal_steps, efficiency
from lit_qlora.signals import no_signals_for_children

if TYPE_CHECKING:
    from lit_qlora.data.cache import EncodedRows

T = TypeVar("T")

GROUP_BATCHES = 50
"""Number of batches whose rows are drawn together and then sorted by length: random, with little padding."""


@dataclass(frozen=True)
class BatchPlan:
    """How rows are grouped: ``rows`` per micro-batch, or as many as fit into ``tokens`` with padding.

    With ``tokens``, ``rows`` is not used; a row longer than the budget is alone. With ``packed``, rows are concatenated
    without padding.

    Args:
        rows: number of rows per micro-batch, without ``tokens``.
        tokens: most tokens of a micro-batch, padding counted; None: batches of ``rows``.
        packed: True if a micro-batch is one row, without padding.
    """

    rows: int = 4
    tokens: int | None = None
    packed: bool = False

    def epoch(self, lengths: Sequence[int], seed: int, epoch: int) -> list[list[int]]:
        """The micro-batches of one epoch, as row numbers.

        Every row is in exactly one; the number of batches is the same in every epoch. The batch with the most padded
        tokens comes first, so that memory runs out at once or never.

        Args:
            lengths: tokens of each row.
            seed: of the run.
            epoch: its number, from 0.
        """
        draw = random.Random(f"{seed}/{epoch}")
        batches = self._by_tokens(lengths, draw) if self.tokens else self._by_rows(lengths, draw)
        draw.shuffle(batches)
        sizes = sizes_of(batches, lengths, self.packed)
        largest = batches.pop(sizes.index(max(sizes)))
        return [largest, *batches]

    def _by_rows(self, lengths: Sequence[int], draw: random.Random) -> list[list[int]]:
        order = list(range(len(lengths)))
        draw.shuffle(order)
        return [
            batch
            for group in _chunks(order, self.rows * GROUP_BATCHES)
            for batch in _chunks(sorted(group, key=lambda row: lengths[row]), self.rows)
        ]

    def _by_tokens(self, lengths: Sequence[int], draw: random.Random) -> list[list[int]]:
        # Sorted over the whole epoch, randomly among equals: the sequence of lengths, and so the number of batches,
        # never changes. Lightning asks for that number once.
        order = list(range(len(lengths)))
        draw.shuffle(order)
        order.sort(key=lambda row: -lengths[row])
        return self._pack(order, lengths) if self.packed else self._fill(order, lengths)

    def _fill(self, order: list[int], lengths: Sequence[int]) -> list[list[int]]:
        assert self.tokens is not None
        batches: list[list[int]] = []
        for row in order:  # from long to short: the first row of a batch is its longest
            if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= self.tokens:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def _pack(self, order: list[int], lengths: Sequence[int]) -> list[list[int]]:
        """Best fit, from long to short: each row goes into the batch with the least room left after it."""
        assert self.tokens is not None
        batches: list[list[int]] = []
        room: list[tuple[int, int]] = []  # tokens left and the batch's number, by both
        for row in order:
            at = bisect_left(room, (lengths[row], -1))
            if at == len(room):
                left, number = self.tokens, len(batches)
                batches.append([])
            else:
                left, number = room.pop(at)
            batches[number].append(row)
            insort(room, (left - lengths[row], number))
        return batches


def sizes_of(batches: Iterable[Sequence[int]], lengths: Sequence[int], packed: bool) -> list[int]:
    """Tokens of each of ``batches`` of rows, padding counted.

    Args:
        batches: row numbers of each.
        lengths: tokens of each row.
        packed: True if rows are packed without padding.
    """
    own = ([lengths[row] for row in rows] for rows in batches)
    return [sum(some) if packed else len(some) * max(some) for some in own]


def epoch_steps(num_batches: int, accumulate: int) -> int:
    """Optimizer steps of an epoch of ``num_batches`` micro-batches over all devices; the last step may have fewer than
    ``accumulate``.
    """
    return math.ceil(num_batches / accumulate)


def run_steps(steps: int, max_epochs: int | None, max_steps: int) -> int:
    """Optimizer steps of a whole run.

    Args:
        steps: of an epoch.
        max_epochs: as the Trainer has it: -1 or None for no limit.
        max_steps: most steps of the run, as the Trainer has it: -1 for no limit.
    """
    by_epochs = math.inf if max_epochs in (None, -1) else max_epochs * steps
    return int(min(by_epochs, math.inf if max_steps == -1 else max_steps))


def limited(available: int, limit: int | float) -> int:
    """Number of the ``available`` micro-batches that a Trainer's ``limit`` leaves.

    Args:
        available: micro-batches of an epoch.
        limit: a whole number of them, or a share of 1.0 at most.
    """
    return min(limit, available) if isinstance(limit, int) else int(limit * available)


def _chunks(rows: list[T], size: int) -> list[list[T]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def collate(
    examples: Sequence[tuple[int, dict[str, list[int]]]], step_answer_tokens: int, packed: bool = False
) -> Batch:
    """Pad ``(row, example)`` pairs on the right to their longest, or pack them into one row.

    Padding is id 0, and never learned; nor is the first token of a conversation, which nothing predicts.

    Args:
        examples: rows by their numbers, each with ``input_ids`` and ``labels`` of one length.
        step_answer_tokens: learned tokens of the whole optimizer step, of all devices.
        packed: True to put them into one row, one behind the other.

    Returns:
        A batch with ``input_ids`` of ``[B, T]``; ``[1, T]`` if packed.
    """
    lengths: tuple[int, ...] = ()
    num_tokens = sum(len(example["input_ids"]) for _, example in examples)
    rows = tuple(row for row, _ in examples)
    if packed:
        lengths = tuple(len(example["input_ids"]) for _, example in examples)
        labels = [label for _, example in examples for label in [IGNORE_INDEX, *example["labels"][1:]]]
        ids = [token for _, example in examples for token in example["input_ids"]]
        examples = [(0, {"input_ids": ids, "labels": labels})]
    length = max(len(example["input_ids"]) for _, example in examples)
    input_ids = torch.zeros(len(examples), length, dtype=torch.int64)
    padded_labels = torch.full_like(input_ids, IGNORE_INDEX)
    for index, (_, example) in enumerate(examples):
        size = len(example["input_ids"])
        input_ids[index, :size] = torch.tensor(example["input_ids"])
        padded_labels[index, :size] = torch.tensor(example["labels"])
    return Batch(
        input_ids,
        *answer_targets(padded_labels),
        rows=rows,
        num_tokens=num_tokens,
        step_answer_tokens=step_answer_tokens,
        lengths=lengths,
        highest_id=int(input_ids.max()),
    )


def elsewhere(rows: Sequence[int], lengths: Sequence[int], step_answer_tokens: int, packed: bool) -> Batch:
    """A stand-in for a micro-batch that another device computes, of the same shape and number of tokens.

    Args:
        rows: row numbers.
        lengths: tokens of each row of the run.
        step_answer_tokens: learned tokens of the whole optimizer step, of all devices.
        packed: as in `collate`.

    Returns:
        A batch whose ``input_ids`` ``[B, T]`` take no memory, and which has nothing to predict.
    """
    own = [lengths[row] for row in rows]
    shape = (1, sum(own)) if packed else (len(own), max(own))
    nothing = torch.zeros(0, dtype=torch.int64)
    ids = torch.zeros((), dtype=torch.int64).expand(shape)
    return Batch(ids, nothing, nothing, tuple(rows), sum(own), step_answer_tokens, is_here=False)


class PlannedBatches(torch.utils.data.Dataset[Batch]):
    """Micro-batches of rows, in order or by index, so that workers load batches by themselves.

    Args:
        rows: all of them.
        steps: micro-batches of each optimizer step, as row numbers; each knows the learned tokens of its step.
        at_once: how many micro-batches are dealt to the devices together.
        packed: as in `collate`.
        device_index: number of this device among ``num_devices``. Of a micro-batch dealt to another, only what is
            counted is made.
        num_devices: number of processes that share the micro-batches, one per device.
    """

    def __init__(
        self,
        rows: "EncodedRows",
        steps: Iterable[list[list[int]]],
        at_once: int,
        packed: bool = False,
        device_index: int = 0,
        num_devices: int = 1,
    ) -> None:
        self.examples, self.lengths, self.packed = rows.examples, rows.lengths, packed  # what workers get
        self.device_index, self.num_devices = device_index, num_devices
        self.batches: list[tuple[list[int], int]] = []
        for step in steps:
            answers = sum(rows.answer_tokens[row] for batch in step for row in batch)
            self.batches += [(batch, answers) for batch in step]
        sizes = sizes_of((batch for batch, _ in self.batches), rows.lengths, packed)
        self.devices = deal_steps(sizes, at_once, num_devices)

    def behind(self, done: int) -> "PlannedBatches":
        """The micro-batches after the first ``done``."""
        rest = copy(self)
        rest.batches, rest.devices = self.batches[done:], self.devices[done:]
        return rest

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        rows, step_answer_tokens = self.batches[index]
        device = self.devices[index]
        if device != self.device_index:
            batch = elsewhere(rows, self.lengths, step_answer_tokens, self.packed)
        else:
            batch = collate([(row, self.examples[row]) for row in rows], step_answer_tokens, self.packed)
        return batch._replace(device=device) if self.num_devices > 1 else batch


def _as_it_is(batch: Batch) -> Batch:
    """Replace the DataLoader's own conversion, which would turn the tuple of rows into a list."""
    return batch


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _watch_parent(_: int) -> None:
    """Make a worker end with its parent process, even if that was killed."""

    def wait(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(1)

    parent = parent_process()
    if parent is not None:
        threading.Thread(target=wait, args=[parent.sentinel], daemon=True).start()


_open: weakref.WeakKeyDictionary[Generator[Batch, None, None], list[Iterator[Batch]]] = weakref.WeakKeyDictionary()
"""Unfinished epochs with their DataLoader iterators, kept alive here: else an iterator's queues could be closed before
it has ended its workers."""


@atexit.register
def _close() -> None:
    """End the workers of unfinished epochs: Python would wait for them to react to its SIGTERM.

    Registered after multiprocessing's own handler, and so called before it.
    """
    for batches in [*_open]:
        batches.close()


class ResumableLoader:
    """Batches, epoch after epoch; each iteration is the next epoch, or the rest of an interrupted one.

    Args:
        rows: all of them.
        order: epoch number to micro-batches of rows, the same number of them in every epoch.
        accumulate: micro-batches of one optimizer step over all devices; an epoch's last step may have fewer.
        device_index: as in `PlannedBatches`.
        num_devices: as in `PlannedBatches`.
        limit: most micro-batches per epoch, or a share of them, as in ``Trainer``.
        num_workers: number of processes that prefetch.
        packed: True if the rows of a micro-batch are packed into one.
        epoch: number of the first epoch.
    """

    def __init__(
        self,
        rows: "EncodedRows",
        order: Callable[[int], list[list[int]]],
        *,
        accumulate: int = 1,
        device_index: int = 0,
        num_devices: int = 1,
        limit: int | float = 1.0,
        num_workers: int = 0,
        packed: bool = False,
        epoch: int = 0,
    ) -> None:
        self.rows, self.order, self.packed = rows, order, packed
        self.accumulate = accumulate
        self.device_index, self.num_devices = device_index, num_devices
        self.num_workers = num_workers
        self.available = len(order(0))
        self.length = limited(self.available, limit)
        self._epoch = epoch
        self._done = 0
        self.made_by: object = None
        """The DataModule that knows the rows, for a module that is given the loader alone."""

    def __len__(self) -> int:
        """Micro-batches of a whole epoch; the Trainer applies the limit to it once more."""
        return self.available

    def __iter__(self) -> Iterator[Batch]:
        loaded: list[Iterator[Batch]] = []
        batches = self._batches(loaded)
        _open[batches] = loaded
        return batches

    def _batches(self, loaded: list[Iterator[Batch]]) -> Generator[Batch, None, None]:
        loader: DataLoader[Batch] = DataLoader(
            self._plan(self._epoch).behind(self._done),
            batch_size=None,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # without a batch size, it gets one item
            num_workers=self.num_workers,
            worker_init_fn=_watch_parent,
        )
        with no_signals_for_children():  # the workers end with the epoch, or with this process
            loaded.append(iter(loader))
        try:
            for batch in loaded[0]:
                # Counted before it is yielded: the holder of a batch saves the state after it.
                self._done += 1
                if self._done == self.length:
                    self._epoch, self._done = self._epoch + 1, 0
                yield batch
        finally:
            loaded.clear()

    def efficiency(self) -> float:
        """The share of the devices' time in which they compute, in the first epoch, by tokens."""
        sizes = sizes_of(self.order(0)[: self.length], self.rows.lengths, self.packed)
        return efficiency(sizes, self.accumulate, self.num_devices)

    def begin(self, epoch: int) -> None:
        """Start at the first micro-batch of an epoch, whatever was read so far, such as for a look at a batch.

        Args:
            epoch: its number.
        """
        self._epoch, self._done = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch; at an epoch's end, the start of the next epoch."""
        return {"epoch": self._epoch, "batches": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume after the last batch yielded when ``state`` was taken."""
        self._epoch, self._done = state["epoch"], state["batches"]

    def _plan(self, epoch: int) -> PlannedBatches:
        """The micro-batches of an epoch, each with the learned tokens of its optimizer step."""
        steps = _chunks(self.order(epoch)[: self.length], self.accumulate)
        return PlannedBatches(self.rows, steps, self.accumulate, self.packed, self.device_index, self.num_devices)
