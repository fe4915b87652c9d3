"""Nothing that is printed ends a command: neither what the console can't show, nor a console that is gone."""

import io
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lit_qlora.console import _in_lines, bars, bars_of_transformers, complain, counted, note, passing_bar, progress_bar
from lit_qlora.errors import UserError

ROOT = Path(__file__).parents[1]
PRINTS = """
import sys
from lit_qlora.console import prepare
prepare()
print("läuft: 中 \\udcff")
print("läuft: 中 \\udcff", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("cp1252", b"l\xe4uft: \\u4e2d \\udcff"),
        ("cp1252:strict", b"l\xe4uft: \\u4e2d \\udcff"),
        ("ascii", b"l\\xe4uft: \\u4e2d \\udcff"),
        ("utf-8", "läuft: 中 \\udcff".encode()),
    ],
)
def test_characters_outside_of_the_encoding_are_shown_by_their_codes(encoding: str, shown: bytes) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", PRINTS], cwd=ROOT, capture_output=True, env=environment, check=True)
    assert done.stdout == done.stderr == shown + b"\n"


GOES_ON = """
import os, sys, time
from lit_qlora.console import prepare
prepare({arguments})
sys.stdin.readline()
print("a line", flush=True)
print("a line", file=sys.stderr, flush=True)
print("another", flush=True)
os.write({done}, b"to the end")
"""


@pytest.mark.parametrize("options", [[], ["-u"]])
@pytest.mark.parametrize(("arguments", "end"), [("", b"to the end"), ("answers=True", b"")])
def test_a_reader_that_is_gone_ends_nothing_but_an_answer(options: list[str], arguments: str, end: bytes) -> None:
    reads, done = os.pipe()
    process = subprocess.Popen(
        [sys.executable, *options, "-c", GOES_ON.format(arguments=arguments, done=done)],
        cwd=ROOT, pass_fds=[done], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    process.wait(20)
    os.close(done)
    with os.fdopen(reads, "rb") as pipe:
        assert pipe.read() == end


@pytest.mark.parametrize("arguments", ["", "answers=True"])
def test_a_terminal_that_hangs_up_ends_nothing(arguments: str) -> None:
    reads, done = os.pipe()
    terminal, own = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", GOES_ON.format(arguments=arguments, done=done)],
        cwd=ROOT, pass_fds=[done], stdin=subprocess.PIPE, stdout=own, stderr=own,
    )  # fmt: skip
    assert process.stdin
    os.close(own)
    os.close(terminal)
    process.stdin.close()
    assert process.wait(20) == 0
    os.close(done)
    with os.fdopen(reads, "rb") as pipe:
        assert pipe.read() == b"to the end"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_moves_fits_and_is_gone_and_without_a_terminal_there_is_none(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = bars("load", leave=False)
        assert list(bar(["a", "b"], desc="Loading weights", name="of a library", mininterval=0)) == ["a", "b"]
        shown = [part for part in stream.getvalue().split("\r") if part]
        assert bool(shown) == stream.isatty()
        if shown:
            assert shown[0].startswith("load:   0%|") and "| 0/2 [" in shown[0]
            assert max(map(len, shown)) <= 80 and not shown[-1].strip()


def test_all_bars_share_one_thread(monkeypatch):
    """tqdm's watch over bars that stand still; a validation makes a bar, and a run thousands of them."""
    from transformers.utils import logging

    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        progress_bar("validate").close()
        before = threading.active_count()
        with bars_of_transformers():
            logging.tqdm(total=3).close()
        bars("download")(total=3).close()
        progress_bar("validate").close()
        assert threading.active_count() == before


def test_rows_are_counted_once_that_takes_long(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(counted("encode", iter("abc"), 3)) == ["a", "b", "c"]
    assert sys.stderr.getvalue().strip() == ""


def test_a_passing_bar_shows_what_takes_over_a_second_and_is_gone(monkeypatch):
    clock = [1000.0]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", Terminal())
    with passing_bar("answers", 40, " tokens") as move:
        move(10)
        assert sys.stderr.getvalue() == ""
        clock[0] += 2
        move(25)
        assert "answers:  62%|" in sys.stderr.getvalue() and "25/40" in sys.stderr.getvalue()
    assert not sys.stderr.getvalue().split("\r")[-2].strip()


def test_transformers_own_bars_are_ours(monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(sys, "stderr", Terminal())
    with bars_of_transformers():
        bar = logging.tqdm(total=3, desc="Loading weights")
        assert bar.desc == "load" and bar.delay == 1 and not bar.leave
        bar.close()
    before = logging.set_tqdm_hook(None)
    assert before is None


def test_a_command_that_converts_a_file_stays_on_one_line():
    command = "iconv -f UTF-16 -t UTF-8 rows.csv > rows-utf8.csv"
    assert _in_lines(f"save it again as UTF-8 ({command})", 60, 4) == f"save it again as UTF-8\n    ({command})"


LONG = UserError(
    "no such file, and it is no name that a dataset of the hub could have",
    place="my rows/of two years/conversations.jsonl",
    remedy="give --data.source FILE to python main.py fit --config colab_t4 --run mine, or leave 'it all' out",
)


def test_an_error_is_wrapped_at_words_for_a_terminal_alone(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    complain(LONG, "error: ")
    assert sys.stderr.getvalue() == f"error: {LONG}\n"
    monkeypatch.setattr(sys, "stderr", Terminal())
    complain(LONG, "error: ")
    assert sys.stderr.getvalue() == (
        "error: my rows/of two years/conversations.jsonl: no such\n"
        "       file, and it is no name that a dataset of the hub\n"
        "       could have\n"
        "    -> give --data.source FILE to\n"
        "       python main.py fit --config colab_t4 --run mine, or\n"
        "       leave 'it all' out\n"
    )


@pytest.mark.parametrize("columns", ["20", "80", "200", "1000"])
def test_what_is_to_be_copied_is_on_one_line_however_narrow(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stderr", Terminal())
    complain(LONG, "error: ")
    lines = sys.stderr.getvalue().splitlines()
    for whole in (LONG.place, "--data.source FILE", "python main.py fit --config colab_t4 --run mine", "'it all'"):
        assert any(whole in line for line in lines)
    assert len(lines) == 1 if columns == "1000" else lines[0].startswith("error:") and len(lines) > 1
    assert all(line.startswith(("       ", "    -> ")) for line in lines[1:])


def test_what_fits_stays_on_one_line_and_a_long_quotation_breaks(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", Terminal())
    complain(UserError("no", option="a", remedy="b"), "error: ")
    note(f"warning: expected a number, got '{'far too long ' * 12}'")
    complain("process 1 of 2:\n" + "Traceback " * 20)
    lines = sys.stderr.getvalue().splitlines()
    assert lines[0] == "error: a: no; b" and lines[-2:] == ["process 1 of 2:", "Traceback " * 20]
    assert max(map(len, lines[1:-2])) <= 80 and len(lines[1:-2]) == 3 and lines[2].startswith("         long far ")


@pytest.mark.parametrize(("is_terminal", "loaded", "shown"), [(True, False, 1), (False, False, 0), (True, True, 0)])
def test_what_takes_the_first_seconds_is_named_on_a_terminal(is_terminal, loaded, shown, monkeypatch, capsys):
    from lit_qlora import chosen

    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    if not loaded:
        monkeypatch.delitem(sys.modules, "lightning", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "lightning", sys)
    chosen._say_imports()
    out, err = capsys.readouterr()
    assert out == "" and err.count("  load  PyTorch, Lightning and transformers: some seconds\n") == shown
