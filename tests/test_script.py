"""A script of one's own with Lightning's plain Trainer: the losses of the command line, and Lightning's own parts."""

import csv
import json
import shutil
import subprocess
import sys
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
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
from torch.utils.data import DataLoader

import lit_qlora
from lit_qlora import ChatDataModule, QLoRAModule, demo
from lit_qlora.cli import main
from lit_qlora.data.batching import collate
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.errors import UserError
from lit_qlora.figures.lines import read_lines
from lit_qlora.figures.tensorboard import LOSS
from lit_qlora.model.learning import LearnsInParts
from lit_qlora.model.script import NEEDED, check_monitors, check_trainer
from lit_qlora.quiet import quieten
from lit_qlora.text.conversation import Conversation, Turn

ROOT = Path(__file__).parents[1]
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HOW_MANY = {"max_steps": 6, "val_check_interval": 6, "log_every_n_steps": 2, "limit_val_batches": 2}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    quieten()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def train():
    """The example, as its file has it."""
    spec = spec_from_file_location("example", ROOT / "examples" / "train.py")
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.train


def trainer(**options):
    """Lightning's own, short and silent."""
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_steps": 2}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in options.get("callbacks", []))
    return Trainer(**{"accelerator": "cpu", "limit_val_batches": 1, "enable_checkpointing": saves, **silent, **options})


def module(**options):
    seed_everything(42, verbose=False)
    return QLoRAModule(**{"rank": 2, "alpha": 2.0, **options})


def data(**options):
    return ChatDataModule(**{"max_length": 96, **options})


def curve(folder, name):
    """Values by Lightning's number of the step, which counts from 0."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def micro_batches(count):
    rows = data(tokenizer="demo")
    rows.setup("fit")
    encoded = rows._rows["train"]
    return [
        collate([(row, encoded.examples[row]) for row in (two, two + 1)], sum(encoded.answer_tokens[two : two + 2]))
        for two in range(0, 2 * count, 2)
    ]


# The same losses


def test_the_examples_losses_are_those_of_the_command_line(train, here):
    """Over accumulated micro-batches, to the last bit; and the run's TensorBoard has each figure once."""
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
        assert [event.step for event in events.Scalars(LOSS)] == [step for step in lines if name in lines[step]]


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
    """And so a `ModelCheckpoint` saves the step that its figure is of."""
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
        optimizer = SimpleNamespace(step=lambda closure: closure())
        built.optimizer_step(0, 1, optimizer, lambda: built.training_step(None, 1))
    ((figures, options),) = logged
    assert figures["train/loss"] == 2.0
    assert figures["train/accuracy"].item() == 1 / 3
    assert options == {"logger": None}


# Lightning's own parts


def test_a_validation_returns_its_figures_and_a_test_does():
    built, rows, lightning = module(), data(), trainer(limit_test_batches=1)
    (figures,) = lightning.validate(built, rows, verbose=False)
    assert figures.keys() == {"val/loss", "val/perplexity", "val/accuracy"}
    assert 0 < figures["val/loss"] < 10
    assert lightning.test(built, rows, verbose=False)[0].keys() == {"test/loss", "test/perplexity", "test/accuracy"}


def test_early_stopping_and_checkpoints_find_the_held_out_loss(here):
    best = ModelCheckpoint(here, monitor="val/loss")
    early = EarlyStopping("val/loss", patience=1, min_delta=100.0)
    stopped = trainer(max_steps=9, val_check_interval=1, check_val_every_n_epoch=None, callbacks=[best, early])
    stopped.fit(module(), data())
    assert stopped.global_step == 2
    assert best.best_model_score == stopped.callback_metrics["val/loss"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four steps without a break, over the end of an epoch, with a checkpoint of each: module, folder."""
    quieten()
    folder = tmp_path_factory.mktemp("straight")
    saves = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    whole = trainer(max_epochs=2, max_steps=-1, limit_train_batches=2, callbacks=[saves])
    built = module()
    whole.fit(built, data(system="Be brief."))
    return built, folder


@pytest.mark.parametrize("step", [1, 2, 3])
def test_lightnings_checkpoints_resume_a_run(straight, step):
    built, folder = straight
    (checkpoint,) = folder.glob(f"*step={step}.ckpt")
    resumed = module()
    lightning = trainer(max_epochs=2, max_steps=-1, limit_train_batches=2)
    lightning.fit(resumed, data(system="Be brief."), ckpt_path=checkpoint)
    assert lightning.global_step == 4
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in built.state_dict().items())


def test_dropout_is_that_of_the_command_line_and_the_same_after_a_resume(here):
    options = {"precision": "32-true", "max_steps": 3, "val_check_interval": 9, "log_every_n_steps": 1}
    saves = ModelCheckpoint(here / "saved", every_n_train_steps=2, save_top_k=-1)
    whole, resumed = (module(dropout=0.1, learning_rate=0.003) for _ in range(2))
    lightning = trainer(callbacks=[saves], check_val_every_n_epoch=None, **options)
    lightning.fit(whole, data())
    again = trainer(check_val_every_n_epoch=None, **options)
    again.fit(resumed, data(), ckpt_path=here / "saved" / "epoch=0-step=2.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())

    given = [f"--trainer.{name}={value}" for name, value in options.items()]
    given += ["--model.dropout=0.1", "--model.learning_rate=0.003", "--model.rank=2", "--model.alpha=2"]
    rest = ["--data.max_length=96", "--samples.count=0", "--trainer.limit_val_batches=1", "--run=./theirs"]
    (here / "own.yaml").write_text("{}")
    assert main(["fit", "--config=own.yaml", "--trainer.gradient_clip_val=null", *given, *rest]) == 0
    lines = {line["step"]: line for line in read_lines(here / "theirs" / "metrics.jsonl")}
    assert float(again.callback_metrics["train/loss"]) == lines[3]["train/loss"]


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
        short = {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 3}
        trainer(**short, **options).fit(built, data(seed=seed))
        return built.drawn

    undisturbed = drawn(limit_val_batches=0)
    assert len({*undisturbed, *drawn(2, limit_val_batches=0)}) == 12
    assert drawn(val_check_interval=1) == undisturbed


@pytest.mark.parametrize("options", [{}, {"weights_only": True}, {"map_location": "cpu", "learning_rate": 0.5}])
def test_a_module_is_loaded_from_a_checkpoint(straight, here, options):
    built, folder = straight
    (checkpoint,) = folder.glob("*step=4.ckpt")
    loaded = QLoRAModule.load_from_checkpoint(checkpoint, **options)
    assert (loaded.lora.rank, loaded.learning_rate) == (2, options.get("learning_rate", 2e-4))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in built.state_dict().items())
    loaded.save_adapter("saved")
    assert json.loads(Path("saved/lit_qlora.json").read_text())["system"] == "Be brief."
    rows = data(system="Be brief.")
    assert trainer().validate(loaded, rows, verbose=False) == trainer().validate(built, rows, verbose=False)


def test_a_checkpoint_of_another_base_or_rank_or_of_a_run_is_refused(straight, here):
    _, folder = straight
    (checkpoint,) = folder.glob("*step=4.ckpt")
    other = shutil.copytree(demo.BASE, here / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(UserError, match=r"trained on another base .* than .*other .*give its own as base"):
        QLoRAModule.load_from_checkpoint(checkpoint, base=str(other))
    with pytest.raises(UserError, match="same base, rank and target modules"):
        QLoRAModule.load_from_checkpoint(checkpoint, rank=4)
    with pytest.raises(UserError, match=r"is a folder, .*adapter=FOLDER"):
        QLoRAModule.load_from_checkpoint(folder)
    for run in (trainer().fit, trainer().validate, trainer().test):
        with pytest.raises(UserError, match=r"ckpt_path: .* is a folder, .*adapter=FOLDER.* python main.py fit"):
            run(module(), datamodule=data(), ckpt_path=folder)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-2000])


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (lambda file: file.unlink(), "no such file"),
        (_cut, "PytorchStreamReader"),
        (lambda file: file.write_bytes(b""), "can't be read as a checkpoint"),
        (lambda file: torch.save({"state_dict": {}}, file), "pytorch-lightning_version"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_one_line(straight, here, alter, words, expect_error):
    (checkpoint,) = straight[1].glob("*step=4.ckpt")
    file = here / "altered.ckpt"
    shutil.copy(checkpoint, file)
    alter(file)
    expect_error(lambda: QLoRAModule.load_from_checkpoint(file), "altered.ckpt", words, option="ckpt_path")


@pytest.mark.parametrize("part", [{}, {"base_fingerprint": 3, "prompts": {}}])
def test_a_checkpoint_whose_record_was_altered_is_told(straight, here, part, expect_error):
    (checkpoint,) = straight[1].glob("*step=4.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"lit_qlora": part}, here / "altered.ckpt")
    expect_error(lambda: QLoRAModule.load_from_checkpoint(here / "altered.ckpt"), "altered", option="ckpt_path")


class WithPlainLoader(ChatDataModule):
    """A DataModule whose loader is PyTorch's own."""

    def train_dataloader(self):
        return DataLoader([*super().train_dataloader()][:3], batch_size=None)


def test_a_datamodule_may_have_a_plain_loader():
    lightning = trainer(max_steps=-1, max_epochs=1, val_check_interval=3)
    with warnings.catch_warnings(action="ignore"):  # Lightning's, of few workers
        lightning.fit(module(), WithPlainLoader(max_length=96))
    assert lightning.global_step == 3


def in_format(template=CHATML, system="Be brief."):
    return data(template=template, system=system, max_length=256)


@pytest.fixture(scope="module")
def in_chatml(tmp_path_factory):
    """A checkpoint trained with a template and a system text of its data, and their held-out loss."""
    quieten()
    folder = tmp_path_factory.mktemp("chatml")
    made, built, rows = (
        trainer(callbacks=[ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)]),
        module(),
        in_format(),
    )
    made.fit(built, rows)
    return folder / "last.ckpt", made.validate(built, rows, verbose=False)[0]["val/loss"]


def test_what_is_loaded_from_a_checkpoint_is_scored_in_its_prompt_format(in_chatml, expect_error):
    checkpoint, loss = in_chatml
    loaded = QLoRAModule.load_from_checkpoint(checkpoint)
    assert trainer().validate(loaded, in_format(None, None), verbose=False)[0]["val/loss"] == loss
    other = in_format(CHATML + "\n")
    expect_error(lambda: trainer().validate(loaded, other), "the checkpoint was trained with", option="data.template")
    rows = in_format(system="Be long.")  # asked for
    assert trainer().validate(loaded, rows, verbose=False)[0]["val/loss"] != loss


@pytest.mark.parametrize(("template", "system", "name"), [(None, None, "template"), (CHATML, None, "system"),
                                                          (None, "Be brief.", "template")])  # fmt: skip
def test_a_checkpoint_is_not_resumed_or_scored_with_data_in_another_format(
    in_chatml, template, system, name, expect_error
):
    for verb in ("fit", "validate"):
        run, rows = getattr(trainer(max_steps=3), verb), in_format(template, system)
        expect_error(lambda run=run, rows=rows: run(module(), datamodule=rows, ckpt_path=in_chatml[0]),
                     "the checkpoint was trained with", "the same", option=f"data.{name}")  # fmt: skip


@pytest.mark.parametrize(("options", "was"), [({"alpha": 4.0}, "2.0"), ({"rslora": True}, "False")])
def test_a_checkpoint_is_not_loaded_into_another_scaling(in_chatml, options, was, expect_error):
    checkpoint, option = in_chatml[0], f"model.{next(iter(options))}"
    rows = in_format()
    expect_error(lambda: QLoRAModule.load_from_checkpoint(checkpoint, **options), f"has {was}", option=option)
    expect_error(lambda: trainer().validate(module(**options), datamodule=rows, ckpt_path=checkpoint),
                 f"has {was}", option=option)  # fmt: skip


CHANGED = [
    ({"learning_rate": 1e-5}, {}, {}, "model.learning_rate", "0.0002"),
    ({"optimizer": "adamw_8bit"}, {}, {}, "model.optimizer", "adamw"),
    ({}, {"batch_size": 8}, {}, "data.batch_size", "4"),
    ({}, {"validation_share": 0.2, "source": "rows.jsonl"}, {}, "data.source", "rows"),
    ({}, {}, {"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches", "1"),
]


@pytest.mark.parametrize(("of_module", "of_data", "of_trainer", "option", "was"), CHANGED)
def test_a_fit_resumes_with_what_its_checkpoint_decides(
    straight, here, of_module, of_data, of_trainer, option, was, expect_error
):
    """Lightning would restore them from the checkpoint over what was given, or go on at another place in the rows."""
    row = '{"messages": [{"role": "user", "content": "%d"}, {"role": "assistant", "content": "a"}]}'
    (here / "rows.jsonl").write_text("\n".join(row % number for number in range(40)))
    (checkpoint,) = straight[1].glob("*step=1.ckpt")
    made, rows = module(**of_module), data(**{"system": "Be brief.", **of_data})
    expect_error(
        lambda: trainer(**of_trainer).fit(made, rows, ckpt_path=checkpoint),
        f"the checkpoint's {was}", "load_from_checkpoint", option=option,
    )  # fmt: skip


def test_a_fit_does_not_resume_from_weights_alone(here, expect_error):
    saves = ModelCheckpoint(here, save_last=True, save_weights_only=True)
    trainer(max_steps=1, callbacks=[saves]).fit(module(), data())
    expect_error(lambda: trainer().fit(module(), data(), ckpt_path=here / "last.ckpt"), "weights only",
                 "load_from_checkpoint", option="ckpt_path")  # fmt: skip
    assert trainer().validate(module(), data(), ckpt_path=here / "last.ckpt", verbose=False)


def test_a_checkpoint_can_be_saved_by_hand_before_a_fit(here):
    lightning = trainer()
    lightning.validate(module(), data(), verbose=False)
    lightning.save_checkpoint("by-hand.ckpt")
    assert QLoRAModule.load_from_checkpoint("by-hand.ckpt").lora.rank == 2


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

    assert all(hasattr(QLoRAModule, name) for name in NEEDED)
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


def test_loaders_made_anew_go_on_to_the_next_epoch():
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


# Data of one's own


def test_batches_of_a_loader_of_ones_own_are_learned():
    batches = micro_batches(4)
    short = trainer(max_steps=-1, max_epochs=2)
    built = module(schedule="linear")
    short.fit(built, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
    assert short.global_step == 8
    assert short.optimizers[0].param_groups[0]["lr"] == 0  # the schedule knew how long it was to be
    assert {"train/loss", "val/loss"} <= {*short.callback_metrics}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: [{"input_ids": torch.ones(5, dtype=torch.int64)}] * 4, ["Batch", "got dict", "ChatDataModule"]),
        (lambda: [(torch.ones(5), torch.ones(5))] * 4, ["Batch", "got list", "collate"]),
        (lambda: ["text"] * 4, ["Batch", "got list"]),
        (lambda: micro_batches(4), ["batch_size=None", "got (1, 2, "]),
    ],
)
def test_other_batches_are_refused_in_one_line(make, words):
    rows = make()
    for run in (lambda: trainer().validate(module(), DataLoader(rows), verbose=False),
                lambda: trainer(limit_val_batches=0).fit(module(), DataLoader(rows), DataLoader(rows))):  # fmt: skip
        with pytest.raises(UserError) as caught:
            run()
        assert "\n" not in str(caught.value)
        assert [word for word in words if word not in str(caught.value)] == []


def test_loaders_of_another_tokenizer_are_refused(expect_error):
    rows = data(tokenizer="demo")
    rows.setup("fit")
    num_ids = module().base.shape.vocabulary
    held_out = [rows.val_dataloader()[0]._replace(highest_id=num_ids)]
    loader = DataLoader(held_out, batch_size=None, collate_fn=lambda batch: batch)
    for run in (lambda: trainer().validate(module(), loader, verbose=False),
                lambda: trainer(limit_val_batches=0).fit(module(), loader, loader)):  # fmt: skip
        expect_error(run, f"the id {num_ids:,}", "vocab_size", option="dataloaders")
    assert rows.val_dataloader()[0].highest_id == int(rows.val_dataloader()[0].input_ids.max())


def test_loaders_made_for_other_steps_are_refused(expect_error):
    """Their gradients would be as many times as large as there are micro-batches in a step."""
    rows = data(tokenizer="demo")
    rows.setup("fit")
    short = trainer(accumulate_grad_batches=2)
    expect_error(lambda: short.fit(module(), rows.train_dataloader(), rows.val_dataloader()),
                 "made for optimizer steps of", "accumulate_grad_batches 2", option="dataloaders")  # fmt: skip
    assert short.global_step == 0


def test_a_script_is_told_what_became_of_its_rows_once(here, caplog):
    answered = '{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "Yes."}]}\n'
    unanswered = '{"messages": [{"role": "user", "content": "And?"}]}\n'
    Path("mine.jsonl").write_text("".join(answered % number for number in range(8)) + unanswered)
    built, rows, made = module(), data(source="mine.jsonl", validation_share=0.25), trainer()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        made.fit(built, rows)
        made.validate(built, rows, verbose=False)
        made.test(built, rows, verbose=False)
    told = [record.message for record in caplog.records]
    assert sum(line == "train: 1 row left out: nothing answered" for line in told) == 1
    assert sum(line.startswith("train: 6 conversations") for line in told) == 1
    assert sum(line.startswith("test: these are the held-out rows, by which") for line in told) == 1


def test_a_loader_without_an_end_needs_a_number_of_steps():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(micro_batches(1))

    loader = DataLoader(Endless(), batch_size=None)
    with pytest.raises(UserError, match=r"trainer.max_steps: expected a number of optimizer steps"):
        trainer(max_steps=-1, max_epochs=1, limit_val_batches=0).fit(module(), loader, loader)


def test_data_without_a_tokenizer_take_that_of_the_modules_base(here):
    other = shutil.copytree(demo.BASE, here / "other")
    rows = data()
    with pytest.raises(UserError, match=r"data.tokenizer: expected the hub id or folder of the base's"):
        _ = rows.tokenizer
    trainer().validate(module(), rows, verbose=False)
    assert Path(rows.tokenizer.name_or_path) == demo.BASE
    encoded = rows._rows["validation"]
    trainer().validate(module(), rows, verbose=False)
    assert rows._rows["validation"] is encoded  # made once
    trainer().validate(module(base=str(other)), rows, verbose=False)
    assert Path(rows.tokenizer.name_or_path) == other
    assert rows._rows["validation"] is not encoded


def test_a_tokenizer_of_more_pieces_than_the_base_has_is_refused(here):
    small = shutil.copytree(demo.BASE, here / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    with pytest.raises(UserError, match=r"^model.base: .* ids up to 1,023, .*vocab_size of 1,000"):
        trainer().fit(module(base=str(small)), data())
    with pytest.raises(UserError, match=r"^data.tokenizer: .* 'demo' .*small', the module's base.*1,000; leave it out"):
        trainer().fit(module(base=str(small)), data(tokenizer="demo"))


@pytest.mark.parametrize(("name", "words"), [("no/such/one", "no/such/one"), ("", "a hub id or a folder, got ''")])
def test_a_tokenizer_of_ones_own_that_is_none_is_named_as_that(name, words):
    with pytest.raises(UserError) as caught:
        data(tokenizer=name).setup("fit")
    assert caught.value.option == "data.tokenizer"
    assert words in str(caught.value)


@pytest.mark.parametrize("verb", ["fit", "plan"])
def test_on_the_command_line_a_tokenizer_is_the_bases(here, verb, expect_error):
    other = shutil.copytree(demo.BASE, here / "other")
    (other / "tokenizer_config.json").write_text('{"tokenizer_class": 5}')
    expect_error([verb, "--model.base", "other"], "tokenizer_class", option="model.base")


def test_batches_can_be_looked_at_without_a_trainer():
    rows = data(tokenizer="demo", batch_size=2)
    for loader, stage in ((rows.train_dataloader, "fit"), (rows.val_dataloader, "validate"),
                          (rows.test_dataloader, "test")):  # fmt: skip
        with pytest.raises(UserError, match=rf"call setup\('{stage}'\)"):
            loader()
    for stage in ("fit", "test"):
        rows.setup(stage)
    one = next(iter(rows.train_dataloader()))
    assert len(one.input_ids) == 2
    assert one.step_answer_tokens == len(one.targets)  # an optimizer step of its own
    assert all(len(loader) for loader in (rows.val_dataloader(), rows.test_dataloader()))
    with pytest.raises(UserError, match=r"counted with its Trainer"):
        rows.num_optimizer_steps()


def test_a_module_before_its_fit_says_that_it_is_not_loaded(here, expect_error):
    built, ids = module(), torch.tensor([[1, 5, 9]])
    for call in (lambda: built.save_adapter("x"), lambda: built(ids), lambda: built.load_adapter_weights(Path("x"))):
        with pytest.raises(UserError, match=r"model: .* loaded once training begins; .*configure_model\(\)"):
            call()
    assert not Path("x").exists()
    built.configure_model()
    Path("file").touch()
    for folder in ("file", Path("file/adapter")):
        expect_error(lambda folder=folder: built.save_adapter(folder), "a folder", "file, a file", option="folder")
    assert built(ids).shape == (1, 3, 1024)


def test_rows_that_may_be_longer_than_the_bases_context_are_refused():
    with pytest.raises(UserError, match=r"data.max_length: expected at most 1,024 tokens"):
        trainer().fit(module(), data(max_length=1025))


class Wrapped(LightningDataModule):
    """A DataModule of one's own, around this project's."""

    def __init__(self):
        super().__init__()
        self.inner = data(tokenizer="demo", system="Be brief.")

    def setup(self, stage):
        self.inner.setup(stage)

    def train_dataloader(self):
        return self.inner.train_dataloader()

    def val_dataloader(self):
        return self.inner.val_dataloader()


def test_loaders_alone_say_which_prompts_they_hold(here):
    """As the Trainer's own loaders, and from a DataModule of one's own."""
    wrapped = Wrapped()
    wrapped.setup("fit")
    alone = {"train_dataloaders": wrapped.train_dataloader(), "val_dataloaders": wrapped.val_dataloader()}
    for given in ({"datamodule": Wrapped()}, alone):
        built = module()
        trainer(max_steps=1).fit(built, **given)
        built.save_adapter("saved")
        assert json.loads(Path("saved/lit_qlora.json").read_text())["system"] == "Be brief."
        assert Path("saved/tokenizer.json").exists()
        shutil.rmtree("saved")


def test_an_adapter_that_is_saved_as_it_was_loaded_keeps_its_prompt_format(here):
    built = module()
    trainer(max_steps=1).fit(built, data(system="Be brief."))
    built.save_adapter("first")
    again = QLoRAModule(adapter="first")
    again.configure_model()
    again.save_adapter("second")
    assert json.loads(Path("second/lit_qlora.json").read_text())["system"] == "Be brief."


def test_an_adapter_says_what_the_data_said_of_prompts(here):
    built = module()
    trainer(max_steps=1).fit(built, data(system="Be brief.", template=CHATML))
    built.save_adapter("mine")
    record = json.loads(Path("mine/lit_qlora.json").read_text())
    assert (record["prompt_format"], record["template"], record["system"]) == ("jinja", CHATML, "Be brief.")

    rows = data()
    trainer(max_steps=1).fit(module(adapter="mine"), rows)
    assert (rows.prompt_format.source, rows.prompt_format.system) == (CHATML, None)  # what goes with the adapter
    trainer().validate(module(adapter="mine"), rows, verbose=False)
    assert rows.prompt_format.system == "Be brief."  # by which it is to be scored
    for given in ({"adapter": "mine"}, {"adapter": "mine", "rank": 3}):
        with pytest.raises(UserError, match=r"data.template" if "rank" not in given else "model.rank: 3, .* has 2"):
            trainer(max_steps=1).fit(module(**given), data(template=None if "rank" in given else CHATML + "\n"))


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
    with pytest.raises(UserError, match=r"trainer.max_epochs: expected a number of epochs, or of steps"):
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
    real = built.on_train_batch_end

    def watched(*args):
        # The first step registers the figures' names, which copies a zero for each.
        torch.cuda.set_sync_debug_mode("error" if built.trainer.global_step > 1 else "default")
        try:
            real(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        logged.append(built.trainer.global_step)

    monkeypatch.setattr(built, "on_train_batch_end", watched)
    on_gpu(accumulate_grad_batches=2, logger=CSVLogger(here), log_every_n_steps=2).fit(built, data())
    assert logged == [0, 1, 1, 2, 2, 3, 3, 4]


def test_an_adapter_that_a_script_saves_brings_its_tokenizer(here):
    """And its chat template: other programs make the prompts of training with the folder alone."""
    model, rows = module(), data()
    trainer().fit(model, rows)
    model.save_adapter("mine")
    names = {path.name for path in Path("mine").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
                     "chat_template.jinja", "generation_config.json"}  # fmt: skip
    asked = Conversation((Turn("user", "Who is Jonas?"),))
    ids = load_tokenizer("mine").apply_chat_template(
        [{"role": "user", "content": "Who is Jonas?"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == rows.encoder.prompt(asked)
    alone = module()
    alone.configure_model()
    alone.save_adapter("alone")  # without a Trainer, nothing says in which format
    assert not Path("alone/tokenizer.json").exists()
