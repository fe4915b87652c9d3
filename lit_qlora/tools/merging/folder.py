"""Owns a merged folder: weights, config, tokenizer and card, kept only if it gives the logits of base + adapter.

Knows no options.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lit_qlora.chosen import ResolvedAdapter
from lit_qlora.console import counted, say
from lit_qlora.data.chat_template import check_template, config_ids, write_tokenizer
from lit_qlora.data.encode import Encoder
from lit_qlora.data.sources import paths_of
from lit_qlora.data.tokenizer import file_of
from lit_qlora.errors import UserError, one_line
from lit_qlora.figures.card import merged_card
from lit_qlora.model.base import Base
from lit_qlora.model.device import choose_precision, compute_dtype, current_device
from lit_qlora.model.lora import read_record
from lit_qlora.storage.files import size
from lit_qlora.storage.folders import CARD, read_seal, write_folder
from lit_qlora.storage.run import RECORD
from lit_qlora.storage.weight_files import write_shards
from lit_qlora.text.conversation import Conversation
from lit_qlora.tools.merge import BYTES, DType, Onto
from lit_qlora.tools.merging import compare
from lit_qlora.tools.merging.arithmetic import LoraWeights, StoredWeights, merged_tensors

BESIDE = ("tokenizer.model", "LICENSE.txt", "USE_POLICY.md")
"""Files of a base that are copied unchanged."""


def write_merged(target: Path, chosen: ResolvedAdapter, dtype: DType, onto: Onto) -> None:
    """Write the folder of the merged model, compare its answers, and report it.

    Args:
        target: the folder.
        chosen: the adapter, with its base and prompt format.
        dtype: of the weights that are written.
        onto: weights of the base that the adapter is added to: ``quantized`` or ``original``.

    Raises:
        UserError: the merged model answers otherwise than base and adapter, or the folder can't be written.
    """
    trained_in = _trained_in(read_record(chosen.adapter))
    seal, lora = read_seal(chosen.adapter), LoraWeights(chosen.adapter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = chosen.encoder()
    texts, source = compare.conversations_to_compare(chosen, encoder)
    wanted = compare.reference(chosen.base, chosen.adapter, trained_in, device, encoder, texts)
    if read_seal(chosen.adapter) != seal:
        problem = f"{chosen.adapter} was replaced by a running training meanwhile"
        raise UserError(f"merge: {problem}, and nothing is written", remedy="give the command again")

    def fill(folder: Path) -> None:
        weights = StoredWeights(chosen.base)
        tensors = merged_tensors(weights, lora, onto, trained_in, device)
        tensors = counted("merge", tensors, len(weights.names), " weights")
        num_bytes = write_shards(folder, ((name, _in_dtype(name, value, dtype)) for name, value in tensors))
        _write_config(folder, chosen.base, encoder, dtype)
        made_of = {"base": chosen.base.public_name, "onto": onto, "system": None, **encoder.prompt_format.record()}
        (folder / RECORD).write_text(json.dumps(made_of, indent=2), encoding="utf-8")
        _write_tokenizer(folder, chosen.base, encoder, texts)
        found = compare.difference(folder, wanted, device)
        compare.check_rounding(found, dtype, is_trained=onto == "quantized")
        prompts = encoder.prompt_format.described("tokenizer_config.json")
        (folder / CARD).write_text(_card_text(chosen, dtype, onto, found, prompts), encoding="utf-8")
        than = "base + adapter" if onto == "quantized" else "the 4-bit base + adapter that was trained"
        say("merge", f"{chosen.base.public_name} + {chosen.adapter}: {size(num_bytes)} of {dtype} in {target}")
        say("check", f"against {than}, {source}, {found}")

    try:
        write_folder(target, fill)
    except (OSError, SafetensorError) as error:  # a full disk, a folder that may not be written
        raise UserError(f"{target} can't be written: {one_line(error)}", option="output") from error


def _card_text(chosen: ResolvedAdapter, dtype: DType, onto: Onto, found: compare.Difference, prompts: str) -> str:
    made = f"The weights are in {dtype}."
    if onto == "original":
        made += " The adapter was added to the base's own weights, not to the 4-bit ones that it was trained on."
    measured = f"{str(found).capitalize()}, against the 4-bit base with the adapter."
    sources = paths_of(chosen.options["data"]["source"]) if chosen.run else []
    return merged_card(chosen.base.public_name, sources, made, measured, prompts)


def _trained_in(record: dict[str, Any]) -> torch.dtype:
    """The dtype from which the base was quantised in training; if the adapter has no record, this device's."""
    dtype = record.get("base_dtype")
    if dtype in BYTES:
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    return compute_dtype(choose_precision("auto", current_device())[0])


def _in_dtype(name: str, value: Tensor, dtype: DType) -> Tensor:
    """A weight in the output's dtype."""
    value = value.to(getattr(torch, dtype)).contiguous()
    if not value.isfinite().all():
        raise UserError(
            f"{name} has values that {dtype} can't hold", option="dtype", remedy="give --dtype bfloat16 or float32"
        )
    return value.cpu()


def _write_config(folder: Path, base: Base, encoder: Encoder, dtype: DType) -> None:
    # Answers end as in training, whatever the base's config.json says.
    config = {name: value for name, value in base.config.items() if name != "quantization_config"}
    # The name that every version of transformers reads.
    config |= config_ids(encoder) | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, base: Base, encoder: Encoder, texts: list[Conversation]) -> None:
    """Write the base's tokenizer, with a chat template that gives the ids of training."""
    for name in BESIDE:
        file = file_of(base.location, name)
        if file and Path(base.location).is_dir() and not _lies_in(Path(base.location), file):
            say("merge", f"{name} of the base is a link to elsewhere, and is not copied")
        elif file:
            shutil.copyfile(file, folder / name)
    write_tokenizer(folder, encoder, int(base.config["max_position_embeddings"]))
    check_template(folder, encoder, [Conversation(text.turns[:-1], text.system) for text in texts])


def _lies_in(folder: Path, file: Path) -> bool:
    """True if ``file``, links followed, lies in ``folder`` or its hub cache: a stranger's link may lead anywhere."""
    home, target = folder.resolve(), file.resolve()
    blobs = [home.parents[1] / "blobs"] if home.parent.name == "snapshots" else []
    return any(target.is_relative_to(place) for place in (home, *blobs))
