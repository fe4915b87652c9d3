"""Owns the forecast of a run: its settings, its data and this card in the terms of `memory` and `speed`.

Puts a module, its data and its Trainer into them. Knows no options; the words are `words`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from lit_qlora.errors import UserError
from lit_qlora.forecast import memory
from lit_qlora.forecast.cards import Card, find_card
from lit_qlora.forecast.memory import GIB, NO_SAMPLES, Samples, Step, StepMemory
from lit_qlora.forecast.speed import Epoch, waits_for_host
from lit_qlora.model.device import current_device
from lit_qlora.model.generate import PROMPTS_AT_ONCE
from lit_qlora.model.graphs import MOST, padded
from lit_qlora.model.shape import Shape

ANSWER_SHARE = 0.86
"""Tokens of answers, of all tokens: measured on guanaco-llama2-1k with Llama 2's tokenizer."""
GUANACO = (
    (0, 22), (5, 76), (10, 114), (20, 181), (30, 240), (40, 307), (50, 373), (60, 433), (70, 509), (80, 624),
    (90, 886), (95, 1154), (98, 1636), (99, 1895), (100, 7832),
)  # fmt: skip
"""Percentiles of the conversations' tokens, measured likewise; the first 259 test rows of the whole set agree."""
PROMPT_TOKENS = 256
"""The longest of eight prompts, where it is not known: measured there, 153 on average."""


@dataclass(frozen=True)
class Largest:
    """The largest micro-batch of an epoch in tokens, with padding; and where kernels are recorded, which pads more."""

    tokens: int
    recorded_tokens: int
    num_recordings: int


@dataclass(frozen=True)
class Outlook:
    """What is foreseen of a run: its largest step, its epoch, its sample answers, and the card."""

    step: Step
    epoch: Epoch
    card: Card
    samples: Samples
    keep_checkpoints: int

    @property
    def moments(self) -> list[StepMemory]:
        """All that it must have room for."""
        return memory.run_moments(self.step, self.samples)


def step_of(
    shape: Shape,
    lora: Any,
    optimizer: str,
    checkpointing: str,
    precision: str,
    card: Card,
    largest: Largest,
    scored_share: float,
    accumulate: int,
    cuda_graphs: bool | str = False,
    samples: Samples = NO_SAMPLES,
    loss_rows: int = memory.CHUNK_ROWS,
    is_slow: bool = False,
) -> Step:
    """A training step in the formulas' terms, with as many layers kept as ``checkpointing`` means on ``card``.

    ``cuda_graphs``, if it is auto, becomes what a fit does on ``card``; it is false where conversations are packed.
    ``is_slow`` where the layers are transformers' own: of those nothing is recorded, and auto keeps none.
    """
    targets = lora.target_modules
    names = Shape.LINEARS if targets == "all-linear" else (targets,) if isinstance(targets, str) else tuple(targets)
    step = Step(
        shape,
        tokens=largest.tokens,
        scored_tokens=math.ceil(largest.tokens * scored_share),
        rank=lora.rank,
        targets=tuple(dict.fromkeys(names)),
        dropout=lora.dropout > 0,
        optimizer=optimizer,
        element=4 if precision == "32-true" else 2,
        accumulates=accumulate > 1,
        loss_rows=loss_rows,
        workspace=memory.HOPPER_WORKSPACE if card.capability >= (9, 0) else memory.WORKSPACE,
    )
    if is_slow:
        cuda_graphs, checkpointing = False, "full" if checkpointing == "auto" else checkpointing
    if cuda_graphs == "auto":
        plain = not (lora.dropout or lora.dora or torch.are_deterministic_algorithms_enabled())
        cuda_graphs = plain and waits_for_host(replace(step, kept_layers=shape.num_layers), card)
    if cuda_graphs:
        step = replace(step, tokens=largest.recorded_tokens, num_recordings=largest.num_recordings)
    if checkpointing == "auto":
        return replace(step, kept_layers=memory.most_kept_layers(step, int(card.memory_gib * GIB), samples))
    return replace(step, kept_layers=0 if checkpointing == "full" else shape.num_layers)


def epoch_of(lengths: Sequence[int], batches: Sequence[Sequence[int]], packed: bool = False) -> tuple[Epoch, Largest]:
    """An epoch's tokens, and its largest micro-batch."""
    longest = [max(lengths[row] for row in rows) for rows in batches]
    tokens = [
        sum(lengths[row] for row in rows) if packed else len(rows) * most
        for rows, most in zip(batches, longest, strict=True)
    ]
    shapes = {(len(rows), padded(len(rows), most)) for rows, most in zip(batches, longest, strict=True)}
    largest = Largest(max(tokens), max(rows * length for rows, length in shapes), min(len(shapes), MOST))
    mean_row = sum(length**2 for length in lengths) / sum(lengths)
    return Epoch(sum(lengths), sum(tokens), len(batches), mean_row), largest


def guanaco_lengths(num_rows: int) -> list[int]:
    """Lengths like those of guanaco-llama2-1k: its measured percentiles, with straight lines between them."""
    lengths = []
    for row in range(num_rows):
        percent = 100 * (row + 0.5) / num_rows
        (low, shortest), (high, longest) = next(pair for pair in pairwise(GUANACO) if pair[1][0] >= percent)
        lengths.append(round(shortest + (longest - shortest) * (percent - low) / (high - low)))
    return lengths


def planned(module: Any, data: Any, trainer: Any) -> Outlook | None:
    """What is foreseen of a fit; None on a CPU.

    Args:
        module: the `QLoRAModule`.
        data: the `ChatDataModule` after ``setup("fit")``.
        trainer: the `QLoRATrainer`.
    """
    card = current_card()
    if card is None:
        return None
    samples = _samples(data, trainer)
    rows = data._rows["train"]
    epoch, largest = epoch_of(rows.lengths, data._first_epoch, data.plan.packed)
    step = step_of(
        module.base.shape, module.lora, module.optimizer_name, module.checkpointing,
        str(trainer.precision), card, largest,
        sum(rows.answer_tokens) / epoch.tokens, trainer.accumulate_grad_batches,
        False if data.plan.packed else module.cuda_graphs,
        samples, module.loss_rows, bool(module.slow_because),
    )  # fmt: skip
    keep = max((getattr(callback, "keep_checkpoints", 0) for callback in trainer.callbacks), default=0)
    return Outlook(step, epoch, card, samples, keep)


def _samples(data: Any, trainer: Any) -> Samples:
    """The sample answers that the Trainer's callback draws."""
    drawn = next((callback for callback in trainer.callbacks if hasattr(callback, "max_new_tokens")), None)
    prompts = [len(data.encoder.prompt(prompt)) for prompt in drawn.choose(data)] if drawn else []
    return Samples(min(len(prompts), PROMPTS_AT_ONCE), max(prompts, default=0), drawn.max_new_tokens if drawn else 0)


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
