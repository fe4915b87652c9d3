"""Owns the record of memory: peaks by phase, of the GPU as seen by torch and of the host. Knows no model."""

import sys
import threading
import weakref
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_qlora.callbacks.record import record
from lit_qlora.devices.world import highest, summed
from lit_qlora.storage.files import GIB


class PeakMemory(Callback):
    """A callback that records the peak of each phase: loading, training (up to each validation) and validation.

    Allocated is the memory of tensors; reserved is what torch holds of the card, and what must fit. The host's peak is
    that of the process so far, without memory-mapped weight files, whose pages the system reclaims when memory is
    short.
    """

    def __init__(self) -> None:
        self.peaks_gib: dict[str, float] = {}
        """The peaks by their names in the record."""
        self._host = _HostWatch()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the phase of loading."""
        self._end("load")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a stretch of training."""
        if trainer.global_step:
            self._end("train")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a validation, and record."""
        self._end("validation")
        self._record(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record training without validations."""
        if not trainer.enable_validation:
            self._end("train")
            self._record(trainer)

    def _record(self, trainer: Trainer) -> None:
        """Record the peaks of the GPU that holds most, and of all processes on the host."""
        host = summed({name: peak for name, peak in self.peaks_gib.items() if name == "memory/host_gib"})
        highest_gib = dict(zip(self.peaks_gib, highest(*self.peaks_gib.values()), strict=True))
        self.peaks_gib = highest_gib | host
        record(trainer, self.peaks_gib)

    def _end(self, phase: str) -> None:
        if torch.cuda.is_available():
            allocated, reserved = (torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB)
            for kind, peak in (("allocated", allocated), ("reserved", reserved)):
                name = f"memory/{phase}_{kind}_gib"
                self.peaks_gib[name] = max(peak, self.peaks_gib.get(name, 0.0))
            torch.cuda.reset_peak_memory_stats()
        host = self._host.peak_gib()
        if host is not None:
            self.peaks_gib["memory/host_gib"] = host


class _HostWatch:
    """The peak host memory of this process, sampled five times a second; the system keeps no such peak."""

    INTERVAL_S = 0.2

    def __init__(self) -> None:
        self._peak_bytes = 0
        if Path("/proc/self/status").is_file():
            threading.Thread(target=_watch, args=(weakref.ref(self),), name="host memory", daemon=True).start()

    def peak_gib(self) -> float | None:
        """Peak host memory in GiB so far; with mapped files except on Linux; None if unavailable."""
        if Path("/proc/self/status").is_file():
            self.look()
            return self._peak_bytes / GIB
        if sys.platform == "win32":
            return None
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB

    def look(self) -> None:
        """Compare what the process holds now with the peak."""
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        held = (line.split()[1] for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
        self._peak_bytes = max(self._peak_bytes, sum(int(kib) * 1024 for kib in held))


def _watch(held: "weakref.ref[_HostWatch]") -> None:
    """Look as long as anybody holds the watch: a process may train many times."""
    pause = threading.Event()
    while not pause.wait(_HostWatch.INTERVAL_S) and (watch := held()):
        watch.look()
        del watch
