"""Owns which states of a run are validated beside those of the interval, and the held-out figures."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_qlora.callbacks.record import record
from lit_qlora.callbacks.steps import StepCallback, is_last_step, run_validation, validation_follows
from lit_qlora.metrics import is_held_out


class HeldOutMetrics(StepCallback):
    """A callback that records each validation, and adds one before the first step and one after the last."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the base: a new adapter changes nothing yet."""
        if trainer.global_step == 0:
            run_validation(trainer)

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Score the last state if the validation interval would skip it."""
        if is_last_step(trainer) and not validation_follows(trainer):
            should_stop = trainer.should_stop
            run_validation(trainer)
            trainer.should_stop = should_stop  # early stopping in the very last step would score it again

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the module's figures."""
        record(trainer, held_out_figures(trainer))


def held_out_figures(trainer: Trainer) -> dict[str, float]:
    """The figures of the last validation of ``trainer``, by their names in the record."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if is_held_out(name)}
