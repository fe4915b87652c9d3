"""A mistake is reported once, whichever process of a launcher made it, and none is waited for long."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from lit_qlora.devices import mistakes, world
from lit_qlora.devices.mistakes import report_once
from lit_qlora.devices.world import LostError, highest
from lit_qlora.errors import UserError
from tests.devices.several import run_several

PROBLEM = "unknown option 'model.ran'"
LINE = f"error: {PROBLEM}"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mistakes, "REPORT_WAIT_S", 3.0)
    monkeypatch.setattr(mistakes, "LINGER_S", 1.0)


def said(
    capfd: pytest.CaptureFixture[str], do: Callable[[int], Any], count: int = 2, joins: bool = False
) -> tuple[list[Any], list[str]]:
    """What each process gives, and the lines that all of them print."""
    capfd.readouterr()
    found = run_several(count, lambda: do(world.world().rank), joins=joins, limit_s=20)
    return found, [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_what_all_did_the_first_says(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, count: int, joins: bool
) -> None:
    for name in ("REPORT_WAIT_S", "LINGER_S"):  # beyond what `said` waits: none of them goes to its end
        monkeypatch.setattr(mistakes, name, 60.0)
    assert said(capfd, lambda rank: report_once(PROBLEM), count, joins)[1] == [LINE]


@pytest.mark.parametrize("late", [0, 1])
def test_whoever_comes_later(capfd: pytest.CaptureFixture[str], late: int) -> None:
    def do(rank: int) -> None:
        time.sleep(0.5 if rank == late else 0)
        report_once(PROBLEM)

    assert said(capfd, do)[1] == [LINE]


def meets(rank: int) -> str:
    try:
        world.join(None)
        highest(1)
    except LostError as error:
        report_once(error)
        return "lost"
    return "joined"


def test_what_another_did_before_they_met_the_first_says_with_its_number(capfd: pytest.CaptureFixture[str]) -> None:
    found, lines = said(capfd, lambda rank: report_once(PROBLEM) if rank == 1 else meets(rank), 3)
    assert (found, lines) == (["lost", None, "lost"], ["error: process 1 of 3: unknown option 'model.ran'"])


def test_what_another_did_is_printed_with_its_fields() -> None:
    """So that a terminal has the remedy on a line of its own."""
    error = UserError("unknown option", option="model.ran", place="mine.yaml:3", remedy="give model.rank")

    def do(rank: int) -> Any:
        if rank == 1:
            return report_once(error)
        shown = list[UserError]()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(mistakes, "complain", lambda what, _: shown.append(what))
            meets(rank)
        return [one.fields for one in shown]

    assert run_several(2, lambda: do(world.world().rank), joins=False, limit_s=20) == [[error.fields], None]


def test_what_the_first_alone_did_before_they_met(capfd: pytest.CaptureFixture[str]) -> None:
    found, lines = said(capfd, lambda rank: meets(rank) if rank else report_once(PROBLEM), 3)
    assert (found, lines) == ([None, "lost", "lost"], [LINE])


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_does_later_is_noticed_at_the_next_agreement(capfd: pytest.CaptureFixture[str], rank: int) -> None:
    def do(this: int) -> Any:
        if this != rank:
            return meets(this)
        world.join(None)
        return report_once(PROBLEM)

    found, lines = said(capfd, do)
    words = LINE if rank == 0 else "error: process 1 of 2: unknown option 'model.ran'"
    assert (found[1 - rank], lines) == ("lost", [words])


def test_without_the_first_each_says_it(capfd: pytest.CaptureFixture[str]) -> None:
    def do(rank: int) -> None:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        report_once(PROBLEM)

    assert said(capfd, do)[1] == ["error: process 1 of 2: unknown option 'model.ran'"]


def test_one_process_and_those_of_the_command_itself_only_print_and_the_latter_by_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report_once(PROBLEM)
    places = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LIT_QLORA_PARENT": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    report_once(PROBLEM)
    assert capsys.readouterr().err == f"{LINE}\nerror: process 1 of 2: {PROBLEM}\n"


def test_what_is_for_one_process_and_srun_started_several_times_is_said_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    from lit_qlora.cli import main

    def do(rank: int) -> int:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
        os.environ |= {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        return main(["merge"])

    found, lines = said(capfd, do, 3)
    assert found == [2, 2, 2] and len(lines) == 1
    assert lines[0].startswith("error: SLURM_STEP_NUM_TASKS=3 in the environment: several processes were started")


def test_half_a_launcher_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The variables were set by hand, or inherited by a shell inside of a job."""
    from lit_qlora.cli import main

    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["fit", "--trainer.accumulate_grad_batches", "2", "--trainer.accelerator", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: WORLD_SIZE=2 in the environment, and no MASTER_ADDR") and err.count("\n") == 1


def test_what_one_notes_the_first_prints_at_the_next_agreement(capfd: pytest.CaptureFixture[str]) -> None:
    def do() -> None:
        if world.world().rank:
            world.note_at_agreement("out of memory")
        for _ in range(2):
            highest(1)

    capfd.readouterr()
    run_several(3, do)
    assert capfd.readouterr().out == "process 1 of 3: out of memory\nprocess 2 of 3: out of memory\n"


def test_one_process_notes_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    world.note_at_agreement("out of memory")
    assert capsys.readouterr().out == "out of memory\n"
