"""How a command ends that can't begin: an old Python, missing packages; anything else keeps its traceback."""

import ast
import io
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_qlora import cli, command, training
from lit_qlora.cli import FIT_AND_KIN, TOOLS, main
from lit_qlora.options import configs_first
from lit_qlora.tools import run_tool
from lit_qlora.tools.doctoring import surroundings
from tests.expect import check_line

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("version", [(2, 7), (3, 8), (3, 10)])
def test_an_old_python_is_one_line(version: tuple[int, int]) -> None:
    code = f"import sys, runpy; sys.version_info = {version}; runpy.run_path('main.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    said = f"error: this is Python {version[0]}.{version[1]}, and 3.11 or newer is needed"
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(said) and "pip install -r requirements.txt" in done.stderr


def test_an_old_python_can_read_the_file_that_says_so() -> None:
    source = (ROOT / "main.py").read_text()
    assert source.isascii()
    for node in ast.walk(ast.parse(source, feature_version=(3, 4))):
        assert not isinstance(node, ast.JoinedStr | ast.AnnAssign | ast.NamedExpr | ast.Match)


@pytest.mark.parametrize(
    ("option", "is_printed"), [("--print_config", True), ("--print_config=skip_null", True), ("", False)]
)
def test_a_printed_config_is_nothing_but_a_config(
    option: str, is_printed: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The word on imports goes elsewhere, since a printed config goes into a file."""
    streams = list[object]()
    monkeypatch.setattr(cli, "say_imports", streams.append)
    monkeypatch.setattr(cli, "import_module", lambda _: SimpleNamespace(main=lambda _: 0))
    assert main(["fit", *filter(None, [option])]) == 0
    assert (streams, capfd.readouterr().out) == ([sys.stderr if is_printed else None], "")


VERBS = [
    ["fit"], ["validate"], ["test"], ["plan"], ["inspect"], ["chat", "--prompt", "x"], ["predict", "--help"],
    ["merge", "--help"], ["export", "--help"], ["evaluate"], ["push", "--help"],
]  # fmt: skip


@pytest.mark.parametrize("args", VERBS, ids=lambda args: args[0])
def test_without_packages_each_verb_says_what_to_install(args: list[str], tmp_path: Path) -> None:
    """A Python of its own, which sees nothing but its library."""
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "main.py"), *args], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: not installed for ")
    assert "torch, lightning, transformers" in done.stderr and "pip install -r requirements.txt" in done.stderr


@pytest.mark.parametrize(
    ("module", "named"),
    [
        ("peft", "peft"),
        ("matplotlib", "matplotlib"),
        ("yaml", "yaml"),
        ("huggingface_hub", "huggingface_hub"),
        ("numpy", "numpy"),
    ],
)
def test_a_package_that_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, named: str
) -> None:
    there = surroundings._is_there
    monkeypatch.setattr(surroundings, "_is_there", lambda name: name != module and there(name))
    reasons = [
        ModuleNotFoundError(f"No module named '{module}.part'", name=f"{module}.part"),
        metadata.PackageNotFoundError(module),
    ]
    if module == "peft":
        reasons.append(ImportError("This needs the Peft library: pip install it"))
    for reason in reasons:
        for error in (reason, _because_of(reason)):
            monkeypatch.setattr(training, "QLoRACLI", _raising(error))
            assert main(["fit"]) == 2
            words = sys.executable, f": {named}; ", "pip install -r requirements.txt"
            check_line(capsys.readouterr().err, *words, begins="error: not installed ")


def test_a_forgotten_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "CLONE", tmp_path)
    monkeypatch.setattr(surroundings, "_is_there", lambda name: name != "peft")
    monkeypatch.setattr(training, "QLoRACLI", _raising(ModuleNotFoundError("No module named 'peft'", name="peft")))
    activate = tmp_path / ".venv" / "bin" / "activate"
    assert main(["fit"]) == 2
    assert str(activate) not in capsys.readouterr().err
    activate.parent.mkdir(parents=True)
    activate.touch()
    assert main(["fit"]) == 2
    assert f"; . {activate}, or pip install -r requirements.txt" in capsys.readouterr().err
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))  # it is this one, and lacks something
    assert main(["fit"]) == 2
    assert str(activate) not in capsys.readouterr().err


def test_a_question_without_its_option_is_answered_with_how_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "Who is Silas?"]) == 2
    assert "; give a question as --prompt 'QUESTION'; " in capsys.readouterr().err


def _because_of(reason: Exception) -> Exception:
    error = RuntimeError("Failed to import what is needed")
    error.__cause__ = reason
    return error


def _raising(error: Exception):  # type: ignore[no-untyped-def]
    def fails(*_: object) -> None:
        raise error

    return fails


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'x' from 'transformers' (/somewhere/transformers/__init__.py)"),
        ImportError("libcudart.so.12: cannot open shared object file"),
        ModuleNotFoundError("No module named 'my_own'", name="my_own"),
        ModuleNotFoundError("No module named 'torch.nowhere'", name="torch.nowhere"),
        ModuleNotFoundError("No module named 'lit_qlora.nowhere'", name="lit_qlora.nowhere"),
        ValueError("anything"),
    ],
    ids=str,
)
def test_an_import_that_fails_for_another_reason_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(training, "QLoRACLI", _raising(error))
    with pytest.raises(type(error)) as caught:
        main(["fit"])
    assert caught.value is error


ENCODED = [("ascii", b"l\\xe4uft \\u4e2d"), ("cp1252", b"l\xe4uft \\u4e2d")]


def _run_without_adapter(folder: Path) -> None:
    run = folder / "runs" / "läuft 中"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed_everything: 1\n")


@pytest.mark.parametrize(("encoding", "shown"), ENCODED)
def test_a_path_outside_of_the_console_s_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, shown: bytes
) -> None:
    _run_without_adapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, stream in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding))
    assert main(["validate"]) == 2
    sys.stdout.flush()
    sys.stderr.flush()
    assert written["stdout"].getvalue().splitlines()[-1] == b"   run  runs/" + shown + b", the newest"
    assert written["stderr"].getvalue().startswith(b"error: ckpt_path: runs/" + shown + b" has no adapter yet")


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "shown"), ENCODED)
def test_a_path_outside_of_a_real_console_s_encoding(tmp_path: Path, encoding: str, shown: bytes) -> None:
    _run_without_adapter(tmp_path)
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "validate"], cwd=tmp_path, capture_output=True, check=False,
        env=environment,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == b"   run  runs/" + shown + b", the newest"
    assert done.stderr.startswith(b"error: ckpt_path: runs/" + shown + b" has no adapter yet")
    assert done.returncode == 2


@pytest.mark.parametrize("args", [["--run", "x\udcff"], ["--run=x\udcff"], ["--model.rank", "8", "--run", "x\udcff"]])
def test_bytes_that_are_no_utf_8_are_refused_by_the_option_s_name(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: run: it holds bytes that are no UTF-8") and err.count("\n") == 1
    assert "x\\udcff" in err


def test_a_name_that_the_system_can_t_write_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = UnicodeEncodeError("latin-1", "runs/中", 5, 6, "ordinal not in range(256)")
    monkeypatch.setattr(training, "QLoRACLI", _raising(error))
    assert main(["fit"]) == 2
    check_line(capsys.readouterr().err, "'runs/\\u4e2d'", "latin-1", "LC_ALL=C.UTF-8", begins="error: ")


@pytest.mark.slow
def test_names_are_utf_8_in_a_locale_that_knows_ascii_alone(tmp_path: Path) -> None:
    (tmp_path / "runs" / "中").mkdir(parents=True)
    (tmp_path / "runs" / "中" / "config.yaml").write_text("seed_everything: 1\n")
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "validate", "--run", "中"], cwd=tmp_path, capture_output=True,
        check=False, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert done.stderr.startswith(b"error: ckpt_path: runs/\\u4e2d has no adapter yet")


@pytest.mark.parametrize("option", ["--run", "--config", "--data.source", "--model.base", "--model.adapter"])
def test_a_path_too_long_is_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", option, f"./{'a' * 300}"]) == 2
    err = capsys.readouterr().err
    assert "aaaa…: no path may be so long here" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--model.rank", "8", "--config", "a.yaml"], ["--config", "a.yaml", "--model.rank", "8"]),
        (["--x=1", "-c", "a", "--y", "2", "--config=b"], ["--config", "a", "--config", "b", "--x=1", "--y", "2"]),
        (["--x", "1", "--config"], ["--config", "--x", "1"]),
    ],
)
def test_config_files_come_first(given, expected):
    assert configs_first(given) == expected


@pytest.mark.parametrize(
    ("args", "status"),
    [(["plan", "--run", "mine"], 0), (["fit", "--run", "mine", "--data.source", "gone.jsonl"], 2)],
)
def test_a_command_line_is_completed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    named, find = list[str | None](), command.named_folder
    monkeypatch.setattr(command, "named_folder", lambda run: named.append(run) or find(run))  # type: ignore[func-returns-value]
    assert (main(args), named) == (status, ["mine"])


def test_an_option_before_the_config_counts(expect_error):
    """The config file, which comes after it, does not hide its mistake."""
    for config in (["--config", "demo"], ["--config=demo"]):
        expect_error(["fit", "--model.rank", "0", *config], "a whole number from 1", option="model.rank")
        expect_error(["fit", "--data.source", "nowhere.jsonl", *config], "no such file", place="nowhere.jsonl")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("verb", [*FIT_AND_KIN, *TOOLS, "doctor", "--help", "nowhere"])
def test_help_and_mistakes_of_every_verb_fit_80_columns(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for asked in ("--help", "--help=all"):
        assert main([verb, asked]) == (2 if verb == "nowhere" else 0)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines()), default=0) <= 80
        assert not re.search(r"type:|null|Union|Optional|Literal|\[\{|__", shown)
    for args in (["--trainer.learning_rate_of_the_optimizer", "0.5"], ["--config", f"no_such_{'folder/' * 4}a.yaml"]):
        printed = {}
        for stream in (Terminal(), io.StringIO()):
            monkeypatch.setattr(sys, "stderr", stream)
            assert main([verb, *args]) == (0 if verb == "--help" else 2)
            printed[stream.isatty()] = stream.getvalue()
        assert printed[False].count("\n") == (verb != "--help")
        assert max(map(len, printed[True].splitlines()), default=0) <= 80
        assert " ".join(printed[True].replace("\n    -> ", "; ").split()) == printed[False].strip()


@pytest.mark.parametrize(
    ("args", "option", "words"),
    [
        (["merge"], "output", ["--output merged"]),
        (["export"], "output", ["--output model.gguf"]),
        (["push"], "to", ["--to NAME/REPO"]),
        (["predict"], "prompts", ["so is output", "--prompts questions.txt --output answers.jsonl"]),
        (["merge", "--ouput", "x"], None, ["unknown option 'ouput'", "'output'"]),
    ],
)
def test_an_option_that_is_needed_is_named_with_an_example(args, option, words, expect_error):
    expect_error(lambda: run_tool(args[0], args[1:]), *words, option=option)


def test_the_help_of_a_tool_names_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "--public", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python main.py push --to VALUE [--OPTION VALUE ...]\n")
    assert "  --to VALUE      " in shown and "(required)" in shown and "  --public      " in shown
    assert main(["chat", "-h"]) == 0
    shown = capsys.readouterr().out
    assert "  --temperature X " in shown and "time (0)\n" in shown and "  --port N " in shown
