"""What each device computes with: decided by compute capability, refused where it would be emulated or missing."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
import transformers.utils

from lit_qlora.model.device import (
    Device,
    check_attention,
    check_compile,
    check_kernels,
    choose_precision,
    compiler_lacks,
    compiles_kernels,
    compute_dtype,
    current_device,
    seed_by_position,
)

CPU = Device("CPU", None)
T4 = Device("Tesla T4", (7, 5))
A100 = Device("NVIDIA A100-SXM4-40GB", (8, 0))


@pytest.fixture(autouse=True)
def _torch_counts_emulation(monkeypatch):
    """Have torch count emulated bf16 as supported, as it does on a T4 since 2.4."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), ("16-mixed", "compute capability 7.0 has no bf16")),
        ((7, 5), ("16-mixed", "compute capability 7.5 has no bf16")),
        ((8, 0), ("bf16-mixed", "compute capability 8.0")),
        ((8, 9), ("bf16-mixed", "compute capability 8.9")),
        ((9, 0), ("bf16-mixed", "compute capability 9.0")),
        ((10, 0), ("bf16-mixed", "compute capability 10.0")),
        (None, ("32-true", "no GPU")),
    ],
)
def test_auto(capability, expected):
    assert choose_precision("auto", Device("some device", capability)) == expected


@pytest.mark.parametrize(
    ("wanted", "device"),
    [("16-mixed", T4), ("32-true", T4), ("16-mixed", A100), ("bf16-mixed", A100), ("32-true", CPU)],
)
def test_what_is_asked_for_is_taken(wanted, device):
    assert choose_precision(wanted, device) == (wanted, "as asked")


def test_bf16_is_refused_on_a_t4(expect_error):
    expect_error(lambda: choose_precision("bf16-mixed", T4), "Tesla T4", "7.5", "16-mixed", option="trainer.precision")


def test_fp16_is_refused_without_a_gpu(expect_error):
    expect_error(lambda: choose_precision("16-mixed", CPU), "16-mixed", "CUDA", "32-true", option="trainer.precision")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("device", [CPU, T4, A100])
def test_sdpa_and_eager_run_everywhere(attention, device):
    check_attention(attention, device)


@pytest.mark.parametrize("device", [CPU, T4])
def test_flash_attention_2_is_refused_below_ampere(device, monkeypatch, expect_error):
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    expect_error(
        lambda: check_attention("flash_attention_2", device),
        device.name,
        "8.0",
        "use sdpa",
        option="model.attention",
    )


def test_flash_attention_2_is_refused_without_its_package(monkeypatch, expect_error):
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    expect_error(
        lambda: check_attention("flash_attention_2", A100),
        "flash-attn",
        "use sdpa",
        option="model.attention",
    )


def test_flash_attention_2_with_all_it_needs(monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    check_attention("flash_attention_2", A100)


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_the_gpu_is_the_current_device_where_there_is_one(accelerator, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9_000, 15_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5_000)
    assert current_device(accelerator) == T4._replace(memory_bytes=14_000)
    assert current_device("cpu") == CPU


def test_the_cpu_is_the_current_device_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert current_device() == CPU


def test_compute_dtype():
    assert compute_dtype("16-mixed") == torch.float16
    assert compute_dtype("bf16-mixed") == torch.bfloat16
    assert compute_dtype("32-true") == torch.float32


@pytest.mark.parametrize(
    ("wanted", "device", "why"),
    [("auto", T4, "triton and a C compiler"), ("auto", CPU, None), (False, T4, None), (False, CPU, None)],
)
def test_without_a_compiler_auto_goes_without_and_says_why(monkeypatch, wanted, device, why):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    assert check_compile(wanted, device) == why


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "lacks", "expected"),
    [
        ("auto", True, None, True), ("auto", False, None, False), ("auto", True, "triton", False),
        (True, False, None, True), (True, True, None, True), (False, True, None, False),
    ],
)  # fmt: skip
def test_whether_kernels_are_compiled(wanted, on_gpu, lacks, expected):
    assert compiles_kernels(wanted, on_gpu, lacks) is expected


def test_with_a_compiler_nothing_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    assert check_compile(True, CPU) is None


@pytest.mark.parametrize(
    ("built", "capability", "expected"),
    [
        (["sm_75", "sm_80", "sm_90a", "compute_120"], (7, 0), "compute capability 7.0, and torch"),
        (["sm_75", "sm_80"], (7, 5), None),
        (["sm_75", "sm_80"], (12, 0), None),
        (["sm_50", "sm_60", "sm_100"], (6, 1), None),
        (["sm_50", "sm_60", "sm_100"], (3, 7), "has kernels from 5.0 on"),
        ([], (3, 7), None),
    ],
)
def test_a_card_too_old_for_this_build_of_torch_is_refused(monkeypatch, built, capability, expected, expect_error):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    card = Device("Tesla P100", capability)
    if expected is None:
        check_kernels(card)
    else:
        expect_error(lambda: check_kernels(card), "Tesla P100", expected, option="trainer.accelerator")


def test_a_card_elsewhere_and_a_cpu_need_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    for device in (CPU, Device("P100", (6, 0), is_here=False)):
        check_kernels(device)


def test_nothing_is_compiled_for_a_card_too_old_for_triton():
    lack = "a GPU of compute capability 7.0"
    assert lack in compiler_lacks((6, 0))
    assert not any(lack in compiler_lacks(capability) for capability in ((7, 0), (7, 5), None))


def test_compiling_that_is_asked_for_needs_a_compiler(monkeypatch, expect_error):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    expect_error(lambda: check_compile(True, CPU), "a C compiler", "gcc", option="model.compile")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_chance_is_that_of_a_seed_for_the_place(device):
    seed_by_position(5, 2, 7, torch.zeros(0, device=device).device)
    found = torch.rand(3), torch.rand(3, device=device)
    torch.manual_seed(int.from_bytes(hashlib.sha256(b"5/2/7/0").digest()[:8], "big"))
    assert [one.tolist() for one in found] == [torch.rand(3).tolist(), torch.rand(3, device=device).tolist()]
