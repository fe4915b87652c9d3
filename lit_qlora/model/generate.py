"""Owns the way from prompt ids to answer ids. Sees ids only, never text.

Sampling itself is transformers' `generate`; what is ours is the padding, the stop and the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: greedy at ``temperature`` 0, else from the ``top_p`` likeliest, by ``seed``."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def generate(model: "PeftModel", prompts: Sequence[Sequence[int]], eos_id: int, sampling: Sampling) -> list[list[int]]:
    """An answer to each of ``prompts``, in one batch.

    The answer ends with ``eos_id`` where the model stopped by itself; without it, the limit cut it off.
    Leaves the model in the mode, train or eval, in which it came.
    """
    from transformers import GenerationConfig

    device = model.device
    width = max(len(prompt) for prompt in prompts)
    # On the left, so that every answer starts in the same column.
    input_ids = torch.full((len(prompts), width), eos_id, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    samples = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
        use_cache=True,
        **(samples if sampling.temperature else {"do_sample": False}),
    )
    if sampling.temperature:
        torch.manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    try:
        output = model.generate(
            input_ids=input_ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
    finally:
        model.train(was_training)
    return [_up_to(eos_id, row) for row in output[:, width:].tolist()]


def _up_to(eos_id: int, ids: list[int]) -> list[int]:
    """``ids`` to their first EOS, that included; what follows is padding."""
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids
