"""Owns TensorBoard's file of a run, right in the run folder: a view of what is recorded, written anew by each start.

TensorBoard's own record format and protocol buffers, without the writer thread of its ``SummaryWriter``: an error
comes back at once, and TensorFlow, where it is installed, is not imported. Knows which events, not which figures.
"""

import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_qlora.console import tell

PATTERN = "events.out.tfevents.*"
_ASIDE = ".events.tmp"
Event = Any
"""A protocol buffer of TensorBoard; the package is imported where one is made."""


def figures_event(step: int, figures: Mapping[str, float | str]) -> Event:
    """One event with all ``figures`` of a step; those that are not finite may be strings."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return _event(step, [Summary.Value(tag=name, simple_value=float(value)) for name, value in figures.items()])


def text_event(step: int, tag: str, text: str) -> Event:
    """One event with a text in Markdown, for the page of texts."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.text import metadata

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
    about = metadata.create_summary_metadata(display_name=None, description=None)
    return _event(step, [Summary.Value(tag=f"{tag}/text_summary", metadata=about, tensor=tensor)])


class EventFile:
    """The view of a run. It is stale until `refresh`, and again once something could not be written.

    Args:
        folder: The run folder. Event files in it, of earlier starts, make way for this one's.
        config: The run's configuration, shown as a text.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.folder = folder
        self._config = config
        self._earlier = [*folder.glob(PATTERN)]
        self._path: Path | None = None
        self._is_stale, self._is_doubled = True, False
        self.problem: str | None = None
        """Why the file lacks what came last; None where it has it."""

    def add(self, events: Iterable[Event], anew: Collection[str] = ()) -> None:
        """Appends ``events``; not to a stale file, which `refresh` writes anew with them.

        Args:
            events: What came.
            anew: What of it takes the place of something that the file has already: two validations of one step.
        """
        if self._is_stale or self._path is None:
            return
        self._is_doubled |= bool(anew)
        try:
            _append(self._path, events)
        except OSError as error:  # what is torn now is the last in a file that is written anew
            self._fail(error)

    def refresh(self, events: Callable[[], Iterable[Event]]) -> None:
        """Writes the file anew, where it is stale, with all ``events``: aside, then in place of the earlier ones."""
        if not (self._is_stale or self._is_doubled):
            return
        aside = self.folder / _ASIDE
        try:
            aside.unlink(missing_ok=True)
            _append(aside, self._opening())
            _append(aside, events())
            path = self._new_path()
            aside.rename(path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            self._fail(error)
            return
        self._clear_earlier()
        self._path, self._earlier, self.problem = path, [path], None
        self._is_stale = self._is_doubled = False

    def _clear_earlier(self) -> None:
        """Empties the newest and removes the rest: an open page that reads a file must find it, to go to the next."""
        *old, newest = sorted(self._earlier, key=lambda file: file.name) or [self.folder / _ASIDE]
        with suppress(OSError):
            for file in old:
                file.unlink(missing_ok=True)
            if newest.is_file():
                os.truncate(newest, 0)

    def _opening(self) -> Iterable[Event]:
        """A page that shows an earlier file drops all that it has at the session's start."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        yield Event(wall_time=time.time(), file_version="brain.Event:2")
        yield Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START))
        indented = "".join(f"    {line}\n" for line in self._config.splitlines())
        yield text_event(0, "config", indented)

    def _new_path(self) -> Path:
        """Behind the earlier ones by name, which is the order in which TensorBoard reads: the second stands first."""
        seconds = [int(time.time()), *(int(found) + 1 for file in self._earlier if (found := _second(file)).isdigit())]
        return self.folder / f"events.out.tfevents.{max(seconds)}.{socket.gethostname()}.{os.getpid()}.0"

    def _fail(self, error: OSError) -> None:
        self._is_stale = True
        if self.problem is None:
            self.problem = f"TensorBoard's file in {self.folder} can't be written: {error.strerror or error}"
            tell(f"error: {self.problem}; training goes on, its figures are kept for later")


def _event(step: int, values: list[Any]) -> Event:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Event(wall_time=time.time(), step=step, summary=Summary(value=values))


def _append(path: Path, events: Iterable[Event]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    with path.open("ab") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())


def _second(file: Path) -> str:
    return file.name.removeprefix("events.out.tfevents.").partition(".")[0]
