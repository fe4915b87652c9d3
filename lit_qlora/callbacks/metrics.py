"""Owns the figures of training and where they are written: metrics.jsonl, and TensorBoard beside it.

`record` is how every callback writes its figures, under the number of optimizer steps done. Knows no model.
"""

import errno
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from lit_qlora.batch import Batch
from lit_qlora.callbacks.steps import StepCallback
from lit_qlora.callbacks.tell import tell
from lit_qlora.callbacks.tensorboard import RunTensorBoard
from lit_qlora.model.sums import AnswerSums
from lit_qlora.storage.files import SaveError, parse_json, replace_file, sync_file


def record(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Writes ``figures`` under the optimizer steps done, to every logger of the Trainer."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(figures), step=trainer.global_step)


def is_log_step(trainer: Trainer) -> bool:
    """Whether the step just done is one of those that ``log_every_n_steps`` names, or the last."""
    steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return trainer.global_step % steps == 0 or is_last_step(trainer)


def is_last_step(trainer: Trainer) -> bool:
    """Whether all the optimizer steps of the run are done."""
    return trainer.global_step >= trainer.datamodule.num_optimizer_steps()  # type: ignore[attr-defined]


class MetricsFile(Logger):
    """``metrics.jsonl``: one JSON object a line, all figures of one step together, no step twice.

    It is only ever appended to. A resumed run goes through the steps after its checkpoint again; those
    that stand in the file already are not written a second time, unless they come otherwise now. A figure that is not
    finite is a string.

    A line is written when the next step begins or the run is over: a validation in the middle of a window
    still adds to the step before it. Until then the line is part of the checkpoint, and so are lines that
    could not be written; they are tried again with the next.

    Args:
        path: the file. Lines in it that are damaged are dropped, with a warning.
        resumed_step: the step that the run goes on from; what stands behind a damaged line is gone through again.
        comes_otherwise: whether what an earlier start wrote behind the checkpoint is dropped, for settings changed.
    """

    def __init__(self, path: Path, resumed_step: int = 0, comes_otherwise: bool = False) -> None:
        super().__init__()
        self.path, self._comes_otherwise = path, comes_otherwise
        self.trainer: Trainer | None = None
        """Whose optimizer steps alone have a line: a callback of the user's own may count otherwise."""
        self._step: int | None = None
        self._figures: dict[str, float] = {}
        self._unwritten: dict[int, str] = {}
        self._is_synced = True
        self.problem: str | None = None
        """Why what came last is not in the file."""
        dropped_bytes = _drop_torn_line(path)
        if dropped_bytes:
            print(
                f"warning: {path}: its last {dropped_bytes} bytes are no whole line, and are left out", file=sys.stderr
            )
        _drop_damaged_lines(path, resumed_step)
        if comes_otherwise and not resumed_step:
            _drop_behind(path, -1)
        self._last_written = max((line["step"] for line in read_metrics(path)), default=-1)
        self._counted_on = -1
        """The newest line that this run has written, or found there in its turn: an earlier start may have gone on."""

    @property
    def name(self) -> str:
        """Lightning asks for it."""
        return "metrics"

    @property
    def version(self) -> str:
        """Lightning asks for it."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml is their record."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds ``metrics`` to the line of ``step``; a new step writes the line before it.

        What comes under another number than the Trainer's is for the other loggers: it would end the line too early.
        """
        assert step is not None, "figures are recorded under a step"
        if self.trainer and step != self.trainer.global_step:
            return
        if step != self._step:
            self._write()
            self._step = step
        self._figures |= {name: float(value) for name, value in metrics.items()}

    def save(self) -> None:
        """Has the lines that are written on the disk, for the checkpoint that is to follow; the open one is in that."""
        if self._is_synced:
            return
        try:
            sync_file(self.path)
            self._is_synced = True
        except OSError as error:
            self._tell(error)

    def finalize(self, status: str) -> None:
        """Writes what is left, unless the run was cut: then the step is gone on with."""
        if status == "success":
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """The line that is still open, and up to which step the file has to go without it."""
        open_line = {"step": self._step, "figures": dict(self._figures)}
        return {**open_line, "unwritten": dict(self._unwritten), "counted_on": self._counted_on}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the line that was open; says so where the file ends before what was written by then."""
        self._counted_on = state_dict.get("counted_on", -1)  # a state of an earlier version has none
        if self._comes_otherwise and "counted_on" in state_dict:
            _drop_behind(self.path, self._counted_on)
            self._last_written = max((line["step"] for line in read_metrics(self.path)), default=-1)
        if self._last_written < self._counted_on:
            print(
                f"warning: {self.path}: its lines of the steps {self._last_written + 1} to {self._counted_on}, which "
                "the checkpoint counted on, are lost",
                file=sys.stderr,
            )
        self._step, self._figures = state_dict["step"], dict(state_dict["figures"])
        self._unwritten = dict(state_dict["unwritten"])

    def _write(self) -> None:
        if self._step is not None and self._figures:
            figures = {name: _plain(value) for name, value in self._figures.items()}
            self._unwritten[self._step] = json.dumps({"step": self._step, **figures}) + "\n"
        self._step, self._figures = None, {}
        try:
            if self.problem:  # the last try may have left a part of a line, or a whole one
                _drop_torn_line(self.path)
                self._last_written = max((line["step"] for line in read_metrics(self.path)), default=-1)
            self._append([line for step, line in self._unwritten.items() if step > self._last_written])
        except OSError as error:
            self._tell(error)
            return
        self._last_written = max([self._last_written, *self._unwritten])
        self._counted_on = max([self._counted_on, *self._unwritten])
        self._unwritten, self.problem = {}, None

    def _tell(self, error: OSError) -> None:
        if self.problem is None:
            self.problem = f"{self.path} can't be written: {error.strerror or error}"
            tell(f"error: {self.problem}; training goes on, its lines are kept for later")

    def _append(self, lines: list[str]) -> None:
        if lines:
            self._is_synced = False
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                for line in lines:
                    content = line.encode()
                    if file.write(content) != len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; one that is damaged, or still being written, is left out."""
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [line for line in map(_line, whole.split(b"\n")) if line]


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = parse_json(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _drop_damaged_lines(path: Path, resumed_step: int) -> None:
    """Takes out lines that are none, and those after the first of them whose steps are gone through again."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    read = [_line(line) for line in lines]
    if all(read):
        return
    first = read.index(None)
    kept = [
        text for at, (text, line) in enumerate(zip(lines, read, strict=True))
        if line and (at < first or line["step"] < resumed_step)
    ]  # fmt: skip
    print(
        f"warning: {path}: damaged lines ({read.count(None)}, from line {first + 1} on) are left out; those from step "
        f"{resumed_step} on are written again",
        file=sys.stderr,
    )
    _replace(path, kept)


def _drop_behind(path: Path, step: int) -> None:
    """Takes out the lines of the steps behind ``step``: with other settings they come otherwise."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    kept = [text for text in lines if (line := _line(text)) and line["step"] <= step]
    if len(kept) < len(lines):
        print(f"   run  {path}: {len(lines) - len(kept)} lines behind step {max(step, 0)} are written anew", flush=True)
        _replace(path, kept)


def _replace(path: Path, lines: list[bytes]) -> None:
    """Raises SaveError, which is told in one line, where there is no room."""
    try:
        replace_file(path, b"".join(lines))
    except OSError as error:
        raise SaveError(path, error) from error


def _drop_torn_line(path: Path) -> int:
    """Cuts off the part of a line that a kill left at the end; its step comes again. Returns its bytes."""
    content = path.read_bytes() if path.is_file() else b""
    torn_bytes = len(content) - content.rfind(b"\n") - 1
    if torn_bytes:
        os.truncate(path, len(content) - torn_bytes)
    return torn_bytes


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


class TrainMetrics(StepCallback):
    """Loss, perplexity and token accuracy over the steps since the last record; learning rate; gradient norm.

    What is begun, sums and the open line of `MetricsFile`, goes through a checkpoint.
    """

    def __init__(self) -> None:
        self.sums = AnswerSums()
        self.learning_rate = math.nan
        self.last_loss = math.nan
        """The loss that was recorded last, for the progress bar."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over from the module's own logging, which would write the same figures a second time."""
        pl_module.standalone = False  # type: ignore[assignment]
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.trainer = trainer

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Notes the learning rate of this step: behind it, the schedule has moved on."""
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Adds a micro-batch's sums."""
        self.sums.add(outputs)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Records where the log interval ends."""
        if not is_log_step(trainer):
            return
        loss, accuracy = map(float, self.sums.means())
        figures = {
            "train/loss": loss,
            "train/perplexity": math.exp(loss) if loss < 700 else math.inf,
            "train/accuracy": accuracy,
            "train/gradient_norm": float(module.gradient_norm),
            "train/learning_rate": self.learning_rate,
            "train/epoch": trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / trainer.num_training_batches,
        }
        record(trainer, figures)
        self.last_loss = loss
        self.sums.reset()

    def state_dict(self) -> dict[str, float]:
        """The sums so far, as numbers."""
        return self.sums.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the sums of the run that was cut."""
        self.sums.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the open line, and what TensorBoard has of its step."""
        for file in _metrics_files(trainer):
            checkpoint["metrics_line"] = file.state_dict()
        for board in _boards(trainer):
            checkpoint["tensorboard"] = board.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Opens it again."""
        for file in _metrics_files(trainer):
            file.load_state_dict(checkpoint["metrics_line"])
        for board in _boards(trainer):
            if "tensorboard" in checkpoint:  # not where it was switched off then
                board.load_state_dict(checkpoint["tensorboard"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the last line, for those who read the file now."""
        for file in _metrics_files(trainer):
            file.finalize("success")


def _metrics_files(trainer: Trainer) -> list[MetricsFile]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def _boards(trainer: Trainer) -> list[RunTensorBoard]:
    return [logger for logger in trainer.loggers if isinstance(logger, RunTensorBoard)]


class HeldOutMetrics(StepCallback):
    """Records each validation, and sees to one before the first step and one after the last."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the base: a new adapter changes nothing yet."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self._validate(trainer)

    def on_step_end(self, trainer: Trainer, module: Any) -> None:
        """Scores the last state where the validation interval would leave it out."""
        if is_last_step(trainer) and not validation_follows(trainer):
            should_stop = trainer.should_stop
            self._validate(trainer)
            trainer.should_stop = should_stop  # early stopping in the very last step would have it scored once more

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records what the module computed."""
        if trainer.state.fn == "fit":
            figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
            record(trainer, {name: value for name, value in figures.items() if name.startswith("val/")})

    def _validate(self, trainer: Trainer) -> None:
        if not trainer.enable_validation:
            return
        # What Lightning's own training loop does around a validation.
        connector = trainer._logger_connector
        first_iteration = connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        connector._first_loop_iter = first_iteration


def validation_follows(trainer: Trainer) -> bool:
    """Whether the Trainer validates right after the micro-batch that it is ending."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
