"""Owns the comparison of a merged folder with base + adapter, on conversations that were held out.

Both are computed in fp32, the merged one with a single weight in memory. Knows no file that a merge writes.
"""

import gc
import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_qlora import demo
from lit_qlora.chosen import ResolvedAdapter
from lit_qlora.data.encode import Encoder
from lit_qlora.data.records import Reading, load_records
from lit_qlora.data.run_rows import RunRows
from lit_qlora.data.sources import paths_of
from lit_qlora.errors import UserError
from lit_qlora.model import load, lora
from lit_qlora.model.base import Base, find_base
from lit_qlora.text.conversation import Conversation
from lit_qlora.tools.merging.streamed import streamed_logits

LARGEST_DIFFERENCE = {"float16": 0.25, "bfloat16": 2.0, "float32": 1e-3}
"""Largest difference of a logit that rounding the weights to a dtype explains. A wrong scale or a missing layer gives
more."""

NUM_CONVERSATIONS = 4
MAX_TOKENS = 256
"""Most tokens of a compared conversation."""


class Reference(NamedTuple):
    """The logits that a merged model is to have.

    Args:
        input_ids: ``[B, T]`` int64, padded on the right, where causal attention never looks.
        is_token: ``[B, T]`` bool, False for padding.
        logits: ``[tokens, V]`` fp32, without padding.
    """

    input_ids: Tensor
    is_token: Tensor
    logits: Tensor


class Difference(NamedTuple):
    """The difference of two models' logits.

    Args:
        greatest: absolute difference of a logit.
        agreement: share of tokens at which the likeliest next one is the same.
        num_tokens: tokens that were compared.
    """

    greatest: float
    agreement: float
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"on {self.num_tokens:,} tokens, in fp32: greatest difference of a logit {self.greatest:.2g}, the "
            f"likeliest token the same at {self.agreement:.2%}"
        )


def conversations_to_compare(chosen: ResolvedAdapter, encoder: Encoder) -> tuple[list[Conversation], str]:
    """Find a run's first held-out conversations; the demo's without a run, or if its rows are gone.

    Args:
        chosen: of the run.
        encoder: encodes them.

    Returns:
        The conversations, and their source in words.
    """
    if chosen.run:
        from lit_qlora.data.datamodule import ChatDataModule  # brings Lightning, which nothing else here needs

        data = ChatDataModule(**chosen.options["data"], seed=chosen.options["seed_everything"])
        rows = RunRows.read(chosen.run.rows)
        with suppress(UserError):
            records, _ = data.parts(data.reading_for(encoder.prompt_format)).held_out(rows)
            names = " and ".join(Path(path).name for path in paths_of(data.source))
            return records.conversations[:NUM_CONVERSATIONS], f"held-out conversations of {names}"
    records = load_records(str(demo.TEST), reading=Reading(prompt_format=encoder.prompt_format))
    return records.conversations[:NUM_CONVERSATIONS], "the demo's conversations"


def reference(
    base: Base, adapter: Path, dtype: torch.dtype, device: torch.device, encoder: Encoder, texts: list[Conversation]
) -> Reference:
    """Compute the logits to compare with: of the 4-bit base with peft's LoRA on it, in fp32.

    Args:
        base: without the adapter.
        adapter: its folder.
        dtype: dtype from which the base is quantised.
        device: device to compute on.
        encoder: encodes the texts.
        texts: answered conversations, of which the first `MAX_TOKENS` tokens are taken.

    Raises:
        UserError: if base and adapter do not match.
    """
    rows = [example.input_ids[:MAX_TOKENS] for example in encoder.examples(texts) if example]
    input_ids = pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True, padding_value=encoder.eos_id)
    is_token = torch.arange(input_ids.shape[1]) < torch.tensor([[len(ids)] for ids in rows])
    model = lora.load_adapter(load.load_base(base, dtype, device, "sdpa"), base, adapter, trainable=False)
    _compute_in_fp32(model)
    with torch.no_grad():
        logits = model.eval()(input_ids=input_ids.to(model.device), use_cache=False).logits.cpu()[is_token]
    del model
    gc.collect()  # its parts refer to each other in circles, and the merge needs the memory
    torch.cuda.empty_cache()
    return Reference(input_ids, is_token, logits)


def _compute_in_fp32(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
        if hasattr(parameter, "quant_state"):
            parameter.quant_state.dtype = torch.float32
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32  # type: ignore[assignment]


def difference(folder: Path, wanted: Reference, device: torch.device) -> Difference:
    """Compare a merged model with base + adapter.

    Args:
        folder: the merged model.
        wanted: logits that it is to have.
        device: device to compute on.

    Returns:
        The greatest difference of a logit, and how often the likeliest token is the same.
    """
    found = streamed_logits(find_base(str(folder)), wanted.input_ids, device)[wanted.is_token]
    agreement = (found.argmax(-1) == wanted.logits.argmax(-1)).float().mean().item()
    # A maximum over NaN is NaN.
    return Difference((found - wanted.logits).abs().max().item(), agreement, len(found))


def check_rounding(found: Difference, dtype: str, *, is_trained: bool = True) -> None:
    """Check that rounding explains a difference.

    Args:
        found: the difference.
        dtype: dtype of the merged weights.
        is_trained: False for another model than was trained, which may differ as far as it is finite.

    Raises:
        UserError: if it is larger than `LARGEST_DIFFERENCE`, or not finite.
    """
    limit = LARGEST_DIFFERENCE[dtype] if is_trained else math.inf
    if not (math.isfinite(found.greatest) and found.greatest <= limit):
        expected = f"at most {limit:g} in {dtype}" if is_trained else "finite logits"
        problem = f"not kept, for the merged model is not base + adapter: {found}"
        raise UserError(problem, option="output", remedy=f"expected {expected}")
