"""Owns where tokens stand and what they see: rotary places, and causal attention within each conversation of a row.

The kernels are torch's own. Knows no weights.
"""

import inspect
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Places(NamedTuple):
    """Where tokens stand: rotary ``cos`` and ``sin``, each ``[1, T, head width]``, as `pointwise.rotate` takes them.

    Where a row holds several conversations, ``lengths`` are their tokens, and ``bounds`` where they begin and end,
    int32.
    """

    cos: Tensor
    sin: Tensor
    lengths: tuple[int, ...] = ()
    bounds: Tensor | None = None


def find_places(rotary: Any, hidden: Tensor, lengths: tuple[int, ...]) -> Places:
    """The places of ``hidden`` ``[B, T, h]`` by ``rotary``, transformers' rotary embedding of the model."""
    if not lengths:
        cos, sin = rotary(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
        return Places(cos, _half_negated(sin))
    within = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    cos, sin = rotary(hidden, within[None].to(hidden.device))
    return Places(cos, _half_negated(sin), lengths, bounds.to(hidden.device))


def _half_negated(sin: Tensor) -> Tensor:
    first, second = sin.chunk(2, -1)
    return torch.cat((-first, second), -1)


def attend(query: Tensor, key: Tensor, value: Tensor, places: Places) -> Tensor:
    """Causal attention over ``[B, heads, T, head width]``, within each conversation of ``places``.

    Keys and values may have fewer heads.
    """
    if len(places.lengths) > 1 and query.is_cuda:
        return _attend_packed(query, key, value, places)
    shared = query.shape[1] != key.shape[1]
    parts = [heads.split(places.lengths or heads.shape[2], dim=2) for heads in (query, key, value)]
    attended = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        for q, k, v in zip(*parts, strict=True)
    ]
    return attended[0] if len(attended) == 1 else torch.cat(attended, dim=2)


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, places: Places) -> Tensor:
    """In one kernel: FlashAttention's from compute capability 8.0 on, below it the memory-efficient one.

    Both are what torch's own attention calls, with the bounds of conversations that it has no argument for.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    longest, bounds = max(places.lengths), places.bounds
    assert bounds is not None
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    if _has_flash(query):
        from torch.nn.attention.varlen import varlen_attn

        # The argument's name is younger than the function.
        knows_windows = "window_size" in inspect.signature(varlen_attn).parameters
        causal: Any = {"window_size": (-1, 0)} if knows_windows else {"is_causal": True}
        attended: Any = varlen_attn(query[0], key[0], value[0], bounds, bounds, longest, longest, **causal)
        return attended[None].transpose(1, 2)  # type: ignore[no-any-return]
    mask = 1  # causal, from each conversation's beginning
    attended = torch.ops.aten._efficient_attention_forward(
        query, key, value, None, bounds, bounds, longest, longest, 0.0, mask, query.requires_grad
    )[0]
    return attended.transpose(1, 2)


def _has_flash(query: Tensor) -> bool:
    return bool(
        query.dtype != torch.float32
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
