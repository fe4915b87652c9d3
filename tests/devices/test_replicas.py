"""Several processes learn what one does: the same figures, the same adapter, through every end and any resume."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_qlora import training
from lit_qlora.batch import Batch
from lit_qlora.callbacks import checkpoints
from lit_qlora.callbacks.steps import StepCallback, StepEdge
from lit_qlora.cli import main
from lit_qlora.devices import strategy
from lit_qlora.devices.world import world
from lit_qlora.model.module import QLoRAModule
from lit_qlora.storage.checkpoint_io import FolderCheckpointIO
from lit_qlora.storage.run import RunFolder
from tests.devices.several import OPTIONS, ROUNDING, SHORT, alone, assert_same, at_batch, fit, run_several

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("place")


def test_two_processes_learn_what_one_does() -> None:
    """A step of four micro-batches and one of two; with a callback that asks for a logger in each process."""
    options = ["--trainer.limit_train_batches", "6", "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "3",
               "--trainer.callbacks", "lightning.pytorch.callbacks.LearningRateMonitor"]  # fmt: skip
    assert fit("two", 2, *options) == [0, 0]
    assert_same(alone(*options), "two")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_learn_what_one_does(count: int) -> None:
    assert fit(f"several-{count}", count, *SHORT) == [0] * count
    assert_same(alone(*SHORT), f"several-{count}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, ["--data.batch_tokens", "256", "--data.max_length", "256"]),
        (3, ["--data.batch_tokens", "256", "--data.max_length", "256", "--data.packing", "true"]),
        (3, ["--trainer.accumulate_grad_batches", "5", "--data.num_workers", "1"]),
        (2, ["--model.optimizer", "adamw_8bit", "--trainer.gradient_clip_val", "0.1"]),
        (2, ["--model.own_layers", "false"]),
    ],
    ids=["tokens", "packed", "five", "8-bit", "peft"],
)
def test_whatever_the_batches_and_the_optimizer(count: int, options: list[str]) -> None:
    run = f"whatever-{count}-{abs(hash(tuple(options)))}"
    assert fit(run, count, *SHORT, *options) == [0] * count
    assert_same(alone(*SHORT, *options), run)


@pytest.mark.slow(first=True)
def test_a_whole_run_of_three() -> None:
    """Two epochs of 71 micro-batches, which do not divide."""
    options = [
        "--trainer.limit_train_batches",
        "71",
        "--trainer.max_epochs",
        "2",
        "--trainer.log_every_n_steps",
        "10",
        "--trainer.val_check_interval",
        "0.5",
    ]
    assert fit("three", 3, *options) == [0] * 3
    assert_same(alone(*options), "three")


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "again"), [(0, 1), (1, 2), (0, 3)])
def test_a_run_that_was_killed_resumes_with_any_number(rank: int, again: int) -> None:
    run = f"killed-{rank}-{again}"
    kill = at_batch(18, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))
    statuses = fit(run, 2, *SHORT, before=kill)
    assert (statuses[rank], statuses[1 - rank]) == (None, 2)
    assert RunFolder(Path("runs", run)).saved_steps() == [2, 4]
    assert fit(run, again, *SHORT) == [0] * again
    assert_same(alone(*SHORT), run)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_run_of_one_resumes_with_several(count: int) -> None:
    run = f"more-{count}"
    assert fit(run, 1, *SHORT, before=at_batch(13, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))) == [None]
    assert fit(run, count, *SHORT) == [0] * count
    assert_same(alone(*SHORT), run)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_to_one_stops_all_and_the_same_command_resumes(
    rank: int, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    run = f"stopped-{rank}-{number}"
    assert fit(run, 2, *SHORT, before=at_batch(14, rank, lambda: signal.raise_signal(number))) == [128 + number] * 2
    out = capfd.readouterr().out
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert out.count(f"stopped and saved at step 4 by {name}; the same command resumes from here") == 1
    assert fit(run, 2, *SHORT) == [0, 0]
    assert_same(alone(*SHORT), run)


@pytest.mark.slow
def test_a_time_limit_ends_all_and_the_same_command_resumes(capfd: pytest.CaptureFixture[str]) -> None:
    slow = at_batch(5, 1, lambda: time.sleep(1.5))  # in step 2 at the latest, on the fastest machine
    assert fit("limited", 2, *SHORT, "--max_time", "00:00:00:01", before=slow) == [0, 0]
    said = re.findall(r"stopped and saved at step (\d) by max_time; the same command resumes", capfd.readouterr().out)
    assert said in (["1"], ["2"])
    assert fit("limited", 2, *SHORT) == [0, 0]
    assert_same(alone(*SHORT), "limited")


DONE = [
    "every layer recomputes its activations from now on",
    "each micro-batch is split into halves from now on; the loss of a step is the same",
]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_in_one_changes_nothing(rank: int, capfd: pytest.CaptureFixture[str]) -> None:
    def prepare() -> None:
        real, seen = QLoRAModule.summed_loss, [0]

        def summed_loss(self: QLoRAModule, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
            seen[0] += torch.is_grad_enabled()
            found = real(self, batch)
            if torch.is_grad_enabled() and world().rank == rank and 3 <= seen[0] <= 4:
                raise torch.OutOfMemoryError
            return found

        QLoRAModule.summed_loss = summed_loss  # type: ignore[method-assign]

    run = f"short-{rank}"
    assert fit(run, 2, *SHORT, before=prepare) == [0, 0]
    said = [line for line in capfd.readouterr().out.splitlines() if "out of memory" in line]
    assert [re.sub(r" of [1-9] conversations, [\d,]+ tokens with padding", "", line) for line in said] == [
        f"process {rank} of 2: out of memory at a micro-batch: {done}" for done in DONE
    ]
    assert_same(alone(*SHORT), run)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_in_one_stops_all_with_its_step_untouched(
    rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def prepare() -> None:
        real, seen = QLoRAModule.summed_loss, [0]

        def summed_loss(self: QLoRAModule, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
            loss, *rest = real(self, batch)
            seen[0] += torch.is_grad_enabled()
            return (loss * float("nan") if seen[0] == 5 and world().rank == rank else loss), *rest  # type: ignore[return-value]

        QLoRAModule.summed_loss = summed_loss  # type: ignore[method-assign]

    run = f"nan-{rank}"
    assert fit(run, 2, *SHORT, before=prepare) == [2, 2]
    found = capfd.readouterr()
    assert "the loss of step 3 is not finite (1 in a row), with training rows [" in found.err
    assert len(found.err.split("training rows [")[1].split("]")[0].split(",")) in (8, 9)  # of the whole step
    assert RunFolder(Path("runs", run)).saved_steps() == [2]
    assert fit(run, 2, *SHORT) == [0, 0]
    assert_same(alone(*SHORT), run)


@pytest.mark.slow
def test_a_disk_that_is_full_once_stops_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    def prepare() -> None:
        real, seen = FolderCheckpointIO.save_checkpoint, [0]

        def save(self: FolderCheckpointIO, *args: Any, **options: Any) -> None:
            seen[0] += 1
            if seen[0] == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(self, *args, **options)

        FolderCheckpointIO.save_checkpoint = save  # type: ignore[method-assign]

    assert fit("full", 2, *SHORT, before=prepare) == [0, 0]
    assert capfd.readouterr().err.count("training continues, and the next save retries") == 1
    assert RunFolder(Path("runs", "full")).saved_steps() == [4, 6]
    assert_same(alone(*SHORT), "full")


@pytest.mark.slow
def test_a_best_adapter_that_a_checkpoint_brings_is_written_by_the_first_alone() -> None:
    """Written before, it would replace a later and better one of another process."""

    def prepare() -> None:
        checkpoints.write_folder = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))  # type: ignore[attr-defined]
        at_batch(18, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))()

    assert fit("brought", 2, *SHORT, before=prepare) == [2, None]
    assert RunFolder(Path("runs", "brought")).saved_steps() == [2, 4] and not Path("runs/brought/adapter").exists()
    assert fit("brought", 2, *SHORT) == [0, 0]
    assert_same(alone(*SHORT), "brought")


def _adapters_differ() -> None:
    real = strategy.Replicas.post_backward

    def post_backward(self: strategy.Replicas, loss: torch.Tensor) -> None:
        real(self, loss)
        if world().rank:
            for parameter in self._trained():
                if parameter.grad is not None:
                    parameter.grad.mul_(-1)

    strategy.Replicas.post_backward = post_backward  # type: ignore[method-assign]


@pytest.mark.slow
def test_adapters_that_part_are_noticed_at_the_next_save(capfd: pytest.CaptureFixture[str]) -> None:
    assert fit("apart", 2, *SHORT, "--model.learning_rate", "0.01", before=_adapters_differ) == [2, 2]
    assert "the processes' adapters differ" in capfd.readouterr().err
    assert RunFolder(Path("runs", "apart")).saved_steps() == []


class _Count(StepCallback):
    """Counts what processes exchange within the steps of a run."""

    calls: list[str] = []  # noqa: RUF012
    by_step: list[list[str]] = []  # noqa: RUF012

    def on_step_end(self, trainer: Any, module: Any) -> None:
        self.by_step.append([*self.calls])
        self.calls.clear()


def _count() -> None:
    distributed = torch.distributed
    for name in ("all_reduce", "broadcast", "barrier", "all_gather", "all_gather_object", "broadcast_object_list"):
        real = getattr(distributed, name)

        def call(*args: Any, _real: Any = real, _name: str = name, **options: Any) -> Any:
            large = _name == "all_reduce" and args[0].numel() > 1000
            _Count.calls.append("gradients" if large else _name)
            return _real(*args, **options)

        setattr(distributed, name, call)
    real_init = StepEdge.__init__

    def init(self: StepEdge, parts: Any) -> None:
        real_init(self, [_Count(), *parts])

    StepEdge.__init__ = init  # type: ignore[method-assign]


@pytest.mark.slow
def test_nothing_is_exchanged_within_a_step() -> None:
    """Gradients once, and a few numbers at its edge, however many micro-batches it has."""

    def do(accumulate: str) -> Any:
        _count()
        main([*OPTIONS, "--run", f"counted-{accumulate}", "--trainer.max_steps", "4", "--trainer.log_every_n_steps",
              "99", "--trainer.limit_val_batches", "0", "--trainer.accumulate_grad_batches", accumulate])  # fmt: skip
        return _Count.by_step[1:]

    few, many = (run_several(2, lambda accumulate=accumulate: do(accumulate)) for accumulate in ("2", "8"))
    assert few == many
    assert few[0] == [["all_reduce", "all_reduce", "gradients", "all_reduce", "all_reduce"]] * 3


@pytest.mark.slow
def test_scoring_by_several_gives_the_figures_of_one(capfd: pytest.CaptureFixture[str]) -> None:
    run = str(Path("runs", alone(*SHORT)))
    capfd.readouterr()
    figures = []
    for count in (1, 3):
        command = ["validate", "--run", run, "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "6"]
        assert run_several(count, lambda command=command: main(command)) == [0] * count
        figures.append([line.split() for line in capfd.readouterr().out.splitlines() if "val/" in line])
    assert len(figures[0]) == len(figures[1]) == 3
    for (name, one), (other, several) in zip(*figures, strict=True):
        assert name == other and float(several) == pytest.approx(float(one), rel=ROUNDING)


def command(*options: str) -> list[str]:
    return [sys.executable, str(ROOT / "main.py"), *OPTIONS, *SHORT, *options]


@pytest.mark.slow(first=True)
def test_the_command_itself() -> None:
    done = subprocess.run(
        command("--run", "command", "--trainer.devices", "2"), capture_output=True, text=True, timeout=180, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert " train  2 devices, micro-batches dealt by size: each works 9" in done.stdout
    assert done.stdout.count("best adapter: runs/command/adapter") == 1
    assert_same(alone(*SHORT), "command")
    again = subprocess.run(
        command("--run", "command", "--trainer.devices", "2"), capture_output=True, text=True, timeout=120, check=False
    )
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.count("runs/command is finished (6 of 6 steps): nothing to do.\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--trainer.accumulate_grad_batches", "1"],
         "error: trainer.devices: 2, and a step has 1 micro-batch; give --trainer.accumulate_grad_batches 2"),
        (["--model.ran", "3"], "error: unknown option 'model.ran'; did you mean 'model.rank'?"),
        (["--data.source", "none.jsonl"], "error: none.jsonl: no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(options: list[str], line: str) -> None:
    done = subprocess.run(
        command("--run", "bad", "--trainer.devices", "2", *options),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and all(shown.startswith("  load  ") for shown in done.stdout.splitlines())
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def agent(node: int, port: int, *options: str) -> list[str]:
    """One of two torchrun agents of a process each, as on two machines."""
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
            "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port), "--",
            *command(*options)[1:]]  # fmt: skip


def two_agents(port: int, *options: list[str]) -> list[tuple[int, str, str]]:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    agents = [
        subprocess.Popen(agent(node, port, *options[node]), env=environment, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)
        for node in range(2)
    ]  # fmt: skip
    return [(one.returncode, *found) for one in agents for found in [one.communicate(timeout=180)]]


@pytest.mark.slow
def test_two_machines_of_torchrun() -> None:
    same = ["--run", "nodes"]
    first, second = two_agents(29611, same, same)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "2 devices, micro-batches dealt by size" in first[1] and second[1] == ""
    assert_same(alone(*SHORT), "nodes")


@pytest.mark.slow
def test_another_command_on_one_machine_is_refused_with_the_difference() -> None:
    other = ["--run", "other", "--model.learning_rate", "0.01"]
    found = two_agents(29612, ["--run", "other"], other)
    assert all(status for status, *_ in found)
    said = found[0][2] + found[1][2]
    assert "error: run: process 1 on " in found[0][2] and said.count("error: ") == 1
    assert "differs from the first: model.learning_rate 0.003 -> 0.01" in said


@pytest.mark.slow
def test_other_processes_than_were_asked_for_are_refused() -> None:
    three = ["--run", "asked", "--trainer.devices", "3"]
    (one, _, err), (other, _, silent) = two_agents(29613, three, three)
    assert one and other and "error: " not in silent
    words = "error: trainer.devices: with trainer.num_nodes it is 3 x 1, and 2 processes were started, 1 on this"
    assert words in err and err.count("error: ") == 1
    assert "or give --trainer.devices 1 --trainer.num_nodes 2" in err


class _One(Callback):
    """Acts in one process alone, from its second step on: within a step, or after a validation or an epoch."""

    def __init__(self, rank: int, what: str, hook: str) -> None:
        self.rank, self.what, self.hook = rank, what, hook
        self._seen = 0

    def _do(self, trainer: Trainer, hook: str) -> None:
        if world().rank != self.rank or hook != self.hook or trainer.global_step < 1:
            return
        if self.what == "stops":
            trainer.should_stop = True
        elif self.what == "exits":
            raise SystemExit(7)
        else:
            raise ValueError("mine")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._seen == trainer.global_step:
            self._do(trainer, "batch")
        self._seen = trainer.global_step

    def on_validation_end(self, trainer: Trainer, _: Any) -> None:
        self._do(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, _: Any) -> None:
        self._do(trainer, "epoch")


def _with(callback: Callback) -> Callable[[], None]:
    def prepare() -> None:
        training.own_callbacks = lambda *_: [callback]  # type: ignore[assignment]

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("hook", "saved", "then"),
    [("batch", [2], "resumes from here"), ("validation", [], "begins anew"), ("epoch", [], "begins anew")],
)
def test_a_callback_that_stops_one_process_stops_all(
    rank: int, hook: str, saved: list[int], then: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The step is finished first; a validation within a step stops the run there, with one process too."""
    run, other, options = f"callback-{hook}-{rank}", f"callback-{hook}", [*SHORT, "--save_every_steps", "9"]
    assert fit(run, 2, *options, before=_with(_One(rank, "stops", hook))) == [0, 0]
    out, err = capfd.readouterr()
    assert "error" not in err and re.search(rf"stopped at step [23]; the same command {then}", out)
    assert RunFolder(Path("runs", run)).saved_steps() == saved
    if not Path("runs", other).is_dir():
        assert fit(other, 1, *options, before=_with(_One(0, "stops", hook))) == [0]
    assert_same(other, run)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "status"), [("raises", "ValueError: mine"), ("exits", 7)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_callback_that_fails_in_one_process_ends_all(rank: int, what: str, status: Any) -> None:
    found = run_several(
        2,
        lambda: (_with(_One(rank, what, "batch"))(), main([*OPTIONS, *SHORT, "--run", f"{what}-{rank}"]))[1],
        limit_s=40,
    )
    assert found[rank] == status and found[1 - rank] == 2
