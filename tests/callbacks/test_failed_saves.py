"""A save that fails is told, training goes on, and what was saved before is not touched."""

import errno
import json
import os
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_ndarray

from lit_qlora.callbacks.checkpoints import read_result
from lit_qlora.callbacks.metrics import MetricsFile, read_metrics
from lit_qlora.callbacks.tensorboard import RunTensorBoard
from lit_qlora.storage import files, folders
from lit_qlora.storage.folders import verify_folder
from lit_qlora.storage.state import load_state


@pytest.fixture
def failing(monkeypatch):
    """Makes every sync below a folder of this name fail, until it is mended."""
    real, broken = files.sync_file, {}

    def sync(path):
        for name, number in broken.items():
            if name in str(path):
                raise OSError(number, os.strerror(number), str(path))
        real(path)

    monkeypatch.setattr(folders, "sync_file", sync)
    return broken


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_checkpoint_that_fails_is_told_and_tried_again(full_run, tiny, rows, tmp_path, capsys, failing, number):
    class Breaks(tiny):
        def training_step(self, batch, batch_idx):
            failing.clear()
            if 4 <= len(self.seen) < 7:
                failing["checkpoints"] = number
            return super().training_step(batch, batch_idx)

    parts = full_run(tmp_path / "run", save_every_steps=2, keep=2, limit_val_batches=0)
    module = Breaks()
    parts.trainer.fit(module, datamodule=rows(8))
    assert len(module.seen) == 8
    assert parts.run.saved_steps() == [4, 8]  # 6 failed, and 4 was not removed for it
    for step in (4, 8):
        verify_folder(parts.run.checkpoint(step))
    error = capsys.readouterr().err
    (line,) = error.splitlines()
    path = parts.run.checkpoint(6)
    assert line.startswith(f"error: {path} could not be saved: {os.strerror(number)} (0.0 MB needed, ")
    assert line.endswith(" MB free); training goes on, the next save tries again")
    assert parts.checkpoints.failures == {}
    assert sorted(path.name for path in parts.run.checkpoints.iterdir()) == ["step-00000004", "step-00000008"]


def test_numbers_do_not_change_by_a_failed_save(full_run, tiny, rows, tmp_path, failing):
    def weight(folder):
        module = tiny()
        full_run(folder, save_every_steps=2).trainer.fit(module, datamodule=rows(8))
        return module.weight

    good = weight(tmp_path / "good")
    failing["bad"] = errno.ENOSPC
    assert torch.equal(weight(tmp_path / "bad"), good)


def test_the_best_adapter_that_failed_is_saved_with_the_next(full_run, tiny, rows, tmp_path, capsys, failing):
    """Its weights, not those that have moved on since; and these stay what they are."""
    weights = {}

    class Breaks(tiny):
        def on_validation_epoch_end(self):
            self.log_dict({"val/loss": [9.0, 2.0, 3.0, 4.0, 5.0][len(self.seen)]}, logger=False)
            weights[len(self.seen)] = self.weight.tolist()
            failing.clear()
            if len(self.seen) < 2:
                failing["/.adapter."] = errno.ENOSPC

    def fit(folder):
        parts = full_run(folder, save_every_steps=3, val_check_interval=1)
        parts.trainer.fit(Breaks(), datamodule=rows(4))
        return parts

    parts = fit(tmp_path / "run")
    assert read_result(parts.run.adapter) == {"step": 1, "val/loss": 2.0}
    assert json.loads((parts.run.adapter / "weight.json").read_text()) == weights[1] != weights[3]
    assert capsys.readouterr().err.count("could not be saved: No space left on device") == 1
    moved = weights[4]
    failing.clear()
    whole = full_run(tmp_path / "whole", save_every_steps=3, val_check_interval=1)
    module = tiny()
    whole.trainer.fit(module, datamodule=rows(4))
    assert load_state(whole.run.checkpoint(4))["state_dict"]["weight"].tolist() == moved


def test_the_best_adapter_that_failed_goes_through_a_checkpoint(full_run, tiny, rows, tmp_path, failing):
    """Killed before it could be saved, the run saves it when it goes on."""
    weights = {}

    class Losses(tiny):
        def on_validation_epoch_end(self):
            step = self.trainer.global_step
            self.log_dict({"val/loss": [9.0, 2.0, 3.0, 4.0, 5.0][step]}, logger=False)
            weights[step] = self.weight.tolist()

    failing["/.adapter."] = errno.EIO
    parts = full_run(tmp_path / "run", save_every_steps=1, val_check_interval=1)
    parts.trainer.fit(Losses(), datamodule=rows(4))
    assert not parts.run.adapter.exists()
    failing.clear()
    resumed, module = full_run(tmp_path / "run", save_every_steps=1, val_check_interval=1), Losses()
    resumed.trainer.fit(module, datamodule=rows(4), ckpt_path=parts.run.checkpoint(3))
    assert read_result(resumed.run.adapter) == {"step": 1, "val/loss": 2.0}
    assert json.loads((resumed.run.adapter / "weight.json").read_text()) == weights[1] == module.weight.tolist()
    assert load_state(parts.run.checkpoint(4))["state_dict"]["weight"].tolist() == weights[4]


def test_an_adapter_that_never_gets_to_the_disk_is_still_loaded_back(full_run, tiny, rows, tmp_path, failing):
    failing["/.adapter."] = errno.ENOSPC
    module, best = tiny(), []

    class Losses(tiny):
        def on_validation_epoch_end(self):
            self.log_dict({"val/loss": [9.0, 2.0, 3.0][len(self.seen)]}, logger=False)
            best.append(self.weight.tolist())

    parts, module = full_run(tmp_path / "run", val_check_interval=1), Losses()
    parts.trainer.fit(module, datamodule=rows(2))
    assert module.weight.tolist() == best[1] != best[2]
    assert list(parts.checkpoints.failures) == ["adapter"]
    assert not parts.run.adapter.exists()


def test_an_old_checkpoint_that_cannot_be_removed_is_only_warned_of(
    full_run, tiny, rows, tmp_path, capsys, monkeypatch
):
    real = Path.rename

    def rename(path, target):
        if ".gone-" in str(target):
            raise PermissionError(13, "Permission denied")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    parts = full_run(tmp_path / "run", save_every_steps=1, keep=2, limit_val_batches=0)
    parts.trainer.fit(tiny(), datamodule=rows(3))
    assert parts.run.saved_steps() == [1, 2, 3]
    old = parts.run.checkpoint(1)
    assert capsys.readouterr().err == f"warning: the old checkpoint {old} can't be removed: Permission denied\n"


def test_time_between_saves_is_bounded_and_changes_no_number(full_run, tiny, rows, tmp_path):
    now = [0.0]

    class Slow(tiny):
        def training_step(self, batch, batch_idx):
            now[0] += 60
            return super().training_step(batch, batch_idx)

    def fit(folder, minutes):
        parts, module = full_run(folder, save_every_steps=100, accumulate_grad_batches=2), Slow()
        parts.checkpoints.save_every_minutes, parts.checkpoints.clock = minutes, lambda: now[0]
        parts.trainer.fit(module, datamodule=rows(14))
        return parts.run.saved_steps(), module.weight.tolist()

    steps, weight = fit(tmp_path / "slow", 5.0)
    assert steps == [3, 6, 7]  # six minutes are the first edge behind five
    assert fit(tmp_path / "none", None) == ([7], weight)


# What is recorded


@pytest.fixture
def full_disk(monkeypatch):
    """Lets files take so many bytes more, in all; None for no end."""
    left = [None]
    real = Path.open

    def open_(path, *args, **kwargs):
        file = real(path, *args, **kwargs)
        if "a" not in (args[0] if args else kwargs.get("mode", "r")):
            return file

        class Limited:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, content):
                if left[0] is None:
                    return file.write(content)
                if not left[0]:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                count = file.write(content[: left[0]])
                left[0] -= count
                return count

        return Limited()

    monkeypatch.setattr(Path, "open", open_)
    return left


@pytest.mark.parametrize("room", [0, 1, 21, 22, 23, 30])
def test_lines_that_do_not_fit_are_kept_and_written_later(tmp_path, capsys, full_disk, room):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log_metrics({"a": 1}, step=1)
    file.log_metrics({"a": 2}, step=2)
    full_disk[0] = room
    file.log_metrics({"a": 3}, step=3)
    file.log_metrics({"a": 4}, step=4)
    file.log_metrics({"a": 5}, step=5)
    assert capsys.readouterr().err == (
        f"error: {path} can't be written: No space left on device; training goes on, its lines are kept for later\n"
    )
    state = file.state_dict()
    full_disk[0] = None
    resumed = MetricsFile(path)  # killed here, and gone on with from the checkpoint
    resumed.load_state_dict(state)
    for one in (resumed, file):
        one.finalize("success")
        assert read_metrics(path) == [{"step": step, "a": float(step)} for step in (1, 2, 3, 4, 5)]
        assert path.read_bytes().count(b"\n") == 5


@pytest.fixture
def board_disk(monkeypatch):
    """A list of one number: the records that TensorBoard's files still take; None: all of them."""
    left, real = [None], RecordWriter.write

    def write(self, data):
        if left[0] == 0:
            self._writer.write(b"torn")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] = None if left[0] is None else left[0] - 1
        real(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    # Files of one second are told apart by a count, and read in the order of their names: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", SimpleNamespace(get=count(100).__next__))
    return left


def curve(folder):
    """Steps and values, the texts' steps; each file is read to its end, which a torn record would hide."""
    events = EventAccumulator(str(folder)).Reload()
    values = [(e.step, make_ndarray(e.tensor_proto).item()) for e in events.Tensors("a")]
    return values, [e.step for e in events.Tensors("samples/text_summary")]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("room", [0, 1, 2, 3])
@pytest.mark.parametrize("was_saved", [True, False])
def test_what_tensorboard_could_not_take_is_written_once_there_is_room(tmp_path, capsys, board_disk, room, was_saved):
    RunTensorBoard(tmp_path, "a: 1\n", None).log_metrics({"a": 9.0}, 3)  # of a process that was killed: to be dropped
    logger = RunTensorBoard(tmp_path, "a: 1\n", None)
    if not was_saved:
        board_disk[0] = room
    logger.log_metrics({"a": 1.0}, 1)
    if was_saved:
        logger.save()
        board_disk[0] = room
    for step in (2, 3):
        logger.log_metrics({"a": float(step)}, step)
        logger.add_text("samples", "text", step)
        logger.save()
    state = logger.state_dict()
    assert capsys.readouterr().err == (
        f"error: TensorBoard's file in {tmp_path} can't be written: No space left on device; "
        "training goes on, its figures are kept for later\n"
    )
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    board_disk[0] = None
    for step in (4, 5):
        logger.log_metrics({"a": float(step)}, step)
        logger.save()
    logger.finalize("success")
    assert curve(tmp_path) == ([(step, float(step)) for step in (1, 2, 3, 4, 5)], [2, 3])
    assert capsys.readouterr().err == ""
    for file in {*tmp_path.iterdir()} - {*before}:  # it was killed instead, and is gone on with from the checkpoint
        file.unlink()
    resumed = RunTensorBoard(tmp_path, "a: 1\n", 3)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    resumed.log_metrics({"a": 4.0}, 4)
    resumed.finalize("success")
    assert curve(tmp_path) == ([(step, float(step)) for step in (1, 2, 3, 4)], [2, 3])


@pytest.mark.parametrize("first", [2, 3])
def test_what_was_kept_is_there_once_though_a_kill_came_between_its_flush_and_the_save(tmp_path, board_disk, first):
    logger = RunTensorBoard(tmp_path, "a: 1\n", None)
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_metrics({"b": 2.0}, 2)  # a validation adds to this step, behind the save
    logger.save()
    board_disk[0] = 0
    for step in range(first, 5):
        logger.log_metrics({"a": float(step)}, step)
        logger.add_text("samples", "text", step)
    logger.save()
    state = json.loads(json.dumps(logger.state_dict()))  # of the checkpoint of step 4
    board_disk[0] = None
    logger.log_metrics({"a": 5.0}, 5)
    logger.save()  # and was killed before the checkpoint of step 5
    for _ in range(2):
        resumed = RunTensorBoard(tmp_path, "a: 1\n", 4)
        assert resumed.experiment is None  # for which Lightning asks before it loads a checkpoint
        resumed.load_state_dict(state)
        resumed.log_metrics({"a": 5.0}, 5)
        resumed.save()
    steps = [*range(first, 5)]
    assert curve(tmp_path) == ([(step, float(step)) for step in (1, *steps, 5)], steps)
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Tensors("b")] == [2]


def test_a_tensorboard_that_cannot_be_opened_is_told_once(tmp_path, capsys):
    (tmp_path / "file").touch()
    logger = RunTensorBoard(tmp_path / "file", "a: 1\n", None)
    for step in (1, 2):
        logger.log_metrics({"a": 1.0}, step)
    logger.save()
    assert capsys.readouterr().err.count("error: TensorBoard's file in") == 1


def test_other_mistakes_of_a_logger_are_not_swallowed(tmp_path):
    logger = RunTensorBoard(tmp_path, "a: 1\n", None)
    with pytest.raises(TypeError, match="float"):
        logger.log_metrics({"a": object()}, 1)
    logger.finalize("failed")
