"""A run or an adapter from a stranger: whatever stands in its files ends in one line, and nothing of it is run."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from lit_qlora.cli import main
from lit_qlora.model import load

DEEP = '{"a": ' + 200_000 * "["
VERBS = {
    "validate": ["validate", "--run", "run"],
    "test": ["test", "--run", "run", "--ckpt_path", "run/adapter"],
    "fit": ["fit", "--run", "new", "--model.adapter", "run/adapter"],
    "chat": ["chat", "--run", "run", "--prompt", "x"],
    "chat --adapter": ["chat", "--adapter", "run/adapter", "--prompt", "x"],
    "predict": ["predict", "--run", "run", "--prompts", "x.txt", "--output", "y.jsonl"],
    "evaluate": ["evaluate", "--run", "run"],
    "merge": ["merge", "--run", "run", "--output", "merged"],
    "plan": ["plan", "--model.adapter", "run/adapter"],
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path) -> Path:
    """A trained run that can be altered, where no weight may be loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(load, "load_base", lambda *_: pytest.fail("a model was loaded"))
    shutil.copytree(trained, "run")
    (Path("run") / "adapter" / "manifest.json").unlink()
    Path("x.txt").write_text("x\n")
    Path("run/payload.py").write_text("raise AssertionError('it ran')\n")
    return Path("run")


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _error(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(VERBS[verb]) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), len(error) < 500) == (1, True)
    assert "run.payload" not in sys.modules
    return error


@pytest.mark.parametrize(
    ("verb", "name"),
    [*((verb, "adapter_config.json") for verb in VERBS), ("chat", "lit_qlora.json"), ("chat", "manifest.json"),
     ("fit", "lit_qlora.json"), ("fit", "manifest.json"), ("merge", "lit_qlora.json")],
)  # fmt: skip
def test_json_nested_without_end(run: Path, capsys: pytest.CaptureFixture[str], name: str, verb: str) -> None:
    (run / "adapter" / name).write_text(DEEP)
    assert "nested too deep" in _error(verb, capsys)


@pytest.mark.parametrize("verb", ["validate", "chat", "predict", "evaluate", "merge"])
def test_yaml_nested_without_end(run: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    (run / "config.yaml").write_text("a: " + 200_000 * "[")
    assert "run/config.yaml" in _error(verb, capsys)


@pytest.mark.parametrize("verb", ["validate", "fit", "chat", "merge"])
def test_a_module_named_in_an_adapter(run: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    _change(run / "adapter/adapter_config.json", megatron_config={"a": 1}, megatron_core="run.payload")
    assert "megatron_config" in _error(verb, capsys)


@pytest.mark.parametrize(
    ("name", "value"), [*((name, 3) for name in load.TEXTS), ("base", ["x"]), ("base", {"x": 1}), ("base", True)]
)
def test_what_is_no_text_in_a_record(run: Path, capsys: pytest.CaptureFixture[str], name: str, value: object) -> None:
    _change(run / "adapter/lit_qlora.json", **{name: value})
    assert _error("chat", capsys) == f"error: run/adapter: lit_qlora.json: {name}: expected a text, got {value!r}\n"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("model.base: 3", "model.base: expected a text, got 3"),
        ("model.base: [demo]", "model.base: expected a text, got ['demo']"),
        ("x: 1", "model.base: expected a text, got None"),
        ("model: 3\nmodel.base: demo", "is damaged (model is a section, and an option)"),
        ("model.base: demo\ndata: 3", "data: expected options below it, got 3"),
        ("model.base: demo\ndata.system: {x: 1}", "data.system: expected a text, got {'x': 1}"),
        ("model.base: demo\nmodel.quantized_cache: 3", "model.quantized_cache: expected a text, got 3"),
    ],
)
def test_settings_of_another_kind(run: Path, capsys: pytest.CaptureFixture[str], line: str, told: str) -> None:
    (run / "config.yaml").write_text(line)
    assert told in _error("chat", capsys)


@pytest.mark.parametrize("verb", ["evaluate", "merge"])
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("data.max_length: much", "data.max_length: expected int, got much"),
        ("data.nope: 3", "unknown option 'data.nope'"),
        ("data.template: {x: 1}", "data.template: expected str, none; got {'x': 1}"),
        ("data.validation_share: x", "data.validation_share: expected float, got x"),
        ("data.form: [messages]", "data.form: expected one of "),
        ("seed_everything: x", "seed_everything: expected a whole number, got 'x'"),
    ],
)
def test_settings_of_another_type(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, told: str, verb: str
) -> None:
    (run / "config.yaml").write_text(f"model.base: demo\n{line}\n")
    assert told in _error(verb, capsys)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("model.attention: 3", "model.attention: expected one of 'sdpa', 'eager', 'flash_attention_2', got 3"),
        ("model.compile: [x]", "model.compile: expected bool, 'auto'; got ['x']"),
        ("model.class_path: run.payload.X", "unknown option 'model.class_path'"),
        ("trainer.precision: {class_path: run.payload.X}", "precision: expected one that fit takes, got {'class_path'"),
        ("trainer.precision: 64-true", "precision: expected one that fit takes, got '64-true'"),
    ],
)
def test_settings_that_evaluate_takes(run: Path, capsys: pytest.CaptureFixture[str], line: str, told: str) -> None:
    (run / "config.yaml").write_text(f"model.base: demo\n{line}\n")
    assert told in _error("evaluate", capsys)


def test_options_written_with_dots(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "config.yaml").write_text("model.base: demo\ndata.system: Be brief.\n")
    from lit_qlora.tools.answering.answerer import choose_adapter

    chosen = choose_adapter("run")
    assert chosen.base.name == "demo" and chosen.settings["data"]["system"] == "Be brief."
