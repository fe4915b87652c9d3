"""Owns the record of a run, as Lightning's logger: the truth in three files, and TensorBoard's view of it.

Files hold the steps before the open one, whose content goes through the checkpoint: a validation in the middle of a
window still adds to the step before it. Knows no model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lit_qlora.figures.lines import StepLines, json_number
from lit_qlora.figures.samples import table
from lit_qlora.figures.tensorboard import HELD_OUT_FOLDER, Board, Event, figures_events, text_event
from lit_qlora.storage.run import RunFolder

Figures = dict[str, Any]


class Record(Logger):
    """A logger of ``metrics.jsonl``, ``samples.jsonl`` and ``others.jsonl`` of a run, one line per step, no step twice.

    A figure that is not finite is a string. Figures that a user's own callback logs under a number other than the
    Trainer's step go to ``others.jsonl``.

    Args:
        run: The run folder.
        board: TensorBoard's files; None for none.
    """

    def __init__(self, run: RunFolder, board: Board | None = None) -> None:
        super().__init__()
        self.run, self.board = run, board
        self.trainer: Trainer | None = None
        """Source of the step; None: that of each call."""
        self._metrics, self._samples = StepLines(run.metrics), StepLines(run.samples)
        self._others = StepLines(run.others)
        self._step: int | None = None
        self._open = _Step()

    @property
    def name(self) -> str:
        """Required by Lightning."""
        return "run"

    @property
    def version(self) -> str:
        """Required by Lightning."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder, for a user's own callbacks that write files."""
        return str(self.run.path)

    @property
    def problem(self) -> str | None:
        """Why the newest entries are not in a file; None if all are."""
        found = [part.problem for part in (*self._files(), self.board) if part and part.problem]
        return "; ".join(found) or None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's config.yaml is their record."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add figures to the line of a step; a new step writes the lines before it.

        Args:
            metrics: figures by name.
            step: the Trainer's number of optimizer steps; figures under any other number go to ``others.jsonl``.
        """
        assert step is not None, "figures are recorded under a step"
        figures = {name: json_number(float(value)) for name, value in metrics.items()}
        self._move_to(self.trainer.global_step if self.trainer else step)
        if self.board:
            self.board.add(figures_events(step, figures), anew=self._open.figures.keys() & figures.keys())
        if step == self._step:
            self._open.figures |= figures
        else:
            self._open.others.append([step, figures])

    def log_samples(self, samples: Figures, step: int) -> None:
        """Record the sample answers of a validation.

        Args:
            samples: in the form of `figures.samples.samples_line`.
            step: optimizer steps done.
        """
        self._move_to(step)
        if self.board:
            self.board.add(_tables(step, samples), anew=self._open.samples)
        self._open.samples = samples

    def save(self) -> None:
        """Sync the written lines to the disk, before a checkpoint, which holds the open step."""
        for file in self._files():
            file.write()
            file.sync()
        self._refresh_board()

    def finalize(self, status: str) -> None:
        """Write the open step, unless the run was interrupted: a resume continues it."""
        if status == "success":
            self.close_step()
            self._refresh_board()

    def close_step(self) -> None:
        """Write the lines of the open step, for readers of the files."""
        if self._step is None:
            return
        step, content = self._step, self._open
        self._step, self._open = None, _Step()
        for file, line in (
            (self._metrics, content.figures), (self._samples, content.samples),
            (self._others, {"figures": content.others} if content.others else {}),
        ):  # fmt: skip
            if line:
                file.add(step, line)
            else:
                file.write()

    def state_dict(self) -> dict[str, Any]:
        """The open step, and the step up to which a resume can rely on each file."""
        content = self._open
        return {
            "step": self._step, "figures": dict(content.figures), **self._metrics.state_dict(),
            "samples": {"open": dict(content.samples), **self._samples.state_dict()},
            "others": {"open": [*content.others], **self._others.state_dict()},
        }  # fmt: skip

    def go_back(self, state: Mapping[str, Any] | None) -> None:
        """Cut the files back to a checkpoint, reopen its step, and rewrite the view.

        Args:
            state: `state_dict` of the checkpoint; None at the start of a run.

        Raises:
            SaveError: A file could not be changed.
        """
        self._metrics.go_back(state)
        self._samples.go_back(state and state["samples"])
        self._others.go_back(state and state["others"])
        if state:
            self._step = state["step"]
            self._open = _Step(dict(state["figures"]), dict(state["samples"]["open"]), [*state["others"]["open"]])
        self._refresh_board()

    def by_step(self) -> dict[int, Figures]:
        """All figures of all steps, with the open one and those not written yet."""
        found = {line["step"]: line for line in self._metrics.read()}
        if self._step is not None and self._open.figures:
            found[self._step] = {"step": self._step, **self._open.figures}
        return found

    def _files(self) -> tuple[StepLines, ...]:
        return self._metrics, self._samples, self._others

    def _move_to(self, step: int) -> None:
        if step != self._step:
            self.close_step()
            self._step = step

    def _refresh_board(self) -> None:
        if self.board:
            self.board.refresh(self._events)

    def _events(self) -> Iterator[Event]:
        """Everything recorded, as TensorBoard events."""
        step, content = self._step or 0, self._open
        for line in chain(self._metrics.read(), [{"step": step, **content.figures}]):
            yield from figures_events(line["step"], {name: value for name, value in line.items() if name != "step"})
        for line in chain(self._samples.read(), [{"step": step, **content.samples}]):
            yield from _tables(line["step"], line)
        for others in chain((line["figures"] for line in self._others.read()), [content.others]):
            for count, figures in others:
                yield from figures_events(count, figures)


@dataclass
class _Step:
    """The entries of a step so far, for each of the files."""

    figures: Figures = field(default_factory=dict)
    samples: Figures = field(default_factory=dict)
    others: list[Any] = field(default_factory=list)


def _tables(step: int, samples: Mapping[str, Any]) -> list[Event]:
    shown = table(samples)
    return [text_event(HELD_OUT_FOLDER, step, "samples", shown)] if shown else []
