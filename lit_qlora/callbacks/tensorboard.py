"""Owns the TensorBoard files of a run: right in the run folder, going on without a gap or a doubled step.

Knows which files, not which figures.
"""

import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from lit_qlora.callbacks.tell import tell


class RunTensorBoard(TensorBoardLogger):
    """Writes into ``run``; figures that an earlier process wrote from ``resumed_step`` on are dropped from view.

    Those of that step itself come back from the checkpoint: a validation in the middle of the next window still
    adds to it, and the earlier process may have come so far, or not.

    Where it can't be written any more, that is told once, and the curves of this start end there.
    """

    def __init__(self, run: Path, config_text: str, resumed_step: int | None) -> None:
        # Where TensorFlow is installed, as on Colab, TensorBoard would import it, for seconds and pages.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
        _silence_writer_thread()
        self._purged_from = resumed_step or 0  # a run killed before its first save has written steps, too
        super().__init__(save_dir=run, name="", version="", purge_step=self._purged_from)
        self._step, self._figures = -1, dict[str, float]()
        self.config_text = config_text
        self._is_fresh = resumed_step is None
        self._is_broken = False

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Adds figures; the configuration comes with the first."""
        if self._is_fresh:
            self._is_fresh = False
            indented = "".join(f"    {line}\n" for line in self.config_text.splitlines())
            self.add_text("config", indented, 0)
        assert step is not None, "figures are recorded under a step"
        self._try(lambda: TensorBoardLogger.log_metrics(self, metrics, step))
        if step != self._step:
            self._step, self._figures = step, {}
        self._figures |= {name: float(value) for name, value in metrics.items()}

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Adds a text, in Markdown."""
        self._try(lambda: self.experiment.add_text(tag, text, step))

    def state_dict(self) -> dict[str, Any]:
        """The figures of the newest step."""
        return {"step": self._step, "figures": dict(self._figures)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adds them again, where they were dropped."""
        if state_dict["step"] >= self._purged_from:
            self.log_metrics(state_dict["figures"], state_dict["step"])

    def save(self) -> None:
        """Flushes; Lightning's own would also leave an hparams.yaml, and config.yaml is the record."""
        self._try(lambda: self.experiment.flush())  # noqa: PLW0108 - asked for the first time, it opens the file

    def finalize(self, status: str) -> None:
        """Closes the file."""
        self._try(lambda: TensorBoardLogger.finalize(self, status))

    def _try(self, write: Callable[[], None]) -> None:
        if self._is_broken:
            return
        try:
            write()
        except (OSError, ValueError) as error:  # Lightning makes a ValueError of an OSError
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            self._is_broken = True
            why = cause.strerror or cause
            tell(f"error: TensorBoard's file in {self.save_dir} can't be written: {why}; training goes on without it")


def _silence_writer_thread() -> None:
    """TensorBoard writes in a thread, whose error comes back at the next call; its own traceback is too many."""
    others = threading.excepthook
    if getattr(others, "__name__", "") == "all_but_writer":
        return

    def all_but_writer(args: Any) -> None:
        if not (type(args.thread).__name__ == "_AsyncWriterThread" and isinstance(args.exc_value, OSError)):
            others(args)

    threading.excepthook = all_but_writer
