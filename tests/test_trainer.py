"""The Trainer's options, each decided: what reaches into the arithmetic is refused by name, what looks is let in."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, callbacks
from lightning.pytorch.callbacks import EarlyStopping, ModelSummary, Timer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.plugins.environments import LightningEnvironment

from lit_qlora import training
from lit_qlora.cli import main
from lit_qlora.errors import UserError
from lit_qlora.figures.lines import read_lines
from lit_qlora.metrics import held_out
from lit_qlora.signatures import OBSERVING
from lit_qlora.trainer import (
    NO_CALLBACKS,
    NOT_OFFERED,
    QLoRATrainer,
    RunParser,
    check_kinds,
    own_callbacks,
    own_plugins,
)
from tests.expect import ExpectError, check_first

LOOKS = {
    "Callback", "DeviceStatsMonitor", "EarlyStopping", "LambdaCallback", "LearningRateMonitor", "ModelSummary",
    "RichModelSummary", "Timer",
}  # fmt: skip
"""Callbacks of Lightning's that change nothing of what is learned."""
REFUSED = {
    "BackboneFinetuning": "model.target_modules",
    "BaseFinetuning": "model.target_modules",
    "BasePredictionWriter": "python main.py predict",
    "BatchSizeFinder": "data.batch_size",
    "Checkpoint": "save_every_steps",
    "EMAWeightAveraging": "model.schedule",
    "GradientAccumulationScheduler": "trainer.accumulate_grad_batches",
    "LearningRateFinder": "model.learning_rate",
    "ModelCheckpoint": "save_every_steps",
    "ModelPruning": "model.rank",
    "OnExceptionCheckpoint": "save_every_steps",
    "ProgressBar": "trainer.enable_progress_bar",
    "RichProgressBar": "trainer.enable_progress_bar",
    "SpikeDetection": "max_nonfinite_losses",
    "StochasticWeightAveraging": "model.schedule",
    "TQDMProgressBar": "trainer.enable_progress_bar",
    "ThroughputMonitor": "speed/tokens_per_second",
    "WeightAveraging": "model.schedule",
}
"""The others, and what is to be used instead."""
OFFERED = {
    "accelerator", "accumulate_grad_batches", "benchmark", "callbacks", "detect_anomaly", "deterministic", "devices",
    "enable_progress_bar", "gradient_clip_algorithm", "gradient_clip_val", "inference_mode", "limit_test_batches",
    "limit_train_batches", "limit_val_batches", "log_every_n_steps", "logger", "max_epochs", "max_steps", "num_nodes",
    "plugins", "precision", "val_check_interval",
}  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "precision", "remedy"),
    [
        ([0, 1], "auto", "--trainer.devices 1"),
        ([0, 1, 2], "auto", "--trainer.devices [1, 2]"),
        ([0, 2], "bf16-mixed", "--trainer.devices 1"),
        ([0, 1], "16-mixed", None),
        ([0, 1], "32-true", None),
        ([1, 2], "auto", None),
        ([0], "auto", None),
        ([None, None], "auto", None),
    ],
)
def test_cards_that_would_compute_in_different_precisions_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: list[int | None], precision: str, remedy: str | None
) -> None:
    kinds = [(7, 5), (8, 9), (8, 6)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: kinds[gpu])
    if remedy is None:
        check_kinds(gpus, precision)
        return
    with pytest.raises(UserError) as caught:
        check_kinds(gpus, precision)
    shown = "GPU 0 is of 7.5, GPU 2 of 8.6" if gpus == [0, 2] else "GPU 0 is of 7.5, GPU 1 of 8.9"
    assert str(caught.value).startswith(
        f"trainer.devices: {shown}: bf16 on one alone; give --trainer.precision 16-mixed"
    )
    assert str(caught.value).endswith(remedy)


def test_the_command_looks_at_the_cards_before_it_starts_processes(
    monkeypatch: pytest.MonkeyPatch, expect_error: ExpectError
) -> None:
    kinds = [(7, 5), (8, 9)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: kinds[gpu])
    monkeypatch.setattr(training, "find_gpus", lambda *_: [0, 1])
    monkeypatch.setattr(training.starting, "run_several", lambda *_: pytest.fail("started"))
    monkeypatch.setattr("lit_qlora.precheck.check_first", lambda *_: 1)
    options = ["fit", "--trainer.devices", "auto", "--trainer.accumulate_grad_batches", "2"]
    expect_error(options, "GPU 0 is of 7.5, GPU 1 of 8.9", option="trainer.devices")


def _all_callbacks() -> dict[str, type[Callback]]:
    """Every callback class below lightning.pytorch.callbacks."""
    modules = pkgutil.walk_packages(callbacks.__path__, f"{callbacks.__name__}.")
    everything = (item for module in modules for item in vars(importlib.import_module(module.name)).items())
    return {name: value for name, value in everything if inspect.isclass(value) and issubclass(value, Callback)}


def test_every_callback_of_lightning_is_decided() -> None:
    assert {*_all_callbacks()} == LOOKS | {*REFUSED}
    assert {*OBSERVING} == LOOKS - {"Callback"}


def test_every_option_of_lightnings_trainer_is_decided() -> None:
    names = {*inspect.signature(Trainer).parameters}
    assert (names - NOT_OFFERED, {*NOT_OFFERED} - names) == (OFFERED, {"num_weights"})
    assert {*inspect.signature(QLoRATrainer).parameters} - names == {"num_weights", "kwargs"}


@pytest.mark.parametrize("is_mine", [False, True], ids=["Lightning's", "a subclass of it"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_reaches_into_the_arithmetic_is_refused(name: str, is_mine: bool) -> None:
    kind = _all_callbacks()[name]
    kind = type("Mine", (kind,), {}) if is_mine else kind
    for given in (kind.__new__(kind), [ModelSummary(), kind.__new__(kind)]):
        with pytest.raises(UserError) as caught:
            own_callbacks(given)
        error = str(caught.value)
        assert error.startswith("trainer.callbacks: expected n")
        assert error.endswith(f", got {kind.__name__}; leave it out")
        assert REFUSED[name] in error


@pytest.fixture(scope="module")
def parser() -> RunParser:
    parser = RunParser(exit_on_error=False)
    parser.add_lightning_class_args(QLoRATrainer, "trainer")
    return parser


@pytest.mark.parametrize("given", ["{}", "[{{class_path: {}}}]", "[LearningRateMonitor, {}]"])
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_it_is_asked_for_an_argument(
    name: str, given: str, parser: RunParser, expect_error: ExpectError
) -> None:
    kind = _all_callbacks()[name]
    given = given.format(f"{kind.__module__}.{name}")
    words = (REFUSED[name], f"got {name}", "leave it out")
    expect_error(lambda: parser.parse_args([f"--trainer.callbacks={given}"]), *words, option="trainer.callbacks")
    check_first("inspect", [f"--trainer.callbacks={given}"])  # which comes before the parser, passes it


@pytest.mark.parametrize("name", ["MixedPrecision", "BitsandbytesPrecision", "AsyncCheckpointIO"])
def test_a_plugin_is_refused_before_it_is_asked_for_an_argument(
    name: str, parser: RunParser, expect_error: ExpectError
) -> None:
    words = (f"got {name}", "leave it out")
    expect_error(lambda: parser.parse_args([f"--trainer.plugins={name}"]), *words, option="trainer.plugins")
    check_first("inspect", [f"--trainer.plugins={name}"])


def test_no_refusal_is_of_nothing() -> None:
    kinds = _all_callbacks()
    assert {kind.__name__ for kind in NO_CALLBACKS} <= {*REFUSED}
    assert all(any(issubclass(kinds[name], kind) for kind in NO_CALLBACKS) for name in REFUSED)


def test_what_looks_is_let_in() -> None:
    class Mine(Callback):
        monitor = True  # a word of its own

    given = [ModelSummary(), Timer(), EarlyStopping("val/loss"), Mine(), callbacks.LambdaCallback()]
    assert own_callbacks(given) == given
    assert own_callbacks(None) == []


def test_a_timer_with_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"Timer .* unsaved; .* give --max_time"):
        own_callbacks(Timer(duration="00:01:00:00"))


@pytest.mark.parametrize("monitored", ["val_loss", "loss", "train/loss", "test/loss", ""])
def test_a_figure_that_there_is_not_is_refused_at_the_start(monitored: str, expect_error: ExpectError) -> None:
    expect_error(
        lambda: own_callbacks([EarlyStopping(monitored)]),
        "EarlyStopping",
        repr(monitored),
        "val/accuracy",
        option="trainer.callbacks",
    )


def test_without_validations_there_is_nothing_to_monitor() -> None:
    with pytest.raises(UserError, match=r"monitors 'val/loss', expected none where trainer.limit_val_batches is 0"):
        own_callbacks(EarlyStopping("val/loss"), validates=False)


def test_plugins() -> None:
    given = LightningEnvironment()
    assert own_plugins(given) == [given]
    with pytest.raises(UserError, match=r"expected none that changes layers .*, got TorchSyncBatchNorm; leave it out"):
        own_plugins([given, TorchSyncBatchNorm()])


ODD_COUNTER = """
from lightning.pytorch import Callback


class OddCounter(Callback):
    def on_validation_batch_end(self, trainer, *_):
        for logger in trainer.loggers:
            logger.log_metrics({"odd": 1.0}, step=100 + trainer.global_step)
"""


@pytest.mark.slow
def test_callbacks_that_look_leave_the_figures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that can be monitored are there, and one that counts otherwise costs none of metrics.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("odd_counter.py").write_text(ODD_COUNTER)
    stop = "--trainer.callbacks+={{class_path: EarlyStopping, init_args: {{monitor: {}}}}}"
    stops = [stop.format(name) for name in held_out()]
    fit = ["fit", "--samples.count", "0", "--trainer.limit_val_batches", "1", "--trainer.max_steps", "2",
           "--trainer.val_check_interval", "1", "--trainer.log_every_n_steps", "1"]  # fmt: skip
    looks = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=odd_counter.OddCounter"]
    assert main([*fit, "--run", "plain"]) == 0
    assert main([*fit, "--run", "watched", *looks, *stops]) == 0
    plain, watched = ([*read_lines(Path("runs", name, "metrics.jsonl"))] for name in ("plain", "watched"))
    assert [line["step"] for line in watched] == [0, 1, 2]
    for name in (*held_out(), "train/loss", "train/learning_rate", "train/gradient_norm"):
        assert [line.get(name) for line in watched] == [line.get(name) for line in plain]
    weights = [Path("runs", name, "adapter/adapter_model.safetensors").read_bytes() for name in ("plain", "watched")]
    assert weights[0] == weights[1]
