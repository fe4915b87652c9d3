"""How the pages of docs/ that are read off the code are made: the options, the map of files, the drawing of the road.

    python -m scripts.pages

writes docs/options.md, docs/files.md and docs/road.svg anew. A test compares, so that none of them drifts.
"""

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from lit_qlora.options import actions_of, type_of, typed_actions

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = "<!-- Made by `python -m scripts.pages` from the code: edit the docstrings there. -->\n"


# Options

WITH_FIT_S = {
    "plan": "`fit`'s options, and the card to plan for:",
    "inspect": "`fit`'s options, and what is shown:",
    "validate": "`fit`'s options, by default those of the run, and what is scored; the same for `test`:",
}


def options() -> str:
    """docs/options.md: every option of every verb, with its values, its default and what its docstring says."""
    from lit_qlora.cli import TOOLS

    sections = [
        "# Options\n",
        MADE,
        "Every option of a config file can be given on the command line, as `--model.rank 64`, and the other way "
        "round: `rank: 64` in the section `model:`. `python main.py fit --print_config` prints them all as a config "
        "file. A misspelt option is refused, and the nearest known one named. Of an option given twice on the command "
        "line, the last counts; one that takes a list is refused then.\n",
        "**Resumed**: an option with a tick may have another value when a run resumes. Any other change is refused, "
        "because it would be another run (`--run NAME` starts one).\n",
    ]
    fit = fit_actions()
    groups = {
        "model": ("The model", "`model.…`: the base, its adapter, and how they are trained."),
        "data": ("The data", "`data.…`: rows, prompts and batches."),
        "trainer": ("The Trainer", "`trainer.…`: those of Lightning's Trainer that have an effect here, with this "
                    "project's defaults. Any other is refused with the reason."),
        "samples": ("Sample answers", "`samples.…`: answers of the model at each validation."),
        "": ("The run", "Options without a section."),
    }  # fmt: skip
    sections.append("## fit\n\n`plan`, `inspect`, `validate` and `test` take these options, too.\n")
    for group, (title, words) in groups.items():
        of_group = [one for one in fit if one.dest.rpartition(".")[0] == group]
        sections.append(f"### {title}\n\n{words}\n\n{_table(of_group, resumes=True)}")
    known = {one.dest for one in fit}
    for verb, words in WITH_FIT_S.items():
        own = [one for one in fit_actions(verb) if one.dest not in known]
        sections.append(f"## {verb}\n\n{words}\n\n{_table(own)}")
    for name in TOOLS:
        function = getattr(import_module(f"lit_qlora.tools.{name}"), name)
        head = inspect.cleandoc(function.__doc__).split("\n\n", 1)[0].replace("\n", " ")
        sections.append(f"## {name}\n\n{head}\n\n{_table(tool_actions(function))}")
    doctor = import_module("lit_qlora.tools.doctor")
    asked = [one for one in actions_of(doctor.parser()) if one.dest != "help"]
    sections.append(f"## doctor\n\n{doctor.DESCRIPTION.strip()}\n\n{_table(asked)}")
    return _in_lines("\n".join(sections))


def _in_lines(page: str) -> str:
    """``page`` with its prose in lines of at most 120 columns; tables and code stay whole."""
    fill = textwrap.TextWrapper(120, break_long_words=False, break_on_hyphens=False).fill
    lines = (re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), line) for line in page.split("\n"))
    return "\n".join(line if line.startswith("|") else fill(line) for line in lines).replace("\0", " ")


def fit_actions(verb: str = "fit") -> list[Any]:
    """The options of fit, or of a ``verb`` that takes them, too, as argparse has them."""
    from contextlib import ExitStack, suppress

    from lit_qlora import command, training
    from lit_qlora.tools.inspect import InspectCLI
    from lit_qlora.tools.plan import PlanCLI
    from lit_qlora.trainer import QLoRATrainer

    parsers: list[Any] = []

    class Parsed({"plan": PlanCLI, "inspect": InspectCLI}.get(verb, training.QLoRACLI)):  # type: ignore[misc]
        def parse_arguments(self, parser: Any, args: Any) -> None:
            parsers.append(self.verb_parser)
            raise SystemExit

    with suppress(SystemExit):
        Parsed(command.Command([verb]), ExitStack())
    ours = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)$", inspect.getdoc(QLoRATrainer) or "", re.MULTILINE))
    found = []
    for action in actions_of(parsers[0]):
        section, _, name = action.dest.rpartition(".")
        if (type_of(action) is not None and name != "help") or name == "ckpt_path":
            # jsonargparse takes what is passed on by its own class's words.
            action.help = ours.get(name, action.help) if section == "trainer" else action.help
            found.append(action)
    return found


def tool_actions(function: Any) -> list[Any]:
    """The options of a verb that is a plain ``function``, as jsonargparse reads them from its signature."""
    from jsonargparse import ArgumentParser

    parser: Any = ArgumentParser()
    parser.add_function_arguments(function)
    actions = typed_actions(parser)
    for action in actions:
        own = inspect.signature(function).parameters.get(action.dest)  # none: passed on
        action.required = own is not None and own.default is inspect.Parameter.empty
    return actions


def _table(actions: Iterable[Any], resumes: bool = False) -> str:
    """One line per option."""
    from lit_qlora.storage.settings import MAY_CHANGE

    lines = ["| option | values | default | what it does |" + (" resumed |" if resumes else "")]
    lines.append("|---|---|---|---|" + ("---|" if resumes else ""))
    for action in actions:
        name = action.option_strings[0].lstrip("-") if action.option_strings else action.dest
        cells = [
            f"`{name}`",
            _values(type_of(action) or str),
            _default(action),
            _words(action.help or ""),
        ]
        if resumes:
            keys = (name, name.rpartition(".")[0])
            reason = next((MAY_CHANGE[key] for key in keys if key in MAY_CHANGE), None)
            cells.append(f"✓ {reason}" if reason else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _words(text: str) -> str:
    """A docstring's words in a cell of a table."""
    text = re.sub(r"\s+", " ", text).strip().removesuffix(".")
    return text.replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


def _values(hint: Any) -> str:
    """What a type takes, in words."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{one}`" for one in get_args(hint))
    if get_origin(hint) in (list, tuple):
        return f"list of {_values(get_args(hint)[0])}" if get_args(hint) else "list"
    if get_args(hint):
        each = ", ".join(_values(one) for one in get_args(hint) if one is not NoneType)
        return ", ".join(dict.fromkeys(each.split(", ")))
    names = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text", Path: "path"}
    return names.get(hint, "class" if isinstance(hint, type) else "text")


def _default(action: Any) -> str:
    value = action.default
    if value is None:
        return "required" if action.required else "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# The map of files

ROOMS = {
    "": ("The command", "What is prepared before any verb, and what all share."),
    "text": ("text", "Words only: conversations and prompt formats, without torch."),
    "devices": ("devices", "Several processes that train one adapter."),
    "data": ("data", "Rows become conversations, token ids and batches."),
    "model": ("model", "What trains and answers."),
    "forecast": ("forecast", "What a run will need: memory, time, and what would fit."),
    "storage": ("storage", "Whole, verified folders; the run; its copy elsewhere."),
    "figures": ("figures", "What is recorded of a run, and views of it."),
    "callbacks": ("callbacks", "What happens during training, one concern each."),
    "tools": ("tools", "The verbs that are plain functions; the parts of each are in a folder next to it."),
    "demo": ("demo", "What the embedded demo is trained on and from."),
}
BESIDE = {"main.py", "setup.py", "scripts", "benchmarks", "examples"}


def files() -> str:
    """docs/files.md: what each module owns, by the first sentence of its docstring."""
    sections = ["# Map of files\n", MADE]
    sections.append(
        "One line per module, with what it owns: the first sentence of its docstring. The folders are the stages that "
        "[how it works](how-it-works.md) describes.\n"
    )
    for room, (title, words) in ROOMS.items():
        folder = ROOT / "lit_qlora" / room
        modules = sorted(folder.glob("*.py") if not room else folder.rglob("*.py"))
        sections.append(f"## {title}\n\n{words}\n\n{_map(modules)}")
    beside = [ROOT / "main.py", *sorted(file for name in BESIDE for file in (ROOT / name).rglob("*.py"))]
    sections.append(f"## Outside the package\n\n{_map(beside)}")
    return _in_lines("\n".join(sections))


def _map(modules: Iterable[Path]) -> str:
    lines = ["| file | what it owns |", "|---|---|"]
    for file in modules:
        head = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        sentence = re.split(r"(?<=\.)\s|\n\n", head, maxsplit=1)[0]
        if sentence:
            owned = re.sub(r"^Owns ", "", _words(sentence))
            lines.append(f"| `{file.relative_to(ROOT).as_posix()}` | {owned[0].upper()}{owned[1:]} |")
    return "\n".join(lines) + "\n"


# The drawing of the road

STAGES = [
    ("options", "YAML and command line", "plain arguments,\nchecked"),
    ("rows", "data/", "conversations, held-out\nones apart"),
    ("text", "text/", "pieces: learned or not,\nspecial tokens as ids"),
    ("tokens, batches", "data/", "ids and labels; rows of\nlike length together"),
    ("4-bit model, loss", "model/", "sum over answers by\ntheir number"),
    ("checkpoints", "storage/", "whole, verified folders;\nthe best adapter"),
    ("use", "tools/", "chat, predict, merge,\nexport, push"),
]


def road() -> str:
    """docs/road.svg: the stages in a row, and what each passes on."""
    return "\n".join(_road()) + "\n"


def _road() -> Iterator[str]:
    wide, high, gap = 176, 62, 34
    height = len(STAGES) * (high + gap) - gap + 40
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 {height}" role="img" aria-labelledby="t">'
    yield '<title id="t">The road of a conversation, from options to use, and what each stage hands on</title>'
    yield (
        "<style>text{font:14px system-ui,sans-serif;fill:#24292f}.n{font-weight:600}.s{font-size:12px;fill:#57606a}"
        "rect{fill:#eef4ff;stroke:#4f7bd9}path{stroke:#4f7bd9;fill:none;stroke-width:1.5}svg{background:#fff}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9aa5b1}rect{fill:#1b2740}svg{background:#0d1117}}"
        "</style>"
    )
    for index, (name, where, handed) in enumerate(STAGES):
        top = 20 + index * (high + gap)
        yield f'<rect x="20" y="{top}" width="{wide}" height="{high}" rx="8"/>'
        yield f'<text class="n" x="{20 + wide / 2}" y="{top + 27}" text-anchor="middle">{name}</text>'
        yield f'<text class="s" x="{20 + wide / 2}" y="{top + 46}" text-anchor="middle">{where}</text>'
        if index + 1 < len(STAGES):
            x, y = 20 + wide / 2, top + high
            yield f'<path d="M{x} {y}v{gap - 4}m-5 -6l5 6l5 -6"/>'
        for line, words in enumerate(handed.split("\n")):
            arrow, y = "&#160;&#160;&#160;&#160;" if line else "→ ", top + 27 + 19 * line
            yield f'<text x="{wide + 44}" y="{y}">{arrow}{words}</text>'
    yield "</svg>"


PAGES = {"options.md": options, "files.md": files, "road.svg": road}


def main() -> None:
    """Write all pages."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
        print(f"docs/{name}")


if __name__ == "__main__":
    main()
