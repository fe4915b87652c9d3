"""Owns when a run ends early, saved: a signal, a time limit, or no more gain.

Knows no files; `RunCheckpoints` saves.
"""

from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lit_qlora.callbacks.checkpoints import RunCheckpoints
from lit_qlora.callbacks.steps import StepCallback
from lit_qlora.console import note
from lit_qlora.devices.world import AllEnd, highest, is_first
from lit_qlora.signals import URGENT, give_back, hold_off, leave_at_once, print_now, signal_name, take_over


class OwnSignals(Callback):
    """A callback that takes SIGTERM back from Lightning, which would have processes wait for each other in its
    handler."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle SIGTERM by `leave_at_once` until the run's own handler is installed."""
        take_over(leave_at_once)


class StopOnSignal(StepCallback):
    """A callback that ends the run after the current optimizer step, with exit status 128 + the signal's number.

    A validation in progress, or one that follows the step, is finished first: a state saved before it would resume
    without it. The last part of `StepEdge`, so that all else is done. A second Ctrl-C or SIGTERM exits at once; a
    SIGHUP or SIGUSR1 after any other signal changes nothing.

    Args:
        checkpoints: saves before the end.
    """

    def __init__(self, checkpoints: RunCheckpoints) -> None:
        self.checkpoints = checkpoints
        self._status: int | None = None
        self._is_signalled = False
        self._previous: dict[int, Any] = {}

    def ask(self, status: int) -> None:
        """Save and end the run after this step.

        Args:
            status: exit status if the save succeeds: 128 + a signal's number, or 0 for the time limit.
        """
        self._status = status
        self.checkpoints.stop_asked = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        self._previous = take_over(self._handle)

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Leave the training loop, unless the save still waits for a validation."""
        self._leave_once_saved(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave after the validation that the save waited for."""
        self._leave_once_saved(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the signal handlers; after an error, `on_exception` does."""
        give_back(self._previous)
        self._previous = {}
        if self._is_signalled:
            hold_off()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self.on_train_end(trainer, pl_module)

    def _leave_once_saved(self, trainer: Trainer) -> None:
        (asked,) = highest(-1 if self._status is None else self._status)  # of whichever process was asked
        if asked < 0:
            return
        self.checkpoints.stop_asked, self._status = True, int(asked)
        reason = signal_name(self._status - 128) if self._status else "max_time"
        if self.checkpoints.saved_step == trainer.global_step and not self.checkpoints.failures:
            print_now(
                f"stopped and saved at step {trainer.global_step} by {reason}; the same command resumes from here"
            )
            raise AllEnd(self._status)
        if self.checkpoints.failures:
            note(f"error: stopped at step {trainer.global_step}, and the last save failed; an earlier one exists")
            raise AllEnd(1)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first, self._is_signalled = not self._is_signalled, True
        if is_first:  # the first signal is the reason
            self.ask(128 + number)
        if number in URGENT:
            take_over(leave_at_once, URGENT)
            print_now("stopping after this step; again to stop at once")
        elif is_first:
            print_now("stopping after this step")


class TimeLimit(StepCallback):
    """A callback that ends the run, saved and with status 0, before ``limit_s`` seconds are over; one step is always
    done.

    The margin is the sum of the longest step, the longest validation and the longest save so far.
    A part of `StepEdge` before `RunCheckpoints`.

    Args:
        limit_s: time limit in seconds.
        started_at: time of the start, by ``time.monotonic``.
        stop: the callback that ends the run.
    """

    def __init__(self, limit_s: float, started_at: float, stop: StopOnSignal) -> None:
        self.ends_at, self.stop, self.clock = started_at + limit_s, stop, stop.checkpoints.clock
        self._longest_step_s = self._longest_validation_s = 0.0
        self._last_edge_at = self._validation_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the start of the first step."""
        self._last_edge_at = self.clock()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the time: a validation is no part of a step."""
        self._validation_at = self.clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record its duration."""
        took_s = self.clock() - self._validation_at
        self._longest_validation_s = max(self._longest_validation_s, took_s)
        self._last_edge_at += took_s

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Request the end if another step, with its validation and save, could take too long."""
        now = self.clock()
        self._longest_step_s = max(self._longest_step_s, now - self._last_edge_at)
        self._last_edge_at = now
        margin_s = self._longest_step_s + self._longest_validation_s + self.stop.checkpoints.longest_save_s
        if is_first() and now + margin_s >= self.ends_at:  # one clock for all processes
            self.stop.ask(0)


class StopWithoutGain(EarlyStopping):
    """A callback that ends the run after a number of validations without a better held-out loss.

    Several validations at one optimizer step count as one: they score the same adapter.
    """

    _step = -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the validation, unless the last one was at this step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            super().on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state, and the step of the last validation."""
        return {**super().state_dict(), "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore Lightning's state, but keep the patience of the command line."""
        super().load_state_dict({**state_dict, "patience": self.patience})
        self._step = state_dict["step"]
