"""Each use of another project's private name is here with its reason: they may change with any release of it.

Those that only tests use are not: such a test fails by itself.
"""

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeGuard

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
"""By file of lit_qlora and name."""
PUBLIC = {"_asdict", "_replace", "_exit", "_fail_with_undefined_error", "_gib"}
"""Documented in spite of the underscore: named tuples', os._exit, and jinja2.Undefined's; and a unit of figures."""

MADE_BY_METACLASS = {"_abc_impl", "_backward_cls", "_is_protocol", "_is_runtime_protocol"}
"""Of each class, by its metaclass: nobody wrote them."""


def test_each_use_of_a_private_name_is_listed_with_a_reason_and_none_is_listed_for_nothing() -> None:
    """Of another project's, or of another module's."""
    uses = [*_read_elsewhere(), *_overridden()]
    assert sorted({f"{file}: {name}" for file, name in uses if (file, name) not in USED}) == []
    assert {*USED} - {*uses} == set()
    assert len(uses) <= 20
    assert len(TREES) > 150 and ROOT / "main.py" in TREES


def _own(trees: Iterable[ast.Module]) -> set[str]:
    """Private names that modules define."""
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


def _read_elsewhere() -> Iterator[tuple[str, str]]:
    """Uses of private names of others, read off something, imported or in a text: by file and name."""
    anyones = _own(TREES.values())  # a mixin's parts are its own
    for path, tree in TREES.items():
        own = _own([tree])
        # Such as what follows a name in an f-string; one may begin with a private name, too.
        elsewhere = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
        elsewhere |= {id(node.args[1]) for node in ast.walk(tree) if _is_by_name(node)}
        for node in ast.walk(tree):
            names, known = list[str](), anyones
            if isinstance(node, ast.Attribute):
                names, known = [node.attr], anyones if ast.unparse(node.value) in ("self", "cls", "super()") else own
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
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr") and len(node.args) > 1


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
