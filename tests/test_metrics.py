"""The table of figures: an entry is all that a figure needs to be shown everywhere."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from lit_qlora.callbacks.report import before_and_after, held_out_line
from lit_qlora.figures.card import card
from lit_qlora.figures.charts import charts
from lit_qlora.figures.record import Record
from lit_qlora.figures.report import report_page
from lit_qlora.figures.tensorboard import Board
from lit_qlora.metrics import METRICS, Metric, figures_of, held_out, is_better, logged
from lit_qlora.model.module import QLoRAModule
from lit_qlora.model.script import check_monitors
from lit_qlora.storage.run import RunFolder
from lit_qlora.trainer import own_callbacks

FIGURES = {
    0: {"val/loss": 2.0, "val/sureness": 0.25, "train/waste": 3.0},
    4: {"train/waste": 1.0, "val/loss": 1.5, "val/sureness": 0.375},
}
CONFIG = {"model": {"base": "demo"}, "data": {"source": "demo"}}


@pytest.fixture
def _added(monkeypatch):
    """Two figures more in the table: a held-out one, and one of training."""
    label, line = "held-out sureness", "sureness {:>6}"
    more = Metric("5 Tokens/sureness", "How sure it is", ".1%", label, line)
    monkeypatch.setitem(METRICS, "val/sureness", more)
    monkeypatch.setitem(METRICS, "train/waste", Metric("2 Learning/waste", "Waste", is_logged=True))


@pytest.fixture
def run(tmp_path):
    """A run that has recorded `FIGURES`, with TensorBoard's files."""
    kept = RunFolder(tmp_path)
    kept.prepare()
    kept.adapter.mkdir()
    (kept.adapter / "result.json").write_text(json.dumps({"step": 4, "val/loss": 1.5}))
    record = Record(kept, Board(tmp_path, "", {}))
    record.go_back(None)
    for step, figures in FIGURES.items():
        record.log_metrics(figures, step)
    record.finalize("success")
    return kept


def test_what_a_validation_and_a_script_have():
    assert [*held_out()][:3] == ["val/loss", "val/perplexity", "val/accuracy"]
    assert {"train/loss", "train/accuracy", "train/gradient_norm", *held_out()} <= {*logged()}
    assert "train/learning_rate" not in logged()
    shown = {**held_out(), **{name: one for name, one in METRICS.items() if name.startswith("memory/")}}
    assert len(shown) == 11 and all(metric.tag and metric.label and metric.form for metric in shown.values())


def test_figures_from_sums_over_answer_tokens():
    sums = {"loss_sum": 2.0, "num_correct": 1.0, "num_answers": 4.0}
    found = {"loss": 0.5, "perplexity": math.exp(0.5), "accuracy": 0.25}
    for part in ("train", "val", "test"):
        assert figures_of(part, sums, math.exp) == {f"{part}/{name}": value for name, value in found.items()}


def test_a_formula_is_all_that_a_new_one_takes(monkeypatch):
    for name in ("train/wrong", "val/wrong"):
        wrong = Metric(is_logged=True, formula=lambda sums, exp: sums["num_answers"] - sums["num_correct"])
        monkeypatch.setitem(METRICS, name, wrong)
    outputs = {"loss_sum": torch.tensor(2.0), "num_correct": torch.tensor(1), "num_answers": 4}
    module, seen = QLoRAModule("demo"), {}
    monkeypatch.setattr(module, "_log", seen.update)
    module.trainer = SimpleNamespace(global_step=0, log_every_n_steps=1)
    module._sums.add(outputs)
    module.on_before_optimizer_step(None)
    for metric, value in zip(
        (module.held_out_loss, module.held_out_correct, module.held_out_tokens), outputs.values(), strict=True
    ):
        metric.update(value)
    module.on_test_epoch_end()
    assert (seen["train/wrong"], seen["test/wrong"]) == (3, 3)
    assert {"train/wrong", "val/wrong"} <= {*logged()}


@pytest.mark.usefixtures("_added")
def test_a_new_figure_is_in_tensorboard(run):
    def shown(part):
        events = EventAccumulator(str(run.path / part), size_guidance={"tensors": 0}).Reload()
        tags = [tag for tag in events.Tags()["tensors"] if "sure" in tag or "waste" in tag]
        return {tag: [(one.step, make_ndarray(one.tensor_proto).item()) for one in events.Tensors(tag)] for tag in tags}

    assert shown("held-out") == {"5 Tokens/sureness": [(0, 0.25), (4, 0.375)]}
    best = {"7 Best adapter/held-out sureness": [(4, 0.375)]}
    assert shown("training") == {"2 Learning/waste": [(0, 3.0), (4, 1.0)], **best}


@pytest.mark.usefixtures("_added")
def test_a_new_figure_is_on_the_terminal(run):
    assert before_and_after(run)[1:] == [
        "held-out loss, nats per token         2.0000   1.5000",
        "held-out sureness                      25.0%   37.5%",
    ]
    assert held_out_line(4, FIGURES[4], "best") == "step      4  held-out loss 1.5000  sureness  37.5%  best"
    figures = FIGURES[4] | {"val/perplexity": 4.4817, "val/accuracy": 0.5}
    assert held_out_line(4, figures, "best").splitlines() == [
        "step      4  held-out loss 1.5000  perplexity 4.48     accuracy  50.0%",
        "             sureness  37.5%  best",
    ]


@pytest.mark.usefixtures("_added", "draws")
def test_a_new_figure_is_in_card_and_report(run):
    assert "| held-out sureness | 25.0% | 37.5% |\n" in card("a/b", CONFIG, FIGURES, 4, 0.0)
    page = report_page(run)
    assert "Held-out sureness" in page and "before: 25.0%" in page
    words = {chart.title: chart.words for chart in charts(FIGURES, 4)}
    assert words == {
        "Loss (nats per token)": "held-out from 2 to 1.5, best adapter at step 4",
        "How sure it is": "held-out from 0.25 to 0.375",
        "Waste": "from 3 to 1, between 1 and 3",
    }


@pytest.mark.usefixtures("_added")
def test_a_new_figure_may_be_monitored(expect_error):
    held_out_one, of_training = EarlyStopping("val/sureness"), EarlyStopping("train/waste")
    both = [held_out_one, of_training]
    check_monitors(Trainer(logger=False, enable_checkpointing=False, callbacks=both, accelerator="cpu"))
    assert own_callbacks(held_out_one) == [held_out_one]
    expect_error(lambda: own_callbacks(of_training), "val/sureness", "'train/waste'", option="trainer.callbacks")


@pytest.mark.parametrize(
    ("loss", "best", "better"),
    [
        (2.0, None, True), (2.0, {}, True), (2.0, {"step": 4}, True), (2.0, {"val/loss": 2.5}, True),
        (2.0, {"val/loss": 2.0}, False), (2.0 - 1e-9, {"val/loss": 2.0}, True), (2.0, {"val/loss": 1.0}, False),
        (2.0, {"val/loss": "nan"}, True), (2.0, {"val/loss": "inf"}, True),
        ("nan", None, False), ("-inf", {"val/loss": 2.0}, False), ("inf", None, False), (None, None, False),
    ],
)  # fmt: skip
def test_the_better_validation_has_the_lower_loss(loss, best, better):
    figures = {"val/perplexity": 1.0} if loss is None else {"val/loss": loss}
    assert is_better(figures, best) == better


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("val/loss", 1.94564, "1.9456"), ("val/perplexity", 34154.81, "34,154.81"), ("val/perplexity", "inf", "inf"),
        ("val/perplexity", 1.82e38, "1.82e+38"), ("val/accuracy", 0.764, "76.4%"), ("val/loss", math.nan, "nan"),
    ],
)  # fmt: skip
def test_how_a_value_is_written(name, value, text):
    assert METRICS[name].written(value) == text
