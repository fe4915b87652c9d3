"""A run folder from a stranger is data: nothing in it is imported or run, however it is spelled."""

import importlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest

from lit_qlora import training
from lit_qlora.cli import main
from lit_qlora.command import complete, with_kept
from lit_qlora.errors import UserError
from lit_qlora.signatures import OF_LIGHTNING
from lit_qlora.storage.config_file import as_sections, as_yaml
from lit_qlora.storage.run import RunFolder
from lit_qlora.trainer import RunParser
from tests.expect import check_line

PAYLOAD = "from pathlib import Path\nPath(__file__).with_name('it_ran').touch()\n\n\nclass X:\n    pass\n"
CLASS = "{class_path: run.payload.X}"
OPTIONS = ("trainer.callbacks", "trainer.logger", "trainer.plugins")
SPELLINGS = [
    "trainer: {{KEY: {CLASS}}}",
    "trainer: {{KEY: [{CLASS}]}}",
    "trainer: {{KEY: run.payload.X}}",
    "trainer: {{KEY: [run.payload.X]}}",
    "trainer: {{KEY+: {CLASS}}}",
    "trainer: {{KEY+: [{CLASS}]}}",
    "trainer: {{KEY.class_path: run.payload.X}}",
    "trainer: {{KEY: 'run/payload.yaml'}}",
    "trainer: {{KEY: ' {CLASS}'}}",
    "trainer: {{KEY: '[{CLASS}]'}}",
    "trainer: {{KEY: {{help: run.payload.X}}}}",
    "trainer.KEY: {CLASS}",
    "trainer.KEY: [{CLASS}]",
    "trainer.KEY: run.payload.X",
    "trainer.KEY+: [{CLASS}]",
    "trainer.KEY+: run.payload.X",
    "trainer.KEY.class_path: run.payload.X",
    "trainer.KEY.help: run.payload.X",
    "trainer.KEY.init_args: {{x: {CLASS}}}",
    "'trainer.KEY': {CLASS}",
    '"trainer\\x2eKEY": {CLASS}',
    "? trainer.KEY\n: {CLASS}",
    "!!str trainer.KEY: {CLASS}",
    '"trainer": {{"KEY": {{"class_path": "run.payload.X", "init_args": {{}}}}}}',
]
"""Spellings that jsonargparse may take for the option KEY of the Trainer, or by which it comes to it."""
REFUSED = [
    "a: &a {CLASS}\ntrainer.KEY: *a",
    "a: &a {{trainer.KEY: {CLASS}}}\n<<: *a",
    "a: &a {{KEY: {CLASS}}}\ntrainer:\n  <<: *a",
    "trainer.KEY: !!python/name:run.payload.X",
    "trainer.KEY: !!python/object/apply:run.payload.X []",
    "trainer:\n  KEY: {CLASS}\ntrainer.KEY: null",
    "trainer: run/payload.yaml",
    "model: run/payload.yaml",
    "model: {CLASS}",
    "model.class_path: run.payload.X",
    "data.class_path: run.payload.X",
    "samples.class_path: run.payload.X",
    "model.rank: {CLASS}",
    "model.rank.class_path: run.payload.X",
    "data.form: [{CLASS}]",
    "__path__: run/payload.yaml",
    "__orig__: {CLASS}",
    "$schema: {CLASS}",
    "config: run/payload.yaml",
    "validate.config: run/payload.yaml",
    "validate.trainer.KEY: {CLASS}",
    "validate: {{trainer: {{KEY: {CLASS}}}}}",
    "fit: {{trainer: {{KEY: {CLASS}}}}}",
    "subcommand: fit",
    "print_config: x",
    "ckpt_path: run",
    "trainer.strategy: run.payload.X",
    "trainer.profiler: run.payload.X",
    "trainer..KEY: {CLASS}",
    ".trainer.KEY: {CLASS}",
    "'trainer. KEY': {CLASS}",
    "trainer.__class__: {CLASS}",
    "optimizer: {CLASS}",
]


@pytest.fixture(scope="module")
def parser(parser_of: Callable[[str], RunParser]) -> RunParser:
    """validate's own."""
    return parser_of("validate")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder beside a module that says when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("run").mkdir()
    Path("run/metrics.jsonl").touch()  # it has begun
    Path("run/payload.py").write_text(PAYLOAD)
    Path("run/payload.yaml").write_text(f"class_path: run.payload.X\ntrainer: {{callbacks: {CLASS}}}\n")
    yield Path("run")
    ran = Path("run/it_ran").exists()
    for name in ("run", "run.payload"):
        sys.modules.pop(name, None)
    assert not ran


def _write(run: Path, spelling: str, option: str) -> None:
    key = option.removeprefix("trainer.")
    text = spelling.replace("KEY", key).replace("{{", "{").replace("}}", "}").replace("{CLASS}", CLASS)
    (run / "config.yaml").write_text(f"seed_everything: 7\n{text}\n")


def _parse(parser: RunParser, run: Path, *rest: str) -> Any:
    """Parse as QLoRACLI does."""
    command = complete(["validate", "--run", str(run), *rest])
    return parser.parse_args(with_kept(command)[1:])


def is_plain_type(hint: Any) -> bool:
    """True if values of a type are texts, numbers, booleans, and lists and tables of them: a class could bring code."""
    if get_origin(hint) is Literal:
        return True
    if get_origin(hint) in (Union, UnionType, list, dict):
        return all(map(is_plain_type, get_args(hint)))
    return hint in (str, int, float, bool, NoneType)


def test_these_are_all_the_options_that_can_name_code(parser: RunParser) -> None:
    """Options that have no plain type; whoever adds one sees here that it is not taken from a run folder."""
    assert {name for name, hint in parser.types().items() if not is_plain_type(hint)} == {*OPTIONS} == {*OF_LIGHTNING}
    assert len(parser.types()) > 50


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_code_is_left_out_with_a_warning(
    run: Path, parser: RunParser, capsys: pytest.CaptureFixture[str], spelling: str, option: str
) -> None:
    _write(run, spelling, option)
    options = _parse(parser, run)
    assert (options.seed_everything, options[option]) == (7, None)
    words = "run/config.yaml", "can name code", "on the command line"
    check_line(capsys.readouterr().err, *words, begins=f"warning: {option} ")


@pytest.mark.parametrize(
    "named", ["run/config.yaml", "./run/other.yaml", "run/sub/own.yaml", "link.yaml", "here/config.yaml"]
)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_nor_is_it_taken_from_a_config_file_in_the_folder(
    run: Path, parser: RunParser, capsys: pytest.CaptureFixture[str], spelling: str, named: str
) -> None:
    """The path may be any, and between config files of one's own, which may name code."""
    Path("own.yaml").write_text("seed_everything: 3\ndata: {batch_size: 5}\ntrainer: {max_epochs: 2}\n")
    Path("last.yaml").write_text("trainer: {max_epochs: 4}\n")
    _write(run, spelling, "trainer.callbacks")
    Path("link.yaml").symlink_to("run/config.yaml")
    Path("here").symlink_to("run")
    if not Path(named).exists():
        Path(named).parent.mkdir(exist_ok=True)
        Path(named).write_bytes((run / "config.yaml").read_bytes())
    command = complete(["fit", "--config", "own.yaml", f"--config={named}", "-c", "last.yaml"])
    options = parser.parse_args(with_kept(command)[1:])
    assert (options.seed_everything, options.data.batch_size, options.trainer.max_epochs) == (7, 5, 4)
    assert options.trainer.callbacks is None
    assert capsys.readouterr().err.startswith("warning: trainer.callbacks of ")


@pytest.mark.parametrize("beside", ["adapter/", "adapter/sub/", ""])
def test_a_config_of_ones_own_may_name_code(run: Path, parser: RunParser, beside: str) -> None:
    """The config may lie beside an adapter that was downloaded."""
    Path("adapter/sub").mkdir(parents=True)
    Path(f"{beside}own.yaml").write_text("trainer: {callbacks: {class_path: lit_qlora.callbacks.warmup.WarmupStep}}\n")
    command = complete(["fit", "--config", f"{beside}own.yaml"])
    assert parser.parse_args(with_kept(command)[1:]).trainer.callbacks


@pytest.mark.parametrize("spelling", REFUSED)
def test_what_is_no_option_is_refused(run: Path, parser: RunParser, spelling: str) -> None:
    _write(run, spelling, "trainer.callbacks")
    with pytest.raises(UserError) as caught:
        _parse(parser, run)
    assert str(caught.value).startswith("run/config.yaml")
    assert "\n" not in str(caught.value)


ELSEWHERE = [("mirror", "/drive/my runs", "null"), ("model.quantized_cache", "copies", "auto")]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("name", "folder", "none"), ELSEWHERE)
def test_a_folder_to_write_to_is_the_commands_own(
    run: Path, parser: RunParser, expect_error: Callable[..., Any], name: str, folder: str, none: str, nested: bool
) -> None:
    """The run's folder may be a stranger's: a fit asks for it once more, and other verbs need none."""
    options = {"seed_everything": 7, name: folder}
    (run / "config.yaml").write_text(as_yaml(as_sections(options) if nested else options))
    again = f"--{name} {shlex.quote(folder)}"
    expect_error(lambda: complete(["fit", "--run", "run/."]), repr(folder), again, f"--{name} {none}", option=name)
    by_config = complete(["fit", "--config", "run/config.yaml"])
    expect_error(lambda: with_kept(by_config), repr(folder), again, option=name)
    assert _parse(parser, run)[name] == (None if name == "mirror" else "auto")
    for given in (folder, none):
        command = complete(["fit", "--run", "./run", f"--{name}", given])
        parsed = parser.parse_args(with_kept(command)[1:])
        assert (parsed.seed_everything, parsed[name]) == (7, None if given == "null" else given)
    for value in ("auto", "none") if name.startswith("model.") else ():
        (run / "config.yaml").write_text(f"{name}: {value}\n")
        assert parser.parse_args(with_kept(complete(["fit", "--run", "./run"]))[1:])[name] == value


def test_it_would_have_run(run: Path) -> None:
    """The payload itself works: it is what was taken away that keeps it from running."""
    importlib.import_module("run.payload")
    assert (run / "it_ran").exists()
    (run / "it_ran").unlink()


@pytest.mark.parametrize("given", [("--run", "./run"), ("--config", "run/config.yaml")])
@pytest.mark.parametrize("verb", ["validate", "test", "fit", "plan", "inspect"])
@pytest.mark.parametrize("spelling", ["trainer.callbacks: [{CLASS}]", "trainer.logger.class_path: run.payload.X"])
def test_no_verb_runs_it(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spelling: str,
    verb: str,
    given: tuple[str, str],
) -> None:
    def stop(*_: object) -> None:
        raise SystemExit(7)

    monkeypatch.setattr(training.QLoRACLI, "before_instantiate_classes", stop)
    _write(run, spelling, "")
    assert main([verb, *given]) == 7
    assert "left out: it can name code" in capsys.readouterr().err


def test_a_plain_value_of_such_an_option_holds(run: Path, parser: RunParser) -> None:
    (run / "config.yaml").write_text("trainer.logger: false\ntrainer:\n  callbacks: null\n")
    options = _parse(parser, run)
    assert (options.trainer.logger, options.trainer.callbacks) == (False, None)


def test_names_below_a_table_are_options_of_it(run: Path, parser: RunParser) -> None:
    (run / "config.yaml").write_text("data:\n  columns: {user: Frage, assistant: Antwort}\n")
    assert _parse(parser, run).data.columns == {"user": "Frage", "assistant": "Antwort"}
    assert _parse(parser, run, "--data.columns.user", "Q").data.columns == {"user": "Q", "assistant": "Antwort"}


def test_what_the_command_line_names_is_taken_from_it_without_a_warning(
    run: Path, parser: RunParser, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(run, "trainer.KEY: [{CLASS}]", "trainer.callbacks")
    options = _parse(parser, run, "--trainer.callbacks", "LearningRateMonitor")
    assert options.trainer.callbacks.class_path == "lightning.pytorch.callbacks.LearningRateMonitor"
    assert capsys.readouterr().err == ""


def test_every_option_comes_back_as_it_was_kept(run: Path, parser: RunParser) -> None:
    """Written nested or with dots; texts that look like something else among them."""
    given = {
        "model.base": "a/b", "model.learning_rate": 2e-05, "model.target_modules": ["q_proj", "v_proj"],
        "data.system": "null", "data.template": "{{ x }}\n  - 'a'\n: \x7f \U0001f600",
        "data.test_source": "a:b.jsonl, c",
        "data.source": ["a.jsonl", {"path": "[1, 2]", "share": 0.5, "columns": {"text": "x"}}],
        "data.validation_source": {"path": "b", "split": "c"},
        "samples.prompts": ["a: b", "- c", "x\ny"], "trainer.limit_val_batches": 0.5, "early_stopping": 3,
        "save_every_minutes": None, "trainer.deterministic": "warn", "trainer.max_steps": 9,
    }  # fmt: skip
    found = []
    for config in (given, as_sections(given)):
        RunFolder(run).config.unlink(missing_ok=True)
        RunFolder(run).write_config(as_yaml(config))
        options = _parse(parser, run)
        found.append({name: options[name] for name in given})
    assert found[0] == found[1]
    assert found[0] == given


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("data.template", "/dev/zero", "expected the text of a template, got '/dev/zero'"),
        ("data.template", "chat.jinja", "expected the text of a template"),
        ("data.batch_size", f"0x{'f' * 6000}", "expected a number of at most 19 digits"),
        ("trainer.max_steps", f"[{'9' * 30}]", "expected a whole number, got [999"),
    ],
)
def test_of_a_run_s_options_no_file_is_opened_and_no_number_is_endless(
    run: Path, parser: RunParser, option: str, value: str, expected: str
) -> None:
    RunFolder(run).config.write_text(f"{option}: {value}\n")
    with pytest.raises(UserError) as caught:
        _parse(parser, run)
    assert f"config.yaml: {option}: {expected}" in str(caught.value)


def test_a_name_for_a_name_for_a_name_ends_at_once(run: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]" for n in range(1, 12)]
    (run / "config.yaml").write_text("\n".join(lines))
    for verb in ("validate", "chat", "predict"):
        args = ["--prompts", "x.txt", "--output", "y"] if verb == "predict" else ["--prompt", "x"]
        Path("x.txt").write_text("x")
        (run / "adapter").mkdir(exist_ok=True)
        (run / "adapter/adapter_config.json").write_text("{}")
        assert main([verb, "--run", "./run", *(args if verb != "validate" else [])]) == 2
