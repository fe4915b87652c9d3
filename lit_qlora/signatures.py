"""Owns the options of fit and its kin as the sources have them, read without importing what they are options of.

For what has to come before PyTorch and Lightning, which take seconds: help, and a first look at a command line. The
parser proper is LightningCLI's, made of the same signatures; a test holds the two equal.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, Union

from lit_qlora.options import LINKED

ROOT = Path(__file__).parent
CLASSES = (
    ("trainer", "trainer.py", "QLoRATrainer"), ("model", "model/module.py", "QLoRAModule"),
    ("data", "data/datamodule.py", "ChatDataModule"), ("samples", "callbacks/samples.py", "SampleAnswers"),
)  # fmt: skip
"""Sections of options, and the classes whose arguments they are."""

LEARNING = ("fit", "plan", "inspect")
"""The verbs of a run that is to learn; the others are about one that has."""

PLAIN = {"str": str, "int": int, "float": float, "bool": bool, "None": NoneType}
UNKNOWN = object()
"""Stands for a type or a value that can't be read off the sources."""


class Option(NamedTuple):
    """An option by its dotted name.

    ``type`` and ``default`` are the real ones, or `UNKNOWN`; ``written`` is the type as it stands there.
    """

    name: str
    type: Any
    written: str
    default: Any
    help: str


@cache
def options_of(verb: str) -> tuple[Option, ...]:
    """The options of ``verb``: those beside any section first."""
    files = ["training.py", *([f"tools/{verb}.py"] if (ROOT / f"tools/{verb}.py").is_file() else [])]
    beside = [option for file in files for option in _added(Source(ROOT / file), verb in ("validate", "test"))]
    of_classes = [
        option for section, file, name in CLASSES for option in _arguments(Source(ROOT / file), section, name)
    ]
    return tuple(option for option in (*beside, *of_classes) if option.name not in LINKED)


class Source:
    """A module as text, with the names that stand for plain types and values in it.

    Args:
        file: its source.
    """

    def __init__(self, file: Path) -> None:
        self.tree = _parsed(file)

    def find(self, name: str, kind: type[ast.AST] = ast.ClassDef) -> Any:
        """The class (or what ``kind`` says) called ``name``."""
        return next(
            node for node in ast.walk(self.tree) if isinstance(node, kind) and getattr(node, "name", "") == name
        )

    def value(self, node: ast.expr | None) -> Any:
        """A default or a text; `UNKNOWN` for what is no plain value."""
        if node is None:
            return None
        if isinstance(node, ast.Name) and node.id not in ("None", "True", "False"):
            place, found = self._assigned(node.id)
            return place.value(found) if place else UNKNOWN
        if isinstance(node, ast.JoinedStr):
            parts = [self.value(part.value if isinstance(part, ast.FormattedValue) else part) for part in node.values]
            return "".join(map(str, parts)) if UNKNOWN not in parts else "…"
        try:
            return ast.literal_eval(node)
        except ValueError:
            return UNKNOWN

    def type(self, node: ast.expr | None) -> Any:
        """A plain type; `UNKNOWN` for a class."""
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
                found = PLAIN.get(name) or (place.type(given) if place else UNKNOWN)
        return found

    def _of_types(self, kind: Any, *nodes: ast.expr) -> Any:
        parts = tuple(map(self.type, nodes))
        return UNKNOWN if UNKNOWN in parts else kind[parts if len(parts) > 1 else parts[0]]

    def _assigned(self, name: str) -> tuple["Source", ast.expr] | tuple[None, None]:
        """What a name is given in this module, or in the one of ours that it comes from."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
                return self, node.value
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and node.value:
                return self, node.value
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lit_qlora."):
                found = next((alias.name for alias in node.names if name == (alias.asname or alias.name)), None)
                file = ROOT.parent / f"{(node.module or '').replace('.', '/')}.py" if found else None
                if found and file and file.is_file():
                    return Source(file)._assigned(found)
        return None, None


def _init_of(found: ast.ClassDef) -> ast.FunctionDef:
    """The constructor of a class."""
    return next(node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _arguments(source: Source, section: str, name: str) -> Iterator[Option]:
    """The arguments of a class of ours, and for ``**kwargs`` those of Lightning's that it is made from."""
    found = source.find(name)
    init = _init_of(found)
    words = _argument_words(ast.get_docstring(found) or "")
    own = dict(_parameters(init))
    if init.args.kwarg:
        left_out = {*source.value(source._assigned("NOT_OFFERED")[1])}
        yield from (
            _option(source, section, parameter, words)
            for parameter in own.items() if parameter[0] not in left_out
        )  # fmt: skip
        base = Source(_lightning() / "trainer" / "trainer.py")
        init = _init_of(base.find("Trainer"))
        words = _argument_words(ast.get_docstring(init) or "") | words
        for parameter in _parameters(init):
            if parameter[0] not in left_out | own.keys():
                yield _option(base, section, parameter, words)
        return
    yield from (_option(source, section, parameter, words) for parameter in own.items())


def _lightning() -> Path:
    spec = find_spec("lightning")
    assert spec and spec.submodule_search_locations, "Lightning is installed"
    return Path(spec.submodule_search_locations[0]) / "pytorch"


def _parameters(init: ast.FunctionDef) -> Iterator[tuple[str, tuple[ast.expr | None, ast.expr | None]]]:
    """Name, annotation and default of each."""
    places = init.args.args[1:]
    defaults: list[ast.expr | None] = [None] * (len(places) - len(init.args.defaults)) + [*init.args.defaults]
    pairs = [*zip(places, defaults, strict=True), *zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)]
    yield from ((place.arg, (place.annotation, default)) for place, default in pairs)


def _option(source: Source, section: str, parameter: tuple[str, Any], words: dict[str, str]) -> Option:
    name, (annotation, default) = parameter
    kind = source.type(annotation)
    written = ast.unparse(annotation) if annotation else ""
    return Option(f"{section}.{name}", kind, written, source.value(default), words.get(name, ""))


def _argument_words(docstring: str) -> dict[str, str]:
    """What a docstring's Args say of each."""
    _, _, words = docstring.partition("Args:\n")
    words = inspect.cleandoc("\n" + re.split(r"\n\s*(?:Raises|Returns|Yields):\n", words)[0])
    found = re.findall(r"^(\w+):\s*(.*(?:\n(?:[ \t].*)?)*)", words, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _added(source: Source, scores: bool) -> Iterator[Option]:
    """What is added to the parser beside classes; ``scores``: also what is for verbs that score alone."""
    blocks = [node for node in ast.walk(source.tree) if isinstance(node, ast.If)]
    blocks = [] if scores else [node for node in blocks if ast.unparse(node.test) == "self.scores"]
    left_out = {id(inner) for block in blocks for inner in ast.walk(block)}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parser.add_argument" and id(node) not in left_out:
            yield _of_call(source, node)


def _of_call(source: Source, call: ast.Call) -> Option:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name = str(source.value(call.args[0])).removeprefix("--")
    kind = given.get("type", ast.Name("str"))
    words = source.value(_above(source, given.get("help")))
    return Option(name, source.type(kind), ast.unparse(kind), source.value(given.get("default")), str(words or ""))


def _above(source: Source, words: ast.expr | None) -> ast.expr | None:
    """``words``; where they are a name, what that was given last above its use, with names in it likewise."""
    if isinstance(words, ast.JoinedStr):
        parts = [_above(source, part.value if isinstance(part, ast.FormattedValue) else part) for part in words.values]
        return ast.JoinedStr([part for part in parts if part])
    if not isinstance(words, ast.Name):
        return words
    above = [
        node for node in ast.walk(source.tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == words.id and node.lineno < words.lineno
    ]  # fmt: skip
    return max(above, key=lambda node: node.lineno).value if above else words
