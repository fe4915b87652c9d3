"""Owns who gives a decoder layer its dequantised weights: made anew for each product, or made once and kept.

A frozen weight dequantises to the same bits each time, so that keeping it changes no result; it takes memory instead of
time. Knows no product and no layer's arithmetic.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Quantised(NamedTuple):
    """A weight in 4 bits.

    Args:
        values: ``[out · in / 2, 1]`` uint8, two values per byte.
        state: bitsandbytes' QuantState, with the scales.
        offset: of nested scales, a scalar on the host: one on the card would be broadcast by a kernel for strided
            tensors. None if the scales are not nested.
    """

    values: Tensor
    state: Any
    offset: Tensor | None


class Weights:
    """The weights of one decoder layer's linear layers, ``[out, in]``, dequantised on request.

    Args:
        quantised: 4-bit weights of the linear layers, in the layer's order.
        fetch: brings the weights of a shared base here: called with 1 before a forward, -1 before a backward.
        compiles: True to dequantise by one compiled kernel on a GPU, instead of bitsandbytes' three.
    """

    def __init__(
        self, quantised: Sequence[Quantised], fetch: Callable[[int], None] | None = None, compiles: bool = False
    ) -> None:
        self.quantised, self.fetch, self.compiles = quantised, fetch, compiles
        self._kept: list[Tensor] = []

    def get(self, index: int, dtype: torch.dtype) -> Tensor:
        """A dequantised weight, ``[out, in]``; never to be written to.

        Args:
            index: of the linear layer, in the layer's order.
            dtype: of the weight.
        """
        if self._kept and self._kept[index].dtype == dtype:
            return self._kept[index]
        return _dequantised(self.quantised[index], self.compiles).to(dtype)

    def keep(self, dtype: torch.dtype) -> None:
        """Dequantise all weights now, for all requests to come in this ``dtype``."""
        if not self._kept or self._kept[0].dtype != dtype:
            self._kept = []  # the memory of the other dtype's, before the new ones take theirs
            with torch.inference_mode(False), torch.no_grad():  # made while scoring, they must still serve in training
                self._kept = [self.get(index, dtype) for index in range(len(self.quantised))]


def _dequantised(weight: Quantised, compiles: bool) -> Tensor:
    values, state, offset = weight
    if compiles and values.is_cuda:
        from lit_qlora.model import nf4

        if nf4.can_dequantise(values, state):
            return nf4.dequantise(values, state, offset)
    from bitsandbytes.functional import dequantize_4bit

    state = copy(state)
    state.offset = offset
    return dequantize_4bit(values, state)
