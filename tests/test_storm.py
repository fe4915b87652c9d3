"""Random kills of the real command: SIGKILL, at any moment of a run, until it finishes; the whole storm is a script."""

import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.storm import ended_within

ROOT = Path(__file__).parents[1]


def storm(*args: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "storm.py"), *args],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the storm forks from a process that did the imports")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_start_that_became_another_program_can_be_killed() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(30)"]
    process = multiprocessing.get_context("fork").Process(target=os.execv, args=(sys.executable, sleep))
    began = time.monotonic()
    process.start()
    assert not ended_within(process, 0.5)
    process.kill()
    assert ended_within(process, 10)
    assert time.monotonic() - began < 20 and process.exitcode == -9


@pytest.mark.slow(first=True)
def test_killed_at_random_it_ends_as_if_never_cut() -> None:
    _check(storm("--runs", "15", "--kills", "5", "--cold", "0", "--variants", "packed"), 5)


@pytest.mark.slow(first=True)
def test_the_command_itself_killed_at_random_ends_as_if_never_cut() -> None:
    """``python main.py`` each time, imports and all."""
    printed = storm("--runs", "10", "--kills", "5", "--cold", "1", "--variants", "accumulated")
    _check(printed, 5)
    assert sum(int(count) for count in re.findall(r"\(cold\) (\d+)", printed)) >= 5


def _check(printed: str, least: int) -> None:
    """How often a run is hit hangs on the machine's mood: so there are as many runs as it takes."""
    found = re.match(r"(\d+) of \1 runs ended as if never cut, to the last bit\n(\d+) kills: ", printed)
    assert found and int(found[2]) >= least, printed
