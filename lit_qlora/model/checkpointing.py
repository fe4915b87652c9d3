"""Owns recomputation in the backward pass for the decoder layers of transformers and peft.

`decoder.py` has its own recomputation. A layer's forward is wrapped here rather than by the library's own switch, which
acts in train mode only, has changed its name, and is silent when it is off. Knows no Trainer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["auto", "full", "selective", "none"]


def choose_checkpointing(wanted: Checkpointing, on_gpu: bool, own_layers: bool) -> Checkpointing:
    """Choose what layers keep, as far as no batch has to be known for it.

    Args:
        wanted: the option; on a CPU, where nothing is short of room, auto is none.
        on_gpu: True for a GPU.
        own_layers: False for those of transformers and peft, of which auto keeps none.
    """
    return "none" if wanted == "auto" and own_layers and not on_gpu else wanted


def checkpoint_layers(layers: torch.nn.ModuleList, mode: Checkpointing) -> None:
    """Make layers recompute in backward what they don't keep.

    Args:
        layers: decoder layers of transformers and peft.
        mode: with ``full`` and ``auto`` each keeps its input only; with ``selective`` the results of 4-bit products and
            attention, too, so that nothing expensive runs twice; ``none`` changes nothing.
    """
    if mode == "none":
        return
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    for layer in layers:
        layer.forward = _recomputed(layer.forward, kept)


def _recomputed(forward: Callable[..., Any], how: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Random state is kept: LoRA's dropout must fall the same way in the second forward.
        return checkpoint(forward, *args, use_reentrant=False, **how, **kwargs)

    return run


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    is_kept = "bitsandbytes::gemm_4bit" in operator.name() or "scaled_dot_product" in operator.name()
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
