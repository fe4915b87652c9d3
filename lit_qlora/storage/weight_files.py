"""Owns weights written as safetensors, file by file, with no more than one file's worth in memory. Knows no model."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lit_qlora.storage.folders import INDEX, ONE_FILE

SHARD_BYTES = 2**30
"""Size of one file, which a machine with little memory can hold beside everything else."""


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> int:
    """Write ``tensors`` to ``folder`` under Hugging Face's file names; return their size in bytes.

    One file is ``model.safetensors``; several are numbered, with ``model.safetensors.index.json`` beside them.
    A tensor larger than ``shard_bytes`` has a file of its own. One whose name extends another's, as the scales of a
    4-bit weight do, goes to the same file: not every loader looks for it in the next.

    Args:
        folder: an existing one.
        tensors: name and value of each, made when asked for.
        shard_bytes: size of a file, at most.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0
    owner = ""

    def flush() -> None:
        save_file(held, folder / _unnumbered(len(shards)), metadata={"format": "pt"})
        shards.append([*held])
        held.clear()

    for name, tensor in tensors:
        if not owner or not name.startswith(f"{owner}."):
            owner = name
            if held and held_bytes + tensor.nbytes > shard_bytes:
                flush()
                held_bytes = 0
        held[name] = tensor
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()

    names = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [ONE_FILE]
    for index, name in enumerate(names):
        (folder / _unnumbered(index)).rename(folder / name)
    if len(shards) > 1:
        weight_map = {weight: name for name, weights in zip(names, shards, strict=True) for weight in weights}
        content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return total_bytes


def _unnumbered(index: int) -> str:
    return f"unnumbered-{index}.safetensors"
