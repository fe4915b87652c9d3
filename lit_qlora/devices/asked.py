"""Owns the checks of the devices that options ask for, as far as they need no torch, which takes seconds to import."""

import os
import sys
from collections.abc import Sequence
from ctypes import CDLL
from pathlib import Path
from typing import Literal

from lit_qlora.devices.world import world
from lit_qlora.errors import UserError
from lit_qlora.place import COMMAND
from lit_qlora.wording import number_of

MOST_ON_CPU = max(8, os.cpu_count() or 1)
"""Most processes on a CPU, where they only serve to try it out."""

Precision = Literal["auto", "16-mixed", "bf16-mixed", "32-true"]
"""Values of ``trainer.precision``."""

GPUS = ("gpu", "cuda")
"""Values of ``trainer.accelerator`` that ask for a GPU."""


def has_driver() -> bool:
    """False on a Linux that has no CUDA driver, and so no GPU that torch could see."""
    try:
        return sys.platform != "linux" or bool(CDLL("libcuda.so.1"))
    except OSError:
        return False


def no_gpu(accelerator: str) -> UserError:
    """The error where ``trainer.accelerator`` asks for a GPU by ``accelerator``, and there is none."""
    return UserError(
        f"{accelerator}, and torch sees no CUDA GPU here",
        option="trainer.accelerator",
        remedy="on Colab choose one (Runtime, Change runtime type), elsewhere check the driver (nvidia-smi), or leave "
        "it at auto",
    )


def check_on_cpu(devices: int | Sequence[int], accelerator: str, most: int = MOST_ON_CPU) -> None:
    """Check the number of processes on a CPU.

    Args:
        devices: of ``trainer.devices``.
        accelerator: as ``trainer.accelerator``, for the message.
        most: processes that there may be.

    Raises:
        UserError: they are numbers of GPUs, or too many.
    """
    if not isinstance(devices, int):
        why = "a CPU has no number" if accelerator == "cpu" else "there is no GPU here"
        raise UserError(f"expected 1, for {why}, got {devices}", option="trainer.devices", remedy="leave it out")
    _check_most(devices, most, f"at most {most} processes on a CPU")


def most_gpus() -> int:
    """GPUs that torch will see here at most; 0 where the driver does not list them."""
    listed = len([*Path("/proc/driver/nvidia/gpus").glob("*")])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed if visible is None else min(listed, len([*filter(str.strip, visible.split(","))]))


def check_there(devices: int | Sequence[int], num_gpus: int) -> None:
    """Raises UserError for more GPUs than there are, or for numbers that none has.

    Args:
        devices: how many, or their numbers.
        num_gpus: GPUs on this machine, at least 1.
    """
    if world().size > 1 and num_gpus == 1:  # srun shows each process its own alone
        return
    numbers = range(devices) if isinstance(devices, int) else devices
    there = f"there {'are' if num_gpus > 1 else 'is'} {number_of(num_gpus, 'GPUs')} here"
    _check_most(len(numbers), num_gpus, f"at most {num_gpus}, for {there}")
    if max(numbers) >= num_gpus:
        raise UserError(
            f"expected numbers below {num_gpus}, for {there}, got {devices}",
            option="trainer.devices",
            remedy=f"give {[*range(len(numbers))]}, or their number",
        )


def _check_most(devices: int, most: int, expected: str) -> None:
    if devices > most:
        raise UserError(
            f"expected {expected}, got {devices}",
            option="trainer.devices",
            remedy=f"give --trainer.devices {most}, which learns the same in more time",
        )


def check_world(num_here: int, num_nodes: int) -> None:
    """Raises UserError where other processes were started than were asked for.

    Args:
        num_here: processes asked for on each machine.
        num_nodes: machines.
    """
    here = world()
    if here.size > 1 and (num_here * num_nodes, num_here) != (here.size, here.local_size):
        raise UserError(
            f"with trainer.num_nodes it is {num_here} x {num_nodes}, and {here.size} processes were started, "
            f"{here.local_size} on this machine",
            option="trainer.devices",
            remedy=f"start {num_here} on each of {number_of(num_nodes, 'machines')}, or give --trainer.devices "
            f"{here.local_size} --trainer.num_nodes {here.size // here.local_size}",
        )


def check_started(devices: object, num_here: int, num_nodes: int) -> None:
    """Raises UserError in a single process of a run that is to have several.

    Args:
        devices: as in ``trainer.devices``, for messages.
        num_here: processes on each machine.
        num_nodes: machines.
    """
    if max(num_here, num_nodes) > 1:
        raise UserError(
            f"{devices} on {number_of(num_nodes, 'machines')} make {num_here * num_nodes} processes, this is one",
            option="trainer.devices",
            remedy=f"{COMMAND} fit starts those of one machine; on several, start it with torchrun or srun",
        )


def check_shares(num_processes: int, accumulate: int) -> None:
    """Raises UserError unless an optimizer step has a micro-batch for each process.

    Args:
        num_processes: of the run.
        accumulate: micro-batches of a step, over all processes.
    """
    if 1 <= accumulate < num_processes:
        raise UserError(
            f"{num_processes}, and a step has {number_of(accumulate, 'micro-batches')}",
            option="trainer.devices",
            remedy=(
                f"give --trainer.accumulate_grad_batches {num_processes} (a larger step), and with it data.batch_size "
                f"divided by {-(-num_processes // accumulate)} (a step of as many rows)"
            ),
        )


def check_shard(shard: bool | str, to: str, num_processes: int) -> None:
    """Check that a base that is to be shared among cards has several.

    Args:
        shard: of ``model.shard``.
        to: of ``model.shard_to``.
        num_processes: of the run, with a card each.

    Raises:
        UserError: it has one.
    """
    if shard is True and to == "gpu" and num_processes == 1:
        raise UserError(
            "true, and one device has nothing to share with",
            option="model.shard",
            remedy="give --trainer.devices 2 or more, --model.shard_to host (layers come from the host's memory), or "
            "--model.shard auto",
        )
