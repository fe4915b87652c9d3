"""Owns the moment after an optimizer step, which Lightning has no hook for, and the seed before each micro-batch.

Knows nothing of what is done at that moment.
"""

import hashlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_qlora.batch import Batch


class StepCallback(Callback):
    """A callback with `on_step_end`, called once after each optimizer step, before a validation that follows it."""

    _seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts from the step that a resumed run is at."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Calls `on_step_end` where this micro-batch was a step's last."""
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.on_step_end(trainer, pl_module)

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Called when ``trainer.global_step`` optimizer steps are done."""


class SeedByPosition(Callback):
    """Seeds chance before each micro-batch by its place in the run.

    What LoRA's dropout does is then a function of (seed, epoch, batch): nothing that happened in between, an
    evaluation, a sample, a cut-off, can change it, and there is no random state to save.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Seeds torch on every device."""
        place = f"{self.seed}/{trainer.current_epoch}/{batch_idx}/{trainer.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big"))
