"""Each use of another project's private name is here with its reason: they may change with any release of it.

Those that only tests use are not: such a test fails by itself.
"""

import ast
import builtins
import importlib
import importlib.util
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

ROOT = Path(__file__).parents[1]
ROOMS = ("lit_qlora", "benchmarks", "scripts", "examples")
FILES = [ROOT / "main.py", *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

USED = {
    # Lightning: its loops have no hook between two optimizer steps.
    ("callbacks/steps.py", "_data_fetcher"): "what its loop asks for whether a validation follows",
    ("callbacks/steps.py", "_should_check_val_fx"): "whether a validation follows this micro-batch",
    ("callbacks/steps.py", "_logger_connector"): "holds the next",
    ("callbacks/steps.py", "_first_loop_iter"): "is set by a validation that Lightning did not begin",
    ("callbacks/steps.py", "_broadcast_sigterm_tensor"): "what several processes would do in each micro-batch",
    ("training.py", "_parse_ckpt_path"): "would load a pickle and let it override the command line",
    # argparse and jsonargparse: types of options, for the nearest name, a stranger's config and flags that stand alone.
    ("options.py", "_actions"): "the list of a parser's options, which has no public name",
    ("options.py", "_typehint"): "an option's type",
    ("options.py", "_check_type_"): "reads any text as YAML, where '# x' is nothing",
    # torch
    ("model/pointwise.py", "_dynamo"): "the only way to say which dimension changes in size from call to call",
    ("model/attention.py", "_efficient_attention_forward"): "gives the sums that its own gradient needs",
    ("model/graphs.py", "_foreach_add_"): "one kernel for hundreds of small tensors, as torch's optimizers have it",
    ("model/graphs.py", "_foreach_zero_"): "the same",
    ("model/decoder.py", "_foreach_copy_"): "the same",
    ("devices/strategy.py", "_foreach_copy_"): "the same",
    # huggingface_hub, datasets, transformers
    ("quiet.py", "_http"): "a logger, which has the name of its module",
    ("data/splits.py", "_data_files"): "a key of the state.json that datasets.save_to_disk writes",
    ("text/jinja.py", "_compile_jinja_template"): "a template as a tokenizer reads it, block by block",
}
"""Reasons, by file of lit_qlora and name."""
PUBLIC = {"_asdict", "_replace", "_exit", "_fail_with_undefined_error", "_gib"}
"""Documented in spite of the underscore: named tuples', os._exit, and jinja2.Undefined's; and a unit of figures."""

MADE_BY_METACLASS = {"_abc_impl", "_backward_cls", "_is_protocol", "_is_runtime_protocol", *vars(Enum("Any", []))}
"""Names that each class has by its metaclass: nobody wrote them."""


def test_each_use_of_a_private_name_is_listed_with_a_reason_and_none_is_listed_for_nothing() -> None:
    """Private names are another project's, or another module's."""
    uses = [*_read_elsewhere(), *_overridden()]
    assert sorted({f"{file}: {name}" for file, name in uses if (file, name) not in USED}) == []
    assert {*USED} - {*uses} == set()
    assert len(uses) <= 20
    assert len(TREES) > 150 and ROOT / "main.py" in TREES


@cache
def _walk(node: ast.AST) -> Sequence[Any]:
    """The nodes of a tree, which are asked for many times."""
    return [*ast.walk(node)]


def _own(trees: Iterable[ast.Module]) -> set[str]:
    """Private names that modules define."""
    found = set[str]()
    for tree in trees:
        # A name without a value is of a base, for the type checker.
        declared = {id(node.target) for node in _walk(tree) if isinstance(node, ast.AnnAssign) and node.value is None}
        for node in _walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in declared:
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if getattr(node.value, "id", "") in ("self", "cls") else set()
    return found


def _read_elsewhere() -> Iterator[tuple[str, str]]:
    """Uses of private names of others, read off something, imported or in a text: by file and name."""
    anyones = _own(TREES.values())  # a mixin's parts are its own
    for path, tree in TREES.items():
        own = _own([tree])
        # Such as what follows a name in an f-string; one may begin with a private name, too.
        elsewhere = {id(part) for node in _walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
        elsewhere |= {id(node.args[1]) for node in _walk(tree) if _is_by_name(node)}
        for node in _walk(tree):
            names, known = list[str](), anyones
            if isinstance(node, ast.Attribute):
                names, known = [node.attr], anyones if _is_self(node.value) else own
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names, known = [*(getattr(node, "module", "") or "").split(".")], set()
                names += [part for alias in node.names for part in alias.name.split(".")]
            elif _is_by_name(node):
                names, known = [ast.unparse(node.args[1]).strip("'")], own
            elif isinstance(node, ast.keyword):
                names = [node.arg or ""]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in elsewhere:
                names = node.value.split(".")  # a module's name, or a name within an object
            yield from ((_file(path), name) for name in names if _is_private(name, known | PUBLIC))


def _is_by_name(node: ast.AST) -> TypeGuard[ast.Call]:
    """True for getattr, setattr and the like."""
    return isinstance(node, ast.Call) and len(node.args) > 1 and _last_name(node.func).endswith("attr")


def _last_name(node: ast.expr) -> str:
    """The name behind the last dot of what is called; empty for what has none. (ast.unparse is slow.)"""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_self(node: ast.expr) -> bool:
    """True for ``self``, ``cls`` and ``super()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _overridden() -> Iterator[tuple[str, str]]:
    """Private names of a foreign base that a class defines or uses as its own: by file and name."""
    for path in sorted((ROOT / "lit_qlora").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name == "lit_qlora.model.nf4" and not importlib.util.find_spec("triton"):
            continue  # which is imported where Triton is installed only
        for kind in vars(importlib.import_module(name)).values():
            if inspect.isclass(kind) and kind.__module__ == name:
                foreign = [base for base in kind.__mro__[1:] if not base.__module__.startswith("lit_qlora")]
                known = {one for base in foreign for one in (*vars(base), *_of_self(base))}
                for one in known & {*vars(kind), *_of_self(kind)}:
                    if _is_private(one, MADE_BY_METACLASS | PUBLIC):
                        yield _file(path), one


@cache
def _of_self(kind: type) -> list[str]:
    """Private names that the source of a class has of itself; none where it has no source."""
    with suppress(TypeError, OSError):
        return re.findall(r"\b(?:self|cls|super\(\))\.(_\w+)", inspect.getsource(kind))
    return []


def _file(path: Path) -> str:
    return path.relative_to(ROOT).as_posix().removeprefix("lit_qlora/")


def _is_private(name: str, but: set[str]) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name not in {"_", *but}


SENTENCES_READ = {
    ("storage/files.py", "disk_error"): "safetensors raises the system's number of an error in its sentence alone",
    ("options.py", "error"): "jsonargparse has no field for a required option, or a file that names an option only",
    ("options.py", "_mistake"): "nor for the name of an unknown option",
    ("options.py", "_misfit"): "nor for the name of a class that is not there",
    ("errors.py", "one_line"): "cuts a sentence that is shown",
    ("errors.py", "first_line"): "takes its first line, to be shown",
    ("secrecy.py", "redact"): "replaces secrets in what is shown",
    ("console.py", "fitted"): "finds where the mark of a shown line ends, to indent those below it",
    ("console.py", "_in_lines"): "breaks a shown line, but not within a command or a path",
    ("callbacks/checkpoints.py", "attempt"): "whether it is the one reported last, not what it says",
    ("data/row_files.py", "_reason"): "json's own may end with 'at', before the column that follows",
    ("model/script.py", "reading"): "the key of a KeyError has no other field",
}
"""Functions that look into the sentence of an error, for which there is no field, and why."""
READERS = {"search", "match", "fullmatch", "findall", "finditer", "sub", "get", "count", "find", "rfind", "index"}
READERS |= {"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "removeprefix", "removesuffix"}
SHOWN = {"str", "repr", "ascii", "format", "one_line", "first_line", "excerpt", "cut", "shown"}
"""Functions whose result says what an error says."""


def test_no_sentence_of_an_error_is_read_but_where_there_is_no_field_for_it() -> None:
    """`UserError` has fields. To show a sentence is not to read it; nor is prose compared, whoever wrote it."""
    errors = {path: _errors(tree) for path, tree in TREES.items()}
    scopes = [(path, node) for path, tree in TREES.items() for node in _walk(tree) if isinstance(node, ast.FunctionDef)]
    functions = defaultdict[str, list[ast.FunctionDef]](list)
    for path, scope in scopes:
        if path.is_relative_to(ROOT / "lit_qlora") and not hasattr(builtins, scope.name):
            functions[scope.name].append(scope)
    given, kept = defaultdict[ast.FunctionDef, set[str]](set), set[str]()
    for _ in range(3):  # a sentence that is given to a function may be given on
        texts = [(path, scope, _Sentences(scope, errors[path], given[scope], kept)) for path, scope in scopes]
        for _, scope, sentences in texts:
            kept |= {name for name in sentences.names if name.startswith(".")}
            for function, argument in sentences.given_on(scope, functions):
                given[function].add(argument)
    found = {
        (_file(path), scope.name): f"line {node.lineno}: {ast.unparse(node)}"
        for path, scope, sentences in texts
        for node in _walk(scope)
        if sentences.are_read_by(node) or (path.is_relative_to(ROOT / "lit_qlora") and _reads_prose(node))
    }
    assert {place: line for place, line in found.items() if place not in SENTENCES_READ} == {}
    assert {*SENTENCES_READ} == {*found}
    assert sum(map(len, errors.values())) > 80


def _errors(tree: ast.Module) -> set[str]:
    """Names that a module gives to exceptions."""
    caught = {node.name for node in _walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    typed = [node for node in _walk(tree) if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation]
    given = [node for node in typed if re.search(r"Error\b|Exception\b", ast.unparse(node.annotation))]
    return caught | {node.arg if isinstance(node, ast.arg) else ast.unparse(node.target) for node in given}


class _Sentences:
    """The texts in a function that say what an error says, under whatever names."""

    def __init__(self, scope: ast.AST, errors: set[str], given: set[str], kept: set[str]) -> None:
        self.errors, self.names = errors, given | kept
        bound = [found for node in _walk(scope) for found in _bound(node)]
        for _ in range(3):  # one may be made of another
            for target, value in bound:
                if self._is_one(value):
                    stored = [one for one in _walk(target) if isinstance(getattr(one, "ctx", None), ast.Store)]
                    self.names |= {one.id for one in stored if isinstance(one, ast.Name)}
                    self.names |= {f".{one.attr}" for one in stored if isinstance(one, ast.Attribute)}

    def _is_error(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and node.attr in ("__cause__", "__context__"):
            return self._is_error(node.value)
        return isinstance(node, ast.Name) and node.id in self.errors

    def _is_one(self, node: ast.AST | None) -> bool:
        shown: Iterable[ast.AST] = ()  # what becomes a text, if it is none
        words: Iterable[ast.AST] = ()
        match node:
            case ast.Name(id=name):
                return name in self.names
            case ast.Attribute(value=value, attr=attr):
                is_field = attr in ("problem", "remedy", "msg", "said", "args", "fields") and self._is_error(value)
                return is_field or f".{attr}" in self.names
            case ast.Call(func=ast.Name(id=name), args=args):
                shown = args if name in SHOWN else ()
            case ast.Call(func=ast.Attribute(value=value, attr=attr), args=args):
                words, shown = [value], args if attr in ("format", "join") else ()
            case ast.JoinedStr(values=values):
                shown = [part.value for part in values if isinstance(part, ast.FormattedValue)]
            case ast.BinOp(left=left, right=right):
                shown = [left, right, *getattr(right, "elts", ())]
            case ast.Subscript(value=value):
                words = [value]
            case ast.BoolOp() | ast.IfExp() | ast.NamedExpr():
                words = ast.iter_child_nodes(node)
        return any(map(self._is_one, (*words, *shown))) or any(map(self._is_error, shown))

    def given_on(
        self, scope: ast.AST, functions: Mapping[str, Sequence[ast.FunctionDef]]
    ) -> Iterator[tuple[ast.FunctionDef, str]]:
        """Functions that get one, and the names of their arguments that do."""
        for call in (node for node in _walk(scope) if isinstance(node, ast.Call)):
            for function in functions.get(_last_name(call.func), ()):
                arguments = [one.arg for one in function.args.args if one.arg not in ("self", "cls")]
                given = [*zip(arguments, call.args, strict=False), *((one.arg, one.value) for one in call.keywords)]
                yield from ((function, argument) for argument, value in given if argument and self._is_one(value))

    def are_read_by(self, node: ast.AST) -> bool:
        """True if ``node`` looks at the words of one; ``split()`` at blanks does not."""
        match node:
            case ast.Compare(left=left, comparators=others, ops=ops):
                return not isinstance(ops[0], ast.Is | ast.IsNot) and any(map(self._is_one, (left, *others)))
            case ast.Call(func=ast.Attribute(value=value, attr=attr), args=args) if attr in READERS and args:
                return any(map(self._is_one, (value, *args)))
            case ast.Subscript(value=value, slice=key):
                is_field = isinstance(value, ast.Attribute)  # error.args[0]
                return self._is_one(key) or (not is_field and self._is_one(value))
            case ast.Match(subject=subject):
                return self._is_one(subject)
        return False


def _reads_prose(node: ast.AST) -> bool:
    """True if ``node`` compares something with words that people read, or searches for them."""
    sides: list[ast.expr] = []
    match node:
        case ast.Compare(left=left, comparators=others):
            sides = [part for one in (left, *others) for part in getattr(one, "elts", [one])]
        case ast.Call(func=ast.Attribute(attr=attr), args=[first, *_]) if attr in READERS:
            sides = [first]
    texts = [str(one.value) for one in sides if isinstance(one, ast.Constant)]
    return any(re.search(r"[a-z]{2,} [a-z]{2,}", text, re.IGNORECASE) for text in texts)


def _bound(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """What a node gives a value, and that value."""
    match node:
        case ast.Assign(targets=targets, value=value):
            yield from ((target, value) for target in targets)
        case ast.AnnAssign() | ast.AugAssign() | ast.NamedExpr():
            yield node.target, node.value
        case ast.For() | ast.comprehension():
            yield node.target, node.iter
