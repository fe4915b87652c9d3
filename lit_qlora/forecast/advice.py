"""Owns the search for settings that fit a card: the smallest change of a forecast that fits, and the fastest one.

Knows forecasts and the names of options; no files and no model.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lit_qlora.forecast import memory
from lit_qlora.forecast.foresee import Forecast
from lit_qlora.forecast.memory import NO_SAMPLES
from lit_qlora.forecast.speed import HOST_S_PER_LAYER
from lit_qlora.model.optimizer import OPTIMIZERS

BUDGETS = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
SHORTEST, LENGTH_STEP = 256, 64
"""Smallest max_length to suggest: below, a conversation loses its answers."""
RANKS = (128, 96, 64, 48, 32, 24, 16, 8, 4)
MINUTE = 1 / 60
"""Shortest epoch, in hours, that is worth a change."""
GAIN = 0.03
"""Smallest share of time saved that is worth a change; less is within the forecast's error."""


class Change(NamedTuple):
    """Options as given on the command line, and the forecast with them."""

    options: str
    forecast: Forecast


# The ladder


def _recorded(forecast: Forecast) -> list[Change]:
    """What auto comes to depends on all else, so that it is changed wherever kernels could be recorded."""
    can_record = forecast.cuda_graphs and not (forecast.is_slow or forecast.plan.packed)
    return [Change("--model.cuda_graphs false", replace(forecast, cuda_graphs=False))] if can_record else []


def _recomputation(forecast: Forecast) -> list[Change]:
    """``auto`` keeps as much as fits, so it fits where ``full`` does."""
    auto = Change("--model.checkpointing auto", replace(forecast, checkpointing="auto"))
    return [auto] if forecast.checkpointing in ("none", "selective") else []


def _smaller_batches(forecast: Forecast) -> list[Change]:
    """Micro-batches of fewer rows or tokens, more of them per step, which stays as large."""
    plan, found = forecast.plan, []
    if plan.tokens:
        parts = range(2, math.ceil(plan.tokens / forecast.max_length) + 1)
        smaller = [(part, replace(plan, tokens=max(plan.tokens // part, forecast.max_length))) for part in parts]
    else:
        parts = range(2, plan.rows + 1)
        smaller = [(part, replace(plan, rows=plan.rows // part)) for part in parts if plan.rows % part == 0]
    for part, less in smaller:
        more = forecast.accumulate * part
        words = f"--data.batch_tokens {less.tokens}" if plan.tokens else f"--data.batch_size {less.rows}"
        words += f" --trainer.accumulate_grad_batches {more}"
        found.append(Change(words, replace(forecast, plan=less, accumulate=more)))
    return found


def _fewer_samples(forecast: Forecast) -> list[Change]:
    """For the user's own prompts none or all, since a count is one of held-out prompts."""
    samples = forecast.samples
    if samples.are_own:
        return [Change("--samples.prompts null --samples.count 0", replace(forecast, samples=NO_SAMPLES))]
    counts = [count for count in (4, 2, 0) if count < samples.num_prompts]
    return [
        Change(f"--samples.count {count}", replace(forecast, samples=replace(samples, num_prompts=count)))
        for count in counts
    ]


def _smaller_optimizer(forecast: Forecast) -> list[Change]:
    names = OPTIMIZERS[forecast.optimizer].smaller
    return [Change(f"--model.optimizer {name}", replace(forecast, optimizer=name)) for name in names]


def _smaller_ranks(forecast: Forecast) -> list[Change]:
    """Lower ranks, unless an adapter to start from fixes the rank."""
    ranks = [rank for rank in RANKS if rank < forecast.lora.rank and not forecast.ranks]
    return [Change(f"--model.rank {rank}", replace(forecast, lora=replace(forecast.lora, rank=rank))) for rank in ranks]


def _shorter_rows(forecast: Forecast) -> list[Change]:
    first = (forecast.max_length - 1) // LENGTH_STEP * LENGTH_STEP
    return [
        Change(f"--data.max_length {length}", replace(forecast, max_length=length))
        for length in range(first, SHORTEST - 1, -LENGTH_STEP)
    ]


def _shared(forecast: Forecast) -> list[Change]:
    """Shares on the cards: auto takes them by itself, where they alone make it fit."""
    can_share = forecast.num_devices > 1 and not (forecast.is_slow or forecast.is_shared)
    return [Change("--model.shard true", replace(forecast, shard=True))] if can_share else []


def _shared_on_host(forecast: Forecast) -> list[Change]:
    """The layers in the host's memory, for one card, too; the bus decides how long a step takes."""
    if forecast.is_slow or forecast.shard_to == "host":
        return []
    return [Change("--model.shard true --model.shard_to host", replace(forecast, shard=True, shard_to="host"))]


class Rung(NamedTuple):
    """A kind of change, with its steps from smallest to largest.

    ``always_less``: a further step never takes more memory. ``is_long``: there are many steps, each of which needs a
    pass over an epoch's batches, so the first that fits is found by bisection.
    """

    steps: Callable[[Forecast], list[Change]]
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
    """The smallest change that makes it fit, with `memory.RESERVE` left free if possible; None if nothing does.

    The base's layers come from the host's memory only where nothing else makes it fit.
    """
    for options, changed in (Change("", forecast), *_shared_on_host(forecast)):
        found = _walk(changed, 1 - memory.RESERVE) or _walk(changed, 1.0)
        if found:
            return Change(" ".join(filter(None, (found.options, options))), found.forecast)
    return None


def _walk(forecast: Forecast, share: float) -> Change | None:
    """From the most expensive kind of change down: the smallest step after which cheaper kinds can still make it fit.

    Walked once: after each step taken, the cheaper kinds that follow can make it fit.
    """
    taken: list[str] = []
    for number, rung in enumerate(LADDER):
        cheaper = LADDER[number + 1 :]
        steps = [Change("", forecast), *rung.steps(forecast)]
        step = _first(steps, lambda one, cheaper=cheaper: _can_fit(one, cheaper, share), rung.is_long)  # type: ignore[misc]
        if step is None:
            return None
        taken.insert(0, step.options)
        forecast = step.forecast
    return Change(" ".join(filter(None, taken)), forecast)


def _first(steps: list[Change], fits: Callable[[Forecast], bool], by_halves: bool) -> Change | None:
    """The first of ``steps`` that fits; None if none does."""
    if by_halves and not fits(steps[0].forecast):
        least = bisect_left(steps, True, key=lambda step: fits(step.forecast))
        return steps[least] if least < len(steps) else None
    return next((step for step in steps if fits(step.forecast)), None)


def _can_fit(forecast: Forecast, ladder: Sequence[Rung], share: float) -> bool:
    """True if the kinds of ``ladder``, each left out or taken to its last step, can make it fit.

    Left out, too: several micro-batches need a second set of gradients, and can take more memory than one.
    """
    if not ladder:
        return forecast.fits(share)
    rung, *rest = ladder
    ends = [step.forecast for step in rung.steps(forecast)[-1:]]
    if not (ends and rung.always_less):
        ends.append(forecast)
    return any(_can_fit(end, rest, share) for end in ends)


# The quickest


def quickest(forecast: Forecast) -> Change | None:
    """The fastest micro-batch and checkpointing that fit, with optimizer steps of about the same size.

    With kernels recorded, where they are, or not. None if the settings of ``forecast`` are within `GAIN` of it, or if
    no time is forecast, as for transformers' own layers.
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
                now, best = took / (1 - GAIN), Change(_options(forecast, chosen), chosen)
    return best


def _seconds_per_token(forecast: Forecast) -> float | None:
    """Compared per token, since an epoch limited to a number of micro-batches has more tokens if they are larger."""
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
                yield from (chosen, *(changed for _, changed in _recorded(chosen)))


def _options(forecast: Forecast, chosen: Forecast) -> str:
    options = []
    if chosen.plan != forecast.plan:
        options.append(f"--data.batch_tokens {chosen.plan.tokens}")
    if chosen.accumulate != forecast.accumulate:
        options.append(f"--trainer.accumulate_grad_batches {chosen.accumulate}")
    if chosen.checkpointing != forecast.checkpointing:
        options.append(f"--model.checkpointing {chosen.checkpointing}")
    if chosen.cuda_graphs != forecast.cuda_graphs:
        options.append("--model.cuda_graphs false")
    return " ".join(options)
