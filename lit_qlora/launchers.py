"""Owns that one process does the work: what launchers of several leave in the environment, and SLURM's restart.

Called before anything reads the environment for that. Knows no training.
"""

import os
import re
import subprocess
from itertools import takewhile

from lit_qlora.errors import UserError
from lit_qlora.place import COMMAND

COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""How many processes were started: by torchrun, srun, mpirun and other launchers of MPI."""
RANKS = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
    "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK",
)  # fmt: skip
"""Which of them this one is. Of a process that is alone, libraries would take any but 0 for a helper of another."""


def ignore_launchers() -> list[str]:
    """Takes ranks and counts out of this process's environment; returns those that said something else than alone.

    Raises UserError where several processes were started.
    """
    for name in COUNTS:
        value = os.environ.get(name, "").strip()
        if value.isdecimal() and int(value) > 1:
            raise UserError(
                f"{name}={value} in the environment: several processes are not supported, one trains on one device",
                remedy=(
                    f"start {COMMAND} by itself (without torchrun or mpirun, under srun with "
                    f"--ntasks 1), or unset {name}"
                ),
            )
    left = {name: os.environ.pop(name) for name in (*COUNTS, *RANKS) if name in os.environ}
    return [f"{name}={value}" for name, value in left.items() if name in RANKS and value.strip() != "0"]


def requeue() -> None:
    """Has SLURM start this process's batch job again, where its user asked for that, and says so."""
    job = number = os.environ.get("SLURM_JOB_ID")
    if not job or not number:
        return
    if {"SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"} <= {*os.environ}:  # the last task has the whole array's number
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        if not _was_asked(_scontrol("show", "job", job), number):
            print("   run  SLURM was not asked to requeue this job (#SBATCH --requeue): submit it again", flush=True)
            return
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        print(f"   run  SLURM could not requeue job {job} ({' '.join(reason.split())}): submit it again", flush=True)
        return
    print(f"   run  SLURM starts job {job} again", flush=True)


def _was_asked(told: str, number: str) -> bool:
    """Whether a job's user asked for it to be requeued.

    Most clusters let every job be requeued, and ``scontrol show job`` has the same ``Requeue=1`` then: what was asked
    stands in the batch script, in the command that submitted it, or in the environment that sbatch reads, too.

    Args:
        told: by ``scontrol show job``.
        number: the job's own, of an array's task, too.
    """
    if "Requeue=1" not in told.split():
        return False
    if "SBATCH_REQUEUE" in os.environ:
        return True
    try:
        script = _scontrol("write", "batch_script", number, "-").splitlines()
    except subprocess.SubprocessError:  # none: not submitted by sbatch
        script = []
    head = takewhile(lambda line: not line.strip() or line.startswith("#"), script)  # as far as sbatch reads
    asked = [*(line for line in head if line.startswith("#SBATCH")), *re.findall(r"SubmitLine=(.*)", told)]
    return any("--requeue" in line.split() for line in asked)


def _scontrol(*args: str) -> str:
    return subprocess.run(["scontrol", *args], capture_output=True, text=True, timeout=60, check=True).stdout
