"""A base that no process holds whole: the same figures as with a whole one, and nothing whole left anywhere."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.devices.several import SHORT, alone, assert_same, fit

SHARED = ["--model.shard", "true"]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_shares_learn_what_a_whole_base_does(count: int) -> None:
    run = f"shared-{count}"
    assert fit(run, count, *SHORT, *SHARED) == [0] * count
    assert_same(alone(*SHORT), run)
