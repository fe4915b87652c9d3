"""Owns the identity of a base: its fingerprint, from config.json and a sample of its weights.

Recorded beside adapters and in checkpoints. Reads a few KiB of each tensor, by the offsets in the files' headers, so
that a 7B takes a moment. Knows no torch and no adapters.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lit_qlora.errors import one_line
from lit_qlora.model.architectures import LINEARS, architecture_of
from lit_qlora.model.base import Base, base_error, commit
from lit_qlora.model.config import rope_of
from lit_qlora.model.weights import LM_HEAD, Stored, stored_tensors
from lit_qlora.storage.foreign import object_in
from lit_qlora.storage.reach import stored_file
from lit_qlora.storage.run import RECORD

FINGERPRINT_VERSION = "v2"
ORIGINAL = "lit_qlora_original.json"
"""The file in a 4-bit copy that identifies its base."""

NUM_PLACES, VALUES_PER_PLACE = 8, 512
"""The sample of a large tensor: places, and values at each."""
WHOLE_UP_TO = 16_384
"""Most values of a tensor that is read as a whole: every norm."""
TINY = 2.0**-16
"""Smaller values count as 0: fp16 can't hold what bf16 can there."""

SHOWN_DIGITS = 12
"""Digits that a message shows."""

_LINEAR = re.compile(rf"model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(LINEARS)})\.weight")
_SCALES = re.compile(_LINEAR.pattern + r"\.(absmax|nested_absmax)")


def fingerprint(base: Base) -> str:
    """``v2-``, how the weights are stored, and a sha256 over config and sample, with and without the linear layers.

    Equal for copies in a folder, on the hub, in shards, in another float type of the same values, and for the 4-bit
    copies of this project; a 4-bit copy from elsewhere is a base of its own. Call it once the weights are downloaded
    (in the folder or in the cache).

    Args:
        base: base whose weights are on this machine.

    Raises:
        UserError: they can't be read.
    """
    own = _sampled(base)
    file = stored_file(base.location, ORIGINAL)
    stated = object_in(file) if file else {}
    # A copy whose weights were altered since does not count as one.
    return str(stated["of"]) if stated.get("own") == own and isinstance(stated.get("of"), str) else own


def write_original(folder: Path, copy: Base, base: Base) -> None:
    """Record which base a 4-bit copy is of.

    Args:
        folder: of the copy, which is being written.
        copy: 4-bit copy in that folder, as a base.
        base: base that the copy was made from.
    """
    stated = {"of": fingerprint(base), "own": _sampled(copy)}
    (folder / ORIGINAL).write_text(json.dumps(stated, indent=2), encoding="utf-8")


def short(recorded: str) -> str:
    """A fingerprint as ``recorded``, shortened for a message."""
    return (recorded.split("-")[2] if recorded.count("-") == 3 else recorded)[:SHOWN_DIGITS]


def identity(base: Base) -> dict[str, str | None]:
    """The public name of ``base``, its commit on the hub if known, and its `fingerprint`."""
    return {"name": base.public_name, "commit": commit(base), "fingerprint": fingerprint(base)}


def _sampled(base: Base) -> str:
    """A fingerprint of the files themselves; cached while they stay unchanged."""
    tensors = tuple(sorted(stored_tensors(base).items()))
    states = tuple((file, file.stat().st_mtime_ns) for file in sorted({tensor.file for _, tensor in tensors}))
    try:
        plain, linear = _digests(tensors, states, base.shape.tied)
    except OSError as error:
        reason = one_line(error)
        raise base_error(f"the weights of {base.name} can't be read: {reason}") from error
    rules = repr((base.shape, rules_of(base.config)))
    merged = stored_file(base.location, RECORD)  # a merged model's norms are its parent's
    kind = "4bit" if base.in_4_bits else "full"
    whole = hashlib.sha256(f"{rules} {plain} {linear}".encode()).hexdigest()
    rest = hashlib.sha256(f"{rules} {plain} {object_in(merged) if merged else ''}".encode()).hexdigest()
    return "-".join((FINGERPRINT_VERSION, kind, whole[:32], rest[:32]))


@lru_cache(maxsize=16)
def _digests(
    tensors: tuple[tuple[str, Stored], ...], _: tuple[tuple[Path, int], ...], is_tied: bool
) -> tuple[str, str]:
    """Hashes over the samples of everything but the linear layers, and over those of the linear layers."""
    plain, linear = hashlib.sha256(), hashlib.sha256()
    for name, tensor in tensors:
        is_linear = _LINEAR.fullmatch(name) or _SCALES.fullmatch(name)
        is_head = name == LM_HEAD and is_tied  # written by some, left out by others
        if is_head or not (is_linear or name.endswith((".weight", ".bias"))) or not name.startswith(("model.", "lm_")):
            continue
        digest = linear if is_linear else plain
        digest.update(f"{name} {tensor.num_values} ".encode())
        for values in tensor.read(_places(name, tensor.num_values)):
            digest.update(_in_fp32(values, tensor.dtype))
    return plain.hexdigest(), linear.hexdigest()


def _places(name: str, num_values: int) -> Iterator[tuple[int, int]]:
    """First index and number of the values to read: all, or some of each eighth, in columns chosen by the name."""
    if num_values <= WHOLE_UP_TO:
        yield 0, num_values
        return
    stride = num_values // NUM_PLACES
    chance = hashlib.sha256(name.encode()).digest()
    for place in range(NUM_PLACES):
        (number,) = struct.unpack_from("<I", chance, 4 * place)
        yield place * stride + number % (stride - VALUES_PER_PLACE), VALUES_PER_PLACE


def _in_fp32(stored: bytes, dtype: str) -> bytes:
    """Values in fp32, whichever float type stores them; the raw bytes of any other type."""
    import numpy as np

    if dtype == "BF16":  # the upper half of an fp32
        values = (np.frombuffer(stored, "<u2").astype("<u4") << 16).view("<f4")
    elif dtype in ("F16", "F32"):
        values = np.frombuffer(stored, {"F16": "<f2", "F32": "<f4"}[dtype]).astype("<f4")
    else:
        return f"{dtype} ".encode() + stored
    return np.where(np.abs(values) < TINY, np.float32(0), values).tobytes()


def rules_of(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """The parts of ``config`` that change the output at equal widths, whichever version of transformers wrote it."""
    theta, kind, members = rope_of(config)
    scaling = sorted((name, _canonical(value)) for name, value in members.items()) if kind != "default" else []
    return (
        config["num_attention_heads"],
        float(theta),
        kind,
        scaling,
        float(config.get("rms_norm_eps", 1e-6)),
        config.get("hidden_act", "silu"),
        bool(config.get("attention_bias", False)),
        bool(config.get("mlp_bias", False)),
        *architecture_of(config).identity(config),
    )


def _canonical(value: Any) -> Any:
    """A member of rope in a canonical form."""
    if isinstance(value, (int, float)):
        return float(value)
    return [float(part) for part in value] if isinstance(value, list) else repr(value)
