"""The package: what pip installs is all that a run needs, its bounds stand in one place, and its command is main.py."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from argparse import ArgumentTypeError
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from setuptools import find_packages

import lit_qlora
from lit_qlora import place
from lit_qlora.cli import main
from lit_qlora.place import CONFIGS, find_config, requirements
from lit_qlora.tools.doctoring import surroundings
from scripts.address import address, checked, move
from tests.expect import ExpectError

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAMED = r"github(?:\.com)?/([\w.-]+/[\w.-]*(?:qlora|QLORA)[\w-]*)"
"""An address of this project, whoever has it: with a page of GitHub after it, or Colab's."""


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def lines_of(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if re.match(r"[\w-]", line) and not line.startswith("-r")]


# What is in it


def test_each_file_of_the_package_is_installed() -> None:
    """Modules by their folder's __init__.py; all else by a pattern of pyproject.toml."""
    packages = find_packages(str(ROOT), include=["lit_qlora", "lit_qlora.*"])
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    data = [f"{package.replace('.', '/')}/{one}" for package, given in patterns.items() for one in given]
    for file in (ROOT / "lit_qlora").rglob("*"):
        name = file.relative_to(ROOT).as_posix()
        if file.is_dir() or "__pycache__" in name:
            continue
        if file.suffix == ".py":
            assert ".".join(file.relative_to(ROOT).parts[:-1]) in packages, name
        else:
            assert any(fnmatch(name, pattern) for pattern in data), name
    assert {file.suffix for file in CONFIGS.iterdir()} == {".yaml"}


def test_its_setup_names_the_folder_of_configs_which_is_there_once() -> None:
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)
                and node.arg == "package_dir")  # fmt: skip
    assert ast.literal_eval(call.value) == {"lit_qlora.configs": "configs"}
    assert [file for file in tracked() if file.name == "demo.yaml"] == [ROOT / "configs" / "demo.yaml"]


def test_the_bounds_stand_in_requirements_txt_alone() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version", "dependencies"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    assert PYPROJECT["project"]["optional-dependencies"]["web"] == lines_of("requirements-web.txt")
    assert requirements() == lines_of("requirements.txt")


@pytest.mark.parametrize("name", sorted(file.name for file in ROOT.glob("requirements*.txt")))
def test_each_bound_bears_its_reason(name: str) -> None:
    before = "#"
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        bound = re.search(r"[<=>]=?[\d.]+", line) if re.match(r"[\w-]", line) else None
        assert bound is None or before.startswith("#"), f"no reason stands before {line}"
        before = line


def test_an_installed_package_knows_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "CLONE", None)
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch<2.14,>=2.11", 'gradio<6; extra == "web"'])
    assert requirements() == ["torch<2.14,>=2.11"]
    assert surroundings._required() == ["torch"]
    assert [finding.text.split()[0] for finding in surroundings.packages()] == ["torch"]


# Its version and its address


def test_the_version_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lit-qlora {lit_qlora.__version__}\n"
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert first and cited
    assert [first[1], cited[1]] == [lit_qlora.__version__] * 2


def test_the_address_is_one() -> None:
    own = address().removeprefix("https://github.com/")
    found = {}
    for file in tracked():
        if file.suffix in (".md", ".ipynb", ".cff", ".yml", ".toml"):
            found[file.name] = set(re.findall(NAMED, file.read_text(encoding="utf-8")))
    assert {name: others for name, others in found.items() if others - {own, f"{own}.git"}} == {}
    assert all(found[name] for name in ("README.md", "colab.ipynb", "CITATION.cff", "pyproject.toml"))


def test_the_address_moves_everywhere_at_once(tmp_path: Path) -> None:
    text = {
        "pyproject.toml": '[project.urls]\nRepository = "https://github.com/lit-qlora/lit-qlora"\n',
        "README.md": "https://colab.research.google.com/github/lit-qlora/lit-qlora/blob/main/x.ipynb\n",
        "docs.md": "git clone https://github.com/lit-qlora/lit-qlora.git; https://github.com/others/lit-qlora\n",
        "other.md": "lit-qlora/lit-qlora\n",
    }
    for name, content in text.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    subprocess.run("git init -q && git add .", shell=True, cwd=tmp_path, check=True)
    assert move(checked("https://github.com/ann/tuner/"), tmp_path) == ["README.md", "docs.md", "pyproject.toml"]
    assert address(tmp_path) == "https://github.com/ann/tuner"
    assert (tmp_path / "README.md").read_text() == text["README.md"].replace("lit-qlora/lit-qlora", "ann/tuner")
    assert (tmp_path / "docs.md").read_text().split("; ")[0] == "git clone https://github.com/ann/tuner.git"
    assert (tmp_path / "docs.md").read_text().endswith("https://github.com/others/lit-qlora\n")
    for wrong in ("ann/tuner", "https://github.com/ann", "https://example.org/ann/tuner", "https://github.com/a b/c"):
        with pytest.raises(ArgumentTypeError, match=r"expected https://github.com/OWNER/NAME"):
            checked(wrong)


# Its configs by name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_bare_name_finds_a_config_of_the_project(here: Path) -> None:
    assert find_config("colab_t4") == find_config("colab_t4.yaml") == str(CONFIGS / "colab_t4.yaml")
    for other in ("./colab_t4", "configs/colab_t4.yaml", "colab_t5", "", ".", "..", "colab_t4.yml", "/demo"):
        assert find_config(other) == other
    (here / "demo").mkdir()  # a folder is no config
    assert find_config("demo") == str(CONFIGS / "demo.yaml")
    (here / "colab_t4").write_text("run: mine\n")
    assert find_config("colab_t4") == "colab_t4"


@pytest.mark.parametrize("given", [["--config", "demo"], ["--config=demo"], ["-c", "demo.yaml"], ["-c=demo"]])
def test_the_command_takes_it(here: Path, capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    assert main(["plan", *given, "--gpu", "t4"]) == 0
    assert re.match(r"demo in 4-bit, card: T4;.*\nfits: 0\.\d+ of 14\.56 GiB\n$", capsys.readouterr().out, re.DOTALL)


def test_doctor_takes_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config", "demo"]) == 0
    assert "base: demo may be read" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["colab_t5", "colab_t4.yml", "configs/colab_t4.yaml"])
def test_a_name_beside_it_is_reported(here: Path, expect_error: ExpectError, name: str) -> None:
    expect_error(["fit", "--config", name], f"no file {name}", "did you mean colab_t4?", option="config")


# As it is installed


def test_it_is_run_as_a_module(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lit_qlora", "--version"], cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"lit-qlora {lit_qlora.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["pip install .", "pip install -e ."])
def test_installed_it_works_from_anywhere(tmp_path: Path, here: Path, editable: bool) -> None:
    """The virtual environment is fresh; it sees this one's packages after its own, and nothing of the checkout."""
    subprocess.run(["git", "clone", "-q", str(ROOT), "source"], check=True)
    subprocess.run([sys.executable, "-m", "venv", "fresh"], check=True)
    fresh = here / "fresh" / "bin"
    pip = [fresh / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, *(["-e"] if editable else []), "./source"], check=True)
    site = subprocess.run(
        [fresh / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True,
        text=True, check=True,
    ).stdout.strip()  # fmt: skip
    Path(site, "behind.pth").write_text(sysconfig.get_path("purelib"))
    away = here / "away"
    away.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], cwd=away, capture_output=True, text=True, check=False,
                              env=environment)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = run(fresh / "python", "-c", "import lit_qlora, sys; print(lit_qlora.__file__)")
    assert Path(found.strip()).is_relative_to(here / "source" if editable else site)
    assert run(fresh / "lit-qlora", "plan", "--config", "colab_t4", "--gpu", "t4").splitlines()[-1].startswith("fits:")
    if editable:
        return
    few = ["--trainer.max_steps", "4", "--trainer.limit_val_batches", "1", "--samples.count", "0"]
    assert "best adapter: runs/demo/adapter" in run(fresh / "lit-qlora", "fit", *few)
    assert json.loads((away / "runs/demo/finished.json").read_text())["step"] == 4
    assert run(fresh / "lit-qlora", "doctor").startswith(f"     ok  lit-qlora {lit_qlora.__version__}")
    short = "train(max_steps=4, val_check_interval=2, folder=Path("
    (away / "mine.py").write_text((ROOT / "examples" / "train.py").read_text().replace("train(Path(", short))
    run(fresh / "python", "mine.py")
    assert (away / "my-run" / "adapter" / "adapter_model.safetensors").is_file()
