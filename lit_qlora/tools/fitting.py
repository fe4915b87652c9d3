"""Owns the search for settings that fit a card: what a set of them needs, the smallest change that fits, the quickest.

Knows formulas, lengths of rows and the names of options; no files and no model.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import get_args

from lit_qlora.callbacks.outlook import PROMPTS_AT_ONCE, epoch_of, step_of
from lit_qlora.data.batching import BatchPlan
from lit_qlora.model import memory
from lit_qlora.model.cards import Card
from lit_qlora.model.checkpointing import Checkpointing
from lit_qlora.model.load import Lora
from lit_qlora.model.memory import GIB, Step, StepMemory
from lit_qlora.model.shape import Shape
from lit_qlora.model.speed import Epoch, epoch_hours

BUDGETS = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
LENGTHS = (1536, 1024, 768, 512, 384, 256)
RANKS = (64, 32, 16, 8, 4)
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

    def epoch(self) -> tuple[Epoch, int]:
        """An epoch's tokens, and those of its largest micro-batch."""
        return _epoch(self.lengths, self.plan, self.max_length, self.seed)

    def step(self) -> Step:
        """The step of the largest micro-batch."""
        return step_of(
            self.shape, self.lora, self.optimizer, self.checkpointing, self.precision, self.card,
            self.epoch()[1], self.answer_share, self.accumulate,
        )  # fmt: skip

    def moments(self) -> list[StepMemory]:
        """All moments that the run must have room for."""
        step = self.step()
        moments = memory.moments(step)
        if self.num_samples:
            at_once = min(self.num_samples, PROMPTS_AT_ONCE)
            moments.append(memory.sampling_memory(step, at_once, self.prompt_tokens, self.new_tokens))
        return moments

    def peak(self) -> StepMemory:
        """The highest of them."""
        return max(self.moments(), key=lambda moment: moment.total)

    def fits(self, share: float = 1.0) -> bool:
        """Whether the run stays within ``share`` of the card."""
        return self.peak().on_card <= share * self.card.memory_gib * GIB

    def hours(self) -> float | None:
        """Of an epoch, at the card's sustained rates."""
        return epoch_hours(self.step(), self.epoch()[0], self.card)


@lru_cache
def _epoch(lengths: tuple[int, ...], plan: BatchPlan, max_length: int, seed: int) -> tuple[Epoch, int]:
    cut = [min(length, max_length) for length in lengths]
    return epoch_of(cut, plan.epoch(cut, seed, 0), plan.packed)


Change = tuple[str, Settings]


def changes(settings: Settings) -> list[list[Change]]:
    """What could be changed, from what costs least to what changes the result; each from mild to strong."""
    return [
        [
            (f"--model.checkpointing {mode}", replace(settings, checkpointing=mode))
            for mode in ("auto", "full")
            if mode in get_args(Checkpointing) and mode != settings.checkpointing != "full"
        ],
        [*_smaller_batches(settings)],
        [
            (f"--samples.count {count}", replace(settings, num_samples=count))
            for count in (4, 2, 0)
            if count < settings.num_samples
        ],
        [
            (f"--model.optimizer {name}", replace(settings, optimizer=name))
            for name in ("adamw_8bit", "paged_adamw_8bit")
            if not settings.optimizer.endswith(name)
        ],
        [
            (f"--data.max_length {length}", replace(settings, max_length=length))
            for length in LENGTHS
            if length < settings.max_length
        ],
        [
            (f"--model.rank {rank}", replace(settings, lora=replace(settings.lora, rank=rank)))
            for rank in RANKS
            if rank < settings.lora.rank
        ],
    ]


def _smaller_batches(settings: Settings) -> Iterator[Change]:
    """Micro-batches of fewer rows or tokens, more of them to a step."""
    plan = settings.plan
    if plan.tokens:
        for tokens in sorted({*BUDGETS, settings.max_length}, reverse=True):
            if settings.max_length <= tokens < plan.tokens:
                more = settings.accumulate * math.ceil(plan.tokens / tokens)
                words = f"--data.batch_tokens {tokens} --trainer.accumulate_grad_batches {more}"
                yield words, replace(settings, plan=replace(plan, tokens=tokens), accumulate=more)
        return
    for rows in range(plan.rows // 2, 0, -1):
        if plan.rows % rows == 0:
            more = settings.accumulate * (plan.rows // rows)
            words = f"--data.batch_size {rows} --trainer.accumulate_grad_batches {more}"
            yield words, replace(settings, plan=replace(plan, rows=rows), accumulate=more)


def smallest_change(settings: Settings) -> Change | None:
    """The fewest options that make it fit, the mildest of them first; None where nothing does.

    Of several, all but the last are changed as far as they go.
    """
    num_kinds = len(changes(settings))
    for count in range(1, num_kinds + 1):
        for kinds in combinations(range(num_kinds), count):
            words, changed = [], settings
            for kind in kinds[:-1]:
                for last_words, last in changes(changed)[kind][-1:]:
                    words.append(last_words)
                    changed = last
            for last_words, last in changes(changed)[kinds[-1]]:
                if last.fits() and len(words) == count - 1:
                    return " ".join([*words, last_words]), last
    return None


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
