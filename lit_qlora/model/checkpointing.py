"""Owns which decoder layers recompute their activations in the backward pass.

A layer's forward is wrapped here rather than by the library's own switch: that one acts in train mode
only, has changed its name, and says nothing when it is off. Knows no Trainer.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["full", "none"]


def checkpoint_layers(layers: torch.nn.ModuleList, mode: Checkpointing) -> None:
    """Makes each of ``layers`` keep its input only and compute the rest again in backward (``full``)."""
    if mode == "full":
        for layer in layers:
            layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Random state is kept: LoRA's dropout must fall the same way in the second forward.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
