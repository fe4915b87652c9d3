"""Owns when a run is saved: checkpoints to go on from, and the best adapter so far.

Saves fall on the edge between optimizer steps, and behind the validation where one follows, so that
nothing is half done in them. How they reach the disk is `storage`'s.
"""

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_qlora.callbacks.card import write_card
from lit_qlora.callbacks.metrics import is_last_step, validation_follows
from lit_qlora.callbacks.steps import StepCallback
from lit_qlora.errors import require
from lit_qlora.storage.folders import DamagedFolderError, remove_folder, verify_folder, write_folder
from lit_qlora.storage.run import RunFolder

RESULT = "result.json"
"""In an adapter folder: the step that it is of, and its held-out figures."""


class RunCheckpoints(StepCallback):
    """Saves every so many optimizer steps and after the last; keeps the best adapter by held-out loss.

    Args:
        run: the run folder.
        save_every_steps: optimizer steps from one checkpoint to the next.
        keep_checkpoints: the newest that are kept; at least 2, so that one stands while another is written.
    """

    def __init__(self, run: RunFolder, save_every_steps: int, keep_checkpoints: int = 2) -> None:
        require(save_every_steps >= 1, "save_every_steps", "a whole number from 1", save_every_steps)
        require(keep_checkpoints >= 2, "keep_checkpoints", "a whole number from 2", keep_checkpoints)
        self.run = run
        self.save_every_steps = save_every_steps
        self.keep_checkpoints = keep_checkpoints
        self.stop_asked = False
        """Set by a signal: save at the next edge, whatever the interval."""
        self._is_due = False

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Saves where the interval ends, unless a validation follows: then behind it."""
        on_interval = trainer.global_step % self.save_every_steps == 0
        self._is_due = on_interval or is_last_step(trainer) or self.stop_asked
        if self._is_due and not validation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the adapter if it is the best so far, then makes the save that waited for this validation."""
        if trainer.state.fn != "fit" or not trainer.global_step:
            return
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        best = read_result(self.run.adapter)
        loss = figures["val/loss"]
        if math.isfinite(loss) and (best is None or loss < best.get("val/loss", math.inf)):
            self._save_adapter(trainer, pl_module, figures)
        if (self._is_due or trainer.should_stop) and validation_follows(trainer) and _is_on_edge(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the best adapter back into the module."""
        if read_result(self.run.adapter) is None:  # no validation: the last is the best there is
            self._save_adapter(trainer, pl_module, {})
        pl_module.load_adapter_weights(self.run.adapter)  # type: ignore[operator]

    def _save(self, trainer: Trainer) -> None:
        self._is_due = False
        for logger in trainer.loggers:
            logger.save()
        target = self.run.checkpoint(trainer.global_step)
        if trainer.strategy.broadcast(_makes_way(target)):  # the first device decides, for all
            trainer.save_checkpoint(target)
        if trainer.is_global_zero:
            for step in self.run.saved_steps()[: -self.keep_checkpoints]:
                remove_folder(self.run.checkpoint(step))

    def _save_adapter(self, trainer: Trainer, module: Any, figures: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return

        def fill(folder: Path) -> None:
            module.save_adapter(folder)
            result = {"step": trainer.global_step} | {k: v for k, v in figures.items() if k.startswith("val/")}
            (folder / RESULT).write_text(json.dumps(result, indent=2), encoding="utf-8")
            write_card(folder, self.run, trainer)

        write_folder(self.run.adapter, fill, replace=True)


def _is_on_edge(trainer: Trainer) -> bool:
    """Whether no gradient waits for the rest of its window."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def _makes_way(target: Path) -> bool:
    """Whether there is a checkpoint to be written: a damaged one, which the run went back behind, is removed."""
    if not target.exists():
        return True
    try:
        verify_folder(target)
    except DamagedFolderError:
        remove_folder(target)
        return True
    return False


def read_result(adapter: Path) -> dict[str, Any] | None:
    """The step and the held-out figures of a run's adapter; None where there is no adapter yet."""
    file = adapter / RESULT
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
