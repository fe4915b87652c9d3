"""Owns the callback that holds the clock in a run of lit-qlora's: `--trainer.callbacks own_timer.Stopwatch`."""

import os
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_qlora.batch import Batch
from lit_qlora.data.batching import collate
from lit_qlora.model.module import QLoRAModule

clock: Any = None
"""The `peers.Clock` of this process."""
rows: list = []
"""Examples whose loss is reported before and after: ids and labels."""


class Stopwatch(Callback):
    """Score the rows, count steps, and end the process when enough was seen: the rest of the run is not measured."""

    loss, seen = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the rows before training."""
        self.loss = self._score(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count a micro-batch."""
        clock.batch(batch.num_tokens, batch.input_ids.numel())
        if trainer.global_step > self.seen:
            self.seen = trainer.global_step
            if clock.step():
                clock.report(self.loss, self._score(trainer, pl_module), str(trainer.precision))
                sys.stdout.flush()
                os._exit(0)

    def _score(self, trainer: Trainer, module: LightningModule) -> float:
        assert isinstance(module, QLoRAModule)
        batch = collate(list(enumerate(rows)), 1)._replace(rows=())
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            loss, _, count = module.summed_loss(batch)
        return float(loss) / count
