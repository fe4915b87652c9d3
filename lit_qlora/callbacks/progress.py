"""Owns the progress bar: one for the whole run, with loss, tokens per second and time left. Knows no files."""

import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lit_qlora.callbacks.metrics import TrainMetrics
from lit_qlora.callbacks.steps import StepCallback, is_log_step
from lit_qlora.callbacks.throughput import Throughput
from lit_qlora.console import progress_bar


class TimeLeft:
    """The remaining seconds of a run, by the time of its steps and validations in this start.

    They are counted apart, so that a validation, which may take as long as a hundred steps, doesn't make the time jump.

    Args:
        total: Optimizer steps of the run.
        done: Optimizer steps before this start.
        training_s: Seconds in training steps before this start.
    """

    def __init__(self, total: int, done: int, training_s: float) -> None:
        self._total, self._start, self._before_s = total, done, training_s

    def at(self, done: int, training_s: float, interval: float, validation_s: float) -> float:
        """The seconds left after ``done`` optimizer steps.

        Args:
            done: Optimizer steps done.
            training_s: Seconds in training steps of the whole run.
            interval: Steps from one validation to the next; infinite without any.
            validation_s: Seconds of the last validation, sample answers included.
        """
        if done >= self._total:
            return 0.0
        step_s = (training_s - self._before_s) / max(done - self._start, 1)
        validations = math.ceil(self._total / interval) - math.floor(done / interval) if interval < math.inf else 0
        return (self._total - done) * step_s + validations * validation_s


def steps_between_validations(trainer: Trainer) -> float:
    """Optimizer steps from one validation of ``trainer`` to the next; infinite without any."""
    batches = (trainer.val_check_batch or math.inf) if sum(trainer.num_val_batches) else math.inf
    return max(batches / trainer.accumulate_grad_batches, 1e-9)


class RunProgress(StepCallback, ProgressBar):
    """A bar over all optimizer steps, replaced by one for a validation while that runs.

    Replaced, since a notebook can return to the start of a line, but not move up to another. Without a terminal on
    standard error, a plain line per log interval replaces the bar.

    Args:
        metrics: source of the last loss.
        throughput: source of the tokens per second.
    """

    def __init__(self, metrics: TrainMetrics, throughput: Throughput) -> None:
        super().__init__()
        self.metrics, self.throughput = metrics, throughput
        self.is_terminal = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._validation: tqdm[Any] | None = None
        self._began = self._validation_s = 0.0
        self._figures = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step of a resumed run."""
        total = trainer.datamodule.num_optimizer_steps()  # type: ignore[attr-defined]
        shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self._left = TimeLeft(total, trainer.global_step, self.throughput.training_s)
        self._bar = progress_bar("train", total=total, initial=trainer.global_step, bar_format=shape)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Refresh the displayed time: a step may have many micro-batches."""
        assert self._bar is not None
        self._bar.update(0)

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Advance the bar; figures are refreshed when they are recorded, which costs no wait."""
        assert self._bar is not None
        self._bar.n = trainer.global_step
        interval = steps_between_validations(trainer)
        seconds = self._left.at(trainer.global_step, self.throughput.training_s, interval, self._validation_s)
        left = f"{tqdm.format_interval(seconds)} left"
        if is_log_step(trainer):
            self._figures = f"loss {self.metrics.last_loss:.3f}, {self.throughput.tokens_per_second:,.0f} tokens/s"
            if not self.is_terminal:
                print(f"step {trainer.global_step:>6}/{self._bar.total}  {self._figures}, {left}", flush=True)
        self._bar.set_postfix_str(", ".join(filter(None, [left, self._figures])), refresh=False)
        self._bar.update(0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar for the validation in place of the run's."""
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.clear()
        self._validation = progress_bar("validate", total=sum(trainer.num_val_batches), leave=False, position=0)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Advance the validation's bar."""
        assert self._validation is not None
        self._validation.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the validation's bar, and show the run's again."""
        assert self._validation is not None
        self._validation_s = time.monotonic() - self._began
        self._validation.close()
        if self._bar is not None:
            self._bar.refresh()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the full bar on the screen."""
        assert self._bar is not None
        self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar: a line will report why the run ends."""
        if self._bar is not None:
            self._bar.leave = False
            self._bar.close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        tqdm.write(" ".join(str(arg) for arg in args))
