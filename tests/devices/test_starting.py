"""Processes of one command begin and end together, whatever ends one; their tasks here are a few lines each."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from lit_qlora import precheck
from lit_qlora.cli import main
from lit_qlora.devices import asked, starting
from lit_qlora.devices.asked import most_gpus
from lit_qlora.devices.launchers import COUNTS, RANK_VARIABLES
from lit_qlora.devices.starting import LOST, take_place
from lit_qlora.devices.world import World, world
from lit_qlora.errors import UserError
from lit_qlora.signals import SIGNALS
from tests.expect import check_first, check_line

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        for name in [*os.environ]:
            known = (*COUNTS, *RANK_VARIABLES, "LOCAL_WORLD_SIZE")
            if name in known or name.startswith(("SLURM_", "LIT_QLORA_", "MASTER_")):
                del os.environ[name]
        yield


@pytest.mark.parametrize(
    ("args", "number"),
    [
        (["fit"], 1),
        (["fit", "--trainer.devices", "2"], 2),
        (["fit", "--trainer.devices=3"], 3),
        (["fit", "--trainer.devices", "2", "--trainer.devices", "1"], 1),
        (["fit", "--trainer.devices=2", "--trainer.devices", "1"], 1),  # the last one, however written
        (["fit", "--trainer.devices", "auto"], 1),  # torch counts GPUs
        (["fit", "--config", "two.yaml"], 2),
        (["fit", "-c=two.yaml"], 2),
        (["fit", "--config", "two.yaml", "--trainer.devices", "1"], 1),
        (["validate", "--run", "two"], 2),
        (["validate"], 2),  # of the newest run
        (["validate", "--run", "two", "--trainer.devices=1"], 1),
        (["validate", "--run", "two", "--config", "three.yaml"], 3),
        (["fit", "--config", "dots.yaml"], 2),
    ],
)
def test_what_a_command_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], number: int
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("runs", "two").mkdir(parents=True)
    Path("runs/two/metrics.jsonl").touch()  # it has begun
    for file in ("two.yaml", "runs/two/config.yaml"):
        Path(file).write_text("trainer:\n  devices: 2\n")
    Path("three.yaml").write_text("trainer:\n  devices: 3\n")
    Path("dots.yaml").write_text("trainer.devices: 2\n")
    on_cpu = ["--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=6"]
    assert check_first(args[0], [*args[1:], *on_cpu]) == number


@pytest.mark.parametrize(("devices", "number"), [([0, 3], 2), ([1, 1], 1), ("auto", 1), ("2", 2), (-1, 1), (99999, 1)])
def test_what_takes_torch_to_know_is_one(devices: object, number: int) -> None:
    assert precheck._number_of(devices) == number


def test_torchruns_word_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (places | {"MASTER_ADDR": "host0", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert take_place() == []
    assert world() == World(3, 4, 1, 2)
    assert "OMPI_COMM_WORLD_RANK" not in os.environ


@pytest.mark.parametrize(("number", "port"), [("0", "17345"), ("1", "17442")])
def test_slurms_word_is_taken(monkeypatch: pytest.MonkeyPatch, number: str, port: str) -> None:
    """Two steps of a job, which may run side by side, do not meet at the same port."""
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2",
            "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "12345", "SLURM_NODEID": "1",
            "SLURM_STEP_ID": number}  # fmt: skip
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert take_place() == []
    assert world() == World(2, 4, 0, 2)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu07", port)


def test_half_a_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(
        UserError, match=r"^WORLD_SIZE=2 in the environment, and no RANK; start with torchrun, or unset"
    ):
        take_place()


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here",
            "MASTER_PORT": "29500"}  # fmt: skip
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "here",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("places", "name", "value"),
    [
        (TORCHRUN, "RANK", "5"),
        (TORCHRUN, "LOCAL_RANK", "2"),
        (TORCHRUN, "MASTER_ADDR", None),
        (TORCHRUN, "MASTER_PORT", "70000"),
        (SRUN, "SLURM_PROCID", None),
        (SRUN, "SLURM_LOCALID", "x"),
        (SRUN, "SLURM_STEP_NUM_NODES", "two"),
        (SRUN, "SLURM_STEP_NODELIST", " "),
        (SRUN, "SLURM_JOB_ID", "7_1"),
    ],
)
def test_a_launchers_word_that_can_t_be_is_named(
    monkeypatch: pytest.MonkeyPatch, places: dict[str, str], name: str, value: str | None
) -> None:
    for one, given in places.items():
        monkeypatch.setenv(one, given)
    take_place()
    for one in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(one, raising=False)
    for one, given in (places | {name: value}).items():
        if given is None:
            monkeypatch.delenv(one, raising=False)
        else:
            monkeypatch.setenv(one, given)
    with pytest.raises(UserError) as refused:
        take_place()
    got = f"{name}={value}" if value and value.strip() else f"no {name}"
    assert refused.value.problem == f"{next(iter(places))}=2 in the environment, and {got}"


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_a_rank_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, rank: str
) -> None:
    """Each of several processes that a launcher started so would train by itself."""
    monkeypatch.setenv("RANK", rank)
    assert main([verb]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: RANK={rank} in the environment, and no WORLD_SIZE; unset RANK")
    assert err.count("\n") == 1


def started(code: str, count: int = 2, hears: bool = True) -> subprocess.Popen[str]:
    """A command whose processes each run ``code``, with their number as ``rank``, once it ``hears`` signals."""
    task = "import os, signal, sys, time; rank = int(os.environ['RANK']); sys.stdin.read(0)\n"
    task += f"signal.pthread_sigmask(signal.SIG_UNBLOCK, {[*map(int, SIGNALS)]})\n" * hears
    task += code
    command = f"""if True:
        import sys; sys.path.insert(0, {str(ROOT)!r})
        from lit_qlora.devices import starting
        starting.GRACE_S = 1.0
        starting.CODE = {task.replace("{", "{{").replace("}", "}}")!r}
        sys.exit(starting.run_several(["fit"], {count}))
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", command], text=True, start_new_session=True, **pipes)


def ended(process: subprocess.Popen[str], within_s: float = 50.0) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within_s)
    return process.returncode, out, err


def children(process: subprocess.Popen[str], count: int = 2) -> list[int]:
    """The numbers of its processes, in their order, once all are there."""
    file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ends_at = time.monotonic() + 50
    while time.monotonic() < ends_at:
        found = [*map(int, file.read_text().split())]
        if len(found) == count:
            return found
        time.sleep(0.02)
    raise AssertionError("they did not begin")


def gone(number: int, within_s: float = 20.0) -> bool:
    ends_at = time.monotonic() + within_s
    while time.monotonic() < ends_at:
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2][0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_the_first_process_alone_is_heard() -> None:
    status, out, err = ended(started("print('out of', rank); print('err of', rank, file=sys.stderr)", 3))
    assert (status, out, err) == (0, "out of 0\n", "err of 0\n")


def test_none_imports_from_the_current_folder() -> None:
    """The current folder may be a downloaded run's, with modules of its own."""
    assert ended(started("print('' in sys.path, os.getcwd() in sys.path)"))[1] == "False False\n"


def test_each_knows_its_place() -> None:
    code = "names = 'WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE'.split()\n"
    code += "print(sys.argv[1:], [os.environ[name] for name in names]) if rank == 0 else None"
    assert ended(started(code, 3))[1] == "['fit'] ['3', '0', '3']\n"


def test_the_one_that_fails_has_the_last_word_and_the_others_end() -> None:
    began = time.monotonic()
    line = "error: process 1 of 2: rows.jsonl:3: no JSON"
    code = f"print({line!r}, file=sys.stderr) if rank else time.sleep(60)\nsys.exit(2)"
    assert ended(started(code)) == (2, "", f"{line}\n")
    assert time.monotonic() - began < 40  # the other would be there for 60


def test_what_all_say_is_said_once() -> None:
    code = "time.sleep(0.2 if rank == 0 else 0); print('error: the same', file=sys.stderr); sys.exit(2)"
    assert ended(started(code)) == (2, "", "error: the same\n")


@pytest.mark.parametrize(
    ("first", "other", "status", "said"),
    [
        (LOST, 2, 2, "error: process 1 of 2: mine\n"),
        (LOST, LOST, 2, "error: process 1 of 2: mine\n"),
        (LOST, 0, 2, "error: process 0 of 2: another process of the run has ended, or did not answer; "),
        (LOST, 143, 143, "\nstopped by SIGTERM; given again, the same command resumes"),
        (0, 2, 2, "error: process 1 of 2: mine\n"),
    ],
)
@pytest.mark.parametrize("late", [0, 1])
def test_of_processes_that_have_lost_another_only_that_one_is_heard(
    first: int, other: int, status: int, said: str, late: int
) -> None:
    """However long the other takes to end: its connections are gone before it is."""
    code = f"""
time.sleep(0.5 if rank == {late} else 0)
print("error: process 1 of 2: mine", file=sys.stderr) if rank and {other} in (2, {LOST}) else 0
sys.exit({other} if rank else {first})
"""
    found, _, err = ended(started(code))
    assert found == status and err.startswith(said)
    assert err.count("error: ") == said.count("error: ")


def test_one_that_nccl_ended_is_shown_what_may_help() -> None:
    status, _, err = ended(started("time.sleep(60) if rank == 0 else os.kill(os.getpid(), signal.SIGABRT)"))
    assert status == 134
    assert err.startswith("error: process 1 of 2 was ended by SIGABRT (as NCCL does") and "NCCL_P2P_DISABLE=1" in err


def test_a_fault_is_shown_whole() -> None:
    status, _, err = ended(started("time.sleep(60) if rank == 0 else 1 / 0"))
    assert status == 1
    assert err.startswith("process 1 of 2:\nTraceback") and "ZeroDivisionError" in err


def test_one_that_ends_without_a_word_is_named() -> None:
    status, out, err = ended(started("sys.exit(3 if rank else 0)"))
    assert (status, out) == (3, "")
    check_line(err, "status 3", begins="error: process 1 of 2: ")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_is_named_and_the_others_end(rank: int) -> None:
    process = started("time.sleep(60)")
    numbers = children(process)
    os.kill(numbers[rank], signal.SIGKILL)
    status, out, err = ended(process)
    assert (status, out) == (137, "")
    assert err.startswith(f"error: process {rank} of 2 was ended by SIGKILL") and err.count("\n") == 1
    assert all(map(gone, numbers))


READY = f"""import sys, time; sys.path.insert(0, {str(ROOT)!r})
from lit_qlora.devices.starting import take_place
take_place(); print('ready', flush=True); time.sleep(60)
"""


def test_none_outlives_torchruns_agent() -> None:
    """A stand-in for the agent is killed, and so ends nothing itself."""
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {READY!r}])"
    places = os.environ | TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}
    process = subprocess.Popen([sys.executable, "-c", code], env=places, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    (number,) = children(process, 1)
    process.kill()
    process.wait()
    assert gone(number)
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
def test_none_outlives_the_command(number: signal.Signals) -> None:
    process = started(READY, 3)
    numbers = children(process, 3)
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert all(map(gone, numbers))


STOPPABLE = """
times = []
def stop(number, frame):
    times.append(number)
    print('got', number, flush=True)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, stop)
print('ready', flush=True)
while not times:
    time.sleep(0.02)
time.sleep(1.7 if rank == 0 else 0.3)  # it saves, and may take longer than what failed gets
sys.exit(128 + times[0])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_each_once_and_is_waited_for(number: signal.Signals) -> None:
    process = started(STOPPABLE)
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(number)
    assert ended(process) == (128 + number, f"got {number.value}\n", "")


@pytest.mark.parametrize(("rank", "handles"), [(0, True), (1, False)])
def test_one_that_is_stopped_before_all_have_met_stops_the_others(rank: int, handles: bool) -> None:
    stop = "signal.signal(15, lambda number, _: (print('stopped', rank, flush=True), sys.exit(128 + number)))\n"
    process = started(f"{stop if handles else ''}print('ready', flush=True); time.sleep(60)")
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    os.kill(children(process)[rank], signal.SIGTERM)
    assert ended(process) == (143, "stopped 0\n" if handles else "", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--trainer.devices 99999", ["trainer.devices: expected at most", "processes on a CPU, got 99999"]),
        ("--trainer.accelerator auto --trainer.devices 99999", ["trainer.devices: expected at most", "got 99", "give"]),
        ("--trainer.devices [0,1]", ["trainer.devices: expected 1, for a CPU has no number, got [0, 1]"]),
        ("--trainer.devices 3", ["trainer.devices: 3, and a step has 1 micro-batch", "accumulate_grad_batches 3"]),
        (
            "--trainer.num_nodes 2 --trainer.accumulate_grad_batches 2",
            ["trainer.devices: 1 on 2 machines make 2 processes", "torchrun or srun"],
        ),
        ("--model.shard true", ["model.shard: true", "nothing to share with", "--model.shard_to host"]),
        ("--trainer.devices auto --model.shard true", ["model.shard: true", "nothing to share with"]),
    ],
)
def test_a_command_that_cannot_be_is_refused_before_any_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, words: list[str]
) -> None:
    """The refusal comes before PyTorch is imported, which takes as many times as long for as many processes."""
    monkeypatch.setattr(starting, "run_several", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError) as refused:
        check_first("fit", ["--trainer.accelerator", "cpu", *options.split()])
    assert all(word in str(refused.value) for word in words), refused.value
    assert main(["fit", "--trainer.accelerator", "cpu", *options.split()]) == 2
    assert " ".join(capsys.readouterr().err.split()).startswith(f"error: {words[0]}")


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    ("devices", "num_gpus", "problem", "remedy"),
    [
        (
            "3",
            1,
            "expected at most 1, for there is 1 GPU here, got 3",
            "give --trainer.devices 1, which learns the same",
        ),
        ("99", 2, "expected at most 2, for there are 2 GPUs here, got 99", "give --trainer.devices 2"),
        ("[0,4]", 2, "expected numbers below 2, for there are 2 GPUs here, got [0, 4]", "give [0, 1], or their number"),
    ],
)
def test_gpus_that_are_not_there_are_refused_before_any_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, devices: str, num_gpus: int, problem: str, remedy: str
) -> None:
    """A run's own settings are refused, too, which may be of a larger machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asked, "has_driver", lambda: True)
    monkeypatch.setattr(asked, "most_gpus", lambda: num_gpus)
    Path("runs", "there").mkdir(parents=True)
    Path("runs/there/config.yaml").write_text(f"trainer:\n  devices: {devices}\n")
    new = ["--run", "new", "--config", "demo", "--trainer.devices", devices]
    for options in [new] if verb == "fit" else [new, ["--run", "there"]]:
        with pytest.raises(UserError) as refused:
            check_first(verb, options)
        assert (refused.value.option, refused.value.problem) == ("trainer.devices", problem)
        assert refused.value.remedy and refused.value.remedy.startswith(remedy)
    check_first("fit", ["--run", "new", "--trainer.devices", "3", "--trainer.accelerator", "cpu",
                        "--trainer.accumulate_grad_batches", "3"])  # fmt: skip


def test_the_driver_and_the_environment_say_how_many_gpus_there_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda *_: [Path("0"), Path("1"), Path("2")])
    for visible, number in ((None, 3), ("0,2", 2), ("", 0), ("GPU-1", 1), ("0,1,2,3", 3)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert most_gpus() == number


def test_other_processes_than_were_asked_for_are_refused_before_torch_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    options = ["--trainer.accelerator", "cpu", "--trainer.accumulate_grad_batches", "4", "--trainer.devices"]
    with pytest.raises(UserError) as refused:
        check_first("fit", [*options, "3"])
    assert refused.value.option == "trainer.devices"
    assert refused.value.problem.startswith("with trainer.num_nodes it is 3 x 1, and 2 processes were started, 2 on")
    check_first("fit", [*options, "2"])


def test_a_signal_waits_until_a_process_can_handle_it() -> None:
    """Python's own handler would show a traceback of what is being imported then."""
    code = "print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))) if rank == 0 else None"
    assert ended(started(code, hears=False))[1] == f"{sorted(map(int, SIGNALS))}\n"
    code = "from lit_qlora.devices.starting import take_place; take_place()\n" + code
    assert ended(started(f"sys.path.insert(0, {str(ROOT)!r}); {code}", hears=False))[1] == "[]\n"
