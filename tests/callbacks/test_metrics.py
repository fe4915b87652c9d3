"""Figures of training are sums over the interval, and survive a cut-off."""

import json
import math
from types import SimpleNamespace

import torch

from lit_qlora.callbacks.metrics import TrainMetrics


def sums(loss, correct, answers):
    return {"loss_sum": torch.tensor(loss), "num_correct": torch.tensor(correct), "num_answers": answers}


def stand_in(log_every=2, last=10):
    """A stand-in for a Trainer, with what TrainMetrics reads."""
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
    metrics.on_step_end(trainer, MODULE)


def test_the_loss_is_the_sum_over_the_interval_by_its_answers():
    trainer, lines = stand_in()
    metrics = TrainMetrics()
    metrics.on_before_optimizer_step(trainer, None, trainer.optimizers[0])
    trainer.optimizers[0].param_groups[0]["lr"] = 0.25  # the schedule changes it after the step
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
    step(first, trainer, sums(0.2, 3, 5))
    trainer, lines = stand_in(log_every=2)
    trainer.global_step = 1
    step(resumed, trainer, sums(0.2, 3, 5))
    assert lines == whole
