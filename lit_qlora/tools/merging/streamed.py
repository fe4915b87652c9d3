"""Owns a forward pass through a model larger than memory: each weight is read when its layer is reached.

Used to check a merge. Knows no adapter.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lit_qlora.console import passing_bar
from lit_qlora.model.base import Base
from lit_qlora.model.config import for_transformers
from lit_qlora.model.weights import EMBEDDINGS, LM_HEAD
from lit_qlora.tools.merging.arithmetic import StoredWeights


class _InFp32(Mapping[str, Tensor]):
    """The weights of a model in fp32, as a mapping for accelerate."""

    def __init__(self, weights: StoredWeights, move: Callable[[int], None]) -> None:
        self._weights, self._move, self._read = weights, move, 0

    def __getitem__(self, name: str) -> Tensor:
        self._read += 1
        self._move(min(self._read, len(self)))  # a tied one is read twice
        if name == LM_HEAD and self._weights.base.shape.tied:
            name = EMBEDDINGS
        return self._weights[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.names)

    def __len__(self) -> int:
        return len(self._weights.names)


@torch.no_grad()
def streamed_logits(base: Base, input_ids: Tensor, device: torch.device) -> Tensor:
    """Logits of an unquantised model, computed in fp32, with one weight in memory.

    Args:
        base: the model.
        input_ids: ``[B, T]``, padded on the right.
        device: device to compute on.

    Returns:
        ``[B, T, V]``, on the CPU.
    """
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook

    with init_empty_weights(include_buffers=False):
        model = base.architecture.model_class()(for_transformers(base.config)).float()
    model.set_attn_implementation("sdpa")
    model.eval()
    weights = StoredWeights(base)
    with passing_bar("check", len(weights.names), " weights") as move:
        attach_align_device_hook(model, execution_device=device, offload=True, weights_map=_InFp32(weights, move))
        return model(input_ids=input_ids.to(device), use_cache=False).logits.cpu()  # type: ignore[no-any-return]
