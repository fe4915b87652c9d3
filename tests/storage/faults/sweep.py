"""Owns the sweep of faults over a save: run by test_faults.py with faults.c loaded before all else.

For each call that changes or syncs what is on the disk, a forked child goes through the same save and is killed at
that call, or gets ENOSPC or EIO from it; its parent then looks at what a next start finds.
"""

import ctypes
import errno
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lit_qlora.callbacks.checkpoints import RunCheckpoints, read_result
from lit_qlora.storage.checkpoint_io import _NEEDED, FolderCheckpointIO
from lit_qlora.storage.files import write_file
from lit_qlora.storage.folders import verify_folder
from lit_qlora.storage.run import RunFolder
from lit_qlora.storage.state import load_state

LIBC = ctypes.CDLL(None)
LIBC.faults_count.restype, LIBC.faults_names.restype = ctypes.c_long, ctypes.c_char_p
KILLED, REPORTED, RAISED = 9, 3, 4
KINDS = {"kill": -1, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}


def arm(at: int, kind: int) -> None:
    """Have call number ``at`` from here on fail."""
    LIBC.faults_arm(ctypes.c_long(at), kind)


def weights(step: int) -> torch.Tensor:
    return torch.full((3000,), float(step))


def save(run: RunFolder, step: int) -> RunCheckpoints:
    """What a run does at a step that is the best so far: config, adapter, checkpoint, and the oldest one goes."""
    state = dict.fromkeys(_NEEDED) | {"state_dict": {"w": weights(step)}, "global_step": step}
    trainer: Any = SimpleNamespace(
        global_step=step,
        loggers=[],
        callbacks=[],
        is_global_zero=True,
        datamodule=None,
        strategy=SimpleNamespace(broadcast=lambda value: value),
        save_checkpoint=lambda target: FolderCheckpointIO().save_checkpoint(state, target),
    )

    def save_adapter(folder: Path) -> None:
        from lit_qlora.storage.files import disk_error

        try:
            save_file({"w": weights(step)}, folder / "adapter_model.safetensors")
        except Exception as error:
            raise disk_error(error, folder) from error
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")

    module: Any = SimpleNamespace(
        save_adapter=save_adapter, state_dict=lambda: {"w": weights(step)}, load_state_dict=lambda weights: None
    )
    checkpoints = RunCheckpoints(run, 1, 2)
    checkpoints._keep(trainer, module, {"val/loss": 1.0 / step})
    checkpoints._save(trainer, module)
    return checkpoints


def child(run: RunFolder, at: int, kind: int) -> int:
    """Goes through the save of step 3 with one fault, and returns how that ended."""
    pid = os.fork()
    if pid == 0:
        status = RAISED
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            arm(at, kind)
            checkpoints = save(run, 3)
            arm(-1, 0)
            status = REPORTED if checkpoints.failures else 0
        except BaseException:
            arm(-1, 0)
            write_file(run.path.parent / "traceback.txt", traceback.format_exc())
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def next_start(run: RunFolder) -> int:
    """What the next start finds, whole and consistent; returns the step that it resumes from."""
    run.prepare()
    checkpoint, problems = run.last_checkpoint()
    assert checkpoint is not None and problems == [], problems
    state = load_state(checkpoint)
    step = int(state["global_step"])
    assert torch.equal(state["state_dict"]["w"], weights(step))
    verify_folder(run.checkpoint(2))  # the one before is never touched
    verify_folder(run.adapter)
    best = read_result(run.adapter)
    assert best is not None and best["step"] in (2, 3)
    assert torch.equal(load_file(run.adapter / "adapter_model.safetensors")["w"], weights(best["step"]))
    assert best["step"] >= step, "the best adapter is older than the checkpoint"
    return step


def sweep(root: Path) -> dict[str, Any]:
    """The calls of a save, and how the child ended for each of them and one more, by kind of fault."""
    pristine, run = RunFolder(root / "pristine"), RunFolder(root / "run")
    pristine.prepare()
    for step in (1, 2):
        save(pristine, step)

    def begin() -> None:
        shutil.rmtree(run.path, ignore_errors=True)
        shutil.copytree(pristine.path, run.path)

    begin()
    arm(10**9, 0)
    save(run, 3)
    calls = LIBC.faults_names().decode().split()
    arm(-1, 0)
    ends: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for kind, number in KINDS.items():
        for at, call in enumerate([*calls, "none"], start=1):
            begin()
            status = child(run, at, number)
            ends[kind].append(status)
            try:
                check(run, status)
            except AssertionError as error:
                raise AssertionError(f"{kind} at call {at}, {call}: {error}") from error
    return {"calls": calls, "ends": ends}


def check(run: RunFolder, status: int) -> None:
    """A next start is sound, and its next save, too."""
    assert status != RAISED, (run.path.parent / "traceback.txt").read_text()
    step = next_start(run)
    assert status in (KILLED, REPORTED) or step == 3, f"status {status}, and step {step} is the last"
    assert not save(run, 4).failures
    assert run.saved_steps()[-1] == 4
    leftovers = [path.name for path in [*run.path.iterdir(), *run.checkpoints.iterdir()] if path.name[0] == "."]
    assert leftovers == [], leftovers


if __name__ == "__main__":
    print(json.dumps(sweep(Path(sys.argv[1]))))
