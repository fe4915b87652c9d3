"""Owns the typed batch that passes from data to model, the label that means "not learned", and the shift by one.

`data/batching.py` makes a batch; `model/module.py` reads it. Knows neither the source of the ids nor the model.
"""

from typing import NamedTuple

import numpy as np
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
    """Numbers of the rows in the data set, ``B`` of them, or one per conversation if packed."""
    num_tokens: int
    """Tokens that are not padding."""
    step_answer_tokens: int
    """Learned tokens in the whole optimizer step of this micro-batch, over all its micro-batches and devices: the one
    denominator of the loss."""
    lengths: tuple[int, ...] = ()
    """Tokens of each conversation packed into one row, without padding. None attends to another."""
    is_here: bool = True
    """False for a micro-batch that another device computes: ids, positions and targets are left out."""
    device: int = -1
    """Number of the device that the micro-batch was dealt to; -1 if each computes it."""
    highest_id: int = -1
    """Highest of ``input_ids``, found on the host so that nothing waits for the device; -1 if unknown."""
    part: tuple[int, int] = (0, 0)
    """The place of a part of a split micro-batch: the index of its first token in the flattened ids, and how many
    tokens the whole has; (0, 0) if it is whole."""

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on ``device``; one that is not here stays as it is. Lightning calls this."""
        if not self.is_here:
            return self
        ids, positions, targets = (send(one, device) for one in (self.input_ids, self.positions, self.targets))
        return self._replace(input_ids=ids, positions=positions, targets=targets)


def send(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``, without waiting for its pending work.

    A copy of more than 64 KiB waits if the host may page its memory.
    """
    if device.type != "cuda":
        return values.to(device)
    return (values if values.is_cuda else values.pin_memory()).to(device, non_blocking=True)


def split_batch(batch: Batch) -> list[Batch]:
    """Split ``batch`` in two, each with about half of its conversations; a single one is not split.

    The denominator of the loss is kept: the losses of the two add up to that of ``batch``.
    """
    count = len(batch.lengths) or len(batch.input_ids)
    if count < 2:
        return [batch]
    middle, width = count // 2, batch.input_ids.shape[1]
    edge = sum(batch.lengths[:middle]) or middle * width  # in the flattened ids
    ids = batch.input_ids.flatten()
    parts = []
    for start, end, some in ((0, edge, slice(middle)), (edge, len(ids), slice(middle, None))):
        inside = (batch.positions >= start) & (batch.positions < end)
        parts.append(
            batch._replace(
                input_ids=ids[start:end].view(1 if batch.lengths else -1, -1 if batch.lengths else width),
                positions=batch.positions[inside] - start,
                targets=batch.targets[inside],
                rows=batch.rows[some],
                lengths=batch.lengths[some],
                part=(start, len(ids)),
            )
        )
    return parts


def answer_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and targets of ``labels`` ``[B, T]``: position t predicts the label at t + 1.

    The only place that shifts labels, on the host when a batch is made: on a GPU, finding the positions would wait for
    the device. Nothing predicts a first label.

    Args:
        labels: ``[B, T]`` int64, `IGNORE_INDEX` where nothing is learned.

    Returns:
        Positions ``[N]`` in the flattened ``[B · T]`` states, and the ids ``[N]`` to be predicted there.
    """
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    # By numpy: torch divides an index of some thousand among all cores, which on a host with 32 takes 9 ms.
    found = shifted.flatten().numpy()
    positions = np.flatnonzero(found != IGNORE_INDEX)
    return torch.from_numpy(positions), torch.from_numpy(found[positions])
