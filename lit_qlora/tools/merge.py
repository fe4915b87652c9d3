"""Owns the verb merge: an adapter merged into its base, as a plain Hugging Face folder that is compared with both.

The folder is written by `merging.folder`. Knows what is refused before anything is loaded.
"""

from pathlib import Path
from shlex import quote
from typing import Literal

from lit_qlora.chosen import ResolvedAdapter, choose_adapter
from lit_qlora.console import say
from lit_qlora.errors import UserError
from lit_qlora.storage.files import output_path, require_new, require_room
from lit_qlora.storage.folders import recover

DType = Literal["float16", "bfloat16", "float32"]
Onto = Literal["quantized", "original"]
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
OTHER_DISK = "give a folder on another disk"
MARGIN_BYTES = 64 * 2**20
"""Bytes for tokenizer, index and the file system's own use."""


def merge(
    output: str,
    run: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    dtype: DType = "float16",
    onto: Onto = "quantized",
) -> None:
    """Merge an adapter into its base: a plain Hugging Face folder for transformers, vLLM and llama.cpp.

    Args:
        output: the folder to write; it must not exist.
        run: run folder, for its best adapter; default: the run that was started last.
        adapter: an adapter folder instead of a run.
        base: the base of the adapter; default: the one that run or folder names.
        dtype: dtype of the written weights.
        onto: quantized adds to the dequantised 4-bit base, which gives the model that was trained; original adds to the
            base's own weights, which gives another model.

    Raises:
        UserError: as `merge_into` does.
    """
    target = output_path(output, "folder")
    chosen = choose_adapter(run, adapter, base)
    merge_into(target, chosen, dtype, onto)
    say("load", f"AutoModelForCausalLM.from_pretrained({output!r})")
    say("serve", f"vllm serve {quote(output)}")


def merge_into(target: Path, chosen: ResolvedAdapter, dtype: DType, onto: Onto) -> None:
    """Write a merged model, compare it with base + adapter, and report the difference.

    Args:
        target: the folder to make.
        chosen: adapter and base.
        dtype: dtype of the written weights.
        onto: as in `merge`.

    Raises:
        UserError: if ``target`` exists, the disk is too small, base and adapter do not match, or the difference is
            too large.
    """
    recover(target)
    require_new(target)
    if onto == "original" and chosen.base.in_4_bits:
        raise UserError(
            f"{chosen.base.name} is stored in 4 bits and has no original weights", option="onto", remedy="use quantized"
        )
    needed_bytes = chosen.base.shape.num_parameters * BYTES[dtype] + MARGIN_BYTES
    require_room(target, needed_bytes, str(target), option="output", remedy=OTHER_DISK)

    from lit_qlora.tools.merging.folder import write_merged

    write_merged(target, chosen, dtype, onto)
