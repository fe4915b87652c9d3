"""A config file's mistakes are reported in one line with their place; values are found on the command line."""

import sys
from pathlib import Path

import pytest
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment

from lit_qlora.configs import check_config_file
from lit_qlora.data.sources import SourceOption
from lit_qlora.errors import UserError
from lit_qlora.options import check_once, option
from lit_qlora.storage.run import RunFolder
from lit_qlora.trainer import QLoRATrainer, RunParser
from lit_qlora.training import QLoRACLI
from tests.expect import ExpectError, check_line


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()


def message(path):
    with pytest.raises(UserError) as caught:
        check_config_file(Path(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(content, name="a.yaml"):
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(name)


@pytest.mark.parametrize(
    "content",
    [
        "model:\n  rank: 4\ndata:\n  source: x\n",
        "model:\n  base: x\ntrainer:\n  max_steps: 1\n# a comment\nrun: null\n",
        "\ufeffmodel:\n  rank: 4\n",  # as Windows' editor saves it
        "data:\n  source: {a: 1}\n  config: 3\n",  # only a config at the top is meant to name a file
        "model: {}\n",
        "early_stopping:\nmodel:\n  adapter:\n",  # an option may be empty: null
        "model:\r\n  rank: 4\r\n",
    ],
)
def test_a_good_file_passes(content):
    check_config_file(write(content))


def test_a_missing_file_is_reported_with_the_nearest_one():
    write("a: 1", "configs/colab_t4.yaml")
    write("a: 1", "configs/demo.yml")
    for name, nearest in (("s/colab_t5", "colab_t4.yaml"), ("s/demo", "demo.yml"), ("/demo", "demo.yml")):
        words = f"config{name}.yaml", f"did you mean configs/{nearest}?"
        check_line(message(f"config{name}.yaml"), *words, begins="config: ")
    assert message("configs/something_else_altogether.yaml").startswith(
        "config: no file configs/something_else_altogether.yaml; give a file, or one of 70b_2x24, colab_t4, "
    )


def test_rows_are_no_config():
    write("{}", "mine.jsonl")
    check_line(message("mine.jsonl"), "a file of rows", "--data.source mine.jsonl", begins="config: mine.jsonl ")


def test_a_folder_is_no_file():
    check_line(message("configs"), "a folder", "expected a YAML file", begins="config: configs ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "a.yaml: the file is empty"),
        ("# nothing but this\n", "a.yaml: the file is empty"),
        ("- model\n- data\n", "a.yaml:1: expected 'option: value' lines, got a list"),
        ("model", "a.yaml:1: expected 'option: value' lines, got a single value"),
        (
            "model:\n\trank: 4\n",
            "a.yaml:2: no valid YAML: found character '\\t' that cannot start any token;"
            " indent with spaces, not with tabs",
        ),
        (
            "data:\n  system: You are: kind\n",
            "a.yaml:2: no valid YAML: mapping values are not allowed here;"
            " put quotes around the value, if ': ' is in it, or indent the line as those before it",
        ),
        (
            "data:\n  system: @me\n",
            "a.yaml:2: no valid YAML: found character '@' that cannot start any token; put quotes around the value",
        ),
        (
            'data:\n  source: "C:\\Users"\n',
            "a.yaml:2: no valid YAML: expected escape sequence of 8 hexadecimal numbers, but found 's';"
            " put ' in place of \" around the value",
        ),
        (
            "model:\n  rank: 4\n data: 1\n",
            "a.yaml:3: no valid YAML: expected <block end>, but found '<block mapping start>'",
        ),
        ("a: 1\nb: 'open\n", "a.yaml:2: no valid YAML: found unexpected end of stream"),
        (
            "model:\n  base: demo\n  rank:4\n  alpha: 8\n",
            "a.yaml:3: no valid YAML: could not find expected ':';"
            " write 'option: value', with a space behind the colon",
        ),
        (
            "model:\n  base: demo\n  rank = 4\n  alpha: 8\n",
            "a.yaml:3: no valid YAML: could not find expected ':';"
            " write 'option: value', with a space behind the colon",
        ),
        (
            "model:\n  target_modules: [q_proj\ndata:\n  source: demo\n",
            "a.yaml:2: no valid YAML: expected ',' or ']', but got ':'",
        ),
        ("a: 1\nb: \x07\n", "a.yaml:2: no valid YAML: unacceptable character #x0007"),
        ("a: 1\n---\nb: 2\n", "a.yaml:2: no valid YAML: but found another document"),
        (
            "model:\n  rank: 4\n  alpha: 8\n  rank: 16\n",
            "a.yaml:4: 'model.rank' stands here a second time (first in line 2); keep one",
        ),
        (
            "model:\n  rank: 4\ndata:\n  source: x\nmodel:\n  alpha: 8\n",
            "a.yaml:5: 'model' stands here a second time (first in line 1); keep one",
        ),
        (
            "trainer:\n  callbacks: [X]\n  callbacks+: [Y]\n",
            "a.yaml:3: 'trainer.callbacks+' stands here a second time (first in line 2); keep one",
        ),
        (
            "model:\n  rank: 4\nmodel.rank: 8\n",
            "a.yaml:3: 'model.rank' stands here a second time (first in line 2); keep one",
        ),
        ("data:\n  seed: 7\n", "a.yaml:2: data.seed can't be given, it is always seed_everything; set that one"),
        ("data:\n  tokenizer: x\n", "a.yaml:2: data.tokenizer can't be given, it is always model.base; set that one"),
        (
            "run: x\nconfig: other.yaml\n",
            "a.yaml:2: a config file can't name another; give several with --config A --config B",
        ),
        ("run: x\nmodel:\ndata:\n  source: x\n", "a.yaml:2: section 'model' is empty; fill it or remove the line"),
        ("trainer: null\n", "a.yaml:1: section 'trainer' is empty; fill it or remove the line"),
        ("data: x.jsonl\n", "a.yaml:1: section 'data' holds 'x.jsonl', expected 'option: value' lines"),
        ("model:\n  rank:8\n", "a.yaml:1: section 'model' holds 'rank:8', expected 'option: value' lines"),
        ("samples:\n  - 1\n", "a.yaml:1: section 'samples' holds a list, expected 'option: value' lines"),
        (b"model: \xff\n", "a.yaml: not UTF-8 (byte 7); save it as UTF-8"),
        ("model:\n  rank: 4\n".encode("utf-16"), "a.yaml: not UTF-8 (byte 0); save it as UTF-8"),
    ],
)
def test_a_mistake_is_reported_in_one_line(content, expected):
    write(content)
    assert message("a.yaml") == expected


def test_a_character_that_yaml_does_not_know_is_reported_with_its_line():
    write("model:\n  base: a\x00b\n")
    assert message("a.yaml") == "a.yaml:2: no valid YAML: unacceptable character #x0000"


def test_half_a_character_is_reported_with_its_line():
    write('data:\n  source: x.jsonl\n  system: "a \\ud800"\n')
    assert message("a.yaml").startswith("a.yaml:3: data.system: it holds bytes that are no UTF-8, or half a character")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], None),
        (["--config", "a"], "a"),
        (["--config=a"], "a"),
        (["-c", "a"], "a"),
        (["--config", "a", "--config", "b"], "b"),
        (["--config=a", "-c", "b"], "b"),
        (["--config=a=b"], "a=b"),
        (["--config="], ""),
        (["--config"], None),
        (["--configs", "a", "--data.config", "b"], None),
        (["--other", "a", "--config", "b", "--more"], "b"),
    ],
)
def test_an_options_last_value_is_found(args, expected):
    assert option(args, "--config", "-c") == expected


TYPES = {
    "data.source": SourceOption,
    "model.rank": int,
    "devices": list[int] | int,
    "stop": str | list[str],
    "data.columns": dict[str, str] | None,
}


@pytest.mark.parametrize(
    ("args", "option", "words"),
    [
        ("--data.source a --data.source b.jsonl", "data.source", ["'b.jsonl' would", "'a'", "'[a, b.jsonl]'"]),
        ("--data.source=a --model.rank 4 --data.source=b", "data.source", ["'[a, b]'"]),
        ("--data.source [a] --data.source b", "data.source", ["give one of the two"]),
        ("--stop a --stop b", "stop", ["--stop '[a, b]'"]),
        ("--data.source+ a --data.source b", "data.source", ["'[a, b]'"]),
        ("--data.columns.user q --data.columns {}", "data.columns", ["--data.columns.user 'q'", "give one"]),
        ("--config a --config b -c c --model.rank 4 --model.rank 8 --flag --flag", None, []),
        ("--data.source a --data.source+ b --data.source+ c", None, []),
        ("--devices 2 --devices 1", None, []),
        ("--data.columns.user q --data.columns.assistant a", None, []),
        ("--logger+ A --logger.x 1 --logger+ B --logger.x 2", None, []),
        ("--prompt -- --data - -5 -5 x x", None, []),
        ("", None, []),
    ],
)
def test_an_option_does_not_take_another_s_place(args, option, words, expect_error):
    if option:
        expect_error(lambda: check_once(args.split(), TYPES), *words, option=option)
    else:
        check_once(args.split(), TYPES)


def test_verbs_refuse_a_second_list(expect_error):
    twice = ["--data.source", "a.jsonl", "--data.source=b.jsonl"]
    for verb in ("fit", "inspect", "plan"):
        expect_error([verb, *twice], "--data.source '[a.jsonl, b.jsonl]'", option="data.source")
    expect_error(["chat", "--stop", "a", "--stop", "b"], "--stop '[a, b]'", option="stop")


class NeedsTwo(Callback):
    def __init__(self, one: int, two: int) -> None: ...


EARLY = "lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("given", "option", "words"),
    [
        (["callbacks=EarlyStopping"], "callbacks.monitor", ["no value", "EarlyStopping needs monitor", "VALUE"]),
        (["callbacks+=EarlyStopping"], "callbacks.monitor", ["no value", "EarlyStopping"]),
        ([f"callbacks=[{{class_path: Timer}}, {{class_path: {EARLY}}}]"], "callbacks.monitor", ["EarlyStopping needs"]),
        ([f"callbacks={__name__}.NeedsTwo"], "callbacks.one", ["NeedsTwo needs one and two"]),
        (["callbacks=NoSuchCallback"], "callbacks", ["no class 'NoSuchCallback'", "MODULE.CLASS"]),
        (["callbacks=EarlyStoping"], "callbacks", ["no class 'EarlyStoping'", "mean 'EarlyStopping'"]),
        (["callbacks+=early_stopping"], "callbacks", ["mean 'EarlyStopping'"]),
        (["callbacks=[Timer, EarlyStoping]"], "callbacks", ["no class 'EarlyStoping'", "mean 'EarlyStopping'"]),
        (["callbacks={class_path: EarlyStoping}"], "callbacks", ["mean 'EarlyStopping'"]),
        (["callbacks=lightning.pytorch.callbacks.EarlyStoping"], "callbacks", ["mean 'EarlyStopping'"]),
        (["callbacks=nomodule.Nothing"], "callbacks", ["no class 'nomodule.Nothing'", "No module named"]),
        (["callbacks=CSVLogger"], "callbacks", ["no class 'CSVLogger'", "MODULE.CLASS"]),
        (["logger=wandb"], "logger", ["no class 'wandb'", "mean 'WandbLogger'"]),
        (["logger+=CSVLoger"], "logger", ["mean 'CSVLogger'"]),
        (["callbacks=EarlyStopping", "callbacks.monitr=val/loss"], "callbacks", ["'monitr'", "mean 'monitor'"]),
        (
            [f"callbacks={{class_path: {EARLY}, init_args: {{patience: x, monitor: a}}}}"],
            "callbacks.patience",
            ["whole number"],
        ),
    ],
)
def test_a_class_that_is_not_there_or_lacks_something_is_named(
    given: list[str], option: str, words: list[str], expect_error: ExpectError
) -> None:
    parser = RunParser(exit_on_error=False)
    parser.add_lightning_class_args(QLoRATrainer, "trainer")
    expect_error(lambda: parser.parse_args([f"--trainer.{one}" for one in given]), *words, option=f"trainer.{option}")


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        (["logger=CSVLogger"], ["runs/a"]),
        (["logger=TensorBoardLogger", "logger.name=x"], ["runs/a"]),
        (["logger.class_path=lightning.pytorch.loggers.CSVLogger"], ["runs/a"]),
        (["logger=[{class_path: CSVLogger}, {class_path: CSVLogger, init_args: {save_dir: own}}]"], ["runs/a", "own"]),
        (["logger+=CSVLogger", "logger+=TensorBoardLogger", "logger.save_dir=own"], ["runs/a", "own"]),
        (["logger=true"], []),
        (["logger=false"], []),
        ([], []),
    ],
)
def test_a_logger_of_files_without_a_folder_writes_into_the_runs(given: list[str], folders: list[str]) -> None:
    parser = RunParser(exit_on_error=False)
    parser.add_lightning_class_args(QLoRATrainer, "trainer")
    options = parser.parse_args([f"--trainer.{one}" for one in given])
    command = QLoRACLI.__new__(QLoRACLI)
    command.verb, command.run = "fit", RunFolder(Path("runs/a"))  # chosen after the options are read
    command.config, command.config_init = Namespace(fit=options), Namespace(fit=parser.instantiate_classes(options))
    assert [logger.save_dir for logger in command.given_loggers()] == folders
    assert not Path("runs").exists()


@pytest.mark.parametrize("as_list", [False, True])
def test_a_logger_that_can_not_be_made_names_its_option(as_list: bool, expect_error: ExpectError) -> None:
    """Whose package is missing, or that refuses what it is given."""
    parser = RunParser(exit_on_error=False)
    parser.add_lightning_class_args(QLoRATrainer, "trainer")
    options = parser.parse_args([f"--trainer.logger{'+' * as_list}=CometLogger"])
    expect_error(
        lambda: parser.instantiate_classes(options), "CometLogger can't be made", "comet", option="trainer.logger"
    )


@pytest.mark.parametrize(
    ("option", "kind"), [("logger", CSVLogger), ("callbacks", Callback), ("plugins", LightningEnvironment)]
)
def test_what_can_not_be_made_names_its_option_whatever_it_says(
    option: str, kind: type, expect_error: ExpectError
) -> None:
    """The words of the class's error are never read: here they are those of the parser."""

    class Own(kind):
        def __init__(self) -> None:
            raise RuntimeError("class_path='x'\n  - Expected a y")

    parser = RunParser(exit_on_error=False)
    parser.add_lightning_class_args(QLoRATrainer, "trainer")
    options = parser.parse_args([])
    options[f"trainer.{option}"] = Namespace(class_path=f"{__name__}.Own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "Own", Own, raising=False)
        expect_error(
            lambda: parser.instantiate_classes(options),
            "Own can't be made: class_path='x' - Expected a y",
            option=f"trainer.{option}",
        )
