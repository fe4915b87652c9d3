"""Owns how several processes of one command begin and end: one per device, each with the command's own options.

They begin before anything heavy is imported. The first that fails has the last word, and the others end within
seconds; none outlives the command, however that ends. Also knows what torchrun and srun leave in the environment.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from lit_qlora.console import complain
from lit_qlora.devices.launchers import check_whole, ignore_launchers
from lit_qlora.devices.world import OF_TORCHRUN, STORE, LostError, World, half_of, lost, master, world
from lit_qlora.signals import (
    SIGNALS,
    Handler,
    give_back,
    hear,
    hold_off,
    no_signals_for_children,
    say_stopped,
    take_over,
)

PARENT = "LIT_QLORA_PARENT"
"""Environment variable of a process started by `run_several`: the process id of its parent."""
AGENT = "TORCHELASTIC_RUN_ID"
"""Environment variable of a process started by torchrun's agent."""
GRACE_S = 6.0
"""Seconds that the other processes have to end by themselves after one has failed."""
LOST = 75
"""The exit status, between themselves and the command that began them, of a process that has lost another."""
WHY = {
    "SIGKILL": " (as the system does where the host's memory is short)",
    "SIGABRT": " (as NCCL does where another card did not answer for 600 s; NCCL_P2P_DISABLE=1 may help)",
}
CODE = "import sys; sys.path.insert(0, {root!r}); from lit_qlora.cli import main; sys.exit(main())"


class SeveralAsked(Exception):  # noqa: N818  # nothing went wrong
    """An exception of a process that is alone, though its options ask for as many as its argument says."""


def take_place(is_for_several: bool = True) -> list[str]:
    """Find which process this is, by what torchrun, srun or `run_several` left in the environment, and record it there
    in torchrun's names alone.

    Args:
        is_for_several: False for what one process does. That it is one of several stays in the environment, for the
            error to be reported once.

    Returns:
        What else was left by launchers, and is ignored. Raises UserError if the environment says one half of it, or
        several processes were started for what one does.
    """
    found = _by_torchrun() or _by_slurm()
    if found is None and is_for_several:
        check_whole()
    try:
        left = ignore_launchers(allows_several=found is not None and is_for_several)
    finally:
        os.environ.update(found or {})
    if found is None:
        return left
    if STORE not in os.environ and is_for_several:
        master()
    if PARENT in os.environ or AGENT in os.environ:
        _end_with_parent(int(os.environ.get(PARENT, os.getppid())))
        hear()
    return []


def _by_torchrun() -> dict[str, str] | None:
    values = {name: os.environ[name].strip() for name in OF_TORCHRUN if os.environ.get(name, "").strip().isdecimal()}
    if int(values.get("WORLD_SIZE", "1")) < 2:
        return None
    wrong = [name for name in OF_TORCHRUN if name not in values]
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        wrong += [rank] if not wrong and int(values[rank]) >= int(values[size]) else []
    if wrong:
        raise half_of("WORLD_SIZE", wrong[0])
    return values


def _by_slurm() -> dict[str, str] | None:
    """The variables that torchrun would set, for a process that srun started as one of several; None for any other."""
    number = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if not number.isdecimal() or int(number) < 2:
        return None
    defaults = {
        "SLURM_PROCID": "",
        "SLURM_LOCALID": "",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_JOB_ID": "0",
        "SLURM_STEP_ID": "0",
    }
    found = {name: os.environ.get(name, default).strip() for name, default in defaults.items()}
    first = re.match(r"[^,\[\s]+(?:\[(\d+))?", os.environ.get("SLURM_STEP_NODELIST", "localhost"))
    wrong = [name for name, value in found.items() if not value.isdecimal()]
    if wrong or first is None:
        raise half_of("SLURM_STEP_NUM_TASKS", (*wrong, "SLURM_STEP_NODELIST")[0], "srun")
    rank, local_rank, nodes, job, step = (int(value) for value in found.values())
    nodes = max(nodes, 1)
    host = first[0].replace("[", "") if first[1] else first[0]
    return {
        "WORLD_SIZE": number,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(-(-int(number) // nodes)),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1" if nodes == 1 else host),
        # Jobs and steps may run side by side.
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(15000 + (job + 97 * step) % 5000)),
    }


def _end_with_parent(parent: int) -> None:
    """Have the system end this process when its parent ends, even if that is killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def was_started() -> bool:
    """True in a process that `run_several` began."""
    return PARENT in os.environ


def lose(error: LostError) -> int:
    """Exit status of a process of `run_several` that lost another; ``error`` is printed to its kept output."""
    if world().rank:
        complain(error, of_process())
    return LOST


def of_process(place: World | None = None) -> str:
    """The prefix of an error of one of several processes: the one at ``place``; by default this one."""
    place = place or world()
    return f"error: process {place.rank} of {place.size}: "


class _Child:
    """One of the processes. The output of all but the first is kept, and shown if it is the first to fail."""

    def __init__(self, args: Sequence[str], rank: int, count: int, store: Path) -> None:
        self.rank = rank
        self.said: IO[bytes] | None = tempfile.TemporaryFile() if rank else None  # noqa: SIM115  # until the end
        places = dict(zip(OF_TORCHRUN, map(str, World(rank, count, rank, count)), strict=True))
        environment = os.environ | places | {STORE: str(store), PARENT: str(os.getpid())}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its own word on how a process ended
        if sys.flags.utf8_mode:
            environment["PYTHONUTF8"] = "1"
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": self.said}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", CODE.format(root=str(Path(__file__).parents[2])), *args],
            env=environment,
            process_group=0 if os.name != "nt" else None,  # Ctrl-C is handed on, once
            **(quiet if rank else {}),
        )
        self.status: int | None = None

    def send(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


def run_several(args: Sequence[str], count: int) -> int:
    """Run a command in several processes of this machine, each with a device of its own.

    Args:
        args: its command line, from the verb on.
        count: of the processes.

    Returns:
        The exit status: that of the first that failed; 0 if none did.
    """
    children: list[_Child] = []
    sent: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        sent.append(number)
        for child in children:
            child.send(number)

    previous = take_over(hand_on, SIGNALS)
    try:
        with tempfile.TemporaryDirectory(prefix="lit_qlora-") as folder:
            with no_signals_for_children():  # until each can handle one: see `take_place`
                children.extend(_Child(args, rank, count, Path(folder, "store")) for rank in range(count))
            return _wait(children, sent, hand_on)
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()
            if child.said is not None:
                child.said.close()
        give_back(previous)
        if sent:
            hold_off()


def _wait(children: list[_Child], sent: list[int], hand_on: Handler) -> int:
    """Wait until all have ended; return the status of the first that failed, after showing what it said.

    Signals in ``sent`` have reached them through ``hand_on``.
    """
    living, failed, ends_at = [*children], None, float("inf")
    first_status, alone_until = 0, float("inf")
    while living and time.monotonic() < ends_at:
        time.sleep(0.05)
        for child in [child for child in living if child.process.poll() is not None]:
            living.remove(child)
            code = child.process.returncode
            child.status = 128 - code if code < 0 else code
            first_status = first_status or (0 if code == LOST else child.status)
            if code >= 128 or -code in SIGNALS:  # all end together, saved, unless one was stopped before they had met
                alone_until = min(alone_until, time.monotonic() + GRACE_S)
            elif code != 0 and (failed is None or (failed.status == LOST and (code != LOST or failed.rank == 0))):
                # One that was lost says more than one that has lost it; and what the first says is not kept.
                failed, ends_at = child, time.monotonic() + (GRACE_S if code > 0 else 0.5)
        if living and not sent and time.monotonic() > alone_until:
            hand_on(first_status - 128, None)
            ends_at = time.monotonic() + GRACE_S
    first = children[0]
    has_spoken = first.status not in (None, 0, LOST)
    if failed is None or (failed.status == LOST and first_status):
        if first_status and not has_spoken:
            say_stopped(first_status - 128)
        return first_status
    if not has_spoken or failed.process.returncode < 0:
        complain(_last_word(failed, len(children)))
    return 2 if failed.status == LOST else failed.status or 1


def _last_word(child: _Child, count: int) -> str:
    """The reason why ``child`` ended, in one line if the user can fix it."""
    code = child.process.returncode
    if code < 0:
        name = signal.Signals(-code).name
        short = WHY.get(name, "")
        return (
            f"error: process {child.rank} of {count} was ended by {name}{short}; the same command resumes from the "
            "last checkpoint"
        )
    said = ""
    if child.said is not None:
        child.said.seek(0)
        said = child.said.read().decode(errors="replace").strip()
    if said and code not in (2, LOST):
        return f"process {child.rank} of {count}:\n{said}"
    if said:  # which names the process
        return said.splitlines()[-1]
    return f"{of_process(World(child.rank, count))}{lost() if code == LOST else f'ended with status {code}'}"
