"""Saves fall between steps and are whole; the best adapter is kept; a resumed run ends like an uninterrupted one."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import MixedPrecision

from lit_qlora.callbacks.checkpoints import RunCheckpoints, read_result
from lit_qlora.callbacks.steps import StepCallback
from lit_qlora.callbacks.stop import StopWithoutGain
from lit_qlora.figures.lines import read_lines
from lit_qlora.storage.checkpoint_io import FolderCheckpointIO
from lit_qlora.storage.folders import verify_folder, write_folder
from lit_qlora.storage.run import RunFolder
from lit_qlora.storage.state import load_state


class Saves(StepCallback):
    """What happened in which order: micro-batches, validations and saves."""

    def __init__(self):
        self.events = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.events.append("batch")

    def on_validation_start(self, trainer, pl_module):
        self.events.append("validation")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.events.append(f"save {trainer.global_step}")


def watched_fit(full_run, tiny, rows, folder, num_rows, **options):
    saves = Saves()
    parts = full_run(folder, first=[saves], **options)
    parts.trainer.fit(tiny(), datamodule=rows(num_rows))
    return " ".join(saves.events).replace("validation", "v").replace("batch", "b"), parts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"accumulate_grad_batches": 2}, "v b b b b save 2 b b b v save 4"),  # the last step has one micro-batch
        ({"save_every_steps": 3}, "v b b b save 3 b b b save 6 b v save 7"),
        ({"val_check_interval": 2}, "v b b v save 2 b b v save 4 b b v save 6 b v save 7"),
        ({"val_check_interval": 3, "accumulate_grad_batches": 2}, "v b b b v b save 2 b b v b v save 4"),
        ({"save_every_steps": 100}, "v b b b b b b b v save 7"),
        ({"save_every_steps": 100, "limit_val_batches": 0}, "b b b b b b b save 7"),
        ({"save_every_steps": 100, "max_steps": 3, "val_check_interval": 100}, "v b b b v save 3"),
    ],
)
def test_saves_fall_between_steps_and_after_the_validation(full_run, tiny, rows, tmp_path, options, expected):
    order, parts = watched_fit(full_run, tiny, rows, tmp_path / "run", 7, **{"save_every_steps": 2, **options})
    assert order == expected
    assert parts.run.saved_steps() == [int(step) for step in order.split() if step.isdigit()]
    for step in parts.run.saved_steps():
        verify_folder(parts.run.checkpoint(step))


def test_the_newest_are_kept(full_run, tiny, rows, tmp_path):
    for keep in (2, 3):
        _, parts = watched_fit(full_run, tiny, rows, tmp_path / str(keep), 12, save_every_steps=2, keep=keep)
        assert parts.run.saved_steps() == [8, 10, 12][-keep:]
        assert {path.name for path in parts.run.checkpoints.iterdir()} == {
            f"step-{step:08d}" for step in parts.run.saved_steps()
        }


@pytest.mark.parametrize(
    ("save_every", "keep", "option", "words"),
    [
        (0, 2, "save_every_steps", ["from 1", "got 0"]),
        (1, 1, "keep_checkpoints", ["from 2", "got 1"]),
    ],
)
def test_intervals_that_keep_nothing_are_refused(tmp_path, save_every, keep, option, words, expect_error):
    expect_error(lambda: RunCheckpoints(RunFolder(tmp_path), save_every, keep), *words, option=option)


class Losses(StepCallback):
    """Gives the validations these losses, one after the other."""

    def __init__(self, *losses):
        self.losses = list(losses)

    def on_validation_epoch_end(self, trainer, pl_module):
        loss = self.losses.pop(0)
        pl_module.on_validation_epoch_end = lambda: pl_module.log_dict(
            {"val/loss": loss, "val/perplexity": 1.0}, logger=False
        )


def fit_with(full_run, tiny, rows, folder, losses, **options):
    module = tiny()
    weights = {}

    class Weights(StepCallback):
        def on_step_end(self, trainer, module):
            weights[trainer.global_step] = module.weight.tolist()

    parts = full_run(folder, first=[Losses(*losses), Weights()], val_check_interval=1, **options)
    parts.trainer.fit(module, datamodule=rows(len(losses) - 1))
    return module, weights, parts.run


def test_the_adapter_is_that_of_the_best_validation(full_run, tiny, rows, tmp_path):
    module, weights, run = fit_with(full_run, tiny, rows, tmp_path / "run", [0.5, 3.0, 2.0, 2.0, 2.5])
    # Before the first step there is no adapter to keep; equally good is not better.
    assert json.loads((run.adapter / "result.json").read_text("utf-8")) == {
        "step": 2,
        "val/loss": 2.0,
        "val/perplexity": 1.0,
    }
    assert json.loads((run.adapter / "weight.json").read_text("utf-8")) == weights[2]
    assert module.weight.tolist() == weights[2] != weights[4]  # loaded back at the end
    verify_folder(run.adapter)
    assert sorted(path.name for path in run.adapter.iterdir()) == ["manifest.json", "result.json", "weight.json"]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([9.0, float("nan"), 3.0, 4.0], 2),
        ([9.0, float("inf"), 3.0, 4.0], 2),
        ([9.0, 3.0, float("nan"), float("-inf")], 1),
    ],
)
def test_a_loss_that_is_not_finite_is_never_the_best(full_run, tiny, rows, tmp_path, losses, best):
    _, _, run = fit_with(full_run, tiny, rows, tmp_path / "run", losses)
    assert read_result(run.adapter)["step"] == best


def put_result(folder, loss):
    """An adapter's folder with a result and nothing else."""
    write_folder(folder, lambda made: (made / "result.json").write_text(json.dumps({"step": 4, "val/loss": loss})))


@pytest.mark.parametrize(("best", "stays"), [(2.0, False), (1.5, False), (2.5, True), (None, True)])
def test_an_adapter_put_aside_stays_until_the_best_is_as_good(tmp_path, best, stays):
    run = RunFolder(tmp_path)
    run.prepare()
    put_result(run.adapter_before, 2.0)
    if best is not None:
        put_result(run.adapter, best)
    RunCheckpoints(run, 10).drop_aside()
    assert run.adapter_before.exists() == stays


@pytest.mark.parametrize(("loss", "is_gone"), [(2.0, False), (1.5, False), (2.5, True), (None, True)])
def test_a_best_adapter_that_is_gone_is_reported(tmp_path, capsys, loss, is_gone):
    run = RunFolder(tmp_path)
    run.prepare()
    if loss is not None:
        put_result(run.adapter, loss)
    checkpoints = RunCheckpoints(run, 10)
    checkpoints.on_load_checkpoint(None, None, {"global_step": 4})
    checkpoints.load_state_dict({"kept": {"step": 4, "val/loss": 2.0}})
    checkpoints.on_fit_start(SimpleNamespace(early_stopping_callbacks=[], should_stop=False), None)
    assert ("the best adapter so far, that of step 4, is gone" in capsys.readouterr().err) == is_gone


def test_without_validation_the_last_adapter_is_kept(full_run, tiny, rows, tmp_path):
    _, parts = watched_fit(full_run, tiny, rows, tmp_path / "run", 4, limit_val_batches=0)
    assert read_result(parts.run.adapter) == {"step": 4}


def test_an_adapter_that_was_never_scored_is_replaced_by_one_that_is(full_run, tiny, rows, tmp_path):
    watched_fit(full_run, tiny, rows, tmp_path / "run", 4, limit_val_batches=0)
    parts = full_run(tmp_path / "run", max_epochs=2)
    parts.trainer.fit(tiny(), datamodule=rows(4), ckpt_path=parts.run.checkpoint(4))
    assert read_result(parts.run.adapter)["step"] == 8


def test_a_stop_in_mid_window_saves_no_half_window(full_run, tiny, rows, tmp_path):
    stop = EarlyStopping("val/loss", patience=1, mode="max")
    order, parts = watched_fit(
        full_run, tiny, rows, tmp_path / "run", 12, early=[stop], accumulate_grad_batches=2, val_check_interval=3
    )
    assert stop.stopped_epoch == 0
    assert parts.trainer.should_stop
    assert order == "v b b b v"
    assert parts.run.saved_steps() == []


def test_a_stop_on_an_edge_saves(full_run, tiny, rows, tmp_path):
    stop = EarlyStopping("val/loss", patience=1, mode="max")
    order, parts = watched_fit(full_run, tiny, rows, tmp_path / "run", 12, early=[stop], val_check_interval=2)
    assert order == "v b b v save 2"
    assert parts.run.saved_steps() == [2]


@pytest.mark.parametrize(("patience", "steps"), [(1, [2]), (3, [2, 3, 6])])
def test_a_run_that_stopped_early_stays_stopped_unless_it_is_given_more_patience(
    full_run, tiny, rows, tmp_path, patience, steps
):
    def fit(patience, checkpoint=None):
        stop = StopWithoutGain("val/loss", patience=patience, mode="max")
        module = tiny()
        parts = full_run(tmp_path / "run", early=[stop], val_check_interval=2)
        parts.trainer.fit(module, datamodule=rows(12), ckpt_path=checkpoint)
        return parts.run, module

    run, _ = fit(1)
    assert run.saved_steps() == [2]
    run, module = fit(patience, run.checkpoint(2))  # killed after its last save, and started again
    assert run.saved_steps() == steps
    assert bool(module.seen) == (patience > 1)


def test_two_validations_of_one_step_count_once_for_early_stopping(full_run, tiny, rows, tmp_path):
    def fit(checkpoint=None):
        stop = StopWithoutGain("val/loss", patience=2, mode="max")
        options = {"accumulate_grad_batches": 2, "val_check_interval": 1}
        parts = full_run(tmp_path / "run", 1, early=[stop], **options)
        parts.trainer.fit(tiny(), datamodule=rows(12), ckpt_path=checkpoint)
        return parts.run

    run = fit()
    assert run.saved_steps() == [1, 2]
    shutil.rmtree(run.checkpoint(2))
    assert fit(run.checkpoint(1)).saved_steps() == [1, 2]  # where the third micro-batch's is of step 1 again


def test_a_damaged_checkpoint_is_written_anew_when_its_step_comes_again(full_run, tiny, rows, tmp_path):
    watched_fit(full_run, tiny, rows, tmp_path / "run", 4, save_every_steps=2)
    run = RunFolder(tmp_path / "run")
    whole = load_state(run.checkpoint(4))["state_dict"]["weight"]
    (run.checkpoint(4) / "state.json").write_text("{}", encoding="utf-8")
    last, problems = run.last_checkpoint()
    assert (last, len(problems)) == (run.checkpoint(2), 1)
    parts = full_run(run.path, save_every_steps=2)
    parts.trainer.fit(tiny(), datamodule=rows(4), ckpt_path=last)
    verify_folder(run.checkpoint(4))
    assert torch.equal(load_state(run.checkpoint(4))["state_dict"]["weight"], whole)


def test_damaged_ones_with_higher_numbers_take_no_place(full_run, tiny, rows, tmp_path):
    watched_fit(full_run, tiny, rows, tmp_path / "run", 10, save_every_steps=2, keep=3)
    run = RunFolder(tmp_path / "run")
    for step in (8, 10):
        (run.checkpoint(step) / "state.json").write_text("{}", encoding="utf-8")
    saved = []

    class Look(StepCallback):
        def on_step_end(self, trainer, module):
            saved.append(run.saved_steps())

    parts = full_run(run.path, save_every_steps=1, keep=2)
    parts.edge.parts.append(Look())
    parts.trainer.fit(tiny(), datamodule=rows(10), ckpt_path=run.checkpoint(6))
    assert saved[:3] == [[6, 7], [7, 8], [8, 9]]
    for step in (9, 10):
        verify_folder(run.checkpoint(step))


def test_a_sealed_folder_of_something_else_is_written_anew(full_run, tiny, rows, tmp_path):
    watched_fit(full_run, tiny, rows, tmp_path / "run", 4, save_every_steps=2)
    run = RunFolder(tmp_path / "run")
    write_folder(run.checkpoint(4), lambda folder: (folder / "state.json").write_text("{}"), replace=True)
    parts = full_run(run.path, save_every_steps=2)
    parts.trainer.fit(tiny(), datamodule=rows(4), ckpt_path=run.checkpoint(2))
    assert load_state(run.checkpoint(4))["global_step"] == 4


def test_a_whole_checkpoint_is_left_as_it_is(full_run, tiny, rows, tmp_path):
    watched_fit(full_run, tiny, rows, tmp_path / "run", 4, save_every_steps=2)
    run = RunFolder(tmp_path / "run")
    before = (run.checkpoint(4) / "manifest.json").stat().st_mtime_ns
    parts = full_run(run.path, save_every_steps=2)
    parts.trainer.fit(tiny(), datamodule=rows(4), ckpt_path=run.checkpoint(2))
    assert (run.checkpoint(4) / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("val_check_interval", [2, 3, 1.0])
def test_a_resume_from_every_step_ends_the_same(full_run, tiny, rows, tmp_path, accumulate, val_check_interval):
    options = {
        "save_every_steps": 1,
        "max_epochs": 2,
        "accumulate_grad_batches": accumulate,
        "val_check_interval": val_check_interval,
        "log_every_n_steps": 2,
    }
    whole, module = full_run(tmp_path / "whole", **options), tiny()
    whole.trainer.fit(module, datamodule=rows(5))
    *steps, last = whole.run.saved_steps()
    for step in steps:
        # As a kill right after the save leaves it: the step's own line is still open.
        folder = tmp_path / f"from-{step}"
        folder.mkdir()
        lines = [line for line in _lines(whole.run) if json.loads(line)["step"] < step]
        (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        one, resumed = full_run(folder, **options), tiny()
        one.trainer.fit(resumed, datamodule=rows(5), ckpt_path=whole.run.checkpoint(step))
        assert resumed.chance == module.chance[-len(resumed.chance) :]
        assert resumed.seen == module.seen[-len(resumed.seen) :]
        assert torch.equal(
            _saved(one.run, last, "state_dict")["weight"], _saved(whole.run, last, "state_dict")["weight"]
        )
        assert _without_speed(one.run) == _without_speed(whole.run)


@pytest.mark.parametrize("val_check_interval", [1.0, 5])
def test_a_resume_with_another_validation_interval_learns_the_same(full_run, tiny, rows, tmp_path, val_check_interval):
    """The checkpoint may also be of the end of an epoch, saved after its validation."""
    options = {"save_every_steps": 1, "max_epochs": 2, "accumulate_grad_batches": 2}
    whole, module = full_run(tmp_path / "whole", **options, val_check_interval=val_check_interval), tiny()
    whole.trainer.fit(module, datamodule=rows(5))
    for step in whole.run.saved_steps():
        for other in (2, 100, 0.5, 1.0):
            one, resumed = full_run(tmp_path / f"from-{step}-{other}", **options, val_check_interval=other), tiny()
            one.trainer.fit(resumed, datamodule=rows(5), ckpt_path=whole.run.checkpoint(step))
            assert resumed.seen == (module.seen[-len(resumed.seen) :] if step < 6 else [])
            assert one.trainer.global_step == 6
            assert torch.equal(resumed.weight, module.weight)


def test_skipped_and_refused_updates_are_gone_through_alike(full_run, tiny, rows, tmp_path):
    def fit(folder, checkpoint=None):
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=4))
        plugins = [FolderCheckpointIO(), precision]
        parts = full_run(folder, save_every_steps=1, accumulate_grad_batches=2, max_epochs=3, plugins=plugins)
        module = tiny()
        module.nonfinite_rows = {3: float("nan")}
        module.weight.register_hook(lambda gradient: gradient.half().float())  # overflows as fp16 does
        parts.trainer.fit(module, datamodule=rows(9), ckpt_path=checkpoint)
        return parts

    whole = fit(tmp_path / "whole")
    *steps, last = whole.run.saved_steps()
    assert 3 < whole.guard.num_applied < last - 3
    for step in steps:
        one = fit(tmp_path / f"from-{step}", whole.run.checkpoint(step))
        for key in ("state_dict", "optimizer_states", "MixedPrecision"):
            torch.testing.assert_close(_saved(one.run, last, key), _saved(whole.run, last, key), rtol=0, atol=0)
        assert one.guard.state_dict() == whole.guard.state_dict()


def test_a_resume_of_a_finished_run_trains_nothing(full_run, tiny, rows, tmp_path):
    _, parts = watched_fit(full_run, tiny, rows, tmp_path / "run", 4)
    before = {path: path.read_bytes() for path in parts.run.path.rglob("*") if path.is_file()}
    again, module = full_run(parts.run.path), tiny()
    again.trainer.fit(module, datamodule=rows(4), ckpt_path=parts.run.checkpoint(4))
    assert module.seen == []
    assert {path: path.read_bytes() for path in parts.run.path.rglob("*") if path.is_file()} == before


def _saved(run, step, key):
    return load_state(run.checkpoint(step))[key]


def _lines(run):
    return run.metrics.read_text(encoding="utf-8").splitlines(keepends=True)


def _without_speed(run):
    """The lines of metrics.jsonl without the speed, which differs from run to run."""
    lines = [*read_lines(run.metrics)]
    return [{name: value for name, value in line.items() if not name.startswith("speed/")} for line in lines]
