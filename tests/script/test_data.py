"""What a script gives to be learned: loaders and data modules of its own, and what an adapter records of them."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader

from lit_qlora import ChatDataModule, QLoRAModule, demo
from lit_qlora.data.batching import collate
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.errors import UserError
from lit_qlora.text.conversation import Conversation, Turn
from tests.script.parts import CHATML, data, module, trainer


def micro_batches(count):
    rows = data(tokenizer="demo")
    rows.setup("fit")
    encoded = rows._rows["train"]
    return [
        collate([(row, encoded.examples[row]) for row in (two, two + 1)], sum(encoded.answer_tokens[two : two + 2]))
        for two in range(0, 2 * count, 2)
    ]


class WithPlainLoader(ChatDataModule):
    """A DataModule whose loader is PyTorch's own."""

    def train_dataloader(self):
        return DataLoader([*super().train_dataloader()][:3], batch_size=None)


def test_a_datamodule_may_have_a_plain_loader():
    lightning = trainer(max_steps=-1, max_epochs=1, val_check_interval=3)
    with warnings.catch_warnings(action="ignore"):  # Lightning's, of few workers
        lightning.fit(module(), WithPlainLoader(max_length=96))
    assert lightning.global_step == 3


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


def test_a_script_is_shown_what_became_of_its_rows_once(here, caplog):
    answered = '{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "Yes."}]}\n'
    unanswered = '{"messages": [{"role": "user", "content": "And?"}]}\n'
    Path("mine.jsonl").write_text("".join(answered % number for number in range(8)) + unanswered)
    built, rows, made = module(), data(source="mine.jsonl", validation_share=0.25), trainer()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        made.fit(built, rows)
        made.validate(built, rows, verbose=False)
        made.test(built, rows, verbose=False)
    lines = [record.message for record in caplog.records]
    assert sum(line == "train: 1 row left out: nothing answered" for line in lines) == 1
    assert sum(line.startswith("train: 6 conversations") for line in lines) == 1
    assert sum(line.startswith("test: these are the held-out rows, by which") for line in lines) == 1


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
    with pytest.raises(UserError, match=r"data.tokenizer: expected the hub id or folder "):
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


@pytest.mark.parametrize("num_seen", [1, 3, 400])
def test_a_look_at_batches_takes_none_from_the_fit_after_it(num_seen):
    """The first epoch lacked what had been looked at, and its steps began in the middle of others."""
    seen = []

    class See(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch.input_ids)

    rows = data(tokenizer="demo")
    rows.setup("fit")
    loader = rows.train_dataloader()
    wanted = [batch.input_ids for batch in rows.train_dataloader()][:2]
    for _, _ in zip(range(num_seen), loader, strict=False):
        pass
    trainer(callbacks=[See()]).fit(module(), loader, rows.val_dataloader())
    assert [batch.tolist() for batch in seen] == [batch.tolist() for batch in wanted]


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
    """The Trainer's own loaders say so, and those from a DataModule of one's own."""
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


def test_an_adapter_that_a_script_saves_brings_its_tokenizer(here):
    """The tokenizer brings its chat template: other programs make the prompts of training with the folder alone."""
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
