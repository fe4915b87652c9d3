"""Owns the first look at a command line of fit and its kin, before seconds go into importing PyTorch and Lightning.

It finds what can be found so: names, types, single values out of range, files and folders that are nowhere. The parser
proper comes behind it, and finds the rest; each of these mistakes is one there too, in the same words.
"""

import argparse
import ast
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Union

from jsonargparse import ArgumentParser

from lit_qlora.data.sources import find_splits, is_hub_id, sources_of
from lit_qlora.errors import require
from lit_qlora.model.base import find_base, may_be_on_hub
from lit_qlora.options import LINKED, OneLineErrors, all_values, check_config_file, option
from lit_qlora.place import find_config
from lit_qlora.signatures import CLASSES, LEARNING, ROOT, UNKNOWN, Option, Source, init_of, options_of
from lit_qlora.storage.run import run_path, unnamed_run

ANYTHING = Union[list[Any], dict[str, Any], str, int, float, bool, None]  # noqa: UP007
"""For a class of the user's choice, or a list of such: not ``Any``, to which nothing can be added by ``+``."""


def check_first(verb: str, args: Sequence[str]) -> None:
    """Finds what is wrong with a command line before anything heavy is imported; passes what it can't judge.

    Raises UserError as the parser proper would.
    """
    options = {one.name: one for one in options_of(verb)}
    configs = all_values([*args], "--config", "-c")
    for file in filter(None, configs):
        check_config_file(Path(find_config(file)))
    given = [arg.partition("=")[0].lstrip("-").rstrip("+") for arg in args if arg.startswith("-")]
    if any(one not in options and _belongs(one, options) for one in given):
        return
    run, base = option([*args], "--run"), option([*args], "--model.base")
    is_kept = not configs and (verb not in LEARNING or bool(run and run_path(run).exists()))
    if not (configs or is_kept) and base in (None, "demo"):
        args = ["--config", find_config("demo"), *args]  # as `start.complete` does
    parser = _parser(options.values())
    found = parser.parse_args([*_with_files(args)])
    values = {name: value for name, value in found.items() if name in options}
    parser.check_values(values)
    if is_kept:  # its other options are the run's
        return
    for section, file, name in CLASSES:
        start = f"{section}."
        names = {one.removeprefix(start): values.get(one, options[one].default) for one in options if start in one}
        for checks in _requirements(Source(ROOT / file), name, names):
            require(*checks)
    if verb == "fit":  # what a forecast is for need not be here
        _check_places(values, found.get("config") or [])


def _check_places(values: Mapping[str, Any], configs: Sequence[Any]) -> None:
    """Raises UserError for a base or rows that are nowhere on this machine, and can't be on the hub."""
    base = values.get("model.base", "demo")
    if not may_be_on_hub(base):
        find_base(base)
    run, config = values.get("run"), str(configs[-1]) if configs else None
    folder = run_path(run) if run else unnamed_run(config, base)
    if folder.exists() or values.get("mirror"):
        return  # a run that is finished needs no rows
    for name in ("data.source", "data.validation_source", "data.test_source"):
        given = values.get(name)
        if not given or (isinstance(given, str) and given.lstrip().startswith(("[", "{"))):
            continue  # a list or a table, which the parser proper takes apart
        for source in sources_of(given, name):
            if not is_hub_id(source):
                find_splits(source)


def _with_files(args: Sequence[str]) -> Iterator[str]:
    """``args`` with the file of each config."""
    before = ""
    for arg in args:
        name, equals, file = arg.partition("=")
        is_given = name in ("--config", "-c") and equals
        yield f"{name}={find_config(file)}" if is_given else find_config(arg) if before in ("--config", "-c") else arg
        before = arg


def _belongs(name: str, options: dict[str, Option]) -> bool:
    """Whether ``name`` is what only the parser proper knows: a section, a link, an argument of a class, a request."""
    sections = {section for section, _, _ in CLASSES}
    unknown = (name for name, one in options.items() if one.type is UNKNOWN)
    is_known = name in sections or name in LINKED or name in ("print_config", "")
    return is_known or any(name.startswith(f"{one}.") for one in unknown)


class _FirstParser(OneLineErrors, ArgumentParser):
    """Knows the names and the plain types."""


def _parser(options: Iterable[Option]) -> _FirstParser:
    parser = _FirstParser(allow_abbrev=False, add_help=False)
    parser.add_argument("-c", "--config", action="config")
    for one in options:
        kind = ANYTHING if one.type is UNKNOWN else one.type
        parser.add_argument(f"--{one.name}", type=kind, default=argparse.SUPPRESS)
    return parser


COMPARISONS: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b,
}  # fmt: skip


def _requirements(source: Source, name: str, values: Mapping[str, Any]) -> Iterator[tuple[bool, str, str, Any]]:
    """What a class of ours requires of single arguments, with what holds of ``values``; those that can be judged."""
    names = dict(values)
    for node in init_of(source.find(name)).body:
        match node:
            case ast.Assign([ast.Name(short)], ast.Name(long)) if long in names:
                names[short] = names[long]
            case ast.Expr(ast.Call(ast.Name("require"), [condition, option, expected, got])):
                found = [_computed(part, names) for part in (condition, option, expected, got)]
                if UNKNOWN not in found:
                    yield bool(found[0]), str(found[1]), str(found[2]), found[3]


def _computed(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression of plain ``names``; `UNKNOWN` for what is more than a comparison of such."""
    parts = [_computed(part, names) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
    found: Any = UNKNOWN
    match node:
        case ast.Constant(found):
            pass
        case ast.Name(name):
            found = names.get(name, UNKNOWN)
        case ast.BoolOp(kind):  # of which one part may decide that the next makes no sense
            ends = (one for one in parts if one is UNKNOWN or bool(one) == isinstance(kind, ast.Or))
            found = next(ends, parts[-1])
        case _ if UNKNOWN in parts:
            pass
        case ast.UnaryOp(ast.Not() | ast.USub() as sign):
            found = not parts[0] if isinstance(sign, ast.Not) else -parts[0]
        case ast.Compare(_, kinds) if {*map(type, kinds)} <= {*COMPARISONS}:
            found = all(_holds(kind, *pair) for kind, pair in zip(kinds, pairwise(parts), strict=True))
        case ast.FormattedValue():
            found = parts[0]
        case ast.JoinedStr():
            found = "".join(map(str, parts))
    return found


def _holds(kind: ast.cmpop, one: Any, other: Any) -> Any:
    try:
        return COMPARISONS[type(kind)](one, other)
    except TypeError:  # none is no number, which a part before it has said
        return False
