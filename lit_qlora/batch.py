"""Owns the typed batch that passes from data to model, the label that means "not learned", and the shift by one.

`data/batching.py` makes a batch; `model/module.py` reads it. Knows neither where the ids came from nor
what is computed of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position whose token is not learned: torch's own default for cross entropy."""


class Batch(NamedTuple):
    """One micro-batch, right-padded, with no attention mask: causal attention never looks right.

    ``input_ids`` is ``[B, T]`` int64. ``positions`` and ``targets`` are ``[N]`` int64: where in the
    flattened ``[B * T]`` a learned token is predicted, and which it is.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    rows: tuple[int, ...]
    """Which rows of the data set these are, ``B`` of them."""
    num_tokens: int
    """Tokens that are not padding."""
    step_answer_tokens: int
    """Learned tokens in the whole optimizer step that this micro-batch is part of, over all its
    micro-batches and devices: the one denominator of the loss."""
    lengths: tuple[int, ...] = ()
    """Where several conversations are packed into one row, without padding: tokens of each. None sees another."""


def answer_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and targets of ``labels`` ``[B, T]``: position t predicts the label at t + 1.

    The only place that shifts labels. It is done where a batch is made, on the host: on a GPU, finding
    the positions would wait for the device. A first label has nothing that predicts it.
    """
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    shifted = shifted.flatten()
    positions = (shifted != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, shifted[positions]
