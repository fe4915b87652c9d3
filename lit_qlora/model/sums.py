"""Owns the figures of training as sums over answer tokens: added per micro-batch, then averaged.

Sums stay on the device, so that no step waits for a figure. Knows neither loggers nor intervals.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_qlora.devices.world import summed, world


class AnswerSums:
    """Loss, likeliest tokens and answer tokens, summed over micro-batches."""

    NAMES = ("loss_sum", "num_correct", "num_answers")

    def __init__(self) -> None:
        self._sums: dict[str, Any] = dict.fromkeys(self.NAMES, 0)

    def __bool__(self) -> bool:
        """True if anything was added since the start."""
        return self._sums["num_answers"] != 0

    def reset(self) -> None:
        """Start anew."""
        self._sums = dict.fromkeys(self.NAMES, 0)

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Add ``outputs``, a result of `QLoRAModule.training_step`: each of the micro-batches learned together."""
        for one in outputs.get("each") or [outputs]:
            for name in self.NAMES:
                self._sums[name] = self._sums[name] + one[name]

    def to_divide(self) -> dict[str, Tensor]:
        """The sums in fp64, by name, of at least one answer token."""
        sums = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in self._sums.items()}
        return sums | {"num_answers": sums["num_answers"].clamp(min=1)}

    def over_all(self) -> "AnswerSums":
        """The sums over the processes of a run."""
        if world().size == 1:
            return self
        total = AnswerSums()
        total.load_state_dict(summed(self.state_dict()))
        return total

    def state_dict(self) -> dict[str, float]:
        """The sums so far, as numbers."""
        return {name: float(value) for name, value in self._sums.items()}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Continue with the sums in ``state_dict``."""
        self._sums = dict(state_dict)
