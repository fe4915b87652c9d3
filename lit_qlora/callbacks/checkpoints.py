"""Owns when a run is saved: checkpoints to resume from, and the best adapter so far.

Saves happen between optimizer steps, after the validation if one follows, so that they hold no partial step. A failed
save is reported, and training continues. How they reach the disk is `storage`'s.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_qlora.callbacks.record import record_of
from lit_qlora.callbacks.steps import StepCallback, agree_to_stop, begin_epoch, is_last_step, validation_follows
from lit_qlora.callbacks.throughput import Throughput
from lit_qlora.callbacks.validation import held_out_figures
from lit_qlora.console import note
from lit_qlora.data.chat_template import PROMPT_PROBES, check_template
from lit_qlora.devices.strategy import ends_step
from lit_qlora.devices.world import any_of, by_first, is_first
from lit_qlora.errors import UserError
from lit_qlora.figures.card import write_card
from lit_qlora.forecast.foresee import Needs
from lit_qlora.metrics import is_better
from lit_qlora.ranges import check_ranges
from lit_qlora.storage.adapter import mend_adapter, put_adapter_back
from lit_qlora.storage.checkpoint_io import check_checkpoint
from lit_qlora.storage.files import SaveError
from lit_qlora.storage.folders import RESULT, DamagedFolderError, copy_folder, read_seal, remove_folder, write_folder
from lit_qlora.storage.foreign import read_object
from lit_qlora.storage.run import RunFolder
from lit_qlora.storage.state import num_bytes


@dataclass(frozen=True)
class Best:
    """The best adapter: ``result``, its step and held-out figures, and until it is on the disk its ``weights``."""

    result: dict[str, Any]
    weights: dict[str, Tensor]


class RunCheckpoints(StepCallback, Needs):
    """A callback that saves every so many optimizer steps or minutes and after the last, and keeps the best adapter by
    held-out loss.

    Args:
        run: the run folder.
        save_every_steps: optimizer steps between checkpoints.
        keep_checkpoints: number of newest checkpoints kept; at least 2, so that one exists while another is written.
        save_every_minutes: the longest time between checkpoints, for slow runs; none: by steps alone.
    """

    def __init__(
        self,
        run: RunFolder,
        save_every_steps: int,
        keep_checkpoints: int = 2,
        save_every_minutes: float | None = None,
    ) -> None:
        self.save_every_steps, self.save_every_minutes = save_every_steps, save_every_minutes
        self.keep_checkpoints = keep_checkpoints
        check_ranges(vars(self))
        self.run, self.clock = run, time.monotonic
        self.on_saved: Callable[[], None] = lambda: None
        """Called after each checkpoint."""
        self.settings: Mapping[str, Any] | None = None
        """This start's configuration, for the adapter's card; None: that of the first start."""
        self.mirrored: Path | None = None
        """The adapter's folder in the mirror."""
        self.stop_asked = False
        """Set by a signal: save after this step, whatever the interval."""
        self.saved_step: int | None = None
        """The step of the newest checkpoint that this process has verified on the disk."""
        self.failures: dict[str, str] = {}
        """What the last save could not write, ``checkpoint`` or ``adapter``, and why; empty if all is saved."""
        self.longest_save_s = 0.0
        self._is_due = False
        self._last_save_at = self.clock()
        self._unsaved: Best | None = None
        self._kept: dict[str, Any] | None = None
        """The result of the best validation so far, which the adapter on the disk must match."""
        self._resumed_step = 0
        self._has_checked_tokenizer = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the best adapter of the checkpoint, once no other callback can refuse it.

        A run that early stopping had ended, and that was killed right after its last save, stays ended.
        """
        if is_first():
            put_adapter_back(self.run, self._resumed_step, self.mirrored, must_stay=self._kept is not None)
            self._check_kept()
            self.run.finished_mark.unlink(missing_ok=True)  # of a shorter run: this one continues after its end
        trainer.should_stop |= has_stopped_early(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        begin_epoch(trainer)
        self._last_save_at = self.clock()

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Save at the end of the interval, or after the validation that follows."""
        on_interval = trainer.global_step % self.save_every_steps == 0
        if self.save_every_minutes is not None and is_first():  # one clock for all processes
            on_interval |= self.clock() - self._last_save_at >= 60 * self.save_every_minutes
        self._is_due |= is_last_step(trainer) or any_of(on_interval or self.stop_asked)
        if self._is_due and not validation_follows(trainer):
            self._save(trainer, module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the adapter if it is the best so far, then make the save that waited for this validation."""
        agree_to_stop(trainer)
        if not trainer.global_step:
            return
        if is_first():
            self._keep_if_best(trainer, pl_module)
        is_due = any_of(self._is_due or trainer.should_stop or self.stop_asked)
        # no save while a gradient waits
        if is_due and validation_follows(trainer) and ends_step(trainer, trainer.fit_loop.batch_idx):
            self._save(trainer, pl_module)

    def _keep_if_best(self, trainer: Trainer, module: LightningModule) -> None:
        figures = held_out_figures(trainer)
        best = self._unsaved.result if self._unsaved else read_result(self.run.adapter)
        if is_better(figures, best):
            self._keep(trainer, module, figures)
        if is_better(figures, self._kept):
            self._kept = {"step": trainer.global_step, **figures}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the best adapter back into the module, and remove what a kill after the last save left over.

        Only the first process does this: the others are done.
        """
        if not is_first():
            return
        if self.saved_step is None:
            self._remove_old(trainer.global_step)
        if self._unsaved:
            self._save_adapter(trainer, pl_module)
        elif read_result(self.run.adapter) is None:  # no validation: the last is the best there is
            self._keep(trainer, pl_module, {})
        if self._unsaved:
            pl_module.load_state_dict(self._unsaved.weights)
        else:
            mend_adapter(self.run, is_needed=True)
            self._copy_adapter()
            pl_module.load_adapter_weights(self.run.adapter)  # type: ignore[operator]

    def drop_aside(self) -> None:
        """Remove the adapter that a start put aside, once the run's best is as good: its steps have been repeated."""
        aside, best = (read_result(folder) or {} for folder in (self.run.adapter_before, self.run.adapter))
        if aside and not is_better(aside, best):
            with suppress(OSError):  # it is in nobody's way
                remove_folder(self.run.adapter_before)

    def state_dict(self) -> dict[str, Any]:
        """The best adapter: with its weights until these are on the disk, then its result alone."""
        best = self._unsaved
        return {"result": best.result, "weights": best.weights} if best else {"kept": self._kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best adapter that is not on the disk yet, or the result of the one on the disk."""
        if "weights" in state_dict:
            self._unsaved = Best(state_dict["result"], state_dict["weights"])
        self._kept = state_dict.get("kept")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the step that this start resumes from."""
        self._resumed_step = checkpoint["global_step"]

    def _check_kept(self) -> None:
        """Report a best adapter that is missing from the disk."""
        kept = self._kept
        found = read_result(self.run.adapter) if kept else None
        if kept and is_better(kept, found):
            self._kept = found if found and "val/loss" in found else None
            note(
                f"warning: the best adapter so far, that of step {kept['step']}, is gone from {self.run.adapter}, and "
                "there is no intact copy; the search for the best starts over"
            )

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        self._is_due = False
        if is_first():  # each has what a checkpoint brought
            if self._unsaved:
                self._save_adapter(trainer, module)
            if not self._unsaved:
                self._copy_adapter()
        for logger in trainer.loggers:
            logger.save()
        target = self.run.checkpoint(trainer.global_step)
        self._last_save_at = self.clock()
        if not self.attempt("checkpoint", lambda: self._write_checkpoint(trainer, target)):
            return
        self.saved_step = trainer.global_step
        self.longest_save_s = max(self.longest_save_s, self.clock() - self._last_save_at)
        if is_first():
            self._remove_old(trainer.global_step)
            self.on_saved()

    def _write_checkpoint(self, trainer: Trainer, target: Path) -> None:
        if by_first(lambda: _makes_way(target)):
            trainer.save_checkpoint(target)  # fails in all processes or in none

    def _remove_old(self, newest: int) -> None:
        for step in self.run.outdated_steps(self.keep_checkpoints, newest, check_checkpoint):
            try:
                remove_folder(self.run.checkpoint(step))
            except OSError as error:
                note(f"warning: the old checkpoint {self.run.checkpoint(step)} can't be removed: {error.strerror}")

    def _keep(self, trainer: Trainer, module: LightningModule, figures: dict[str, float]) -> None:
        """Save the adapter as it is now; if that fails, keep it in host memory for the next attempt."""
        result = {"step": trainer.global_step, **figures}
        self._unsaved = Best(result, module.state_dict())
        self._save_adapter(trainer, module)
        if self._unsaved:
            weights = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
            self._unsaved = Best(result, weights)

    def _save_adapter(self, trainer: Trainer, module: Any) -> None:
        """Write the adapter that is not on the disk yet; the module's weights are restored afterwards."""
        best = self._unsaved
        assert best is not None
        is_of_now = best.result["step"] == trainer.global_step
        now = {} if is_of_now else {name: value.detach().clone() for name, value in module.state_dict().items()}

        def fill(folder: Path) -> None:
            module.save_adapter(folder)
            self._check_tokenizer(trainer.datamodule, folder)  # type: ignore[attr-defined]
            (folder / RESULT).write_text(json.dumps(best.result, indent=2), encoding="utf-8")
            kept = record_of(trainer)
            training_s = next((part.training_s for part in trainer.callbacks if isinstance(part, Throughput)), 0.0)  # type: ignore[attr-defined]
            write_card(folder, self.run, kept.by_step() if kept else {}, best.result["step"], training_s, self.settings)

        def write() -> None:
            write_folder(self.run.adapter, fill, replace=True, needed_bytes=num_bytes(best.weights))

        if now:
            module.load_state_dict(best.weights)
        try:
            if self.attempt("adapter", write):
                self._unsaved = None
        finally:
            if now:
                module.load_state_dict(now)

    def _check_tokenizer(self, data: Any, folder: Path) -> None:
        """Warn once if other programs would make other prompts with the tokenizer in ``folder``, if there is one."""
        if self._has_checked_tokenizer or not (folder / "tokenizer.json").is_file():
            return
        self._has_checked_tokenizer = True
        try:
            check_template(folder, data.encoder, PROMPT_PROBES)
        except UserError as error:
            note(
                f"warning: of some conversations, other programs make other prompts with the tokenizer in "
                f"{self.run.adapter} than training had (chat and predict do not); {error.remedy}"
            )

    def _copy_adapter(self) -> None:
        """Write a second copy of the adapter, in case the first is damaged, before the checkpoint that goes with it."""
        seal = read_seal(self.run.adapter)
        if seal in (None, read_seal(self.run.adapter_copy)):
            return
        try:
            copy_folder(self.run.adapter, self.run.adapter_copy, replace=True)
        except (OSError, DamagedFolderError) as error:
            note(f"warning: {error}; the best adapter has no second copy, and the next save retries")

    def attempt(self, what: str, save: Callable[[], None]) -> bool:
        """Save something, and report a failure in one line; the next save retries.

        Args:
            what: key of `failures`.
            save: raises OSError if it fails.

        Returns:
            True if it succeeded.
        """
        try:
            save()
        except OSError as error:
            problem = str(error) if isinstance(error, SaveError) else str(SaveError(self.run.path, error))
            if self.failures.get(what) != problem:
                note(f"error: {problem}; training continues, and the next save retries")
            self.failures[what] = problem
            return False
        self.failures.pop(what, None)
        return True


def has_stopped_early(trainer: Trainer) -> bool:
    """True if the held-out loss of ``trainer`` has not improved for as long as early stopping allows."""
    early: Any = trainer.early_stopping_callbacks
    return any(callback.wait_count >= callback.patience for callback in early)


def _makes_way(target: Path) -> bool:
    """True if the checkpoint is to be written. Removes a damaged one of the same step, before which the run resumed."""
    if not target.exists():
        return True
    try:
        check_checkpoint(target)
    except DamagedFolderError:
        remove_folder(target)
        return True
    return False


def read_result(adapter: Path) -> dict[str, Any] | None:
    """The step and the held-out figures of a run's ``adapter``, a folder; None without an adapter."""
    file = adapter / RESULT
    return read_object(file) if file.is_file() else None
