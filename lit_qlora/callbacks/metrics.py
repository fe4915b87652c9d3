"""Owns the figures of training over the steps of a log interval. Knows no file."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lit_qlora.batch import Batch
from lit_qlora.callbacks.record import record
from lit_qlora.callbacks.steps import StepCallback, is_log_step
from lit_qlora.devices.world import is_first
from lit_qlora.metrics import figures_of
from lit_qlora.model.sums import AnswerSums


class TrainMetrics(StepCallback):
    """A callback that records loss, perplexity, token accuracy, learning rate and gradient norm of a log interval."""

    def __init__(self) -> None:
        self.sums = AnswerSums()
        self.learning_rate = math.nan
        self.last_loss = math.nan
        """The last recorded loss, for the progress bar."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the module's own logging, which would write the same figures again."""
        pl_module.standalone = False  # type: ignore[assignment]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Record the learning rate of this step, before the schedule advances."""
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Add a micro-batch's sums."""
        self.sums.add(outputs)

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Record at the end of the log interval."""
        if not is_log_step(trainer):
            return
        sums = {name: float(value) for name, value in self.sums.over_all().to_divide().items()}
        figures = {
            **figures_of("train", sums, lambda loss: math.exp(loss) if loss < 700 else math.inf),
            "train/gradient_norm": float(module.gradient_norm),
            "train/learning_rate": self.learning_rate,
            "train/epoch": trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / trainer.num_training_batches,
        }
        record(trainer, figures)
        self.last_loss = figures["train/loss"]
        self.sums.reset()

    def state_dict(self) -> dict[str, float]:
        """The sums so far, as numbers, over all processes: each of them asks."""
        return self.sums.over_all().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the sums of the interrupted run."""
        if is_first():
            self.sums.load_state_dict(state_dict)
