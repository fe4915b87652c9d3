"""A signal ends the run after the current step, with a checkpoint; a second one at once; the handlers are restored."""

import os
import signal

import pytest
import torch

from lit_qlora.callbacks.stop import TimeLimit
from lit_qlora.errors import UserError
from lit_qlora.figures.lines import read_lines
from lit_qlora.ranges import check_ranges, max_time_s
from lit_qlora.signals import PATIENT, SIGNALS, LeftAtOnce, leave_in_one_line
from lit_qlora.storage.folders import verify_folder
from lit_qlora.storage.state import load_state


def signalled(tiny, place, *numbers):
    """A module whose training step number ``place`` gets signals."""

    class Signalled(tiny):
        interrupted = False

        def training_step(self, batch, batch_idx):
            if len(self.seen) == place:
                try:
                    for number in numbers:
                        os.kill(os.getpid(), number)
                except KeyboardInterrupt:
                    self.interrupted = True
                    raise
            return super().training_step(batch, batch_idx)

    return Signalled()


@pytest.mark.parametrize(
    ("number", "status", "name"),
    [
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGHUP, 129, "SIGHUP"),
        (signal.SIGUSR1, 128 + signal.SIGUSR1, "SIGUSR1"),
    ],
)
def test_the_step_under_way_is_finished_and_saved(full_run, tiny, rows, tmp_path, capsys, number, status, name):
    before = [signal.getsignal(one) for one in SIGNALS]
    module = signalled(tiny, 4, number)  # the first of the two micro-batches of step 3
    parts = full_run(tmp_path / "run", save_every_steps=100, accumulate_grad_batches=2)
    with pytest.raises(SystemExit) as stop:
        parts.trainer.fit(module, datamodule=rows(12))
    assert stop.value.code == status
    assert len(module.seen) == 6
    assert parts.run.saved_steps() == [3]
    assert [signal.getsignal(one) for one in SIGNALS] == before
    more = "; again to stop at once" if number in (signal.SIGINT, signal.SIGTERM) else ""
    assert capsys.readouterr().out == (
        f"\nstopping after this step{more}\n"
        f"\nstopped and saved at step 3 by {name}; the same command resumes from here\n"
    )


def test_the_stopped_run_resumes_to_the_same_end(full_run, tiny, rows, tmp_path):
    options = {"save_every_steps": 100, "accumulate_grad_batches": 2, "val_check_interval": 5}
    whole, module = full_run(tmp_path / "whole", **options), tiny()
    whole.trainer.fit(module, datamodule=rows(12))
    cut = full_run(tmp_path / "cut", **options)
    with pytest.raises(SystemExit):
        cut.trainer.fit(signalled(tiny, 3, signal.SIGINT), datamodule=rows(12))
    assert cut.run.saved_steps() == [2]
    resumed, again = full_run(cut.run.path, **options), tiny()
    resumed.trainer.fit(again, datamodule=rows(12), ckpt_path=cut.run.checkpoint(2))
    assert again.weight.tolist() == module.weight.tolist()
    assert [line["step"] for line in read_lines(cut.run.metrics)] == [0, 1, 2, 3, 4, 5, 6]
    assert all(line.keys() == other.keys() for line, other in zip(*map(_lines, (cut, whole)), strict=True))


def _lines(parts):
    return [*read_lines(parts.run.metrics)]


def test_where_a_validation_follows_it_is_finished_and_the_save_after_it_is_the_last(full_run, tiny, rows, tmp_path):
    module = signalled(tiny, 3, signal.SIGINT)
    parts = full_run(tmp_path / "run", save_every_steps=100, val_check_interval=4)
    with pytest.raises(SystemExit) as stop:
        parts.trainer.fit(module, datamodule=rows(12))
    assert stop.value.code == 130
    assert parts.run.saved_steps() == [4]
    assert len(module.seen) == 4


@pytest.mark.parametrize(("accumulate", "saved"), [(1, 4), (3, 2)])
def test_a_signal_in_a_validation_saves_after_it_or_after_the_next_step(
    full_run, tiny, rows, tmp_path, accumulate, saved
):
    class Signalled(tiny):
        def validation_step(self, batch, batch_idx):
            if len(self.seen) == 4 and batch_idx == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {"save_every_steps": 100, "val_check_interval": 4, "accumulate_grad_batches": accumulate}
    parts, module = full_run(tmp_path / "run", **options), Signalled()
    with pytest.raises(SystemExit) as stop:
        parts.trainer.fit(module, datamodule=rows(12))
    assert (stop.value.code, parts.run.saved_steps()) == (143, [saved])
    assert len(module.seen) == saved * accumulate
    whole = full_run(tmp_path / "whole", **options)
    whole.trainer.fit(tiny(), datamodule=rows(12))
    resumed = full_run(parts.run.path, **options)
    resumed.trainer.fit(tiny(), datamodule=rows(12), ckpt_path=parts.run.checkpoint(saved))
    (last,) = whole.run.saved_steps()
    assert torch.equal(*(load_state(run.checkpoint(last))["state_dict"]["weight"] for run in (resumed.run, whole.run)))
    names = ("train/loss", "val/loss")
    one, other = ([[line.get(name) for name in names] for line in _lines(parts)] for parts in (resumed, whole))
    assert one == other


def test_a_signal_in_a_save_lets_it_come_to_its_end(full_run, tiny, rows, tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        monkeypatch.setattr(os, "fsync", real)
        os.kill(os.getpid(), signal.SIGTERM)
        real(descriptor)

    parts = full_run(tmp_path / "run", save_every_steps=2)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SystemExit) as stop:
        parts.trainer.fit(tiny(), datamodule=rows(12))
    assert (stop.value.code, parts.run.saved_steps()) == (143, [2])
    verify_folder(parts.run.checkpoint(2))
    assert [path.name for path in parts.run.checkpoints.iterdir()] == ["step-00000002"]


def test_a_second_signal_stops_at_once(full_run, tiny, rows, tmp_path, capsys):
    module = signalled(tiny, 4, signal.SIGINT, signal.SIGINT)
    parts = full_run(tmp_path / "run", save_every_steps=100)
    with pytest.raises(LeftAtOnce) as stop:
        parts.trainer.fit(module, datamodule=rows(12))
    assert stop.value.code == 130
    assert len(module.seen) == 4
    assert parts.run.saved_steps() == []
    assert capsys.readouterr().err == "\nstopped by Ctrl-C; given again, the same command resumes from what is saved\n"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGHUP, signal.SIGHUP),  # of the shell, and of the terminal
        (signal.SIGTERM, signal.SIGHUP),  # the end of a session
        (signal.SIGUSR1, signal.SIGTERM),  # a batch system's warning, and its end
        (signal.SIGINT, signal.SIGUSR1),
    ],
)
def test_two_signals_that_no_impatient_person_sent_wait_for_the_save(full_run, tiny, rows, tmp_path, first, second):
    module = signalled(tiny, 4, first, second)
    parts = full_run(tmp_path / "run", save_every_steps=100)
    with pytest.raises(SystemExit) as stop:
        parts.trainer.fit(module, datamodule=rows(12))
    assert (stop.value.code, parts.run.saved_steps()) == (128 + first, [5])


def test_after_the_save_a_command_is_not_hurried_by_what_no_person_sent(full_run, tiny, rows, tmp_path):
    """A batch system's second warning, during a copy to the mirror or the requeue."""
    module = signalled(tiny, 4, signal.SIGTERM)
    parts = full_run(tmp_path / "run", save_every_steps=100)
    with leave_in_one_line():
        with pytest.raises(SystemExit) as stop:
            parts.trainer.fit(module, datamodule=rows(12))
        for number in PATIENT:
            os.kill(os.getpid(), number)
    assert (stop.value.code, parts.run.saved_steps()) == (143, [5])


def test_where_the_save_fails_the_stop_says_so(full_run, tiny, rows, tmp_path, capsys, monkeypatch):
    module = signalled(tiny, 4, signal.SIGINT)
    parts = full_run(tmp_path / "run", save_every_steps=2)
    real = os.fsync

    def fsync(descriptor):
        if len(module.seen) == 5:
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SystemExit) as stop:
        parts.trainer.fit(module, datamodule=rows(12))
    assert (stop.value.code, parts.run.saved_steps()) == (1, [2, 4])
    assert "error: stopped at step 5, and the last save failed; an earlier one exists\n" in capsys.readouterr().err


class Clock:
    """Advances by a second with each micro-batch, by ten with each validation."""

    now = 0.0

    def __call__(self):
        return self.now


def add(parts, limit):
    """Before all that saves and stops."""
    parts.trainer.callbacks.insert(0, limit)
    parts.edge.parts.insert(0, limit)


@pytest.mark.parametrize(
    ("limit_s", "options", "expected"),
    [
        (6, {}, 5),  # a step takes 1 s: after 5, another one would end just then
        (1, {}, 1),  # one step is always done
        (8, {"accumulate_grad_batches": 2}, 3),
        (26, {"limit_val_batches": 1}, 5),  # 10 s before the first step and 10 kept for one more
        (99, {}, None),
    ],
)
def test_the_time_limit_stops_before_it_is_over(full_run, tiny, rows, tmp_path, capsys, limit_s, options, expected):
    clock = Clock()

    class Timed(tiny):
        def training_step(self, batch, batch_idx):
            clock.now += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            clock.now += 10

    options = {"limit_val_batches": 0, "save_every_steps": 100, **options}
    parts = full_run(tmp_path / "run", **options)
    parts.checkpoints.clock = clock
    add(parts, TimeLimit(limit_s, 0.0, parts.stop))
    if expected is None:
        parts.trainer.fit(Timed(), datamodule=rows(12))
        assert parts.run.saved_steps() == [12]
        return
    with pytest.raises(SystemExit) as stop:
        parts.trainer.fit(Timed(), datamodule=rows(12))
    assert (stop.value.code, parts.run.saved_steps()) == (0, [expected])
    assert clock.now < limit_s or expected == 1
    said = f"\nstopped and saved at step {expected} by max_time; the same command resumes from here\n"
    assert capsys.readouterr().out == said


def test_the_time_limit_leaves_room_for_two_saves_around_a_step(full_run, tiny, rows, tmp_path):
    """A step takes 1 s, a save 4 s: at 6 of 12 s, the save that is due, another step and its own would end at 15."""
    clock = Clock()

    class Timed(tiny):
        def training_step(self, batch, batch_idx):
            clock.now += 1
            return super().training_step(batch, batch_idx)

    parts = full_run(tmp_path / "run", save_every_steps=1, limit_val_batches=0)
    write = parts.checkpoints._write_checkpoint

    def slow(trainer, target):
        clock.now += 4
        write(trainer, target)

    parts.checkpoints._write_checkpoint, parts.checkpoints.clock = slow, clock
    add(parts, TimeLimit(12, 0.0, parts.stop))
    with pytest.raises(SystemExit) as stop:
        parts.trainer.fit(Timed(), datamodule=rows(12))
    assert (stop.value.code, parts.run.saved_steps()) == (0, [1, 2])
    assert clock.now == 10


@pytest.mark.parametrize(("text", "seconds"), [("00:00:00:01", 1), ("01:02:03:04", 93784), ("00:03:30:00", 12600)])
def test_the_form_of_a_time_limit(text, seconds):
    assert max_time_s(text) == seconds
    check_ranges({"max_time": text})


@pytest.mark.parametrize("text", ["", "x", "3", "03:30:00", "00:00:00:00", "00:00:00:1", "-1:00:00:00"])
def test_what_is_no_time_limit(text, expect_error):
    expect_error(lambda: check_ranges({"max_time": text}), "DD:HH:MM:SS", f"got {text!r}", option="max_time")


def test_ctrl_c_is_pythons_own_again_once_training_is_over(full_run, tiny, rows, tmp_path):
    found = []

    class Recorder(tiny):
        def on_train_end(self):  # after that of the callbacks, before Lightning restores anything
            found.append(signal.getsignal(signal.SIGINT))

    full_run(tmp_path / "run").trainer.fit(Recorder(), datamodule=rows(3))
    assert found == [signal.default_int_handler]


def test_the_handlers_are_restored_at_the_end_and_after_an_error(full_run, tiny, rows, tmp_path):
    before = [signal.getsignal(one) for one in SIGNALS]
    full_run(tmp_path / "good").trainer.fit(tiny(), datamodule=rows(3))
    assert [signal.getsignal(one) for one in SIGNALS] == before
    module = tiny()
    module.nonfinite_rows = dict.fromkeys(range(9), float("nan"))  # the guard ends this run
    with pytest.raises(UserError):
        full_run(tmp_path / "bad").trainer.fit(module, datamodule=rows(9))
    assert [signal.getsignal(one) for one in SIGNALS] == before
