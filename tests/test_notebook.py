"""The notebooks: their cells as they are committed, and, slow, all of them run.

Kaggle's has Colab's cells but for those that know the place. Each is run once inside a clone with its form as it is
shipped, a small base and few rows alone put into the config. And Colab's on the demo for three days on Colab: a machine
that goes away in the middle of training, the next one, on which everything runs to the end from the copy on the drive,
and the same one again. Each in an environment of its own, into which pip may install, and which sees the packages of
this one.
"""

import ast
import base64
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from importlib import import_module, metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lit_qlora import demo
from lit_qlora.cli import FIT_AND_KIN, TOOLS, main
from lit_qlora.tools.chat import chat

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"
CELLS = {cell["id"]: cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]}
CODE = {name: "".join(cell["source"]) for name, cell in CELLS.items() if cell["cell_type"] == "code"}
KAGGLE = ROOT / "notebooks" / "kaggle.ipynb"
KAGGLE_CELLS = {cell["id"]: cell for cell in json.loads(KAGGLE.read_text(encoding="utf-8"))["cells"]}
KAGGLE_CODE = {name: "".join(cell["source"]) for name, cell in KAGGLE_CELLS.items() if cell["cell_type"] == "code"}

# As it is committed


def test_it_is_a_notebook_and_nobodys_run_of_it():
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.metadata.accelerator, notebook.metadata.colab.gpuType) == (4, "GPU", "T4")
    assert [(cell.outputs, cell.execution_count) for cell in notebook.cells if cell.cell_type == "code"] == [
        ([], None)
    ] * len(CODE)


def test_the_saved_copy_has_these_cells_and_what_each_printed_as_one_text():
    cells = json.loads((ROOT / "docs" / "colab-demo.ipynb").read_text(encoding="utf-8"))["cells"]
    assert ["".join(cell["source"]) for cell in cells] == ["".join(cell["source"]) for cell in CELLS.values()]
    for cell in cells:
        printed = [output["name"] for output in cell.get("outputs", ()) if output["output_type"] == "stream"]
        assert len(printed) == len({*printed}), "run python scripts/notebook.py"


@pytest.mark.parametrize("cell", [*CODE.values(), *KAGGLE_CODE.values()], ids=[*CODE, *KAGGLE_CODE])
def test_each_cell_opens_with_what_it_does_and_how_long_it_takes(cell):
    assert re.fullmatch(r"# @title [A-Z].+; (at once|.*(seconds?|minutes?|hours?)\b.*)", cell.splitlines()[0])


def _statements(source: str) -> list[str]:
    """The lines of a cell without its comments."""
    return [line for line in source.splitlines() if not line.startswith("#")]


def test_kaggles_cells_are_colabs_but_for_those_that_know_the_place():
    import nbformat

    notebook = nbformat.read(KAGGLE, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.metadata.kaggle.isInternetEnabled, notebook.metadata.kaggle.accelerator) == (True, "nvidiaTeslaT4")
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code"] == [[]] * len(KAGGLE_CODE)
    assert [*CODE][:4] == [*KAGGLE_CODE][:4]
    assert {*CODE} ^ {*KAGGLE_CODE} == {"earlier", "tensorboard"}
    shared = {*CODE} & {*KAGGLE_CODE} - {"settings", "gpu", "accounts"}
    assert {name: _statements(KAGGLE_CODE[name]) for name in shared} == {
        name: _statements(CODE[name]) for name in shared
    }
    assert KAGGLE_CODE["settings"].partition("\nimport os")[2] == CODE["settings"].partition("\nimport os")[2]
    words = {name: "".join(cell["source"]) for name, cell in KAGGLE_CELLS.items() if cell["cell_type"] == "markdown"}
    assert [text.split("\n")[0][:5] for text in [*words.values()][1:]] == [f"## {number}." for number in range(1, 7)]
    for name in ("text-look", "text-train", "text-results"):
        assert words[name] == "".join(CELLS[name]["source"])
    for habit in ("Internet", "GPU T4 x2", "`/kaggle/working`", "Save Version", "Add Input"):
        assert habit in words["title"]


def test_what_cells_import_of_the_project_is_there():
    imported = [
        (node.module, alias.name)
        for source in CODE.values()
        for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE)))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lit_qlora")
        for alias in node.names
    ]
    assert imported
    for module, name in imported:
        assert hasattr(import_module(module), name), f"{module}.{name}"


def test_commands_exist():
    named = re.findall(r"python main\.py ([\w-]+)", "\n".join(CODE.values()))
    assert {*named} == {"doctor", "plan", "inspect", "fit", "report", "evaluate", "chat", "merge", "push"}
    assert {*named} <= {*FIT_AND_KIN, *TOOLS, "doctor"}
    assert "chat --web --share" in CODE["chat"] and {"web", "share"} <= {*inspect.signature(chat).parameters}


# Single cells


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Runs the first cell; returns what it defines."""

    def settings(**given) -> dict:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GIT_TERMINAL_PROMPT", "1")
        for name, value in given.items():
            monkeypatch.setenv(f"LIT_QLORA_{name}", value)
        names: dict = {}
        exec(CODE["settings"], names)
        return names

    return settings


def test_the_settings_become_options_of_fit(settings, tmp_path):
    names = settings()
    assert [*map(str, names["FIT"])] == ["--config", "configs/colab_t4_1k.yaml", "--run", "runs/colab_t4_1k"]
    assert (names["PUSH_TO"], names["FOLDER"]) == ("", tmp_path / "lit-qlora")
    names = settings(
        CONFIG="configs/demo.yaml", RUN="mine", MIRROR=" /drive/x ", OPTIONS="--data.source 'my rows.jsonl'"
    )
    assert [*map(str, names["FIT"])] == [
        "--config", "configs/demo.yaml", "--run", "runs/mine", "--mirror", "/drive/x", "--data.source", "my rows.jsonl",
    ]  # fmt: skip


def test_a_file_of_ones_own_is_given_by_the_form(settings, tmp_path):
    (tmp_path / "my rows.jsonl").touch()
    names = settings(CONFIG="configs/demo.yaml", DATA="my rows.jsonl")
    assert [*map(str, names["FIT"])][-2:] == ["--data.source", str(tmp_path / "my rows.jsonl")]
    assert settings(DATA="owner/name")["FIT"][-2:] == ["--data.source", "owner/name"]


def test_the_first_cell_once_more_and_after_a_restart(settings, tmp_path):
    """The cells below went into the project's folder, and the form's files lie beside the notebook."""
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "lit-qlora").mkdir()
    (tmp_path / "lit-qlora" / "main.py").touch()
    names = settings(CONFIG="mine.yaml", DATA="rows.jsonl", RUN="~/runs/a")
    before = [*map(str, names["FIT"])]
    assert before == [
        "--config", str(tmp_path / "mine.yaml"), "--run", str(Path.home() / "runs" / "a"),
        "--data.source", str(tmp_path / "rows.jsonl"),
    ]  # fmt: skip
    assert Path.cwd() == tmp_path / "lit-qlora"  # where a cell without the install before it finds main.py
    exec(CODE["settings"], names)
    assert [*map(str, names["FIT"])] == before


@pytest.mark.parametrize("options", ["--help", "--print_config"])
def test_options_that_train_nothing_end_run_all(cell, tmp_path, options):
    """`fit` does what they ask for, and ends with status 0."""
    with pytest.raises(Exception, match="nothing was trained: OPTIONS in the first cell") as failure:
        cell("fit", OPTIONS=options, RUN=str(tmp_path / "mine"))
    assert failure.value._render_traceback_() == [f"Stopped: {failure.value}"]


def test_each_part_opens_with_words_on_it():
    kinds = [cell["cell_type"] for cell in CELLS.values()]
    texts = ["".join(cell["source"]) for cell in CELLS.values() if cell["cell_type"] == "markdown"]
    assert [text.split("\n")[0][:5] for text in texts[1:]] == [f"## {number}." for number in range(1, 7)]
    assert kinds[:2] == ["markdown", "markdown"]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, ["demo"]),
        ({"RUN": "mine"}, ["mine"]),
        ({"RUN": "my first run"}, ["my first run"]),
        ({"RUN": "elsewhere/mine"}, ["elsewhere", "mine"]),
    ],
)
def test_a_run_is_called_as_the_form_says(settings, given, names):
    folder = settings(CONFIG="configs/demo.yaml", **given)["RUN_FOLDER"]
    assert folder == (Path(*names) if "elsewhere" in names else Path("runs", *names))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"CONFIG": " "}, "CONFIG in the first cell is empty"),
        ({"OPTIONS": "--data.source 'my rows"}, "OPTIONS in the first cell: No closing quotation"),
        ({"OPTIONS": "--run mine"}, "--run has a field of its own; put its value into RUN"),
        ({"OPTIONS": "--run=mine"}, "--run has a field of its own; put its value into RUN"),
        ({"OPTIONS": "-c my.yaml"}, "-c has a field of its own; put its value into CONFIG"),
        ({"OPTIONS": "--mirror /drive"}, "--mirror has a field of its own; put its value into MIRROR"),
    ],
)
def test_a_form_that_cannot_be_meant_is_reported_in_one_line(settings, given, words):
    with pytest.raises(Exception, match=words) as failure:
        settings(**given)
    assert failure.value._render_traceback_() == [f"Stopped: {failure.value}"]


@pytest.fixture
def cell(settings, monkeypatch):
    """Runs a cell after the first, in the project's folder; returns the commands that it ran, and all names."""

    def cell(name: str, *, more: dict | None = None, **given) -> tuple[list[list[str]], dict]:
        names = settings(**given)
        monkeypatch.chdir(ROOT)
        commands: list[list[str]] = []
        names |= {"run": lambda *words: commands.append([*map(str, words)])} | (more or {})
        exec(CODE[name], names)
        return commands, names

    return cell


@pytest.mark.parametrize(
    ("given", "judged"),
    [
        ({}, ["configs/colab_t4_1k.yaml"]),
        ({"CONFIG": "configs/demo.yaml"}, ["configs/demo.yaml"]),
        ({"OPTIONS": "--save_every_steps 40"}, ["configs/colab_t4_1k.yaml"]),
        (
            {"OPTIONS": "--model.base meta-llama/Llama-2-7b-hf"},
            ["configs/colab_t4_1k.yaml", "--base", "meta-llama/Llama-2-7b-hf"],
        ),
        (
            {"OPTIONS": "--model.rank 8 --model.base=mine/base --model.alpha 8"},
            ["configs/colab_t4_1k.yaml", "--base", "mine/base"],
        ),
    ],
)
def test_doctor_judges_what_will_be_trained(cell, given, judged):
    assert cell("doctor", **given)[0] == [["python main.py doctor --config", *judged]]


def test_a_config_that_is_not_there_is_reported(cell):
    with pytest.raises(Exception, match=r"no file configs/colab_t4_2k\.yaml; did you mean .*colab_t4_1k") as failure:
        cell("doctor", CONFIG="configs/colab_t4_2k.yaml")
    assert failure.value._render_traceback_() == [f"Stopped: {failure.value}"]


def test_any_question_is_asked_and_none_is_no_failure(cell, capsys):
    run = ["python main.py chat --run", "runs/colab_t4_1k"]
    question = "What is the difference between a llama and an alpaca?"
    assert cell("chat")[0] == [[*run, f"--prompt={question}"]]
    assert cell("chat", QUESTION="-- or ' what?")[0] == [[*run, "--prompt=-- or ' what?"]]
    assert cell("chat", QUESTION="")[0] == []
    assert capsys.readouterr().out == "QUESTION in the first cell is empty.\n"


def test_what_is_pushed_is_there(cell, tmp_path, capsys):
    more = {"MERGED": tmp_path / "merged"}
    assert cell("push", more=more)[0] == []
    assert capsys.readouterr().out == "Nothing is sent: PUSH_TO in the first cell is empty.\n"
    push = ["python main.py push --yes --to", "ann/isles"]
    assert cell("push", more=more, PUSH_TO="ann/isles")[0] == [[*push, "--run", "runs/colab_t4_1k"]]
    with pytest.raises(Exception, match=r"PUSH in the first cell .* merged model, .* made none"):
        cell("push", more=more, PUSH_TO="ann/isles", PUSH="merged model")
    (tmp_path / "merged").mkdir()
    found = cell("push", more=more, PUSH_TO="ann/isles", PUSH="merged model")[0]
    assert found == [[*push, "--folder", str(tmp_path / "merged")]]


def test_a_merge_that_is_switched_off(settings):
    assert settings()["MERGE"] is True and settings(MERGE="False")["MERGE"] is False


def test_a_program_has_a_terminal_and_its_failure_ends_run_all(settings, capsys):
    names = settings()
    run, stopped = names["run"], names["StoppedError"]
    run("python -c", "import sys; print(sys.stdout.isatty(), 'ü')")
    assert capsys.readouterr().out.splitlines()[1:] == ["True ü"]
    with pytest.raises(stopped, match=r"^python -c .*: status 2; .* above$") as failure:
        run("python -c", "raise SystemExit(2)")
    assert failure.value._render_traceback_() == [f"Stopped: {failure.value}"]
    with pytest.raises(stopped, match="status 137"):
        run("python -c", "import os; os.kill(os.getpid(), 9)")


def test_an_interrupted_cell_waits_for_the_save(settings, capsys):
    code = """
import signal, sys, time
def stop(*_):
    time.sleep(1.5)
    print("saved")
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print("begun", flush=True)
time.sleep(60)
"""
    names, shown = settings(), []

    def pressed_once_begun(*words, **how):
        print(*words, **how)
        shown.append(words[-1].strip())  # which a busy terminal may give in pieces
        if words[-1].strip() and "".join(shown).endswith("begun"):
            signal.raise_signal(signal.SIGINT)

    names["print"] = pressed_once_begun
    with pytest.raises(names["StoppedError"], match="status 130"):
        names["run"]("python -c", code)
    assert capsys.readouterr().out.splitlines()[-1].endswith("saved")


def test_without_a_gpu_it_says_how_to_choose_one(settings, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    names = settings(CONFIG="configs/colab_t4.yaml")
    with pytest.raises(names["StoppedError"], match="choose Runtime, Change runtime type, T4 GPU, Save, then Run all"):
        exec(CODE["gpu"], names)
    exec(CODE["gpu"], settings(CONFIG="configs/demo.yaml"))
    assert capsys.readouterr().out == "No GPU here.\n" * 2


def test_a_gpu_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Tesla T4, 15360 MiB'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    exec(CODE["gpu"], {"Path": Path, "CONFIG": "configs/colab_t4.yaml"})
    assert capsys.readouterr().out == "Tesla T4, 15360 MiB\n"


FORM = dict.fromkeys(("CONFIG", "DATA", "RUN", "OPTIONS", "MIRROR"), "")


@pytest.fixture
def on_colab(monkeypatch):
    """A stand-in for google.colab; returns its secrets and the places where the drive was mounted."""
    secrets, mounted = {}, []
    userdata = SimpleNamespace(get=secrets.__getitem__)
    package = ModuleType("google.colab")
    package.userdata, package.drive = userdata, SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setenv("HF_TOKEN", "")
    return secrets, mounted


def test_the_token_comes_from_colabs_secrets_and_is_not_shown(on_colab, capsys):
    on_colab[0]["HF_TOKEN"] = "hf_canary"
    exec(CODE["accounts"], {"os": os, **FORM})
    assert os.environ["HF_TOKEN"] == "hf_canary"
    assert capsys.readouterr().out == "A token of the hub is set.\n"
    assert on_colab[1] == []


@pytest.mark.parametrize(
    "given", [{"MIRROR": "/content/drive/MyDrive/lit-qlora"}, {"DATA": "/content/drive/MyDrive/my.jsonl"},
              {"OPTIONS": "--model.base '/content/drive/MyDrive/a base'"}]
)  # fmt: skip
def test_without_a_secret_all_is_well(on_colab, capsys, given):
    exec(CODE["accounts"], {"os": os, **FORM, **given})
    assert capsys.readouterr().out.splitlines() == [
        "Colab's secrets give no HF_TOKEN (KeyError).",
        "No token: gated bases and push need one, nothing else.",
    ]
    assert on_colab[1] == ["/content/drive"]


@pytest.mark.parametrize("where", ["", "notebooks"])
def test_inside_a_clone_it_finds_the_project_and_leaves_it_as_it_is(monkeypatch, capsys, where):
    monkeypatch.chdir(ROOT / where)
    names: dict = {}
    exec(CODE["settings"], names)
    commands: list[str] = []
    names |= {"subprocess": None, "run": lambda *words: commands.append(" ".join(words))}
    exec(CODE["install"], names)
    assert names["FOLDER"] == Path.cwd() == ROOT
    assert [command.partition(" torch==")[0] for command in commands[:1]] == [
        "python -m pip install -q -r requirements.txt"
    ]
    assert capsys.readouterr().out.startswith(f"This notebook was opened inside {ROOT}, which is taken as it is.\n")


@pytest.fixture
def install(settings, tmp_path, monkeypatch, capsys):
    """Runs the cell beside a clone that can't be updated; returns the commands that it ran, and what it said."""
    subprocess.run(["git", "init", "-q", tmp_path / "lit-qlora"], check=True)

    def install(*versions: tuple[str, str]) -> tuple[list[str], str]:
        """``versions`` are what the packages are said to have, one for each time that it is asked for."""
        offered = list(versions)
        commands: list[str] = []

        def version(package):
            found = next((pair for pair in offered if pair[0] == package), None)
            if found is None:
                raise metadata.PackageNotFoundError
            offered.remove(found)
            return found[1]

        monkeypatch.setattr(metadata, "version", version)
        names = settings() | {"subprocess": subprocess, "run": lambda *words: commands.append(" ".join(words))}
        exec(CODE["install"], names)
        return commands, capsys.readouterr().out

    return install


def test_pip_leaves_torch(install):
    commands, said = install(("torch", "2.11.0+cu128"), *[("torch", "2.11.0+cu128")] * 2)
    assert commands == ["python -m pip install -q -r requirements.txt torch==2.11.0+cu128"]
    assert said.splitlines() == [
        "The project could not be updated; going on with the version that is here.",
        "torch 2.11.0+cu128 before, 2.11.0+cu128 now",
    ]


def test_another_torch_is_no_good_end(install):
    with pytest.raises(AssertionError, match="another torch was installed: restart the session"):
        install(("torch", "2.11.0"), *[("torch", "2.13.0")] * 2)


@pytest.mark.parametrize(("version", "is_removed"), [("0.10.0", True), ("0.16.0", False), ("0.17.0+cu128", False)])
def test_an_old_torchao_is_removed(install, version, is_removed):
    commands, said = install(*[("torch", "2.11.0")] * 3, ("torchao", version))
    assert commands[1:] == ["python -m pip uninstall -q -y torchao"] * is_removed
    assert (f"torchao {version} was removed: peft needs 0.16 or none" in said) == is_removed


# Kaggle's own


@pytest.fixture
def on_kaggle(tmp_path, monkeypatch):
    """Runs a cell of Kaggle's after its first, in an empty folder; returns all names. ``cards`` are the GPUs there."""

    def on_kaggle(name: str, *, cards: tuple[str, ...] = ("Tesla T4",) * 2, **given) -> dict:
        programs = tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        lines = "".join(f"echo '{card}, 15360 MiB'\n" for card in cards)
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
        (programs / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.chdir(tmp_path)
        for field, value in given.items():
            monkeypatch.setenv(f"LIT_QLORA_{field}", value)
        names: dict = {}
        exec(KAGGLE_CODE["settings"], names)
        exec(KAGGLE_CODE[name], names | {"shutil": shutil})
        return names

    return on_kaggle


def test_kaggle_trains_on_both_cards_and_ends_in_time(on_kaggle, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: SimpleNamespace(close=lambda: None))
    names = on_kaggle("gpu")
    assert [*map(str, names["FIT"])] == [
        "--config", "configs/kaggle_2xt4.yaml", "--run", "runs/kaggle_2xt4", "--max_time", "00:11:00:00",
    ]  # fmt: skip
    assert names["MERGE"] is False


@pytest.mark.parametrize(
    ("cards", "given", "words"),
    [
        ((), {}, r"is for 2 GPUs, and there are 0: choose Settings, Accelerator, GPU T4 x2"),
        (("Tesla P100-PCIE-16GB",), {}, "is for 2 GPUs, and there is 1"),
        (("Tesla T4",), {"OPTIONS": "--trainer.devices 1"}, None),
        ((), {"OPTIONS": "--trainer.devices 1"}, "is for 1 GPU, and there are 0"),
        ((), {"CONFIG": "configs/colab_t4.yaml"}, "is for 1 GPU, and there are 0"),
        ((), {"CONFIG": "configs/demo.yaml"}, None),
        (("Tesla T4",) * 2, {}, None),
    ],
)
def test_kaggle_names_the_cards_and_how_to_have_both(on_kaggle, monkeypatch, capsys, cards, given, words):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: SimpleNamespace(close=lambda: None))
    if words is None:
        on_kaggle("gpu", cards=cards, **given)
    else:
        with pytest.raises(Exception, match=words) as failure:
            on_kaggle("gpu", cards=cards, **given)
        assert failure.value._render_traceback_() == [f"Stopped: {failure.value}"]
    assert capsys.readouterr().out == "".join(f"{card}, 15360 MiB\n" for card in cards) or "No GPU here.\n"


def test_kaggle_says_how_to_switch_the_internet_on(on_kaggle, monkeypatch):
    def off(*_, **__):
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "create_connection", off)
    with pytest.raises(Exception, match=r"github\.com can't be reached: choose Settings, Turn on Internet"):
        on_kaggle("gpu")
    on_kaggle("gpu", REPOSITORY="/kaggle/input/lit-qlora")  # a clone among the inputs needs none


def test_the_token_comes_from_kaggles_secrets_and_is_not_shown(on_kaggle, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "")
    secrets: dict[str, str] = {}
    package = ModuleType("kaggle_secrets")
    package.UserSecretsClient = lambda: SimpleNamespace(get_secret=secrets.__getitem__)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", package)
    on_kaggle("accounts")
    assert capsys.readouterr().out.splitlines() == [
        "Kaggle's secrets give no HF_TOKEN (KeyError).",
        "No token: gated bases and push need one, nothing else.",
    ]
    secrets["HF_TOKEN"] = "hf_canary"
    on_kaggle("accounts")
    assert os.environ["HF_TOKEN"] == "hf_canary"
    assert capsys.readouterr().out == "A token of the hub is set.\n"


@pytest.mark.parametrize("where", ["notebook/lit-qlora", "notebooks/ann/llama/lit-qlora"])
def test_kaggle_takes_the_run_of_the_latest_version_among_the_inputs(on_kaggle, tmp_path, monkeypatch, capsys, where):
    inputs = tmp_path / "input"
    monkeypatch.setenv("LIT_QLORA_INPUTS", str(inputs))
    on_kaggle("earlier")
    assert capsys.readouterr().out == "No input has a run kaggle_2xt4: it begins.\n"
    for version, step in (("first", 50), ("second", 100), ("other", 900)):
        run = inputs / version / where / "runs" / ("another" if version == "other" else "kaggle_2xt4")
        (run / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
        (run / "config.yaml").write_text(version)
        for path in (*run.rglob("*"), run):
            path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "lit-qlora" / "earlier").mkdir(parents=True)  # of a copy that was cut
    on_kaggle("earlier")
    run = tmp_path / "runs" / "kaggle_2xt4"
    assert (run / "config.yaml").read_text() == "second" and not (tmp_path / "lit-qlora" / "earlier").exists()
    assert capsys.readouterr().out.endswith("up to step-00000100.\n")
    assert run.stat().st_mode & 0o777 == 0o755 and (run / "config.yaml").stat().st_mode & 0o777 == 0o644
    (run / "config.yaml").write_text("here")
    on_kaggle("earlier")
    assert capsys.readouterr().out == "runs/kaggle_2xt4 is here, and is taken.\n"
    assert (run / "config.yaml").read_text() == "here"


@pytest.mark.slow
def test_a_run_that_was_taken_from_an_input_resumes(on_kaggle, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "input" / "version" / "runs" / "demo"
    options = ["--samples.count", "0", "--trainer.limit_val_batches", "1", "--save_every_steps", "2"]
    assert main(["fit", "--run", str(kept), *options, "--trainer.max_steps", "2"]) == 0
    for path in (*kept.rglob("*"), kept):
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setenv("LIT_QLORA_INPUTS", str(tmp_path / "input"))
    on_kaggle("earlier", CONFIG="configs/demo.yaml")
    assert main(["fit", "--run", "demo", *options, "--trainer.max_steps", "3"]) == 0
    assert "resuming from step-00000002" in capsys.readouterr().out


# All of them, in an environment of their own


def _module(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # which its dataclass looks itself up in
    spec.loader.exec_module(module)
    return module


def _environment(folder: Path) -> Path:
    """The folder of programs of a new virtual environment in ``folder``, with a kernel called fresh."""
    bin_folder = folder / "venv" / "bin"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(str(Path(pytest.__file__).parents[1]))
    (bin_folder / "tensorboard").symlink_to(Path(sys.executable).with_name("tensorboard"))
    jupyter = [bin_folder / "python", "-m", "ipykernel", "install", "--prefix", folder / "jupyter", "--name", "fresh"]
    subprocess.run(jupyter, check=True, stdout=subprocess.DEVNULL)
    return bin_folder


def _client(place: Path, without: Collection[str] = (), notebook: Path = NOTEBOOK):
    """Whoever runs ``notebook``, from ``place``, but for some of its cells."""
    import nbformat
    from nbclient import NotebookClient

    resources = {"metadata": {"path": str(place)}}
    notebook = nbformat.read(notebook, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id not in without]
    return NotebookClient(notebook, kernel_name="fresh", timeout=600, resources=resources)


def _shown(notebook) -> dict[str, str]:
    """The text below each cell; pictures as their base64."""
    shown = {}
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        parts = [part.get("text") or part.data.get("image/png") or part.data.get("text/html", "") for part in outputs]
        shown[cell.id] = "".join(parts)
    return shown


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Runs a notebook as it is shipped inside a clone, in a kernel of its own; returns the clone and what is shown."""

    def shipped(
        notebook: Path, config: str, small: dict[str, str], cards: int, without: tuple[str, ...] = ()
    ) -> tuple[Path, dict[str, str]]:
        """``small`` replaces values in the config, ``cards`` are those that the driver's program names."""
        clone = tmp_path / "clone"
        for part in ("lit_qlora", "configs", "notebooks"):
            shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("main.py", "requirements.txt"):
            shutil.copyfile(ROOT / file, clone / file)
        rows = [{"text": f"<s>[INST] What is {n} and {n}? [/INST] It is {2 * n}. </s>"} for n in range(60)]
        (clone / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        shutil.copytree(demo.BASE, clone / "base")
        text = (clone / "configs" / config).read_text(encoding="utf-8")
        for value, instead in ({"NousResearch/Llama-2-7b-hf": "base"} | small).items():
            assert re.search(rf": {value}\b", text)
            text = text.replace(f": {value}", f": {instead}")
        (clone / "configs" / config).write_text(text, encoding="utf-8")

        bin_folder = _environment(tmp_path)
        names = "echo 'Tesla T4, 15360 MiB'\n" * cards
        (bin_folder / "nvidia-smi").write_text(
            f'#!/bin/sh\n[ "$1" = --query-gpu=name,memory.total ] || exit 1\n{names}'
        )
        (bin_folder / "nvidia-smi").chmod(0o755)  # for the notebook's check alone: doctor would miss the card's driver
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter" / "share" / "jupyter"))
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
        monkeypatch.setenv("PATH", str(bin_folder), prepend=os.pathsep)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LIT_QLORA_", "PYTHON"))}
        return clone, _shown(_client(clone / "notebooks", without, notebook).execute(env=kept))

    return shipped


@pytest.mark.slow(first=True)
def test_run_all_as_it_is_shipped_inside_a_clone(shipped):
    """Nothing is filled in and nothing set in the environment: the config alone names a small base and few rows."""
    clone, shown = shipped(NOTEBOOK, "colab_t4_1k.yaml", {"mlabonne/guanaco-llama2-1k": "rows.jsonl"}, 1)
    run = clone / "runs" / "colab_t4_1k"
    assert shown["gpu"] == "Tesla T4, 15360 MiB\n" and f"opened inside {clone}," in shown["install"]
    assert "problems: 0" in shown["doctor"] and "base: base may be read" in shown["doctor"]
    assert "iframe" in shown["tensorboard"] and _size_of_picture(shown["curves"]) == (896, 496)
    assert (run / "finished.json").is_file() and shown["evaluate"] and shown["chat"]
    (merged,) = (clone / "merged").iterdir()
    assert (merged / "model.safetensors").is_file() and shown["push"].startswith("Nothing is sent")


@pytest.mark.slow(first=True)
def test_kaggles_run_all_as_it_is_shipped_inside_a_clone(shipped):
    """Two processes stand in for two cards. Cells that are Colab's to the letter and train nothing ran there."""
    small = {"timdettmers/openassistant-guanaco": "rows.jsonl", "2048": "256", "1024": "256"}
    without = ("doctor", "inspect", "report", "evaluate", "merge", "push")
    clone, shown = shipped(KAGGLE, "kaggle_2xt4.yaml", small, 2, without)
    run = clone / "runs" / "kaggle_2xt4"
    assert shown["gpu"] == "Tesla T4, 15360 MiB\n" * 2 and "No input has a run kaggle_2xt4" in shown["earlier"]
    assert "on 2 such cards, each of which works " in shown["plan"]
    assert "train  2 devices, micro-batches dealt by size: each works " in shown["fit"]
    assert (run / "finished.json").is_file() and _size_of_picture(shown["curves"]) == (896, 496) and shown["chat"]


class Colab:
    """An environment with a kernel and torch, a drive, and a stand-in for the hub."""

    def __init__(self, folder: Path, hub_url: str, token: str) -> None:
        self.folder, self.python = folder, _environment(folder) / "python"
        self.mirror = folder / "drive" / "lit-qlora"
        self.mirror.parent.mkdir()
        (self.mirror.parent / "photo.jpg").touch()  # an empty folder would be the place of a drive without it
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "VIRTUAL"))}
        own = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub_url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
        settings = {
            "REPOSITORY": str(ROOT), "CONFIG": "configs/demo.yaml", "OPTIONS": "--save_every_steps 40",
            "MIRROR": str(self.mirror), "QUESTION": "Does Opal live alone?",
        }  # fmt: skip
        self.environment = kept | own | {f"LIT_QLORA_{name}": value for name, value in settings.items()}

    def machine(self, name: str) -> Path:
        """A disk, and on it the place where a notebook starts; Colab's torchao is there again."""
        pip = [self.python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "torchao==0.10.0"], check=True, stdout=subprocess.DEVNULL)
        (self.folder / name / "tmp").mkdir(parents=True)
        return self.folder / name

    def client(self, machine: Path, without: Collection[str] = (), **settings: str):
        """Whoever runs the notebook, but for some of its cells; and how."""
        client = _client(machine, without)
        given = {f"LIT_QLORA_{name}": value for name, value in settings.items()}
        return client, {"env": self.environment | given | {"TMPDIR": str(machine / "tmp")}}

    def run_all(self, machine: Path, without: Collection[str] = (), **settings: str) -> dict[str, str]:
        """What stands below each cell."""
        client, how = self.client(machine, without, **settings)
        notebook = client.execute(**how)
        (machine / "executed.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
        return _shown(notebook)

    def still_running(self) -> list[str]:
        """The commands of processes that were started from here, after some time to end."""
        for _ in range(100):
            found = [*self._running()]
            if not found:
                break
            time.sleep(0.2)
        return found

    def _running(self):
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != os.getpid():
                try:
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:  # it has just ended
                    continue
                if str(self.folder) in command:
                    yield command


@pytest.fixture(scope="module")
def hub():
    server = _module(ROOT / "tests" / "tools" / "hub_server.py")
    hub = server.FakeHub()
    hub.token = server.TOKEN
    yield hub
    hub.close()


BEFORE = ("doctor", "plan", "inspect", "tensorboard")
"""Cells before the training, which leave no files: once is enough."""


@pytest.mark.slow(first=True)
def test_run_all_resumes_after_a_disconnect_and_once_more(tmp_path, hub, monkeypatch):
    from nbclient.exceptions import DeadKernelError

    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter" / "share" / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    colab = Colab(tmp_path, hub.url, hub.token)

    # A machine that goes away once a checkpoint is on the drive.
    first = colab.machine("first")
    client, how = colab.client(first, BEFORE)

    def cut() -> None:
        for _ in range(6000):
            if [*colab.mirror.glob("demo/checkpoints/step-*/manifest.json")]:
                os.killpg(client.km.provisioner.pid, signal.SIGKILL)
                return
            time.sleep(0.05)

    cutter = threading.Thread(target=cut)
    cutter.start()
    with pytest.raises(DeadKernelError):
        client.execute(**how)
    cutter.join()
    assert colab.still_running() == []
    assert not (first / "lit-qlora" / "runs" / "demo" / "finished.json").exists()

    # The next one: from the drive to the end, and all that comes after.
    second = colab.machine("second")
    shown = colab.run_all(second)
    run = second / "lit-qlora" / "runs" / "demo"
    assert re.search(r"^torch (2\.[\w.+]+) before, \1 now$", shown["install"], re.MULTILINE)
    assert "torchao 0.10.0 was removed" in shown["install"]
    assert "problems: 0" in shown["doctor"] and "fits: " in shown["plan"]
    # At 40, or where the hang-up of its terminal found the run, which then saved.
    resumed = re.search(r"resuming from step-0*(\d+)", shown["fit"])
    assert resumed and 40 <= int(resumed[1]) < 212
    assert re.search(r"train 100%\|█+\| 212/212 .*loss [\d.]+, [\d,]+ tokens/s", shown["fit"])
    assert "\x1b[A" not in shown["fit"]  # no notebook obeys it: each would leave a line of the bar
    losses = [
        line["val/loss"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "val/loss" in line
    ]
    assert losses[-1] < losses[0] / 10
    assert "iframe" in shown["tensorboard"]
    assert _size_of_picture(shown["curves"]) == (896, 496)
    # A notebook's commands see a terminal of 80 columns: intervals stand below their values.
    assert re.search(r"perplexity +7\.00\d* +1\.0\d+ +-5\.9\d*\r?\n +\[.*\] +\[1\.0.*\] +\[", shown["evaluate"])
    assert "goat" in shown["chat"].splitlines()[-1]
    (merged,) = (second / "lit-qlora" / "merged").iterdir()
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert merged.name == f"demo-step-212-{hashlib.sha256(weights).hexdigest()[:8]}"
    assert f" MB of float16 in merged/{merged.name}" in " ".join(shown["merge"].split())
    assert (merged / "model.safetensors").is_file()
    assert shown["push"].startswith("Nothing is sent")
    assert hub.repositories == {} and colab.still_running() == []

    # And again.
    shown = colab.run_all(second, {*BEFORE, "report", "evaluate"}, PUSH_TO="ann/isles")
    assert "runs/demo is finished (212 of 212 steps): nothing to do." in shown["fit"]
    assert "goat" in shown["chat"].splitlines()[-1] and _size_of_picture(shown["curves"]) == (896, 496)
    assert shown["merge"] == f"merged/{merged.name} is there already.\n"
    repository = hub.repositories["ann/isles"]
    assert (
        repository.private
        and repository.files["adapter_model.safetensors"]
        == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    assert colab.still_running() == []

    files = [file for place in (first, second, colab.mirror) for file in place.rglob("*") if file.is_file()]
    assert (second / "executed.ipynb") in files
    assert [file for file in files if hub.token.encode() in file.read_bytes()] == []


def _size_of_picture(shown: str) -> tuple[int, int]:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(shown))).size
