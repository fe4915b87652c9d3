"""One process does the work, whatever launchers left in the environment; SLURM starts a job again where asked to."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from lit_qlora import training
from lit_qlora.cli import main
from lit_qlora.command import Command
from lit_qlora.devices.launchers import COUNTS, RANK_VARIABLES, ignore_launchers, requeue
from lit_qlora.errors import UserError
from lit_qlora.signals import LeftAtOnce
from lit_qlora.trainer import QLoRATrainer, own_plugins
from tests.interrupted import interrupt

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*COUNTS, *RANK_VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", RANK_VARIABLES)
def test_a_rank_that_was_left_is_ignored_and_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert ignore_launchers() == [f"{name}=1 in the environment is ignored: no launcher started several processes"]
    assert name not in os.environ


def test_a_launcher_of_one_process_is_nothing_to_speak_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "0")
    for name in COUNTS:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # what sbatch allots, and not what runs
    assert ignore_launchers() == []
    assert not {*RANK_VARIABLES, *COUNTS} & {*os.environ}


@pytest.mark.parametrize("name", COUNTS)
def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError) as caught:
        ignore_launchers()
    assert str(caught.value).startswith(f"{name}=2 in the environment: several processes were started")
    assert f"or unset {name};" in str(caught.value)


@pytest.mark.parametrize(
    "verb", ["fit", "validate", "test", "plan", "inspect", "chat", "predict", "merge", "evaluate", "push"]
)
def test_of_several_each_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([verb]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: WORLD_SIZE=2 in the environment") and err.count("\n") == 1


LEFT = {"RANK": "1", "SLURM_PROCID": "1", "LOCAL_RANK": "3", "NODE_RANK": "2", "SLURM_NTASKS": "1",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "n1", "SLURM_NODEID": "1",
        "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip


@pytest.mark.parametrize("tasks", ["1", "4"])
def test_a_trainer_is_alone_whatever_is_left(monkeypatch: pytest.MonkeyPatch, tasks: str) -> None:
    for name, value in {**LEFT, "SLURM_NTASKS": tasks}.items():
        monkeypatch.setenv(name, value)
    ignore_launchers()
    trainer = QLoRATrainer(accelerator="cpu", logger=False, plugins=own_plugins(None))
    assert type(trainer._accelerator_connector.cluster_environment) is LightningEnvironment  # SLURM's would requeue
    assert (trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank) == (1, 0, 0, 0)


def test_slurms_own_environment_is_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.plugins: expected none of SLURM's"):
        own_plugins(SLURMEnvironment())


SCONTROL = """#!/bin/sh
echo "$@" >> "$0.calls"
[ "$1" = show ] && echo "JobId=7 JobName=train
   Requeue={may} Restarts=0 BatchFlag=1
   Command=train.sh
   {submitted}"
[ "$1" = write ] && [ -n "{script}" ] && printf "{script}" && exit 0
[ "$1" = write ] && exit 1
[ "$1" = requeue ] && [ -n "{fails}" ] && echo "{fails}" >&2 && exit 1
exit 0
"""


ASKED = "#!/bin/bash\\n#SBATCH --time=60 --requeue\\n\\nsrun python main.py fit\\n"


def stand_in(folder: Path, may: int = 1, fails: str = "", script: str = ASKED, submitted: str = "") -> Path:
    program = folder / "scontrol"
    program.write_text(SCONTROL.format(may=may, fails=fails, script=script, submitted=submitted))
    program.chmod(0o755)
    return folder / "scontrol.calls"


@pytest.mark.parametrize(
    ("left", "may", "fails", "calls", "said"),
    [
        ({"SLURM_JOB_ID": "7"}, 1, "", "show job 7\nwrite batch_script 7 -\nrequeue 7\n", "SLURM starts job 7 again"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, 1, "",
         "show job 7_2\nwrite batch_script 9 -\nrequeue 7_2\n", "SLURM starts job 7_2 again"),
        ({"SLURM_JOB_ID": "7"}, 0, "", "show job 7\n", "SLURM was not asked to requeue this job"),
        ({"SLURM_JOB_ID": "7", "SBATCH_REQUEUE": "1"}, 1, "slurm: disabled", "show job 7\nrequeue 7\n",
         "SLURM could not requeue job 7 (slurm: disabled): submit it again"),
        ({}, 1, "", "", ""),
    ],
)  # fmt: skip
def test_a_job_is_requeued_where_slurm_was_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    left: dict[str, str], may: int, fails: str, calls: str, said: str,
) -> None:  # fmt: skip
    called = stand_in(tmp_path, may, fails)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    requeue()
    assert (called.read_text() if called.is_file() else "") == calls
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == bool(said)


@pytest.mark.parametrize(
    ("script", "submitted", "asked"),
    [
        (
            "#!/bin/bash\\n#SBATCH --time=60\\nsrun python main.py fit\\n",
            "",
            False,
        ),  # Requeue=1 is the cluster's own then
        ("#!/bin/bash\\nsrun true\\n#SBATCH --requeue\\n", "", False),  # after the first command, sbatch reads none
        ("#!/bin/bash\\n# no #SBATCH --requeue\\necho --requeue\\n", "", False),
        ("#!/bin/bash\\n# comment\\n\\n#SBATCH --requeue\\n", "", True),
        ("", "", False),
        ("", "SubmitLine=sbatch --requeue train.sh", True),
        ("#!/bin/bash\\n", "SubmitLine=sbatch train.sh", False),
    ],
    ids=range(7),
)
def test_that_a_job_may_be_requeued_does_not_say_that_it_is_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    script: str, submitted: str, asked: bool,
) -> None:  # fmt: skip
    called = stand_in(tmp_path, script=script, submitted=submitted)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SBATCH_REQUEUE", raising=False)
    requeue()
    assert ("requeue 7" in called.read_text().splitlines()) is asked
    said = "SLURM starts job 7 again" if asked else "SLURM was not asked to requeue this job (#SBATCH --requeue)"
    assert said in capsys.readouterr().out


def test_without_scontrol_it_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", "/nowhere")
    requeue()
    assert capsys.readouterr().out.startswith("   run  SLURM could not requeue job 7 (")


@pytest.mark.parametrize(
    ("stop", "requeued"),
    [
        (SystemExit(128 + signal.SIGUSR1), 1),
        (LeftAtOnce(128 + signal.SIGUSR1), 0),  # nothing was saved: it would begin anew for ever
        (SystemExit(143), 0),
        (SystemExit(0), 0),
        (SystemExit(1), 0),
    ],
)
def test_only_what_the_warning_ended_saved_is_requeued(
    monkeypatch: pytest.MonkeyPatch, stop: SystemExit, requeued: int
) -> None:
    calls = []

    def stopped(*_: object) -> None:
        raise stop

    monkeypatch.setattr(training, "requeue", lambda: calls.append(1))
    monkeypatch.setattr(training, "QLoRACLI", stopped)
    assert training.main(Command(["fit"])) == stop.code
    assert len(calls) == requeued


@pytest.mark.slow
def test_a_slurm_job_saves_on_its_warning_and_is_requeued_and_resumes(tmp_path: Path) -> None:
    called = stand_in(tmp_path)
    left = {name: value for name, value in LEFT.items() if name != "RANK"}  # alone, it is refused
    environment = os.environ | left | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "main.py"), "fit", "--samples.count", "0", "--trainer.limit_val_batches", "1",
               "--trainer.log_every_n_steps", "1", "--save_every_steps", "1000"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = interrupt(process, 3, lambda: process.send_signal(signal.SIGUSR1))
    assert process.returncode == 128 + signal.SIGUSR1
    assert {line.split("=")[0] for line in err.splitlines()} == {
        f"note: {name}" for name in ("SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "SLURM_NODEID")
    }
    assert "by SIGUSR1; the same command resumes from here" in out
    assert out.endswith("   run  SLURM starts job 7 again\n")
    assert called.read_text() == "show job 7\nwrite batch_script 7 -\nrequeue 7\n"
    (saved,) = (tmp_path / "runs/demo/checkpoints").iterdir()
    again = subprocess.run(
        [*command, "--max_time", "00:00:00:01"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert f"from {saved.name}" in again.stdout


SRUN = """import os, signal, subprocess, sys, time
count = int(os.environ["SLURM_NTASKS_PER_NODE"])
assert sys.argv[1] == "--kill-on-bad-exit=1", sys.argv
tasks = []
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
for rank in range(count):
    places = {"SLURM_STEP_NUM_TASKS": count, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_NODES": 1,
              "SLURM_STEP_NODELIST": "here", "SLURM_NODEID": 0}
    command = [sys.executable, *sys.argv[3:]]
    tasks.append(subprocess.Popen(command, env=os.environ | {name: str(value) for name, value in places.items()}))
while not (failed := [task for task in tasks if task.poll()]) and None in [task.poll() for task in tasks]:
    time.sleep(0.01)
for task in tasks if failed else ():
    task.kill()  # as -K does, and without SLURM's KillWait before it
sys.exit(failed[0].returncode if failed else 0)
"""
"""A stand-in that starts tasks, hands USR1 on, and ends all as soon as one has failed."""


@pytest.mark.slow
def test_the_script_saves_in_time_and_requeues_its_job(tmp_path: Path) -> None:
    shutil.copy(ROOT / "main.py", tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    script = (ROOT / "scripts" / "slurm.sh").read_text(encoding="utf-8")
    called = stand_in(programs, script=script.replace("\\", "").replace("%", "%%").replace('"', "").replace("$", ""))
    program = programs / "scontrol"
    slow = '[ "$1" = requeue ] && sleep 1 && ls runs/demo/checkpoints >> "$0.calls"\n'
    program.write_text(program.read_text().removesuffix("exit 0\n") + slow + "exit 0\n")
    (programs / "srun.py").write_text(SRUN)
    (programs / "srun").write_text(f'#!/bin/sh\nexec {sys.executable} {programs}/srun.py "$@"\n')
    (programs / "srun").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "2", "PYTHONPATH": str(ROOT)}
    environment = os.environ | job | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    options = ["--samples.count", "0", "--trainer.limit_val_batches", "1", "--trainer.accumulate_grad_batches", "2",
               "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"]  # fmt: skip
    command = ["bash", str(ROOT / "scripts" / "slurm.sh"), *options]
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = interrupt(process, 3, lambda: process.send_signal(signal.SIGUSR1))
    assert (process.returncode, err) == (128 + signal.SIGUSR1, "")
    assert out.count("by SIGUSR1; the same command resumes from here") == 1
    assert out.endswith("   run  SLURM starts job 7 again\n")
    *calls, saved = called.read_text().splitlines()
    assert calls == ["show job 7", "write batch_script 7 -", "requeue 7"]
    assert re.fullmatch(r"step-0*[34]", saved)


def test_the_script_asks_for_what_a_requeue_needs() -> None:
    lines = (ROOT / "scripts" / "slurm.sh").read_text(encoding="utf-8").splitlines()
    head = [line for line in lines[: lines.index("set -euo pipefail")] if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@120", "#SBATCH --open-mode=append"} <= {*head}
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / "slurm.sh")], check=False).returncode == 0
