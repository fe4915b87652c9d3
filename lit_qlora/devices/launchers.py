"""Owns the launchers' environment variables of a single process, and SLURM's requeue.

Called before anything reads those variables. Knows no training.
"""

import os
import re
import subprocess
from itertools import takewhile

from lit_qlora.errors import UserError
from lit_qlora.place import COMMAND

COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables with the number of processes, of torchrun, srun, mpirun and other MPI launchers."""
RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
    "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK",
)  # fmt: skip
"""Variables with the rank of this process. Libraries would take a single process with a rank other than 0 for a
worker."""


def check_whole() -> None:
    """Raises UserError for a RANK without a WORLD_SIZE: of several processes, each would train by itself."""
    if os.environ.get("RANK", "").strip() and not os.environ.get("WORLD_SIZE", "").strip():
        raise UserError(
            f"RANK={os.environ['RANK']} in the environment, and no WORLD_SIZE",
            remedy=f"unset RANK and start {COMMAND} by itself, or start with torchrun",
        )


def ignore_launchers(allows_several: bool = False) -> list[str]:
    """Remove ranks and counts from this process's environment; return a note on each that named one of several.

    Raises UserError if several processes were started, unless it ``allows_several``.
    """
    for name in COUNTS:
        value = os.environ.get(name, "").strip()
        if value.isdecimal() and int(value) > 1 and not allows_several:
            raise UserError(
                f"{name}={value} in the environment: several processes were started, and this is for one",
                remedy=(
                    f"start {COMMAND} by itself (without torchrun or mpirun, under srun with "
                    f"--ntasks 1), or unset {name}; fit, validate and test support torchrun and srun"
                ),
            )
    left = {name: os.environ.pop(name) for name in (*COUNTS, *RANK_VARIABLES) if name in os.environ}
    meant = [f"{name}={value}" for name, value in left.items() if name in RANK_VARIABLES and value.strip() != "0"]
    return [f"{one} in the environment is ignored: no launcher started several processes" for one in meant]


def requeue() -> None:
    """Requeue this process's SLURM job if its user asked for that, and report it."""
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


def _was_asked(shown: str, number: str) -> bool:
    """True if a job's user asked for it to be requeued; ``shown`` is what ``scontrol show job`` says.

    On most clusters that has ``Requeue=1`` for every job: the request is in the batch script, in the command that
    submitted it, or in the environment that sbatch reads.
    """
    if "Requeue=1" not in shown.split():
        return False
    if "SBATCH_REQUEUE" in os.environ:
        return True
    try:
        script = _scontrol("write", "batch_script", number, "-").splitlines()
    except subprocess.SubprocessError:  # none: not submitted by sbatch
        script = []
    head = takewhile(lambda line: not line.strip() or line.startswith("#"), script)  # as far as sbatch reads
    asked = [*(line for line in head if line.startswith("#SBATCH")), *re.findall(r"SubmitLine=(.*)", shown)]
    return any("--requeue" in line.split() for line in asked)


def _scontrol(*args: str) -> str:
    return subprocess.run(["scontrol", *args], capture_output=True, text=True, timeout=60, check=True).stdout
