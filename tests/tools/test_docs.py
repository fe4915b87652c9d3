"""The pages: every command runs, every option named is one, every link leads somewhere, and nothing made has drifted.

A page's own files are made of its blocks with a title; a block that can't run here says why in a comment before it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from lit_qlora.cli import TOOLS, main
from lit_qlora.options import LINKED
from scripts import pages
from scripts.address import address
from scripts.pages_hook import on_page_markdown

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
ABOUT_THE_CODE = ("log.md", "files.md", "options.md")
"""Pages that name what was, or what is inside."""

FEW = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--samples.count", "0"]
"""Options that shorten a fit which says nothing of its length."""


class Block(NamedTuple):
    """A fenced block: the comment before it, its language, its title and its text."""

    mark: str
    language: str
    title: str
    text: str


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(
        r'(?:^<!-- ([^>]*) -->\n)?^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL
    )
    assert len(found) == text.count("\n```") / 2, f"a block of {page.name} is not understood"
    return [Block(*one) for one in found]


# Every command runs


def commands(block: Block) -> Iterator[str]:
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield re.sub(r"\s+# .*", "", line)


def run(command: str) -> None:
    words = shlex.split(command)
    if words[:2] == ["python", "main.py"] and not {"|", ">", "&&", "--trainer.devices"} & {*words}:
        if words[2] == "fit" and not re.search(r"max_steps|max_epochs|--config (callback|logger)", command):
            words += FEW
        assert main(words[2:]) == 0, command
        return
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": search, "PYTHONPATH": os.pathsep.join([str(ROOT), "."])}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stderr}"


WITH_COMMANDS = [page for page in PAGES if any(block.language == "bash" for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_every_command_of_a_page_runs(
    page: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    shutil.copy(ROOT / "main.py", "main.py")
    Path("configs").symlink_to(ROOT / "configs")
    Path("held.jsonl").write_text('{"text": "### Human: Who is Jonas?### Assistant: In Foxstead lives Jonas."}\n' * 2)
    for name, count in (("test", 2), ("dev", 5)):
        Path(name).mkdir()
        Path(name, f"letters_{name}.csv").write_text('"Which is the first letter?",A,B,C,D,A\n' * count)
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "bash" and not block.mark.startswith(("not run: ", "run: setup", "run: tests")):
            for command in commands(block):
                run(command)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_is_not_run_says_why(page: Path) -> None:
    for block in blocks(page):
        if block.mark.startswith("not run"):
            assert re.match(r"not run: \w.{15}", block.mark), block
        assert block.language != "python" or block.title or block.mark, f"no test would run {block.text}"


# What is named is there


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of each verb."""
    from importlib import import_module

    from lit_qlora.tools import doctor

    found = {
        verb: {"config", "print_config", *(one.option_strings[0].lstrip("-") for one in pages.fit_actions(verb))}
        for verb in ("fit", *pages.WITH_FIT_S)
    }
    found["test"] = found["validate"]
    for name in TOOLS:
        function = getattr(import_module(f"lit_qlora.tools.{name}"), name)
        found[name] = {action.dest for action in pages.tool_actions(function)}
    found["doctor"] = {action.dest for action in doctor.parser()._actions}
    return {verb: {*names, "help"} for verb, names in found.items()}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_verbs_and_options_that_it_names_are_there(page: Path, options: dict[str, set[str]]) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for verb, rest in re.findall(r"(?:python main\.py|`lit-qlora) (\w+)([^`\n|]*)", text, re.MULTILINE):
        assert verb in options, f"no verb {verb}"
        named = {name.removesuffix("+") for name in re.findall(r" --([\w.-]+\+?)", rest)}
        known = options[verb]  # and what such an option holds, as data.columns.user
        assert {name for name in named if not {name, name.rpartition(".")[0]} & known} == set(), verb
    if page.name in ABOUT_THE_CODE:
        return
    text = text.replace("samples.jsonl", "")
    for name in re.findall(r"`(?:--)?((?:model|data|trainer|samples)\.[a-z_]+)", text):
        assert name in options["fit"] | {*LINKED}, name


def slugs(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, part = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not part or part in slugs(there), target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_files_that_it_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "lit_qlora|tests|scripts|benchmarks|configs|notebooks|examples|docs"
    files = re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]*\w)", re.sub(r"\S*NAME\S*|https?://\S+", "", text))
    assert [name for name in files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_table_has_no_bar_within_code(page: Path) -> None:
    """GitHub ends a cell at it unless it is escaped; the site shows the escape: <code>&#124;</code> does for both."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row for row in rows if any("|" in code for code in row.split("`")[1::2])] == []


def test_the_site_has_each_page_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = [name for part in nav for one in part.values() for name in ([one] if isinstance(one, str) else
              [page for entry in one for page in entry.values()])]  # fmt: skip
    assert len(listed) == len({*listed})
    assert {*listed} == {page.name for page in DOCS}


def test_a_link_out_of_the_docs_leads_to_the_repository() -> None:
    assert on_page_markdown("[a](../README.md#x) [b](log.md)") == f"[a]({address()}/blob/main/README.md#x) [b](log.md)"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=named)
def test_its_prose_fits_120_columns(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "!", "[!"))] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_an_issue_asks_for_what_doctor_says() -> None:
    asked = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/fault.yml").read_text(encoding="utf-8"))["body"][0]
    assert asked["validations"] == {"required": True}
    assert "`python main.py doctor`" in asked["attributes"]["description"]


def test_the_workflow_runs_what_ci_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert [step.get("run") for job in jobs.values() for step in job["steps"]] == [None, None, ".ci/run"]
    assert "mkdocs build --strict --site-dir" in (ROOT / ".ci/run").read_text(encoding="utf-8")


# What is made is up to date


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_made_from_the_code_is_as_the_code_is(name: str) -> None:
    made = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert pages.PAGES[name]() == made, "run python -m scripts.pages"


def test_the_map_has_a_line_for_every_module_that_says_what_it_owns() -> None:
    listed = {*re.findall(r"^\| `([\w/.]+)` \|", pages.files(), re.MULTILINE)}
    modules = {named(path) for path in (ROOT / "lit_qlora").rglob("*.py") if path.read_text(encoding="utf-8")}
    assert listed >= modules and "lit_qlora/devices/world.py" in listed


def test_the_options_are_all_there_with_a_word_on_each(options: dict[str, set[str]]) -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \|.*?\|.*?\| *(.*?) *\|", pages.options(), re.MULTILINE)
    assert {name for name, _ in rows} >= options["fit"] - {"config", "print_config", "help"}
    assert [name for name, words in rows if len(words) < 3] == []
