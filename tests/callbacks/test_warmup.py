"""The trial before training: the largest micro-batch, every part of a step, and nothing of it left."""

import copy
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from lit_qlora.callbacks import warmup
from lit_qlora.cli import main
from lit_qlora.forecast import foresee, memory
from lit_qlora.model import graphs, hidden
from lit_qlora.model.module import QLoRAModule

SHORT = ["fit", "--trainer.max_steps", "3", "--samples.count", "0", "--trainer.limit_val_batches", "1",
         "--trainer.log_every_n_steps", "1", "--save_every_steps", "1", "--data.max_length", "96"]  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """Each micro-batch that goes through the module, and what the Trainer was at when it did."""
    batches = []
    real = QLoRAModule.summed_loss

    def watched(self, batch):
        batches.append((batch, torch.is_grad_enabled(), copy.deepcopy(dict(self.trainer.optimizers[0].state))))
        return real(self, batch)

    monkeypatch.setattr(QLoRAModule, "summed_loss", watched)
    return batches


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_nothing_of_the_trial_stays(tmp_path, monkeypatch, seen, optimizer):
    monkeypatch.chdir(tmp_path)
    finished = {}
    for on_cpu in (False, True):
        monkeypatch.setattr(warmup, "ON_CPU", on_cpu)
        seen.clear()
        assert main([*SHORT, "--run", f"./run-{on_cpu}", "--model.optimizer", optimizer]) == 0
        finished[on_cpu] = (
            (tmp_path / f"run-{on_cpu}" / "adapter" / "adapter_model.safetensors").read_bytes(),
            [batch.rows for batch, _, _ in seen],
        )
    (weights, rows), (tried_weights, tried_rows) = finished[False], finished[True]
    assert tried_weights == weights
    assert tried_rows[2:] == rows  # forward with gradients, and evaluation
    (first, with_gradients, _), (second, without, state) = seen[0], seen[1]
    assert (with_gradients, without) == (True, False)
    held = [(name, value) for of_one in state.values() for name, value in of_one.items() if "qmap" not in name]
    assert held and not any(torch.as_tensor(value).any() for _, value in held)  # its memory stays, and is used again
    assert first.rows == second.rows == tried_rows[3]  # which the run begins with, behind a validation batch


def test_on_a_resume_the_optimizers_state_stays(tmp_path, monkeypatch, seen):
    monkeypatch.chdir(tmp_path)
    ends = []
    for on_cpu in (False, True):
        monkeypatch.setattr(warmup, "ON_CPU", on_cpu)
        run = ["--run", f"./run-{on_cpu}", "--trainer.max_epochs", "1", "--model.schedule", "constant"]
        assert main([*SHORT, *run, "--trainer.max_steps", "2"]) == 0
        assert main([*SHORT, *run, "--trainer.max_steps", "4"]) == 0
        ends.append((tmp_path / f"run-{on_cpu}" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_memory_that_runs_out_in_the_trial_is_reported_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warmup, "ON_CPU", True)
    real = QLoRAModule.summed_loss

    def short_of_memory(self, batch):
        if len(batch.rows) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError
        return real(self, batch)

    monkeypatch.setattr(QLoRAModule, "summed_loss", short_of_memory)
    assert main([*SHORT, "--model.checkpointing", "none"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line or "step 0" in line]
    assert [line.partition(": ")[2] for line in lines if "memory" in line] == [
        "every layer recomputes its activations from now on",
        "each micro-batch is split into halves from now on; the loss of a step is the same",
    ]


def test_recordings_know_how_often_each_shape_is_left(tmp_path, monkeypatch):
    """Two steps of 2 micro-batches, by the shares of an epoch; and as many, of 4, in the resumed run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warmup, "ON_CPU", True)
    monkeypatch.setattr(graphs, "_record", lambda run, pool: SimpleNamespace(replay=torch.enable_grad()(run)))
    step = SimpleNamespace(uses_cuda_graphs=True, kept_layers=0, hosted_layers=0, dequantised_layers=0, together=1)
    batches = SimpleNamespace(shapes=Counter({(4, 64): 12, (4, 96): 4}))
    monkeypatch.setattr(warmup, "foresee", lambda *_: SimpleNamespace(step=step, batches=batches))
    seen, real = [], graphs.Graphs.__init__
    monkeypatch.setattr(graphs.Graphs, "__init__", lambda self, *given: seen.append(given[3]) or real(self, *given))
    options = [*SHORT, "--run", "./run", "--trainer.accumulate_grad_batches", "2", "--model.schedule", "constant"]
    assert main([*options, "--trainer.max_steps", "2"]) == 0
    assert main([*options, "--trainer.max_steps", "4"]) == 0
    assert seen == [{(4, 64): 3.0, (4, 96): 1.0}] * 2


ACCUMULATED = [*SHORT, "--trainer.accumulate_grad_batches", "3", "--model.dropout", "0.1", "--data.batch_size", "2"]


@pytest.mark.slow
def test_on_a_host_without_room_for_weights_micro_batches_go_together_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """All weights dequantised, or none and a step's three micro-batches together, or none and two of them."""
    monkeypatch.chdir(tmp_path)
    found, taken, seen = [], [], []
    real, real_kept = QLoRAModule.summed_losses, memory.kept_activations

    def watched(self, waiting, earlier):
        seen.append(len(waiting))
        return real(self, waiting, earlier)

    def kept(step):
        taken.append(step.tokens * real_kept(step))
        return real_kept(step)

    monkeypatch.setattr(QLoRAModule, "summed_losses", watched)
    monkeypatch.setattr(memory, "kept_activations", kept)
    for number, (weights, expected) in enumerate(((True, []), (False, [3] * 3), (False, [2, 1] * 3))):
        free = 4 * taken[-1] if number == 2 else 10**10  # of which half counts
        monkeypatch.setattr(hidden, "host", SimpleNamespace(room_bytes=lambda weights=weights: weights * 10**10))
        monkeypatch.setattr(foresee.host, "memory_bytes", lambda free=free: (free, free))
        seen.clear()
        assert main([*ACCUMULATED, "--run", f"./run-{number}"]) == 0
        assert seen == expected
        run = tmp_path / f"run-{number}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        figures = [[(name, value) for name, value in line.items() if name[:4] in ("trai", "val/")] for line in lines]
        found.append((figures, (run / "adapter" / "adapter_model.safetensors").read_bytes()))
    assert found[0] == found[1] == found[2]
    assert "2 micro-batches of a step go through a layer together" in capsys.readouterr().out
