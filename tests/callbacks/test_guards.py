"""An update that is not finite is not applied, and a run that learns nothing any more ends with the reason."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lit_qlora.callbacks.guards import MAX_SCALER_SKIPS, UpdateGuard
from lit_qlora.callbacks.steps import StepCallback
from lit_qlora.errors import UserError
from lit_qlora.figures.lines import read_lines
from lit_qlora.figures.record import Record
from lit_qlora.storage.run import RunFolder
from tests.expect import check_line

NAN, INF = math.nan, math.inf


class Weights(StepCallback):
    """The weight after each step."""

    def __init__(self):
        self.after = [0.0]

    def on_step_end(self, trainer, module):
        self.after.append(module.weight[0].item())


def fit(trainer, module, data, guard, **options):
    weights = Weights()
    made = trainer(guard, weights, **options)
    error = None
    try:
        made.fit(module, datamodule=data)
    except UserError as caught:
        error = str(caught)
    return weights.after, error


def order(data, trainer, tiny):
    """The rows in the order in which they are trained on."""
    module = tiny()
    trainer(max_epochs=1).fit(module, datamodule=data)
    return [row for rows in module.seen for row in rows]


@pytest.mark.parametrize("factor", [NAN, INF, -INF])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loss_that_is_not_finite_changes_nothing(trainer, tiny, rows, factor, accumulate):
    data = rows(9)
    bad = order(data, trainer, tiny)[4]
    module = tiny()
    module.nonfinite_rows = {bad: factor}
    guard = UpdateGuard(2)
    after, error = fit(trainer, module, data, guard, accumulate_grad_batches=accumulate)
    assert error is None
    bad_step = 4 // accumulate
    unchanged = [before == now for before, now in pairwise(after)]
    assert unchanged == [step == bad_step for step in range(9 // accumulate)]
    assert all(math.isfinite(weight) for weight in after)
    assert guard.num_applied == 9 // accumulate - 1


def test_without_the_guard_the_weight_is_lost(trainer, tiny, rows):
    # That the test above guards against something.
    module = tiny()
    module.nonfinite_rows = {3: NAN}
    trainer().fit(module, datamodule=rows(9))
    assert module.weight.isnan().all()


def test_it_stops_after_several_in_a_row_and_names_step_and_rows(trainer, tiny, rows):
    data = rows(9)
    bad = order(data, trainer, tiny)[2:5]
    module = tiny()
    module.nonfinite_rows = dict.fromkeys(bad, NAN)
    after, error = fit(trainer, module, data, UpdateGuard(3))
    words = "--model.warmup_ratio in a new run: --run NAME", "--max_nonfinite_losses 6, with which this run resumes"
    check_line(error, "step 5", "not finite (3 in a row)", f"rows [{bad[2]}] (32-true)", *words)
    assert after[2] == after[-1] == module.weight[0].item()
    assert len(module.seen) == 5


def test_a_base_that_was_broken_before_training_is_said_to_be(trainer, tiny, rows):
    data = rows(9)
    guard = UpdateGuard()
    guard._base_is_broken = True
    module = tiny()
    module.nonfinite_rows = {order(data, trainer, tiny)[0]: NAN}
    _, error = fit(trainer, module, data, guard)
    assert error.endswith("the base is broken; in a new run (--run NAME), give another copy with --model.base")
    assert "the base is broken, or overflows in this precision" in guard._remedy("16-mixed")


@pytest.mark.parametrize(("loss", "applied", "broken"), [(NAN, 0, True), (1.0, 0, False), (NAN, 1, False)])
def test_what_a_held_out_loss_before_training_says_of_the_base(loss, applied, broken):
    guard = UpdateGuard()
    guard.num_applied = applied
    guard.on_validation_end(SimpleNamespace(state=SimpleNamespace(fn="fit"), callback_metrics={"val/loss": loss}), None)
    assert guard._base_is_broken is broken


def test_the_rows_of_the_whole_step_are_named(trainer, tiny, rows):
    data = rows(9)
    in_order = order(data, trainer, tiny)
    module = tiny()
    module.nonfinite_rows = {in_order[4]: NAN}
    after, error = fit(trainer, module, data, UpdateGuard(), accumulate_grad_batches=3)
    assert error.startswith(f"the loss of step 2 is not finite (1 in a row), with training rows {in_order[3:6]} (32-")
    assert len(after) == 2 and module.weight[0].item() == after[1]


def test_in_bf16_the_first_stops_it_and_in_fp16_the_scaler_skips_it(trainer, tiny, rows):
    data = rows(9)
    bad = order(data, trainer, tiny)[4]
    for precision, steps in (("bf16-mixed", 4), ("16-mixed", 9)):
        module = tiny()
        module.nonfinite_rows = {bad: NAN}
        plugins = in_fp16(1.0) if precision == "16-mixed" else [MixedPrecision(precision, "cpu")]
        guard = UpdateGuard()
        after, error = fit(trainer, module, data, guard, plugins=plugins)
        assert (error is None) == (precision == "16-mixed")
        assert len(after) == steps + 1 and all(math.isfinite(weight) for weight in after)
        assert [n for n, (before, now) in enumerate(pairwise(after)) if before == now] == [4][: steps - 4]


def test_a_good_step_in_between_counts_from_the_start(trainer, tiny, rows):
    data = rows(9)
    in_order = order(data, trainer, tiny)
    module = tiny()
    module.nonfinite_rows = dict.fromkeys([*in_order[1:3], *in_order[4:6]], NAN)
    _, error = fit(trainer, module, data, UpdateGuard(3))
    assert error is None
    assert len(module.seen) == 9


def test_applied_and_skipped_updates_are_recorded(trainer, tiny, rows, tmp_path):
    data = rows(6)
    module = tiny()
    module.nonfinite_rows = {order(data, trainer, tiny)[2]: NAN}
    path = tmp_path / "metrics.jsonl"
    fit(trainer, module, data, UpdateGuard(2), logger=Record(RunFolder(tmp_path)))
    figures = [(line["step"], line["updates/applied"], line["updates/skipped"]) for line in read_lines(path)]
    assert figures == [(1, 1, 0), (2, 2, 0), (3, 2, 1), (4, 3, 1), (5, 4, 1), (6, 5, 1)]


def in_fp16(scale):
    """A gradient scaler on the CPU, as a GPU below bf16 has it."""
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]


def overflows(module):
    """Lets a gradient beyond fp16 overflow, as it would there."""
    module.weight.register_hook(lambda gradient: gradient.half().float())
    return module


def test_a_step_that_the_scaler_skips_is_counted_as_skipped(trainer, tiny, rows, tmp_path):
    path = tmp_path / "metrics.jsonl"
    guard = UpdateGuard()
    module = overflows(tiny())
    after, error = fit(trainer, module, rows(12), guard, plugins=in_fp16(65536.0), logger=Record(RunFolder(tmp_path)))
    assert error is None
    skipped = [before == now for before, now in pairwise(after)]
    assert 1 < sum(skipped) < 12
    figures = [(line["updates/applied"], line["updates/skipped"]) for line in read_lines(path)]
    counts = range(1, 13)
    assert figures == [(count - sum(skipped[:count]), sum(skipped[:count])) for count in counts]
    assert guard.nonfinite_in_a_row == 0


def test_skips_on_and_on_end_the_run(trainer, tiny, rows):
    module = overflows(tiny())
    module.nonfinite_rows = dict.fromkeys(range(30), 1e30)  # finite losses, gradients beyond fp16 at any scale
    data = rows(30)
    last = order(data, trainer, tiny)[19]
    _, error = fit(trainer, module, data, UpdateGuard(), plugins=in_fp16(65536.0))
    assert MAX_SCALER_SKIPS == 20
    words = "--model.learning_rate", "--trainer.precision 32-true, in a new run: --run NAME"
    check_line(error, "20 updates in a row", "step 20", f"rows [{last}]", "scale of 0.0625", *words)
    assert module.weight.eq(0).all()


def test_training_continues_if_an_update_falls_between_skips(trainer, tiny, rows):
    data = rows(30)
    in_order = order(data, trainer, tiny)
    module = overflows(tiny())
    module.nonfinite_rows = dict.fromkeys([*in_order[:19], *in_order[20:29]], 1e30)
    guard = UpdateGuard()
    _, error = fit(trainer, module, data, guard, plugins=in_fp16(1.0))
    assert error is None
    assert guard.num_applied == 2


def test_the_counts_go_through_a_checkpoint():
    guard = UpdateGuard()
    guard.nonfinite_in_a_row, guard.skips_in_a_row, guard.num_applied = 2, 7, 40
    resumed = UpdateGuard()
    resumed.load_state_dict(guard.state_dict())
    assert (resumed.nonfinite_in_a_row, resumed.skips_in_a_row, resumed.num_applied) == (2, 7, 40)


@pytest.mark.parametrize("count", [0, -1])
def test_it_must_be_at_least_one(count, expect_error):
    expect_error(lambda: UpdateGuard(count), "from 1", f"got {count}", option="max_nonfinite_losses")


def test_the_loss_of_a_micro_batch_that_another_device_computes_is_not_looked_at():
    """The loss is known only after the backward that is still running there."""
    guard, here = UpdateGuard(), SimpleNamespace(rows=(1,), is_here=True)
    guard.on_train_batch_start(None, None, here, 0)
    guard.on_before_backward(None, None, torch.tensor(1.0))
    flag = guard._is_finite
    guard.on_train_batch_start(None, None, SimpleNamespace(rows=(2,), is_here=False), 1)
    guard.on_before_backward(None, None, torch.tensor(0.0))
    assert guard._is_finite is flag
    assert guard._rows == [1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize(("losses", "dropped"), [([1.0, 2.0], 0), ([NAN, 2.0], 1), ([1.0, INF], 1)])
def test_on_a_gpu_the_next_step_is_started_while_the_backward_still_runs(losses, dropped):
    weight = torch.nn.Parameter(torch.zeros(1, device="cuda"))
    weight.grad = torch.ones_like(weight)
    optimizer, trainer = torch.optim.SGD([weight]), SimpleNamespace(precision_plugin=None)
    guard = UpdateGuard(2)
    for loss in losses:
        guard.on_before_backward(trainer, None, torch.tensor(loss, device="cuda"))
        torch.cuda._sleep(2_000_000_000)  # cycles, about a second: the backward
    guard.on_before_optimizer_step(trainer, None, optimizer)
    assert not torch.cuda.current_stream().query()
    assert guard.nonfinite_in_a_row == dropped
    assert (weight.grad is None) == bool(dropped)
