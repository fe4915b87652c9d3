"""The limits of a T4 on a larger GPU: what the package then takes this machine for."""

import os
import sys
from contextvars import copy_context
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_qlora.forecast.foresee import current_card
from lit_qlora.model.device import Device, choose_precision, current_device

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
GIB = 1024**3


@pytest.fixture
def h100(monkeypatch):
    """A GPU of 80 GiB, as far as the limits ask torch about it; returns what they set in torch, by kind."""
    limits = {}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "set_device", lambda number: None)
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (79 * GIB, 80 * GIB))
    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", partial(limits.__setitem__, "share"))
    for kernels in ("flash", "cudnn", "mem_efficient", "math"):
        monkeypatch.setattr(torch.backends.cuda, f"enable_{kernels}_sdp", partial(limits.__setitem__, kernels))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    return limits


def test_the_package_takes_a_larger_gpu_for_a_t4(h100):
    import as_t4

    def limited():
        as_t4.emulate()
        device = current_device()
        return device, choose_precision("auto", device)[0], current_card()

    device, precision, card = copy_context().run(limited)
    assert device == Device("T4, emulated", (7, 5), int(14.2 * GIB))
    assert h100 == {"share": pytest.approx(14.2 / 80), "flash": False, "cudnn": False}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:2:16:8"
    assert precision == "16-mixed"
    assert card.memory_gib == pytest.approx(14.2 + 0.35, abs=0.1)
    assert current_device().capability == (9, 0), "outside of the limits"


def test_less_memory_alone_changes_no_capability(h100):
    import as_t4

    def limited():
        as_t4.limit_memory(23.3)
        return current_device()

    assert copy_context().run(limited) == Device("NVIDIA H100 80GB HBM3", (9, 0), int(23.3 * GIB))
    assert h100 == {"share": pytest.approx(23.3 / 80)} and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
