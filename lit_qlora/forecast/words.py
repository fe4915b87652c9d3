"""Owns the words of a forecast: tables of memory, host and disk, and the time.

Knows neither where the forecast comes from nor where the words go.
"""

import math
from collections.abc import Iterator, Sequence

from lit_qlora.forecast import memory
from lit_qlora.forecast.foresee import Forecast
from lit_qlora.forecast.host import run_folder_bytes
from lit_qlora.forecast.memory import Step
from lit_qlora.model.optimizer import OPTIMIZERS
from lit_qlora.place import COMMAND
from lit_qlora.storage.files import GIB
from lit_qlora.wording import duration, number_of

REACHED = 0.7
"""The share of a roofline's speed that whole runs reach with few other fused kernels: an estimate."""


def forecast_lines(forecast: Forecast) -> Iterator[str]:
    """The lines of a ``forecast`` that a fit prints first: memory against the card, part by part, the host and the
    time.
    """
    card, peak, gib = forecast.card, forecast.peak, forecast.needed_gib
    share = gib / card.memory_gib
    verdict = "may fit" if forecast.is_slow else "fits"
    if share > 1:
        verdict = f"does not fit: {COMMAND} plan shows what would"
    yield (
        f"forecast for {card.name}: {gib:.2f} of {card.memory_gib:.2f} GiB ({share:.0%}), of which "
        f"torch reserves {peak.reserved / GIB:.2f}; {verdict}"
    )
    yield from memory_lines(forecast)
    yield from host_lines(forecast)
    yield from time_lines(forecast)


def memory_lines(forecast: Forecast) -> Iterator[str]:
    """A table of the moment of a ``forecast`` with the most memory, part by part; its causes, and the other moments."""
    step, peak, card, samples = forecast.step, forecast.peak, forecast.card, forecast.samples_at_once
    unit = GIB if peak.total >= GIB else 1024**2
    yield f"{f'memory at its highest: {peak.moment}':<52}{'GiB' if unit == GIB else 'MiB':>8}"
    share = peak.on_card / GIB / card.memory_gib
    rows = [
        *((words, getattr(peak, part)) for part, words in memory.MEMORY_PARTS.items()),
        ("allocated (torch.cuda.max_memory_allocated)", peak.total),
        ("held beside: recorded kernels have their own pool", peak.apart),
        (f"fragmentation, {memory.FRAGMENTATION:.0%}", peak.reserved - peak.total - peak.apart),
        ("CUDA context", memory.CUDA_CONTEXT),
        (f"CUDA's own of {step.num_recordings} recordings", peak.kernels),
        (f"NCCL's own, of {forecast.num_devices} cards: published, not measured", peak.exchange),
        (f"in all, {share:.0%} of {card.memory_gib:.2f} GiB", peak.on_card),
    ]
    yield from (table_line(words, size, unit) for words, size in rows if size)
    others = [f"{one.moment} {one.total / unit:.2f}" for one in forecast.moments if one.moment != peak.moment]
    yield f"  allocated at other moments: {', '.join(others)}"
    if step.sharers:
        yield from shared_lines(forecast)
    yield f"  {step.tokens:,} tokens in the largest micro-batch; {kept_words(step)}"
    if samples.num_prompts:
        prompts = f"{number_of(samples.num_prompts, 'prompts')} of {number_of(samples.prompt_tokens, 'tokens')}"
        assumed = " (assumed)" if samples.are_assumed else ""
        yield f"  sample answers: {prompts}{assumed}, {samples.new_tokens} new ones each"
    if forecast.is_slow:
        yield f"  transformers' own layers take more time and memory than these figures: {forecast.slow_because}"


def shared_lines(forecast: Forecast) -> Iterator[str]:
    """Lines on where a ``forecast`` keeps the shares of a base, and how many bytes come to each card."""
    step = forecast.step
    of = f"each card keeps 1/{step.sharers} of the base's layers" if step.sharers > 1 else "the base's layers are kept"
    where = " in the host's memory" if step.shares_on_host else ""
    # A device computes as many micro-batches as any, if they are of one size.
    each_device = -(-forecast.accumulate // forecast.num_devices)
    coming, passes = memory.fetched_bytes(step) / 1e9, math.ceil(each_device / step.together)
    each = "micro-batch" if step.together == 1 else f"{step.together} micro-batches"
    yield f"  model.shard: {of}{where}, {memory.share_bytes(step) / GIB:.2f} GiB; to each card come, as they are used,"
    yield (
        f"  {coming:,.1f} GB per {each}, {coming * passes:,.1f} GB per step: "
        f"{coming / forecast.bus_gb_per_s:,.1f} s per {each} at {forecast.bus_gb_per_s:g} GB/s"
    )


def host_lines(forecast: Forecast, before: Sequence[tuple[str, int]] = ()) -> Iterator[str]:
    """A table of the host's memory and of the disk.

    Args:
        forecast: of the run.
        before: first lines, each with its bytes.
    """
    step, keep_checkpoints = forecast.step, forecast.keep_checkpoints
    trained = sum(step.lora_tensors)
    paged = memory.optimizer_bytes(step.optimizer, step.lora_tensors)[1]
    states = OPTIMIZERS[step.optimizer].states
    beside = [
        ("optimizer state that can be paged out to it", paged),
        ("base's layers on the host, page-locked", memory.base_on_host_bytes(step)),
        ("activations on the host, page-locked", memory.host_bytes(step)),
        (f"run folder, with {keep_checkpoints} checkpoints", run_folder_bytes(trained, keep_checkpoints, states)),
    ]
    yield f"{'host and disk':<52}{'GiB':>8}"
    yield from (table_line(*row) for row in before)
    yield from (table_line(*row) for row in beside if row[1])


def time_lines(forecast: Forecast, behind: str = "") -> Iterator[str]:
    """The time per epoch, and its assumptions; empty for a card of unknown rates.

    Args:
        forecast: of the run.
        behind: end of the first line.
    """
    epoch, card, hours = forecast.epoch, forecast.card, forecast.hours
    if hours is None:
        return
    slow = hours / REACHED
    speeds = f"{epoch.tokens / hours / 3600:,.0f} to {epoch.tokens / slow / 3600:,.0f}"
    yield f"  an epoch takes {duration(3600 * hours, 3600 * slow)}: {speeds} tokens/s, without validations{behind}"
    yield (
        f"  the first at {card.tflops:g} TFLOP/s and {card.gb_per_s:g} GB/s sustained with nothing "
        f"else in the way, the second at {REACHED:.0%} of that"
    )
    if forecast.num_devices > 1:
        exchanged = 4 * sum(forecast.step.lora_tensors) / 1e6
        yield (
            f"  on {forecast.num_devices} such cards, each of which works {forecast.efficiency:.0%} of the time, by "
            f"the rows' lengths{uneven(forecast.accumulate, forecast.num_devices)}; they exchange {exchanged:,.0f} MB "
            "of gradients per step, whose time is not counted"
        )


def uneven(accumulate: int, num_devices: int) -> str:
    """What to change where the micro-batches of a step can't be shared out evenly; else empty.

    Args:
        accumulate: micro-batches of a step.
        num_devices: number of devices.
    """
    rest = accumulate % num_devices
    return f" (--trainer.accumulate_grad_batches {accumulate + num_devices - rest} shares out evenly)" if rest else ""


def table_line(what: str, size: float, unit: int = GIB) -> str:
    """A line of such a table.

    Args:
        what: user of the memory, in words.
        size: bytes.
        unit: bytes that count as one.
    """
    return f"  {what:<50}{size / unit:8.2f}"


def kept_words(step: Step) -> str:
    """A line on which layers recompute activations or send some to the host in a ``step``, and what else saves time."""
    layers = step.shape.num_layers
    graphs = "; kernels are recorded (CUDA graphs)" if step.uses_cuda_graphs else ""
    graphs += f"; {step.hosted_layers} send some to the host" if step.hosted_layers else ""
    graphs += "; weights stay dequantised" if step.dequantised_layers else ""
    graphs += f"; {step.together} micro-batches of a step go through a layer together" if step.together > 1 else ""
    if step.kept_layers == layers:
        return f"no layer recomputes its activations{graphs}"
    if step.kept_layers == 0:
        return f"all {layers} layers recompute their activations{graphs}"
    return f"{step.kept_layers} of {layers} layers keep their products' results{graphs}"
