"""Checkpoints of Lightning's own ModelCheckpoint: a fit resumes from them, and a module is loaded, to the last bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_qlora import QLoRAModule, demo
from lit_qlora.cli import main
from lit_qlora.errors import UserError
from lit_qlora.figures.lines import read_lines
from lit_qlora.quiet import quieten
from tests.script.parts import CHATML, data, module, trainer


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
        (_cut, "cut short"),
        (lambda file: file.write_bytes(b""), "cut short, damaged or of another kind"),
        (lambda file: torch.save({"state_dict": {}}, file), "pytorch-lightning_version"),
    ],
)
def test_what_is_no_checkpoint_is_reported_in_one_line(straight, here, alter, words, expect_error):
    (checkpoint,) = straight[1].glob("*step=4.ckpt")
    file = here / "altered.ckpt"
    shutil.copy(checkpoint, file)
    alter(file)
    expect_error(lambda: QLoRAModule.load_from_checkpoint(file), "altered.ckpt", words, option="ckpt_path")


@pytest.mark.parametrize("part", [{}, {"base_fingerprint": 3, "prompts": {}}])
def test_a_checkpoint_whose_record_was_altered_is_reported(straight, here, part, expect_error):
    (checkpoint,) = straight[1].glob("*step=4.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"lit_qlora": part}, here / "altered.ckpt")
    expect_error(lambda: QLoRAModule.load_from_checkpoint(here / "altered.ckpt"), "altered", option="ckpt_path")


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
    ({}, {"validation_share": 0.2, "source": "rows.jsonl", "seed": 5}, {}, "data.seed", "42"),
    ({}, {}, {"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches", "1"),
]


@pytest.mark.parametrize(("of_module", "of_data", "of_trainer", "option", "was"), CHANGED)
def test_a_fit_resumes_with_what_its_checkpoint_decides(
    straight, here, of_module, of_data, of_trainer, option, was, expect_error
):
    """Lightning would restore them from the checkpoint over what was given, or resume at another place in the rows."""
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
