"""Owns generation, from prompt ids to answer ids. Sees ids only, never text.

Sampling itself is transformers' `generate`; padding, stop and seed are ours. Imports torch only when called, since
`Sampling` describes options of the verbs that answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_qlora.ranges import check_ranges
from lit_qlora.storage.files import parse_list

if TYPE_CHECKING:
    from peft import PeftModel

PROMPTS_AT_ONCE = 8
"""Sample prompts answered in one batch, as the forecast assumes."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn, and where it ends.

    Its arguments are options of the verbs that answer, by these names and words; ``stop`` becomes a tuple of texts.

    Args:
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that make up this share.
        seed: seed of sampling.
        top_k: sample from this many likeliest tokens; 0: from all.
        min_p: sample from tokens at least this share as likely as the likeliest.
        repetition_penalty: lowers the odds of tokens already in the prompt or answer, such as 1.1; 1: none.
        stop: a text that ends an answer and is not part of it, or a list of them, such as '["###", "User:"]';
            \\n stands for a line's end.

    Raises:
        UserError: for what can't be drawn from, with its name as the option.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | list[str] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", stop_texts(self.stop))
        check_ranges({**vars(self), "stop": [*self.stop]})


def stop_texts(given: str | Sequence[str]) -> tuple[str, ...]:
    r"""The texts that ``given``, an option ``stop``, names: itself, a list that it spells, or none where it is empty.

    A shell hands on ``\n`` as two characters: they stand for a line's end, as they do in a list.
    """
    if not isinstance(given, str):
        return tuple(given)
    listed = parse_list(given) or ()
    if any(isinstance(text, str) for text in listed):
        return tuple(listed)
    return (given.replace("\\n", "\n"),) if given else ()


def generate(
    model: "PeftModel",
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    sampling: Sampling,
    on_token: Callable[[int], bool] | None = None,
    is_over: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """An answer to each of ``prompts``, in one batch.

    The answer ends with one of ``stop_ids`` where the model stopped by itself; without it, ``is_over`` or the limit
    cut it off. Leaves the model in the mode, train or eval, in which it came, and random numbers as they were.

    Args:
        model: computes on its own device.
        prompts: ids, at least one each.
        stop_ids: each of them ends an answer; at least one.
        sampling: how tokens are drawn; texts that end an answer are not its concern, but ``is_over``'s.
        on_token: for a single prompt, called with each id of the answer as it is drawn; says whether to continue.
        is_over: called with the ids of each answer so far; says whether it ends there.
    """
    import torch
    from transformers import GenerationConfig

    assert on_token is None or len(prompts) == 1, "ids come one by one for a single prompt only"
    width = max(len(prompt) for prompt in prompts)
    # On the left, so that every answer starts in the same column; by an id that the prompt holds, for a penalty on
    # what was said already looks at the padding, too.
    input_ids = torch.tensor([[prompt[0]] * (width - len(prompt)) + [*prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    samples = {
        "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
        "min_p": sampling.min_p or None,
    }  # fmt: skip
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=[*stop_ids],
        pad_token_id=stop_ids[0],
        use_cache=True,
        repetition_penalty=sampling.repetition_penalty,
        disable_compile=True,  # with a static cache a GPU's would be compiled, which takes longer than the answers
        **(samples if sampling.temperature else {"do_sample": False}),
    )
    ends: dict[int, int] = {}

    def continue_or_stop(ids: Any, scores: Any) -> Any:
        answers = ids[:, width:].tolist()
        for row, answer in enumerate(answers):
            if row in ends:
                continue
            is_stopped = on_token is not None and not on_token(answer[-1])
            if is_stopped or answer[-1] in stop_ids or (is_over is not None and is_over(answer)):
                ends[row] = len(answer)
        return torch.tensor([row in ends for row in range(len(answers))], device=ids.device)

    was_training = model.training
    model.eval()
    try:
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices, enabled=bool(sampling.temperature)):
            if sampling.temperature:
                torch.manual_seed(sampling.seed)
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                past_key_values=_static_cache(model, len(prompts), width, sampling.max_new_tokens),
                stopping_criteria=[continue_or_stop],
            )
    finally:
        model.train(was_training)
    return [answer[: ends.get(row)] for row, answer in enumerate(output[:, width:].tolist())]


def _static_cache(model: "PeftModel", num_prompts: int, width: int, max_new_tokens: int) -> Any:
    """A cache of keys and values that has all its memory at once; None where one that grows is quicker.

    A cache that grows is read and written whole for each token, then read by attention; a static one is only read, all
    of it. So it is the lesser traffic up to three times the prompts' width, whatever the answers' length. A single
    prompt needs no mask, and keeps the faster attention that knows none. Made here, because transformers' own is never
    shorter than any before.
    """
    from transformers import StaticCache

    if num_prompts == 1 or width + max_new_tokens > 3 * width:
        return None
    return StaticCache(config=model.config, max_cache_len=width + max_new_tokens)
