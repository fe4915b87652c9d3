"""Owns the time of training by formula: products, memory traffic and dequantisation at a card's sustained rates.

A forecast by formula, for a base trained as in this project; not measured. Knows no data and no torch.
"""

from dataclasses import dataclass

from lit_qlora.forecast.cards import Card
from lit_qlora.forecast.memory import Step

TRAFFIC_KIB = (500, 750)
"""Bytes read and written by everything but matrix products and attention, per token and layer of a 7B, forward and
backward, with the kernels of `model.pointwise` compiled: an estimate that a profile on an H200 confirms."""
WIDTHS_OF_7B = 4096 + 11008
HOST_S_PER_LAYER = 0.008
"""Time in which a host starts the kernels of a layer one by one, forward and backward: 7.7 to 9.7 ms measured beside an
H100, in a virtual machine with torch 2.11; others may be twice as fast."""

CARD_S_PER_LAYER = 0.0007
"""Time per layer and micro-batch, however small, in which a card is not at its rates: its kernels, more than 100, begin
and end one after the other, none in less than 4 µs. From 9,136 / 10,608 / 11,533 / 12,161 tokens/s at 1 / 2 / 4 / 8 x
1,024 tokens (`benchmarks/growth.py --t4` with a 7B on an H200, recorded, docs/memory-and-speed.md): a straight line in
time, whose start of 33 ms, less dequantisation at the card's bandwidth, is 0.8 ms per layer; 0.25 of it is that
bitsandbytes reached half of that bandwidth, where one kernel does now. 0.7 was an H100's, not measured again."""


@dataclass(frozen=True)
class Epoch:
    """An epoch of training.

    Args:
        tokens: number without padding.
        padded_tokens: number with padding.
        num_micro_batches: number of micro-batches.
        row_tokens: mean over the tokens of their row's length.
    """

    tokens: int
    padded_tokens: int
    num_micro_batches: int
    row_tokens: float


def waits_for_host(step: Step, card: Card) -> bool:
    """True if a card computes the layers faster than its host starts their kernels.

    Args:
        step: settings and sizes of a micro-batch.
        card: GPU whose rates are compared.

    Returns:
        False for a card of unknown rates, too.
    """
    hours = epoch_hours(step, Epoch(step.tokens, step.tokens, 1, 0), card)
    return hours is not None and hours * 3600 < HOST_S_PER_LAYER * step.shape.num_layers


def epoch_hours(step: Step, epoch: Epoch, card: Card) -> float | None:
    """Hours per training epoch, without validations; None for a card of unknown rates, or in 32 bits.

    Args:
        step: settings, and the share of layers that recompute.
        epoch: tokens and micro-batches.
        card: GPU whose sustained rates bound products and memory traffic; the two are added, and a time per
            micro-batch.
    """
    if card.tflops is None or card.gb_per_s is None or step.element != 2:
        return None
    per_token = _flops(step, epoch.row_tokens / 2) / (card.tflops * 1e12) + _traffic(step) / (card.gb_per_s * 1e9)
    per_batch = _dequantised_bytes(step) / (card.gb_per_s * 1e9) + CARD_S_PER_LAYER * step.shape.num_layers
    return (epoch.padded_tokens * per_token + epoch.num_micro_batches * per_batch) / 3600


def _recomputed_share(step: Step) -> float:
    """The share of layers that are recomputed."""
    return 1 - step.kept_layers / step.shape.num_layers


def _flops(step: Step, attended: float) -> float:
    """FLOPs per token that attends to ``attended`` others on average; frozen weights have no gradient."""
    shape = step.shape
    products, head = 2 * shape.num_quantized, 2 * shape.vocabulary * shape.hidden
    lora = 2 * sum(step.lora_tensors)
    attention = 4 * shape.linears["q_proj"][1] * shape.num_layers * attended
    scored = step.scored_tokens / step.tokens
    forward_and_backward = 2 * products + 2 * head * scored + 3 * lora + 3.5 * attention
    inputs, outputs = shape.linears["down_proj"]  # its result is not needed in backward
    again = products - 2 * shape.num_layers * inputs * outputs + attention + lora
    return forward_and_backward + _recomputed_share(step) * again


def _traffic(step: Step) -> float:
    """Bytes for one token."""
    shape = step.shape
    forward, backward = TRAFFIC_KIB
    widths = (shape.hidden + shape.linears["gate_proj"][1]) / WIDTHS_OF_7B
    passes = forward * (1 + _recomputed_share(step)) + backward
    return 1024 * passes * widths * shape.num_layers


def _dequantised_bytes(step: Step) -> float:
    """Bytes per micro-batch, however small: forward and backward read the 4-bit weights and write them in 16 bits.

    Less the layers whose weights stay, and once for all that go together, but for a shared base's.
    """
    share = (1 - step.dequantised_layers / step.shape.num_layers) / (1 if step.sharers else step.together)
    return 2 * step.shape.num_quantized * (0.516 + 2) * share
