"""Owns the search for settings that fit a card: what a set of them needs, the smallest change that fits, the quickest.

Knows formulas, lengths of rows and the names of options; no files and no model.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from lit_qlora.data.batching import BatchPlan, ResumableLoader
from lit_qlora.forecast import memory
from lit_qlora.forecast.cards import Card
from lit_qlora.forecast.foresee import Largest, epoch_of, step_of
from lit_qlora.forecast.memory import GIB, Samples, Step, StepMemory
from lit_qlora.forecast.speed import HOST_S_A_LAYER, Epoch, epoch_hours
from lit_qlora.model.generate import PROMPTS_AT_ONCE
from lit_qlora.model.load import Lora
from lit_qlora.model.shape import Shape

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
    limit: int | float = 1.0
    """Micro-batches of an epoch, or a share of them."""

    @property
    def is_slow(self) -> bool:
        """Whether the layers are transformers' own, which take more than the formulas say."""
        return self.lora.dora or not self.own_layers

    def epoch(self) -> tuple[Epoch, Largest]:
        """An epoch's tokens, and its largest micro-batch."""
        return _epoch(self.lengths, self.plan, self.max_length, self.seed, self.limit)[:2]

    def num_rows(self) -> int:
        """Rows of an epoch."""
        return _epoch(self.lengths, self.plan, self.max_length, self.seed, self.limit)[2]

    def step(self) -> Step:
        """The step of the largest micro-batch."""
        return step_of(
            self.shape, self.lora, self.optimizer, self.checkpointing, self.precision, self.card,
            self.epoch()[1], self.answer_share, self.accumulate, not self.plan.packed and self.cuda_graphs,
            self.samples(), self.loss_rows, self.is_slow,
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


@lru_cache(typed=True)  # for a limit of 1 micro-batch is none of 1.0, all of them
def _epoch(
    lengths: tuple[int, ...], plan: BatchPlan, max_length: int, seed: int, limit: int | float
) -> tuple[Epoch, Largest, int]:
    cut = [min(length, max_length) for length in lengths]
    batches = plan.epoch(cut, seed, 0)
    batches = batches[: max(1, ResumableLoader(None, (), lambda _: batches, limit=limit).length)]
    taken = [cut[row] for rows in batches for row in rows]
    numbers = iter(range(len(taken)))
    epoch, largest = epoch_of(taken, [[next(numbers) for _ in rows] for rows in batches], plan.packed)
    return epoch, largest, len(taken)


Change = tuple[str, Settings]


def changes(settings: Settings) -> list[list[Change]]:
    """What could be changed, each from mild to strong: first what the result does not depend on, then what it does.

    Fewer target modules are not among them: a rank of 4 on all takes as little, and learns more.
    """
    return [kind(settings) for kind, _ in _KINDS]


def _unrecorded(settings: Settings) -> list[Change]:
    """What auto comes to hangs on all else, so that it is changed wherever kernels could be recorded."""
    can_record = settings.cuda_graphs and not (settings.is_slow or settings.plan.packed)
    return [("--model.cuda_graphs false", replace(settings, cuda_graphs=False))] if can_record else []


def _recomputation(settings: Settings) -> list[Change]:
    """``auto`` keeps what fits, so that it fits where ``full`` does."""
    auto = ("--model.checkpointing auto", replace(settings, checkpointing="auto"))
    return [auto] if settings.checkpointing in ("none", "selective") else []


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
    """Of a paged one in 32 bits, not the one in 8 bits that stays on the card: it takes more there."""
    smaller = {
        "adamw": ("adamw_8bit", "paged_adamw_8bit"),
        "adamw_8bit": ("paged_adamw_8bit",),
        "paged_adamw": ("paged_adamw_8bit",),
    }
    return [
        (f"--model.optimizer {name}", replace(settings, optimizer=name)) for name in smaller.get(settings.optimizer, ())
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


_KINDS: tuple[tuple[Callable[[Settings], list[Change]], tuple[str, ...]], ...] = (
    (_unrecorded, ("cuda_graphs",)),
    (_recomputation, ("checkpointing",)),
    (_smaller_batches, ("plan", "accumulate")),
    (_fewer_samples, ("num_samples",)),
    (_smaller_optimizer, ("optimizer",)),
    (_smaller_ranks, ("lora",)),
    (_shorter_rows, ("max_length",)),
)
"""The kinds, cheapest first, and the fields that each of them changes."""
_NEVER_MORE = (_unrecorded, _fewer_samples)
"""Of the others, going further may take more memory, too: several micro-batches have a second set of gradients."""


def smallest_change(settings: Settings) -> Change | None:
    """The least that makes it fit, with `memory.RESERVE` left free if that can be; None where nothing does."""
    for share in (1 - memory.RESERVE, 1.0):
        found = _smallest(settings, share)
        if found:
            return found
    return None


def _smallest(settings: Settings, share: float) -> Change | None:
    """Of each kind from the dearest on, the mildest change that leaves it to the cheaper ones to make it fit.

    Then each as mild as the others allow: more of one kind is not always less memory.
    """
    words, changed = [""] * len(_KINDS), settings
    for number in reversed(range(len(_KINDS))):
        options = [("", changed), *_KINDS[number][0](changed)]
        least = _mildest(options, lambda option, number=number: _can_fit(option, number, share))  # type: ignore[misc]
        if least is None:
            return None
        words[number], changed = least
    before = None
    while words != before:
        before = [*words]
        for number, (kind, fields) in reversed([*enumerate(_KINDS)]):
            back = replace(changed, **{name: getattr(settings, name) for name in fields})
            options = [("", back), *kind(back)]
            least = _mildest(options, lambda option: _is_allowed(option) and option.fits(share))
            words[number], changed = least or (words[number], changed)
    return " ".join(filter(None, words)), changed


def _mildest(options: list[Change], fits: Callable[[Settings], bool]) -> Change | None:
    """The first of ``options`` that fits; of many lengths, each of which takes an epoch's batches, by halves."""
    if options[-1][0].startswith("--data.max_length") and not fits(options[0][1]):
        least = bisect_left(options, True, key=lambda option: fits(option[1]))
        return options[least] if least < len(options) else None
    return next((option for option in options if fits(option[1])), None)


def _is_allowed(settings: Settings) -> bool:
    return not settings.plan.tokens or settings.plan.tokens >= settings.max_length


def _can_fit(settings: Settings, num_kinds: int, share: float) -> bool:
    """Whether some of the cheapest kinds, each as far as it goes, make it fit."""
    if num_kinds == 0:
        return settings.fits(share)
    options = _KINDS[num_kinds - 1][0](settings)
    ends = [options[-1][1], settings] if options else [settings]
    if options and _KINDS[num_kinds - 1][0] in _NEVER_MORE:
        ends = ends[:1]
    return any(_can_fit(end, num_kinds - 1, share) for end in ends)


def quickest(settings: Settings) -> Change | None:
    """The quickest micro-batch and checkpointing that fit, the optimizer's step about as large as it is.

    With kernels recorded, where they are, or not. None where the settings are within `GAIN` of it, or where no time
    can be predicted: for transformers' own layers, too.
    """
    now = _seconds_a_token(settings) if settings.fits() else math.inf
    if settings.is_slow or now is None or (settings.hours() or 0) < MINUTE:
        return None
    best: Change | None = None
    for chosen in _candidates(settings):
        if chosen.fits(1 - memory.RESERVE):
            took = _seconds_a_token(chosen)
            if not chosen.cuda_graphs and settings.cuda_graphs:  # then the card may wait for its host
                epoch, _ = chosen.epoch()
                started = epoch.num_micro_batches * HOST_S_A_LAYER * settings.shape.num_layers
                took = max(took or 0, started / epoch.tokens)
            if took and took < now * (1 - GAIN):
                now, best = took / (1 - GAIN), (_words(settings, chosen), chosen)
    return best


def _seconds_a_token(settings: Settings) -> float | None:
    """For an epoch of a number of micro-batches has more tokens where those are larger."""
    hours = settings.hours()
    return None if hours is None else hours * 3600 / settings.epoch()[0].tokens


def _candidates(settings: Settings) -> Iterable[Settings]:
    epoch, _ = settings.epoch()
    step_tokens = epoch.padded_tokens / epoch.num_micro_batches * settings.accumulate
    for budget in (None, *(budget for budget in BUDGETS if budget >= settings.max_length)):
        candidate = settings if budget is None else replace(settings, plan=replace(settings.plan, tokens=budget))
        mean = candidate.epoch()[0].padded_tokens / candidate.epoch()[0].num_micro_batches
        more = max(1, round(step_tokens / mean))
        if budget is None or 0.7 < mean * more / step_tokens < 1.4:
            for mode in ("none", "auto", "full"):
                chosen = replace(candidate, checkpointing=mode, accumulate=more)
                yield from (chosen, *(changed for _, changed in _unrecorded(chosen)))


def _words(settings: Settings, chosen: Settings) -> str:
    words = []
    if chosen.plan != settings.plan:
        words.append(f"--data.batch_tokens {chosen.plan.tokens}")
    if chosen.accumulate != settings.accumulate:
        words.append(f"--trainer.accumulate_grad_batches {chosen.accumulate}")
    if chosen.checkpointing != settings.checkpointing:
        words.append(f"--model.checkpointing {chosen.checkpointing}")
    if chosen.cuda_graphs != settings.cuda_graphs:
        words.append("--model.cuda_graphs false")
    return " ".join(words)
