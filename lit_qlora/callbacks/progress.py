"""Owns the progress bar: one for the whole run, with loss, tokens per second and time left. Knows no files."""

import sys
from shutil import get_terminal_size
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lit_qlora.callbacks.metrics import TrainMetrics
from lit_qlora.callbacks.steps import StepCallback, is_log_step
from lit_qlora.callbacks.throughput import Throughput


class RunProgress(StepCallback, ProgressBar):
    """One bar over all optimizer steps, and one for a validation in its place while it runs.

    In its place, and not below: a notebook knows how to go back in a line, and not how to go up to another.
    Where standard error is no terminal, a plain line at each log interval stands in for the bar.
    """

    def __init__(self, metrics: TrainMetrics, throughput: Throughput) -> None:
        super().__init__()
        self.metrics, self.throughput = metrics, throughput
        self.is_terminal = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._validation: tqdm[Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar where a resumed run stands."""
        total = trainer.datamodule.num_optimizer_steps()  # type: ignore[attr-defined]
        shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(
            total=total,
            initial=trainer.global_step,
            desc="train",
            bar_format=shape,
            ncols=get_terminal_size().columns,  # tqdm's own guess shows nothing where a terminal tells no size
            nrows=get_terminal_size().lines,
            disable=not self.is_terminal,
        )

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Renews the time that is shown: a step may have many micro-batches."""
        assert self._bar is not None
        self._bar.update(0)

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Moves the bar; figures are renewed where they were recorded, which costs no wait."""
        assert self._bar is not None
        self._bar.n = trainer.global_step
        if is_log_step(trainer):
            figures = f"loss {self.metrics.last_loss:.3f}, {self.throughput.tokens_per_second:,.0f} tokens/s"
            self._bar.set_postfix_str(figures, refresh=False)
            if not self.is_terminal:
                print(f"step {trainer.global_step}/{self._bar.total}  {figures}", flush=True)
        self._bar.update(0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens a short-lived bar where the other one is."""
        if self._bar is not None:
            self._bar.clear()
        self._validation = tqdm(
            total=sum(trainer.num_val_batches),
            desc="validate",
            leave=False,
            position=0,
            disable=not self.is_terminal,
        )

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Moves it."""
        assert self._validation is not None
        self._validation.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes it, and shows the other one again."""
        assert self._validation is not None
        self._validation.close()
        if self._bar is not None:
            self._bar.refresh()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the full bar on the screen."""
        assert self._bar is not None
        self._bar.close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        tqdm.write(" ".join(str(arg) for arg in args))
