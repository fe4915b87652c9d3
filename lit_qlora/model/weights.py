"""Owns a base's weight files: their download, the tensors in their headers, and whether these fit its config.json.

A header has names, sizes and offsets; only requested values are read. Knows no torch and no adapters.
"""

import math
import re
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from lit_qlora.console import bars
from lit_qlora.errors import UserError, one_line
from lit_qlora.model.architectures import LINEARS, PLACES
from lit_qlora.model.base import Base, base_error, weight_files
from lit_qlora.storage.files import parse_json, unreadable
from lit_qlora.storage.folders import INDEX, ONE_FILE
from lit_qlora.storage.reach import stored_file

LARGEST_HEADER = 100_000_000
"""Most bytes of a header; safetensors' own limit."""
EMBEDDINGS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names of the weights outside of the layers, but for the last norm."""
FLOATS = ("F16", "BF16", "F32", "F64")

BUFFER = "rotary_emb.inv_freq"
"""A tensor of old exports; it follows from config.json, and nobody reads it."""

STATE = re.compile(r"(.*\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")
"""Suffixes of the tensors that a 4-bit base keeps beside a weight."""

COMPARED_VALUES, COMPARED_PLACES = 4096, 16


class Stored(NamedTuple):
    """A tensor in a file.

    Args:
        file: of safetensors.
        dtype: as safetensors names it, such as ``F16``.
        shape: sizes of its dimensions.
        start: where its values begin, in bytes from the file's beginning.
        value_bytes: bytes of one value.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    value_bytes: int

    @property
    def num_values(self) -> int:
        """Number of values in the tensor."""
        return math.prod(self.shape)

    def read(self, places: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of some values; each of ``places`` is a first index and a number of values."""
        with self.file.open("rb", buffering=0) as stream:
            for first, count in places:
                stream.seek(self.start + first * self.value_bytes)
                yield stream.read(count * self.value_bytes)


def stored_tensors(base: Base) -> dict[str, Stored]:
    """The tensors of ``base`` by name.

    Raises FileNotFoundError before they are downloaded, UserError if they can't be read, or one is stored twice.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(base):
        state = file.stat()
        try:
            tensors = _tensors(file, state.st_mtime_ns, state.st_size)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
            reason = unreadable(error)
            problem = f"the weights of {base.name} can't be read: {file.name}: {reason}"
            raise base_error(problem, remedy="download that file again, or take another copy") from error
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise base_error(
                f"{base.name}: {twice[0]} is in {found[twice[0]].file.name} and in {file.name}",
                remedy="take another copy",
            )
        found |= tensors
    return found


@lru_cache(maxsize=512)
def _tensors(file: Path, _: int, num_bytes: int) -> dict[str, Stored]:
    """The tensors of a file by its header, cached while the file stays unchanged."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > LARGEST_HEADER or 8 + length > num_bytes:
            raise ValueError(f"its header is said to have {length:,} bytes, and the file has {num_bytes:,}")
        header = parse_json(stream.read(length))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            (start, end), shape = entry["data_offsets"], tuple(map(int, entry["shape"]))
            if not 0 <= start <= end <= num_bytes - 8 - length:
                raise ValueError(f"{name} is cut off: it ends at byte {8 + length + end:,} of {num_bytes:,}")
            value_bytes = (end - start) // max(math.prod(shape), 1)
            found[name] = Stored(file, str(entry["dtype"]), shape, 8 + length + start, value_bytes)
    return found


def fetch(base: Base) -> None:
    """Download the weights of a ``base`` on the hub to its cache. Raises UserError if that fails."""
    if Path(base.location).is_dir():
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    bar = bars("download", leave=False)

    def find(location: str, name: str) -> Path | None:
        try:
            return stored_file(location, name) or Path(hf_hub_download(location, name, tqdm_class=bar))
        except EntryNotFoundError as error:
            is_there = isinstance(error, LocalEntryNotFoundError) and not (
                name == ONE_FILE and stored_file(location, INDEX)
            )
            if is_there:  # as far as is known: the hub can't be asked
                raise
            return None

    try:
        weight_files(base, find)
    except OSError as error:
        reason = one_line(error)
        raise base_error(f"the weights of {base.name} can't be downloaded: {reason}") from error


def check_weights(base: Base) -> list[str]:
    """Compare the tensors of ``base`` with its config.json; return its linear layers that are not in 4 bits.

    A base not downloaded yet is not checked.

    Raises UserError for the first that differs: the library would fill it with random values, ignore it silently, or
    fail deep inside.
    """
    try:
        stored = stored_tensors(base)
    except FileNotFoundError:
        return []
    expected = _expected(base)
    packed = _packed(stored) if base.in_4_bits else set()
    plain = []
    for name, shape in expected.items():
        tensor = stored.get(name)
        if tensor and name in packed and is_linear(name) and tensor.num_values == math.prod(shape) // 2:
            continue
        if tensor is None or tensor.shape != shape or tensor.dtype not in FLOATS:
            raise _differ(base, name, _tensor_words(tensor), str([*shape]))
        if is_linear(name):
            plain.append(name.removesuffix(".weight"))
    _check_others(base, stored, expected)
    if base.in_4_bits and len(plain) == base.shape.num_layers * len(LINEARS):
        raise base_error(
            f"{base.name}: config.json has a quantization_config, and the weights are in 16 bits",
            remedy="take that key out of config.json",
        )
    return plain


def _tensor_words(tensor: Stored | None) -> str:
    if tensor is None:
        return "missing"
    return f"{[*tensor.shape]}" + ("" if tensor.dtype in FLOATS else f" of {tensor.dtype}")


def _differ(base: Base, name: str, found: str, expected: str) -> UserError:
    return base_error(
        f"{base.name}: the weights are not those of its config.json: {name} is {found}, expected {expected}",
        remedy="take another copy",
    )


def _expected(base: Base) -> dict[str, tuple[int, ...]]:
    """Name and size of each stored tensor; a tied head is not stored."""
    shape = base.shape
    sizes: dict[str, tuple[int, ...]] = {EMBEDDINGS: (shape.vocabulary, shape.hidden)}
    for number in range(shape.num_layers):
        layer = f"model.layers.{number}"
        for name, (inputs, outputs) in shape.linears.items():
            sizes[f"{layer}.{PLACES[name]}.weight"] = (outputs, inputs)
            if name in shape.biased:
                sizes[f"{layer}.{PLACES[name]}.bias"] = (outputs,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"{layer}.{norm}.weight"] = (shape.hidden,)
        for norm in ("q_norm", "k_norm") if shape.has_head_norms else ():
            sizes[f"{layer}.self_attn.{norm}.weight"] = (shape.head_width,)
    sizes["model.norm.weight"] = (shape.hidden,)
    return sizes if shape.tied else sizes | {LM_HEAD: (shape.vocabulary, shape.hidden)}


def is_linear(name: str) -> bool:
    """True for the ``name`` of a weight of the decoder's linear layers: those in 4 bits, without biases and head."""
    return name.endswith(".weight") and name.split(".")[-2] in LINEARS


def _packed(stored: dict[str, Stored]) -> set[str]:
    """Packed weights, two values per byte, with the tensors beside them."""
    parts: dict[str, set[str]] = {}
    for match in filter(None, map(STATE.fullmatch, stored)):
        parts.setdefault(match[1], set()).add(match[2].partition("__")[0])
    needed = {"absmax", "quant_map", "quant_state.bitsandbytes"}
    return {name for name, found in parts.items() if needed <= found and name in stored and stored[name].dtype == "U8"}


def _check_others(base: Base, stored: dict[str, Stored], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError for a weight unknown to a base of this config.json, or a tied head that is another matrix."""
    for name in sorted(stored.keys() - expected.keys()):
        state = STATE.fullmatch(name)
        if name.endswith(BUFFER) or (state and base.in_4_bits and state[1] in expected):
            continue
        if name != LM_HEAD:
            raise _differ(base, name, _tensor_words(stored[name]), "no such weight")
        if not _are_equal(stored[name], stored[EMBEDDINGS]):
            raise base_error(
                f"{base.name}: config.json says tie_word_embeddings, and the weights hold an "
                "lm_head.weight other than the embeddings",
                remedy="set tie_word_embeddings to false, or take another copy",
            )


def _are_equal(one: Stored, other: Stored) -> bool:
    """True if two matrices have the same size, and the same values at some places."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    size = one.num_values
    firsts = range(0, size, max(size // COMPARED_PLACES, 1))
    places = [(first, min(COMPARED_VALUES, size - first)) for first in firsts]
    return all(a == b for a, b in zip(one.read(places), other.read(places), strict=True))
