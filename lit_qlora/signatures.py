"""Owns the options of fit and its kin: those beside any class's, and classes' as the sources have them.

Read without importing the classes, for what has to come before PyTorch and Lightning, which take seconds: help, and a
first look at a command line. The parser proper is LightningCLI's, made of the same; a test holds the two equal.
"""

import ast
import inspect
import re
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, Union

from lit_qlora.data.faults import KINDS
from lit_qlora.options import CONFIG, LINKED, Parser

ROOT = Path(__file__).parent
CLASSES = (
    ("trainer", "trainer.py", "QLoRATrainer"), ("model", "model/module.py", "QLoRAModule"),
    ("data", "data/datamodule.py", "ChatDataModule"), ("samples", "callbacks/samples.py", "SampleAnswers"),
)  # fmt: skip
"""Sections of options, and the classes whose arguments they are."""

LEARNING = ("fit", "plan", "inspect")
"""The verbs of a run that is to learn; the others are about one that has."""

OF_LIGHTNING = {
    "trainer.callbacks": ("callbacks",), "trainer.logger": ("loggers",),
    "trainer.plugins": ("plugins", "plugins.environments"),
}  # fmt: skip
"""Options that take classes, and the packages in ``lightning.pytorch`` that have Lightning's own for them."""
OBSERVING = ("DeviceStatsMonitor", "EarlyStopping", "LambdaCallback", "LearningRateMonitor", "ModelSummary",
             "RichModelSummary", "Timer")  # fmt: skip
"""Lightning's callbacks that may be given: the others are refused, whatever their arguments."""

PLAIN_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "None": NoneType}
UNKNOWN = object()
"""Stands for a type or a value that can't be read off the sources."""
ONE = Union[dict, str, int, float, bool, None]  # type: ignore[type-arg]  # noqa: UP007
ANYTHING = Union[list[ONE], dict, str, int, float, bool, None]  # type: ignore[type-arg]  # noqa: UP007
"""The type of a class of the user's choice, or a list of such. Not ``Any``: jsonargparse would import the classes."""


class Option(NamedTuple):
    """An option.

    Args:
        name: its dotted name.
        type: its plain type; `UNKNOWN` if it can't be read off the sources, None if any text is accepted.
        default: its default; `UNKNOWN` if it can't be read off the sources.
        help: what help prints of it.
    """

    name: str
    type: Any
    default: Any
    help: str

    @property
    def spelled(self) -> list[str]:
        """Spellings on a command line: the name, and with underscores for its dashes."""
        return [*dict.fromkeys((f"--{self.name}", f"--{self.name.replace('-', '_')}"))]


SEED = Option("seed_everything", int, 42, "seed of everything random")
OF_RUN = (
    Option("run", str | None, None,
           "runs/NAME, or any folder with a slash; default: the config's name, with -2 if that is another run"),
    Option("save_every_steps", int, 500, "optimizer steps between checkpoints"),
    Option("save_every_minutes", float | None, 15.0, "the longest time between checkpoints; none: by steps alone"),
    Option("max_time", str | None, None, "DD:HH:MM:SS after which this start is saved and ends"),
    Option("keep_checkpoints", int, 2, "number of newest checkpoints kept"),
    Option("mirror", str | None, None,
           "folder, such as on a mounted drive, that gets a copy of each save in the background"),
    Option("early_stopping", int | None, None, "validations without improvement before the run ends"),
    Option("max_nonfinite_losses", int, 1,
           "steps in a row whose loss is not finite before it stops (in fp16 the scaler's skips are counted)"),
)  # fmt: skip
"""The options beside any class's, of all verbs."""
_SCORED = (Option("ckpt_path", None, "best", "what to score: best | last | base | an adapter or checkpoint folder"),)
"""The option that validate and test share; without a type, since only the command line gives it, never a run's file."""
OF_VERB: Mapping[str, tuple[Option, ...]] = {
    "validate": _SCORED,
    "test": _SCORED,
    "plan": (
        Option("gpu", str | None, None, "card to plan for; default: this one, or a T4"),
        Option("gpu-gib", float | None, None, "memory of the card in GiB, instead of its name"),
        Option("gpu-capability", str | None, None,
               "compute capability of the card, such as 8.6; default: that of --gpu, or 7.5 with --gpu-gib alone"),
    ),
    "inspect": (
        Option("rows", int, 3, "number of training rows to show token by token"),
        Option("row", str | None, None, "show only this row, in full: its number in the file, or FILE:NUMBER"),
        Option("html", str | None, None, "also write all of it to this file, as a web page"),
        Option("accept", str | None, None, f"kinds of faults to accept, separated by commas: {', '.join(KINDS)}"),
    ),
}  # fmt: skip
"""The options of single verbs."""


@cache
def options_of(verb: str) -> tuple[Option, ...]:
    """The options of ``verb``: those beside any section first."""
    of_classes = [option for one in CLASSES for option in _arguments(*one)]
    found = (SEED, *OF_RUN, *OF_VERB.get(verb, ()), *of_classes)
    return tuple(option for option in found if option.name not in LINKED)


def defaults_of(verb: str) -> dict[str, Any]:
    """The defaults of the options of ``verb``, by name, as far as they can be read off the sources."""
    return {one.name: one.default for one in options_of(verb) if one.default is not UNKNOWN}


@cache
def parser_of(options: tuple[Option, ...]) -> Parser:
    """A parser that knows the names and the plain types of ``options``; made once, which takes a tenth of a second."""
    parser = Parser(add_help=False)
    parser.add_argument(*CONFIG, action="config")
    for one in options:
        kind = ANYTHING if one.type is UNKNOWN else one.type
        parser.add_argument(*one.spelled, type=kind, default=SUPPRESS)
    return parser


@cache
def classes_for(option: str) -> Mapping[str, str]:
    """Lightning's classes for ``option`` of `OF_LIGHTNING`, by name, each with the module that it comes from."""
    files = (_lightning() / package.replace(".", "/") / "__init__.py" for package in OF_LIGHTNING[option])
    imports = (node for file in files for node in _parsed(file).body if isinstance(node, ast.ImportFrom))
    return {one.name: node.module or "" for node in imports for one in node.names if one.name[0].isupper()}


def is_of_lightning(option: str, path: str) -> bool:
    """True if ``path`` is meant for one of Lightning's classes for ``option``, alone or with its package."""
    package = path.rpartition(".")[0]
    return not package or package in (f"lightning.pytorch.{one}" for one in OF_LIGHTNING[option])


def offered(option: str) -> list[str]:
    """The names of Lightning's classes that may be given to ``option``: not their base classes."""
    if option == "trainer.callbacks":
        return [*OBSERVING]
    kind = "Logger" if option == "trainer.logger" else "Environment"  # other plugins are refused, or of no effect
    return sorted(one for one in classes_for(option) if one.endswith(kind) and one not in ("Logger", f"Cluster{kind}"))


def arguments_of(option: str, name: str) -> tuple[list[Option], list[str], bool] | None:
    """The arguments of Lightning's class ``name`` for ``option``, the names of those that need a value, and whether
    it takes others, too.

    None where it has no constructor of its own.
    """
    file = _lightning().parents[1] / f"{classes_for(option)[name].replace('.', '/')}.py"
    try:
        source = ModuleSource(file)
        init, words = source.constructor(name)
    except (OSError, StopIteration):  # a package, or no constructor of its own
        return None
    found = [*_parameters(init)]
    options = [
        Option(one, source.type(annotation), source.value(default), words.get(one, ""))
        for one, annotation, default in found
    ]
    return options, [one for one, _, default in found if default is None], init.args.kwarg is not None


class ModuleSource:
    """A module as text, with the names that stand for plain types and values in it.

    Args:
        file: its source.
    """

    def __init__(self, file: Path) -> None:
        self.tree = _parsed(file)

    def constructor(self, name: str) -> tuple[ast.FunctionDef, dict[str, str]]:
        """The constructor of the class called ``name``, and what is said of its arguments."""
        found = next(node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef) and node.name == name)
        init = next(node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        return init, _argument_words(ast.get_docstring(found)) | _argument_words(ast.get_docstring(init))

    def value(self, node: ast.expr | None) -> Any:
        """The default that ``node`` spells, None without one; `UNKNOWN` for what is no plain value."""
        if node is None:
            return None
        if isinstance(node, ast.Name) and node.id not in ("None", "True", "False"):
            place, found = self._assigned(node.id)
            return place.value(found) if place else UNKNOWN
        try:
            return ast.literal_eval(node)
        except ValueError:
            return UNKNOWN

    def type(self, node: ast.expr | None) -> Any:
        """The plain type that ``node`` spells; `UNKNOWN` for a class."""
        found: Any = UNKNOWN
        match node:
            case ast.BinOp(left, ast.BitOr(), right):
                found = self._of_types(Union, left, right)
            case ast.Subscript(ast.Name("Optional"), inner):
                found = self._of_types(Union, inner, ast.Constant(None))
            case ast.Subscript(ast.Name("Union"), ast.Tuple(inner)):
                found = self._of_types(Union, *inner)
            case ast.Subscript(ast.Name("dict"), ast.Tuple(inner)):
                found = self._of_types(dict, *inner)
            case ast.Subscript(ast.Name("list"), inner):
                found = self._of_types(list, inner)
            case ast.Subscript(ast.Name("Literal"), inner):
                value = self.value(inner)
                found = UNKNOWN if value is UNKNOWN else Literal[value]
            case ast.Constant(None):
                found = NoneType
            case ast.Name(name):
                place, given = self._assigned(name)
                found = PLAIN_TYPES.get(name) or (place.type(given) if place else UNKNOWN)
        return found

    def _of_types(self, kind: Any, *nodes: ast.expr) -> Any:
        parts = tuple(map(self.type, nodes))
        return UNKNOWN if UNKNOWN in parts else kind[parts if len(parts) > 1 else parts[0]]

    def _assigned(self, name: str) -> tuple["ModuleSource", ast.expr] | tuple[None, None]:
        """The value of a name in this module, or in the one of ours that it is imported from."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
                return self, node.value
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lit_qlora."):
                found = next((alias.name for alias in node.names if name == (alias.asname or alias.name)), None)
                file = ROOT.parent / f"{(node.module or '').replace('.', '/')}.py" if found else None
                if found and file and file.is_file():
                    return ModuleSource(file)._assigned(found)
        return None, None


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _arguments(section: str, file: str, name: str) -> list[Option]:
    """The arguments of a class of ours, and for ``**kwargs`` those of Lightning's Trainer, which it is made from."""
    source = ModuleSource(ROOT / file)
    init, words = source.constructor(name)
    constructors, left_out, found = [(source, init)], set[str](), dict[str, Option]()
    if init.args.kwarg:
        left_out = {*source.value(source._assigned("NOT_OFFERED")[1])}
        base = ModuleSource(_lightning() / "trainer" / "trainer.py")
        init, of_base = base.constructor("Trainer")
        constructors, words = [*constructors, (base, init)], of_base | words
    for place, init in constructors:
        for one, annotation, default in _parameters(init):
            if one not in left_out | found.keys():
                kind, value = place.type(annotation), place.value(default)
                found[one] = Option(f"{section}.{one}", kind, value, words.get(one, ""))
    return [*found.values()]


def _lightning() -> Path:
    spec = find_spec("lightning")
    assert spec and spec.submodule_search_locations, "Lightning is installed"
    return Path(spec.submodule_search_locations[0], "pytorch")


def _parameters(init: ast.FunctionDef) -> Iterator[tuple[str, ast.expr | None, ast.expr | None]]:
    """Name, annotation and default of each argument of ``init``."""
    places = [*init.args.args[1:], *init.args.kwonlyargs]
    defaults = [*init.args.defaults, *init.args.kw_defaults]
    for place, default in zip(places, [None] * (len(places) - len(defaults)) + defaults, strict=True):
        yield place.arg, place.annotation, default


def _argument_words(docstring: str | None) -> dict[str, str]:
    """The description of each argument under a docstring's Args."""
    _, _, words = (docstring or "").partition("Args:\n")
    words = inspect.cleandoc("\n" + re.split(r"\n(?=\S)|\n\s*(?:Raises|Returns|Yields):\n", words)[0])
    found = re.findall(r"^(\w+):\s*(.*(?:\n(?:[ \t].*)?)*)", words, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
