"""Owns speed: tokens per second without padding, and the share of padding. Knows no loss."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_qlora.batch import Batch
from lit_qlora.callbacks.record import record
from lit_qlora.callbacks.steps import StepCallback, is_log_step


class Throughput(StepCallback):
    """A callback that records tokens per second of training, without padding, validations and saves."""

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self.training_s = 0.0
        """Seconds of training since the run's first step, over all its starts."""
        self._since: float | None = None
        self._start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock; the first batch starts it."""
        self._since = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the clock, which runs to the batch's end, and on to the next batch's start if nothing is in between."""
        self._since = self._since or time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count a micro-batch's tokens."""
        self._tokens += batch.num_tokens
        self._places += batch.input_ids.numel()

    def on_step_end(self, trainer: Trainer, module: object) -> None:
        """Record at the end of the log interval, when the loss has waited for the device already."""
        self._pause()
        if not is_log_step(trainer):
            self._since = time.monotonic()
            return
        self.tokens_per_second = self._tokens / max(self._seconds, 1e-9)
        padding = 1 - self._tokens / self._places
        record(trainer, {"speed/tokens_per_second": self.tokens_per_second, "speed/padding_share": padding})
        self._start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock; the next batch restarts it."""
        self._pause()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the clock for a save."""
        self._pause()

    def state_dict(self) -> dict[str, float]:
        """The counts of the current interval."""
        return {"tokens": self._tokens, "places": self._places, "seconds": self._seconds, "training_s": self.training_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the interrupted interval."""
        self._tokens, self._places = state_dict["tokens"], state_dict["places"]
        self._seconds, self.training_s = state_dict["seconds"], state_dict["training_s"]

    def _pause(self) -> None:
        if self._since is not None:
            passed = time.monotonic() - self._since
            self._seconds += passed
            self.training_s += passed
            self._since = None

    def _start(self) -> None:
        self._tokens = self._places = 0
        self._seconds = 0.0
        self._since = None
