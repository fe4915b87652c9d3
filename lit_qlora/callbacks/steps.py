"""Owns the hook between two optimizer steps, which Lightning lacks.

The only module that uses private names of Lightning's loops. Knows nothing of what happens between steps.
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_qlora.batch import Batch
from lit_qlora.devices.strategy import ends_step
from lit_qlora.devices.world import any_of, world


class StepCallback(Callback):
    """A callback with a hook between two optimizer steps; `StepEdge` calls it, in a fixed order."""

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Run after ``trainer.global_step`` optimizer steps of ``module``, before a validation that follows."""


class StepEdge(Callback):
    """A callback that calls `on_step_end` of each of its parts once after each optimizer step, in order.

    It is the last in the Trainer's list, so that its parts have seen the micro-batch by then.

    Args:
        parts: The callbacks, in the order of their calls.
    """

    def __init__(self, parts: Sequence[StepCallback]) -> None:
        self.parts = [*parts]
        self._stops = False
        """True if a callback asked the Trainer to stop inside of a step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep processes from waiting for each other within a step."""
        if world().size > 1:  # Lightning would broadcast for each micro-batch; a stop is agreed on once per step
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Call the parts if this micro-batch was a step's last."""
        if not ends_step(trainer, batch_idx):  # the step is finished first, so that it can be saved
            self._stops |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._stops
        agree_to_stop(trainer)
        for part in self.parts:
            part.on_step_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop in all processes if a callback asked one of them to."""
        agree_to_stop(trainer)


def agree_to_stop(trainer: Trainer) -> None:
    """Set ``should_stop`` of ``trainer`` in all processes if one has set it, which would leave the others behind."""
    trainer.should_stop = any_of(trainer.should_stop)


def is_log_step(trainer: Trainer) -> bool:
    """True if the step that ``trainer`` just did is due by ``log_every_n_steps``, or the last."""
    steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return trainer.global_step % steps == 0 or is_last_step(trainer)


def is_last_step(trainer: Trainer) -> bool:
    """True if all optimizer steps of the run of ``trainer`` are done."""
    return trainer.global_step >= trainer.datamodule.num_optimizer_steps()  # type: ignore[attr-defined]


def validation_follows(trainer: Trainer) -> bool:
    """True if ``trainer`` validates right after the current micro-batch."""
    loop: Any = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def begin_epoch(trainer: Trainer) -> None:
    """Make ``trainer`` count the epoch that begins here.

    Lightning, resumed from a save in an epoch's last step, ends that epoch but does not count the next as begun: from a
    later save in the new epoch it would resume with the data of the one before.

    Resumed from a save in the validation after that step, it knows that the epoch is over from the validation interval
    alone: if this start's has no validation there, such a save is treated as one in the step.
    """
    loop: Any = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress
    is_over = loop.restarted_mid_epoch and loop.epoch_loop.restarted_on_last and batches.is_last_batch
    if is_over and not validation_follows(trainer):
        batches.total.completed -= 1
        batches.current.completed -= 1
        loop.epoch_loop.update_restart_stage()
        loop.epoch_progress.increment_processed()
        loop.epoch_progress.increment_completed()
    if loop.restarted_mid_epoch and loop.epoch_progress.total.processed == loop.epoch_progress.total.ready:
        loop.reset_restart_stage()


def run_validation(trainer: Trainer) -> None:
    """Validate between two steps of ``trainer``, as Lightning's own loop does, unless the run has no validations."""
    if not trainer.enable_validation:
        return
    connector = trainer._logger_connector
    first_iteration = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_iteration
