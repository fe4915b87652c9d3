"""A base that no process holds whole: the same figures as with a whole one, through every end and any resume."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.callbacks import warmup
from lit_qlora.callbacks.samples import SampleAnswers
from lit_qlora.cli import main
from lit_qlora.devices.world import world
from lit_qlora.model.hidden import Sums, Waiting
from lit_qlora.model.module import QLoRAModule
from tests.devices.several import ROUNDING, SHORT, alone, assert_same, at_batch, fit, run_several

SHARED = ["--model.shard", "true"]
ON_HOST = [*SHARED, "--model.shard_to", "host"]


pytestmark = pytest.mark.usefixtures("place")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "options", "together"),
    [(2, ON_HOST, 4), (2, [*SHARED, "--model.checkpointing", "full"], 1), (3, SHARED, 4)],
)
def test_shares_learn_what_a_whole_base_does(
    capfd: pytest.CaptureFixture[str], count: int, options: list[str], together: int
) -> None:
    """Dropout, accumulation, a validation within a step, two epochs with a short last step; one pass through the
    layers for all of a process's micro-batches of a step, or one for each."""
    run = f"shared-{count}-{together}"
    assert fit(run, count, *SHORT, *options) == [0] * count
    assert ("4 micro-batches of a step go through a layer together" in capfd.readouterr().out) == (together == 4)
    assert_same(alone(*SHORT), run)


@pytest.mark.slow
def test_micro_batches_of_an_unfinished_pass_wait_over_a_validation() -> None:
    """Two go together, of seven dealt to two processes; a validation follows the third and the sixth."""
    options = [*SHORT, "--trainer.accumulate_grad_batches", "7", "--trainer.val_check_interval", "3"]

    def two() -> None:
        warmup.together_on_host = lambda *_: 2  # type: ignore[assignment]

    assert fit("by-twos", 2, *options, *SHARED, before=two) == [0, 0]
    assert_same(alone(*options), "by-twos")


@pytest.mark.slow
def test_layers_from_the_hosts_memory_give_the_same_bits() -> None:
    assert fit("streamed", 1, *SHORT, *ON_HOST) == [0]
    assert_same(alone(*SHORT), "streamed", rounding=0)


@pytest.mark.slow
def test_a_killed_run_resumes_with_another_number_and_setting() -> None:
    """Shared by two, whole in one, shared by three."""
    for count, batch, options in ((2, 10, SHARED), (1, 9, ["--model.shard", "auto"])):
        last = count - 1
        kill = at_batch(batch, last, lambda: os.kill(os.getpid(), signal.SIGKILL))
        statuses = fit("resumed", count, *SHORT, *options, before=kill)
        assert statuses == [*[2] * last, None]
    assert fit("resumed", 3, *SHORT, *SHARED) == [0] * 3
    assert_same(alone(*SHORT), "resumed")


def held(module: QLoRAModule) -> list[int]:
    """The bytes of each storage that the 4-bit weights are in."""
    weights = [one for one in module.peft_model.parameters() if hasattr(one, "quant_state")]
    assert len(weights) == 7 * module.base.shape.num_layers
    found = {one.data.untyped_storage().data_ptr(): one.data.untyped_storage().nbytes() for one in weights}
    return [*found.values()]


@pytest.mark.slow
def test_samples_are_answered_with_all_and_no_process_holds_a_whole_base() -> None:
    options = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "2", "--samples.count", "2",
               "--samples.max_new_tokens", "4", "--trainer.accumulate_grad_batches", "2"]  # fmt: skip
    kept: list[Any] = []

    def look() -> None:
        real = SampleAnswers.on_validation_end

        def on_validation_end(self: SampleAnswers, trainer: Any, module: Any) -> None:
            real(self, trainer, module)
            kept[:] = [held(module), module.shards.own_bytes, module.shards.layer_bytes, len(module.shards)]

        SampleAnswers.on_validation_end = on_validation_end  # type: ignore[method-assign]

    def do() -> Any:
        look()
        status = main(["fit", "--trainer.accelerator", "cpu", "--run", "samples", *options, *SHARED])
        return [status, *kept]

    for status, found, own, layer, num_layers in run_several(2, do):
        assert status == 0
        assert found == [layer, layer]
        assert own == num_layers * layer // 2
    assert run_several(1, lambda: main(["fit", "--trainer.accelerator", "cpu", "--run", "whole", *options])) == [0]
    samples = [
        json.loads(Path("runs", run, "samples.jsonl").read_text().splitlines()[-1]) for run in ("samples", "whole")
    ]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_memory_that_runs_out_in_one_ends_all_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def prepare() -> None:
        real = QLoRAModule._sums_of

        def sums_of(self: QLoRAModule, waiting: Sequence[Waiting], earlier: dict[int, torch.Tensor]) -> list[Sums]:
            if waiting and world().rank == 0:
                raise torch.OutOfMemoryError
            return real(self, waiting, earlier)

        QLoRAModule._sums_of = sums_of  # type: ignore[method-assign]

    options = ["--trainer.limit_val_batches", "0", *SHARED]
    assert fit("short", 2, *options, before=prepare) == [2, 2]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    said = [line for line in lines if "another process of the run has ended" not in line]
    assert len(said) == 1 and "with model.shard no device can take another way than the others" in said[0]
    assert "give --model.checkpointing full" in said[0]


@pytest.mark.slow
def test_scoring_by_several_gives_the_figures_of_one(capfd: pytest.CaptureFixture[str]) -> None:
    """Rows that do not divide: a process that has fewer takes part in the fetching of the rest."""
    run = str(Path("runs", alone(*SHORT)))
    figures = []
    for count, options in ((1, []), (2, SHARED)):
        capfd.readouterr()
        command = [
            "validate",
            "--run",
            run,
            "--trainer.accelerator",
            "cpu",
            "--trainer.limit_val_batches",
            "5",
            *options,
        ]
        assert run_several(count, lambda command=command: main(command)) == [0] * count
        figures.append([line.split() for line in capfd.readouterr().out.splitlines() if "val/" in line])
    for (name, one), (other, several) in zip(*figures, strict=True):
        assert name == other and float(several) == pytest.approx(float(one), rel=ROUNDING)
