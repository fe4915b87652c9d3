"""What a save costs: each byte is written once and read once, for its hash, and little waits for the disk."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_qlora.storage.checkpoint_io import FolderCheckpointIO

LINEARS = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
RANK = 16
COUNTS = Path("/proc/self/io")


def passed() -> tuple[int, int]:
    """Bytes that this process has read and written so far, by its own system calls."""
    counts = dict(line.split(": ") for line in COUNTS.read_text().splitlines())
    return int(counts["rchar"]), int(counts["wchar"])


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each sync."""
    calls, real = list[int](), os.fsync

    def sync(descriptor: int) -> None:
        calls.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    return calls


def cost(io: FolderCheckpointIO, layers: int, folder: Path, synced: list[int]) -> tuple[int, float, float, int, float]:
    """Bytes of a save of so many layers of the 7B; how often they are read and written; syncs; seconds."""
    shapes = [shape for wide, high in LINEARS for shape in ((RANK, wide), (high, RANK))] * layers
    state = {
        "state_dict": {f"lora_{index}": torch.rand(shape) for index, shape in enumerate(shapes)},
        "optimizer_states": [
            {"state": {i: {"exp_avg": torch.rand(s), "exp_avg_sq": torch.rand(s)} for i, s in enumerate(shapes)}}
        ],
    }
    before, started = passed(), time.monotonic()
    synced.clear()
    io.save_checkpoint(state, folder)
    taken_s, after = time.monotonic() - started, passed()
    size = sum(file.stat().st_size for file in folder.iterdir())
    read, written = ((now - then) / size for then, now in zip(before, after, strict=True))
    return size, read, written, len(synced), taken_s


@pytest.mark.skipif(not COUNTS.is_file(), reason="this system counts no bytes")
@pytest.mark.parametrize("layers", [1, pytest.param(32, marks=pytest.mark.slow)])
def test_a_save_of_the_7b(tmp_path: Path, synced: list[int], layers: int) -> None:
    io = FolderCheckpointIO()
    cost(io, 1, tmp_path / "first", synced)  # what is imported on the way is no part of it
    size, read, written, syncs, taken_s = cost(io, layers, tmp_path / "second", synced)
    # Printed, not compared: a shared disk's speed varies. One per cent of 100 steps of 7 s on a T4 is 7 s.
    print(f"{size / 1e6:.0f} MB in {taken_s:.1f} s")
    assert size == pytest.approx(12 * 39_976_960 * layers / 32, rel=2e-3)
    assert 0.99 < read < 1.01
    assert 0.99 < written < 1.01
    assert syncs <= 5  # state.json, state.safetensors, the manifest, the folder, and the one that it stands in


@pytest.mark.skipif(not COUNTS.is_file(), reason="this system counts no bytes")
@pytest.mark.parametrize("more", ["read", "write"])
def test_a_second_pass_would_be_seen(
    tmp_path: Path, synced: list[int], monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    from lit_qlora.storage import checkpoint_io

    real = checkpoint_io.write_folder

    def write_folder(target: Path, fill: Callable[[Path], None], **options: object) -> None:
        real(target, fill, **options)  # type: ignore[arg-type]
        file = target / "state.safetensors"
        if more == "read":
            file.read_bytes()
        else:
            file.write_bytes(bytes(file.stat().st_size))

    monkeypatch.setattr(checkpoint_io, "write_folder", write_folder)
    _, read, written, _, _ = cost(FolderCheckpointIO(), 1, tmp_path / "one", synced)
    assert (read if more == "read" else written) > 1.9
