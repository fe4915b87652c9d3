"""Owns the search for settings that fit a card: what a set of them needs, the smallest change that fits, the quickest.

Knows formulas, lengths of rows and the names of options; no files and no model.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

from lit_qlora.callbacks.outlook import Largest, epoch_of, step_of
from lit_qlora.callbacks.samples import PROMPTS_AT_ONCE
from lit_qlora.data.batching import BatchPlan
from lit_qlora.model import memory
from lit_qlora.model.cards import Card
from lit_qlora.model.checkpointing import Checkpointing
from lit_qlora.model.load import Lora
from lit_qlora.model.memory import GIB, Samples, Step, StepMemory
from lit_qlora.model.shape import Shape
from lit_qlora.model.speed import Epoch, epoch_hours

BUDGETS = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
SHORTEST, LENGTH_STEP = 256, 64
"""Of max_length where it is cut: below, a conversation loses its answers."""
RANKS = (128, 96, 64, 48, 32, 24, 16, 8, 4)
MINUTE = 1 / 60
"""Hours; a shorter epoch is not worth a change."""
GAIN = 0.03
"""Less time saved is within the prediction's error, and no reason to change anything."""


@dataclass(frozen=True)
class Settings:
    """What of a configuration decides memory and time. ``lengths`` are those of the rows before any cut."""

    shape: Shape
    card: Card
    precision: str
    lengths: tuple[int, ...]
    answer_share: float
    prompt_tokens: int
    lora: Lora
    optimizer: str
    checkpointing: str
    plan: BatchPlan
    max_length: int
    accumulate: int
    num_samples: int
    new_tokens: int
    seed: int
    cuda_graphs: bool | str = False
    loss_rows: int = memory.CHUNK_ROWS
    own_layers: bool = True

    def epoch(self) -> tuple[Epoch, Largest]:
        """An epoch's tokens, and its largest micro-batch."""
        return _epoch(self.lengths, self.plan, self.max_length, self.seed)

    def step(self) -> Step:
        """The step of the largest micro-batch."""
        can_record = self.own_layers and not self.plan.packed
        return step_of(
            self.shape, self.lora, self.optimizer, self.checkpointing, self.precision, self.card,
            self.epoch()[1], self.answer_share, self.accumulate, can_record and self.cuda_graphs, self.samples(),
            self.loss_rows,
        )  # fmt: skip

    def samples(self) -> Samples:
        """The sample answers that are drawn at once."""
        return Samples(min(self.num_samples, PROMPTS_AT_ONCE), self.prompt_tokens, self.new_tokens)

    def moments(self) -> list[StepMemory]:
        """All moments that the run must have room for."""
        return memory.run_moments(self.step(), self.samples())

    def peak(self) -> StepMemory:
        """The highest of them."""
        return max(self.moments(), key=lambda moment: moment.reserved)

    def fits(self, share: float = 1.0) -> bool:
        """Whether the run stays within ``share`` of the card."""
        return self.peak().on_card <= share * self.card.memory_gib * GIB

    def hours(self) -> float | None:
        """Of an epoch, at the card's sustained rates."""
        return epoch_hours(self.step(), self.epoch()[0], self.card)


@lru_cache
def _epoch(lengths: tuple[int, ...], plan: BatchPlan, max_length: int, seed: int) -> tuple[Epoch, Largest]:
    cut = [min(length, max_length) for length in lengths]
    return epoch_of(cut, plan.epoch(cut, seed, 0), plan.packed)


Change = tuple[str, Settings]


def changes(settings: Settings) -> list[list[Change]]:
    """What could be changed, each from mild to strong: first what the result does not depend on, then what it does.

    Fewer target modules are not among them: a rank of 4 on all takes as little, and learns more.
    """
    return [kind(settings) for kind in _KINDS]


def _recomputation(settings: Settings) -> list[Change]:
    """``auto`` keeps what fits, so that it fits where ``full`` does."""
    auto = ("--model.checkpointing auto", replace(settings, checkpointing="auto"))
    return [auto] if settings.checkpointing == "none" else []


def _smaller_batches(settings: Settings) -> list[Change]:
    """Micro-batches of fewer rows or tokens, more of them to a step, which stays as large."""
    plan, found = settings.plan, []
    if plan.tokens:
        parts = range(2, math.ceil(plan.tokens / settings.max_length) + 1)
        smaller = [(part, replace(plan, tokens=max(plan.tokens // part, settings.max_length))) for part in parts]
    else:
        parts = range(2, plan.rows + 1)
        smaller = [(part, replace(plan, rows=plan.rows // part)) for part in parts if plan.rows % part == 0]
    for part, less in smaller:
        more = settings.accumulate * part
        words = f"--data.batch_tokens {less.tokens}" if plan.tokens else f"--data.batch_size {less.rows}"
        words += f" --trainer.accumulate_grad_batches {more}"
        found.append((words, replace(settings, plan=less, accumulate=more)))
    return found


def _fewer_samples(settings: Settings) -> list[Change]:
    return [
        (f"--samples.count {count}", replace(settings, num_samples=count))
        for count in (4, 2, 0)
        if count < settings.num_samples
    ]


def _smaller_optimizer(settings: Settings) -> list[Change]:
    return [
        (f"--model.optimizer {name}", replace(settings, optimizer=name))
        for name in ("adamw_8bit", "paged_adamw_8bit")
        if not settings.optimizer.endswith(name)
    ]


def _smaller_ranks(settings: Settings) -> list[Change]:
    return [
        (f"--model.rank {rank}", replace(settings, lora=replace(settings.lora, rank=rank)))
        for rank in RANKS
        if rank < settings.lora.rank
    ]


def _shorter_rows(settings: Settings) -> list[Change]:
    first = (settings.max_length - 1) // LENGTH_STEP * LENGTH_STEP
    return [
        (f"--data.max_length {length}", replace(settings, max_length=length))
        for length in range(first, SHORTEST - 1, -LENGTH_STEP)
    ]


_KINDS = (_recomputation, _smaller_batches, _fewer_samples, _smaller_optimizer, _smaller_ranks, _shorter_rows)


def smallest_change(settings: Settings) -> Change | None:
    """The least that makes it fit; None where nothing does.

    Of each kind from the dearest on, the mildest change that leaves it to the cheaper ones to make it fit.
    """
    words, changed = [], settings
    for number in reversed(range(len(_KINDS))):
        options = [("", changed), *_KINDS[number](changed)]
        least = bisect_left(options, True, key=lambda option: _as_far(option[1], number).fits())
        if least == len(options):
            return None
        words.append(options[least][0])
        changed = options[least][1]
    return " ".join(word for word in reversed(words) if word), changed


def _as_far(settings: Settings, num_kinds: int) -> Settings:
    """Changed as far as the cheapest kinds go."""
    for kind in reversed(_KINDS[:num_kinds]):
        options = kind(settings)
        settings = options[-1][1] if options else settings
    return settings


def quickest(settings: Settings) -> Change | None:
    """The quickest micro-batch and checkpointing that fit, the optimizer's step about as large as it is.

    None where the settings are within `GAIN` of it, or where no time can be predicted.
    """
    now = settings.hours() if settings.fits() else math.inf
    if now is None or now < MINUTE:
        return None
    epoch, _ = settings.epoch()
    step_tokens = epoch.padded_tokens / epoch.num_micro_batches * settings.accumulate
    modes: Sequence[str] = [mode for mode in ("none", "auto", "full") if mode in get_args(Checkpointing)]
    best: Change | None = None
    for budget in (None, *(budget for budget in BUDGETS if budget >= settings.max_length)):
        candidate = settings if budget is None else replace(settings, plan=replace(settings.plan, tokens=budget))
        mean = candidate.epoch()[0].padded_tokens / candidate.epoch()[0].num_micro_batches
        more = max(1, round(step_tokens / mean))
        if budget is not None and not 0.7 < mean * more / step_tokens < 1.4:
            continue
        for mode in modes:
            chosen = replace(candidate, checkpointing=mode, accumulate=more)
            hours = chosen.hours() if chosen.fits(1 - memory.RESERVE) else None
            if hours is not None and hours < now * (1 - GAIN):
                now, best = hours / (1 - GAIN), (_words(settings, chosen), chosen)
    return best


def _words(settings: Settings, chosen: Settings) -> str:
    words = []
    if chosen.plan != settings.plan:
        words.append(f"--data.batch_tokens {chosen.plan.tokens}")
    if chosen.accumulate != settings.accumulate:
        words.append(f"--trainer.accumulate_grad_batches {chosen.accumulate}")
    if chosen.checkpointing != settings.checkpointing:
        words.append(f"--model.checkpointing {chosen.checkpointing}")
    return " ".join(words)
