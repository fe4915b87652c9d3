"""Owns the forecast of a run: a description of its settings, and from it steps, memory and time.

The description is built from a module, its data and its Trainer; none of them needs weights. The formulas are in
`memory` and `speed`, the words in `words`. Knows no options.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from lit_qlora.data.batching import BatchPlan, limited, sizes_of
from lit_qlora.devices.dealing import efficiency
from lit_qlora.devices.world import world
from lit_qlora.errors import UserError
from lit_qlora.forecast import memory
from lit_qlora.forecast.cards import Card, find_card
from lit_qlora.forecast.memory import NO_SAMPLES, Samples, Step, StepMemory
from lit_qlora.forecast.speed import Epoch, epoch_hours, waits_for_host
from lit_qlora.model import host, lora, offload
from lit_qlora.model.device import compute_dtype, current_device
from lit_qlora.model.generate import PROMPTS_AT_ONCE
from lit_qlora.model.graphs import MOST, padded
from lit_qlora.model.lora import Lora
from lit_qlora.model.loss import CHUNK_ROWS
from lit_qlora.model.shape import Shape, target_names
from lit_qlora.storage.files import GIB

ANSWER_SHARE = 0.86
"""Share of answer tokens: measured on guanaco-llama2-1k with Llama 2's tokenizer."""
GUANACO = (
    (0, 22), (5, 76), (10, 114), (20, 181), (30, 240), (40, 307), (50, 373), (60, 433), (70, 509), (80, 624),
    (90, 886), (95, 1154), (98, 1636), (99, 1895), (100, 7832),
)  # fmt: skip
"""Percentiles of tokens per conversation, measured there, too; the first 259 test rows of the whole set agree."""


class Needs:
    """A mixin for callbacks that need memory or disk, with what the forecast counts for them."""

    keep_checkpoints = 0
    """Number of checkpoints that it keeps in the run folder."""

    def samples(self, data: Any) -> Samples:
        """All sample answers that it draws. ``data`` is the `ChatDataModule`."""
        return NO_SAMPLES


@dataclass(frozen=True)
class Rows:
    """The training rows of a forecast.

    Args:
        lengths: tokens of each row.
        answer_share: share of the tokens that is learned, from 0 to 1.
        known_by: source of both figures, in words; None if they were counted.
    """

    lengths: tuple[int, ...]
    answer_share: float = ANSWER_SHARE
    known_by: str | None = None

    @classmethod
    def of(cls, data: Any) -> "Rows":
        """The rows of ``data``, a `ChatDataModule` after ``setup("fit")``."""
        _, encoded = data.rows("train")
        return cls(tuple(encoded.lengths), sum(encoded.answer_tokens) / sum(encoded.lengths))


class Host(NamedTuple):
    """Memory of the host for activations: ``room_bytes``, page-locked, and ``gb_per_s``, the rate of copies in GB/s."""

    room_bytes: int
    gb_per_s: float


COLAB_HOST = Host(4 * GIB, 6.0)
"""Assumed for a card elsewhere: of Colab's 12.7 GB, what libraries and loading leave with a margin; of PCIe 3, half."""
WORTH = 0.01
"""Smallest share of a micro-batch's time that one more in the same pass must save."""
FORWARD_SHARE, BUS_SHARE = 1 / 3, 1 / 2
"""Share of a micro-batch's time in which copies to the host must be done, and the share of it that they may take."""


class Batches(NamedTuple):
    """The micro-batches of an epoch, and the largest of the run.

    Args:
        epoch: its tokens and micro-batches.
        num_rows: rows of the epoch.
        sizes: tokens of each micro-batch, padding counted.
        largest: tokens of the largest micro-batch, padding counted.
        shapes: number of micro-batches by shape, rows and tokens per row, with the padding for recorded kernels.
    """

    epoch: Epoch
    num_rows: int
    sizes: list[int]
    largest: int
    shapes: Counter[tuple[int, int]]

    @property
    def largest_recorded(self) -> int:
        """Tokens of the largest shape."""
        return max(rows * tokens for rows, tokens in self.shapes)

    @property
    def num_recordings(self) -> int:
        """Number of recordings that are kept, at most."""
        return min(len(self.shapes), MOST)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The settings that decide the memory and the time of a run, and the figures that follow.

    Args:
        shape: of the base.
        card: GPU to train on.
        rows: the training rows, before they are cut to ``max_length`` tokens.
        lora: the adapter.
        ranks: of an adapter to start from, by linear layer, for each decoder layer; else all are that of ``lora``.
        precision: as Lightning spells it.
        optimizer: its name.
        checkpointing: none, selective, auto or full.
        cuda_graphs: whether kernels are recorded; auto: where the card would wait for its host.
        slow_because: why the layers are transformers' own, which take more than the formulas say; None for ours.
        loss_rows: scored tokens whose logits exist at a time.
        host: where activations may wait; None where they may not.
        plan: how rows are grouped into micro-batches.
        max_length: tokens of one row.
        accumulate: micro-batches of one optimizer step, over all devices.
        num_devices: cards like this one, each with the whole base or a share of it.
        shard: whether they share the base; auto: where a whole one does not fit and a share does.
        shard_to: where the shares are: gpu or host.
        bus_gb_per_s: rate at which a shared base's layers come to a card.
        limit: micro-batches per epoch, or a share of them.
        seed: of the rows' order.
        samples: all sample answers of one validation.
        keep_checkpoints: checkpoints in the run folder.
    """

    shape: Shape
    card: Card
    rows: Rows
    lora: Lora
    ranks: tuple[Mapping[str, int], ...] | None = None
    precision: str
    optimizer: str = "adamw"
    checkpointing: str = "auto"
    cuda_graphs: bool | str = False
    slow_because: str | None = None
    loss_rows: int = CHUNK_ROWS
    host: Host | None = None
    plan: BatchPlan
    max_length: int
    accumulate: int = 1
    num_devices: int = 1
    shard: bool | str = False
    shard_to: str = "gpu"
    bus_gb_per_s: float = COLAB_HOST.gb_per_s
    limit: int | float = 1.0
    seed: int = 42
    samples: Samples = NO_SAMPLES
    keep_checkpoints: int = 0

    @property
    def is_slow(self) -> bool:
        """True if the layers are transformers' own, which are never recorded, and of which auto keeps none."""
        return self.slow_because is not None

    @cached_property
    def is_shared(self) -> bool:
        """True if each device keeps a share of the base only."""
        if self.shard != "auto":
            return self.shard is True
        if self.is_slow or (self.num_devices == 1 and self.shard_to == "gpu"):
            return False
        return not replace(self, shard=False).fits() and replace(self, shard=True).fits()

    @cached_property
    def batches(self) -> Batches:
        """The micro-batches."""
        return batches_of(self.rows.lengths, self.plan, self.max_length, self.seed, self.limit)

    @property
    def epoch(self) -> Epoch:
        """Tokens and micro-batches of an epoch."""
        return self.batches.epoch

    @cached_property
    def samples_at_once(self) -> Samples:
        """The sample answers that are drawn in one batch."""
        return replace(self.samples, num_prompts=min(self.samples.num_prompts, PROMPTS_AT_ONCE))

    @cached_property
    def step(self) -> Step:
        """The step of the largest micro-batch, with the number of layers kept by ``checkpointing`` on the card."""
        batches = self.batches
        step = step_of(
            self.shape,
            self.lora,
            self.precision,
            tokens=batches.largest,
            scored_tokens=math.ceil(batches.largest * self.rows.answer_share),
            ranks=self.ranks,
            optimizer=self.optimizer,
            accumulates=self.accumulate > 1,
            is_one_of_several=self.num_devices > 1,
            loss_rows=self.loss_rows,
            workspace=memory.HOPPER_WORKSPACE if self.card.capability >= (9, 0) else memory.WORKSPACE,
            sharers=self.num_devices if self.is_shared else 0,
            shares_on_host=self.is_shared and self.shard_to == "host",
        )
        if self._records(step):
            step = replace(step, tokens=batches.largest_recorded, num_recordings=batches.num_recordings)
        return self._most_together(self._placed(step))

    def _placed(self, step: Step) -> Step:
        """``step`` with what auto keeps on the card and on the host."""
        layers = self.shape.num_layers
        if self.checkpointing != "auto" or self.is_slow:
            return replace(step, kept_layers=layers if self.checkpointing in ("selective", "none") else 0)
        step = replace(step, dequantised_layers=0)
        kept, hosted = memory.place_layers(step, self.card_bytes, self.samples_at_once, self._most_hosted(step))
        step = replace(step, kept_layers=kept, hosted_layers=hosted)
        # All weights or none: some of them only would fill every card to its reserve, for little.
        is_open = replace(step, dequantised_layers=layers)
        can_open = kept - hosted == layers and not step.sharers
        return is_open if can_open and memory.fits(is_open, self.card_bytes, self.samples_at_once) else step

    def _most_together(self, step: Step) -> Step:
        """``step`` with as many micro-batches together as make it quickest, by the forecast."""
        per_device = self.accumulate // self.num_devices
        is_alone = per_device < 2 or step.uses_cuda_graphs or step.dequantised_layers == self.shape.num_layers
        if self.checkpointing != "auto" or self.is_slow or is_alone:
            return step
        epoch = Epoch(step.tokens, step.tokens, 1, 0)
        best, least = step, self._hours_of(step, epoch)
        for together in range(2, per_device + 1):
            tried = self._placed(replace(step, together=together))
            took = self._hours_of(tried, epoch)
            if (
                took is None
                or least is None
                or took > least * (1 - WORTH)
                or not memory.fits(tried, self.card_bytes, self.samples_at_once)
            ):
                break
            best, least = tried, took
        return best

    def _records(self, step: Step) -> bool:
        """True if a fit records its kernels on the card."""
        if self.is_slow or self.plan.packed or self.is_shared:
            return False
        if self.cuda_graphs != "auto":
            return bool(self.cuda_graphs)
        is_plain = not (self.lora.dropout or torch.are_deterministic_algorithms_enabled())
        return is_plain and waits_for_host(replace(step, kept_layers=self.shape.num_layers), self.card)

    def _most_hosted(self, step: Step) -> int:
        """How many layers' feed-forward the host has the room for, and the bus the time while others are computed."""
        tokens = step.together * step.tokens
        epoch = Epoch(tokens, tokens, step.together, 0)
        hours = epoch_hours(replace(step, kept_layers=self.shape.num_layers), epoch, self.card)
        if self.host is None or hours is None or step.uses_cuda_graphs or step.sharers:  # whose layers use the bus
            return 0
        sendable = hours * 3600 * FORWARD_SHARE * BUS_SHARE * self.host.gb_per_s * 1e9
        layer = tokens * memory.hosted_in_layer(step)
        return int(min(self.host.room_bytes, sendable) // layer)

    @cached_property
    def moments(self) -> list[StepMemory]:
        """All moments whose memory the run needs."""
        return memory.run_moments(self.step, self.samples_at_once)

    @cached_property
    def peak(self) -> StepMemory:
        """The moment with the highest memory."""
        return max(self.moments, key=lambda moment: moment.reserved)

    @property
    def needed_gib(self) -> float:
        """GiB that the card must have."""
        return self.peak.on_card / GIB

    @property
    def in_training_gib(self) -> float:
        """GiB that PyTorch reserves in a training step: sample answers and validations may need more."""
        return memory.step_memory(self.step).reserved / GIB

    @property
    def card_bytes(self) -> float:
        """Memory of the card."""
        return self.card.memory_gib * GIB

    def fits(self, share: float = 1.0) -> bool:
        """True if the run stays within ``share`` of the card.

        Args:
            share: of the card's memory, up to 1.
        """
        return self.peak.on_card <= share * self.card_bytes

    @cached_property
    def hours(self) -> float | None:
        """Hours per epoch at the cards' sustained rates; None if these are not known."""
        hours = self._hours_of(self.step, self.epoch)
        return None if hours is None else hours / (self.num_devices * self.efficiency)

    def _hours_of(self, step: Step, epoch: Epoch) -> float | None:
        """Hours in which one card computes ``epoch`` by itself."""
        hours = epoch_hours(step, epoch, self.card)
        if hours is None:
            return None
        # A shared base's layers come while others are computed: the slower of the two counts.
        passes = epoch.num_micro_batches / step.together
        return max(hours, passes * memory.fetched_bytes(step) / self.bus_gb_per_s / 1e9 / 3600)

    @cached_property
    def efficiency(self) -> float:
        """The share of the devices' time in which they compute: a step waits for the slowest of them."""
        return efficiency(self.batches.sizes, self.accumulate, self.num_devices)


@lru_cache(typed=True)  # a limit of 1 is one micro-batch, 1.0 is all of them
def batches_of(lengths: tuple[int, ...], plan: BatchPlan, max_length: int, seed: int, limit: int | float) -> Batches:
    """The micro-batches of an epoch.

    Args:
        lengths: tokens of each row before any cut.
        plan: how rows are put into micro-batches.
        max_length: tokens at which a row is cut.
        seed: of the order of rows.
        limit: micro-batches that are taken of the epoch, or as a float the share of them.
    """
    cut = [min(length, max_length) for length in lengths]
    batches = plan.epoch(cut, seed, 0)
    taken = batches[: max(1, limited(len(batches), limit))]
    rows = [cut[row] for batch in taken for row in batch]
    sizes = sizes_of(taken, cut, plan.packed)
    epoch = Epoch(sum(rows), sum(sizes), len(taken), sum(length**2 for length in rows) / sum(rows))
    # A later epoch draws others: the largest is that of them all.
    shapes = Counter((len(batch), padded(len(batch), max(cut[row] for row in batch))) for batch in batches)
    return Batches(epoch, len(rows), sizes, max(sizes_of(batches, cut, plan.packed)), shapes)


def foresee(
    module: Any,
    data: Any,
    trainer: Any,
    card: Card | None = None,
    rows: Rows | None = None,
    samples: Samples | None = None,
) -> Forecast | None:
    """Forecast a fit.

    Args:
        module: the `QLoRAModule`; nothing of it has to be loaded.
        data: the `ChatDataModule`, after ``setup("fit")`` unless rows and samples are given.
        trainer: the Trainer.
        card: the card to train on; default: this machine's.
        rows: the training rows; default: those of ``data``.
        samples: all sample answers of one validation; default: those of the Trainer's callbacks.

    Returns:
        The forecast; None without a card.
    """
    beside = COLAB_HOST if card else current_host()
    card = card or current_card()
    if card is None:
        return None
    needs = [callback for callback in trainer.callbacks if isinstance(callback, Needs)]
    if samples is None:
        samples = next((drawn for one in needs if (drawn := one.samples(data)).num_prompts), NO_SAMPLES)
    return Forecast(
        shape=module.base.shape,
        card=card,
        rows=rows or Rows.of(data),
        lora=module.lora,
        ranks=lora.ranks(module.adapter, module.base.shape.num_layers) if module.adapter else None,
        precision=str(trainer.precision),
        optimizer=module.optimizer_name,
        checkpointing=module.checkpointing,
        cuda_graphs=module.cuda_graphs,
        slow_because=module.slow_because,
        loss_rows=module.loss_rows,
        host=beside if module.offload else None,
        plan=data.plan,
        max_length=data.max_length,
        accumulate=trainer.accumulate_grad_batches,
        num_devices=getattr(trainer, "num_processes", 1),
        shard=module.shard,
        shard_to=module.shard_to,
        bus_gb_per_s=(beside or COLAB_HOST).gb_per_s,
        limit=trainer.limit_train_batches,
        seed=data.seed,
        samples=samples,
        keep_checkpoints=max((one.keep_checkpoints for one in needs), default=0),
    )


def step_of(shape: Shape, lora: Lora, precision: object, **settings: Any) -> Step:
    """A step of a base with an adapter.

    Args:
        shape: of the base.
        lora: the adapter.
        precision: as Lightning spells it.
        settings: further fields of `Step`, at least ``tokens`` and ``scored_tokens``.
    """
    targets = tuple(dict.fromkeys(target_names(lora.target_modules)))
    element = compute_dtype(str(precision)).itemsize
    return Step(shape, rank=lora.rank, targets=targets, element=element, **settings)


def fits_to_score(module: Any, data: Any, trainer: Any, card: Card) -> bool:
    """True if scoring with a whole base leaves `memory.RESERVE` of a card free, whatever the micro-batch.

    Args:
        module: a `QLoRAModule`; nothing of it has to be loaded.
        data: its `ChatDataModule`.
        trainer: Trainer that is to score.
        card: GPU to score on.
    """
    tokens = data.plan.tokens or data.plan.rows * data.max_length
    step = step_of(
        module.base.shape,
        module.lora,
        trainer.precision,
        tokens=tokens,
        scored_tokens=tokens,
        loss_rows=module.loss_rows,
        is_one_of_several=world().size > 1,
    )
    return memory.scoring_memory(step).on_card <= card.memory_gib * GIB * (1 - memory.RESERVE)


def together_on_host(module: Any, data: Any, trainer: Any) -> int:
    """How many micro-batches of a step go through the layers together in a fit on a CPU.

    One, where weights stay dequantised or are not ours to dequantise; else as many as half of the host's free memory
    has the room for.

    Args:
        module: a `QLoRAModule`, loaded.
        data: its `ChatDataModule`, after ``setup("fit")``.
        trainer: of the fit.
    """
    shape = module.base.shape
    is_open = module.dequantised_layers == shape.num_layers
    if module.checkpointing != "auto" or module.slow_because or is_open:
        return 1
    tokens, kept = data.largest_batch().input_ids.numel(), module.kept_layers
    step = step_of(shape, module.lora, trainer.precision, tokens=tokens, scored_tokens=0, kept_layers=kept)
    room = host.room_bytes() // (step.tokens * memory.kept_activations(step))
    return max(1, min(room, trainer.accumulate_grad_batches))


def guanaco_lengths(num_rows: int) -> tuple[int, ...]:
    """Lengths like those of guanaco-llama2-1k: its measured percentiles, linearly interpolated.

    Args:
        num_rows: how many.

    Returns:
        Tokens of each, from the shortest on.
    """
    lengths = []
    for row in range(num_rows):
        percent = 100 * (row + 0.5) / num_rows
        (low, shortest), (high, longest) = next(pair for pair in pairwise(GUANACO) if pair[1][0] >= percent)
        lengths.append(round(shortest + (longest - shortest) * (percent - low) / (high - low)))
    return tuple(lengths)


@cache
def current_host() -> Host | None:
    """This process's room on this machine, at the rate measured once; None without a GPU, or where no memory can be
    page-locked.
    """
    room_bytes = host.room_bytes()
    if not current_device().is_gpu or not room_bytes:
        return None
    try:
        return Host(room_bytes, offload.copy_gb_per_s())
    except UserError:
        return None


def current_card() -> Card | None:
    """This machine's GPU, with the rates of the table if listed; None without one."""
    device = current_device()
    if device.capability is None:
        return None
    try:
        known = find_card(device.name)
    except UserError:  # a card outside the table has no known rates
        known = Card(device.name, 0, device.capability)
    # Free memory excludes what CUDA and NCCL hold already; the formulas include it.
    held = memory.CUDA_CONTEXT + (memory.EXCHANGE if world().size > 1 else 0)
    return replace(known, memory_gib=(device.memory_bytes + held) / GIB, capability=device.capability)
