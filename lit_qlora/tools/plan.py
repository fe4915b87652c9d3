"""Owns the verb plan: what a fit would need of a card, of the host and of time, before anything is loaded.

Takes fit's own options, and needs neither GPU nor weights nor network. Knows how to say it; formulas are the model's.
"""

from collections.abc import Iterator

from lit_qlora.callbacks.outlook import PROMPTS_AT_ONCE, duration, kept_words, memory_line, memory_lines, unit_of
from lit_qlora.model import memory
from lit_qlora.model.memory import GIB
from lit_qlora.quiet import quieten
from lit_qlora.tools.fitting import Settings, quickest, smallest_change
from lit_qlora.tools.planned import Planned, read

REACHED = 0.7
"""The share of a roofline's speed that whole runs reach where little else was fused: an estimate."""
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
    settings, assumed = planned.settings, "" if planned.rows.known_by == "counted" else " (assumed)"
    peak, step, unit = settings.peak(), settings.step(), unit_of(settings.peak())
    yield from memory_lines(peak, settings.card)
    others = [f"{one.moment} {one.total / unit:.2f}" for one in settings.moments() if one.moment != peak.moment]
    yield f"  allocated at other moments: {', '.join(others)}"
    yield f"  {step.tokens:,} tokens in the largest micro-batch; {kept_words(step)}"
    if settings.num_samples:
        at_once = min(settings.num_samples, PROMPTS_AT_ONCE)
        words = f"{at_once} prompts of {settings.prompt_tokens} tokens"
        yield f"  sample answers: {words}{assumed}, {settings.new_tokens} new ones each"
    if settings.lora.dora:
        yield "  DoRA's own scratch is not in these figures"


def _host_lines(planned: Planned) -> Iterator[str]:
    settings, keep = planned.settings, planned.keep_checkpoints
    shape, lora = settings.shape, settings.lora
    trained = shape.num_lora(lora.rank, lora.target_modules)
    paged = memory.optimizer_bytes(settings.optimizer, settings.step().lora_tensors)[1]
    largest = 2 * max(shape.vocabulary * shape.hidden, *(i * o for i, o in shape.linears.values()))
    yield f"{'host and disk':<52}{'GiB':>8}"
    yield memory_line("host memory while loading: one weight, libraries", LIBRARIES + largest)
    if paged:
        yield memory_line("optimizer state that can be paged out to it", paged)
    yield memory_line("download of the base", planned.download) + ("" if planned.download else "  (it is here)")
    run = 2 * 4 * trained + 12 * trained * (keep + 1)
    yield memory_line(f"run folder, with {keep} checkpoints", run)


def _time_lines(planned: Planned) -> Iterator[str]:
    settings, rows = planned.settings, planned.rows
    precision = f"precision {settings.precision} ({planned.precision_reason})"
    epoch, _ = settings.epoch()
    padding = 1 - epoch.tokens / epoch.padded_tokens
    yield (
        f"an epoch: {len(rows.lengths):,} rows, {epoch.tokens:,} tokens ({rows.known_by}), {padding:.0%} padding, "
        f"{epoch.num_micro_batches:,} micro-batches"
    )
    hours = settings.hours()
    if hours is None:
        yield f"  no time predicted: the rates of a {settings.card.name} are not known; {precision}"
        return
    slow = hours / REACHED
    yield (
        f"  {_between(hours, slow)}: {epoch.tokens / hours / 3600:,.0f} to "
        f"{epoch.tokens / slow / 3600:,.0f} tokens/s, without validations; {precision}"
    )
    yield (
        f"  the first at {settings.card.tflops:g} TFLOP/s and {settings.card.gb_per_s:g} GB/s sustained with nothing "
        f"else in the way, the second at {REACHED:.0%} of that"
    )
    steps = -(-epoch.num_micro_batches // settings.accumulate)
    epochs = planned.max_epochs if planned.max_epochs != -1 else float("inf")
    if 0 < planned.max_steps < epochs * steps:
        epochs = planned.max_steps / steps
    if epochs not in (1, float("inf")):
        yield f"  the run, {epochs:.3g} epochs: {_between(epochs * hours, epochs * slow)}"


def _between(least: float, most: float) -> str:
    """A span of hours; one word where its ends look alike."""
    ends = duration(least), duration(most)
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _verdict_lines(settings: Settings) -> Iterator[str]:
    gib = settings.card.memory_gib
    need = settings.peak().on_card / GIB
    if settings.fits():
        faster = quickest(settings)
        if faster:
            words, chosen = faster
            yield f"quicker: {words}: {chosen.peak().on_card / GIB:.2f} GiB, {duration(chosen.hours() or 0)} an epoch"
        elif settings.hours() is not None:
            yield "micro-batch and checkpointing: as they are; nothing that fits is worth a change"
        surely = "fits" if settings.fits(1 - memory.RESERVE) else f"may fit, within {memory.RESERVE:.0%} of the card"
        yield f"{surely}: {need:.2f} of {gib:.2f} GiB"
        return
    change = smallest_change(settings)
    if change is None:
        yield f"does not fit: {need:.2f} of {gib:.2f} GiB, and no setting does; take a larger card or a smaller base"
        return
    words, changed = change
    yield f"does not fit: {need:.2f} of {gib:.2f} GiB; {changed.peak().on_card / GIB:.2f} with {words}"
