"""Owns the dequantisation of a 4-bit weight on a GPU in one kernel, values and nested scales together, by Triton.

The bits are those of bitsandbytes, which starts three kernels for it and reaches half of a large card's bandwidth.
Imported where Triton is installed only. Knows no layer.
"""

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_qlora.model.device import AMPERE, TRITON

WORDS_PER_PROGRAM = 256
"""Words of 8 values that one program dequantises: two for each of its threads."""


def dequantise(values: Tensor, state: Any, offset: Tensor | None) -> Tensor:
    """Dequantise a weight.

    Args:
        values: ``[out · in / 2, 1]`` uint8, two values per byte, on a GPU.
        state: bitsandbytes' QuantState; `can_dequantise` both.
        offset: of nested scales, a number on the host; None if they are not nested.

    Returns:
        ``[out, in]`` in the dtype of ``state``.
    """
    out = torch.empty(state.shape, dtype=state.dtype, device=values.device)
    inner: tuple[Any, ...] = (None, None, 0.0, 0)
    if state.nested:
        assert offset is not None
        inner = state.state2.code, state.state2.absmax, float(offset), state.state2.blocksize
    with torch.cuda.device(values.device):
        # Without fused multiply-adds: bitsandbytes rounds the product of a nested scale before it adds the offset.
        _dequantise[(triton.cdiv(out.numel(), 8 * WORDS_PER_PROGRAM),)](
            values.view(-1).view(torch.int32), _codes(values.device), state.absmax, *inner[:3], out, out.numel() // 8,
            state.blocksize // 8, inner[3], WORDS_PER_PROGRAM, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def can_dequantise(values: Tensor, state: Any) -> bool:
    """True for NF4 ``values`` in whole words, with a ``state`` of fp32 scales, nested or not: bitsandbytes' usual.

    Not on a GPU too old for triton. Not into bf16 below compute capability 8.0, which can't round to it; 4-bit files
    made elsewhere may ask for it.
    """
    if torch.cuda.get_device_capability(values.device) < (AMPERE if state.dtype == torch.bfloat16 else TRITON):
        return False
    # Nested scales are rounded to the dtype of their own state before the offset is added.
    dtypes = {state.state2.dtype, state.state2.absmax.dtype} if state.nested else {state.absmax.dtype}
    count = math.prod(state.shape)
    has_words = count % 8 == 0 and values.data_ptr() % 4 == 0 and count < 2**31
    is_plain = values.shape[-1] == 1 and values.is_contiguous() and state.absmax.is_contiguous()
    return bool(state.quant_type == "nf4" and dtypes == {torch.float32} and is_plain and has_words)


@cache
def _codes(device: torch.device) -> Tensor:
    """The 16 values of NF4."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device=device)  # type: ignore[no-any-return]


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise(  # type: ignore[no-untyped-def]
    values, codes, scales, scale_codes, scales_of_scales, offset, out, num_words,
    words_per_scale: tl.constexpr, scales_per_scale: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    words = tl.program_id(0) * size + tl.arange(0, size)
    exist = words < num_words
    word = tl.load(values + words, mask=exist, other=0)
    block = words // words_per_scale
    scale = tl.load(scales + block, mask=exist, other=0)
    if scales_per_scale:
        outer = tl.load(scales_of_scales + block // scales_per_scale, mask=exist, other=0)
        scale = tl.load(scale_codes + scale.to(tl.int32)) * outer + offset
    # A byte's high bits are the first of its two values.
    columns = tl.arange(0, 8)
    code = (word[:, None] >> (4 * (columns ^ 1))[None, :]) & 15
    found = tl.load(codes + code) * scale[:, None]
    tl.store(out + words[:, None] * 8 + columns[None, :], found.to(out.dtype.element_ty), mask=exist[:, None])
