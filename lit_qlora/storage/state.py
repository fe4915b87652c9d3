"""Owns a training state on disk without pickle: tensors in `state.safetensors`, all else in `state.json`.

Called between a checkpoint's dictionary and its folder. In the JSON, lists, strings, whole numbers, finite
floats, bools and null stand for themselves; anything else is an object with one key, its tag: `dict` (pairs,
so that keys keep their type), `tuple`, `float` (the bits of one that isn't finite), `tensor` (its name).
Nothing that is read can run code. Knows nothing of what the state means.
"""

import json
import math
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lit_qlora.storage.files import disk_error, parse_json, unreadable
from lit_qlora.storage.folders import DamagedFolderError

TENSORS = "state.safetensors"
SKELETON = "state.json"
STATE_VERSION = 1
# What safetensors can hold and a round trip keeps; a dtype that is not here is refused, not cast.
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
# Whatever bytes that are none of ours can raise on the way in.
_UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, LookupError, struct.error, RecursionError)


def save_state(state: dict, folder: Path) -> None:
    """Write a nested state into an existing folder.

    Args:
        state: dicts with str or int keys, lists, tuples, str, int, float, bool, None and tensors. A subclass
            of dict, str, int or float (an OrderedDict, an enum) is kept as the plain type, a tensor by its
            values.
        folder: where the two files go.

    Raises:
        TypeError: the state holds something else; the message says where.
        OSError: a file could not be written.
    """
    if not isinstance(state, dict):
        raise TypeError(f"state is a {type(state).__name__}, not a dict")
    tensors: dict[str, torch.Tensor] = {}
    skeleton = {"version": STATE_VERSION, "state": _encode(state, "state", tensors)}
    try:
        save_file(_unshared(tensors), folder / TENSORS)
    except SafetensorError as error:
        raise disk_error(error, folder / TENSORS) from error
    (folder / SKELETON).write_text(json.dumps(skeleton, allow_nan=False), encoding="ascii")


def load_state(folder: Path, with_tensors: bool = True) -> dict[Any, Any]:
    """Read what `save_state` wrote; the tensors are on the CPU and independent of the files.

    Args:
        folder: of a checkpoint.
        with_tensors: False to have None for each tensor: they are most of the bytes.

    Returns:
        The state, as nested as it was.

    Raises:
        DamagedFolderError: a file is missing or holds anything that `save_state` does not write.
    """
    file = TENSORS
    try:
        # load_file maps the file into memory; cloned, the tensors outlive its removal and later changes.
        tensors: dict[str, Any] = defaultdict(type(None))
        if with_tensors:
            tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
        file = SKELETON
        skeleton = parse_json((folder / SKELETON).read_text(encoding="ascii"))
        if skeleton["version"] != STATE_VERSION:
            raise ValueError(f"version {skeleton['version']!r}")
        state = _decode(skeleton["state"], tensors)
        if not isinstance(state, dict):
            raise TypeError("a state that is no dict")
    except _UNREADABLE as error:
        raise DamagedFolderError(folder, file, f"a state of version {STATE_VERSION}", unreadable(error)) from error
    return state


def check_tensors(folder: Path) -> None:
    """Verify that the tensor file in ``folder`` holds the tensors named by the state, without reading them.

    Raises:
        DamagedFolderError: it holds others, or is not readable.
    """
    names: dict[str, Any] = defaultdict(type(None))
    try:
        _decode(parse_json((folder / SKELETON).read_text(encoding="ascii"))["state"], names)
        with safe_open(folder / TENSORS, framework="pt") as file:
            found = {*file.keys()}
    except _UNREADABLE as error:
        raise DamagedFolderError(folder, TENSORS, "tensors", unreadable(error)) from error
    if found != names.keys():
        raise DamagedFolderError(folder, TENSORS, "the tensors of the state", f"others ({min(found ^ names.keys())})")


def num_bytes(state: Any) -> int:
    """Bytes that the tensors of a nested ``state`` will take on disk."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict | list | tuple):
        return sum(num_bytes(item) for item in (state.values() if isinstance(state, dict) else state))
    return 0


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Turn a value into JSON, and put its tensors aside under their path, which no two share."""
    if value is None or isinstance(value, str | int | float):
        return _encode_plain(value)
    if isinstance(value, dict):
        return {"dict": [_encode_pair(key, item, path, tensors) for key, item in value.items()]}
    # Exact types from here: a named tuple or a quantised parameter would come back as less than it was.
    if type(value) in {list, tuple}:
        items = [_encode(item, f"{path}[{index}]", tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if type(value) in {torch.Tensor, torch.nn.Parameter}:
        if value.dtype not in _DTYPES or value.layout != torch.strided:
            raise TypeError(f"{path} is a tensor of {value.dtype}, {value.layout}: a checkpoint can't hold it")
        tensors[path] = value.detach().cpu().resolve_neg().contiguous()
        return {"tensor": path}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise TypeError(f"{path} is a {kind}: a checkpoint holds plain values and tensors only")


def _encode_plain(value: Any) -> Any:
    """Strip a value of its subclass, an enum for one, by asking the plain type."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
    return float.__float__(value) if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}


def _encode_pair(key: Any, item: Any, path: str, tensors: dict[str, torch.Tensor]) -> list[Any]:
    if not isinstance(key, str | int):
        raise TypeError(f"{path} has the key {key!r}: the keys of a checkpoint are strings and whole numbers")
    plain = _encode_plain(key)
    return [plain, _encode(item, f"{path}[{plain!r}]", tensors)]


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise TypeError("a value without its one tag")
    ((tag, content),) = value.items()
    match tag:
        case "dict":
            return {key: _decode(item, tensors) for key, item in content}
        case "tuple":
            return tuple(_decode(item, tensors) for item in content)
        case "float":
            return struct.unpack(">d", bytes.fromhex(content))[0]
        case "tensor":
            return tensors[content]
        case _:
            raise ValueError(f"unknown tag {tag!r}")


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share memory, which safetensors refuses."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart
