"""A save is killed, or refused by the disk, at every single call that it makes; the next start is sound each time."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "faults"
ROOT = Path(__file__).parents[2]
KILLED, REPORTED = 9, 3


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: nothing here depends on the disk's speed."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
@pytest.mark.slow
def test_a_fault_at_every_call_of_a_save(folder: Path, tmp_path: Path) -> None:
    library = tmp_path / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, str(HERE / "sweep.py"), str(folder)],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    calls, ends = found["calls"], found["ends"]
    # An adapter in place of an older one, its copy likewise, and a checkpoint, after which the oldest goes.
    assert {name: calls.count(name) for name in ("mkdir", "rename", "rmdir", "fsync", "truncate")} == {
        "mkdir": 3, "rename": 6, "rmdir": 3, "fsync": 16, "truncate": 2,
    }  # fmt: skip
    assert len(calls) > 50
    assert ends["kill"] == [KILLED] * len(calls) + [0]
    # Of the checkpoint: an adapter or a copy that fails is tried again by then.
    first = len(calls) - 1 - calls[::-1].index("mkdir")
    last = len(calls) - 1 - calls[::-1].index("rename")
    for kind in ("ENOSPC", "EIO"):
        assert ends[kind] == [0] * first + [REPORTED] * (last - first) + [0] * (len(calls) + 1 - last)
