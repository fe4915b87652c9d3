"""Peaks are reported by phase: loading, training, validation."""

import sys
import threading

import pytest
import torch

from lit_qlora.callbacks.memory import PeakMemory
from lit_qlora.callbacks.validation import HeldOutMetrics
from lit_qlora.figures.lines import read_lines
from lit_qlora.figures.record import Record
from lit_qlora.storage.run import RunFolder

GIB = 1024**3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not report a process's peak this way")
def test_the_hosts_peak_is_recorded_with_each_validation(trainer, tiny, rows, tmp_path):
    path = tmp_path / "metrics.jsonl"
    trainer(PeakMemory(), HeldOutMetrics(), logger=Record(RunFolder(tmp_path)), val_check_interval=2).fit(
        tiny(), datamodule=rows(4)
    )
    lines = [*read_lines(path)]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all({name for name in line if name.startswith("memory/")} == {"memory/host_gib"} for line in lines)
    host = [line["memory/host_gib"] for line in lines]
    assert 0.05 < host[0] <= host[-1] < 64  # a Python with torch; the unit is GiB


@pytest.fixture
def cuda(monkeypatch):
    """A card whose peaks the test sets, in GiB; both start anew with a phase, as torch's do."""
    card = {"allocated": 0.0, "reserved": 0.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # a build for CUDA asks its driver
    # Which torch's optimizers ask by themselves, in a build for CUDA.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: card["allocated"] * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: card["reserved"] * GIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: card.update(allocated=0.0, reserved=0.0))
    return card


def test_the_cards_peaks_stand_under_their_phases(cuda, trainer, tiny, rows, tmp_path):
    peaks = {"train": iter([6.0, 9.0, 7.0]), "validation": iter([3.0, 2.0, 4.0])}

    def uses(phase):
        cuda["allocated"] = max(cuda["allocated"], next(peaks[phase]))
        cuda["reserved"] = cuda["allocated"] + 1

    class Uses(tiny):
        def configure_model(self):
            cuda.update(allocated=4.0, reserved=5.0)

        def training_step(self, batch, batch_idx):
            uses("train")
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            uses("validation")
            super().on_validation_epoch_end()

    path = tmp_path / "metrics.jsonl"
    memory = PeakMemory()
    made = trainer(memory, HeldOutMetrics(), logger=Record(RunFolder(tmp_path)), val_check_interval=2)
    made.fit(Uses(), datamodule=rows(3))
    gib = {name: value for name, value in memory.peaks_gib.items() if name != "memory/host_gib"}
    assert gib == {
        "memory/load_allocated_gib": 4.0,
        "memory/load_reserved_gib": 5.0,
        "memory/validation_allocated_gib": 4.0,
        "memory/validation_reserved_gib": 5.0,
        "memory/train_allocated_gib": 9.0,
        "memory/train_reserved_gib": 10.0,
    }
    first, second, third = [*read_lines(path)]
    assert (first["memory/load_allocated_gib"], first["memory/validation_allocated_gib"]) == (4.0, 3.0)
    assert "memory/train_allocated_gib" not in first
    assert second["memory/train_reserved_gib"] == 10.0
    assert third["memory/validation_reserved_gib"] == 5.0


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux counts mapped files apart from other memory"
)
def test_a_mapped_file_is_no_memory_of_the_host_and_a_short_peak_is_seen(tmp_path):
    import mmap
    import time

    from lit_qlora.callbacks.memory import _HostWatch

    watch = _HostWatch()
    before = watch.peak_gib()
    file = tmp_path / "weights"
    file.write_bytes(bytes(256 * 1024**2))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[at] for at in range(0, len(mapped), 4096)) == 0
        assert watch.peak_gib() < before + 0.1
    held = bytearray(256 * 1024**2)
    held[::4096] = bytes(len(held[::4096]))
    time.sleep(3 * watch.INTERVAL_S)
    del held
    assert watch.peak_gib() > before + 0.2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux keeps no peak of its own")
def test_nobody_watches_the_host_for_a_callback_that_is_gone():
    before = set(threading.enumerate())
    memory = PeakMemory()
    (watch,) = set(threading.enumerate()) - before
    assert watch.is_alive()
    del memory
    watch.join(20)
    assert not watch.is_alive()


def test_training_without_validations_records_its_peaks_at_its_end(cuda, trainer, tiny, rows, tmp_path):
    class Uses(tiny):
        def training_step(self, batch, batch_idx):
            cuda.update(allocated=6.0, reserved=7.0)
            return super().training_step(batch, batch_idx)

    trainer(PeakMemory(), HeldOutMetrics(), logger=Record(RunFolder(tmp_path)), limit_val_batches=0).fit(
        Uses(), datamodule=rows(4)
    )
    recorded = [line["memory/train_reserved_gib"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert recorded == [7.0]
