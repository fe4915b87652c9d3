"""The base, the last state and those of the interval are validated, once each, and recorded under their step."""

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from lit_qlora.callbacks.steps import StepCallback
from lit_qlora.callbacks.validation import HeldOutMetrics
from lit_qlora.figures.lines import read_lines
from lit_qlora.figures.record import Record
from lit_qlora.storage.run import RunFolder


class Validations(Callback):
    def __init__(self):
        self.steps = []

    def on_validation_start(self, trainer, pl_module):
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("interval", "options", "expected"),
    [
        (3, {}, [0, 3, 6, 9, 10]),
        (5, {}, [0, 5, 10]),  # falls on the last step by itself
        (10, {}, [0, 10]),
        (7, {"max_epochs": 2}, [0, 7, 14, 20]),  # counted on from epoch to epoch
        (1.0, {"max_epochs": 2}, [0, 10, 20]),
        (0.5, {}, [0, 5, 10]),
        (4, {"accumulate_grad_batches": 4}, [0, 1, 2, 3]),
        (5, {"accumulate_grad_batches": 4}, [0, 1, 3]),
        (3, {"max_steps": 4, "max_epochs": -1}, [0, 3, 4]),
        (3, {"limit_train_batches": 4}, [0, 3, 4]),
        (3, {"limit_val_batches": 0}, []),
    ],
)
def test_it_validates_before_the_first_step_and_after_the_last_once(trainer, tiny, rows, interval, options, expected):
    validations = Validations()
    trainer(validations, HeldOutMetrics(), val_check_interval=interval, **options).fit(tiny(), datamodule=rows(10))
    assert validations.steps == expected


def test_validations_are_recorded_under_their_step(trainer, tiny, rows, tmp_path):
    run = RunFolder(tmp_path)
    trainer(HeldOutMetrics(), logger=Record(run), val_check_interval=4).fit(tiny(), datamodule=rows(6))
    lines = [*read_lines(run.metrics)]
    assert [line["step"] for line in lines] == [0, 4, 6]
    assert all(line.keys() == {"step", "val/loss", "val/perplexity", "val/accuracy"} for line in lines)
    assert lines[0]["val/loss"] == 100.0  # 4 weights, each 5 away


def test_a_validation_in_mid_window_stands_in_its_steps_line(full_run, tiny, rows, tmp_path):
    parts = full_run(tmp_path / "run", 1, accumulate_grad_batches=2, val_check_interval=3)
    parts.trainer.fit(tiny(), datamodule=rows(8))
    lines = [*read_lines(parts.run.metrics)]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    # After micro-batch 3 one step was done and saved; after 6, three; the last state is always scored.
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 1, 3, 4]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]


def test_the_first_validation_leaves_training_as_it_was(trainer, tiny, rows):
    class States(StepCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert trainer.training
            assert pl_module.training

    trainer(HeldOutMetrics(), States()).fit(tiny(), datamodule=rows(4))


def test_early_stopping_in_the_very_last_step_has_it_scored_once(full_run, rows, tiny, tmp_path):
    scored = []

    class Scored(Callback):
        def on_validation_start(self, trainer, pl_module):
            scored.append(trainer.global_step)

    # By "max", a loss that falls has no gain: the second time is in the extra validation of the last step.
    early = EarlyStopping("val/loss", mode="max", patience=2)
    parts = full_run(tmp_path, first=[Scored()], early=[early], max_steps=5, val_check_interval=4)
    parts.trainer.fit(tiny(), datamodule=rows(10))
    assert scored == [0, 4, 5]
    assert early.wait_count == 2
