"""Owns the device that is computed on: what it supports, by its compute capability, and how its chance is seeded.

`decide_for` takes a GPU that is not here. `torch.cuda.is_bf16_supported()` is not used: it is true on a T4, where bf16
is emulated. Knows no model.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lit_qlora.devices.asked import Precision
from lit_qlora.errors import UserError, require

Attention = Literal["sdpa", "eager", "flash_attention_2"]

AMPERE = (8, 0)
"""The first compute capability with bf16 tensor cores and FlashAttention 2. A T4 is 7.5."""
NEED_AMPERE = ("bf16-mixed", "flash_attention_2")
"""The precision and the attention that no GPU below it computes."""
TRITON = (7, 0)
"""The first for which triton compiles."""


class Device(NamedTuple):
    """A device to compute on.

    Args:
        name: of the card, as messages show it.
        capability: compute capability, major and minor; None on the CPU.
        memory_bytes: what this process can use of a GPU's memory.
        is_here: False for a GPU of another machine: what is installed beside it is not known.
    """

    name: str
    capability: tuple[int, int] | None
    memory_bytes: int = 0
    is_here: bool = True

    @property
    def is_gpu(self) -> bool:
        """True for a GPU."""
        return self.capability is not None


_DECIDED_FOR: ContextVar[Device | None] = ContextVar("_DECIDED_FOR", default=None)


@contextmanager
def decide_for(device: Device) -> Iterator[None]:
    """Decide everything for ``device``, a GPU that is not here, instead of this machine's."""
    token = decide_from_now_on_for(device)
    try:
        yield
    finally:
        _DECIDED_FOR.reset(token)


def decide_from_now_on_for(device: Device) -> Token[Device | None]:
    """`decide_for` a ``device`` without an end, as far as the returned token is not used."""
    return _DECIDED_FOR.set(device)


def decides_for_another() -> bool:
    """True inside of `decide_for` a GPU that is not here."""
    device = _DECIDED_FOR.get()
    return device is not None and not device.is_here


def current_device(accelerator: str = "auto") -> Device:
    """The device that a Trainer will use by its ``accelerator``; within `decide_for`, always its device."""
    elsewhere = _DECIDED_FOR.get()
    if elsewhere is not None:
        return elsewhere
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return Device("CPU", None)
    room_bytes = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return Device(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), room_bytes)


def capability_words(capability: tuple[int, int]) -> str:
    """A compute ``capability`` as NVIDIA writes it, such as 7.5."""
    return ".".join(map(str, capability))


def by_bf16(gpus: Iterable[int]) -> tuple[list[int], list[int]]:
    """The GPUs among ``gpus``, by their numbers on this machine, that have bf16; and those that have not."""
    with_bf16, others = list[int](), list[int]()
    for gpu in gpus:
        (with_bf16 if torch.cuda.get_device_capability(gpu) >= AMPERE else others).append(gpu)
    return with_bf16, others


def lacks_kernels(capability: tuple[int, int]) -> str | None:
    """Why this build of torch can't compute on a GPU of compute ``capability``, major and minor; None if it can."""
    built = filter(None, (re.fullmatch(r"sm_(\d+)(\d)[a-z]?", name) for name in torch.cuda.get_arch_list()))
    oldest = min(((int(one[1]), int(one[2])) for one in built), default=capability)
    if capability >= oldest:
        return None
    shown, least = map(capability_words, (capability, oldest))
    return f"compute capability {shown}, and torch {torch.__version__} has kernels from {least} on"


OTHER_CARD = "take another card, such as a T4, or a build of torch that has kernels for this one"


def check_kernels(device: Device) -> None:
    """Check that torch can compute on a device.

    Args:
        device: device to compute on.

    Raises:
        UserError: this build of torch has no kernels for a GPU that old.
    """
    lack = lacks_kernels(device.capability) if device.capability and device.is_here else None
    if lack:
        remedy = f"{OTHER_CARD}, or give --trainer.accelerator cpu"
        raise UserError(f"{device.name} has {lack}", option="trainer.accelerator", remedy=remedy)


FAST_IN_BF16_FROM = 20_000_000
"""Weights of a base from which bf16 pays on a CPU with bf16 products: a base of 58 M trained 1.9 times as fast as in
fp32 on a Xeon with AMX. A tiny one is as fast in fp32, and exact."""


def choose_precision(wanted: Precision, device: Device, num_weights: int = 0) -> tuple[Precision, str]:
    """Choose the precision of training, as Lightning spells it.

    Args:
        wanted: the Trainer's option; auto chooses.
        device: the device to train on.
        num_weights: of the base; on a CPU, bf16 pays for large ones only.

    Returns:
        The precision, and the reason in a few words.

    Raises:
        UserError: the device lacks the precision that is wanted.
    """
    capability = device.capability
    if capability is None:
        if wanted == "16-mixed":
            raise UserError(
                "16-mixed needs a CUDA GPU, and there is none",
                option="trainer.precision",
                remedy="use auto (32-true on a CPU)",
            )
        if wanted == "auto" and num_weights >= FAST_IN_BF16_FROM and _cpu_multiplies_bf16():
            return "bf16-mixed", "no GPU, and a CPU that multiplies in bf16"
        if wanted == "auto":
            return "32-true", "no GPU"
        return wanted, "as asked"
    shown = capability_words(capability)
    if wanted in NEED_AMPERE and capability < AMPERE:
        needed = f"{capability_words(AMPERE)} is needed; torch would emulate it, slowly"
        raise UserError(
            f"{device.name} has compute capability {shown} and no bf16 ({needed})",
            option="trainer.precision",
            remedy="use auto or 16-mixed",
        )
    if wanted != "auto":
        return wanted, "as asked"
    if capability < AMPERE:
        return "16-mixed", f"compute capability {shown} has no bf16"
    return "bf16-mixed", f"compute capability {shown}"


def _cpu_multiplies_bf16() -> bool:
    """True if the CPU has instructions for bf16, AMX or AVX512-BF16; others emulate it, slowly."""
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not every torch has it
    return bool(has.get("amx_tile") or has.get("avx512_bf16"))


def check_attention(attention: Attention, device: Device) -> None:
    """Check that a device can compute an attention.

    Args:
        attention: its implementation.
        device: device to compute on.

    Raises:
        UserError: it can't, or a package is missing for it.
    """
    if attention not in NEED_AMPERE:
        return
    if device.capability is None or device.capability < AMPERE:
        raise UserError(
            f"{attention} needs compute capability {capability_words(AMPERE)} or above, {device.name} has less",
            option="model.attention",
            remedy="use sdpa",
        )
    if not device.is_here:
        return
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise UserError(f"{attention} needs the package flash-attn", option="model.attention", remedy="use sdpa")


def compiler_lacks(capability: tuple[int, int] | None) -> list[str]:
    """What torch's compiler lacks here: a C compiler; for kernels of a GPU triton and headers, too.

    Args:
        capability: of the GPU; None for a CPU.
    """
    on_gpu = capability is not None
    missing = [] if not on_gpu or importlib.util.find_spec("triton") else ["triton"]
    missing += [f"a GPU of compute capability {capability_words(TRITON)}"] if capability and capability < TRITON else []
    names = (os.environ.get("CC", "cc"), "gcc", "clang") if on_gpu else (os.environ.get("CXX", "g++"), "clang++")
    missing += [] if any(map(shutil.which, names)) else ["a C compiler"]
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing += [] if not on_gpu or headers.is_file() else ["Python's headers"]
    return missing


def check_compile(wanted: bool | str, device: Device) -> str | None:
    """Why nothing is compiled on a device though it could be; None if it is, or was never requested.

    Args:
        wanted: as ``model.compile``.
        device: device to compute on.

    Raises:
        UserError: compilation is requested explicitly, and something is missing for it.
    """
    if not device.is_here or wanted is False or (wanted == "auto" and not device.is_gpu):
        return None
    missing = " and ".join(compiler_lacks(device.capability))
    if missing and wanted is True:
        raise UserError(
            f"true needs {missing}", option="model.compile", remedy="install gcc and python3-dev, or give false"
        )
    return missing or None


def compiles_kernels(wanted: bool | str, on_gpu: bool, lacks: str | None) -> bool:
    """True if kernels between products are compiled.

    Args:
        wanted: as ``model.compile``; auto: on a GPU.
        on_gpu: True for a GPU.
        lacks: what `check_compile` found.
    """
    return lacks is None and (on_gpu if wanted == "auto" else bool(wanted))


def dtype_name(dtype: torch.dtype) -> str:
    """A ``dtype`` as files name it, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "32-true": torch.float32}


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of the 4-bit products, the embedding, the norms and the residual stream.

    Args:
        precision: the Trainer's, as Lightning spells it out.

    Raises:
        UserError: a precision in which the adapter would not be fp32, or the base in more than 16 bits.
    """
    expected = f"one of {', '.join(DTYPES)} (the base is in 4 and 16 bits in the mixed ones, the adapter in fp32)"
    require(precision in DTYPES, "trainer.precision", expected, precision)
    return DTYPES[precision]


def seed_of(*place: int) -> int:
    """A seed for a place by its numbers, the run's seed first: neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, place)).encode()).digest()[:8], "big")


def seed_by_position(seed: int, epoch: int, batch: int, device: torch.device) -> None:
    """Seed torch on the host and on ``device`` for a micro-batch, by its position in the run.

    Not by torch.manual_seed, which takes half a millisecond to note its stack for accelerators that are not there.

    Args:
        seed: of the run.
        epoch: its number.
        batch: number of the micro-batch in it, over all devices.
        device: the module's.
    """
    number = seed_of(seed, epoch, batch, 0)  # the 0 was once a device's number
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(number)


def chance(device: torch.device) -> Callable[[], None]:
    """Note what torch will draw next, on the host and on ``device``; call what this returns to draw it again."""
    on_host = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again() -> None:
        torch.set_rng_state(on_host)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)

    return again
