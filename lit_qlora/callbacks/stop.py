"""Owns Ctrl-C and SIGTERM: the step under way is finished and saved, then the run ends.

Knows no files; `RunCheckpoints` saves.
"""

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_qlora.callbacks.checkpoints import RunCheckpoints
from lit_qlora.callbacks.steps import StepCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(StepCallback):
    """Ends the run at the next edge between optimizer steps, with exit status 130 (Ctrl-C) or 143 (SIGTERM).

    Stands behind ``checkpoints`` in the Trainer's list, so that the save comes first. A second signal
    stops at once, as if this callback were not there.
    """

    def __init__(self, checkpoints: RunCheckpoints) -> None:
        self.checkpoints = checkpoints
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals; only a main thread may."""
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Leaves the training loop; what is saved is saved."""
        if self.received is None:
            return
        if not self.checkpoints.run.checkpoint(trainer.global_step).exists():
            return  # a validation follows, and the save behind it: the next step's edge will do
        print(
            f"\nstopped and saved at step {trainer.global_step}; the same command goes on from here",
            flush=True,
        )
        raise SystemExit(128 + self.received)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back; after an error, Lightning restores what it found."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.checkpoints.stop_asked = True
        self._give_back()
        print("\nstopping after this step; once more stops at once", flush=True)
