"""Owns what is recorded of a run, as Lightning's logger: the truth in three files, and TensorBoard's view of it.

Files hold the steps before the open one. That one's content goes through the checkpoint: a validation in the middle
of a window still adds to the step before it. Knows no model.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from lightning.pytorch.loggers import Logger

from lit_qlora.figures.lines import StepLines
from lit_qlora.figures.samples import table
from lit_qlora.figures.tensorboard import HELD_OUT, Board, Event, figures_events, text_event
from lit_qlora.storage.run import RunFolder

Figures = dict[str, Any]


class _HasSteps(Protocol):
    """Of a Trainer, what says which step is open."""

    @property
    def global_step(self) -> int: ...


class Record(Logger):
    """Writes ``metrics.jsonl``, ``samples.jsonl`` and ``others.jsonl`` of a run, one line per step, no step twice.

    A figure that is not finite is a string. Figures that a callback of the user's own logs under another number than
    the Trainer's step are no part of a step's figures, and stand in ``others.jsonl``.

    Args:
        run: The run folder.
        board: TensorBoard's files; None for none.
    """

    def __init__(self, run: RunFolder, board: Board | None = None) -> None:
        super().__init__()
        self.run, self.board = run, board
        self.trainer: _HasSteps | None = None
        """Whose steps are counted; None: as each call says."""
        self._metrics, self._samples = StepLines(run.metrics), StepLines(run.samples)
        self._others = StepLines(run.others)
        self._step: int | None = None
        self._open = _Step()

    @property
    def name(self) -> str:
        """Lightning asks for it."""
        return "run"

    @property
    def version(self) -> str:
        """Lightning asks for it."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder, for callbacks of the user's own that write files."""
        return str(self.run.path)

    @property
    def problem(self) -> str | None:
        """Why what came last is not in a file; None where all is."""
        found = [part.problem for part in (*self._files(), self.board) if part and part.problem]
        return "; ".join(found) or None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml is their record."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds ``metrics`` to the line of ``step``; a new step writes the lines before it."""
        assert step is not None, "figures are recorded under a step"
        figures = {name: _plain(float(value)) for name, value in metrics.items()}
        self._move_to(self.trainer.global_step if self.trainer else step)
        if self.board:
            self.board.add(figures_events(step, figures), anew=self._open.figures.keys() & figures.keys())
        if step == self._step:
            self._open.figures |= figures
        else:
            self._open.others.append([step, figures])

    def log_samples(self, samples: Figures, step: int) -> None:
        """Records the sample answers of a validation, in the form of `figures.samples`."""
        self._move_to(step)
        if self.board:
            self.board.add(_tables(step, samples), anew=self._open.samples)
        self._open.samples = samples

    def save(self) -> None:
        """Has the written lines on the disk, for a checkpoint that is to follow; the open step is in that."""
        for file in self._files():
            file.write()
            file.sync()
        self._refresh_board()

    def finalize(self, status: str) -> None:
        """Writes what is left, unless the run was cut: a resume continues the step."""
        if status == "success":
            self.close_step()
            self._refresh_board()

    def close_step(self) -> None:
        """Writes the lines of the open step, for those who read the files now."""
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
        """The open step, and up to which step a resume can count on each file."""
        content = self._open
        return {
            "step": self._step, "figures": dict(content.figures), **self._metrics.state_dict(),
            "samples": {"open": dict(content.samples), **self._samples.state_dict()},
            "others": {"open": [*content.others], **self._others.state_dict()},
        }  # fmt: skip

    def go_back(self, state: Mapping[str, Any] | None) -> None:
        """Cuts the files back to a checkpoint, opens its step again, and writes the view anew.

        Args:
            state: `state_dict` of the checkpoint; None without one: the run begins.

        Raises:
            SaveError: A file could not be changed.
        """
        self._metrics.go_back(state)
        for file, name in ((self._samples, "samples"), (self._others, "others")):
            file.go_back(state.get(name) if state else None)  # a state of an earlier version has none
        if state:
            self._step = state["step"]
            samples, others = (state.get(name, {}).get("open", {}) for name in ("samples", "others"))
            self._open = _Step(dict(state["figures"]), dict(samples), [*others])
        self._refresh_board()

    def by_step(self) -> dict[int, Figures]:
        """All figures of all steps, those of the open one and those that found no room included."""
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
        """All that is recorded, as TensorBoard shows it."""
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
    """What a step has so far, for each of the files."""

    figures: Figures = field(default_factory=dict)
    samples: Figures = field(default_factory=dict)
    others: list[Any] = field(default_factory=list)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _tables(step: int, samples: Mapping[str, Any]) -> list[Event]:
    shown = table(samples)
    return [text_event(HELD_OUT, step, "samples", shown)] if shown else []
