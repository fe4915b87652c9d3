"""Owns the progress bar: one for the whole run, with loss, tokens per second and time left. Knows no files."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lit_qlora.callbacks.metrics import TrainMetrics
from lit_qlora.callbacks.steps import StepCallback, is_log_step
from lit_qlora.callbacks.throughput import Throughput
from lit_qlora.console import progress_bar


class RunProgress(StepCallback, ProgressBar):
    """A bar over all optimizer steps, replaced by one for a validation while that runs.

    Replaced, since a notebook can return to the start of a line, but not move up to another. Without a terminal on
    standard error, a plain line per log interval replaces the bar.
    """

    def __init__(self, metrics: TrainMetrics, throughput: Throughput) -> None:
        super().__init__()
        self.metrics, self.throughput = metrics, throughput
        self.is_terminal = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._validation: tqdm[Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step of a resumed run."""
        total = trainer.datamodule.num_optimizer_steps()  # type: ignore[attr-defined]
        shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = progress_bar("train", total=total, initial=trainer.global_step, bar_format=shape)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Refresh the displayed time: a step may have many micro-batches."""
        assert self._bar is not None
        self._bar.update(0)

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Advance the bar; figures are refreshed when they are recorded, which costs no wait."""
        assert self._bar is not None
        self._bar.n = trainer.global_step
        if is_log_step(trainer):
            figures = f"loss {self.metrics.last_loss:.3f}, {self.throughput.tokens_per_second:,.0f} tokens/s"
            self._bar.set_postfix_str(figures, refresh=False)
            if not self.is_terminal:
                print(f"step {trainer.global_step}/{self._bar.total}  {figures}", flush=True)
        self._bar.update(0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a short-lived bar in place of the other one."""
        if self._bar is not None:
            self._bar.clear()
        self._validation = progress_bar("validate", total=sum(trainer.num_val_batches), leave=False, position=0)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Moves it."""
        assert self._validation is not None
        self._validation.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close it, and show the other one again."""
        assert self._validation is not None
        self._validation.close()
        if self._bar is not None:
            self._bar.refresh()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the full bar on the screen."""
        assert self._bar is not None
        self._bar.close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        tqdm.write(" ".join(str(arg) for arg in args))
