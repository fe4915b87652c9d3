"""One process works in a run folder, and no dead one keeps it."""

import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lit_qlora
from lit_qlora.errors import UserError
from lit_qlora.storage import lock
from lit_qlora.storage.lock import RunLock
from tests.expect import check_line

HOLD = """
import os, sys, time
from pathlib import Path
from lit_qlora.storage.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.__enter__()
if "fork" in sys.argv and (child := os.fork()) == 0:
    time.sleep(60)
print(child if "fork" in sys.argv else "held", flush=True)
time.sleep(60)
"""
Hold = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Start another process that holds the lock of a folder."""
    started: list[subprocess.Popen[str]] = []

    def start(run: Path, *words: str) -> tuple["subprocess.Popen[str]", str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run), *words],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(lit_qlora.__file__).parents[1])},
        )
        started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_second_process_is_shown_who_holds_it(tmp_path: Path, hold: Hold) -> None:
    run = tmp_path / "runs" / "x"
    process, _ = hold(run)
    with pytest.raises(UserError) as caught, RunLock(run):
        pytest.fail("two processes hold the lock")
    holder = re.escape(f"{run} is in use by process {process.pid} on {socket.gethostname()} since ")
    assert re.fullmatch(
        holder + r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d: wait for it, stop it, or give another --run",
        str(caught.value),
    )


def test_a_killed_holder_lets_go(tmp_path: Path, hold: Hold) -> None:
    process, _ = hold(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with RunLock(tmp_path):
        text = (tmp_path / ".lock").read_text()
        assert text.startswith(f"process {os.getpid()} on ")
        assert text.count("\n") == 1


def test_a_worker_that_outlives_its_killed_parent_does_not_keep_the_lock(tmp_path: Path, hold: Hold) -> None:
    process, child = hold(tmp_path, "fork")
    try:
        process.kill()
        process.wait()
        os.kill(int(child), 0)  # it lives
        for patience in range(100):  # it lets go once it runs, which a busy machine may put off
            try:
                with RunLock(tmp_path):
                    break
            except UserError:
                assert patience < 99
                time.sleep(0.1)
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_worker_that_ends_does_not_let_go_for_its_parent(tmp_path: Path, hold: Hold) -> None:
    _, child = hold(tmp_path, "fork")
    os.kill(int(child), signal.SIGKILL)
    with pytest.raises(UserError, match="is in use by process"), RunLock(tmp_path):
        pass


def test_it_is_free_after_the_block_however_that_ends(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
            raise ZeroDivisionError
    with RunLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\n", b"\n\n"])
def test_what_is_written_in_the_file_does_not_matter(tmp_path: Path, hold: Hold, text: bytes) -> None:
    (tmp_path / ".lock").write_bytes(text * 100)
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_bytes(text)
        with pytest.raises(UserError, match=r"is in use by .*: wait for it"), RunLock(tmp_path):
            pass


def test_two_runs_do_not_meet(tmp_path: Path, hold: Hold) -> None:
    hold(tmp_path / "a")
    with RunLock(tmp_path / "b"):
        pass


@pytest.mark.parametrize("step", ["open", "flock"])
def test_a_file_that_a_failed_start_removes_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    run, steps = tmp_path / "run", {"open": (Path, Path.open), "flock": (fcntl, fcntl.flock)}
    owner, real = steps[step]

    def remove_first(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, step, real)
        shutil.rmtree(run)
        return real(*args, **options)

    monkeypatch.setattr(owner, step, remove_first)
    with RunLock(run), pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"), RunLock(run):
        pytest.fail("two processes hold the lock")


def test_a_file_that_is_another_at_each_look_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "is_still", lambda *_: False)
    with RunLock(tmp_path), pytest.raises(UserError, match="is in use by"), RunLock(tmp_path):
        pytest.fail("two processes hold the lock")


def test_a_holder_that_removes_its_file_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def let_go(descriptor: int, flags: int) -> None:
        (tmp_path / ".lock").unlink()
        raise BlockingIOError

    (tmp_path / ".lock").write_text("process 1 on here since now\n")
    monkeypatch.setattr(fcntl, "flock", let_go)
    with pytest.raises(UserError, match="is in use by process 1 on here since now: wait for it"), RunLock(tmp_path):
        pytest.fail("two processes hold the lock")


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    check_line(capsys.readouterr().err, "no locks", "no second process", begins="warning: ")


def test_another_error_of_a_lock_is_no_lack_of_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), RunLock(tmp_path):
        pytest.fail("held a lock that failed")


def test_a_folder_in_its_place_is_reported(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError) as caught, RunLock(tmp_path):
        pass
    assert caught.value.option == "run" and f"{tmp_path}/.lock is a folder" in str(caught.value)
