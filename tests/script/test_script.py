"""A script of one's own with Lightning's plain Trainer: the losses of the command line, and Lightning's own parts."""

import csv
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger

import lit_qlora
from lit_qlora import ChatDataModule, QLoRAModule
from lit_qlora.cli import main
from lit_qlora.errors import UserError
from lit_qlora.figures.lines import read_lines
from lit_qlora.metrics import held_out
from lit_qlora.model.device import Device
from lit_qlora.model.learning import LearnsInParts
from lit_qlora.model.script import NEEDED_HOOKS, check_monitors, check_trainer
from tests.script.parts import data, module, trainer

ROOT = Path(__file__).parents[2]
HOW_MANY = {"max_steps": 6, "val_check_interval": 6, "log_every_n_steps": 2, "limit_val_batches": 2}


@pytest.fixture(scope="session")
def train():
    """The example, as its file has it."""
    spec = spec_from_file_location("example", ROOT / "examples" / "train.py")
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.train


def curve(folder, name):
    """Values by Lightning's number of the step, which counts from 0."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


# The same losses


def test_the_examples_losses_are_those_of_the_command_line(train, here):
    """They are equal to the last bit over accumulated micro-batches; and the run's TensorBoard has each figure once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = train(here / "mine", accumulate_grad_batches=2, enable_progress_bar=False, **HOW_MANY)
    options = [f"--trainer.{name}={value}" for name, value in HOW_MANY.items()]
    given = ["--trainer.accumulate_grad_batches=2", "--samples.count=0", "--run=theirs"]
    assert main(["fit", f"--config={ROOT / 'configs' / 'demo.yaml'}", *options, *given]) == 0

    (run,) = here.glob("**/theirs")
    lines = {line["step"]: line for line in read_lines(run / "metrics.jsonl")}
    figures = Path(done.logger.log_dir)
    assert curve(figures, "train/loss") == {step - 1: lines[step]["train/loss"] for step in (2, 4, 6)}
    assert curve(figures, "train/accuracy") == {step - 1: lines[step]["train/accuracy"] for step in (2, 4, 6)}
    # Two validations in six steps of two; the last is the best adapter's, which was scored once more.
    assert curve(figures, "val/loss") == {2: lines[3]["val/loss"], 5: lines[6]["val/loss"], 6: lines[6]["val/loss"]}
    for name in ("val/loss", "val/perplexity", "val/accuracy"):
        assert float(done.callback_metrics[name]) == lines[6][name]
    saved = [folder / "adapter" / "adapter_model.safetensors" for folder in (run, here / "mine")]
    assert saved[0].read_bytes() == saved[1].read_bytes()

    for part, name in (("training", "train/loss"), ("held-out", "val/loss")):
        events = EventAccumulator(str(run / part)).Reload()
        steps = [event.step for event in events.Scalars("1 Loss/nats per token")]
        assert steps == [step for step in lines if name in lines[step]]


def test_the_train_loss_between_two_records_is_of_all_since_the_last(here):
    seen = []

    class See(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(float(trainer.callback_metrics.get("train/loss", 0)))

    alone = trainer(max_steps=4, log_every_n_steps=1, callbacks=[See()])
    alone.fit(module(), data())
    one_by_one = [*seen[1:], float(alone.callback_metrics["train/loss"])]
    seen.clear()
    paired = trainer(max_steps=4, log_every_n_steps=2, callbacks=[See()])
    paired.fit(module(), data())
    pairs = [*seen[1:], float(paired.callback_metrics["train/loss"])]
    assert pairs[0] == one_by_one[0]
    assert pairs[2] == one_by_one[2]
    assert min(one_by_one[:2]) < pairs[1] < max(one_by_one[:2])


def test_a_callback_finds_the_loss_of_the_step_that_has_just_ended(here):
    """A `ModelCheckpoint` therefore saves the step that its figure is of."""
    losses = []

    class See(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append((float(trainer.callback_metrics["train/loss"]), float(outputs["loss"])))

    lowest = ModelCheckpoint(here, monitor="train/loss", every_n_train_steps=1, save_top_k=1)
    trainer(max_steps=4, log_every_n_steps=1, callbacks=[See(), lowest]).fit(module(), data())
    assert [round(logged, 4) for logged, _ in losses] == [round(own, 4) for _, own in losses]
    step = min(range(4), key=lambda step: losses[step][0]) + 1
    assert lowest.best_model_path.endswith(f"step={step}.ckpt")


def test_no_figure_waits_for_the_device_before_a_logger_asks(monkeypatch):
    built, logged = module(), []
    built.lora_trained = torch.nn.Parameter(torch.zeros(1))
    few = {"accumulate_grad_batches": 2, "datamodule": None, "train_dataloader": None}
    built._trainer = SimpleNamespace(global_step=0, log_every_n_steps=5, barebones=False, **few)
    monkeypatch.setattr(built, "log_dict", lambda figures, **options: logged.append((figures, options)))
    outputs = {"loss_sum": torch.tensor(6.0), "num_correct": torch.tensor(1), "num_answers": 3}
    with monkeypatch.context() as patch:
        for reading in ("item", "__float__", "__bool__", "tolist", "cpu", "__int__"):
            patch.setattr(torch.Tensor, reading, lambda *_: pytest.fail("the device was waited for"))
        patch.setattr(LearnsInParts, "training_step", lambda *_: outputs)
        built.on_train_start()
        built.training_step(None, 0)
        assert logged == []  # in mid-step
        built.training_step(None, 1)
        built.on_before_optimizer_step(None)
    ((figures, options),) = logged
    assert figures["train/loss"] == 2.0
    assert figures["train/accuracy"].item() == 1 / 3
    assert options == {"logger": None}


# Lightning's own parts


def test_a_validation_returns_its_figures_and_a_test_does():
    built, rows, lightning = module(), data(), trainer(limit_test_batches=1)
    (figures,) = lightning.validate(built, rows, verbose=False)
    assert figures.keys() == {*held_out()}
    assert 0 < figures["val/loss"] < 10
    (tested,) = lightning.test(built, rows, verbose=False)
    assert {"test/loss", "test/perplexity", "test/accuracy"} <= tested.keys()
    assert tested.keys() == {name.replace("val/", "test/") for name in figures}


def test_a_validation_before_or_one_that_was_interrupted_is_no_part_of_the_next():
    """A fit in a notebook may end in a traceback: the figure after it was once twice the loss."""

    class Interrupt(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise ZeroDivisionError

    built, rows = module(dropout=0.5), data()
    first = trainer().validate(built, rows, verbose=False)
    with pytest.raises(ZeroDivisionError):
        trainer(callbacks=[Interrupt()]).validate(built, rows, verbose=False)
    assert trainer().validate(built, rows, verbose=False) == first
    assert not built.model.training
    trainer(num_sanity_val_steps=1).fit(built, rows)  # warned of modules in eval mode, too
    assert all(part.training for part in built.modules() if isinstance(part, torch.nn.Dropout))


def test_early_stopping_and_checkpoints_find_the_held_out_loss(here):
    best = ModelCheckpoint(here, monitor="val/loss")
    early = EarlyStopping("val/loss", patience=1, min_delta=100.0)
    stopped = trainer(max_steps=9, val_check_interval=1, check_val_every_n_epoch=None, callbacks=[best, early])
    stopped.fit(module(), data())
    assert stopped.global_step == 2
    assert best.best_model_score == stopped.callback_metrics["val/loss"]


class Draws(QLoRAModule):
    """Draws a number for each micro-batch, and more in a validation."""

    def on_fit_start(self):
        self.drawn = []

    def training_step(self, batch, batch_idx):
        self.drawn.append(torch.rand(()).item())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        torch.rand(7)
        super().validation_step(batch, batch_idx)


def test_every_place_and_every_seed_draws_otherwise_whatever_is_drawn_in_between():
    def drawn(seed=1, **options):
        built = Draws(rank=2, alpha=2.0)
        short = {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 2}
        trainer(**short, **options).fit(built, data(seed=seed, batch_size=1))
        return built.drawn

    undisturbed = drawn(limit_val_batches=0)
    assert len({*undisturbed, *drawn(2, limit_val_batches=0)}) == 8
    assert drawn(val_check_interval=1) == undisturbed


class WithOwnLoss(QLoRAModule):
    """A training step that calls no other."""

    def training_step(self, batch, batch_idx):
        loss, _, count = self.summed_loss(batch)
        self.log("mine/loss", loss / count)
        return loss / count


class Penalised(QLoRAModule):
    """A training step that adds to the loss, and returns nothing else."""

    penalty = 1.0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        return loss + self.penalty * sum((value**2).sum() for value in self.parameters() if value.requires_grad)


class PenalisedAlone(WithOwnLoss):
    """The same, without the project's."""

    def training_step(self, batch, batch_idx):
        penalty = sum((value**2).sum() for value in self.parameters() if value.requires_grad)
        return super().training_step(batch, batch_idx) + penalty


@pytest.mark.parametrize(("made", "as_of"), [(WithOwnLoss, QLoRAModule), (Penalised, PenalisedAlone)])
def test_a_subclass_learns_by_a_loss_of_its_own(made, as_of):
    built = []
    for cls in (made, as_of):
        seed_everything(42, verbose=False)
        built.append(cls(rank=2, alpha=2.0))
        lightning = trainer()
        lightning.fit(built[-1], data())
        assert ("train/loss" in lightning.callback_metrics) is not issubclass(cls, WithOwnLoss)
    weights = [one.state_dict() for one in built]
    assert all(torch.allclose(value, weights[1][name], atol=1e-6) for name, value in weights[0].items())
    assert any(value.abs().max() > 0 for name, value in weights[0].items() if "lora_B" in name)


class Manual(QLoRAModule):
    """Lightning's manual optimization of the same loss."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx)["loss"])
        self.optimizers().step()
        self.lr_schedulers().step()


def test_a_subclass_that_makes_its_own_steps_logs_their_losses(here):
    class See(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(float(trainer.callback_metrics["train/loss"]))

    found = []
    for cls in (QLoRAModule, Manual):
        seed_everything(42, verbose=False)
        seen, logs = [], CSVLogger(here, cls.__name__)
        made = trainer(max_steps=4, log_every_n_steps=2, limit_val_batches=0, callbacks=[See()], logger=logs)
        made.fit(cls(rank=2, alpha=2.0), data())
        found.append((seen, *(curve(Path(logs.log_dir), f"train/{name}") for name in ("loss", "accuracy"))))
    assert found[0] == found[1]
    assert [*found[1][1]] == [1, 3]
    assert len({*seen}) == 4


class Own(QLoRAModule):
    """One with figures, a clipping and weights of its own."""

    def validation_step(self, batch, batch_idx):
        self.log("mine/figure", 1.0, batch_size=1)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        pass


def test_a_subclass_that_scores_and_clips_in_its_own_way_has_no_figure_of_nothing():
    lightning = trainer(val_check_interval=2)
    lightning.fit(Own(), data())
    figures = lightning.callback_metrics.keys()
    assert {"mine/figure", "train/loss"} <= figures
    assert not {"val/loss", "train/gradient_norm"} & figures


def test_a_subclass_keeps_the_hooks_that_each_fit_needs(expect_error):
    """Lightning's are empty, so that nobody calls them: prompt format and figures were lost without a word."""

    class Mixin:
        def setup(self, stage):
            self.stage = stage

    class Fine(QLoRAModule):
        def on_train_start(self):
            super().on_train_start()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

    assert all(hasattr(QLoRAModule, name) for name in NEEDED_HOOKS)
    expect_error(lambda: type("Mine", (QLoRAModule,), {"on_train_start": lambda self: None}), "Mine.on_train_start",
                 "super().on_train_start(…)")  # fmt: skip
    expect_error(lambda: type("Mixed", (Mixin, QLoRAModule), {}), "Mixed.setup", "super().setup(…)")
    assert type("Below", (Fine,), {}).on_train_start is Fine.on_train_start


def _frozen(built):
    built.configure_model()
    built.peft_model.requires_grad_(False)
    return built


def _half(built):
    built.configure_model()
    return built.half()


def _with_head(built):
    built.head = torch.nn.Linear(2, 2)
    return built


@pytest.mark.parametrize(
    ("change", "words"),
    [(torch.compile, "torch.compile"), (_frozen, "frozen"), (_half, "got float16"), (_with_head, "head.weight would")],
)
def test_a_module_that_could_not_be_trained_or_saved_is_refused(change, words, expect_error):
    expect_error(lambda: trainer().fit(change(module()), data()), words, option="model")


class WithArgument(QLoRAModule):
    """A subclass that records its own argument as Lightning has it."""

    def __init__(self, extra: int = 1, **options):
        super().__init__(**options)
        self.save_hyperparameters("extra")


def test_a_subclass_keeps_its_own_hyperparameters(here):
    made = trainer(max_steps=1, callbacks=[ModelCheckpoint(here, save_last=True)])
    made.fit(WithArgument(extra=5, rank=2, alpha=4.0), data())
    loaded = WithArgument.load_from_checkpoint(here / "last.ckpt")
    assert (loaded.hparams["extra"], loaded.lora.rank, loaded.lora.alpha) == (5, 2, 4.0)


def test_a_trainer_of_another_precision_has_the_base_loaded_anew():
    built, rows = module(), data()
    trainer().fit(built, rows)
    trained = {name: value.clone() for name, value in built.state_dict().items()}
    trainer(precision="bf16-mixed").validate(built, rows, verbose=False)
    assert built.peft_model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in trained.items())


class Rows(Callback):
    """Notes which rows are learned."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch.rows)


def test_a_share_of_overfit_batches_that_is_none_is_called_that(expect_error):
    expect_error(
        lambda: trainer(overfit_batches=0.001).fit(module(), data()), "0.001", option="trainer.overfit_batches"
    )


def test_overfit_batches_are_the_same_in_each_epoch():
    rows = Rows()
    trainer(overfit_batches=2, max_epochs=2, max_steps=-1, callbacks=[rows]).fit(module(), data())
    assert len({*rows.seen[:2]}) == 2
    assert rows.seen[:2] == rows.seen[2:]


def test_loaders_made_anew_continue_with_the_next_epoch():
    rows, renewed = Rows(), Rows()
    short = {"limit_train_batches": 2, "max_epochs": 2, "max_steps": -1, "limit_val_batches": 0}
    trainer(**short, callbacks=[rows]).fit(module(), data())
    trainer(**short, callbacks=[renewed], reload_dataloaders_every_n_epochs=1).fit(module(), data())
    assert len({*rows.seen}) == 4
    assert renewed.seen == rows.seen


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}, {"gradient_clip_val": 0.3}])
def test_what_a_trainer_can_do_is_done_without_a_warning(options):
    if options.get("barebones"):
        options = options | dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"))
    if "barebones" in options or "fast_dev_run" in options:
        options = options | {"enable_model_summary": None, "limit_val_batches": 1}
    short = trainer(**options)
    short.fit(module(), data())
    assert short.global_step == (1 if "fast_dev_run" in options else 2)


# What can't be done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16-true"}, "trainer.precision: expected one of 16-mixed, bf16-mixed, 32-true"),
        ({"precision": "16-true"}, "got '16-true'"),
        ({"precision": "64-true"}, "got '64-true'"),
        ({"max_steps": -1, "max_epochs": -1}, "trainer.max_epochs: expected a number of epochs, or of steps"),
        ({"strategy": "ddp"}, "trainer.strategy: expected auto with devices=1 (on several"),
        ({"devices": 2}, "trainer.strategy: expected auto with devices=1 (on several"),
    ],
)
def test_a_trainer_that_can_t_do_it_is_refused(options, message):
    made = trainer(**options)
    made.state.fn = "fit"
    with pytest.raises(UserError) as caught:
        check_trainer(made)
    assert message in str(caught.value)


def test_a_card_too_old_for_this_build_of_torch_is_refused(monkeypatch, expect_error):
    made = trainer()
    monkeypatch.setattr(type(made.strategy), "root_device", torch.device("cuda"))
    monkeypatch.setattr("lit_qlora.model.script.current_device", lambda: Device("Tesla P100", (6, 0)))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    expect_error(lambda: check_trainer(made), "Tesla P100", "has kernels from 7.5 on", option="trainer.accelerator")


CHANGING = [
    (GradientAccumulationScheduler({0: 2}), "trainer.accumulate_grad_batches says what each has"),
    (EMAWeightAveraging(), "none that averages weights"),
    (StochasticWeightAveraging(0.1), "none that averages weights"),
    (LearningRateFinder(), "none that sets the learning rate"),
    (BatchSizeFinder(), "data.batch_size does"),
    (BackboneFinetuning(), "model.target_modules says which"),
    (ModelPruning("l1_unstructured"), "none that prunes weights"),
]


@pytest.mark.parametrize(("callback", "words"), CHANGING)
def test_a_callback_that_changes_what_is_trained_is_refused_before_it_sets_itself_up(callback, words, expect_error):
    built = module()
    for run in ("fit", "validate"):
        made = trainer(callbacks=[callback])
        expect_error(lambda made=made, run=run: getattr(made, run)(built, data()), words, option="trainer.callbacks")
    assert built.model is None


class AccumulatesMore(Callback):
    """Changes the steps in the middle of a fit, as a scheduler of one's own would."""

    def on_train_batch_end(self, trainer, *_):
        trainer.accumulate_grad_batches = 4


def test_steps_that_change_in_a_fit_are_refused(expect_error):
    made = trainer(max_steps=3, callbacks=[AccumulatesMore()])
    expect_error(lambda: made.fit(module(), data()), "expected 1", "got 4", option="trainer.accumulate_grad_batches")


MONITORS = [
    (EarlyStopping("nope"), {}, ["EarlyStopping monitors 'nope'", "train/loss", "val/loss"]),
    (EarlyStopping("val_loss"), {}, ["'val_loss'"]),
    (EarlyStopping("step"), {}, ["'step'"]),
    (ModelCheckpoint(monitor="test/loss"), {}, ["ModelCheckpoint monitors 'test/loss'"]),
    (EarlyStopping("val/loss"), {"limit_val_batches": 0}, ["'val/loss'", "trainer.limit_val_batches is 0"]),
]


@pytest.mark.parametrize(("callback", "options", "words"), MONITORS)
def test_a_figure_that_is_not_logged_is_refused_before_a_weight_is_loaded(callback, options, words, expect_error):
    built = module()
    expect_error(
        lambda: trainer(callbacks=[callback], **options).fit(built, data()), *words, option="trainer.callbacks"
    )
    assert built.model is None


def test_figures_that_there_may_be_are_left_to_lightning():
    class Logs(Callback):
        pass

    for callbacks in (
        [ModelCheckpoint(monitor="step", mode="max"), EarlyStopping("train/loss")],
        [EarlyStopping("mine"), Logs()],
        [EarlyStopping("mine"), LambdaCallback()],
        [EarlyStopping("mine", strict=False)],
        [EarlyStopping("lr-AdamW"), LearningRateMonitor()],
    ):
        check_monitors(trainer(callbacks=callbacks, logger=True))


def test_a_limit_of_time_needs_another_for_the_schedule():
    with pytest.raises(UserError, match=r"trainer.max_epochs: expected a number of epochs"):
        trainer(max_steps=-1, max_time="00:00:01:00").fit(module(), data())
    limited = trainer(max_time="00:00:01:00")
    limited.fit(module(), data())
    assert limited.global_step == 2


def test_it_is_refused_before_a_weight_is_loaded():
    built = module()
    with pytest.raises(UserError, match=r"trainer.precision"):
        trainer(precision="bf16-true").fit(built, data())
    with pytest.raises(UserError, match=r"trainer.predict: .*main.py predict"):
        trainer().predict(built, data())
    with pytest.raises(UserError, match=r"model.optimizer: paged_adamw pages a GPU's memory"):
        trainer().fit(module(optimizer="paged_adamw"), data())
    assert built.model is None


def test_the_names_are_there_and_light():
    assert (lit_qlora.QLoRAModule, lit_qlora.ChatDataModule) == (QLoRAModule, ChatDataModule)
    with pytest.raises(AttributeError, match="no attribute 'Module'"):
        _ = lit_qlora.Module
    code = "import sys, lit_qlora; print({'torch', 'lightning', 'lit_qlora.model'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


# On a GPU


def on_gpu(**options):
    return trainer(accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=4, val_check_interval=4,
                   check_val_every_n_epoch=None, **options)  # fmt: skip


@pytest.mark.gpu
def test_on_a_gpu_a_fit_is_followed_by_validations_and_another_fit(here):
    """Between two of its runs, Lightning moves the model to the host and back."""
    torch._dynamo.reset()  # what earlier tests compiled counts against the most that it compiles of a function
    built, rows, best = module(), data(), ModelCheckpoint(here, monitor="val/loss")
    first = on_gpu(callbacks=[best])
    first.fit(built, rows)
    scored = float(first.callback_metrics["val/loss"])
    for path in (None, "best"):
        assert first.validate(built, rows, ckpt_path=path, verbose=False)[0]["val/loss"] == pytest.approx(scored)
    loaded = QLoRAModule.load_from_checkpoint(best.best_model_path)
    assert on_gpu().validate(loaded, data(), verbose=False)[0]["val/loss"] == pytest.approx(scored)
    again = on_gpu()
    again.fit(built, rows)
    assert float(again.callback_metrics["val/loss"]) < scored


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_logging_waits_for_no_device(here, monkeypatch):
    built, logged = module(), []
    real = built.on_before_optimizer_step

    def watched(*args):
        # The first step registers the figures' names, which copies a zero for each.
        torch.cuda.set_sync_debug_mode("error" if built.trainer.global_step > 1 else "default")
        try:
            real(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        logged.append(built.trainer.global_step)

    monkeypatch.setattr(built, "on_before_optimizer_step", watched)
    on_gpu(accumulate_grad_batches=2, logger=CSVLogger(here), log_every_n_steps=2).fit(built, data())
    assert logged == [0, 1, 2, 3]
