"""Owns how a test has several processes: forks of this one, which has everything imported, on the CPU with gloo."""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_qlora.devices import world
from lit_qlora.storage.files import parse_json

LIMIT_S = 120


def run_several(count: int, do: Callable[[], Any], limit_s: float = LIMIT_S, joins: bool = True) -> list[Any]:
    """What ``do`` gives in each of ``count`` processes of a run, in their order, as JSON has it.

    Before it they meet, if each ``joins``.

    An exception is its text; a process that was ended by a signal gives None.
    """
    with tempfile.TemporaryDirectory() as folder:
        numbers = [_fork(rank, count, do, Path(folder), joins) for rank in range(count)]
        statuses: dict[int, int] = {}
        ends_at = time.monotonic() + limit_s
        try:
            while len(statuses) < count:
                assert time.monotonic() < ends_at, f"still running after {limit_s} s: {statuses}"
                for rank, number in enumerate(numbers):
                    if rank not in statuses and os.waitpid(number, os.WNOHANG)[0]:
                        statuses[rank] = 0
                time.sleep(0.02)
        finally:
            for rank, number in enumerate(numbers):
                if rank not in statuses:
                    os.kill(number, signal.SIGKILL)
                    os.waitpid(number, 0)
        files = [Path(folder, f"{rank}.json") for rank in range(count)]
        return [parse_json(file.read_text(encoding="utf-8")) if file.is_file() else None for file in files]


def _fork(rank: int, count: int, do: Callable[[], Any], folder: Path, joins: bool) -> int:
    number = os.fork()
    if number:
        return number
    import json

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in places.items()} | {world.STORE: str(folder / "store")}
    try:
        if joins:
            world.join(None)
        found = do()
    except BaseException as error:
        traceback.print_exc()
        found = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
