"""Lightning's own checkpoints go through folders and come back equal."""

import copy
import logging
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from lit_qlora.errors import UserError
from lit_qlora.storage.checkpoint_io import FolderCheckpointIO, check_checkpoint, run_record
from lit_qlora.storage.folders import DamagedFolderError, write_folder
from lit_qlora.storage.state import save_state
from tests.expect import ExpectError

pytestmark = [
    # Lightning advises more workers for the loader: there are eight rows.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning asks torch's pytree in a way that torch has deprecated.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]

STATE = {"state_dict": {"w": torch.arange(4.0)}, "epoch": 3, "optimizer_states": [{"state": {0: (1, 2.0)}}]}


class Toy(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ToyData(pl.LightningDataModule):
    position: dict[str, int]

    def train_dataloader(self) -> DataLoader:
        rows = torch.ones(8, 4)  # all alike: the order of the data is not what is tested here
        return DataLoader(TensorDataset(rows), batch_size=2)

    val_dataloader = train_dataloader

    def state_dict(self) -> dict[str, int]:
        return {"epoch": 1, "batches": 2}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state


class SaveAt(pl.Callback):
    """Saves at one step, and keeps what it saved and what came of it."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path
        self.dumped: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.dumped = copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))
            trainer.save_checkpoint(self.path, weights_only=False)


def make_trainer(root: Path, *callbacks: pl.Callback) -> pl.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return pl.Trainer(
        default_root_dir=root,
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[EarlyStopping("loss", patience=9), Timer(duration="00:01:00:00"), *callbacks],
        plugins=[
            FolderCheckpointIO(),
            MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0)),
        ],
    )


def assert_equal(found: Any, expected: Any, path: str) -> None:
    """Zero tolerance; an OrderedDict may have become a dict."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, path
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert [(type(key), key) for key in found] == [(type(key), key) for key in expected], path
        for key in expected:
            assert_equal(found[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert (type(found), len(found)) == (type(expected), len(expected)), path
        for index, item in enumerate(expected):
            assert_equal(found[index], item, f"{path}[{index}]")
    else:
        assert (type(found), found) == (type(expected), expected), path


# Lightning warns that it can't know where in the epoch the data were: they are all alike.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_real_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "step-00000006"
    save = SaveAt(6, path)
    straight = Toy()
    make_trainer(tmp_path, save).fit(straight, datamodule=ToyData())

    loaded = FolderCheckpointIO().load_checkpoint(path)
    assert set(loaded) >= {"state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers"}
    assert loaded["MixedPrecision"]["scale"] == 8.0
    assert loaded["ToyData"] == {"epoch": 1, "batches": 2}
    assert set(loaded["optimizer_states"][0]["state"]) == {0, 1}
    for state in (loaded, save.dumped):  # time passed between the two
        state["callbacks"]["Timer"].clear()
    assert_equal(loaded, save.dumped, "checkpoint")
    assert sorted(file.name for file in path.iterdir()) == [
        *("manifest.json", "state.json", "state.safetensors"),
    ]

    resumed, data = Toy(), ToyData()
    trainer = make_trainer(tmp_path)
    trainer.fit(resumed, datamodule=data, ckpt_path=path)
    assert trainer.global_step == 8
    assert data.position == {"epoch": 1, "batches": 2}
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 8
    assert_equal(resumed.state_dict(), straight.state_dict(), "weights")


def test_save_load_remove(tmp_path: Path) -> None:
    io, path = FolderCheckpointIO(), tmp_path / "checkpoints" / "step-00000001"
    io.save_checkpoint(STATE, str(path))
    loaded = io.load_checkpoint(str(path), map_location="cpu", weights_only=True)
    assert_equal(loaded, STATE, "checkpoint")
    with pytest.raises(FileExistsError):
        io.save_checkpoint(STATE, path)
    io.remove_checkpoint(path)
    io.remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []


def test_a_state_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['hyper_parameters'\]\['model'\] is a torch.nn.*Linear"):
        FolderCheckpointIO().save_checkpoint(
            {"epoch": 1, "hyper_parameters": {"model": torch.nn.Linear(1, 1)}}, tmp_path / "x"
        )
    assert list(tmp_path.iterdir()) == []


def test_damage_is_seen_before_anything_is_read(tmp_path: Path) -> None:
    io, path = FolderCheckpointIO(), tmp_path / "x"
    io.save_checkpoint(STATE, path)
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1  # in the numbers: safetensors itself would not notice
    (path / "state.safetensors").write_bytes(data)
    with pytest.raises(DamagedFolderError, match=r"'state.safetensors': expected sha256="):
        io.load_checkpoint(path)
    with pytest.raises(DamagedFolderError, match="expected a folder, found nothing"):
        io.load_checkpoint(tmp_path / "y")


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("https://example.org/x", "a URL"),
        ("s3://bucket/x", "a URL"),
        ("file:///x", "a URL"),
        (Path("https://example.org/x"), "a URL"),
        ("x/last.ckpt", "a file"),
        ("x/model.pt", "a file"),
        ("x/pytorch_model.bin", "a file"),
        ("notes", "a file"),
    ],
)
def test_urls_and_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | Path, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").touch()
    io = FolderCheckpointIO()
    for call in (lambda: io.save_checkpoint({}, path), lambda: io.load_checkpoint(path)):
        with pytest.raises(UserError, match=f" is {what}, .*: give .* a checkpoint folder") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        io.remove_checkpoint(path)
    assert os.listdir() == ["notes"]  # noqa: PTH208 - nothing else was made here


# What a manifest can't find

WHOLE = {"epoch": 0, "global_step": 1, "loops": {}, "optimizer_states": [], "state_dict": {"w": torch.arange(4.0)}}
WHOLE |= {part: {} for part in ("callbacks", "lr_schedulers", "metrics_line", "run")}


def fill_state(state: dict[str, Any]) -> Any:
    return lambda folder: save_state(state, folder)


def pickled(name: str) -> Any:
    def fill(folder: Path) -> None:
        save_state(WHOLE, folder)
        (folder / name).write_bytes(b"\x80\x04cposix\nsystem\n(S'touch pwned'\ntR.")

    return fill


def other_tensors(folder: Path) -> None:
    save_state(WHOLE, folder)
    save_file({"v": torch.zeros(1)}, folder / "state.safetensors")


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (pickled("state.json"), "'state.json': expected a state of version 1, found "),
        (pickled("state.safetensors"), "'state.safetensors': expected tensors, found Error while deserializing"),
        (fill_state({"weights": 1}), "'state.json': expected a training's state, found no callbacks"),
        (other_tensors, "'state.safetensors': expected the tensors of the state, found others ("),
    ],
)
def test_a_sealed_folder_of_something_else_is_no_checkpoint(tmp_path: Path, fill: Any, expected: str) -> None:
    write_folder(tmp_path / "c", fill)
    with pytest.raises(DamagedFolderError) as caught:
        check_checkpoint(tmp_path / "c")
    assert str(caught.value).startswith(f"{tmp_path / 'c'}: {expected}")


def test_a_checkpoint_with_a_file_of_another_program_is_read(tmp_path: Path) -> None:
    FolderCheckpointIO().save_checkpoint(WHOLE, tmp_path / "c")
    (tmp_path / "c" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    check_checkpoint(tmp_path / "c")
    assert FolderCheckpointIO().load_checkpoint(tmp_path / "c")["global_step"] == 1


TEXTS = ("base", "base_name", "tokenizer", "prompt_format", "train_rows", "held_out_rows", "precision")
RECORD = dict.fromkeys(TEXTS, "x") | {"adapter": None, "steps": 4, "settings": {"trainer": {"max_steps": 4}}}
WRONG: dict[str, list[Any]] = {name: [None, 3, True, ["x"], {}] for name in TEXTS} | {
    "adapter": [3, True, {}],
    "steps": [None, "4", True, 4.0, -1],
    "settings": [None, 3, "x", [], {"model": 3}, {"trainer": []}, {"trainer": {"max_epochs": "3"}}],
}


def test_a_record_of_a_run_as_it_was_saved() -> None:
    assert run_record({"run": RECORD}, "here") == RECORD
    assert run_record({"run": RECORD | {"adapter": "digest", "settings": {}}}, "here")["adapter"] == "digest"


@pytest.mark.parametrize("name", RECORD)
def test_a_record_of_a_run_that_was_altered(name: str, expect_error: ExpectError) -> None:
    words = "step-4", f"record of the run, {name}: expected", "remove that folder"
    less = {other: value for other, value in RECORD.items() if other != name}
    expect_error(lambda: run_record({"run": less}, "step-4"), *words, "got nothing", option="run")
    for value in WRONG[name]:
        expect_error(
            lambda value=value: run_record({"run": less | {name: value}}, "step-4"), *words, value, option="run"
        )


@pytest.mark.parametrize("record", [None, 3, "x", [], {}])
def test_no_record_of_a_run(record: object, expect_error: ExpectError) -> None:
    expect_error(lambda: run_record({"run": record}, "step-4"), "step-4", "base: expected a text", option="run")
