"""Owns what the callbacks are tried on: rows of numbers, a model of one weight, and a Trainer on the CPU."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_qlora import quiet
from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.callbacks.checkpoints import RunCheckpoints
from lit_qlora.callbacks.guards import UpdateGuard
from lit_qlora.callbacks.metrics import TrainMetrics
from lit_qlora.callbacks.record import KeepRecord
from lit_qlora.callbacks.steps import StepCallback, StepEdge
from lit_qlora.callbacks.stop import StopOnSignal
from lit_qlora.callbacks.throughput import Throughput
from lit_qlora.callbacks.validation import HeldOutMetrics
from lit_qlora.data.cache import EncodedRows
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.figures.record import Record
from lit_qlora.model.device import seed_by_position
from lit_qlora.storage.checkpoint_io import FolderCheckpointIO
from lit_qlora.storage.run import RunFolder


def pytest_configure(config):
    """Lets through what the command line silences too; lit_qlora/quiet.py has the reason beside each."""
    for message in quiet.WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


class Rows(ChatDataModule):
    """The DataModule with rows of numbers in place of encoded text: row r is prompt 1, r and answer r, 2."""

    def __init__(self, num_rows=10, num_held_out=3, **options):
        super().__init__(**{"batch_size": 1, **options})
        self.num_rows, self.num_held_out = num_rows, num_held_out

    def setup(self, stage):
        for part, count in (("train", self.num_rows), ("validation", self.num_held_out)):
            rows = [
                {"input_ids": [1, row + 3, row + 3, 2], "labels": [IGNORE_INDEX] * 2 + [row + 3, 2]}
                for row in range(count)
            ]
            self._records[part], self._rows[part] = None, EncodedRows(rows, [4] * count, [2] * count, 0, 0)


class Tiny(LightningModule):
    """One weight, which each step moves towards a row's number; with all that the callbacks ask of QLoRAModule."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.gradient_norm = torch.tensor(0.0)
        self.strict_loading = False
        self.adapter = None
        self.chance = []
        self.seen = []
        self.nonfinite_rows = {}

    def on_train_batch_start(self, batch, batch_idx):
        seed_by_position(1, self.trainer.current_epoch, batch_idx, self.device)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.rows)
        self.chance.append(torch.rand(()).item())
        loss_sum = ((self.weight - batch.input_ids[:, 1].float().mean()) ** 2).sum()
        loss_sum = loss_sum * self.nonfinite_rows.get(batch.rows[0], 1.0)
        return {
            "loss": loss_sum / batch.step_answer_tokens,
            "loss_sum": loss_sum.detach(),
            "num_correct": torch.tensor(1),
            "num_answers": len(batch.targets),
        }

    def validation_step(self, batch, batch_idx):
        torch.rand(7)  # a validation may draw, and must change nothing by it

    def on_validation_epoch_end(self):
        loss = (self.weight.detach() - 5).square().sum()
        self.log_dict({"val/loss": loss, "val/perplexity": loss, "val/accuracy": loss}, logger=False)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        self.gradient_norm = torch.nn.utils.get_total_norm(gradients)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def save_adapter(self, folder: Path):
        (folder / "weight.json").write_text(json.dumps(self.weight.tolist()), encoding="utf-8")

    def load_adapter_weights(self, folder: Path):
        with torch.no_grad():
            self.weight.copy_(torch.tensor(json.loads((folder / "weight.json").read_text(encoding="utf-8"))))


@pytest.fixture
def tiny():
    return Tiny


@pytest.fixture
def rows():
    return Rows


@pytest.fixture(autouse=True)
def handlers():
    """Python's own at the start, for a job in the background ignores Ctrl-C; a test leaves none to the next."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def trainer(tmp_path):
    """A Trainer as training.py makes it, but for its callbacks."""

    def make(*callbacks, val_check_interval=1.0, **options):
        by_epoch = isinstance(val_check_interval, float)
        edge = StepEdge([callback for callback in callbacks if isinstance(callback, StepCallback)])
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "logger": False,
            "plugins": [FolderCheckpointIO()],
        }
        return Trainer(
            callbacks=[*callbacks, edge],
            default_root_dir=tmp_path,
            val_check_interval=val_check_interval,
            check_val_every_n_epoch=1 if by_epoch else None,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            devices=1,
            **(defaults | options),
        )

    return make


class Identity(Callback):
    """A stand-in for RunIdentity, whose records are of real bases."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["run"] = {}


@pytest.fixture
def full_run(trainer):
    """A Trainer with all that decides about a run's state, in the order of training.py."""

    def make(folder: Path, save_every_steps=3, keep=99, early=(), first=(), **options):
        run = RunFolder(folder)
        run.prepare()
        checkpoints = RunCheckpoints(run, save_every_steps, keep)
        parts = SimpleNamespace(run=run, checkpoints=checkpoints, guard=UpdateGuard(), stop=StopOnSignal(checkpoints))
        parts.trainer = trainer(
            *first,
            KeepRecord(),
            parts.guard,
            TrainMetrics(),
            Throughput(),
            HeldOutMetrics(),
            *early,
            Identity(),
            checkpoints,
            parts.stop,
            **{"logger": [Record(run)], **options},
        )
        (parts.edge,) = (callback for callback in parts.trainer.callbacks if isinstance(callback, StepEdge))
        return parts

    return make
