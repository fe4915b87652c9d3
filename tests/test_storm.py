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


def kills(printed: str) -> int:
    found = re.search(r"^(\d+) kills: ", printed, re.MULTILINE)
    assert found, printed
    return int(found[1])


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
    total = 0
    for seed in range(1, 6):  # how often a run is hit hangs on the machine's mood
        printed = storm("--runs", "3", "--seed", str(seed), "--cold", "0", "--variants", "packed")
        assert printed.startswith("3 of 3 runs ended as if never cut, to the last bit\n")
        total += kills(printed)
        if total >= 5:
            return
    pytest.fail(f"only {total} kills in 15 runs")


@pytest.mark.slow(first=True)
def test_the_command_itself_killed_at_random_ends_as_if_never_cut() -> None:
    """``python main.py`` each time, imports and all."""
    total = 0
    for seed in range(1, 6):
        printed = storm("--runs", "2", "--seed", str(seed), "--cold", "1", "--variants", "accumulated")
        assert printed.startswith("2 of 2 runs ended as if never cut, to the last bit\n")
        total += sum(int(count) for count in re.findall(r"\(cold\) (\d+)", printed))
        if total >= 5:
            return
    pytest.fail(f"only {total} kills in 10 runs")
