"""Tokens without padding over the seconds of training alone."""

from types import SimpleNamespace

import pytest
import torch

from lit_qlora.callbacks import throughput
from lit_qlora.callbacks.throughput import Throughput
from lit_qlora.figures.lines import read_lines
from lit_qlora.figures.record import Record
from lit_qlora.storage.run import RunFolder


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def lines():
    return []


@pytest.fixture
def fake(lines):
    """A stand-in for a Trainer, with what Throughput reads; records every second step."""
    logger = SimpleNamespace(log_metrics=lambda figures, step: lines.append((step, figures)))
    return SimpleNamespace(
        global_step=0,
        log_every_n_steps=2,
        loggers=[logger],
        datamodule=SimpleNamespace(num_optimizer_steps=lambda: 100),
    )


BATCH = SimpleNamespace(num_tokens=30, input_ids=torch.zeros(4, 10))  # a quarter is padding


def train(speed, trainer, clock, seconds, steps=True):
    """One micro-batch."""
    speed.on_train_batch_start(trainer, None, BATCH, 0)
    clock.now += seconds
    trainer.global_step += steps
    speed.on_train_batch_end(trainer, None, {}, BATCH, 0)
    if steps:
        speed.on_step_end(trainer, None)


def test_tokens_that_are_not_padding_are_counted_by_the_second(fake, clock, lines):
    speed = Throughput()
    speed.on_train_start(fake, None)
    train(speed, fake, clock, 1.0, steps=False)
    train(speed, fake, clock, 2.0)
    train(speed, fake, clock, 3.0)
    assert lines == [(2, {"speed/tokens_per_second": 15.0, "speed/padding_share": 0.25})]
    train(speed, fake, clock, 1.0)
    train(speed, fake, clock, 1.0)
    assert lines[1] == (4, {"speed/tokens_per_second": 30.0, "speed/padding_share": 0.25})
    assert speed.tokens_per_second == 30.0


def test_waiting_for_the_next_batch_is_counted(fake, clock, lines):
    speed = Throughput()
    speed.on_train_start(fake, None)
    train(speed, fake, clock, 1.0)
    clock.now += 1.0
    train(speed, fake, clock, 1.0)
    assert lines[0][1]["speed/tokens_per_second"] == 20.0


def validate(speed, trainer):
    speed.on_validation_start(trainer, None)


def save(speed, trainer):
    speed.on_save_checkpoint(trainer, None, {})


@pytest.mark.parametrize("pause", [validate, save])
@pytest.mark.parametrize("steps", [True, False], ids=["on an edge", "in mid-window"])
def test_validations_and_saves_are_not_counted(fake, clock, lines, pause, steps):
    speed = Throughput()
    clock.now += 50.0  # a validation before the first step
    speed.on_train_start(fake, None)
    train(speed, fake, clock, 1.0, steps=steps)
    pause(speed, fake)
    clock.now += 50.0
    train(speed, fake, clock, 1.0, steps=steps)
    if not steps:
        train(speed, fake, clock, 1.0)
        train(speed, fake, clock, 1.0)
    assert lines[0][1]["speed/tokens_per_second"] == 30.0


def test_what_other_devices_compute_is_counted(fake, clock, lines):
    """Two of four micro-batches are another device's, and take no time on this one."""
    speed = Throughput()
    speed.on_train_start(fake, None)
    for seconds, steps in ((1.0, False), (0.0, True), (1.0, False), (0.0, True)):
        train(speed, fake, clock, seconds, steps)
    assert lines[0][1]["speed/tokens_per_second"] == 60.0


def test_a_run_records_it_at_each_log_step(trainer, tiny, rows, tmp_path, clock):
    class Slow(tiny):
        def training_step(self, batch, batch_idx):
            clock.now += 2.0
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            clock.now += 50.0

    path = tmp_path / "metrics.jsonl"
    made = trainer(Throughput(), logger=Record(RunFolder(tmp_path)), val_check_interval=3, log_every_n_steps=2)
    made.fit(Slow(), datamodule=rows(7))
    # Rows of 4 tokens, none padded.
    expected = [{"step": step, "speed/tokens_per_second": 2.0, "speed/padding_share": 0.0} for step in (2, 4, 6, 7)]
    assert [*read_lines(path)] == expected
