"""Owns the trained demo that the verbs are tried on, and its answerer: made once for all of them."""

import os
from pathlib import Path

import pytest

from lit_qlora import quiet
from lit_qlora.chosen import choose_adapter
from lit_qlora.cli import main
from lit_qlora.tools.answering.answerer import Answerer

ROOT = Path(__file__).parents[2]


def pytest_configure(config):
    """Lets through what the command line silences too; lit_qlora/quiet.py has the reason beside each."""
    for message in quiet.WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a process that runs main.py of this checkout."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run of the demo that has learned to end its answers."""
    run = tmp_path_factory.mktemp("trained") / "runs" / "demo"
    options = ["--samples.count", "0", "--trainer.limit_val_batches", "2", "--trainer.val_check_interval", "40"]
    assert main(["fit", "--run", str(run), "--trainer.max_steps", "40", *options]) == 0
    return run


@pytest.fixture(scope="session")
def answerer(trained) -> Answerer:
    return Answerer(choose_adapter(str(trained)))
