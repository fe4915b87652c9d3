"""A save that fails is reported, training continues, and earlier saves are not touched."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lit_qlora.callbacks.checkpoints import read_result
from lit_qlora.figures.lines import read_lines
from lit_qlora.figures.record import Record
from lit_qlora.storage import files, folders
from lit_qlora.storage.folders import verify_folder
from lit_qlora.storage.run import RunFolder
from lit_qlora.storage.state import load_state
from tests.expect import check_line


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
def test_a_checkpoint_that_fails_is_reported_and_tried_again(full_run, tiny, rows, tmp_path, capsys, failing, number):
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
    assert line.endswith(" MB free); training continues, and the next save retries")
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
    """The weights saved are those of the best step, not the later ones; and the trained weights stay as they are."""
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
    """Killed before it could save the best adapter, the run saves it when it resumes."""
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
    check_line(capsys.readouterr().err, old, "can't be removed", "Permission denied", begins="warning: ")


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
    assert steps == [3, 6, 7]  # step 6 is the first to end after five minutes
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
    run = RunFolder(tmp_path)
    path, file = run.metrics, Record(run)
    file.log_metrics({"a": 1}, step=1)
    file.log_metrics({"a": 2}, step=2)
    full_disk[0] = room
    file.log_metrics({"a": 3}, step=3)
    file.log_metrics({"a": 4}, step=4)
    file.log_metrics({"a": 5}, step=5)
    check_line(capsys.readouterr().err, "No space left on device", "kept for later", begins=f"error: {path} ")
    state = file.state_dict()
    full_disk[0] = None
    shutil.copytree(tmp_path, tmp_path / "copy")
    resumed = Record(RunFolder(tmp_path / "copy"))  # killed here, and resumed from the checkpoint
    resumed.go_back(state)
    for one in (resumed, file):
        one.finalize("success")
        path = one.run.metrics
        assert [*read_lines(path)] == [{"step": step, "a": float(step)} for step in (1, 2, 3, 4, 5)]
        assert path.read_bytes().count(b"\n") == 5
