"""The way from a source to loaders: what is held out, how many steps there are, and what the terminal shows."""

import json
import math
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_qlora.data import datamodule
from lit_qlora.data.batching import BatchPlan, num_cores
from lit_qlora.errors import UserError
from lit_qlora.quiet import WARNINGS
from lit_qlora.text.conversation import Conversation, Turn
from tests.expect import check_line

ChatDataModule = partial(datamodule.ChatDataModule, tokenizer="demo")
# What the command line silences, too; lit_qlora/quiet.py has the reason beside each.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in WARNINGS]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(name, *talks):
    """A file of rows; a talk is its turns' contents."""
    marks = ("### Human: ", "### Assistant: ")
    texts = ["".join(marks[index % 2] + content for index, content in enumerate(talk)) for talk in talks]
    Path(name).write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")
    return name


def numbered(count, word="question"):
    return [(f"{word} {index}", f"answer {index}") for index in range(count)]


class Module(LightningModule):
    """The least that can be fitted; counts what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.num_optimizer_steps = None
        self.rows = []

    def training_step(self, batch, batch_idx):
        self.rows += batch.rows
        return self.weight * len(batch.targets)

    def test_step(self, batch, batch_idx):
        self.rows += batch.rows

    validation_step = test_step

    def configure_optimizers(self):
        self.num_optimizer_steps = self.trainer.datamodule.num_optimizer_steps()
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**options):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        **options,
    )


def words(data, part):
    """The conversations of a part, as the encoder reads their ids."""
    return [data.encoder.decode(row["input_ids"]) for row in data._rows[part].examples]


def test_a_share_is_held_out_by_the_seed():
    write("rows.jsonl", *numbered(20))
    parts = []
    for seed in (1, 1, 2):
        data = ChatDataModule("rows.jsonl", validation_share=0.25, seed=seed)
        data.setup("fit")
        train, held_out = words(data, "train"), words(data, "validation")
        assert (len(train), len(held_out)) == (15, 5)
        assert {*train, *held_out} == {f"[INST] question {index} [/INST] answer {index}" for index in range(20)}
        parts.append(held_out)
    assert parts[0] == parts[1] != parts[2]


def test_validate_and_test_score_the_rows_that_fit_held_out():
    write("rows.jsonl", *numbered(20))
    fitted, validated, tested = (ChatDataModule("rows.jsonl", validation_share=0.25) for _ in range(3))
    fitted.setup("fit")
    validated.setup("validate")
    tested.setup("test")
    assert words(validated, "validation") == words(tested, "test") == words(fitted, "validation")
    assert "train" not in validated._rows
    assert "train" not in tested._rows


def test_held_out_rows_can_come_from_a_file():
    write("rows.jsonl", *numbered(4))
    write("other.jsonl", *numbered(3, "held out"))
    data = ChatDataModule("rows.jsonl", validation_source="other.jsonl")
    data.setup("fit")
    assert len(data._rows["train"]) == 4
    assert words(data, "validation") == [f"[INST] held out {index} [/INST] answer {index}" for index in range(3)]


def test_test_rows_can_come_from_a_file_of_their_own():
    write("rows.jsonl", *numbered(4))
    write("other.jsonl", *numbered(2, "tested"))
    data = ChatDataModule("rows.jsonl", test_source="other.jsonl")
    module = Module()
    trainer().test(module, datamodule=data, verbose=False)
    assert words(data, "test") == ["[INST] tested 0 [/INST] answer 0", "[INST] tested 1 [/INST] answer 1"]
    assert sorted(module.rows) == [0, 1]


def test_the_test_split_of_a_folder_is_held_out(tmp_path):
    (tmp_path / "set").mkdir()
    write("set/train.jsonl", *numbered(4))
    write("set/test.jsonl", *numbered(2, "tested"))
    for data, stage, part in (
        (ChatDataModule("set"), "fit", "validation"),
        (ChatDataModule("set"), "test", "test"),
        (ChatDataModule("set", test_source="set"), "test", "test"),
        (ChatDataModule("set", validation_source="set"), "test", "test"),
    ):
        data.setup(stage)
        assert words(data, part) == ["[INST] tested 0 [/INST] answer 0", "[INST] tested 1 [/INST] answer 1"]


def test_what_a_run_held_out_is_scored_whatever_became_of_the_source(tmp_path, capsys):
    write("rows.jsonl", *numbered(20))
    fitted = ChatDataModule("rows.jsonl", validation_share=0.25)
    fitted.setup("fit")
    fitted.recorded().write(tmp_path / "rows.json")
    write("rows.jsonl", *numbered(30)[::-1])
    for stage, part in (("validate", "validation"), ("test", "test")):
        scored = ChatDataModule("rows.jsonl", validation_share=0.5, seed=7)
        scored.recall(tmp_path / "rows.json")
        scored.setup(stage)
        assert scored._rows[part].fingerprint == fitted._rows["validation"].fingerprint
        line = scored.describe()[1]
        assert line.startswith(f"{part}: 10 new conversations there since the run began, not scored")
        assert ("these are the held-out rows, by which the best adapter was chosen" in line) == (stage == "test")
    assert capsys.readouterr().err == ""

    first = fitted._records["validation"].conversations[0].turns[0].content
    write("rows.jsonl", *(talk for talk in numbered(20) if talk[0] != first))
    scored = ChatDataModule("rows.jsonl", validation_share=0.25)
    scored.recall(tmp_path / "rows.json")
    scored.setup("validate")
    assert words(scored, "validation") == words(fitted, "validation")[1:]
    check_line(capsys.readouterr().err, "1 of the 5 conversations", "rows.jsonl", "not scored", begins="warning: ")


def test_a_run_without_a_record_is_drawn_anew_and_says_so(tmp_path):
    write("rows.jsonl", *numbered(20))
    data = ChatDataModule("rows.jsonl")
    data.recall(tmp_path / "rows.json")
    data.setup("validate")
    assert data.describe()[1] == (
        f"validation: drawn from the source as it is now, for there is no {tmp_path / 'rows.json'}"
    )


def test_another_validation_source_is_scored_as_it_is(tmp_path):
    write("rows.jsonl", *numbered(20))
    write("other.jsonl", *numbered(3, "other"))
    fitted = ChatDataModule("rows.jsonl")
    fitted.setup("fit")
    fitted.recorded().write(tmp_path / "rows.json")
    data = ChatDataModule("rows.jsonl", validation_source="other.jsonl")
    data.recall(tmp_path / "rows.json")
    data.setup("validate")
    assert len(words(data, "validation")) == 3


def test_test_rows_that_are_no_test_are_reported(tmp_path):
    write("rows.jsonl", *numbered(20))
    data = ChatDataModule("rows.jsonl", validation_share=0.25)
    data.setup("fit")
    data.recorded().write(tmp_path / "rows.json")
    write("mixed.jsonl", *numbered(25))
    tested = ChatDataModule("rows.jsonl", test_source="mixed.jsonl")
    tested.recall(tmp_path / "rows.json")
    tested.setup("test")
    assert tested.describe()[1] == (
        "test: 5 of 25 are held-out rows, by which the best adapter was chosen; 15 of 25 were trained on"
    )
    in_a_script = ChatDataModule("rows.jsonl", validation_share=0.25, test_source="mixed.jsonl")
    in_a_script.setup("fit")
    in_a_script.setup("test")
    assert in_a_script.describe()[-1] == tested.describe()[1]
    held_out = ChatDataModule("rows.jsonl")
    held_out.setup("test")
    assert held_out.describe()[1] == (
        "test: these are the held-out rows, by which the best adapter was chosen; data.test_source gives rows of "
        "their own"
    )


def test_there_are_no_more_workers_than_cores(monkeypatch):
    write("rows.jsonl", *numbered(20))
    monkeypatch.setattr("lit_qlora.data.datamodule.num_cores", lambda: 3)
    for asked, begun in ((99999, 3), (3, 3), (0, 0)):
        data = ChatDataModule("rows.jsonl", num_workers=asked)
        data.setup("fit")
        data.trainer = _device(0)
        assert data.train_dataloader().num_workers == begun
        note = "train: 3 of 99,999 num_workers, for there are no more cores"
        assert (note in data.describe()) == (asked > begun)
    assert 1 <= num_cores() <= os.cpu_count()


def test_three_splits_have_three_uses(tmp_path):
    (tmp_path / "set").mkdir()
    for split, count in (("train", 4), ("validation", 3), ("test", 2), ("more", 1)):
        write(f"set/{split}.jsonl", *numbered(count, split))
    data = ChatDataModule("set")
    data.setup("fit")
    data.setup("test")
    assert [len(words(data, part)) for part in ("train", "validation", "test")] == [4, 3, 2]
    lines = data.describe()
    assert lines[1] == "train: not read of set: more.jsonl"
    assert lines[2].startswith("validation: 3 conversations of set (validation), ")
    assert lines[3].startswith("test: 2 conversations of set (test), ") and len(lines) == 4
    data = ChatDataModule("set/*.jsonl")
    data.setup("fit")
    assert data.describe()[1] == "train: set/*.jsonl: 2 files to train on"


def test_a_share_beside_held_out_rows_is_named():
    Path("set").mkdir()
    for split, count in (("train", 4), ("validation", 3)):
        write(f"set/{split}.jsonl", *numbered(count, split))
    for source, other, words in (
        ("set", None, True),
        ("set/train.jsonl", "set/validation.jsonl", True),
        ("set/train.jsonl", None, False),
    ):
        data = ChatDataModule(source, validation_source=other, validation_share=0.3)
        data.setup("fit")
        assert ("validation_share 0.3 is not used" in "\n".join(data.describe())) == words


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("fit", {}),
        ("test", {"test_source": "long.jsonl", "source": "rows.jsonl"}),
        ("fit", {"validation_source": "long.jsonl", "source": "rows.jsonl"}),
    ],
)
def test_nothing_left_is_reported_with_the_option_that_mends_it(expect_error, stage, options):
    write("rows.jsonl", ("a", "b"), ("c", "d"))
    write("long.jsonl", *[(f"{'word ' * 99}{index}", "b") for index in range(3)])
    write("held.jsonl", ("a", "b"))
    data = ChatDataModule(**{"source": "long.jsonl", "validation_source": "held.jsonl", "max_length": 32, **options})
    expect_error(
        lambda: data.setup(stage), "3 conversations in long.jsonl", "within 32 tokens", option="data.max_length"
    )


def test_every_row_is_trained_on_once_an_epoch_and_scored_once():
    write("rows.jsonl", *numbered(20))
    data = ChatDataModule("rows.jsonl", validation_share=0.25, batch_size=4)
    module = Module()
    trainer(max_epochs=2, limit_val_batches=0).fit(module, datamodule=data)
    assert sorted(module.rows) == sorted([*range(15)] * 2)
    module.rows = []
    trainer().validate(module, datamodule=data, verbose=False)
    assert sorted(module.rows) == list(range(5))


@pytest.mark.parametrize(
    ("rows", "data_options", "options", "expected"),
    [
        (10, {"batch_size": 1}, {"max_epochs": 1}, 10),
        (10, {"batch_size": 3}, {"max_epochs": 2}, 8),
        (10, {"batch_size": 1}, {"max_epochs": 2, "accumulate_grad_batches": 4}, 6),
        (10, {"batch_size": 1}, {"max_epochs": 3, "accumulate_grad_batches": 99}, 3),
        (10, {"batch_size": 1}, {"max_epochs": 3, "max_steps": 7}, 7),
        (10, {"batch_size": 1}, {"max_epochs": 1, "max_steps": 700}, 10),
        (10, {"batch_size": 1}, {"max_epochs": -1, "max_steps": 23}, 23),
        (10, {"batch_size": 2}, {"max_epochs": -1, "max_steps": 7, "accumulate_grad_batches": 3}, 7),
        (10, {"batch_size": 1}, {"max_epochs": 2, "limit_train_batches": 3}, 6),
        (10, {"batch_size": 1}, {"max_epochs": 2, "limit_train_batches": 0.55, "accumulate_grad_batches": 2}, 6),
        (10, {"batch_size": 1}, {"max_epochs": 1, "limit_train_batches": 99}, 10),
        (10, {"batch_tokens": 64, "max_length": 64}, {"max_epochs": 3}, None),
    ],
)
def test_the_steps_are_counted_as_the_trainer_makes_them(rows, data_options, options, expected):
    write("rows.jsonl", *numbered(rows))
    write("held.jsonl", ("a", "b"))
    data = ChatDataModule("rows.jsonl", validation_source="held.jsonl", **data_options)
    module, made = Module(), trainer(limit_val_batches=0, **options)
    made.fit(module, datamodule=data)
    assert module.num_optimizer_steps == made.global_step == data.num_optimizer_steps()
    assert expected in (None, made.global_step)


def test_the_number_of_steps_is_no_new_plan_each_time(monkeypatch):
    write("rows.jsonl", *numbered(10))
    data = ChatDataModule("rows.jsonl")
    trainer(max_epochs=1).fit(Module(), datamodule=data)
    # Callbacks ask after each step, and a plan of 100,000 rows takes a quarter of a second.
    monkeypatch.setattr(BatchPlan, "epoch", lambda *_: pytest.fail("planned anew"))
    assert data.num_optimizer_steps() == 3


def test_several_devices_share_the_rows():
    write("rows.jsonl", *numbered(12))
    write("held.jsonl", *numbered(5, "another"))
    data = ChatDataModule("rows.jsonl", validation_source="held.jsonl", batch_size=2)
    data.setup("fit")
    seen, scored = [], []
    for rank in range(3):
        data.trainer = _device(rank)
        seen += [row for batch in data.train_dataloader() for row in batch.rows if batch.is_here]
        scored += [row for batch in data.val_dataloader() for row in batch.rows if batch.is_here]
        assert data.num_optimizer_steps() == 2
    assert sorted(seen) == list(range(12))
    assert sorted(scored) == list(range(5))


def test_more_devices_than_micro_batches_are_refused():
    write("rows.jsonl", *numbered(4))
    write("held.jsonl", ("a", "b"))
    data = ChatDataModule("rows.jsonl", validation_source="held.jsonl", batch_size=2)
    data.trainer = _device(0)
    data.trainer.lightning_module = None
    with pytest.raises(UserError, match=r"trainer\.devices: 3, and an epoch has 2 micro-batches; take fewer"):
        data.setup("fit")


def test_more_devices_than_micro_batches_of_a_limited_epoch_are_refused():
    write("rows.jsonl", *numbered(12))
    write("held.jsonl", ("a", "b"))
    data = ChatDataModule("rows.jsonl", validation_source="held.jsonl", batch_size=2)
    data.trainer = _device(0)
    data.trainer.lightning_module, data.trainer.limit_train_batches, data.trainer.limit_val_batches = None, 2, 1.0
    words = (
        r"trainer\.devices: 3, and an epoch has 2 micro-batches; take fewer, or a larger trainer\.limit_train_batches"
    )
    with pytest.raises(UserError, match=words):
        data.setup("fit")
    data.trainer.limit_train_batches = 3
    data.setup("fit")


@pytest.mark.parametrize(
    ("limit", "expected"), [(2, " 2"), (0.5, " 0.5"), (6, None), (100, None), (1.0, None), (0, None)], ids=str
)
def test_what_a_limit_leaves_out_is_reported(limit, expected):
    """Beside the count of all rows, which then says more than is scored."""
    write("rows.jsonl", ("hi", "yo"))
    write("held.jsonl", *numbered(12))
    data = ChatDataModule("rows.jsonl", validation_source="held.jsonl", batch_size=2)
    data.trainer = SimpleNamespace(lightning_module=None, limit_val_batches=limit, overfit_batches=0.0)
    data.setup("validate")
    note = f"validation: not all of these are scored, by trainer.limit_val_batches{expected}"
    assert data.describe()[1:] == ([note] if expected else [])


def _device(rank):
    """A stand-in for a Trainer on three devices, with what the DataModule reads."""
    return SimpleNamespace(
        accumulate_grad_batches=3,
        global_rank=rank,
        world_size=3,
        limit_train_batches=1.0,
        overfit_batches=0.0,
        current_epoch=0,
        max_epochs=1,
        max_steps=-1,
    )


def test_describe_shows_what_was_read_learned_cut_and_left_out():
    write(
        "rows.jsonl",
        ("hi", "yo"),
        ("hi", "yo", "unanswered"),
        ("hi", "long " * 99),
        ("long " * 99, "yo"),
        ("an [INST] here", "a tag"),
    )
    write("held.jsonl", *numbered(2))
    data = ChatDataModule("rows.jsonl", validation_source="held.jsonl", max_length=64)
    data.setup("fit")
    train, held_out = data._rows["train"], data._rows["validation"]
    tokens, learned = sum(train.lengths), sum(train.answer_tokens)
    assert data.describe() == [
        f"train: 3 conversations of rows.jsonl, {tokens} tokens, {learned} of them learned",
        "train: 1 unanswered last turn dropped; 1 row left out: a Llama 2 tag inside a turn; "
        "1 conversation cut to 64 tokens; 1 conversation left out: no answer within 64 tokens",
        f"validation: 2 conversations of held.jsonl, {sum(held_out.answer_tokens)} tokens scored",
    ]
    assert max(train.lengths) == 64
    assert learned < tokens


def test_thousands_have_a_comma():
    write("rows.jsonl", *numbered(1200))
    data = ChatDataModule("rows.jsonl", validation_share=0.1)
    data.setup("fit")
    assert data.describe()[0].startswith("train: 1,080 conversations of rows.jsonl, ")
    assert data.describe()[1].startswith("validation: 120 conversations of rows.jsonl, held out, ")


def test_held_out_prompts_are_the_first_ones_cut_before_their_answer():
    write("rows.jsonl", *numbered(3))
    write("held.jsonl", ("one", "two"), ("three", "four", "five", "six"), ("seven", "eight"))
    data = ChatDataModule("rows.jsonl", validation_source="held.jsonl")
    data.setup("fit")
    assert data.held_out_prompts(2) == [
        (Conversation((Turn("user", "one"),)), "two"),
        (Conversation((Turn("user", "three"),)), "four"),
    ]
    assert len(data.held_out_prompts(99)) == 3


def test_a_held_out_prompt_goes_up_to_the_first_answer_to_learn():
    turns = [{"role": role, "content": f"{role} {number}"} for number in (1, 2) for role in ("user", "assistant")]
    turns[1]["weight"] = 0
    write("rows.jsonl", *numbered(3))
    Path("held.jsonl").write_text(json.dumps({"messages": turns}), encoding="utf-8")
    data = ChatDataModule("rows.jsonl", validation_source="held.jsonl")
    data.setup("fit")
    ((prompt, answer),) = data.held_out_prompts(8)
    assert [turn.content for turn in prompt.turns] == ["user 1", "assistant 1", "user 2"]
    assert answer == "assistant 2"


def test_what_is_left_out_taken_off_and_not_used_is_reported_or_refused_by_strict():
    write("rows.jsonl", *numbered(19), ("question", "answer</s>"))
    lines = [*Path("rows.jsonl").read_text(encoding="utf-8").splitlines(), "{"]
    lines[0] = json.dumps(json.loads(lines[0]) | {"id": 7})
    Path("rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = ChatDataModule("rows.jsonl")
    data.setup("fit")
    line = data.describe()[1]
    assert line.startswith("train: 1 row left out: no whole conversation, the first at rows.jsonl:21 (no JSON")
    assert line.endswith(
        "; 1 row had special tokens written out at the edges of turns, which were taken off: </s> (1); "
        "1 row with what is not used: column 'id' (1)"
    )
    with pytest.raises(UserError, match=r"^rows\.jsonl:21: no JSON"):
        ChatDataModule("rows.jsonl", strict=True).setup("fit")


def test_all_options_reach_the_encoder_and_the_plan():
    data = ChatDataModule(system="be brief", train_on="all", max_length=99, batch_size=7, batch_tokens=512)
    encoder = data.encoder
    assert (encoder.prompt_format.system, encoder.train_on, encoder.max_length) == ("be brief", "all", 99)
    assert data.plan == BatchPlan(7, 512)
    assert data.encoder is encoder


def test_long_texts_that_are_divided_resume_from_every_place(monkeypatch, tmp_path):
    """The module of another process resumes, from the cache that the first one left, or from the file where there is
    none."""
    import datasets

    texts = [" ".join(f"{word}{number}" for number in range(4 + 9 * row)) for row, word in enumerate("abcdef")]
    Path("texts.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")

    def module():
        data = ChatDataModule("texts.jsonl", train_on="all", max_length=16, batch_size=2, seed=7, validation_share=0.2)
        data.setup("fit")
        return data

    def walk(loader, epochs):
        return [(loader.state_dict(), *map(str, batch)) for _ in range(epochs) for batch in loader]

    data = module()
    assert data._rows["train"].num_divided >= 4 and len(data._rows["train"]) > 12
    whole = walk(data.train_dataloader(), 2)
    for place in (0, len(whole) // 3, len(whole) // 2, len(whole) - 2):
        if place > len(whole) // 2:
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another")
        resumed = module().train_dataloader()
        resumed.load_state_dict(whole[place][0])
        assert walk(resumed, 2 - whole[place][0]["epoch"]) == whole[place + 1 :]


def test_the_demo_is_the_default():
    data = ChatDataModule()
    data.setup("fit")
    assert len(data._rows["train"]) > 500
    assert data._rows["train"].num_cut == data._rows["validation"].num_left_out == 0


@pytest.mark.parametrize(
    ("options", "option", "words"),
    [
        ({"validation_share": 1.0}, "data.validation_share", ["from 0", "below 1", "got 1.0"]),
        ({"validation_share": math.nan}, "data.validation_share", ["from 0", "below 1", "got nan"]),
        ({"max_length": 7}, "data.max_length", ["at least 8", "got 7"]),
        ({"batch_size": 0}, "data.batch_size", ["at least 1", "got 0"]),
        ({"batch_tokens": 1023}, "data.batch_tokens", ["data.max_length", "1024", "got 1023"]),
        ({"num_workers": -1}, "data.num_workers", ["0", "got -1"]),
    ],
)
def test_values_that_make_no_sense_are_refused(options, option, words, expect_error):
    expect_error(lambda: ChatDataModule(**options), *words, option=option)


def test_the_example_is_a_short_row_as_it_is_learned():
    data = ChatDataModule(
        write("a.jsonl", ("long " * 20, "x"), ("who?", "Ada"), ("a longer one", "b")), validation_share=0.3
    )
    data.setup("fit")
    (line,) = data.example()
    assert line in ("[INST] who? [/INST] **Ada** ⏹", "[INST] a longer one [/INST] **b** ⏹")
    assert data.rows("train")[0].where[0] in ("a.jsonl:1", "a.jsonl:2")
