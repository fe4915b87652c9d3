"""Owns the search for settings that fit a card: the smallest change of a forecast that fits, and the fastest one.

Knows forecasts and the names of options; no files and no model.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from lit_qlora.data.batching import BatchPlan
from lit_qlora.forecast import memory
from lit_qlora.forecast.foresee import Forecast
from lit_qlora.forecast.memory import NO_SAMPLES
from lit_qlora.forecast.speed import HOST_S_PER_LAYER
from lit_qlora.model.optimizer import OPTIMIZERS

BUDGETS = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
SHORTEST, LENGTH_STEP = 256, 64
"""Smallest max_length to suggest: below, a conversation loses its answers."""
LORA_RANKS = (128, 96, 64, 48, 32, 24, 16, 8, 4)
MINUTE = 1 / 60
"""Shortest epoch, in hours, that is worth a change."""
GAIN = 0.03
"""Smallest share of time saved that is worth a change; less is within the forecast's error."""


class Change(NamedTuple):
    """Other ``options``, as given on the command line, and the ``forecast`` with them."""

    options: str
    forecast: Forecast


OPTIONS: dict[str, Callable[[Forecast, Forecast], str]] = {
    "cuda_graphs": lambda was, now: "--model.cuda_graphs false",
    "checkpointing": lambda was, now: f"--model.checkpointing {now.checkpointing}",
    "plan": lambda was, now: _of_plan(now.plan),
    "accumulate": lambda was, now: f"--trainer.accumulate_grad_batches {now.accumulate}",
    "shard": lambda was, now: "--model.shard true",
    "samples": lambda was, now: (
        f"{'--samples.prompts null ' if was.samples.are_own else ''}--samples.count {now.samples.num_prompts}"
    ),
    "optimizer": lambda was, now: f"--model.optimizer {now.optimizer}",
    "lora": lambda was, now: f"--model.rank {now.lora.rank}",
    "max_length": lambda was, now: f"--data.max_length {now.max_length}",
    "shard_to": lambda was, now: "--model.shard_to host",
}
"""Options for the command line where a field of a forecast changes, in the order of a message."""


def _changed_options(was: Forecast, now: Forecast) -> str:
    """The options that turn one forecast into another."""
    return " ".join(words(was, now) for name, words in OPTIONS.items() if getattr(was, name) != getattr(now, name))


def _of_plan(plan: BatchPlan) -> str:
    return f"--data.batch_tokens {plan.tokens}" if plan.tokens else f"--data.batch_size {plan.rows}"


def _smaller_plans(plan: BatchPlan, max_length: int) -> list[tuple[int, BatchPlan]]:
    """Micro-batches of fewer rows or tokens, with how many take the place of one: a step stays as large."""
    if plan.tokens:
        parts = range(2, math.ceil(plan.tokens / max_length) + 1)
        return [(part, replace(plan, tokens=max(plan.tokens // part, max_length))) for part in parts]
    return [(part, replace(plan, rows=plan.rows // part)) for part in range(2, plan.rows + 1) if plan.rows % part == 0]


def once_out_of_room(plan: BatchPlan, max_length: int, accumulate: int, rows: int) -> str:
    """Options with which a run may fit that did not with its micro-batches in halves: with quarters, or shorter rows.

    Args:
        plan: how rows are grouped.
        max_length: most tokens of a row.
        accumulate: micro-batches per optimizer step.
        rows: conversations of the micro-batch for which there was no room.

    Returns:
        Options as given on the command line.
    """
    smaller = _smaller_plans(plan, max_length) if rows > 1 else []
    if not smaller:
        return f"--data.max_length {max_length // 2}"
    parts = 4 if plan.tokens else 4 * plan.rows / rows
    part, less = next((one for one in smaller if one[0] >= parts), smaller[-1])
    return f"{_of_plan(less)} --trainer.accumulate_grad_batches {accumulate * part}"


# The ladder


def _recorded(forecast: Forecast) -> list[Forecast]:
    """A forecast without recorded kernels, wherever they could be recorded: what auto chooses depends on all else."""
    can_record = forecast.cuda_graphs and not (forecast.is_slow or forecast.plan.packed)
    return [replace(forecast, cuda_graphs=False)] if can_record else []


def _recomputation(forecast: Forecast) -> list[Forecast]:
    """A forecast with checkpointing auto, which keeps as much as fits, and so fits where full does."""
    return [replace(forecast, checkpointing="auto")] if forecast.checkpointing in ("none", "selective") else []


def _smaller_batches(forecast: Forecast) -> list[Forecast]:
    """Micro-batches of fewer rows or tokens, more of them per step."""
    smaller = _smaller_plans(forecast.plan, forecast.max_length)
    return [replace(forecast, plan=less, accumulate=forecast.accumulate * part) for part, less in smaller]


def _fewer_samples(forecast: Forecast) -> list[Forecast]:
    """Fewer sample answers; none of the user's own prompts, since a count is one of held-out prompts."""
    samples = forecast.samples
    if samples.are_own:
        return [replace(forecast, samples=NO_SAMPLES)]
    counts = [count for count in (4, 2, 0) if count < samples.num_prompts]
    return [replace(forecast, samples=replace(samples, num_prompts=count)) for count in counts]


def _smaller_optimizer(forecast: Forecast) -> list[Forecast]:
    return [replace(forecast, optimizer=name) for name in OPTIMIZERS[forecast.optimizer].smaller]


def _smaller_ranks(forecast: Forecast) -> list[Forecast]:
    """Lower ranks, unless an adapter to start from fixes the rank."""
    ranks = [rank for rank in LORA_RANKS if rank < forecast.lora.rank and not forecast.ranks]
    return [replace(forecast, lora=replace(forecast.lora, rank=rank)) for rank in ranks]


def _shorter_rows(forecast: Forecast) -> list[Forecast]:
    first = (forecast.max_length - 1) // LENGTH_STEP * LENGTH_STEP
    return [replace(forecast, max_length=length) for length in range(first, SHORTEST - 1, -LENGTH_STEP)]


def _shared(forecast: Forecast) -> list[Forecast]:
    """Shares on the cards: auto takes them by itself, where they alone make it fit."""
    can_share = forecast.num_devices > 1 and not (forecast.is_slow or forecast.is_shared)
    return [replace(forecast, shard=True)] if can_share else []


def _shared_on_host(forecast: Forecast) -> list[Forecast]:
    """The layers in the host's memory, for one card, too; the bus decides how long a step takes."""
    can_share = not (forecast.is_slow or forecast.shard_to == "host")
    return [replace(forecast, shard=True, shard_to="host")] if can_share else []


class Rung(NamedTuple):
    """A kind of change, a rung on the ladder of advice.

    Args:
        steps: the forecasts with each of its changes, smallest first, from a forecast without.
        always_less: True if a further step never takes more memory.
        is_long: True if there are many, each with a pass over an epoch's batches: the first that fits is found by
            bisection.
    """

    steps: Callable[[Forecast], list[Forecast]]
    always_less: bool = False
    is_long: bool = False


LADDER = (
    Rung(_shorter_rows, is_long=True),
    Rung(_smaller_ranks),
    Rung(_smaller_optimizer),
    Rung(_fewer_samples, always_less=True),
    Rung(_shared),
    Rung(_smaller_batches),
    Rung(_recomputation),
    Rung(_recorded, always_less=True),
)
"""The kinds of change, from the most expensive to those without effect on the result.

Fewer target modules are not among them: a rank of 4 on all takes as little memory, and learns more."""


def smallest_change(forecast: Forecast) -> Change | None:
    """The smallest change that makes ``forecast`` fit, if possible with `memory.RESERVE` left free; None if none does.

    The base's layers come from the host's memory only where nothing else makes it fit.
    """
    for changed in (forecast, *_shared_on_host(forecast)):
        found = _walk(changed, 1 - memory.RESERVE) or _walk(changed, 1.0)
        if found:
            return Change(_changed_options(forecast, found), found)
    return None


def _walk(forecast: Forecast, share: float) -> Forecast | None:
    """Take, from the most expensive kind of change down, the smallest step after which cheaper kinds can make it fit.

    Walked once: after each step taken, the cheaper kinds that follow can make it fit.
    """
    for number, rung in enumerate(LADDER):
        fits = partial(_can_fit, ladder=LADDER[number + 1 :], share=share)
        step = _first([forecast, *rung.steps(forecast)], fits, rung.is_long)
        if step is None:
            return None
        forecast = step
    return forecast


def _first(steps: list[Forecast], fits: Callable[[Forecast], bool], by_halves: bool) -> Forecast | None:
    """The first of ``steps`` that fits; None if none does."""
    if by_halves and not fits(steps[0]):
        least = bisect_left(steps, True, key=fits)
        return steps[least] if least < len(steps) else None
    return next(filter(fits, steps), None)


def _can_fit(forecast: Forecast, ladder: Sequence[Rung], share: float) -> bool:
    """True if the kinds of ``ladder``, each left out or taken to its last step, can make it fit.

    Each may be left out, since several micro-batches need a second set of gradients, and can take more memory than one.
    """
    if not ladder:
        return forecast.fits(share)
    rung, *rest = ladder
    ends = rung.steps(forecast)[-1:]
    if not (ends and rung.always_less):
        ends.append(forecast)
    return any(_can_fit(end, rest, share) for end in ends)


# The quickest


def quickest(forecast: Forecast) -> Change | None:
    """The fastest micro-batch and checkpointing that fit, with optimizer steps of about the same size.

    With kernels recorded, where they are, or not. None if the settings are within `GAIN` of it, or if no time is
    forecast, as for transformers' own layers.

    Args:
        forecast: of the settings as they are.
    """
    now = _seconds_per_token(forecast) if forecast.fits() else math.inf
    if forecast.is_slow or now is None or (forecast.hours or 0) < MINUTE:
        return None
    best: Change | None = None
    for chosen in _candidates(forecast):
        if chosen.fits(1 - memory.RESERVE):
            took = _seconds_per_token(chosen)
            if not chosen.cuda_graphs and forecast.cuda_graphs:  # without recordings, the card may wait for its host
                started = chosen.epoch.num_micro_batches * HOST_S_PER_LAYER * forecast.shape.num_layers
                took = max(took or 0, started / chosen.epoch.tokens)
            if took and took < now * (1 - GAIN):
                now, best = took / (1 - GAIN), Change(_changed_options(forecast, chosen), chosen)
    return best


def _seconds_per_token(forecast: Forecast) -> float | None:
    """Seconds per token: an epoch limited to a number of micro-batches has more tokens if they are larger."""
    return None if forecast.hours is None else forecast.hours * 3600 / forecast.epoch.tokens


def _candidates(forecast: Forecast) -> Iterable[Forecast]:
    step_tokens = forecast.epoch.padded_tokens / forecast.epoch.num_micro_batches * forecast.accumulate
    for budget in (None, *(budget for budget in BUDGETS if budget >= forecast.max_length)):
        candidate = forecast if budget is None else replace(forecast, plan=replace(forecast.plan, tokens=budget))
        mean = candidate.epoch.padded_tokens / candidate.epoch.num_micro_batches
        more = max(forecast.num_devices, round(step_tokens / mean))  # each has one at least
        if budget is None or 0.7 < mean * more / step_tokens < 1.4:
            for mode in ("none", "auto", "full"):
                chosen = replace(candidate, checkpointing=mode, accumulate=more)
                yield from (chosen, *_recorded(chosen))
