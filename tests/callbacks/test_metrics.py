"""Figures are right, stand once under their step, and survive a cut-off."""

import errno
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from lit_qlora.callbacks.metrics import HeldOutMetrics, MetricsFile, TrainMetrics, read_metrics
from lit_qlora.callbacks.steps import StepCallback


def written(file, *lines):
    """Logs (step, figures) pairs, and ends."""
    for step, figures in lines:
        file.log_metrics(figures, step=step)
    file.finalize("success")
    return file


def test_a_line_holds_all_figures_of_a_step(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    written(MetricsFile(path), (0, {"a": 1.5}), (0, {"b": 2}), (3, {"a": 0.25}))
    assert path.read_text(encoding="utf-8") == '{"step": 0, "a": 1.5, "b": 2.0}\n{"step": 3, "a": 0.25}\n'
    assert read_metrics(path) == [{"step": 0, "a": 1.5, "b": 2.0}, {"step": 3, "a": 0.25}]


def test_what_is_not_finite_is_a_string(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(MetricsFile(path), (1, {"a": math.inf, "b": -math.inf, "c": math.nan}))
    assert path.read_text(encoding="utf-8") == '{"step": 1, "a": "inf", "b": "-inf", "c": "nan"}\n'


def test_steps_that_are_gone_through_again_are_not_written_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(MetricsFile(path), (1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3}))
    before = path.read_bytes()
    written(MetricsFile(path), (2, {"a": 2}), (3, {"a": 3}), (4, {"a": 4}))
    assert path.read_bytes() == before + b'{"step": 4, "a": 4.0}\n'


def test_a_torn_last_line_goes_and_is_written_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a"', encoding="utf-8")
    assert read_metrics(path) == [{"step": 1, "a": 1.0}]
    file = MetricsFile(path)
    assert path.read_text(encoding="utf-8") == '{"step": 1, "a": 1.0}\n'
    written(file, (2, {"a": 2}))
    assert path.read_text(encoding="utf-8") == '{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n'


@pytest.mark.parametrize("content", ["", '{"step"'])
def test_a_file_without_a_whole_line_is_empty(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content, encoding="utf-8")
    assert read_metrics(path) == []
    written(MetricsFile(path), (0, {"a": 1}))
    assert path.read_text(encoding="utf-8") == '{"step": 0, "a": 1.0}\n'


def test_a_save_in_between_does_not_close_the_line(tmp_path):
    # A checkpoint is saved at a step's edge; a validation in the window after it belongs to the same step.
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log_metrics({"a": 1}, step=1)
    file.save()
    written(file, (1, {"b": 2}))
    assert read_metrics(path) == [{"step": 1, "a": 1.0, "b": 2.0}]


def test_a_run_that_was_cut_keeps_the_open_line_in_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log_metrics({"a": 1}, step=1)
    state = file.state_dict()
    file.finalize("failed")
    assert read_metrics(path) == []
    resumed = MetricsFile(path)
    resumed.load_state_dict(state)
    written(resumed, (1, {"b": 2}), (2, {"a": 3}))
    assert read_metrics(path) == [{"step": 1, "a": 1.0, "b": 2.0}, {"step": 2, "a": 3.0}]


def sums(loss, correct, answers):
    return {"loss_sum": torch.tensor(loss), "num_correct": torch.tensor(correct), "num_answers": answers}


def stand_in(log_every=2, last=10):
    """Of a Trainer, what TrainMetrics reads."""
    lines = []
    logger = SimpleNamespace(log_metrics=lambda figures, step: lines.append((step, figures)))
    trainer = SimpleNamespace(
        global_step=0,
        log_every_n_steps=log_every,
        loggers=[logger],
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.5}])],
        current_epoch=1,
        fit_loop=SimpleNamespace(batch_idx=1),
        num_training_batches=8,
        datamodule=SimpleNamespace(num_optimizer_steps=lambda: last),
    )
    return trainer, lines


MODULE = SimpleNamespace(gradient_norm=torch.tensor(3.0))


def step(metrics, trainer, *outputs):
    for index, output in enumerate(outputs):
        trainer.global_step += index == len(outputs) - 1
        metrics.on_train_batch_end(trainer, MODULE, output, None, 0)


def test_the_loss_is_the_sum_over_the_interval_by_its_answers():
    trainer, lines = stand_in()
    metrics = TrainMetrics()
    metrics.on_before_optimizer_step(trainer, None, trainer.optimizers[0])
    trainer.optimizers[0].param_groups[0]["lr"] = 0.25  # the schedule moves on behind the step
    step(metrics, trainer, sums(2.0, 1, 1), sums(30.0, 2, 9))
    assert lines == []
    step(metrics, trainer, sums(8.0, 5, 10))
    step(metrics, trainer, sums(1.0, 0, 1))
    step(metrics, trainer, sums(1.0, 1, 1))
    assert lines == [
        (
            2,
            {
                "train/loss": 2.0,
                "train/perplexity": math.exp(2.0),
                "train/accuracy": 0.4,
                "train/gradient_norm": 3.0,
                "train/learning_rate": 0.5,
                "train/epoch": 1.25,
            },
        ),
        (4, lines[1][1]),
    ]
    assert (lines[1][1]["train/loss"], lines[1][1]["train/accuracy"]) == (1.0, 0.5)
    assert metrics.last_loss == 1.0


def test_the_last_step_is_recorded_whatever_the_interval():
    trainer, lines = stand_in(log_every=100, last=1)
    step(TrainMetrics(), trainer, sums(2.0, 1, 1))
    assert [number for number, _ in lines] == [1]


def test_a_loss_beyond_the_exponential_is_an_infinite_perplexity():
    trainer, lines = stand_in(last=1)
    step(TrainMetrics(), trainer, sums(1000.0, 0, 1))
    assert lines[0][1]["train/perplexity"] == math.inf


def test_the_sums_go_through_a_checkpoint():
    trainer, whole = stand_in(log_every=2)
    first = TrainMetrics()
    step(first, trainer, sums(0.1, 1, 1))
    resumed = TrainMetrics()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    resumed._seen = 1
    step(first, trainer, sums(0.2, 3, 5))
    trainer, lines = stand_in(log_every=2)
    trainer.global_step = 1
    step(resumed, trainer, sums(0.2, 3, 5))
    assert lines == whole


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
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    trainer(HeldOutMetrics(), logger=file, val_check_interval=4).fit(tiny(), datamodule=rows(6))
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [0, 4, 6]
    assert all(line.keys() == {"step", "val/loss", "val/perplexity", "val/accuracy"} for line in lines)
    assert lines[0]["val/loss"] == 100.0  # 4 weights, each 5 away


def test_a_validation_in_mid_window_stands_in_its_steps_line(full_run, tiny, rows, tmp_path):
    parts = full_run(tmp_path / "run", 1, accumulate_grad_batches=2, val_check_interval=3)
    parts.trainer.fit(tiny(), datamodule=rows(8))
    lines = read_metrics(parts.run.metrics)
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


def test_damaged_lines_are_left_out_and_come_again_from_the_saved_step_on(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "a": step}) for step in range(8)]
    lines[1], lines[3], lines[6] = "\0" * 9, lines[3][:4] + "\0\0", "[6]"
    path.write_text("".join(f"{line}\n" for line in lines))
    assert [line["step"] for line in read_metrics(path)] == [0, 2, 4, 5, 7]
    file = MetricsFile(path, resumed_step=5)
    assert [line["step"] for line in read_metrics(path)] == [0, 2, 4]
    assert capsys.readouterr().err == (
        f"warning: {path}: damaged lines (3, from line 2 on) are left out; those from step 5 on are written again\n"
    )
    written(file, *((step, {"a": step}) for step in (5, 6, 7, 8)))
    assert [line["step"] for line in read_metrics(path)] == [0, 2, 4, 5, 6, 7, 8]
    MetricsFile(path, resumed_step=5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda whole: whole, []),
        (lambda whole: whole + b'{"st', ["its last 4 bytes are no whole line, and are left out"]),
        (
            lambda whole: whole[:-20] + bytes(20),  # of a line of 22 bytes
            [
                "its last 22 bytes are no whole line, and are left out",
                "its lines of the steps 6 to 7, which the checkpoint counted on, are lost",
            ],
        ),
        (lambda whole: whole[:22], ["its lines of the steps 1 to 7, which the checkpoint counted on, are lost"]),
        (lambda whole: b"", ["its lines of the steps 0 to 7, which the checkpoint counted on, are lost"]),
    ],
)
def test_an_end_that_was_cut_off_or_zeroed_is_told_with_the_steps_that_are_lost(tmp_path, capsys, damage, told):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (0, 3, 5, 7, 9):
        file.log_metrics({"a": step}, step)
    path.write_bytes(damage(path.read_bytes()))
    resumed = MetricsFile(path, resumed_step=9)
    resumed.load_state_dict(file.state_dict())
    assert capsys.readouterr().err.splitlines() == [f"warning: {path}: {line}" for line in told]
    assert resumed.state_dict()["counted_on"] == 7
    resumed.log_metrics({"b": 1}, 9)
    resumed.finalize("success")
    assert read_metrics(path)[-1] == {"step": 9, "a": 9.0, "b": 1.0}


def test_lines_of_an_earlier_start_that_come_again_are_not_missed(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(9)))
    file = MetricsFile(path)
    for step in (0, 1, 2):
        file.log_metrics({"a": step}, step)
    path.write_text('{"step": 0}\n{"step": 1}\n')
    MetricsFile(path, resumed_step=2).load_state_dict(file.state_dict())
    assert capsys.readouterr().err == ""


def test_lines_are_on_the_disk_before_a_checkpoint_is_and_synced_once(tmp_path, monkeypatch, capsys):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_size), real(number)))
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log_metrics({"a": 1}, step=1)
    file.save()
    assert synced == []  # the line is open still, and goes into the checkpoint
    file.log_metrics({"a": 2}, step=2)
    file.save()
    file.save()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_size]
    file.log_metrics({"a": 3}, step=3)

    def broken(number):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    file.save()
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/metrics.jsonl can't be written: Input/output error;")


def test_what_is_counted_otherwise_ends_no_line(tmp_path):
    """A callback of the user's own may log under the micro-batches of all validations."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.trainer = SimpleNamespace(global_step=1)
    file.log_metrics({"a": 1}, step=1)
    file.log_metrics({"odd": 9}, step=100)
    file.log_metrics({"b": 2}, step=1)
    file.trainer.global_step = 2
    file.log_metrics({"a": 3}, step=2)
    file.finalize("success")
    assert read_metrics(file.path) == [{"step": 1, "a": 1.0, "b": 2.0}, {"step": 2, "a": 3.0}]
