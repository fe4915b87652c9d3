"""The run that a command is for: by its name, or, without one, by its settings."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lit_qlora import demo, start
from lit_qlora.cli import main
from lit_qlora.command import complete
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.data.run_rows import RunRows
from lit_qlora.errors import UserError
from lit_qlora.model.base import find_base
from lit_qlora.model.fingerprint import fingerprint
from lit_qlora.storage.config_file import as_yaml
from lit_qlora.storage.run import RunFolder, unnamed_run

DEMO = find_base("demo")
CONFIG: dict[str, Any] = {
    "model": {"base": "demo", "rank": 16},
    "trainer": {"precision": "auto", "accelerator": "cpu", "max_steps": -1, "max_epochs": 3},
}


def mark(step: int) -> str:
    """What a run with `CONFIG` leaves that has finished after ``step`` steps."""
    return json.dumps({"step": step, "steps": step, "lengths": start.lengths(CONFIG)})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(**values: Any) -> dict[str, Any]:
    """`CONFIG` with other values, by dotted names with __."""
    config = {section: {**options} for section, options in CONFIG.items()}
    for name, value in values.items():
        section, _, option = name.partition("__")
        config[section][option] = value
    return config


def begun(path: str, config: Mapping[str, Any] = CONFIG) -> RunFolder:
    run = RunFolder(Path(path))
    run.path.mkdir(parents=True)
    run.config.write_text(as_yaml(config))
    run.metrics.touch()
    return run


def chosen(config: Mapping[str, Any], *, mirror: str | None = None, source: str = "demo") -> str:
    default = RunFolder(Path("runs/demo"))
    found = start.choose_run(
        default, Path(mirror) if mirror else None, config, DEMO, ChatDataModule(source, tokenizer=demo.BASE)
    )
    return found.path.as_posix()


def test_each_settings_have_a_run_of_their_own_and_come_back_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    rank_8, rank_4 = changed(model__rank=8), changed(model__rank=4)
    assert chosen(CONFIG) == "runs/demo"
    begun("runs/demo")
    assert chosen(CONFIG) == "runs/demo"
    assert capsys.readouterr().out == ""
    assert chosen(rank_8) == "runs/demo-2"
    assert capsys.readouterr().out == ("   run  runs/demo differs: model.rank: 16 -> 8; this one is runs/demo-2\n")
    begun("runs/demo-2", rank_8)
    assert chosen(rank_4) == "runs/demo-3"
    begun("runs/demo-3", rank_4)
    assert [chosen(config) for config in (CONFIG, rank_8, rank_4)] == ["runs/demo", "runs/demo-2", "runs/demo-3"]


def write_rows(count: int) -> None:
    rows = ({"prompt": f"Who is {number}?", "response": f"It is {number}."} for number in range(count))
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def finished(path: str, source: str) -> RunFolder:
    run = begun(path)
    data = ChatDataModule(source, tokenizer=demo.BASE)
    train, held_out = (records.conversations for records in data.parts().train_and_held_out())
    RunRows.of(train, held_out, None).write(run.rows)
    run.finished_mark.write_text(mark(3))
    return run


def test_a_finished_run_whose_rows_changed_is_another_one(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(8)
    run = finished("runs/demo", "mine.jsonl")
    assert chosen(CONFIG, source="mine.jsonl") == "runs/demo"
    with pytest.raises(SystemExit, match="0"):
        start.check_against_first(run, CONFIG, DEMO, ChatDataModule("mine.jsonl", tokenizer=demo.BASE))
    write_rows(11)
    capsys.readouterr()
    assert chosen(CONFIG, source="mine.jsonl") == "runs/demo-2"
    assert capsys.readouterr().out.startswith("   run  runs/demo differs: to learn: ")
    with pytest.raises(UserError) as refused:
        start.check_against_first(run, CONFIG, DEMO, ChatDataModule("mine.jsonl", tokenizer=demo.BASE))
    assert refused.value.option == "data.source"
    assert "new conversations" in str(refused.value)
    assert "--run NAME" in str(refused.value)
    Path("mine.jsonl").unlink()  # no reason to say anything about what is finished
    assert chosen(CONFIG, source="mine.jsonl") == "runs/demo"


def test_the_same_rows_elsewhere_are_the_same_run() -> None:
    write_rows(8)
    here, there = (CONFIG | {"data": {"source": source}} for source in ("mine.jsonl", "there/mine.jsonl"))
    run = finished("runs/demo", "mine.jsonl")
    run.config.write_text(as_yaml(here))
    Path("there").mkdir()
    Path("mine.jsonl").replace("there/mine.jsonl")
    assert chosen(there, source="there/mine.jsonl") == "runs/demo"
    write_rows(9)
    Path("mine.jsonl").replace("there/mine.jsonl")
    assert chosen(there, source="there/mine.jsonl") == "runs/demo-2"
    run.rows.unlink()  # unknown
    assert chosen(there, source="there/mine.jsonl") == "runs/demo-2"


def test_rows_in_another_order_are_no_other_rows() -> None:
    write_rows(2)
    Path("held.jsonl").write_text('{"prompt": "Who?", "response": "I."}\n')
    begun("runs/demo").finished_mark.write_text(mark(3))
    data = ChatDataModule("mine.jsonl", tokenizer=demo.BASE, validation_source="held.jsonl")
    train, held_out = (records.conversations for records in data.parts().train_and_held_out())
    RunRows.of(reversed(train), held_out, "held.jsonl").write(RunFolder(Path("runs/demo")).rows)
    assert data.changed_since(RunFolder(Path("runs/demo")).rows) == []


def test_a_setting_that_may_change_makes_no_other_run() -> None:
    begun("runs/demo", changed(model__rank=8))
    begun("runs/demo-2")
    assert chosen(changed(trainer__max_epochs=4)) == "runs/demo-2"


def test_the_mirror_has_runs_too_where_this_machine_lost_them() -> None:
    begun("drive/demo", changed(model__rank=8))
    assert chosen(CONFIG, mirror="drive") == "runs/demo-2"
    begun("drive/demo-2")
    assert chosen(CONFIG, mirror="drive") == "runs/demo-2"
    assert chosen(changed(model__rank=8), mirror="drive") == "runs/demo"
    begun("runs/demo")  # what is here decides, where there is something
    assert chosen(CONFIG, mirror="drive") == "runs/demo"


@pytest.mark.parametrize(
    ("record", "config", "expected"),
    [
        ({}, changed(model__base="other"), "runs/demo-2"),  # nothing says what base it was
        ({"base": fingerprint(DEMO)}, changed(model__base="copy"), "runs/demo"),
        ({"base": "v2-full-0-0"}, changed(model__base="other"), "runs/demo-2"),
        ({"base": "v2", "adapter": sha256(b"start").hexdigest()}, changed(model__adapter="start"), "runs/demo"),
        ({"base": "v2", "adapter": None}, changed(model__adapter="start"), "runs/demo-2"),
        ({}, changed(model__adapter="start"), "runs/demo-2"),
        ({"precision": "32-true"}, changed(trainer__precision="32-true"), "runs/demo"),
        ({"precision": "bf16-mixed"}, changed(trainer__precision="32-true"), "runs/demo-2"),
        ({"steps": 9, "settings": CONFIG}, changed(trainer__max_steps=8), "runs/demo-2"),
        ({"steps": 9, "settings": CONFIG}, changed(trainer__max_steps=10), "runs/demo"),
        ({"steps": 9, "settings": CONFIG}, changed(trainer__max_epochs=2), "runs/demo-2"),
    ],
)
def test_what_the_checkpoint_would_refuse_makes_another_run(
    monkeypatch: pytest.MonkeyPatch, record: dict[str, Any], config: dict[str, Any], expected: str
) -> None:
    begun("runs/demo")
    Path("start").mkdir()
    Path("start", "adapter_model.safetensors").write_bytes(b"start")
    monkeypatch.setattr(start, "_newest_record", lambda _: record)
    assert chosen(config) == expected


def test_a_finished_run_is_not_made_shorter_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    begun("runs/demo").finished_mark.write_text(mark(9))
    monkeypatch.setattr(start, "_newest_record", lambda _: {"steps": 9, "settings": CONFIG})
    assert chosen(changed(trainer__max_steps=8)) == "runs/demo"


def test_rows_that_are_not_there_are_reported_before_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    run = begun("runs/demo")
    for option in ("source", "validation_source", "test_source"):
        wrong = changed(model__rank=8) | {"data": {option: "nope.jsonl"}}
        with pytest.raises(UserError, match=r"nope\.jsonl: no such file"):
            chosen(wrong)
        with pytest.raises(UserError, match=r"nope\.jsonl: no such file"):
            start.check_against_first(run, wrong, DEMO, ChatDataModule())
    with pytest.raises(UserError, match=r"model\.rank: 16 -> 8; give --run NAME"):  # the hub is not asked
        start.check_against_first(
            run, changed(model__rank=8) | {"data": {"source": "owner/name"}}, DEMO, ChatDataModule()
        )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("config", "base", "expected"),
    [(None, "owner/Llama-2", "Llama-2"), (["a.yaml", "b/mine.yaml"], "demo", "mine"), (None, "/", "run")],
)
def test_without_a_name_a_run_is_called_after_its_last_config_or_its_base(
    config: list[str] | None, base: str, expected: str
) -> None:
    assert unnamed_run(config[-1] if config else None, base) == Path("runs", expected)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--run", "mine"], "runs/mine"),
        (["--run=mine"], "runs/mine"),
        (["--run", "./mine"], "mine"),
        (["--run", "other/mine"], "other/mine"),
        (["--config", "a.yaml"], "runs/of-a"),
        (["--config=a.yaml"], "runs/of-a"),
        (["--config", "a.yaml", "--config", "b.yaml"], "of-b"),
        (["--config", "a.yaml", "--run", "mine"], "runs/mine"),
        (["--config", "c.yaml"], None),
    ],
)
def test_where_a_named_run_lies(args: list[str], expected: str | None) -> None:
    for name, text in (("a", "run: of-a\n"), ("b", "run: ./of-b\n"), ("c", "seed_everything: 1\n")):
        Path(f"{name}.yaml").write_text(text)
    *_, name, value = complete(["fit", *args]).args
    assert (value if name == "--run" else None) == expected


@pytest.mark.parametrize(
    "args",
    [
        ["chat", "--prompt", "x"],
        ["predict", "--prompts", "x.txt", "--output", "out.jsonl"],
        ["merge", "--output", "out"],
        ["export", "--to", "gguf", "--output", "out.gguf"],
        ["evaluate"],
        ["push", "--to", "me/mine"],
        ["validate"],
        ["test"],
    ],
    ids=lambda args: args[0],
)
def test_every_verb_takes_the_name(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.txt").write_text("hello\n")
    assert main([*args, "--run", "mine"]) == 2
    assert "error: run: runs/mine is no run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "remedy"), [("config.json", "it is a whole model"), ("adapter/adapter_config.json", "mean that/adapter")]
)
def test_what_is_scored_is_an_adapter_or_a_checkpoint(here, file, remedy, expect_error):
    path = here / "that" / file
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    expect_error(lambda: start.what_to_score(RunFolder(here / "run"), "that"), "no adapter", remedy, option="ckpt_path")


def test_a_score_reports_what_has_no_effect_on_it(capsys):
    run = begun("run")
    start.check_score_settings(run, changed(trainer__precision="32-true"))
    assert not capsys.readouterr().out
    start.check_score_settings(run, changed(model__rank=4, trainer__precision="32-true") | {"max_time": "00:01:00:00"})
    found = capsys.readouterr().out
    assert found == "   run  without effect on a score: max_time: None -> 00:01:00:00; model.rank: 16 -> 4\n"


def test_a_score_refuses_an_adapter_to_start_from(expect_error):
    config = changed(model__adapter="other")
    expect_error(
        lambda: start.check_score_settings(begun("run"), config), "other", "--ckpt_path other", option="model.adapter"
    )
    start.check_score_settings(begun("another", config), config)
    start.check_score_settings(RunFolder(Path("nowhere")), config)
