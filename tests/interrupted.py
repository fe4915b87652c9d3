"""Owns how a test sends a signal to a fit that runs as a process: at a step, as its output says."""

import re
import subprocess
from collections.abc import Callable


def interrupt(process: subprocess.Popen[str], step: int, send: Callable[[], object]) -> tuple[str, str]:
    """Call ``send`` once ``process`` prints the line of ``step``; return what else it printed, and its errors."""
    assert process.stdout
    for line in process.stdout:
        if re.match(rf"step +{step}/", line):
            send()
            break
    return process.communicate(timeout=60)
