"""Each use of another project's private name is here with its reason: they may change with any release of it.

Those that only tests use are not: such a test fails by itself.
"""

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("lit_qlora", "benchmarks", "scripts", "examples")
FILES = [ROOT / "main.py", *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

USED = {
    # Lightning: its loops have no hook between two optimizer steps, and its command line no subcommand without a run.
    "_data_fetcher": "what its loop asks for whether a validation follows; callbacks/steps.py",
    "_should_check_val_fx": "whether a validation follows this micro-batch; callbacks/steps.py",
    "_logger_connector": "holds the next; callbacks/steps.py",
    "_first_loop_iter": "is set by a validation that Lightning did not begin; callbacks/steps.py",
    "_broadcast_sigterm_tensor": "what its loop would do in each micro-batch of several processes; callbacks/steps.py",
    "_parse_ckpt_path": "would load a pickle and let it override the command line",
    # jsonargparse: types of options, for the nearest name, a stranger's config and flags that stand alone.
    "_actions": "argparse's own list of options, which has no public name",
    "_typehint": "an option's type",
    "_check_type_": "reads any text as YAML, where '# x' is nothing; options.py",
    # torch
    "_dynamo": "the only way to say which dimension changes in size from call to call",
    "_efficient_attention_forward": "the kernel that gives the sums that its own gradient needs",
    "_foreach_add_": "one kernel for hundreds of small tensors, as torch's optimizers have it",
    "_foreach_copy_": "the same",
    "_foreach_zero_": "the same",
    # datasets, transformers, jinja2
    "_data_files": "a key of the state.json that datasets.save_to_disk writes",
    "_compile_jinja_template": "a template as a tokenizer reads it, block by block",
}
PUBLIC = {"_asdict", "_replace", "_exit", "_fail_with_undefined_error", "_gib"}
"""Documented in spite of the underscore: named tuples', os._exit, and jinja2.Undefined's; and a unit of figures."""

MADE_BY_METACLASS = {"_abc_impl", "_backward_cls", "_is_protocol", "_is_runtime_protocol"}
"""Of each class, by its metaclass: nobody wrote them."""


def test_private_names_of_others_are_listed_with_a_reason_and_none_is_listed_for_nothing() -> None:
    found: dict[str, list[str]] = {}
    for name, place in [*_of_others(), *_overridden()]:
        found.setdefault(name, []).append(place)
    assert {name: places for name, places in found.items() if name not in USED} == {}
    assert {*USED} - {*found} == set()
    assert len(USED) <= 16


def test_no_module_reads_a_private_attribute_that_another_defines() -> None:
    """But of what a class inherits: a mixin's parts are its own."""
    read = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for path, tree in TREES.items()
        if path.parts[len(ROOT.parts)] == "lit_qlora"
        for own in [_own([tree]) | {*USED} | PUBLIC]
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") != "self" and _is_private(node.attr, own)
    ]
    assert read == []


def _own(trees: Iterable[ast.Module] = TREES.values()) -> set[str]:
    """Private names that this project defines somewhere."""
    found = set[str]()
    for tree in trees:
        # A name without a value is of a base, for the type checker.
        declared = {
            id(node.target) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and node.value is None
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in declared:
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if getattr(node.value, "id", "") in ("self", "cls") else set()
    return found


def _of_others() -> Iterator[tuple[str, str]]:
    """Private names that are read off something, imported or written as a text, and are none of this project's."""
    own = _own() | PUBLIC
    for path, tree in TREES.items():
        # Such as what follows a name in an f-string; one may begin with a private name, too.
        behind = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lit_qlora"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.keyword):
                names = [node.arg or ""]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in behind:
                names = [node.value]  # for getattr
            yield from ((name, f"{path.relative_to(ROOT)}:{node.lineno}") for name in names if _is_private(name, own))


def _overridden() -> Iterator[tuple[str, str]]:
    """Private names that a class here defines over one of the same name in a foreign base."""
    for path in sorted((ROOT / "lit_qlora").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name == "lit_qlora.model.nf4" and not importlib.util.find_spec("triton"):
            continue  # which is imported where Triton is installed only
        for kind in vars(importlib.import_module(name)).values():
            if inspect.isclass(kind) and kind.__module__ == name:
                foreign = [base for base in kind.__mro__[1:] if not base.__module__.startswith("lit_qlora")]
                known = {one for base in foreign for one in vars(base)}
                for one in known & {*vars(kind)}:
                    if _is_private(one, MADE_BY_METACLASS):
                        yield one, f"{name}.{kind.__qualname__}"


def _is_private(name: str, but: set[str]) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name not in {"_", *but}


SENTENCES_READ = {
    "storage/files.py": "safetensors raises the system's number of an error in its sentence alone",
    "options.py": "jsonargparse wraps the errors of an option in sentences, ours too, and drops them",
}
"""Modules that read the sentence of another project's error, which has no field for what it says."""
READERS = {"search", "match", "fullmatch", "findall", "startswith", "endswith", "find", "index", "count"}


def test_no_sentence_of_an_error_is_read_but_where_there_is_no_field_for_it() -> None:
    """`UserError` has fields. To show a sentence, or its first line, is not to read it."""
    found = {
        str(path.relative_to(ROOT / "lit_qlora")): f"line {node.lineno}: {ast.unparse(node)}"
        for path, tree in TREES.items()
        if path.is_relative_to(ROOT / "lit_qlora")
        for errors in [_errors(tree)]
        for node in ast.walk(tree)
        if any(_is_sentence(part, errors) for part in _read(node))
    }
    assert {place: line for place, line in found.items() if place not in SENTENCES_READ} == {}
    assert {*SENTENCES_READ} == {*found}


def _errors(tree: ast.Module) -> set[str]:
    """Names that a module gives to exceptions."""
    caught = {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    given = {
        one.arg
        for one in ast.walk(tree)
        if isinstance(one, ast.arg)
        and one.annotation
        and re.search(r"Error\b|Exception\b", ast.unparse(one.annotation))
    }
    return caught | given


def _is_sentence(node: ast.AST, errors: set[str]) -> bool:
    """True for ``str(error)``, and for what is said of it."""
    words = {f"str({name})" for name in errors}
    words |= {f"{name}.{field}" for name in errors for field in ("problem", "remedy", "msg", "said")}
    return ast.unparse(node).removesuffix(".strip()").removesuffix(".lower()") in words


def _read(node: ast.AST) -> list[ast.expr]:
    """The expressions whose words a node looks at."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
        return [node.func.value, *node.args]
    return []
