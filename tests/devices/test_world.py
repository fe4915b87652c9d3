"""What processes agree on; with one, everything is what it was."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed

from lit_qlora.devices import world
from lit_qlora.devices.world import (
    any_of,
    by_first,
    check_same,
    from_first,
    gathered,
    highest,
    local_first,
    lowest,
    summed,
)
from lit_qlora.errors import UserError
from lit_qlora.signals import leave_in_one_line
from lit_qlora.storage.files import SaveError
from tests.devices.several import run_several
from tests.expect import ExpectError

ROOT = Path(__file__).parents[2]


def test_one_process_agrees_with_itself_without_torch_distributed() -> None:
    code = """if True:
        import sys
        from lit_qlora.devices.world import *
        from lit_qlora.devices.world import _reduced
        assert (highest(1, -2), lowest(3), any_of(False), summed({"a": 1.5})) == ([1, -2], 3, False, {"a": 1.5})
        assert (gathered("x"), from_first("x"), by_first(lambda: 7)) == (["x"], "x", 7)
        join(None); barrier(); check_same({"a": 1}); leave()
        with local_first(), silent_unless_first():
            print("said")
        print("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "said\nFalse\n"


@pytest.mark.parametrize("agree", [lambda: highest(1), lambda: gathered(1), lambda: from_first(1)])
def test_a_script_that_was_started_as_several_is_refused(
    monkeypatch: pytest.MonkeyPatch, agree: Callable[[], object], expect_error: ExpectError
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    expect_error(agree, "WORLD_SIZE=2", "a script is for one", "main.py fit")


@pytest.mark.parametrize("left", [["WORLD_SIZE"], ["WORLD_SIZE", "RANK"], ["WORLD_SIZE", "LOCAL_RANK"]])
def test_a_part_of_a_launchers_word_makes_no_process_one_of_several(
    monkeypatch: pytest.MonkeyPatch, left: list[str]
) -> None:
    """A cluster, or Lightning's own launcher in a script, leaves such variables."""
    for name in left:
        monkeypatch.setenv(name, "2")
    assert world.world() == world.World()


def _agree() -> list[Any]:
    rank = world.world().rank
    return [
        highest(rank, -rank), lowest(5 + rank), any_of(rank == 2), any_of(False),
        summed({"a": 0.5 + rank, "b": 1}), gathered(f"of {rank}"), from_first(rank + 7), by_first(lambda: rank + 9),
    ]  # fmt: skip


def test_none_leaves_the_meeting_while_another_still_connects() -> None:
    def seconds() -> float:
        real, began = distributed.new_group, time.monotonic()

        def slow(*args: Any, **kwargs: Any) -> Any:
            group = real(*args, **kwargs)
            time.sleep(1.5 if world.world().rank == 1 else 0)
            return group

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(distributed, "new_group", slow)
            world.join(None)
        return time.monotonic() - began

    assert min(run_several(2, seconds, joins=False)) >= 1.4


def test_three_processes_agree() -> None:
    expected = [[2, 0], 5, True, False, {"a": 4.5, "b": 3}, ["of 0", "of 1", "of 2"], 7, 9]
    assert run_several(3, _agree) == [expected] * 3


def _fail(error: BaseException) -> list[str]:
    def do() -> None:
        raise error

    try:
        by_first(do)
    except BaseException as found:
        return [type(found).__name__, str(found)]
    return ["nothing"]


@pytest.mark.parametrize(
    ("error", "first", "other"),
    [
        (UserError("no such file", option="run"), ["UserError", "run: no such file"], ["AllEnd", "2"]),
        (SystemExit(143), ["SystemExit", "143"], ["AllEnd", "143"]),
        (ValueError("x"), ["ValueError", "x"], ["AllEnd", "1"]),
        (OSError(28, "full"), ["OSError", "[Errno 28] full"], ["OSError", "[Errno 28] [Errno 28] full"]),
    ],
    ids=["user", "exit", "fault", "disk"],
)  # fmt: skip
def test_what_fails_in_the_first_ends_the_same_in_all(error: BaseException, first: list[str], other: list[str]) -> None:
    assert run_several(2, lambda: _fail(error)) == [first, other]


def test_a_save_that_failed_is_one_in_all() -> None:
    failed = SaveError(Path("runs/x"), OSError(errno.ENOSPC, "No space left on device"))
    first, other = run_several(2, lambda: _fail(failed))
    assert first[0] == "SaveError" and other[0] == "OSError" and "No space left" in other[1]


def test_the_difference_between_processes_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    def differ() -> None:
        rank = world.world().rank
        check_same({"model.learning_rate": [0.0002, 0.01][rank], "torch": "2.13", "seed": 42})

    for found in run_several(2, differ):
        assert found.startswith("UserError: run: process 1 on ")
        assert "differs from the first: model.learning_rate 0.0002 -> 0.01; start all" in found


def test_the_first_process_of_a_machine_goes_first(tmp_path: Path) -> None:
    def write_or_read() -> str:
        file = tmp_path / "made"
        with local_first():
            if not file.is_file():
                file.write_text(f"by {world.world().rank}")
        return file.read_text()

    assert run_several(3, write_or_read) == ["by 0"] * 3


def test_a_process_that_is_lost_is_noticed() -> None:
    def lose() -> str:
        if world.world().rank == 1:
            raise SystemExit(3)
        highest(1)
        return "continued"

    first, other = run_several(2, lose)
    assert other == "SystemExit: 3"
    assert first.startswith("LostError: another process of the run has ended, or did not answer (")


def fails_in(module: str) -> Callable[..., Any]:
    """A function of that module, which raises as gloo does."""
    scope: dict[str, Any] = {"__name__": module}
    exec("def fails(**_): raise RuntimeError('Gloo connectFullMesh failed: Connection closed by peer')", scope)
    return scope["fails"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("module", "raised"), [("torch.distributed.distributed_c10d", world.LostError), ("mine", RuntimeError)]
)
def test_who_is_lost_is_known_by_where_an_error_comes_from(
    monkeypatch: pytest.MonkeyPatch, module: str, raised: type[Exception]
) -> None:
    """Not by its words: a callback of the user's may have the same."""
    for name in world.OF_TORCHRUN:
        monkeypatch.setenv(name, "2" if "SIZE" in name else "0")
    with pytest.raises(raised), world.peers():
        fails_in(module)()


def test_a_process_that_is_lost_while_the_others_connect_is_noticed() -> None:
    def join() -> None:
        distributed.new_group = fails_in("torch.distributed.distributed_c10d")
        world.join(None)

    for found in run_several(2, join, joins=False):
        assert found.startswith("LostError: another process of the run has ended")
        assert "(Gloo connectFullMesh failed: Connection closed by peer)" in found


@pytest.mark.parametrize("waits", [lambda: highest(1), lambda: gathered("x"), lambda: from_first("x")])
def test_one_that_waits_for_another_hears_a_signal(waits: Callable[[], Any], tmp_path: Path) -> None:
    """The others wait so for a download of the first; torch's own waits let no signal through."""
    heard = tmp_path / "heard"

    def do() -> int:
        if world.world().rank == 0:
            ends_at = time.monotonic() + 20
            while not heard.exists() and time.monotonic() < ends_at:
                time.sleep(0.05)
            return 0 if heard.exists() else -1
        with leave_in_one_line():
            Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            try:
                waits()
            except SystemExit as stop:
                heard.touch()
                return int(stop.code or 0)
        return -2

    assert run_several(2, do, limit_s=30) == [0, 143]


def joining(rank: int, port: int, ends: str) -> Any:
    """A process of two that nothing answers: its error's problem, or its exit status by a signal."""

    def do() -> Any:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        del os.environ[world.STORE]  # of processes on one machine, begun by one command
        with leave_in_one_line():
            if ends == "signal":
                Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            try:
                world.join(None)
            except UserError as error:
                return error.problem
            except SystemExit as stop:
                return stop.code

    (found,) = run_several(1, do, limit_s=15, joins=False)
    return found


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("ends", ["signal", "limit"])
def test_nobody_waits_for_ever_for_one_that_never_comes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: int, ends: str
) -> None:
    """Nor without a word, nor without hearing a signal: as under srun, where the other's machine does not start."""

    monkeypatch.setattr(world, "DEAD", timedelta(seconds=0.5 if ends == "limit" else 60))
    monkeypatch.setattr(world, "LONG", timedelta(seconds=0.1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    found = joining(rank, free, ends)
    assert found == 143 if ends == "signal" else found.startswith(f"process {1 - rank} of 2 did not come ")
    where = f"at 127.0.0.1:{free}, " if rank else ""
    assert f"   run  waits for process {1 - rank} of 2, {where}at most " in capfd.readouterr().err


@pytest.mark.parametrize(("rank", "says"), [(0, False), (1, True), (3, False)])
def test_a_long_wait_is_reported_by_the_first_that_is_there(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: int, says: bool
) -> None:
    monkeypatch.setattr(world, "world", lambda: SimpleNamespace(rank=rank, size=4))
    world._report_wait([0, 2], "", timedelta(minutes=10))
    world._report_wait([], "", timedelta(minutes=10))  # the last has come meanwhile
    assert capfd.readouterr().err == "   run  waits for processes 0, 2 of 4, at most 600 s\n" * says


def test_a_wait_becomes_long_once_and_is_over_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((1000.0, 1029.0, 1030.0, 1031.0, 1600.0, 1601.0))
    monkeypatch.setattr(world, "time", SimpleNamespace(monotonic=lambda: next(now), sleep=lambda _: None))
    looks = world._looks(timedelta(seconds=600))
    found = [next(looks) for _ in range(5)]
    assert found == [(False, False), (False, True), (False, False), (False, False), (True, False)]


@pytest.mark.parametrize("ends", ["signal", "limit"])
def test_another_program_at_the_port_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    monkeypatch.setattr(world, "REPLY", timedelta(seconds=0.25 if ends == "limit" else 5))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = joining(1, port, ends)
    if ends == "signal":
        assert found == 143
    else:
        assert found == f"MASTER_PORT={port} can't be opened at 127.0.0.1: another program may have it"
