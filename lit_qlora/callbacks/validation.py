"""Owns which states of a run are validated beside those that fall on the interval, and the held-out figures."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_qlora.callbacks.record import record
from lit_qlora.callbacks.steps import StepCallback, is_last_step, run_validation, validation_follows


class HeldOutMetrics(StepCallback):
    """Records each validation, and sees to one before the first step and one after the last."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the base: a new adapter changes nothing yet."""
        if trainer.global_step == 0:
            run_validation(trainer)

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Scores the last state where the validation interval would leave it out."""
        if is_last_step(trainer) and not validation_follows(trainer):
            should_stop = trainer.should_stop
            run_validation(trainer)
            trainer.should_stop = should_stop  # early stopping in the very last step would have it scored once more

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records what the module computed."""
        if trainer.state.fn == "fit":
            figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
            record(trainer, {name: value for name, value in figures.items() if name.startswith("val/")})
