"""The house: imports go down only, help comes at once, the README's commands are real."""

import ast
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from lit_qlora.cli import FIT_AND_KIN, TOOLS
from lit_qlora.forecast.cards import CARDS
from lit_qlora.model.architectures import ARCHITECTURES
from lit_qlora.model.optimizer import OPTIMIZERS
from lit_qlora.usage import EXAMPLES

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "lit_qlora").rglob("*.py"))
SCRIPTS = sorted(path for room in ("scripts", "benchmarks", "examples") for path in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
WRAPPED = ROOT / "tests" / "test_console.py"
"""The test of where lines break, which takes whole ones to see."""
FLOORS = {
    "__version__": -1, "place": -1, "secrecy": -1,  # even an error may name the command, and show no secret
    "wording": -1, "columns": -1, "metrics": -1,
    "errors": 0, "batch": 0, "quiet": 0, "signals": 0, "console": 0.1, "ranges": 0.5, "devices": 1, "arguments": 1,
    "elsewhere": 1, "options": 2, "configs": 3, "signatures": 3, "command": 3.5, "precheck": 4, "usage": 4, "text": 1,
    "demo": 1, "storage": 1, "data": 2, "model": 2, "forecast": 3, "figures": 3, "callbacks": 4, "start": 4,
    "trainer": 4, "chosen": 5, "training": 5, "tools": 6, "cli": 7, "__main__": 8,
}  # fmt: skip

UNSAFE = {"pickle", "dill", "joblib", "torch.load", "torch.save", "eval", "exec", "trust_remote_code", "allow_pickle"}


def _room(module: str) -> str:
    return module.split(".")[1]


def _full_names(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    """Each name that a module uses, as it is called where it was imported from."""
    known = dict[str, str]()
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else []:
            whole = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            known |= {alias.asname or alias.name: whole} if alias.asname or isinstance(node, ast.ImportFrom) else {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            yield node, f"{known.get(first, first)}{dot}{rest}"


def test_the_rules_are_of_all_modules_and_tests() -> None:
    assert len(MODULES) > 150 and len(TESTS) > 100 and len(SCRIPTS) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    """Ruff's TID252 holds that none is relative."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if len(parts) < 2 or parts[1] == "__init__":
        return
    own = parts[1]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [
                f"{node.module}.{alias.name}" if node.module == "lit_qlora" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("lit_qlora.") and _room(name) != own:
                assert FLOORS[_room(name)] < FLOORS[own], f"{own} may not import {name}"


def test_text_is_words_only() -> None:
    modules = [f"lit_qlora.text.{path.stem}" for path in (ROOT / "lit_qlora" / "text").glob("*.py")]
    assert len(modules) >= 10
    code = f"import sys, {', '.join(modules)}\n"
    code += "print({'torch', 'lightning', 'transformers', 'datasets'} & {*sys.modules})"
    assert _python("-c", code).stdout.strip() == "set()"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_runs_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not UNSAFE & {name for _, name in _full_names(tree)}
    for node in ast.walk(tree):
        named = [getattr(node, name, None) for name in ("id", "arg", "module")]
        named += [ast.unparse(node)] if isinstance(node, ast.Attribute | ast.keyword) else []
        named += [alias.name for alias in getattr(node, "names", [])]
        if "trust_remote_code=False" in named:
            continue
        assert not UNSAFE & {*named}, f"line {getattr(node, 'lineno', '?')}"


PROMPT_FORMATS = {"llama2", "own_template", "jinja"}
"""The modules of text/ that are prompt formats, or parts of one."""
MAKERS = "make_format|from_record|read_format|recorded_format|format_for"
"""The functions that give a prompt format."""
INTERFACE = {"pieces", "check", "check_system", "chat_template", "described", "modelfile", "notes", "kept", "left_out"}
INTERFACE |= {"is_given_by", "learns_last_only", "tags_in", "writes", "opens_in_space", "tokenizer_remedy", "title"}
INTERFACE |= {"system", "is_assumed", "assumption", "marks", "spelled", "end_of_turn", "options", "record", "identity"}
INTERFACE |= {"cache_key"}
"""Attributes of a format that others may use."""
PARTS = r"(options|identity|cache_key|tags|end_of_turn|marks|spelled|title)\b|record\(\)|__class__"
"""Attributes that distinguish formats, to be passed on or written, and never asked about."""
NAMES = {"LLAMA_2", "OF_BASE"}
"""Values of data.template, which data/templates.py reads for all others."""


def _named_formats(tree: ast.Module) -> str:
    """What a module calls the prompt formats that it is given, as a pattern."""
    typed = (node for node in ast.walk(tree) if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation)
    found = {
        node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
        for node in typed
        if "PromptFormat" in ast.unparse(node.annotation)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.NamedExpr | ast.comprehension):
            value = node.iter if isinstance(node, ast.comprehension) else node.value
            targets = getattr(node, "targets", None) or [getattr(node, "target", node)]
            if any(re.match(rf"([\w.]+\.)?({MAKERS})\(|([\w.]+\.)?prompt_format$", one) for one in _choices(value)):
                found |= {ast.unparse(one) for target in targets for one in getattr(target, "elts", [target])}
    return "|".join(map(re.escape, sorted(found))) or "(?!)"


def _choices(value: ast.expr) -> Iterator[str]:
    """The values that an expression may have, or hold."""
    match value:
        case ast.IfExp(body=first, orelse=second):
            yield from (*_choices(first), *_choices(second))
        case ast.BoolOp(values=values) | ast.Tuple(elts=values) | ast.List(elts=values):
            yield from (found for one in values for found in _choices(one))
        case _:
            yield ast.unparse(value)


class _Unaliased(ast.NodeTransformer):
    """Puts what distinguishes formats in place of the names that a function gives to it."""

    def __init__(self, formats: str) -> None:
        self.is_part = re.compile(rf"({formats})\.({PARTS}).*", re.DOTALL).match
        self.names: dict[str, ast.expr] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        assigned = [one for one in ast.walk(node) if isinstance(one, ast.Assign | ast.NamedExpr)]
        pairs = [(getattr(one, "targets", [getattr(one, "target", one)])[0], one.value) for one in assigned]
        for target, value in pairs:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs += zip(target.elts, value.elts, strict=False)
        self.names = {ast.unparse(name): value for name, value in pairs if self.is_part(ast.unparse(value))}
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.names.get(node.id, node) if isinstance(node.ctx, ast.Load) else node


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_outside_text_asks_which_prompt_format_it_has(path: Path) -> None:
    """All that hangs on it is a method of `PromptFormat`."""
    if path.parent.name != "text":
        assert [*_format_questions(ast.parse(path.read_text()), path.name == "templates.py")] == []


@pytest.mark.parametrize(
    "question",
    [
        "if data.prompt_format.name == 'x': pass",
        "if self.prompt_format.options['template']: pass",
        "is_own = prompt_format.options['template'] is None",
        "source = prompt_format.source",
        "def f(prompt_format):\n  made, tags = 1, prompt_format.options\n  if tags == 2: pass",
        "def f(found: PromptFormat):\n  return {'</s>': 1}[found.end_of_turn]",
        "x = isinstance(make_format(None), int)",
        "x = len(one.prompt_format.tags) > 2",
        "x = prompt_format.record()['prompt_format'] in names",
        "if options.data.template == 'llama2': pass",
        "from lit_qlora.text.formats import LLAMA_2",
        "match prompt_format.identity:\n  case 1: pass",
        "x = prompt_format is None or prompt_format.cache_key",
        "x = type(self.prompt_format) is int",
        "if (one := read_format(folder)).source is None: pass",
        "one = a.prompt_format if a else None\none.source",
        "one, two = read_format(a), 1\none.source",
        "x = [one.name for one in (a.prompt_format, b)]",
        "x = self.format_for(a).source",
        "x = a.prompt_format == DEFAULT_FORMAT",
    ],
)
def test_a_question_about_the_prompt_format_is_found(question: str) -> None:
    assert [*_format_questions(ast.parse(question))] != []


def _format_questions(tree: ast.Module, reads_option: bool = False) -> Iterator[str]:
    """Lines in which a module asks which prompt format it has."""
    named = rf"(?:[\w.]+\.)?\bprompt_format|(?:{_named_formats(tree)})|(?:[\w.]+\.)?(?:{MAKERS})\(.*\)"
    which = rf"\b(?:{named})\.(?:{PARTS})|\b(?:isinstance|type)\((?:{named})(?!\w)|'(?:jinja|llama2(?:-chat)?)'"
    which += rf"|(?:{named}) (?:==|!=|in|not in) "
    for node in ast.walk(_Unaliased(named).visit(tree)):
        names = set[str]()
        if isinstance(node, ast.ImportFrom):
            names = {(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)} & PROMPT_FORMATS
        if isinstance(node, ast.ImportFrom | ast.Attribute) and not reads_option:
            names |= NAMES & {getattr(node, "attr", ""), *(alias.name for alias in getattr(node, "names", ()))}
        if isinstance(node, ast.Attribute) and re.fullmatch(named, ast.unparse(_value(node.value)), re.DOTALL):
            names |= {node.attr} - INTERFACE
        if names or any(re.search(which, ast.unparse(_Compared().visit(deepcopy(one)))) for one in _asked(node)):
            yield f"line {getattr(node, 'lineno', '?')}: {ast.unparse(node)}"


def _value(node: ast.expr) -> ast.expr:
    return node.value if isinstance(node, ast.NamedExpr) else node


class _Compared(ast.NodeTransformer):
    """Leaves out comparisons with what another format has, under a name: whether two are one says not which it is."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        sides = (node.left, *node.comparators)
        is_with_other = isinstance(node.ops[0], ast.Eq | ast.NotEq) and any(
            isinstance(one, ast.Name) and not one.id.isupper() for one in sides
        )
        return ast.Constant(True) if is_with_other else node


def _asked(node: ast.AST) -> list[ast.expr]:
    """The questions that a node is: what is compared, looked up or decided by."""
    match node:
        case ast.If() | ast.IfExp() | ast.While():
            return [node.test]
        case ast.Match(subject=subject):
            return [subject]
        case ast.Compare() | ast.BoolOp():
            return [node]
        case ast.Subscript(slice=key):
            return [key]
        case ast.Call(func=func, args=args):
            name = ast.unparse(func)
            return [node] if name in ("isinstance", "type") else args[:1] if name.endswith(".get") else []
    return []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_entry_of_a_table_is_asked_for_by_its_name_elsewhere(path: Path) -> None:
    """All that hangs on an architecture, an optimizer or a card is in its entry."""
    tables = {"architectures.py": ARCHITECTURES, "optimizer.py": OPTIMIZERS, "cards.py": [one.name for one in CARDS]}
    names = {name for file, table in tables.items() if file != path.name for name in table}
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Compare() | ast.MatchValue():
                parts = [*ast.walk(node)]
            case ast.Call(func=ast.Attribute(attr="startswith" | "endswith" | "find" | "count")):
                parts = [part for one in node.args for part in ast.walk(one)]
            case _:
                continue
        asked = {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
        found = asked & names | {part for part in asked if len(part) > 3 and any(part in name for name in names)}
        assert not found, f"line {node.lineno}: {ast.unparse(node)}"


FORESEEN = {"foresee", "fits_to_score", "together_on_host", "loading_bytes", "run_folder_bytes", "Forecast"}
FORESEEN |= {"once_out_of_room", "quickest", "smallest_change", "words", "kept_words", "RESERVE"}
FORESEEN |= {"find_card", "current_card", "Card", "DEFAULT", "Needs", "Rows", "Samples", "guanaco_lengths"}
"""Names of forecast/ for other rooms: what a run will need, what to change, and what a forecast is made from."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_there_is_one_road_to_a_forecast(path: Path) -> None:
    """No other room computes a part of one."""
    if path.parent.name != "forecast":
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
        found = {
            alias.name
            for node in imports
            for alias in node.names
            if "lit_qlora.forecast." in f"{getattr(node, 'module', '')}.{alias.name}."
        }
        assert found <= FORESEEN
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert "Forecast" not in called


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_json_has_one_reader(path: Path) -> None:
    """The reader knows what json.loads makes of 200,000 brackets; what a library or this run sent needs none."""
    if path.name == "files.py" and path.parent.name == "storage":
        return
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    known = {id(node.func) for node in calls if re.search(r"^(file|sent)$|\.to_str\(\)$", ast.unparse(node.args[0]))}
    read = [node for node, name in _full_names(tree) if re.match(r"json\.loads?$", name)]
    assert not [f"line {node.lineno}" for node in read if id(node) not in known]


@pytest.mark.parametrize("path", sorted({*TESTS} - {WRAPPED}), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_freezes_the_sentence_of_an_error(path: Path) -> None:
    """The fields and the words that matter are compared (tests/expect.py): a sentence can be improved without them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
            sides = [part for side in (node.left, *node.comparators) for part in getattr(side, "elts", [side])]
            whole = [side for side in sides if re.match("(error|warning): ", words := _literal(side)) and ";" in words]
            assert not whole, f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.keyword) and node.arg == "match":
            written = "|".join(_literal(one) for one in ast.walk(node.value) if isinstance(one, ast.expr))
            prose = re.search(r"(?:[A-Za-z][a-z']*[,;]? ){6}[a-z]+", written.replace("\\", ""))
            assert not prose, (
                f"line {node.value.lineno}: {prose and prose[0]!r}: match the words that matter, with .* between"
            )


def _literal(node: ast.expr) -> str:
    """The text that a literal holds, without what an f-string puts in; empty for anything else."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(one.value for one in parts if isinstance(one, ast.Constant) and isinstance(one.value, str))


def test_each_verb_has_its_examples() -> None:
    assert {*EXAMPLES} == {*FIT_AND_KIN, *TOOLS}


def test_help_is_light_and_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    shown = _python("main.py", "--help")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2  # an import of torch takes longer
    assert "python main.py fit" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert {*FIT_AND_KIN, *TOOLS, "doctor"} == {*re.findall(r"^.{10}(\w+)  ", shown.stdout, re.MULTILINE)}
    heavy = "{'torch', 'lightning', 'transformers', 'peft', 'jsonargparse', 'datasets', 'yaml'} & {*sys.modules}"
    code = f"import sys; from lit_qlora.cli import main; main(['--help']); print({heavy})"
    assert _python("-c", code).stdout.endswith("set()\n")


def test_the_help_of_fit_needs_no_more_than_lightning() -> None:
    """Lightning itself takes seconds to import, and brings torch and a part of transformers along."""
    heavy = "{'accelerate', 'bitsandbytes', 'datasets', 'matplotlib', 'pandas', 'peft', 'pyarrow', 'tensorboard'}"
    code = f"import sys; from lit_qlora.cli import main; main(['fit', '--help']); print({heavy} & {{*sys.modules}})"
    assert _python("-c", code).stdout.endswith("set()\n")


def _command(name: str, page: str = "README.md") -> str:
    return (ROOT / page).read_text().split(f"<!-- run: {name} -->\n```bash\n")[1].split("\n```")[0]


@pytest.mark.slow(first=True)
def test_the_readmes_commands_as_they_stand_and_their_numbers(tmp_path: Path) -> None:
    """The commands run from the clone on, which is of this checkout, in the environment that they install."""
    assert _command("demo").splitlines()[0] == "python main.py fit"
    setup = re.sub(r"https://github\S+", f"{ROOT} lit-qlora", _command("setup"))
    script = f"{setup}\nexec 2> '{tmp_path}/errors'\n{_command('demo')}"
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = tmp_path / "errors"
    assert done.returncode == 0, errors.read_text() if errors.exists() else done.stderr
    assert errors.read_text() == "(the newest run's adapter answers: runs/demo/adapter)\n"
    perplexity = re.search(r"held-out perplexity +([\d.]+) +([\d.]+)", done.stdout)
    ended = re.search(r"answers that ended by themselves +(\d+) of 32 +(\d+) of 32\n", done.stdout)
    cut = re.search(r"answers cut at 48 tokens +(\d+) of 32 +(\d+) of 32\n", done.stdout)
    assert perplexity and ended and cut
    assert float(perplexity[1]) / float(perplexity[2]) >= 3
    assert [int(ended[when]) + int(cut[when]) for when in (1, 2)] == [32, 32]
    assert int(ended[1]) < 3 and int(ended[2]) > 29
    *closing, answer = done.stdout.splitlines()
    assert answer.endswith(".")
    assert [line for line in closing if len(line) > 80] == []
    known = (
        r"( *(load|demo|data|learns|model|train|run)  |step |peak memory|best adapter: runs/demo|report|next|curves"
        r"|held-out|answers (that|cut)|  +before|  base alone|$)"
    )
    start = closing.index("  base alone                             with the adapter")
    samples = closing[start : closing.index("", start)]
    assert 4 <= len(samples) <= 13  # three questions, and at most three lines of each answer
    assert [line for line in closing if not re.match(known, line) and line not in samples] == [
        "      and ask it: Who goes everywhere with Silas?"
    ]


def test_the_test_command_is_the_ci_s() -> None:
    assert _command("tests").endswith(".venv/bin/python -m pytest -q")
    assert "run: tests" in (ROOT / ".ci" / "run").read_text()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def _python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=True, env=_environment()
    )


FRAGMENTS = {
    "Another", "Around", "As", "By", "Else", "For", "From", "In", "It", "Its", "Likewise", "Of", "Over", "That",
    "Those", "Until", "Whether", "Which", "With", "Without"
}  # fmt: skip
"""Words that begin the rest of a sentence whose subject is elsewhere."""


@pytest.mark.parametrize(
    "path", [*MODULES, *SCRIPTS, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_docstring_is_complete_in_itself(path: Path) -> None:
    """A module's, a class's, a function's or a value's: a noun phrase, an imperative or a sentence."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and (words := _literal(node.value).split()):
            assert words[0].strip(",:") not in FRAGMENTS, f"line {node.lineno}: {' '.join(words[:8])}"
            clause = re.search(r"^ +[*\w]+: (has|likewise|that|which|whose)\b.*", _literal(node.value), re.MULTILINE)
            assert not clause, f"line {node.lineno}: {clause and clause[0].strip()}"


def _listed(words: str) -> set[str]:
    """The names under ``Args:`` in a docstring."""
    _, _, args = words.partition("Args:\n")
    return {*re.findall(r"^    (\w+): ", re.split(r"\n\n?(?=\w)", args)[0], re.MULTILINE)}


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_public_class_says_what_its_arguments_are(path: Path) -> None:
    """All arguments of its own constructor are named; others only where it passes on what it does not name."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        said = _listed(ast.get_docstring(node) or "")
        for made in (one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"):
            given = {one.arg for one in (*made.args.args[1:], *made.args.kwonlyargs)}
            assert given == (said & given if made.args.kwarg else said), node.name


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_public_class_says_what_its_fields_are(path: Path) -> None:
    """Under ``Args:``, in its sentences between double backticks, or below the field; or in a text that it is given."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            words = ast.get_docstring(node) or ""
            said = _listed(words) | {*re.findall(r"``(\w+)[^`]*``", words)}
            for one, below in pairwise((*node.body, None)):
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and one.target.id[0] != "_":
                    has_text = isinstance(one.value, ast.Call) and any(map(_literal, one.value.args))
                    has_text |= isinstance(below, ast.Expr) and bool(_literal(below.value))
                    assert has_text or one.target.id in said, f"line {one.lineno}: {node.name}.{one.target.id}"


SEVERAL = {
    "T": "a type variable, which has no meaning beyond its function",
    "main": "what a verb does after LightningCLI has parsed its options, and the command itself",
    "parse": "the parser of a form of rows, called with its module",
}
"""Names that several modules have, and why."""


def _named(tree: ast.Module) -> set[str]:
    """The functions, classes and values of a module."""
    made = (node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    assigned = (node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign))
    targets = (node.targets if isinstance(node, ast.Assign) else [node.target] for node in assigned)
    return {*made, *(one.id for each in targets for target in each for one in ast.walk(target) if hasattr(one, "id"))}


ROLES = {
    "host": "the host's memory: what is needed, what there is",
    "memory": "that of a training step: by formula, as measured",
    "metrics": "the figures of a run: what each is and where it is shown, and how those of training are computed",
    "record": "a run's record of figures: what keeps it, how callbacks reach it",
    "report": "what came of a run: on the terminal, in its page, and the verb that writes that anew",
    "samples": "sample answers: how they are made, how they are recorded and shown",
    "words": "what a room prints",
}
"""Names of modules in several rooms, and the one thing that each is about."""


def _owners(names: Callable[[Path], set[str]]) -> dict[str, list[str]]:
    """The names that several modules have, and where; special ones, such as ``__version__``, aside."""
    owners: dict[str, list[str]] = {}
    for path in MODULES:
        for name in names(path):
            owners.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return {name: where for name, where in sorted(owners.items()) if len(where) > 1 and not name.startswith("__")}


def test_a_name_means_one_thing() -> None:
    """A private one, too: who searches for it finds one."""
    several = _owners(lambda path: _named(ast.parse(path.read_text())))
    wrong = [f"{name} is in {' and in '.join(where)}" for name, where in several.items() if name not in SEVERAL]
    assert not wrong, f"{'; '.join(wrong)}: say in one of them what it is there, or import it"
    assert {*SEVERAL} <= {*several}


def test_modules_of_one_name_are_about_one_thing() -> None:
    assert {*_owners(lambda path: {path.stem})} == {*ROLES}


def _own(path: Path, kept: ast.ClassDef) -> list[ast.FunctionDef]:
    """The public methods of a class that no base of it has, and so documents."""
    if path in SCRIPTS:  # not imported, for the libraries that they need: one with a base has hooks alone
        return [one for one in kept.body if isinstance(one, ast.FunctionDef) and one.name[0] != "_" and not kept.bases]
    made = getattr(import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)), kept.name)
    public = (one for one in kept.body if isinstance(one, ast.FunctionDef) and not one.name.startswith("_"))
    return [one for one in public if not any(hasattr(base, one.name) for base in made.__mro__[1:])]


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_public_function_names_its_arguments(path: Path) -> None:
    body = [one for one in ast.parse(path.read_text()).body if not getattr(one, "name", "_").startswith("_")]
    methods = [(one, True) for made in body if isinstance(made, ast.ClassDef) for one in _own(path, made)]
    for one, is_method in [*((one, False) for one in body if isinstance(one, ast.FunctionDef)), *methods]:
        words = ast.get_docstring(one) or ""
        is_bound = is_method and "staticmethod" not in map(ast.unparse, one.decorator_list)
        given = [arg.arg for arg in (*one.args.args[is_bound:], *one.args.kwonlyargs)]
        said = _listed(words)
        said |= {*re.findall(r"``(\w+)[^`]*``", words)} if len(given) < 3 and not said else set()
        assert {*given} <= said, f"line {one.lineno}: {one.name}"


def _lets_out(node: ast.AST) -> bool:
    """True if an error is raised in ``node`` itself, and not in a try, which may catch it, or in a function within."""
    if isinstance(node, ast.Raise):
        return node.exc is not None
    parts = [*node.handlers, *node.orelse, *node.finalbody] if isinstance(node, ast.Try) else ast.iter_child_nodes(node)
    return any(_lets_out(part) for part in parts if not isinstance(part, ast.FunctionDef | ast.ClassDef))


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_public_function_says_what_it_raises(path: Path) -> None:
    """A constructor may say it in the words of its class."""
    tree = ast.parse(path.read_text())
    for made in (tree, *(one for one in tree.body if isinstance(one, ast.ClassDef) and not one.name.startswith("_"))):
        for one in (one for one in made.body if isinstance(one, ast.FunctionDef)):
            words = ast.get_docstring(one) or ""
            if one.name in ("__init__", "__post_init__"):
                words += ast.get_docstring(made) or ""
            elif one.name.startswith("_"):
                continue
            assert "Raises" in words or not _lets_out(one), f"line {one.lineno}: {one.name}"
