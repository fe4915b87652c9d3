"""Owns how a mistake is reported once by several processes, whichever of them made it.

The first process prints it, its own or another's; the others are silent, unless the first does not answer. Processes
that `starting` began only print: it shows the last line of the one that failed.
"""

import json
import os
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from lit_qlora.console import complain
from lit_qlora.devices.starting import of_process, was_started
from lit_qlora.devices.world import OF_TORCHRUN, LostError, board, hang_up, is_first, world
from lit_qlora.errors import UserError

REPORT_WAIT_S = 20.0
"""Seconds that another process waits for the report of the first, which may still import torch."""
LINGER_S = 3.0
"""Seconds that the first process stays, so that the others learn of its report."""


def report_once(problem: str | UserError) -> None:
    """Print ``problem``, with which this command ends, once for all processes of the run.

    Args:
        problem: in one line; a `LostError` is about another process.
    """
    is_of_several = {*OF_TORCHRUN} <= {*os.environ} and not was_started()
    if is_of_several and is_first():
        _print_for_all(problem)
    elif not (is_of_several and _is_said(problem)):
        complain(problem, "error: " if is_first() else of_process())


def _print_for_all(problem: str | UserError) -> None:
    found: Any = None
    shown, mark = problem, "error: "
    if isinstance(problem, LostError):  # which one is, and why
        with suppress(Exception):
            found = board(timedelta(seconds=REPORT_WAIT_S))
            if found.check(["failed"]):
                sent = found.get("failed")
                rank, fields = json.loads(sent)
                shown, mark = UserError(**fields), of_process(world()._replace(rank=rank))
    complain(shown, mark)
    with suppress(Exception):
        hang_up()
        found = found or board(timedelta(seconds=REPORT_WAIT_S))
        found.set("said", "")
        found.set("failed", _sent(problem))
        ends_at = time.monotonic() + LINGER_S
        while found.add("heard", 0) < world().size - 1 and time.monotonic() < ends_at:
            time.sleep(0.05)


def _sent(problem: str | UserError) -> str:
    """``problem`` of this process for another one."""
    return json.dumps([world().rank, problem.fields if isinstance(problem, UserError) else {"problem": problem}])


def _is_said(problem: str | UserError) -> bool:
    """True if the first process has reported the problem, after getting it from here unless this is a `LostError`."""
    is_lost = isinstance(problem, LostError)
    try:
        found = board(timedelta(seconds=REPORT_WAIT_S))
        if not is_lost:
            found.set("failed", _sent(problem))
        hang_up()
        found.wait(["said"], timedelta(seconds=LINGER_S if is_lost else REPORT_WAIT_S))
        found.add("heard", 1)
    except Exception:
        return False
    return True
