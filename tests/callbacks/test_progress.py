"""The progress bar at a terminal: one line that is written over, which is all that a notebook can follow."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lit_qlora.callbacks.progress import TimeLeft

ROOT = Path(__file__).parents[2]
OPTIONS = "--trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.log_every_n_steps 1 --samples.count 0"


def run(folder: Path, *options: str, interrupt: bytes | None = None) -> tuple[int, str]:
    """Exit status and output of a fit at a terminal; it gets a Ctrl-C once it has printed what ``interrupt`` finds."""
    ours, its = pty.openpty()
    command = [sys.executable, str(ROOT / "main.py"), "fit", *OPTIONS.split(), *options]
    fit = subprocess.Popen(command, cwd=folder, env=os.environ | {"COLUMNS": "100"}, stdout=its, stderr=its)
    os.close(its)
    text = b""
    try:
        while part := os.read(ours, 65536):
            text += part
            if interrupt and re.search(interrupt, text):
                fit.send_signal(signal.SIGINT)
                interrupt = None
    except OSError:  # what reading a terminal raises once nobody has it open
        pass
    os.close(ours)
    return fit.wait(), text.decode().replace("\r\n", "\n")


@pytest.mark.slow
def test_a_ctrl_c_leaves_no_bar_and_fits_beside_it(tmp_path):
    status, shown = run(
        tmp_path, "--trainer.max_steps", "200", "--trainer.limit_val_batches", "0", interrupt=rb" [1-9]\d*/200 \["
    )
    assert status == 130
    assert max(len(line) for line in shown.replace("\r", "\n").split("\n") if "%|" in line) + len("^C") <= 100
    left = [line.split("\r")[-1].rstrip() for line in shown.split("\n")]
    assert left[-3].startswith("stopping after this step") and left[-2].startswith("stopped and saved at step")
    assert not any("%|" in line for line in left)


@pytest.mark.slow
def test_validations_take_the_bars_own_line(tmp_path):
    status, shown = run(tmp_path, "--trainer.limit_val_batches", "2")
    assert status == 0
    assert "\x1b" not in shown  # no cursor movement: a notebook would keep a line for each state of the bar
    left = [line.split("\r")[-1] for line in shown.split("\n")]  # each draws over all of the line before
    steps = [line.split()[1] for line in left if "held-out loss" in line and line.startswith("step ")]
    assert steps == ["0", "2", "4"]
    assert [line[:10] for line in left if "%|" in line] == ["train 100%"]


def test_the_time_left_does_not_jump_at_a_validation():
    """Steps of 2 s, a validation of 60 s every 10 steps: the time shown falls by exactly what has passed."""
    left = TimeLeft(35, 5, 100.0)
    shown = {step: left.at(step, 100.0 + 2.0 * (step - 5), 10, 60.0) for step in range(6, 36)}
    assert shown[6] == 29 * 2 + 4 * 60
    assert (shown[9] - shown[10], shown[19] - shown[20]) == (62, 62)  # a step, and the validation after it
    assert [shown[step] - shown[step + 1] for step in (10, 15, 21)] == [2, 2, 2]
    assert shown[35] == 0


def test_the_time_left_without_validations():
    assert TimeLeft(35, 0, 0.0).at(5, 10.0, float("inf"), 60.0) == 60
