"""A run or an adapter from a stranger: whatever stands in its files ends in one line, and nothing of it is run."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from lit_qlora import demo
from lit_qlora.cli import main
from lit_qlora.model import load, lora
from lit_qlora.model.copies import Copies
from lit_qlora.tools import export

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
    "inspect": ["inspect", "--model.adapter", "run/adapter"],
    "export": ["export", "--run", "run", "--output", "model.gguf"],
    "export --model": ["export", "--model", "theirs", "--output", "model.gguf"],
    "push": ["push", "--run", "run", "--to", "me/adapter", "--yes"],
    "push --folder": ["push", "--folder", "theirs", "--to", "me/model", "--yes"],
}
OF_A_RUN = [verb for verb in VERBS if verb not in ("export --model", "push", "push --folder")]
"""Verbs that read a run or an adapter of it; push sends the files, and reads the manifest alone."""


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
    # export asks for both before it reads anything.
    monkeypatch.setattr(export, "_check_tokenizer", lambda _: None)
    Path(export.SCRIPT).write_text("raise AssertionError('it ran')\n")
    monkeypatch.setenv("LLAMA_CPP", export.SCRIPT)
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
    [*((verb, "adapter_config.json") for verb in OF_A_RUN), ("chat", "lit_qlora.json"), ("chat", "manifest.json"),
     ("fit", "lit_qlora.json"), ("fit", "manifest.json"), ("merge", "lit_qlora.json")],
)  # fmt: skip
def test_json_nested_without_end(run: Path, capsys: pytest.CaptureFixture[str], name: str, verb: str) -> None:
    (run / "adapter" / name).write_text(DEEP)
    assert "nested too deep" in _error(verb, capsys)


@pytest.mark.parametrize("verb", ["validate", "chat", "predict", "evaluate", "merge", "export"])
def test_yaml_nested_without_end(run: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    (run / "config.yaml").write_text("a: " + 10_000 * "[\n ")  # in one line PyYAML takes a second
    assert "run/config.yaml" in _error(verb, capsys)


@pytest.mark.parametrize("verb", ["validate", "fit", "chat", "merge", "export"])
def test_a_module_named_in_an_adapter(run: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    _change(run / "adapter/adapter_config.json", megatron_config={"a": 1}, megatron_core="run.payload")
    assert "megatron_config" in _error(verb, capsys)


@pytest.mark.parametrize("verb", ["push", "push --folder"])
@pytest.mark.parametrize(
    ("content", "expected"), [(DEEP, "nested too deep"), ("[]", "manifest.json"), ('{"files": 3}', "manifest.json")]
)
def test_a_manifest_of_another_kind(
    run: Path, capsys: pytest.CaptureFixture[str], verb: str, content: str, expected: str
) -> None:
    shutil.copytree(run / "adapter", "theirs")
    for folder in (run / "adapter", Path("theirs")):
        (folder / "manifest.json").write_text(content)
    assert expected in _error(verb, capsys)


def test_a_card_that_is_no_text_is_not_sent(
    run: Path, capsys: pytest.CaptureFixture[str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.tools.push.Hub", lambda *_: pytest.fail("the hub was asked"))
    shutil.copyfile(trained / "adapter/manifest.json", run / "adapter/manifest.json")
    (run / "adapter/README.md").write_bytes(b"---\n\xff\n")
    assert "run/adapter/README.md" in _error("push", capsys)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", DEEP, "nested too deep"),
        ("tokenizer_config.json", DEEP, "nested too deep"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": "run.payload.X"}}', "comes with code of its own"),
    ],
    ids=range(3),
)
def test_a_merged_folder_from_a_stranger(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, expected: str
) -> None:
    shutil.copytree(demo.BASE, "theirs")
    Path("theirs", name).write_text(content)
    assert expected in _error("export --model", capsys)


@pytest.mark.parametrize(
    "content", [DEEP, "[]", '{"prompt_format": ["jinja"], "system": 3}', '{"prompt_format": "jinja", "template": 3}']
)
def test_a_merged_folder_whose_prompts_are_not_known(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """The folder's weights are converted all the same."""
    shutil.copytree(demo.BASE, "theirs")
    Path("theirs/lit_qlora.json").write_text(content)
    monkeypatch.setattr(export, "_convert", lambda script, model, target, outtype: target.write_bytes(b"GGUF"))
    assert main(VERBS["export --model"]) == 0
    out, err = capsys.readouterr()
    exported, line = out.splitlines()
    assert exported.startswith("export model.gguf: ") and Path("model.gguf").read_bytes() == b"GGUF"
    assert line.startswith("no Modelfile: ") and (len(line) < 500, err) == (True, "")
    assert not Path("model.Modelfile").exists()


@pytest.mark.parametrize(
    ("name", "value"), [*((name, 3) for name in lora.BASE_KEYS), ("base", ["x"]), ("base", {"x": 1}), ("base", True)]
)
def test_what_is_no_text_in_a_record(run: Path, capsys: pytest.CaptureFixture[str], name: str, value: object) -> None:
    _change(run / "adapter/lit_qlora.json", **{name: value})
    error = _error("chat", capsys)
    assert (
        error.startswith(f"error: run/adapter: lit_qlora.json: {name}: ") and "a text" in error and repr(value) in error
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("model.base: 3", "model.base: expected a text, got 3"),
        ("model.base: [demo]", "model.base: expected a text, got ['demo']"),
        ("seed_everything: 1", "model.base: expected a text, got None"),
        ("model: 3\nmodel.base: demo", "is damaged (model is both a section and an option)"),
        ("model.base: demo\ndata: 3", "data: expected options below it, got 3"),
        ("model.base: demo\ndata.system: {x: 1}", "data.system: expected a text or none, got {'x': 1}"),
    ],
)
def test_settings_of_another_kind(run: Path, capsys: pytest.CaptureFixture[str], line: str, expected: str) -> None:
    (run / "config.yaml").write_text(line)
    assert expected in _error("chat", capsys)


@pytest.mark.parametrize("verb", ["evaluate", "merge"])
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("data.max_length: much", "data.max_length: expected a whole number, got much"),
        ("data.nope: 3", "unknown option 'data.nope'"),
        ("data.template: {x: 1}", "data.template: expected a text or none, got {'x': 1}"),
        ("data.validation_share: x", "data.validation_share: expected a number, got x"),
        ("data.form: [messages]", """data.form: "['messages']" is unknown, expected auto, """),
        ("seed_everything: x", "seed_everything: expected a whole number, got x"),
    ],
)
def test_settings_of_another_type(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, expected: str, verb: str
) -> None:
    (run / "config.yaml").write_text(f"model.base: demo\n{line}\n")
    assert expected in _error(verb, capsys)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("model.attention: 3", "model.attention: expected one of sdpa, eager, flash_attention_2, got 3"),
        ("model.compile: [x]", "model.compile: expected true or false or auto, got ['x']"),
        ("model.class_path: run.payload.X", "unknown option 'model.class_path'"),
        ("trainer.precision: {class_path: run.payload.X}", "trainer.precision: expected one of auto, "),
        ("trainer.precision: 64-true", "bf16-mixed, 32-true, got 64-true"),
    ],
)
def test_settings_that_evaluate_takes(run: Path, capsys: pytest.CaptureFixture[str], line: str, expected: str) -> None:
    (run / "config.yaml").write_text(f"model.base: demo\n{line}\n")
    assert expected in _error("evaluate", capsys)


def test_options_written_with_dots(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "config.yaml").write_text("model.base: demo\ndata.system: Be brief.\ntrainer.callbacks+: Timer\n")
    from lit_qlora.chosen import choose_adapter

    chosen = choose_adapter("run")
    assert chosen.base.name == "demo" and chosen.options["data"]["system"] == "Be brief."


@pytest.mark.parametrize("given", [{"run": "run"}, {"adapter": "run/adapter"}])
def test_what_takes_the_first_seconds_is_said_of_a_run_and_of_an_adapter(
    run: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    from lit_qlora import chosen

    said = list[None]()
    monkeypatch.setattr(chosen, "_say_imports", lambda: said.append(None))
    chosen.choose_adapter(**given)
    assert said == [None]


@pytest.mark.parametrize("line", ["nope: 3", '"model.base+": theirs', "Model.base: theirs", "data.sauce: x"])
@pytest.mark.parametrize("verb", ["validate", "chat", "predict", "evaluate", "merge", "export"])
def test_no_name_that_is_no_option_is_passed_over(
    run: Path, capsys: pytest.CaptureFixture[str], verb: str, line: str
) -> None:
    config = run / "config.yaml"
    config.write_text(f"{config.read_text()}\n{line}\n")
    error = _error(verb, capsys)
    assert "config.yaml:" in error and line.partition(":")[0].strip('"+') in error


@pytest.mark.parametrize("verb", ["chat", "evaluate"])
def test_no_folder_of_quantised_weights_is_read_by_the_word_of_a_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """They could be anybody's, in place of the base that it names."""
    config = (run / "config.yaml").read_text()
    assert "quantized_cache: auto" in config
    (run / "config.yaml").write_text(config.replace("quantized_cache: auto", "quantized_cache: theirs"))
    places = list[str]()
    monkeypatch.setattr(Copies, "__init__", lambda _, place: places.append(place) or pytest.exit("seen"))
    with pytest.raises(pytest.exit.Exception):
        main(VERBS[verb])
    assert places == ["auto"]
