"""Owns the TensorBoard files of a run: right in the run folder, going on without a gap or a doubled step.

Knows which files, not which figures.
"""

import os
import sys
import threading
import time
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from lit_qlora.callbacks.tell import tell


class RunTensorBoard(TensorBoardLogger):
    """Writes into ``run``; what an earlier process wrote from the checkpoint on is dropped from view.

    A checkpoint holds all that came with the newest step that was flushed, and after it. That is dropped and written
    again, for the earlier process may have come so far, or further, or not. Without a checkpoint, all is dropped.

    Where something can't be written, that is told once, the file is cut back to what was flushed, and a new one is
    begun with what was kept, as soon as a save finds room.
    """

    def __init__(self, run: Path, config_text: str, resumed_step: int | None) -> None:
        # Where TensorFlow is installed, as on Colab, TensorBoard would import it, for seconds and pages.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
        _silence_writer_thread()
        # A run killed before its first save has written steps, too.
        super().__init__(save_dir=run, name="", version="", purge_step=resumed_step or 0)
        self._run = run
        self.config_text = config_text
        self._is_fresh = resumed_step is None
        self._recent: list[dict[str, Any]] = []
        """All that came with the newest step that was flushed, and after it."""
        self._num_flushed = 0
        """Of those."""
        self._sound_bytes = 0
        """Of the file that is open: those that were flushed."""
        self._is_begun = self._is_broken = False
        self.problem: str | None = None
        """Why what came last is not in a file."""

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer, once there was something to write; else None.

        Lightning asks for it before the checkpoint is loaded that says what to drop, and minds no full disk.
        """
        return super().experiment if self._is_begun else None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Adds figures; the configuration comes with the first."""
        if self._is_fresh:
            self._is_fresh = False
            indented = "".join(f"    {line}\n" for line in self.config_text.splitlines())
            self.add_text("config", indented, 0)
        assert step is not None, "figures are recorded under a step"
        figures = {name: float(value) for name, value in metrics.items()}
        self._add({"step": step, "at_s": time.time(), "figures": figures, "texts": {}})

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Adds a text, in Markdown."""
        self._add({"step": step, "at_s": time.time(), "figures": {}, "texts": {tag: text}})

    def state_dict(self) -> dict[str, Any]:
        """What may not be in a file by the time that the run goes on, or may have come twice."""
        return {"recent": [dict(one) for one in self._recent]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adds it again, in place of what stands there; to be called before anything else is added."""
        recent = state_dict.get("recent", [])  # a state of an earlier version has none
        self._kwargs["purge_step"] = min([self._kwargs["purge_step"], *(one["step"] for one in recent)])
        for one in recent:
            self._add(one)

    def save(self) -> None:
        """Flushes; Lightning's own would also leave an hparams.yaml, and config.yaml is the record."""
        if self._is_broken:
            self._is_broken = False
            for one in self._recent[self._num_flushed :]:
                self._try(lambda one=one: self._put(one))  # type: ignore[misc]
        self._try(self._flush)

    def finalize(self, status: str) -> None:
        """Closes the file."""
        self.save()
        if self._experiment is not None:
            self._try(self._experiment.close)
            self._sound_bytes = 0  # of the next file, if there is one

    def _add(self, one: dict[str, Any]) -> None:
        self._recent.append(one)
        self._try(lambda: self._put(one))

    def _put(self, one: dict[str, Any]) -> None:
        for name, value in one["figures"].items():
            self.experiment.add_scalar(name, value, one["step"], one["at_s"])
        for tag, text in one["texts"].items():
            self.experiment.add_text(tag, text, one["step"], one["at_s"])

    def _flush(self) -> None:
        self.experiment.flush()
        file = self._file()
        if file:
            self._sound_bytes = file.stat().st_size
        self._kwargs.pop("purge_step", None)  # it stands in the file by now, and is not to come again
        self._recent = [one for one in self._recent if one["step"] == self._recent[-1]["step"]]
        self._num_flushed, self.problem = len(self._recent), None

    def _file(self) -> Path | None:
        writer = self.experiment.file_writer  # none once it is closed
        return Path(writer.event_writer._file_name) if writer else None

    def _try(self, write: Callable[[], None]) -> None:
        if self._is_broken:
            return
        self._is_begun = True
        before = {*self._run.glob("events.out.tfevents.*")}
        if self._experiment is None:
            _wait_for_a_later_name(before)
        try:
            write()
        except OSError as error:
            self._is_broken = True
            self._leave_file(before)
            if self.problem is None:
                self.problem = f"TensorBoard's file in {self.save_dir} can't be written: {error.strerror or error}"
                tell(f"error: {self.problem}; training goes on, its figures are kept for later")

    def _leave_file(self, before: set[Path]) -> None:
        """Cuts the file back to what was flushed; what is behind that comes in a new one, and once only."""
        with suppress(OSError):
            if self._experiment is None:  # a file that could not even be begun
                for file in {*self._run.glob("events.out.tfevents.*")} - before:
                    file.unlink()
                return
            left = self._file()
            with suppress(OSError):
                self._experiment.close()
            self._experiment = None
            if left and self._sound_bytes:
                os.truncate(left, self._sound_bytes)
            elif left:
                left.unlink()
            self._sound_bytes = 0


def _silence_writer_thread() -> None:
    """TensorBoard writes in a thread, whose error comes back at the next call; its own traceback is too many."""
    others = threading.excepthook
    if getattr(others, "__name__", "") == "all_but_writer":
        return

    def all_but_writer(args: Any) -> None:
        if not (type(args.thread).__name__ == "_AsyncWriterThread" and isinstance(args.exc_value, OSError)):
            others(args)

    threading.excepthook = all_but_writer


def _wait_for_a_later_name(files: set[Path]) -> None:
    """Until a new file stands behind ``files``: TensorBoard reads them by name, in which there is the second."""
    seconds = {file.name.split(".")[3] for file in files}
    while str(int(time.time())) in seconds:
        time.sleep(0.02)
