"""A signal ends the run on the edge of a step, saved; a second one at once; the handlers are given back."""

import os
import signal

import pytest

from lit_qlora.callbacks.metrics import read_metrics
from lit_qlora.errors import UserError


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


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_step_under_way_is_finished_and_saved(full_run, tiny, rows, tmp_path, capsys, number, status):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    module = signalled(tiny, 4, number)  # the first of the two micro-batches of step 3
    parts = full_run(tmp_path / "run", save_every_steps=100, accumulate_grad_batches=2)
    with pytest.raises(SystemExit) as stop:
        parts.trainer.fit(module, datamodule=rows(12))
    assert stop.value.code == status
    assert len(module.seen) == 6
    assert parts.run.saved_steps() == [3]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert capsys.readouterr().out == (
        "\nstopping after this step; once more stops at once\n"
        "\nstopped and saved at step 3; the same command goes on from here\n"
    )


def test_the_stopped_run_goes_on_to_the_same_end(full_run, tiny, rows, tmp_path):
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
    assert [line["step"] for line in read_metrics(cut.run.metrics)] == [0, 1, 2, 3, 4, 5, 6]
    assert all(line.keys() == other.keys() for line, other in zip(*map(_lines, (cut, whole)), strict=True))


def _lines(parts):
    return read_metrics(parts.run.metrics)


def test_where_a_validation_follows_the_next_edge_will_do(full_run, tiny, rows, tmp_path):
    module = signalled(tiny, 3, signal.SIGINT)
    parts = full_run(tmp_path / "run", save_every_steps=100, val_check_interval=4)
    with pytest.raises(SystemExit) as stop:
        parts.trainer.fit(module, datamodule=rows(12))
    assert stop.value.code == 130
    assert parts.run.saved_steps() == [4, 5]  # behind the validation, and at the edge after it
    assert len(module.seen) == 5


def test_a_second_signal_stops_at_once(full_run, tiny, rows, tmp_path):
    module = signalled(tiny, 4, signal.SIGINT, signal.SIGINT)
    parts = full_run(tmp_path / "run", save_every_steps=100)
    with pytest.raises(SystemExit):  # Lightning's answer to a KeyboardInterrupt
        parts.trainer.fit(module, datamodule=rows(12))
    assert module.interrupted
    assert len(module.seen) == 4
    assert parts.run.saved_steps() == []


def test_ctrl_c_is_pythons_own_again_once_training_is_over(full_run, tiny, rows, tmp_path):
    found = []

    class Tells(tiny):
        def on_train_end(self):  # after that of the callbacks, before Lightning restores anything
            found.append(signal.getsignal(signal.SIGINT))

    full_run(tmp_path / "run").trainer.fit(Tells(), datamodule=rows(3))
    assert found == [signal.default_int_handler]


def test_the_handlers_are_given_back_at_the_end_and_after_an_error(full_run, tiny, rows, tmp_path):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    full_run(tmp_path / "good").trainer.fit(tiny(), datamodule=rows(3))
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    module = tiny()
    module.nonfinite_rows = dict.fromkeys(range(9), float("nan"))  # the guard ends this run
    with pytest.raises(UserError):
        full_run(tmp_path / "bad").trainer.fit(module, datamodule=rows(9))
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
