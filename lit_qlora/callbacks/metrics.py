"""Owns the figures of training: what is measured over the steps of a log interval. Knows no file."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lit_qlora.batch import Batch
from lit_qlora.callbacks.record import record
from lit_qlora.callbacks.steps import StepCallback, is_log_step
from lit_qlora.model.sums import AnswerSums


class TrainMetrics(StepCallback):
    """Loss, perplexity and token accuracy over the steps since the last record; learning rate; gradient norm."""

    def __init__(self) -> None:
        self.sums = AnswerSums()
        self.learning_rate = math.nan
        self.last_loss = math.nan
        """The loss that was recorded last, for the progress bar."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over from the module's own logging, which would write the same figures a second time."""
        pl_module.standalone = False  # type: ignore[assignment]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Notes the learning rate of this step: behind it, the schedule has moved on."""
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Adds a micro-batch's sums."""
        self.sums.add(outputs)

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Records where the log interval ends."""
        if not is_log_step(trainer):
            return
        loss, accuracy = map(float, self.sums.means())
        figures = {
            "train/loss": loss,
            "train/perplexity": math.exp(loss) if loss < 700 else math.inf,
            "train/accuracy": accuracy,
            "train/gradient_norm": float(module.gradient_norm),
            "train/learning_rate": self.learning_rate,
            "train/epoch": trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / trainer.num_training_batches,
        }
        record(trainer, figures)
        self.last_loss = loss
        self.sums.reset()

    def state_dict(self) -> dict[str, float]:
        """The sums so far, as numbers."""
        return self.sums.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the sums of the run that was cut."""
        self.sums.load_state_dict(state_dict)
