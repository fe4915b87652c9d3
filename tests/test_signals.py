"""A signal is one line and 130 or 143, what is open is put right, and one more waits for nothing."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lit_qlora.signals import PATIENT, SIGNALS, hold_off, leave_in_one_line, print_now, say_stopped

ROOT = Path(__file__).parents[1]
CODE = """
import os, signal, time
from lit_qlora.signals import leave_in_one_line
with leave_in_one_line():
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(5)
    finally:
        print("put right", flush=True)
        {more}
        print("to the end", flush=True)
"""


EACH = [
    ("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 143, "SIGTERM"), ("SIGHUP", 129, "SIGHUP"),
    ("SIGUSR1", 128 + signal.SIGUSR1, "SIGUSR1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "status", "said"), EACH)
@pytest.mark.parametrize("again", [False, True])
def test_a_signal(name: str, status: int, said: str, again: bool) -> None:
    more = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)" if again else "pass"
    code = CODE.format(name=name, more=more)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (143 if again else status)
    assert done.stdout == ("put right\n" if again else "put right\nto the end\n")
    assert done.stderr == f"\nstopped by {said}; given again, the same command resumes from what is saved\n"


IMPORTED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)  # as long as an import may take
except BaseException:
    pass  # as some libraries do around what they may do without
print("imported", flush=True)
"""
IMPORTS = """
from lit_qlora.signals import leave_in_one_line, nothing_open
import contextlib, time
with leave_in_one_line():
    try:
        with {around}:
            import imported
        time.sleep(5)
    finally:
        print("put right", flush=True)
"""


@pytest.mark.parametrize(
    ("around", "printed"), [("nothing_open()", ""), ("contextlib.nullcontext()", "imported\nput right\n")]
)
def test_a_signal_within_an_import_is_not_swallowed(tmp_path: Path, around: str, printed: str) -> None:
    (tmp_path / "imported.py").write_text(IMPORTED)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(around=around)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 143
    assert done.stdout == printed
    assert done.stderr == "\nstopped by SIGTERM; given again, the same command resumes from what is saved\n"


@pytest.mark.parametrize("later", ["SIGHUP", "SIGUSR1"])
def test_what_no_person_sends_does_not_hurry_one_that_leaves(later: str) -> None:
    """The end of a session sends SIGTERM, and SIGHUP right after it."""
    code = CODE.format(name="SIGTERM", more=f"os.kill(os.getpid(), signal.{later}); time.sleep(0.1)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "put right\nto the end\n")


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_what_is_ignored_from_the_start_stays_so(name: str) -> None:
    """SIGHUP is so under nohup."""
    code = f"import signal; signal.signal(signal.{name}, signal.SIG_IGN)\n"
    code += CODE.format(name=name, more="pass").replace("time.sleep(5)", "time.sleep(0.1)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "put right\nto the end\n", "")


def test_the_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    assert len(before) == 4
    with leave_in_one_line():
        assert not {*map(id, before)} & {id(signal.getsignal(number)) for number in SIGNALS}
    assert [signal.getsignal(number) for number in SIGNALS] == before


ENDING = """
import os, signal
from lit_qlora.signals import leave_in_one_line
with leave_in_one_line(ends_process={ends}):
    pass
os.kill(os.getpid(), signal.{name})
raise SystemExit(143)
"""


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_the_status_stays_where_signals_still_come_while_python_ends(name: str) -> None:
    code = ENDING.format(ends=True, name=name)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (143, "")


def test_a_process_that_stays_answers_signals_again() -> None:
    code = ENDING.format(ends=False, name="SIGHUP")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGHUP


@pytest.mark.parametrize("number", PATIENT)
def test_signals_are_held_off_until_the_command_ends(number: int) -> None:
    with leave_in_one_line():
        hold_off()
        os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as stop, leave_in_one_line():
        os.kill(os.getpid(), number)
    assert stop.value.code == 128 + number


def test_what_is_said_of_one_command_is_not_said_of_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    with leave_in_one_line(resumes=False):
        say_stopped(signal.SIGINT)
    say_stopped(signal.SIGINT)
    first, second = capsys.readouterr().err.strip().split("\n\n")
    assert first == "stopped by Ctrl-C"
    assert second.startswith("stopped by Ctrl-C; given again")


CHILD = """
import os, signal, subprocess, sys
from lit_qlora.signals import leave_in_one_line, no_signals_for_children
child = "import os, signal; os.kill(os.getpid(), signal.{name}); print('child lives', flush=True)"
with leave_in_one_line():
    try:
        with no_signals_for_children():
            subprocess.run([sys.executable, "-c", child])
            os.kill(os.getpid(), signal.{name})
            print("parent too", flush=True)
        print("for ever", flush=True)
    finally:
        print("blocked:", *signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)
"""


@pytest.mark.parametrize(("name", "status", "said"), EACH)
def test_children_hear_no_signal_and_the_parent_does_once_they_are_there(name: str, status: int, said: str) -> None:
    code = CHILD.format(name=name)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "child lives\nparent too\nblocked:\n")
    assert done.stderr == f"\nstopped by {said}; given again, the same command resumes from what is saved\n"


def test_a_line_at_a_terminal_takes_the_place_of_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = io.StringIO()
    print_now("stopping", stream)
    assert stream.getvalue() == "\nstopping\n"
    monkeypatch.setattr(stream, "isatty", lambda: True)
    print_now("stopping", stream)
    assert stream.getvalue().endswith(f"\n\r{' ' * 19}\rstopping\n")
