"""Classes are judged by their sources, unimported: what is missing is refused, what can't be told passes."""

import sys

import pytest

from lit_qlora.classes import Named, check_classes, take_out
from lit_qlora.errors import UserError
from lit_qlora.precheck import check_first

MODULES = {
    "mine/__init__.py": "from mine.inner import *\n",
    "mine/inner.py": "import sys\nclass Kept: ...\n",
    "mine/lazy.py": "def __getattr__(name): ...\n",
    "mine/made.py": "globals()['X'] = 3\n",
    "mine/attached.py": "__getattr__, __dir__ = attach()\n",
    "mine/run.py": "exec('X = 3')\n",
    "mine/put.py": "locals()['X'] = 3\n",
    "mine/updated.py": "vars().update(X=3)\n",
    "mine/reads.py": "if 'X' not in locals(): pass\n",
    "mine/odd.py": "from nowhere import *\n",
    "mine/relative.py": "from .inner import *\n",
    "mine/torn.py": "class X(:\n",
    "mine/either.py": "try:\n    from fast import X\nexcept ImportError:\n    X = None\n",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    yield
    assert not any(name.split(".")[0] == "mine" for name in sys.modules)


@pytest.mark.parametrize(
    "name",
    [
        "mine.inner.Kept",
        "mine.Kept",
        "mine.lazy.X",
        "mine.made.X",
        "mine.put.X",
        "mine.updated.X",
        "mine.attached.X",
        "mine.run.X",
        "mine.relative.X",
        "mine.torn.X",
        "mine.either.X",
        "os.path.X",
        "sys.X",
    ],
)
def test_what_is_there_or_can_t_be_told_passes(name, modules):
    check_classes([Named("trainer.callbacks", name, frozenset({"anything"}))], {})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere.X", "No module named 'nowhere'"),
        ("mine.Nope", "module 'mine' has no attribute 'Nope'"),
        ("mine.nope.X", "module 'mine' has no attribute 'nope'"),
        ("mine.inner.X", "module 'mine.inner' has no attribute 'X'"),
        ("mine.reads.X", "module 'mine.reads' has no attribute 'X'"),
        ("mine.odd.X", "module 'mine.odd' has no attribute 'X'"),
    ],
)
def test_what_is_missing_is_refused(name, why, modules, expect_error):
    for given in (name, [name], {"class_path": name}, [{"class_path": name, "init_args": {}}]):
        expect_error(
            lambda given=given: check_classes([], {"trainer.logger": given}),
            f"{name!r} ({why})",
            option="trainer.logger",
        )


@pytest.mark.parametrize(
    "text",
    [
        "trainer: {callbacks: [{class_path: mine.inner.Kept}]}",
        "trainer.logger.class_path: mine.Kept",
        "trainer: {logger.class_path: mine.Kept, logger.init_args: {x: {class_path: mine.Kept}}}",
    ],
)
def test_the_first_look_imports_nothing_that_a_config_names(text, modules, tmp_path):
    """In whatever spelling: it may be a stranger's."""
    (tmp_path / "own.yaml").write_text(text)
    check_first("fit", ["--config", str(tmp_path / "own.yaml"), "--data.source", "demo"])


def test_a_class_may_have_the_arguments_that_a_config_gives_it(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "trainer: {callbacks: {class_path: EarlyStopping, init_args: {monitor: val/loss}}}"
    )
    args = ["--trainer.callbacks", "EarlyStopping", "--data.source", "demo"]
    check_first("fit", ["--config", str(tmp_path / "own.yaml"), *args, "--trainer.callbacks.patience", "3"])
    with pytest.raises(UserError, match="EarlyStopping needs monitor"):
        check_first("fit", args)
    with pytest.raises(UserError, match="unknown option 'patienc'"):
        check_first("fit", ["--config", str(tmp_path / "own.yaml"), *args, "--trainer.callbacks.patienc", "3"])


def test_arguments_go_to_the_class_before_them():
    args = ["--trainer.callbacks+=Timer", "--trainer.callbacks.interval", "step", "--model.rank=3"]
    args += ["--trainer.logger", "X", "--trainer.logger.init_args.a.b=1"]
    args += ["--trainer.callbacks+", "Y", "--trainer.callbacks.dict_kwargs.z=1"]
    rest, named = take_out(args)
    assert rest == [
        "--trainer.callbacks+=Timer",
        "--model.rank=3",
        "--trainer.logger",
        "X",
        "--trainer.callbacks+",
        "Y",
    ]
    assert named == [
        Named("trainer.callbacks", "Timer", frozenset({"interval"})),
        Named("trainer.logger", "X", frozenset({"a"})),
        Named("trainer.callbacks", "Y", None),
    ]
    with pytest.raises(UserError, match="'name' is an argument of a class, and none is named"):
        take_out(["--trainer.callbacks=X", "--trainer.logger.name", "y"])
    assert take_out(["--config", "x", "--trainer.logger.name", "y"]) == (
        ["--config", "x"],
        [Named("trainer.logger", "")],
    )
