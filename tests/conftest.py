"""Owns what every test stands on: one thread, no hub, small caches of its own, and paths to small real things."""

import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch and bitsandbytes are imported: models this small are slower on two threads than on one,
# much slower where another test run has the second core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# With 4-bit copies of bases in it: one in the user's own would change what is tested.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lit_qlora-tests-")
os.environ["HF_DATASETS_CACHE"] = f"{os.environ['HF_HOME']}/datasets"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Under nohup SIGHUP is ignored, which we leave so: the tests of what it does have it as a terminal does.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
from hypothesis import settings

# A busy machine is slow, not wrong.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

pytest_plugins = ["tests.tiny_llama", "tests.expect"]

REAL = Path(__file__).parents[2] / "shared" / "real"


def pytest_unconfigure() -> None:
    """Caches of the tests' own go with them."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests that say so come first."""
    items.sort(key=lambda item: not any(mark.kwargs.get("first") for mark in item.iter_markers("slow")))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays to the end: garbage is looked for only in what tests make, in milliseconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.set_threshold(20_000)  # of 700, which is for programs that make little garbage: hundreds of whole searches
        _leave_imports_alone()


def pytest_runtest_logfinish() -> None:
    """What a test imported stays, too."""
    if len(sys.modules) > len(_left_alone) + 100:
        _leave_imports_alone()


_left_alone: set[str] = set()


def _leave_imports_alone() -> None:
    _left_alone.update(sys.modules)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def real() -> Path:
    """A real Llama 2 tokenizer, a tiny trained Llama and real Guanaco rows, where they are at hand."""
    if not REAL.is_dir():
        pytest.skip("no real inputs beside the checkout")
    return REAL


@pytest.fixture(scope="session", autouse=True)
def no_waste() -> Iterator[None]:
    """Leaves out what takes half of a small fit's time, and what hardly any test looks at.

    Charts, the picture of an adapter's card, and the wait for the disk, which only a power failure would need;
    nor is there a word on imports, whichever test is the first.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lit_qlora.cli.say_imports", lambda _: None)
        patched.setattr(os, "fsync", lambda _: None)
        patched.setattr("lit_qlora.figures.report.charts", lambda *_: iter(()))
        patched.setattr("lit_qlora.figures.card.draw_curves", _draw_nothing)
        _make_parsers_once(patched)
        _read_the_demo_once(patched)
        _quantise_the_demo_once(patched)
        yield


def _make_parsers_once(patched: pytest.MonkeyPatch) -> None:
    """The parsers of a verb are made of signatures, which stay: a tenth of a second each, for hundreds of commands."""
    from lit_qlora import training

    setup = training.QLoRACLI.setup_parser
    made: dict[Any, dict[str, Any]] = {}

    def setup_once(self: Any, *args: Any) -> None:
        key = type(self), self.verb, self.trainer_class
        if key not in made:
            before = {*vars(self)}
            setup(self, *args)
            made[key] = {name: value for name, value in vars(self).items() if name not in before}
        vars(self).update(made[key])

    patched.setattr(training.QLoRACLI, "setup_parser", setup_once)


def _read_the_demo_once(patched: pytest.MonkeyPatch) -> None:
    """Read the demo's 932 rows once: reading takes a seventh of a small fit."""
    from lit_qlora import demo
    from lit_qlora.data import held_out

    load = held_out.load_records
    read: dict[Any, Any] = {}

    def load_once(source: Any, split: str, reading: Any, seed: int | None = None) -> Any:
        if source.path != "demo" or source.columns or reading.columns:
            return load(source, split, reading, seed)
        key = demo.TRAIN, demo.TEST, source, split, reading, seed
        if key not in read:
            read[key] = load(source, split, reading, seed)
        found = read[key]
        return replace(found, dropped={**found.dropped}, kept=[*found.kept], left_out=[*found.left_out])

    patched.setattr(held_out, "load_records", load_once)


def _quantise_the_demo_once(patched: pytest.MonkeyPatch) -> None:
    """A copy has the same bits, draws as little chance as the loading does, and takes a sixth of its time."""
    from lit_qlora import demo
    from lit_qlora.model import load

    load_base = load.load_base
    loaded: dict[Any, Any] = {}

    def load_once(base: Any, dtype: Any, device: Any, attention: Any) -> Any:
        if base.location != str(demo.BASE) or device.type != "cpu":
            return load_base(base, dtype, device, attention)
        if (dtype, attention) not in loaded:
            loaded[dtype, attention] = load_base(base, dtype, device, attention)
        return deepcopy(loaded[dtype, attention])

    patched.setattr(load, "load_base", load_once)


def _draw_nothing(file: Path, figures: Mapping[int, Mapping[str, Any]], step: int) -> bool:
    """An empty file where there would be a picture."""
    from lit_qlora.figures.charts import points

    if is_drawn := max(len(points(figures, name)) for name in ("train/loss", "val/loss")) > 1:
        file.touch()
    return is_drawn


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws charts and pictures after all."""
    from lit_qlora.figures import charts

    monkeypatch.setattr("lit_qlora.figures.report.charts", charts.charts)
    monkeypatch.setattr("lit_qlora.figures.card.draw_curves", charts.draw_curves)


@pytest.fixture(scope="session")
def parser_of() -> Callable[[str], Any]:
    """Makes the parser of fit, validate or test."""

    def parser_of(verb: str) -> Any:
        from contextlib import ExitStack

        from lit_qlora import command, training

        kept: list[Any] = []

        class Parsed(training.QLoRACLI):
            def parse_arguments(self, parser: Any, args: Any) -> None:
                kept.append(self.verb_parser)
                raise SystemExit

        with pytest.raises(SystemExit):
            Parsed(command.Command([verb]), ExitStack())
        return kept[0]

    return parser_of
