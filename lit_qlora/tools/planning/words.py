"""Owns the words of a plan: what a fit needs of the card, of the host and of time, and the verdict.

Knows a forecast and the download still needed; nothing of options.
"""

from collections.abc import Iterator
from typing import NamedTuple

from lit_qlora.data.batching import epoch_steps, run_steps
from lit_qlora.forecast import words
from lit_qlora.forecast.advice import quickest, smallest_change
from lit_qlora.forecast.foresee import Forecast
from lit_qlora.forecast.host import loading_bytes
from lit_qlora.forecast.memory import RESERVE
from lit_qlora.model.base import Base
from lit_qlora.wording import duration, number_of, of_number

MAY_FIT = "may fit, what transformers' own layers take beside not counted"
TIGHT = f"may fit, within {RESERVE:.0%} of the card"


class Plan(NamedTuple):
    """The contents of a report on a fit.

    Args:
        base: base to train.
        forecast: of its memory and time.
        precision_reason: why the forecast's precision was chosen.
        download: bytes of the base still to download.
        max_epochs: epochs after which the run ends; -1 for no limit.
        max_steps: optimizer steps after which it ends; -1 for no limit.
        is_assumed: True if nothing says which card is meant, and there is none here.
    """

    base: Base
    forecast: Forecast
    precision_reason: str
    download: int
    max_epochs: int
    max_steps: int
    is_assumed: bool


class Verdict(NamedTuple):
    """The verdict on a fit: ``fits`` is True if the settings fit or may fit, ``words`` say it in a line."""

    fits: bool
    words: str


def plan_lines(plan: Plan) -> Iterator[str]:
    """The lines that report a plan.

    Args:
        plan: contents of the report.

    Yields:
        Lines; the last is the verdict.
    """
    forecast = plan.forecast
    card = forecast.card.name
    assumed = ", assumed: give --gpu NAME for another" if plan.is_assumed else ""
    yield f"{plan.base.name} in 4-bit, card: {card}{assumed}; all of this is a forecast, and 1 GiB is 1024^3 bytes"
    for part in (words.memory_lines(forecast), _host_lines(plan), _time_lines(plan), _verdict_lines(forecast)):
        yield ""
        yield from part


def verdict(forecast: Forecast) -> Verdict:
    """The verdict: it fits, or else the smallest change with which it does.

    Args:
        forecast: of the settings as they are.
    """
    of = f"{forecast.needed_gib:.2f} of {forecast.card.memory_gib:.2f} GiB"
    if forecast.fits():
        return Verdict(True, f"{_surely(forecast) or 'fits'}: {of}")
    change = smallest_change(forecast)
    if change is None:
        return Verdict(False, f"does not fit: {of}, and no setting does; take a larger card or a smaller base")
    surely = _surely(change.forecast)
    changed = f"{change.forecast.needed_gib:.2f} with {change.options}"
    return Verdict(False, f"does not fit: {of}; {f'{surely}: ' if surely else ''}{changed}")


def _surely(forecast: Forecast) -> str | None:
    """The reason why it only may fit; None if it does."""
    if forecast.is_slow:
        return MAY_FIT
    return None if forecast.fits(1 - RESERVE) else TIGHT


def _host_lines(plan: Plan) -> Iterator[str]:
    before = [
        ("host memory while loading: one weight, libraries", loading_bytes(plan.forecast.shape)),
        ("download of the base" + ("" if plan.download else ": it is here"), plan.download),
    ]
    yield from words.host_lines(plan.forecast, before)


def _time_lines(plan: Plan) -> Iterator[str]:
    forecast, epoch = plan.forecast, plan.forecast.epoch
    precision = f"precision {forecast.precision} ({plan.precision_reason})"
    padding = 1 - epoch.tokens / epoch.padded_tokens
    taken, known = forecast.batches.num_rows, len(forecast.rows.lengths)
    known_by = forecast.rows.known_by or "counted"
    number = f"{known:,}" if taken == known else f"{taken:,} of {known:,}"
    yield (
        f"an epoch: {number} {of_number(known, 'rows')}, {number_of(epoch.tokens, 'tokens')} ({known_by}), "
        f"{padding:.0%} padding, {number_of(epoch.num_micro_batches, 'micro-batches')}"
    )
    hours = forecast.hours
    if hours is None:
        yield f"  no forecast of the time: the rates of a {forecast.card.name} are not known; {precision}"
        return
    yield from words.time_lines(forecast, f"; {precision}")
    steps = epoch_steps(epoch.num_micro_batches, forecast.accumulate)
    epochs = run_steps(steps, plan.max_epochs, plan.max_steps) / steps
    if epochs != 1:
        seconds = 3600 * epochs * hours
        yield f"  the run, {epochs:.3g} epochs: {duration(seconds, seconds / words.REACHED)}"


def _verdict_lines(forecast: Forecast) -> Iterator[str]:
    found = verdict(forecast)
    if found.fits:
        faster = quickest(forecast)
        if faster:
            took = duration(3600 * (faster.forecast.hours or 0))
            yield f"quicker: {faster.options}: {faster.forecast.needed_gib:.2f} GiB, {took} per epoch"
        elif forecast.hours is not None and not forecast.is_slow:
            yield "micro-batch and checkpointing: as they are; nothing that fits is worth a change"
    yield found.words
