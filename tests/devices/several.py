"""Owns how a test has several processes: forks of this one, which has everything imported, on the CPU with gloo.

And the small runs that are compared with one another.
"""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lit_qlora.batch import Batch
from lit_qlora.cli import main
from lit_qlora.devices import world
from lit_qlora.figures.lines import read_lines
from lit_qlora.model.module import QLoRAModule
from lit_qlora.storage.files import parse_json

LIMIT_S = 120


def run_several(count: int, do: Callable[[], Any], limit_s: float = LIMIT_S, joins: bool = True) -> list[Any]:
    """What ``do`` gives in each of ``count`` processes of a run, in their order, as JSON has it.

    Before it they meet, if each ``joins``.

    An exception is its text; a process that was ended by a signal gives None.
    """
    with tempfile.TemporaryDirectory() as folder:
        numbers = [_fork(rank, count, do, Path(folder), joins) for rank in range(count)]
        statuses: dict[int, int] = {}
        ends_at = time.monotonic() + limit_s
        try:
            while len(statuses) < count:
                assert time.monotonic() < ends_at, f"still running after {limit_s} s: {statuses}"
                for rank, number in enumerate(numbers):
                    if rank not in statuses and os.waitpid(number, os.WNOHANG)[0]:
                        statuses[rank] = 0
                time.sleep(0.02)
        finally:
            for rank, number in enumerate(numbers):
                if rank not in statuses:
                    os.kill(number, signal.SIGKILL)
                    os.waitpid(number, 0)
        files = [Path(folder, f"{rank}.json") for rank in range(count)]
        return [parse_json(file.read_text(encoding="utf-8")) if file.is_file() else None for file in files]


def _fork(rank: int, count: int, do: Callable[[], Any], folder: Path, joins: bool) -> int:
    number = os.fork()
    if number:
        return number
    import json

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in places.items()} | {world.STORE: str(folder / "store")}
    try:
        if joins:
            world.join(None)
        found = do()
    except BaseException as error:
        traceback.print_exc()
        found = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


ROUNDING = 1e-5
"""Largest relative difference of a figure: gradients are summed in another order."""
OPTIONS = [
    *("fit", "--trainer.accelerator", "cpu", "--samples.count", "0", "--trainer.log_every_n_steps", "1"),
    *("--trainer.accumulate_grad_batches", "4", "--data.batch_size", "3", "--model.dropout", "0.05"),
    *("--trainer.limit_val_batches", "5", "--model.target_modules", "q_proj,down_proj"),
]
SHORT = ["--trainer.limit_train_batches", "11", "--trainer.max_epochs", "2", "--trainer.val_check_interval", "10",
         "--save_every_steps", "2"]  # fmt: skip
"""Two epochs of three steps, the last of three micro-batches; a validation between the micro-batches of a step."""


def fit(run: str, count: int, *options: str, before: Callable[[], Any] = lambda: None) -> list[Any]:
    """The exit statuses of a run's processes; ``before`` is called in each of them."""

    def do() -> int:
        before()
        return main([*OPTIONS, "--run", run, *options])

    return run_several(count, do)


def alone(*options: str) -> str:
    """The name of the run of one process with ``options``, trained once per test module."""
    name = f"alone-{abs(hash(options))}"
    if not Path("runs", name).is_dir():
        assert fit(name, 1, *options) == [0]
    return name


def assert_same(run: str, other: str, rounding: float = ROUNDING) -> None:
    """Every figure but the clock's and the memory's, and every tensor of the adapter, are equal but for rounding."""
    one, two = ([*read_lines(Path("runs", name, "metrics.jsonl"))] for name in (run, other))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for line, found in zip(one, two, strict=True):
        assert line.keys() == found.keys()
        for name in line.keys() - {"speed/tokens_per_second"}:
            if not name.startswith("memory/"):
                assert found[name] == pytest.approx(line[name], rel=rounding), (line["step"], name)
    weights = [load_file(Path("runs", name, "adapter", "adapter_model.safetensors")) for name in (run, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert (weights[1][name] - value).norm() <= 5 * rounding * value.norm(), name


def at_batch(number: int, rank: int, do: Callable[[], Any]) -> Callable[[], None]:
    """Does ``do`` in the process ``rank`` as it comes to its micro-batch of that number, counted from 1."""

    def prepare() -> None:
        real, seen = QLoRAModule.training_step, [0]

        def training_step(self: QLoRAModule, batch: Batch, batch_idx: int) -> dict[str, Any]:
            seen[0] += 1
            if seen[0] == number and world.world().rank == rank:
                do()
            return real(self, batch, batch_idx)

        QLoRAModule.training_step = training_step  # type: ignore[method-assign]

    return prepare
