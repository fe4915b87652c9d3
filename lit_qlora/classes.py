"""Owns what is known of a class that an option names before its module is imported: by the sources alone.

Finds a missing module, class or argument, and passes what the sources don't show: the parser proper imports them.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_qlora.errors import UserError, excerpt, nearest
from lit_qlora.options import HELP, argument_of_none, lacks_arguments, nearest_class

KINDS = {
    "trainer.callbacks": ("Callback",), "trainer.logger": ("Logger",),
    "trainer.plugins": ("Precision", "PrecisionPlugin", "ClusterEnvironment", "CheckpointIO", "LayerSync"),
}  # fmt: skip
"""By the options that take classes, the names of Lightning's that these are below of."""

ROOT = Path(__file__).parent


class Named(NamedTuple):
    """A class as an option names it, and the names of its arguments that are given; None where these are unknown.

    ``has_more``: a config file may give it others.
    """

    option: str
    name: str
    arguments: frozenset[str] | None = None
    has_more: bool = False


def take_out(args: list[str]) -> tuple[list[str], list[Named]]:
    """A command line without the arguments of classes, and the classes that it names.

    Raises:
        UserError: an argument is of no class.
    """
    rest, found = list[str](), list[Named]()
    given, has_config = iter(args), any(arg.partition("=")[0] in ("--config", "-c") for arg in args)
    for arg in given:
        name, equals, text = arg.partition("=")
        option, key = _option_of(name.removeprefix("--"))
        value = text if equals or option is None else next(given, None)
        if option is None or value is None or not arg.startswith("--"):
            rest.append(arg)
            continue
        if not key:
            rest += [arg] if equals else [arg, value]
        key = key.removeprefix("init_args.")
        if key in ("", "class_path"):
            found.append(Named(option, value, frozenset(), has_config))
        elif found and found[-1].option == option:
            taken = found[-1].arguments
            taken = None if key.startswith("dict_kwargs") or taken is None else taken | {key.partition(".")[0]}
            found[-1] = found[-1]._replace(arguments=taken)
        elif has_config:  # where the class stands, if there is one
            found.append(Named(option, ""))
        else:
            raise argument_of_none(option, key)
    return rest, found


def _option_of(name: str) -> tuple[str | None, str]:
    """The option of classes that ``name`` is or is below of, and what it adds to it."""
    bare = name.rstrip("+")
    option = next((one for one in KINDS if f"{bare}.".startswith(f"{one}.")), None)
    return option, bare.removeprefix(option or "").lstrip(".")


def _is_name(value: str) -> bool:
    """True for a class's name; not for ``true``, a number, or a table in braces."""
    if not re.fullmatch(r"\w+(\.\w+)*", value):
        return False
    with suppress(yaml.YAMLError):
        return isinstance(yaml.safe_load(value), str)
    return False


def check_classes(named: list[Named], values: Mapping[str, Any]) -> None:
    """Check the classes that a command line names and those in the values of all options.

    Raises:
        UserError: one is not there, or does not take its arguments, or lacks one.
    """
    added_to = {one.option for one in named if not one.name}
    for one in [*named, *_in_values(values)]:
        _check(one._replace(arguments=None) if one.option in added_to else one)


def _in_values(values: Mapping[str, Any]) -> Iterator[Named]:
    for option in KINDS:
        given = values.get(option)
        for one in given if isinstance(given, list) else [given]:
            if isinstance(one, Mapping) and isinstance(arguments := one.get("init_args", {}), Mapping):
                is_told = {*one} <= {"class_path", "init_args"}
                yield Named(option, str(one.get("class_path")), frozenset(map(str, arguments)) if is_told else None)
            elif isinstance(one, str):
                yield Named(option, one)


def _check(named: Named) -> None:
    option, name = named.option, named.name
    if not _is_name(name):
        return
    names = class_names(*KINDS[option])
    why = _missing(name) if "." in name else ""
    if why or not ("." in name or name in names or _is_ours(name)):
        problem = f"no class {excerpt(name)}{f' ({why})' if why else ''}"
        raise UserError(problem, option=option, remedy=nearest_class(name, names))
    taken = _parameters_of(name)
    if taken is None or named.arguments is None:
        return
    for key in sorted(named.arguments):
        if key not in taken:
            near = nearest(key, taken)
            remedy = f"did you mean {near!r}?" if near else HELP
            raise UserError(f"unknown option {excerpt(key)}", option=option, remedy=remedy)
    lacking = [key for key, is_needed in taken.items() if is_needed and key not in named.arguments]
    if lacking and not named.has_more:
        raise lacks_arguments(option, name.rpartition(".")[2], lacking)


def _is_ours(name: str) -> bool:
    texts = (file.read_text(encoding="utf-8") for file in (ROOT / "callbacks").glob("*.py"))
    return any(re.search(rf"^class {name}\b", text, re.MULTILINE) for text in texts)


# Sources


def _lightning() -> Path:
    spec = find_spec("lightning")
    assert spec and spec.submodule_search_locations, "Lightning is installed"
    return Path(spec.submodule_search_locations[0])


@cache
def _heads() -> dict[str, tuple[set[str], Path]]:
    """The names of the bases of each class of Lightning, and its file."""
    found: dict[str, tuple[set[str], Path]] = {}
    for part in ("fabric", "pytorch"):  # in both, there is the one of a Trainer
        for file in sorted((_lightning() / part).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            for name, bases in re.findall(r"^class (\w+)\(([^)]*)\)", text, re.MULTILINE):
                found[name] = {*re.findall(r"\w+", bases)}, file
    return found


@cache
def class_names(*bases: str) -> list[str]:
    """Names of Lightning's public classes below those called ``bases``, as its sources have them."""
    found, size = dict.fromkeys(bases), 0
    while len(found) > size:
        size = len(found)
        found |= dict.fromkeys(name for name, (made_from, _) in _heads().items() if found.keys() & made_from)
    return [name for name in found if name not in bases and not name.startswith("_")]


def _missing(name: str) -> str:
    """Why there is no class ``MODULE.CLASS``, as Python would say it; empty where the sources don't show that."""
    spec, rest = _nearest_spec(name)
    if spec is None:
        return f"No module named {rest[0]!r}"
    if not rest or _may_have(spec, rest[0]):
        return ""
    return f"module {spec.name!r} has no attribute {rest[0]!r}"


def _nearest_spec(name: str) -> tuple[ModuleSpec | None, list[str]]:
    """The module that most parts of a dotted name lead to, found and not imported; and the other parts."""
    top, *rest = name.split(".")
    try:
        spec = find_spec(top)  # of the first part alone, which imports nothing
    except (ValueError, ImportError):
        spec = ModuleSpec(top, None)
    if spec is None:
        return None, [top, *rest]
    while rest and spec.submodule_search_locations is not None:
        within = PathFinder.find_spec(f"{spec.name}.{rest[0]}", spec.submodule_search_locations)
        if within is None:
            break
        spec, rest = within, rest[1:]
    return spec, rest


def _may_have(spec: ModuleSpec, name: str) -> bool:
    """False where a module's source binds no such name, anywhere in it."""
    tree = _tree(spec.origin)
    return tree is None or any(_may_bind(node, name) for node in ast.walk(tree))


def _may_bind(node: ast.AST, name: str) -> bool:
    match node:
        case ast.ImportFrom(module=str(module), names=[ast.alias("*")], level=0):
            spec, rest = _nearest_spec(module)
            return spec is not None and not rest and _may_have(spec, name)
        case ast.ImportFrom() | ast.Import():
            return any((alias.asname or alias.name.partition(".")[0]) in (name, "*") for alias in node.names)
        case ast.ClassDef() | ast.FunctionDef():
            return node.name in (name, "__getattr__")
        case ast.Name(id=found, ctx=ast.Store()):
            return found in (name, "__getattr__")
        case (
            ast.Name(id="globals" | "setattr" | "exec")
            | ast.Attribute(attr="__dict__" | "modules")
            # What is only read, as Lightning does, brings no name.
            | ast.Subscript(value=ast.Call(func=ast.Name(id="locals" | "vars")), ctx=ast.Store())
            | ast.Attribute(value=ast.Call(func=ast.Name(id="locals" | "vars")), attr="update")
        ):
            return True
    return False


@cache
def _tree(file: str | None) -> ast.Module | None:
    """The source in ``file``; None where there is none."""
    if file is None or not file.endswith(".py"):
        return None
    with suppress(OSError, SyntaxError, ValueError):
        return ast.parse(Path(file).read_text(encoding="utf-8"))
    return None


def _parameters_of(name: str) -> dict[str, bool] | None:
    """The arguments of a class, each with whether it has to be given; None where the sources don't show them."""
    module, _, bare = name.rpartition(".")
    if module and not module.startswith("lightning."):
        return None
    tree = _tree(str(_heads()[bare][1])) if bare in _heads() else None
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == bare] if tree else []
    inits = [
        node for one in classes for node in one.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]
    if not inits or inits[0].args.kwarg:
        return None
    args = inits[0].args
    places = args.args[1:]
    taken = {place.arg: at < len(places) - len(args.defaults) for at, place in enumerate(places)}
    by_name = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return taken | {place.arg: default is None for place, default in by_name}
