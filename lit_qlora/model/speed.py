"""Owns the time of training by formula: products, memory traffic and dequantisation at a card's sustained rates.

A prediction, for a Llama trained as this project trains it; no run stands behind it. Knows no data and no torch.
"""

from dataclasses import dataclass

from lit_qlora.model.cards import Card
from lit_qlora.model.memory import Step

TRAFFIC_KIB = {
    # Bytes that everything but matrix products and attention reads and writes, for a token and a layer of
    # 7B, forward and backward: counted over torch's operations, with a 16-bit residual stream.
    ("all", False): (1200, 1617),
    ("all", True): (1374, 1791),
    ("some", False): (731, 1323),
    ("some", True): (790, 1390),  # not counted: q and v with dropout, between its neighbours
}
WIDTHS_OF_7B = 4096 + 11008


@dataclass(frozen=True)
class Epoch:
    """The tokens of an epoch: real ones, those with padding, micro-batches, and the length of the mean token's row."""

    tokens: int
    padded_tokens: int
    num_micro_batches: int
    row_tokens: float


def epoch_hours(step: Step, epoch: Epoch, card: Card) -> float | None:
    """Hours of an epoch of training, without validations; None for a card of unknown rates, or in 32 bits."""
    if card.tflops is None or card.gb_per_s is None or step.element != 2:
        return None
    per_token = _flops(step, epoch.row_tokens / 2) / (card.tflops * 1e12) + _traffic(step) / (card.gb_per_s * 1e9)
    per_batch = _dequantised_bytes(step) / (card.gb_per_s * 1e9)
    return (epoch.padded_tokens * per_token + epoch.num_micro_batches * per_batch) / 3600


def _recomputed(step: Step) -> tuple[float, float]:
    """Shares of the layers whose products, and whose other operations, are computed twice."""
    if step.kept_layers is None:
        return 0.0, 0.0
    return 1 - step.kept_layers / step.shape.num_layers, 1.0


def _flops(step: Step, attended: float) -> float:
    """For one token that attends to ``attended`` others on average; frozen weights have no gradient."""
    shape = step.shape
    products, head = 2 * shape.num_quantized, 2 * shape.vocabulary * shape.hidden
    lora = 2 * sum(step.lora_tensors)
    attention = 4 * shape.linears["q_proj"][1] * shape.num_layers * attended
    scored = step.scored_tokens / step.tokens
    forward_and_backward = 2 * products + 2 * head * scored + 3 * lora + 3.5 * attention
    again, lora_again = _recomputed(step)
    return forward_and_backward + again * (products + attention) + lora_again * lora


def _traffic(step: Step) -> float:
    """Bytes for one token."""
    shape = step.shape
    kind = "all" if len(step.targets) > 4 else "some"
    forward, backward = TRAFFIC_KIB[kind, step.dropout]
    widths = (shape.hidden + shape.linears["gate_proj"][1]) / WIDTHS_OF_7B
    passes = forward * (1 + _recomputed(step)[1]) + backward
    return 1024 * passes * widths * shape.num_layers


def _dequantised_bytes(step: Step) -> float:
    """For one micro-batch, however small: each pass reads the 4-bit weights and writes them in 16 bits."""
    return (2 + _recomputed(step)[0]) * step.shape.num_quantized * (0.516 + 2)
