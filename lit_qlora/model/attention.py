"""Owns positions and attention: rotary embeddings, and causal attention within each conversation of a row.

The kernels are torch's own. Knows no weights.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lit_qlora.batch import send

OWN_SDPA = "sdpa_in_kernels"
"""The name under which transformers registers the attention used here."""


class Places(NamedTuple):
    """Positions of tokens: rotary ``cos`` and ``sin``, each ``[1, T, head width]``, as `pointwise.rotate` takes them.

    For a row of several conversations, ``lengths`` are their tokens and ``bounds`` their limits, int32.
    ``is_recurrent`` says that the shape comes again and again.
    """

    cos: Tensor
    sin: Tensor
    lengths: tuple[int, ...] = ()
    bounds: Tensor | None = None
    is_recurrent: bool = False


def find_places(rotary: Any, hidden: Tensor, lengths: tuple[int, ...], is_recurrent: bool = False) -> Places:
    """The positions of a micro-batch, and their rotations.

    Args:
        rotary: the model's rotary embedding, of transformers.
        hidden: ``[B, T, h]``, for its length, dtype and device.
        lengths: tokens of each conversation in a packed row, which counts its positions from 0; empty if not packed.
        is_recurrent: True for a shape that many micro-batches have.
    """
    if not lengths:
        cos, sin = rotary(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
        return Places(cos, _half_negated(sin), is_recurrent=is_recurrent)
    within = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    within, bounds = send(within, hidden.device), send(bounds, hidden.device)
    cos, sin = rotary(hidden, within[None])
    return Places(cos, _half_negated(sin), lengths, bounds)


def _half_negated(sin: Tensor) -> Tensor:
    first, second = sin.chunk(2, -1)
    return torch.cat((-first, second), -1)


def attend(query: Tensor, key: Tensor, value: Tensor, places: Places) -> Tensor:
    """Causal attention, softmax(q k / sqrt(head width)) v, within each conversation of ``places``.

    Args:
        query: ``[B, heads, T, head width]``.
        key: ``[B, key heads, T, head width]``; the number of heads is a multiple of that of key heads.
        value: the same.
        places: of `find_places`.

    Returns:
        ``[B, heads, T, head width]``.
    """
    if query.is_cuda:
        return _attend_on_gpu(query, key, value, places)
    shared = query.shape[1] != key.shape[1]
    parts = [heads.split(places.lengths or heads.shape[2], dim=2) for heads in (query, key, value)]
    attended = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        for q, k, v in zip(*parts, strict=True)
    ]
    return attended[0] if len(attended) == 1 else torch.cat(attended, dim=2)


# On a GPU. torch has three ways: FlashAttention, from compute capability 8.0 on; the memory-efficient kernel, which
# takes neither shared heads nor head widths that are not a multiple of 8; and, for whatever neither takes, plain
# products that hold all T x T weights. The last must never be reached: its memory is in no forecast. From 9.0 on, there
# is cuDNN's, too: up to twice as fast as FlashAttention on an H200, but at each new shape it plans for as long as some
# ten micro-batches gain by it.


def _attend_on_gpu(query: Tensor, key: Tensor, value: Tensor, places: Places) -> Tensor:
    width = query.shape[-1]
    scale = width**-0.5 if width % 8 else None
    query, key, value = in_eights(query), in_eights(key), in_eights(value)
    groups, flash = query.shape[1] // key.shape[1], has_flash(query, key, value, is_causal=True)
    if len(places.lengths) > 1:
        with _widened(groups, key, value) as (key, value):
            attended = _attend_packed(query, key, value, places, scale, flash)
    elif flash or groups == 1:
        with _without_plans() if flash and not places.is_recurrent else nullcontext():
            attended = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1
            )
    else:
        with _widened(groups, key, value) as (key, value):
            attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return attended[..., :width] if scale else attended


def _without_plans() -> AbstractContextManager[None]:
    """FlashAttention alone; its backward is its own."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)  # type: ignore[no-any-return]


def in_eights(heads: Tensor) -> Tensor:
    """``heads``, ``[B, heads, T, head width]``, zero-padded to the next multiple of 8, which changes no product."""
    missing = -heads.shape[-1] % 8
    return functional.pad(heads, (0, missing)) if missing else heads


def has_flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> bool:
    """True if torch has FlashAttention for such tensors on their device.

    Args:
        query: ``[B, heads, T, head width]``.
        key: ``[B, key heads, T, head width]``, of as many heads or fewer.
        value: shaped as ``key``.
        is_causal: True if each place sees only itself and those before it.
    """
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, is_causal, True))


@contextmanager
def _widened(groups: int, *narrow: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Copies of keys and values, one for each query head of a group.

    They last as long as the kernel runs: for backward, a kernel called within keeps the originals, which are copied
    again there.
    """
    if groups == 1:
        yield narrow
        return
    wide = tuple(heads.repeat_interleave(groups, 1) for heads in narrow)
    copied = {copy.data_ptr(): heads.detach() for copy, heads in zip(wide, narrow, strict=True)}

    def pack(saved: Tensor) -> Any:
        heads = copied.get(saved.data_ptr())
        # Detached: an output held by its own graph would never be freed where no backward follows, as in a validation.
        return saved.detach() if heads is None else (heads, saved.shape, saved.stride())

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        heads, shape, stride = kept
        return heads.repeat_interleave(groups, 1).as_strided(shape, stride)  # type: ignore[no-any-return]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield wide


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, places: Places, scale: float | None, flash: bool
) -> Tensor:
    """Attention in one kernel: FlashAttention's, or the memory-efficient one.

    Both are what torch's own attention calls, plus the bounds of conversations, for which it has no argument.
    """
    longest, bounds = max(places.lengths), places.bounds
    assert bounds is not None
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    if flash:
        from torch.nn.attention.varlen import varlen_attn

        # The argument's name is younger than the function.
        knows_windows = "window_size" in inspect.signature(varlen_attn).parameters
        options: Any = {"window_size": (-1, 0)} if knows_windows else {"is_causal": True}
        options |= {"scale": scale} if scale else {}
        attended: Any = varlen_attn(query[0], key[0], value[0], bounds, bounds, longest, longest, **options)
        return attended[None].transpose(1, 2)  # type: ignore[no-any-return]
    mask = 1  # causal, from each conversation's beginning
    attended = torch.ops.aten._efficient_attention_forward(
        query, key, value, None, bounds, bounds, longest, longest, 0.0, mask, query.requires_grad, scale=scale
    )[0]
    return attended.transpose(1, 2)


# transformers' layers


def implementation_of(implementation: str) -> str:
    """The name under which transformers finds ``implementation``; for sdpa, one that never falls back to plain
    products.

    On a CPU that is transformers' own, to the last bit.
    """
    if implementation != "sdpa":
        return implementation
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(OWN_SDPA, _sdpa)
    AttentionMaskInterface.register(OWN_SDPA, sdpa_mask)
    return OWN_SDPA


def _sdpa(module: Any, query: Tensor, *heads_and_mask: Any, **options: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attention = _sdpa_on_gpu if query.is_cuda else sdpa_attention_forward
    return attention(module, query, *heads_and_mask, **options)


def _sdpa_on_gpu(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa of ``[B, heads, T, head width]``; returns ``[B, T, heads, head width]``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    width = query.shape[-1]
    options["scaling"] = options.get("scaling") or width**-0.5
    query, key, value = in_eights(query), in_eights(key), in_eights(value)
    # With a mask, transformers itself has no heads shared.
    groups, is_causal = query.shape[1] // key.shape[1], query.shape[2] > 1
    if groups > 1 and attention_mask is None and not has_flash(query, key, value, is_causal):
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        module = SimpleNamespace(is_causal=module.is_causal)
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return attended[..., :width], None
