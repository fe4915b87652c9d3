"""Owns the verb plan: what a fit would need of a card, of the host and of time, before anything is loaded.

Takes fit's own options, and needs neither GPU nor weights nor network. Knows how to say it; formulas are the model's.
"""

from collections.abc import Iterator

from lit_qlora.forecast import memory, words
from lit_qlora.forecast.advice import Settings, quickest, smallest_change
from lit_qlora.forecast.memory import GIB
from lit_qlora.forecast.words import duration
from lit_qlora.quiet import quieten
from lit_qlora.tools.planned import Planned, read

LIBRARIES = 2 * GIB
"""Python, torch with CUDA and the rest on the host: 0.5 GiB was measured without CUDA; the rest is an estimate."""


def main(args: list[str]) -> int:
    """Prints the plan for ``args``, fit's options and a card from the verb on; returns the exit status.

    Raises UserError for options that fit would refuse, too.
    """
    quieten()
    try:
        planned = read(args[1:])
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    print("\n".join(lines(planned)))
    return 0


def lines(planned: Planned) -> Iterator[str]:
    """The plan; its last line is the verdict."""
    settings = planned.settings
    card = settings.card.name
    yield f"{planned.base.name} in 4-bit, card: {card}; all of this is predicted, and 1 GiB is 1024^3 bytes"
    parts = _memory_lines(planned), _host_lines(planned), _time_lines(planned), _verdict_lines(settings)
    for part in parts:
        yield ""
        yield from part


def _memory_lines(planned: Planned) -> Iterator[str]:
    settings, assumed = planned.settings, "" if planned.prompts.are_counted else " (assumed)"
    yield from words.memory_lines(settings.step(), settings.samples(), settings.moments(), settings.card, assumed)
    if settings.is_slow:
        yield words.SLOW


def _host_lines(planned: Planned) -> Iterator[str]:
    shape = planned.settings.shape
    largest = 2 * max(shape.vocabulary * shape.hidden, *(i * o for i, o in shape.linears.values()))
    before = [("host memory while loading: one weight, libraries", LIBRARIES + largest)]
    before.append(("download of the base" + ("" if planned.download else ": it is here"), planned.download))
    yield from words.host_lines(planned.settings.step(), planned.keep_checkpoints, before)


def _time_lines(planned: Planned) -> Iterator[str]:
    settings, rows = planned.settings, planned.rows
    precision = f"precision {settings.precision} ({planned.precision_reason})"
    epoch, _ = settings.epoch()
    padding = 1 - epoch.tokens / epoch.padded_tokens
    taken, known = settings.num_rows(), len(rows.lengths)
    number = f"{known:,}" if taken == known else f"{taken:,} of {known:,}"
    yield (
        f"an epoch: {number} rows, {epoch.tokens:,} tokens ({rows.known_by}), {padding:.0%} padding, "
        f"{epoch.num_micro_batches:,} micro-batches"
    )
    hours = settings.hours()
    if hours is None:
        yield f"  no time predicted: the rates of a {settings.card.name} are not known; {precision}"
        return
    yield from words.time_lines(settings.step(), epoch, settings.card, f"; {precision}")
    steps = -(-epoch.num_micro_batches // settings.accumulate)
    epochs = planned.max_epochs if planned.max_epochs != -1 else float("inf")
    if 0 < planned.max_steps < epochs * steps:
        epochs = planned.max_steps / steps
    if epochs not in (1, float("inf")):
        yield f"  the run, {epochs:.3g} epochs: {words.between(epochs * hours, epochs * hours / words.REACHED)}"


def _verdict_lines(settings: Settings) -> Iterator[str]:
    gib = settings.card.memory_gib
    own = "may fit, what transformers' own layers take beside not counted"
    need = settings.peak().on_card / GIB
    tight = f"may fit, within {memory.RESERVE:.0%} of the card"
    if settings.fits():
        faster = quickest(settings)
        if faster:
            words, chosen = faster
            yield f"quicker: {words}: {chosen.peak().on_card / GIB:.2f} GiB, {duration(chosen.hours() or 0)} an epoch"
        elif settings.hours() is not None and not settings.is_slow:
            yield "micro-batch and checkpointing: as they are; nothing that fits is worth a change"
        surely = "fits" if settings.fits(1 - memory.RESERVE) else tight
        if settings.is_slow:
            surely = own
        yield f"{surely}: {need:.2f} of {gib:.2f} GiB"
        return
    change = smallest_change(settings)
    if change is None:
        yield f"does not fit: {need:.2f} of {gib:.2f} GiB, and no setting does; take a larger card or a smaller base"
        return
    words, changed = change
    surely = f"{own}: " if settings.is_slow else "" if changed.fits(1 - memory.RESERVE) else f"{tight}: "
    yield f"does not fit: {need:.2f} of {gib:.2f} GiB; {surely}{changed.peak().on_card / GIB:.2f} with {words}"
