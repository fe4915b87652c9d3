import ast
import copy
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.errors import OutOfRoomError, UserError, cut, excerpt, one_line, require

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "lit_qlora").rglob("*.py"))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "it is wrong"),
        ({"option": "data.form"}, "data.form: it is wrong"),
        ({"place": Path("rows.jsonl")}, "rows.jsonl: it is wrong"),
        ({"remedy": "mend it"}, "it is wrong; mend it"),
        ({"option": "data.form", "remedy": "mend it"}, "data.form: it is wrong; mend it"),
        ({"place": "my.yaml:3", "option": "data.form"}, "my.yaml:3: data.form: it is wrong"),
        (
            {"place": "my.yaml:3", "option": "data.form", "remedy": "mend it"},
            "my.yaml:3: data.form: it is wrong; mend it",
        ),
    ],
)
def test_the_sentence_of_the_fields(fields: dict[str, Any], sentence: str) -> None:
    error = UserError("it is wrong", **fields)
    assert str(error) == sentence
    other = copy.copy(error)
    assert (str(other), other.option, other.place) == (sentence, error.option, error.place)


def test_other_fields() -> None:
    error = UserError("no folder 'x'", option="model.base", remedy="give a folder")
    assert str(error.replace(option="base")) == "base: no folder 'x'; give a folder"
    assert str(error.replace(option=None, place="a.yaml:1")) == "a.yaml:1: no folder 'x'; give a folder"
    assert str(error) == "model.base: no folder 'x'; give a folder"
    assert str(OutOfRoomError("out of memory", 2).replace(option="data.batch_size")) == "data.batch_size: out of memory"


def test_a_mistake_within_what_an_option_names() -> None:
    error = UserError("no JSON", place="base/config.json", remedy="take another copy")
    within = error.within("model.base")
    assert str(within) == "model.base: base/config.json: no JSON; take another copy"
    assert (within.option, within.place) == ("model.base", None)


def test_one_more_remedy() -> None:
    error = UserError("no JSON").advise("copy it anew")
    assert str(error) == "no JSON; copy it anew"
    assert str(error.advise("or remove it")) == "no JSON; copy it anew; or remove it"


def test_what_is_required() -> None:
    require(True, "data.max_length", "at least 8 tokens", 7)
    with pytest.raises(UserError) as caught:
        require(False, "data.max_length", "at least 8 tokens", 7, place="my.yaml")
    assert (caught.value.option, caught.value.place) == ("data.max_length", "my.yaml")
    assert caught.value.problem == "expected at least 8 tokens, got 7"


def test_a_long_value_is_cut() -> None:
    assert excerpt({"a": "\x1b[31m\n\u2028\ud800\x9b"}) == r"{'a': '\x1b[31m\n\u2028\ud800\x9b'}"
    assert excerpt("x" * 158) == "'" + "x" * 158 + "'"
    assert excerpt(["x" * 10_000]) == "['" + "x" * 104 + "…" + "x" * 51 + "']"
    assert excerpt("/a" * 200 + "/rows.jsonl").endswith("/a/a/rows.jsonl'")
    assert excerpt(16**6000) == "int …"
    with pytest.raises(UserError) as caught:
        require(False, "model.base", "a folder", "x" * 1_000_000)
    assert len(str(caught.value)) < 220


@pytest.mark.parametrize("before", [1, 25, 85])
def test_a_secret_is_not_cut_in_two(before: int) -> None:
    said = f"{'a ' * before}https://me:correct-horse-battery-staple@example.org/x"
    for short in (excerpt(said), cut(said), one_line(said)):
        assert "horse" not in short and "correct" not in short
        assert len(short) <= 200


def test_what_others_say_in_one_line() -> None:
    assert one_line(ValueError("no\n  such  key")) == "no such key"
    assert one_line("x" * 300) == "x" * 200


OURS = {"UserError", "DamagedFolderError", "OutOfRoomError", "RowError", "SaveError", "SecretError", "TextError"}
TAKES_APART = {
    "casefold", "endswith", "find", "findall", "finditer", "fullmatch", "index", "lower", "lstrip", "match",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rpartition", "rsplit", "rstrip", "search",
    "split", "splitlines", "startswith", "strip", "sub", "translate",
}  # fmt: skip


def taken_apart(source: str) -> list[int]:
    """The lines where the text of a caught error of ours is looked into, instead of its fields."""
    handlers = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler) and node.name]
    lines = []
    for handler in handlers:
        assert handler.type is not None
        if not OURS & {ast.unparse(kind) for kind in ast.walk(handler.type)}:
            continue
        texts = {f"str({handler.name})", f"{handler.name}.problem", f"{handler.name}.remedy", f"{handler.name}.args"}

        def is_text(node: ast.AST, texts: set[str] = texts, name: str | None = handler.name) -> bool:
            of_it = isinstance(node, ast.FormattedValue) and ast.unparse(node.value) == name
            return of_it or (isinstance(node, ast.expr) and ast.unparse(node) in texts)

        for node in (node for part in handler.body for node in ast.walk(part)):
            looked_into: list[ast.AST] = []
            if isinstance(node, ast.Assign) and any(map(is_text, ast.walk(node.value))):
                texts |= {ast.unparse(target) for target in node.targets}
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in TAKES_APART:
                assert isinstance(node.func, ast.Attribute)
                looked_into = [node.func.value, *(node.args if ast.unparse(node.func.value) == "re" else [])]
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn | ast.Eq | ast.NotEq):
                looked_into = [node.left, *node.comparators]
            elif isinstance(node, ast.Subscript):
                looked_into = [node.value]
            if any(is_text(part) for parent in looked_into for part in ast.walk(parent)):
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_takes_a_sentence_apart(path: Path) -> None:
    assert not taken_apart(path.read_text()), "a UserError has fields: option, place, problem, remedy"


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("raise UserError(str(error).replace('model.base:', 'base:', 1)) from error", True),
        ("text, _, remedy = str(error).partition(';')", True),
        ("raise UserError(f'{source}: {error}'.replace('turn 1 holds', 'it holds')) from error", True),
        ("text = str(error)\n    is_base = text.startswith('model.base')", True),
        ("found = re.search('model', str(error))", True),
        ("is_base = 'model.base' in str(error)", True),
        ("is_base = error.problem == 'no folder'", True),
        ("first = error.args[0]", True),
        ("raise error.replace(option='base') from error", False),
        ("raise UserError(f'{path}: {error}', remedy=error.remedy) from error", False),
        ("is_base = error.option == 'model.base'", False),
        ("print(f'warning: {error}')", False),
    ],
)
def test_a_sentence_taken_apart_is_found(line: str, is_found: bool) -> None:
    source = f"try:\n    pass\nexcept (OSError, UserError) as error:\n    {line}\n"
    assert bool(taken_apart(source)) == is_found
    assert not taken_apart(source.replace("UserError", "ValueError")), "what others say may be all there is"
