"""`on_step_end` is called once per optimizer step."""

import math
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from lit_qlora.callbacks import steps
from lit_qlora.callbacks.steps import StepCallback, StepEdge


class Steps(StepCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, trainer, module):
        self.steps.append((trainer.global_step, trainer.fit_loop.total_batch_idx + 1))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_called_once_after_each_step(trainer, tiny, rows, accumulate):
    steps = Steps()
    trainer(steps, accumulate_grad_batches=accumulate, max_epochs=2).fit(tiny(), datamodule=rows(10))
    # 10 micro-batches: with 3 to a step, the last step of each epoch has one.
    ends = list(range(1, 21)) if accumulate == 1 else [3, 6, 9, 10, 13, 16, 19, 20]
    assert steps.steps == list(enumerate(ends, 1))
    assert len(ends) == 2 * math.ceil(10 / accumulate)


def test_it_comes_before_the_validation_that_follows(trainer, tiny, rows):
    events = []

    class Recorder(Steps):
        def on_step_end(self, trainer, module):
            events.append(trainer.global_step)

        def on_validation_start(self, trainer, pl_module):
            events.append("validation")

    trainer(Recorder(), val_check_interval=2, limit_train_batches=4).fit(tiny(), datamodule=rows(4))
    assert events == [1, 2, "validation", 3, 4, "validation"]


def test_the_parts_act_in_their_written_order_after_all_that_a_micro_batch_adds(trainer, tiny, rows):
    events = []

    class Part(StepCallback):
        def __init__(self, name):
            self.name = name

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            events.append(f"batch {self.name}")

        def on_step_end(self, trainer, module):
            events.append(f"step {self.name}")

    class Parts(Callback):  # no StepCallbacks to the fixture, which has an edge of its own
        def __init__(self, parts):
            self.parts = parts

        def on_train_batch_end(self, *args):
            for part in self.parts:
                part.on_train_batch_end(*args)

    one, two = Part("one"), Part("two")
    trainer(Parts([one, two]), StepEdge([two, one]), accumulate_grad_batches=2).fit(tiny(), datamodule=rows(2))
    assert events == ["batch one", "batch two", "batch one", "batch two", "step two", "step one"]


def test_a_resumed_run_does_not_see_the_step_that_it_stands_at_again(full_run, tiny, rows, tmp_path):
    whole, seen = full_run(tmp_path / "run", 1, accumulate_grad_batches=2), Steps()
    whole.trainer.fit(tiny(), datamodule=rows(6))
    full_run(tmp_path / "run", 1, first=[seen], accumulate_grad_batches=2).trainer.fit(
        tiny(), datamodule=rows(6), ckpt_path=whole.run.checkpoint(1)
    )
    assert [step for step, _ in seen.steps] == [2, 3]


@pytest.mark.parametrize(
    ("owner", "name", "needed"),
    [
        ("fit_loop", "_data_fetcher", "validation_follows hands it to the next"),
        (
            "fit_loop.epoch_loop",
            "_should_check_val_fx",
            "validation_follows: the save waits for it",
        ),
        ("fit_loop.epoch_loop.batch_progress", "is_last_batch", "begin_epoch, too"),
        ("fit_loop.epoch_loop", "_broadcast_sigterm_tensor", "StepEdge: else a wait per micro-batch"),
        ("fit_loop", "restarted_mid_epoch", "begin_epoch: a run saved in an epoch's last step"),
        ("fit_loop", "reset_restart_stage", "begin_epoch, too"),
        ("fit_loop.epoch_progress.total", "processed", "begin_epoch, too"),
        ("fit_loop.epoch_progress.total", "ready", "begin_epoch, too"),
        ("fit_loop.epoch_loop", "restarted_on_last", "begin_epoch, too"),
        ("fit_loop.epoch_loop", "update_restart_stage", "begin_epoch, too"),
        ("fit_loop.epoch_loop.batch_progress.total", "completed", "begin_epoch, too"),
        ("fit_loop.epoch_loop.batch_progress.current", "completed", "begin_epoch, too"),
        ("fit_loop.epoch_progress", "increment_processed", "begin_epoch, too"),
        ("fit_loop.epoch_progress", "increment_completed", "begin_epoch, too"),
        ("fit_loop.epoch_loop.val_loop", "run", "run_validation: before the first step and after the last"),
        ("_logger_connector", "_first_loop_iter", "run_validation: training's logging goes on as it was"),
    ],
)
def test_what_is_used_of_lightnings_loops_has_its_name(trainer, owner, name, needed):
    place, renamed = trainer(), f"Lightning has renamed a part of Trainer.{owner}.{name}; callbacks/steps.py, {needed}"
    for part in (*owner.split("."), name):
        assert hasattr(place, part), renamed
        place = getattr(place, part)


def test_no_other_module_knows_the_private_parts_of_lightnings_loops():
    names = (
        "_data_fetcher", "_should_check_val_fx", "_logger_connector", "_first_loop_iter", "_broadcast_sigterm_tensor",
    )  # fmt: skip
    root = Path(steps.__file__).parents[1]
    found = {path.name for path in root.rglob("*.py") if any(name in path.read_text("utf-8") for name in names)}
    assert found == {"steps.py"}
