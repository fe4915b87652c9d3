"""Owns what is printed: lines within a terminal's width, errors and warnings, progress bars, and both output streams.

Characters outside of the console's encoding are shown by their codes. A terminal that hung up, or a pipe whose reader
has ended (`| tee log`, which a Ctrl-C or a lost connection ends too), must not end a run before it is saved. `note`
prints messages during a run, `complain` errors and warnings, `progress_bar` and its kin make bars. Errors and warnings
are wrapped for a terminal alone: a file or another program gets them whole, one per line.
"""

import errno
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from shutil import get_terminal_size
from typing import Any, TextIO, TypeVar

from lit_qlora.errors import UserError
from lit_qlora.place import COMMAND

T = TypeVar("T")

WIDTH = 80
"""Columns that a terminal has at least: nothing that a run prints is wider, but for the user's own paths."""
ROOM = 3
"""Columns behind a progress bar, for the ``^C`` that a terminal writes there: a longer line would wrap."""

REMEDY_MARK = "    -> "
"""What a remedy on a line of its own begins with; texts of errors are indented as much."""

QUOTED = r"""(?<![\w'])'[^']*'(?![\w'])|(?<![\w"])"[^"]*"(?![\w"])"""
OPTION = rf"--[\w.]+\+?(?:[= ](?!-)(?:{QUOTED}|[^\s;,)]+))?"
COMMANDS = rf"(?:{re.escape(COMMAND)}|pip install)(?: (?!-)[\w./\[\]-]+)?(?: {OPTION}| -\w [\w./-]+)*|{OPTION}"
UNBROKEN = re.compile(rf"(?P<command>{COMMANDS}|iconv [^;()]+ > \S+(?<!\)))|{QUOTED}")
"""What stays on one line, to be copied: a command, an option with its value, and what is quoted, if that is short."""


class _Lasting(io.FileIO):
    """A stream that discards output once its reader is gone."""

    gone: Collection[int] = (errno.EIO, errno.EPIPE)
    """Error numbers which mean that the reader is gone; EIO is that of a terminal that hung up."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self.gone:
                raise
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return super().write(data)


def take_names_as_utf8() -> None:
    """Restart this process if Python would decode names and options as ASCII, as with LC_ALL=C PYTHONUTF8=0.

    Output stays in the console's encoding.
    """
    if sys.getfilesystemencoding() == "ascii" and os.name != "nt":
        os.environ.setdefault("PYTHONIOENCODING", "ascii")
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def prepare(answers: bool = False) -> None:
    """Prepare standard output and error of this process; the reader of a command that ``answers`` may leave early."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if type(stream) is io.TextIOWrapper and os.name != "nt":
            setattr(sys, name, _lasting(stream, raises=answers and name == "stdout"))


def _lasting(stream: io.TextIOWrapper, raises: bool) -> io.TextIOWrapper:
    """``stream`` as a `_Lasting` one; with ``raises``, a pipe without a reader is an error."""
    raw = getattr(stream.buffer, "raw", stream.buffer)  # with python -u nothing is in between
    if type(raw) is not io.FileIO:
        return stream
    stream.flush()
    lasting: Any = _Lasting(raw.fileno(), "wb", closefd=False)
    if raises:
        lasting.gone = (errno.EIO,)
    return io.TextIOWrapper(
        lasting if raw is stream.buffer else io.BufferedWriter(lasting),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def progress_bar(label: str, *args: Any, **options: Any) -> Any:
    """A tqdm bar on standard error; hidden unless that is a terminal.

    A library's own label, and its own rule for hiding the bar, are ignored. The class is tqdm's own: for each other one
    tqdm starts a thread, which ends with the process.

    Args:
        label: stands before it.
        *args: as tqdm's.
        **options: as tqdm's.
    """
    from tqdm import tqdm  # here: --help needs none

    size = get_terminal_size()  # tqdm's own guess shows nothing in a terminal without a size
    options |= {"desc": label, "ncols": size.columns - ROOM, "nrows": size.lines, "disable": not sys.stderr.isatty()}
    return tqdm(*args, **{key: value for key, value in options.items() if key != "name"})


def bars(label: str, **always: Any) -> Any:
    """A class whose instances are made by `progress_bar`, for libraries that take no function.

    Args:
        label: stands before a bar.
        **always: options of tqdm's, in place of the library's.
    """
    from tqdm import tqdm  # here: --help needs none

    class Bar(tqdm):  # type: ignore[type-arg]
        def __new__(cls, *args: Any, **options: Any) -> Any:
            return progress_bar(label, *args, **options | always)

    return Bar


def counted(label: str, some: Iterable[T], total: int, unit: str = " rows") -> Iterator[T]:
    """Iterate over things, with a bar once that takes over a second; the bar disappears at the end.

    Args:
        label: stands before the bar.
        some: the things.
        total: their number.
        unit: printed behind a number of them, with a space in front.
    """
    return iter(progress_bar(label, iterable=some, total=total, leave=False, delay=1, unit=unit))


@contextmanager
def passing_bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar for what takes over a second; it disappears at the end.

    It may cover another bar, which must not move meanwhile.

    Args:
        label: stands before it.
        total: the number at its end.
        unit: printed behind the number.

    Yields:
        A function that moves it on to a number.
    """
    bar = progress_bar(label, total=total, leave=False, delay=1, position=0, unit=unit, miniters=1)
    try:
        yield lambda number: bar.update(max(number - bar.n, 0))
    finally:
        bar.close()


@contextmanager
def bars_of_transformers() -> Iterator[None]:
    """Make transformers' bars like ours: called load, shown after a second, gone at the end."""
    from transformers.utils import logging

    def bar(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return progress_bar("load", *args, **options | {"leave": False, "delay": 1})

    before = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def note(line: str) -> None:
    """Print ``line`` on standard error, above a progress bar, while training continues."""
    from tqdm import tqdm  # here: --help needs none

    tqdm.write(fitted(line, sys.stderr), file=sys.stderr)


def complain(what: str | UserError, mark: str = "") -> None:
    """Print an error or a warning on standard error.

    Args:
        what: a line, or an error, whose remedy has a line of its own on a terminal unless all of it fits one.
        mark: stands before it, such as ``error: ``.
    """
    line, error = f"{mark}{what}", what if isinstance(what, UserError) else UserError(str(what))
    shown = fitted(line, sys.stderr, error.place)
    if error.remedy and shown != line:
        problem = fitted(f"{mark}{error.said}", sys.stderr, error.place)
        shown = f"{problem}\n{fitted(f'{REMEDY_MARK}{error.remedy}', sys.stderr)}"
    print(shown, file=sys.stderr, flush=True)


def say(topic: str, text: str) -> None:
    """Print a line of what a run decides or does; one beyond `WIDTH` columns continues below its beginning.

    Args:
        topic: a word, at the right of six columns.
        text: beside it.
    """
    print(wrapped(topic, text), flush=True)


def say_imports(stream: TextIO | None = None) -> None:
    """Print on ``stream`` what takes the first seconds, unless it was imported before, or is missing."""
    if "lightning" not in sys.modules and find_spec("lightning") and find_spec("torch"):
        print("  load  PyTorch, Lightning and transformers: some seconds", file=stream, flush=True)


def fitted(line: str, stream: TextIO | None = None, place: str | None = None) -> str:
    """``line``, continued below its text where a terminal shows it; whole for a file or another program.

    Args:
        line: may begin with a mark, such as ``error: ``.
        stream: where it is printed; default: standard output.
        place: a path in it, which is not broken even at spaces.
    """
    stream = stream or sys.stdout
    columns = get_terminal_size().columns
    if not stream.isatty() or len(line) <= columns or "\n" in line:  # several are another program's
        return line
    mark = re.match(r"(?:error|warning|note): |\s*(?:->|\w+  )\s*", line)
    return _in_lines(line.replace(place, _unbroken(place)) if place else line, columns, len(mark[0]) if mark else 2)


def wrapped(topic: str, text: str) -> str:
    """``topic`` at the right of six columns and ``text`` beside it, in lines of `WIDTH` columns; paths stay whole."""
    return _in_lines(f"{topic:>6}  {text}", WIDTH, 8)


def _in_lines(line: str, columns: int, indent: int) -> str:
    """``line`` in lines of ``columns``, from the second on behind ``indent`` spaces."""
    if len(line) <= columns:
        return line
    line = UNBROKEN.sub(
        lambda found: _unbroken(found[0]) if found["command"] or len(found[0]) <= columns - indent else found[0], line
    )
    lines = textwrap.wrap(line, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def _unbroken(text: str) -> str:
    """``text`` with marks in place of spaces, until it is in lines."""
    return text.replace(" ", "\0")
