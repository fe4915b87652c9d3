"""Owns the forecast of a run in a few lines: does it fit the card, and how long is an epoch?

Puts a module, its data and its Trainer into the terms of `model.memory` and `model.speed`. Knows no options.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import torch

from lit_qlora.errors import UserError
from lit_qlora.model import memory
from lit_qlora.model.cards import Card, find_card
from lit_qlora.model.device import current_device
from lit_qlora.model.memory import GIB, Step, StepMemory
from lit_qlora.model.shape import Shape
from lit_qlora.model.speed import Epoch, epoch_hours, waits_for_host

ANSWER_SHARE = 0.86
"""Tokens of answers, of all tokens: measured on guanaco-llama2-1k with Llama 2's tokenizer."""
GUANACO = (
    (0, 22), (5, 76), (10, 114), (20, 181), (30, 240), (40, 307), (50, 373), (60, 433), (70, 509), (80, 624),
    (90, 886), (95, 1154), (98, 1636), (99, 1895), (100, 7832),
)  # fmt: skip
"""Percentiles of the conversations' tokens, measured likewise; the first 259 test rows of the whole set agree."""
PROMPT_TOKENS = 256
"""The longest of eight prompts, where it is not known: measured there, 153 on average."""
PROMPTS_AT_ONCE = 8
PARTS = {
    "weights": "base: linear layers in 4 bits, the rest in 16",
    "adapters": "adapter, fp32",
    "gradients": "its gradients, fp32",
    "optimizer": "optimizer's state",
    "casts": "16-bit copies of the adapter",
    "activations": "activations kept for backward",
    "layer": "one layer while it is worked on",
    "loss": "loss: logits of 1,024 rows, hidden states",
    "dequantisation": "one weight out of its 4 bits",
    "recordings": "what recorded kernels read and write",
    "cache": "keys and values of sample answers",
    "workspace": "cuBLAS's scratch",
}


def step_of(
    shape: Shape,
    lora: Any,
    optimizer: str,
    checkpointing: str,
    precision: str,
    card: Card,
    tokens: int,
    scored_share: float,
    accumulate: int,
    cuda_graphs: bool | str = False,
) -> Step:
    """A training step in the formulas' terms, with as many layers kept as ``checkpointing`` means on ``card``.

    ``cuda_graphs``, if it is auto, becomes what a fit does on ``card``; it is false where conversations are packed.
    """
    targets = lora.target_modules
    names = Shape.LINEARS if targets == "all-linear" else (targets,) if isinstance(targets, str) else tuple(targets)
    step = Step(
        shape,
        tokens=tokens,
        scored_tokens=math.ceil(tokens * scored_share),
        rank=lora.rank,
        targets=tuple(dict.fromkeys(names)),
        dropout=lora.dropout > 0,
        optimizer=optimizer,
        element=4 if precision == "32-true" else 2,
        accumulates=accumulate > 1,
        workspace=memory.HOPPER_WORKSPACE if card.capability >= (9, 0) else memory.WORKSPACE,
    )
    if cuda_graphs == "auto":
        plain = not (lora.dropout or lora.dora or torch.are_deterministic_algorithms_enabled())
        cuda_graphs = plain and waits_for_host(replace(step, kept_layers=shape.num_layers), card)
    step = replace(step, replays=bool(cuda_graphs))
    if checkpointing == "auto":
        return replace(step, kept_layers=memory.most_kept_layers(step, int(card.memory_gib * GIB)))
    return replace(step, kept_layers=0 if checkpointing == "full" else shape.num_layers)


def epoch_of(lengths: Sequence[int], batches: Sequence[Sequence[int]], packed: bool = False) -> tuple[Epoch, int]:
    """An epoch's tokens, and those of its largest micro-batch with padding."""
    padded = [
        sum(lengths[row] for row in rows) if packed else len(rows) * max(lengths[row] for row in rows)
        for rows in batches
    ]
    tokens = sum(lengths)
    mean_row = sum(length**2 for length in lengths) / tokens
    return Epoch(tokens, sum(padded), len(batches), mean_row), max(padded)


def guanaco_lengths(num_rows: int) -> list[int]:
    """Lengths like those of guanaco-llama2-1k: its measured percentiles, with straight lines between them."""
    lengths = []
    for row in range(num_rows):
        percent = 100 * (row + 0.5) / num_rows
        (low, shortest), (high, longest) = next(pair for pair in pairwise(GUANACO) if pair[1][0] >= percent)
        lengths.append(round(shortest + (longest - shortest) * (percent - low) / (high - low)))
    return lengths


def plan_lines(module: Any, data: Any, trainer: Any) -> list[str]:
    """What the run will need, in a few lines, once the data is read; nothing on a CPU.

    Args:
        module: the `QLoRAModule`.
        data: the `ChatDataModule` after ``setup("fit")``.
        trainer: the `QLoRATrainer`.
    """
    planned = planned_step(module, data, trainer)
    return short_lines(*planned) if planned else []


def planned_step(module: Any, data: Any, trainer: Any) -> tuple[Step, Epoch, Card] | None:
    """The largest step of a run, its epoch, and the card; None on a CPU. Arguments as for `plan_lines`."""
    card = current_card()
    if card is None:
        return None
    rows = data._rows["train"]
    epoch, largest = epoch_of(rows.lengths, data._first_epoch, data.plan.packed)
    step = step_of(
        module.base.shape, module.lora, module.optimizer_name, module.checkpointing,
        str(trainer.precision), card, largest,
        sum(rows.answer_tokens) / epoch.tokens, trainer.accumulate_grad_batches,
        False if data.plan.packed or module.slow_because else module.cuda_graphs,
    )  # fmt: skip
    return step, epoch, card


def short_lines(step: Step, epoch: Epoch, card: Card) -> list[str]:
    """Memory against the card, part by part, the layers that are computed again, and the time; all of it predicted."""
    peak = memory.step_memory(step)
    share = peak.on_card / GIB / card.memory_gib
    verdict = "fits" if share <= 1 else "does not fit: python main.py plan says what would"
    lines = [
        f"predicted for {card.name}: {peak.on_card / GIB:.2f} of {card.memory_gib:.2f} GiB ({share:.0%}), of which "
        f"torch reserves {peak.reserved / GIB:.2f}; {verdict}",
        *memory_lines(peak, card),
        f"{step.tokens:,} tokens in the largest micro-batch; {kept_words(step)}",
    ]
    hours = epoch_hours(step, epoch, card)
    if hours is not None:
        lines.append(
            f"predicted time: {duration(hours)} an epoch ({epoch.tokens / hours / 3600:,.0f} of {epoch.tokens:,} "
            "tokens a second), without validations"
        )
    return lines


def memory_lines(peak: StepMemory, card: Card) -> Iterator[str]:
    """A table of the highest moment, part by part, against the card."""
    unit = unit_of(peak)
    yield f"{f'memory at its highest: {peak.moment}':<52}{'GiB' if unit == GIB else 'MiB':>8}"
    for part in fields(peak):
        size = getattr(peak, part.name)
        if part.name in PARTS and size:
            yield memory_line(PARTS[part.name], size, unit)
    yield memory_line("allocated (torch.cuda.max_memory_allocated)", peak.total, unit)
    if peak.apart:
        yield memory_line("held beside: recorded kernels share no memory", peak.apart, unit)
    yield memory_line(f"fragmentation, {memory.FRAGMENTATION:.0%}", peak.reserved - peak.total - peak.apart, unit)
    yield memory_line("CUDA context", memory.CONTEXT, unit)
    share = peak.on_card / GIB / card.memory_gib
    yield memory_line(f"in all, {share:.0%} of {card.memory_gib:.2f} GiB", peak.on_card, unit)


def memory_line(what: str, size: float, unit: int = GIB) -> str:
    """A line of such a table."""
    return f"  {what:<50}{size / unit:8.2f}"


def unit_of(peak: StepMemory) -> int:
    """In which a table of ``peak`` is: GiB, or MiB for a small one."""
    return GIB if peak.total >= GIB else 1024**2


def kept_words(step: Step) -> str:
    """Which layers compute their activations again, and whether kernels are recorded."""
    layers = step.shape.num_layers
    graphs = "; kernels are recorded (CUDA graphs)" if step.replays else ""
    if step.kept_layers == layers:
        return f"no layer computes its activations again{graphs}"
    if step.kept_layers == 0:
        return f"all {layers} layers compute their activations again{graphs}"
    return f"{step.kept_layers} of {layers} layers keep their products' results{graphs}"


def duration(hours: float) -> str:
    """Hours in two figures."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s" if hours * 3600 >= 1 else "under 1 s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"


def current_card() -> Card | None:
    """This machine's GPU, with the rates of the table where it is there; None without one."""
    device = current_device()
    if device.capability is None:
        return None
    try:
        known = find_card(device.name)
    except UserError:  # there are more cards than the table has: of this one the rates are not known
        known = Card(device.name, 0, device.capability)
    # CUDA's own part is not in what is free any more; the formulas count it in.
    return replace(known, memory_gib=(device.memory_bytes + memory.CONTEXT) / GIB, capability=device.capability)
