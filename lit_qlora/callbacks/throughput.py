"""Owns speed: tokens per second without padding, and the share of padding. Knows no loss."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_qlora.batch import Batch
from lit_qlora.callbacks.record import record
from lit_qlora.callbacks.steps import StepCallback, is_log_step


class Throughput(StepCallback):
    """Records tokens that are not padding per second of training; validations and saves are not counted in."""

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self.training_s = 0.0
        """Seconds of training since the run's first step, whatever checkpoints it went through."""
        self._since: float | None = None
        self._start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock; the first batch starts it."""
        self._since = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """The clock runs from a batch's start to its end, and on to the next batch's start where nothing is between."""
        self._since = self._since or time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Counts a micro-batch's tokens."""
        self._tokens += batch.num_tokens
        self._places += batch.input_ids.numel()

    def on_step_end(self, trainer: Trainer, module: object) -> None:
        """Records where the log interval ends; each step there waits for the device already, to tell its loss."""
        self._pause()
        if not is_log_step(trainer):
            self._since = time.monotonic()
            return
        self.tokens_per_second = self._tokens * trainer.world_size / max(self._seconds, 1e-9)
        padding = 1 - self._tokens / self._places
        record(trainer, {"speed/tokens_per_second": self.tokens_per_second, "speed/padding_share": padding})
        self._start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock; the next batch starts it again."""
        self._pause()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stops the clock for a save."""
        self._pause()

    def state_dict(self) -> dict[str, float]:
        """What the interval under way has counted."""
        return {"tokens": self._tokens, "places": self._places, "seconds": self._seconds, "training_s": self.training_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the interval that was cut."""
        self._tokens, self._places = state_dict["tokens"], state_dict["places"]
        self._seconds = state_dict["seconds"]
        self.training_s = state_dict.get("training_s", 0.0)

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
