"""Owns recomputation in the backward pass for decoder layers that run as transformers and peft have them.

Where `decoder.py` runs the layers, it keeps account by itself. A layer's forward is wrapped here rather than by
the library's own switch: that one acts in train mode only, has changed its name, and says nothing when it is off.
Knows no Trainer.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["auto", "full", "selective", "none"]


def checkpoint_layers(layers: torch.nn.ModuleList, mode: Checkpointing) -> None:
    """Makes each of ``layers`` keep its input only and compute the rest again in backward (``full``, ``auto``).

    With ``selective``, what 4-bit products and attention gave is kept too: nothing that costs much runs twice.
    """
    if mode == "none":
        return
    for layer in layers:
        layer.forward = _recomputed(layer.forward, {"context_fn": _keep_products} if mode == "selective" else {})


def _recomputed(forward: Callable[..., Any], how: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Random state is kept: LoRA's dropout must fall the same way in the second forward.
        return checkpoint(forward, *args, use_reentrant=False, **how, **kwargs)

    return run


def _keep_products() -> Any:
    """What a layer's recomputation finds done already."""
    import bitsandbytes  # noqa: F401  # it brings the first of these

    aten = torch.ops.aten
    kept = [
        torch.ops.bitsandbytes.gemm_4bit.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]
    return create_selective_checkpoint_contexts(kept)
