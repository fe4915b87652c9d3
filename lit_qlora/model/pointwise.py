"""Owns the arithmetic between matrix products in training: norm, gated activation, rotary embedding, and their
gradients.

Plain functions with their gradients; on a GPU, torch.compile makes one kernel of each. Knows no layer.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The root mean square norm of Zhang and Sennrich (2019), in fp32 inside as transformers has it.

    Args:
        x: ``[..., h]``, hidden states or heads.
        weight: ``[h]``, the norm's scale per channel.
        epsilon: added to the mean square.

    Returns:
        ``[..., h]`` in the dtype of ``x``; and 1 / root mean square, ``[..., 1]`` in fp32, for the backward.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * (wide * scale).to(x.dtype), scale


def rms_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """The gradient of `rms_norm` with regard to ``x``, whose weight is frozen.

    Args:
        grad: ``[..., h]``, the gradient of the norm's result.
        x: ``[..., h]``, as in forward.
        scale: ``[..., 1]`` fp32, as forward returned it.
        weight: ``[h]``.
        residual: ``[..., h]``, the gradient that bypasses the norm; None without one.

    Returns:
        ``[..., h]`` in the dtype of ``x``.
    """
    pulled = (grad * weight).float()
    normed = x.float() * scale
    inner = (pulled - normed * (pulled * normed).mean(-1, keepdim=True)) * scale
    return (inner if residual is None else inner + residual.float()).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation ``silu(gate) · up`` of Shazeer (2020).

    Args:
        gate: ``[..., inner]``.
        up: ``[..., inner]``.

    Returns:
        ``[..., inner]``.
    """
    return functional.silu(gate) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `swiglu`, and its result: in one, since each of them reads ``gate`` and ``up``.

    Args:
        grad: ``[..., inner]``, the gradient of the result.
        gate: ``[..., inner]``.
        up: ``[..., inner]``.

    Returns:
        The gradients of ``gate`` and ``up``, and the result, ``[..., inner]`` each.
    """
    activated = functional.silu(gate)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return grad_gate, grad * activated, activated.mul_(up)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary embedding of Su et al. (2021), in the halves that transformers rotates; ``-sin`` inverts it.

    Heads follow tokens, as in the matrix product's output: in attention's order, a GPU would read and write with large
    strides.

    Args:
        query: ``[B, T, heads, head width]``.
        key: ``[B, T, key heads, head width]``.
        cos: ``[1, T, head width]``.
        sin: ``[1, T, head width]``, its first half negated, so that no intermediate is concatenated.

    Returns:
        Queries and keys, rotated, of the same shapes.
    """
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    halves = heads.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return heads * cos.unsqueeze(2) + halves * sin.unsqueeze(2)


class Pointwise(NamedTuple):
    """The functions of this module, as they are or compiled: ``rms_norm``, ``rms_norm_backward``, ``swiglu``,
    ``swiglu_backward`` and ``rotate``."""

    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


EAGER = Pointwise(rms_norm, rms_norm_backward, swiglu, swiglu_backward, rotate)


@cache
def compiled() -> Pointwise:
    """The functions compiled, one kernel each, for every length.

    Rows and tokens are symbols to the compiler, so that another length compiles nothing; widths are numbers, or it
    would divide by symbols for every value it reads (ten times the time, for a rotation).
    """
    return Pointwise(*(_compiled(function) for function in EAGER))  # type: ignore[arg-type]  # one of each


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    run = torch.compile(function)
    seen = set[tuple[Any, ...]]()  # and whether it was in inference mode, for which there is other code

    def marked(*args: Any) -> Any:
        # The compiler looks at a tensor's gradient, and torch warns where it is no leaf.
        args = tuple(arg.detach() if isinstance(arg, Tensor) and arg.requires_grad else arg for arg in args)
        shapes = torch.is_inference_mode_enabled(), *(arg.shape for arg in args if isinstance(arg, Tensor))
        if shapes not in seen:  # else nothing is compiled, and marks would cost as much as the kernel
            seen.add(shapes)
            for arg in args:
                if isinstance(arg, Tensor) and arg.dim() > 1:
                    for dim in range(min(arg.dim() - 1, 2)):
                        torch._dynamo.maybe_mark_dynamic(arg, dim)
        return run(*args)

    return marked
