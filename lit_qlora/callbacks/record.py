"""Owns how callbacks record figures, and how the run's record goes through a checkpoint. Knows no file."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_qlora.figures.record import Record


def record(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Record figures with every logger of a Trainer.

    Args:
        trainer: figures are recorded for its current optimizer step.
        figures: values by name, such as ``mine/name``.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(figures), step=trainer.global_step)


def record_of(trainer: Trainer) -> Record | None:
    """The record of the run of ``trainer``; None for a Trainer without one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, Record)), None)


class KeepRecord(Callback):
    """A callback that saves the run's record in checkpoints, and restores it on a resume."""

    def __init__(self) -> None:
        self._state: Mapping[str, Any] | None = None
        self._record: Record | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bind the record to the Trainer's steps."""
        self._record = record_of(trainer)
        if self._record:
            self._record.trainer = trainer

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the open step."""
        if self._record:
            checkpoint["metrics_line"] = self._record.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it for later: another callback may still refuse the checkpoint."""
        self._state = checkpoint.get("metrics_line")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the record, once no callback can refuse the checkpoint."""
        if self._record:
            self._record.go_back(self._state)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the last step, for readers of the files."""
        if self._record:
            self._record.close_step()
