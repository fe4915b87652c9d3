"""Owns the TensorBoard files of a run: right in the run folder, going on without a gap or a doubled step.

Knows which files, not which figures.
"""

import sys
import types
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger


class RunTensorBoard(TensorBoardLogger):
    """Writes into ``run``; steps after ``resumed_step`` that an earlier process wrote are dropped from view."""

    def __init__(self, run: Path, config_text: str, resumed_step: int | None) -> None:
        # Where TensorFlow is installed, as on Colab, TensorBoard would import it, for seconds and pages.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
        purge: dict[str, Any] = {} if resumed_step is None else {"purge_step": resumed_step + 1}
        super().__init__(save_dir=run, name="", version="", **purge)
        self.config_text = config_text
        self._is_fresh = resumed_step is None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Adds figures; the configuration comes with the first."""
        if self._is_fresh:
            self._is_fresh = False
            indented = "".join(f"    {line}\n" for line in self.config_text.splitlines())
            self.experiment.add_text("config", indented, 0)
        super().log_metrics(metrics, step)

    def save(self) -> None:
        """Flushes; Lightning's own would also leave an hparams.yaml, and config.yaml is the record."""
        self.experiment.flush()
