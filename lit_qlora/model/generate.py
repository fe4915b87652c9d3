"""Owns generation, from prompt ids to answer ids. Sees ids only, never text.

Sampling itself is transformers' `generate`; padding, stop and seed are ours. Imports torch only when called, since
`Sampling` describes options of the verbs that answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_qlora.errors import require

if TYPE_CHECKING:
    from peft import PeftModel

PROMPTS_AT_ONCE = 8
"""Sample prompts answered in one batch, as the forecast assumes."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: greedy at ``temperature`` 0, else from the ``top_p`` likeliest, by ``seed``."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for invalid values."""
        require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        require(0 <= self.temperature < float("inf"), "temperature", "0 or more", self.temperature)
        require(0 < self.top_p <= 1, "top_p", "a share above 0, at most 1", self.top_p)
        require(0 <= self.seed < 2**64, "seed", "a whole number from 0, below 2**64", self.seed)


def generate(
    model: "PeftModel",
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    sampling: Sampling,
    on_token: Callable[[int], bool] | None = None,
) -> list[list[int]]:
    """The answer ids of each of ``prompts``, in one batch.

    An answer ends with ``eos_id`` if the model stopped by itself; without it, the limit cut it off. Train or eval mode
    of the model is restored.

    Args:
        model: computes on its own device.
        prompts: ids, at least one each.
        eos_id: ends an answer.
        sampling: how tokens are drawn.
        on_token: for a single prompt, called with each id of the answer as it is drawn; False stops generation.
    """
    import torch
    from transformers import GenerationConfig

    assert on_token is None or len(prompts) == 1, "ids come one by one for a single prompt only"
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
    drawn: list[int] = []

    def go_on_or_stop(ids: Any, scores: Any) -> Any:
        stops = False
        if on_token and drawn[-1:] != [eos_id]:
            drawn.append(int(ids[0, -1]))
            stops = not on_token(drawn[-1])
        return torch.full((len(ids),), stops, dtype=torch.bool, device=ids.device)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                stopping_criteria=[go_on_or_stop] if on_token else None,
            )
    finally:
        model.train(was_training)
    return [drawn] if on_token else [_up_to(eos_id, row) for row in output[:, width:].tolist()]


def _up_to(eos_id: int, ids: list[int]) -> list[int]:
    """``ids`` up to and including their first EOS; the rest is padding."""
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids
