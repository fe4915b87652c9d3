"""Random kills of the real command: SIGKILL, at any moment of a run, until it finishes; the whole storm is a script."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def storm(*args: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "storm.py"), *args],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kills(told: str) -> int:
    found = re.search(r"^(\d+) kills: ", told, re.MULTILINE)
    assert found, told
    return int(found[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the storm forks from a process that has done the imports")
def test_killed_at_random_it_ends_as_if_never_cut() -> None:
    total = 0
    for seed in range(1, 6):  # how often a run is hit hangs on the machine's mood
        told = storm("--runs", "3", "--seed", str(seed), "--cold", "0", "--variants", "packed")
        assert told.startswith("3 of 3 runs ended as if never cut, to the last bit\n")
        total += kills(told)
        if total >= 5:
            return
    pytest.fail(f"only {total} kills in 15 runs")
