"""Owns TensorBoard's files of a run: a view of what is recorded, written anew by each start.

A folder for each line of a chart, `FOLDERS`, for TensorBoard takes folders for runs, and draws one tag of several runs
into one chart: ``--logdir runs`` shows them as ``NAME/training`` and ``NAME/held-out``. Groups of tags are numbered,
since TensorBoard sorts them: the loss comes first. TensorBoard's own record format and protocol buffers, without the
writer thread of its ``SummaryWriter``: an error comes back at once, and TensorFlow, where it is installed, is not
imported.
"""

import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from lit_qlora.console import note
from lit_qlora.metrics import METRICS, held_out, is_better, is_held_out
from lit_qlora.storage.run import EVENTS_START

TRAINING_FOLDER, HELD_OUT_FOLDER, FORECAST_FOLDER = FOLDERS = ("training", "held-out", "forecast")
"""Folders in the run folder, one for each line of a chart."""

SETTINGS = (
    "model.base", "data.source", "model.rank", "model.alpha", "model.dropout", "model.target_modules",
    "model.learning_rate", "model.schedule", "model.warmup_ratio", "model.optimizer", "model.weight_decay",
    "data.batch_size", "data.batch_tokens", "trainer.accumulate_grad_batches", "data.max_length", "data.packing",
    "trainer.max_epochs", "trainer.max_steps", "trainer.precision", "seed_everything",
)  # fmt: skip
"""Options that the page HPARAMS shows: the same of each run, or it would not compare them."""

_ASIDE = ".events.tmp"


class Event(NamedTuple):
    """A protocol buffer of TensorBoard, ``content``, the ``part`` of the run that it is shown in, and all ``figures``
    that were recorded with those it shows.
    """

    part: str
    content: Any
    figures: Mapping[str, Any] = {}


def figures_events(step: int, figures: Mapping[str, float | str]) -> list[Event]:
    """An event for each part that figures of a step are shown in.

    Args:
        step: optimizer step.
        figures: by their recorded names; those that are not finite may be strings.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    values: dict[str, list[Any]] = {}
    for name, value in figures.items():
        part, tag = _place(name)
        values.setdefault(part, []).append(Summary.Value(tag=tag, simple_value=float(value)))
    return [_event(part, step, found)._replace(figures=figures) for part, found in values.items()]


def text_event(part: str, step: int, tag: str, text: str) -> Event:
    """An event with a text, for the page of texts.

    Args:
        part: one of `FOLDERS`.
        step: optimizer step.
        tag: name on the page.
        text: Markdown.
    """
    from tensorboard.plugins.text.summary_v2 import text_pb

    return _event(part, step, [*text_pb(f"{tag}/text_summary", text).value])


class Board:
    """The view of a run. It is stale until `refresh`, and after a failed write.

    Args:
        folder: The run folder. Event files of earlier starts make way for this one's.
        config: The run's configuration, shown as a text.
        settings: Its options by their dotted names, for the page HPARAMS.
    """

    def __init__(self, folder: Path, config: str, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._config, self._settings = config, settings
        self._files = {part: sorted((folder / part).glob(f"{EVENTS_START}*")) for part in FOLDERS}
        """Event files of earlier starts by part; after `refresh`, the one of this start."""
        self._is_stale, self._is_doubled = True, False
        self._best: Mapping[str, Any] = {}
        self.problem: str | None = None
        """Why the files lack what came last; None where they have it."""

    def add(self, events: Iterable[Event], anew: Collection[str] = ()) -> None:
        """Appends ``events``; not to stale files, which `refresh` writes anew with them.

        Args:
            events: The new events.
            anew: What of it takes the place of something that a file has already: two validations of one step.
        """
        if self._is_stale:
            return
        self._is_doubled |= bool(anew)
        try:
            for event in self._with_best(events):
                files, contents = self._files[event.part], [event.content]
                if not files:
                    files.append(self._new_path(event.part))
                    contents = [*_opening(), *contents]
                with files[-1].open("ab") as file:
                    _write(file, contents)
        except OSError as error:  # only the end of a file that will be rewritten can be torn
            self._fail(error)

    def refresh(self, events: Callable[[], Iterable[Event]]) -> None:
        """Writes stale files anew with all ``events``: aside, then in place of the earlier ones."""
        if not (self._is_stale or self._is_doubled):
            return
        self._best = {}
        asides = {part: self.folder / f"{_ASIDE}.{part}" for part in FOLDERS}
        try:
            for aside in asides.values():
                aside.unlink(missing_ok=True)
            with ExitStack() as stack:
                files: dict[str, IO[bytes]] = {}
                for event in self._with_best(chain(self._about(), events())):
                    if event.part not in files:
                        files[event.part] = stack.enter_context(asides[event.part].open("wb"))
                        _write(files[event.part], _opening())
                    _write(files[event.part], [event.content])
            paths = {part: self._new_path(part) for part in files}
            for part, path in paths.items():
                asides[part].rename(path)
        except OSError as error:
            for aside in asides.values():
                with suppress(OSError):
                    aside.unlink(missing_ok=True)
            self._fail(error)
            return
        self._clear_earlier()
        self._files = {part: [paths[part]] if part in paths else [] for part in FOLDERS}
        self._is_stale, self._is_doubled, self.problem = False, False, None

    def _with_best(self, events: Iterable[Event]) -> Iterator[Event]:
        """``events``, and behind each validation that is the best so far its figures once more, as the result."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        tags = _best_tags()
        for event in events:
            yield event
            if event.content.step and is_better(event.figures, self._best):
                self._best = event.figures
                found = {tags[name]: float(value) for name, value in event.figures.items() if name in tags}
                best = [Summary.Value(tag=tag, simple_value=value) for tag, value in found.items()]
                yield _event(TRAINING_FOLDER, event.content.step, best)

    def _clear_earlier(self) -> None:
        """Empty the newest and remove the rest: an open page must find the file that it reads to go to the next."""
        for *old, newest in filter(None, self._files.values()):
            with suppress(OSError):
                for file in old:
                    file.unlink(missing_ok=True)
                os.truncate(newest, 0)

    def _about(self) -> Iterator[Event]:
        """What the run is: its configuration as a text, and for the page HPARAMS."""
        indented = "".join(f"    {line}\n" for line in self._config.splitlines())
        yield text_event(TRAINING_FOLDER, 0, "config", indented)
        yield from _hyper_parameters(self._settings)

    def _new_path(self, part: str) -> Path:
        """A file in the part's folder whose name sorts after the earlier ones, the order in which TensorBoard reads."""
        (self.folder / part).mkdir(exist_ok=True)
        earlier = (file.name.removeprefix(EVENTS_START).partition(".")[0] for file in self._files[part])
        seconds = [int(time.time()), *(int(found) + 1 for found in earlier if found.isdigit())]
        return self.folder / part / f"{EVENTS_START}{max(seconds)}.{socket.gethostname()}.{os.getpid()}.0"

    def _fail(self, error: OSError) -> None:
        self._is_stale = True
        if self.problem is None:
            self.problem = f"TensorBoard's files in {self.folder} can't be written: {error.strerror or error}"
            note(f"error: {self.problem}; training continues, its figures are kept for later")


def _place(name: str) -> tuple[str, str]:
    """Part and tag of the figure ``name``: its own, that of sample answers, or as it is called."""
    if name.startswith("samples/"):
        return HELD_OUT_FOLDER, f"6 Sample answers/{name.removeprefix('samples/').replace('_', ' ')}"
    part = HELD_OUT_FOLDER if is_held_out(name) else TRAINING_FOLDER
    part = FORECAST_FOLDER if name.startswith("memory/predicted_") else part
    return part, (METRICS[name].tag if name in METRICS else "") or name


def _best_tags() -> dict[str, str]:
    """Tags of the best validation so far, whose last value is the run's result: the page HPARAMS compares by them."""
    return {name: f"7 Best adapter/held-out {name.removeprefix('val/')}" for name in held_out()}


def _hyper_parameters(settings: Mapping[str, Any]) -> Iterator[Event]:
    """What the page HPARAMS has of a run: its settings, and the tags of its result."""
    from tensorboard.plugins.hparams.summary_v2 import Discrete, HParam, Metric, hparams_config_pb, hparams_pb

    given = {name: settings.get(name) for name in SETTINGS}
    kinds = {name: float if type(value) in (int, float) else str for name, value in given.items()}
    columns = [HParam(name, Discrete([], dtype=kind)) for name, kind in kinds.items()]
    metrics = [Metric(tag, display_name=tag.partition("/")[2]) for tag in _best_tags().values()]
    values = {name: kinds[name](value) for name, value in given.items() if value is not None}
    # Without a trial of its own, a run would share one with each of the same settings.
    for summary in (hparams_config_pb(columns, metrics, 0), hparams_pb(values, trial_id="", start_time_secs=0)):
        yield _event(TRAINING_FOLDER, 0, [*summary.value])


def _opening() -> Iterator[Any]:
    """An event that makes an open page discard what it has of earlier files."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    yield Event(wall_time=time.time(), file_version="brain.Event:2")
    yield Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START))


def _event(part: str, step: int, values: list[Any]) -> Event:
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Event(part, event_pb2.Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def _write(file: IO[bytes], contents: Iterable[Any]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    for content in contents:
        RecordWriter(file).write(content.SerializeToString())
