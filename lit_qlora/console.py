"""Owns what standard output and error do with what the console can't show, and when nobody reads them any more.

Characters outside of the console's encoding are shown by their codes. A terminal that hung up, or a pipe whose reader
has ended (`| tee log`, which a Ctrl-C or a lost line ends too), must not end what is to be saved first. `tell` prints
what comes up in mid-run.
"""

import errno
import io
import os
import sys
from typing import Any


class _Lasting(io.FileIO):
    """Writes on into nothing once nobody reads."""

    gone: tuple[int, ...] = (errno.EIO, errno.EPIPE)
    """EIO is a terminal's that hung up."""

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


class _WithReader(_Lasting):
    """Says when its reader has read enough."""

    gone = (errno.EIO,)


def take_names_as_utf8() -> None:
    """Starts this process anew where Python would take names and options for ASCII, as with LC_ALL=C PYTHONUTF8=0.

    What is shown stays in the console's encoding.
    """
    if sys.getfilesystemencoding() == "ascii" and os.name != "nt":
        os.environ.setdefault("PYTHONIOENCODING", "ascii")
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def prepare(answers: bool = False) -> None:
    """Prepares standard output and error of this process; of a command that ``answers``, a reader may have enough."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if type(stream) is io.TextIOWrapper and os.name != "nt":
            setattr(sys, name, _lasting(stream, _WithReader if answers and name == "stdout" else _Lasting))


def _lasting(stream: io.TextIOWrapper, kind: type[_Lasting]) -> io.TextIOWrapper:
    raw = getattr(stream.buffer, "raw", stream.buffer)  # with python -u nothing is in between
    if type(raw) is not io.FileIO:
        return stream
    stream.flush()
    lasting: Any = kind(raw.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        lasting if raw is stream.buffer else io.BufferedWriter(lasting),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def tell(line: str) -> None:
    """Prints ``line`` on standard error, above a progress bar: what comes up in mid-run, while training continues."""
    from tqdm import tqdm  # here: --help needs none

    tqdm.write(line, file=sys.stderr)
