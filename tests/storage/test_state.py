"""A state comes back as it was, or is refused with its place; nothing that is read runs code."""

import enum
import json
import math
import struct
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_qlora.storage.folders import DamagedFolderError
from lit_qlora.storage.state import load_state, save_state

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def assert_same(found: Any, expected: Any, path: str = "state") -> None:
    """Types, order of keys, and every bit."""
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor, path
        assert (found.dtype, found.shape, found.device.type) == (expected.dtype, expected.shape, "cpu"), path
        assert raw(found) == raw(expected), path
        return
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert [(type(key), key) for key in found] == [(type(key), key) for key in expected], path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for index, item in enumerate(expected):
            assert_same(found[index], item, f"{path}[{index}]")
    elif isinstance(expected, float):
        assert struct.pack(">d", found) == struct.pack(">d", expected), path
    else:
        assert found == expected, path


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def round_trip(state: dict, folder: Path) -> dict:
    save_state(state, folder)
    return load_state(folder)


def tensors() -> st.SearchStrategy[torch.Tensor]:
    def make(dtype: torch.dtype, shape: list[int], data: bytes) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        bits = torch.tensor(list((data * (size // len(data) + 1))[:size]), dtype=torch.uint8)
        if dtype is torch.bool:
            bits = bits % 2  # other bytes are no bools
        return bits.view(dtype).reshape(shape)

    shapes = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(make, st.sampled_from(DTYPES), shapes, st.binary(min_size=1, max_size=8))


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
keys = st.text(max_size=5) | st.integers()
values = st.recursive(
    plain | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(
    deadline=None,
    max_examples=100,
    # One folder serves all examples, each overwrites the two files; a busy machine is no fault of ours.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(state=st.dictionaries(keys, values, max_size=4))
def test_round_trip(tmp_path: Path, state: dict) -> None:
    assert_same(round_trip(state, tmp_path), state)


def test_the_skeleton_is_literally_this(tmp_path: Path) -> None:
    save_state({"a": (1, 2.5), 0: [True, None, -math.inf], "t": {"x.y": torch.ones(2)}}, tmp_path)
    assert json.loads((tmp_path / "state.json").read_text()) == {
        "version": 1,
        "state": {
            "dict": [
                ["a", {"tuple": [1, 2.5]}],
                [0, [True, None, {"float": "fff0000000000000"}]],
                ["t", {"dict": [["x.y", {"tensor": "state['t']['x.y']"}]]}],
            ]
        },
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3)], ids=str)
def test_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = {"t": torch.arange(math.prod(shape)).reshape(shape).to(dtype)}
    assert_same(round_trip(state, tmp_path), state)


@pytest.mark.parametrize("bits", ["7ff8000000000000", "fff8000000000001", "7ff0000000000001", "8000000000000000"])
def test_floats_keep_their_bits(tmp_path: Path, bits: str) -> None:
    (number,) = struct.unpack(">d", bytes.fromhex(bits))
    assert struct.pack(">d", round_trip({"x": number}, tmp_path)["x"]).hex() == bits


def test_keys_that_look_alike(tmp_path: Path) -> None:
    state = {
        "a": {"b": torch.tensor(1), 0: torch.tensor(2), "0": torch.tensor(3), "b']['c": torch.tensor(4)},
        "a.b": torch.tensor(5),
        "a']['b": torch.tensor(6),
        "tensor": {"tensor": "state['a.b']"},
        "dict": {"dict": []},
        "__metadata__": torch.tensor(7),
    }
    assert_same(round_trip(state, tmp_path), state)


class Stage(str, enum.Enum):  # noqa: UP042 - the kind that Lightning has
    TRAIN = "train"

    def __str__(self) -> str:
        return "not this"


class Reason(enum.IntEnum):
    DONE = 3


def test_subclasses_come_back_plain(tmp_path: Path) -> None:
    state = {
        Stage.TRAIN: Stage.TRAIN,
        "int": Reason.DONE,
        "float": np.float64(0.1),
        "ordered": OrderedDict(b=1, a=2),
        "default": defaultdict(int, {7: 1}),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    expected = {
        "train": "train",
        "int": 3,
        "float": 0.1,
        "ordered": {"b": 1, "a": 2},
        "default": {7: 1},
        "parameter": torch.ones(2),
    }
    assert_same(round_trip(state, tmp_path), expected)


def test_shared_and_strided_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    negative = torch.tensor([1 + 2j]).conj().imag
    state = {
        "base": base,
        "again": base,
        "transposed": base.T,
        "row": base[1],
        "tail": base.reshape(-1)[6:],
        "column": base[:, 1],
        "expanded": torch.ones(1).expand(3),
        "negative": negative,
    }
    loaded = round_trip(state, tmp_path)
    assert_same(loaded, state | {"negative": torch.tensor([-2.0])})
    loaded["base"].zero_()
    assert loaded["again"].sum() == 66  # each has its own memory


def test_without_tensors_their_file_is_not_read(tmp_path: Path) -> None:
    save_state({"run": {"steps": 6}, "weights": [torch.ones(3), 2]}, tmp_path)
    (tmp_path / "state.safetensors").unlink()
    assert load_state(tmp_path, with_tensors=False) == {"run": {"steps": 6}, "weights": [None, 2]}


def test_loaded_tensors_owe_nothing_to_the_file(tmp_path: Path) -> None:
    loaded = round_trip({"t": torch.zeros(10_000)}, tmp_path)
    path = tmp_path / "state.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"\x00\x00\x80\x3f")
    assert loaded["t"].sum() == 0


Pair = namedtuple("Pair", "a b")


class Quantised(torch.nn.Parameter):
    pass


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "a builtins.object"),
        (np.zeros(2), "a numpy.ndarray"),
        ({1, 2}, "a builtins.set"),
        (b"bytes", "a builtins.bytes"),
        (1j, "a builtins.complex"),
        (Path("x"), f"a {type(Path()).__module__}.PosixPath"),
        (torch.float32, "a torch.dtype"),
        (Pair(1, 2), "Pair"),
        (torch.Size([1]), "a torch.Size"),
        (Quantised(torch.ones(1)), "Quantised"),
        (print, "a builtins.builtin_function_or_method"),
        (torch.zeros(1, dtype=torch.complex64), "a tensor of torch.complex64"),
        (torch.zeros(2).to_sparse(), "torch.sparse_coo"),
    ],
)
def test_anything_else_is_refused_with_its_place(tmp_path: Path, value: Any, kind: str) -> None:
    with pytest.raises(TypeError) as caught:
        save_state({"callbacks": {"X": [0, (1,), value]}}, tmp_path)
    assert str(caught.value).startswith("state['callbacks']['X'][2] is a ")
    assert kind in str(caught.value)
    assert "a checkpoint" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_word_for_word(tmp_path: Path) -> None:
    with pytest.raises(TypeError) as caught:
        save_state({"a": {0: [{1}]}}, tmp_path)
    assert "state['a'][0][0] is a builtins.set" in str(caught.value)
    with pytest.raises(TypeError, match=r"^state\['a'\] has the key \(1, 2\): the keys of a checkpoint"):
        save_state({"a": {(1, 2): 0}}, tmp_path)
    with pytest.raises(TypeError, match=r"^state is a list"):
        save_state([], tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        '{"version": 2, "state": {"dict": []}}',
        '{"version": 1}',
        '{"version": 1, "state": []}',
        '{"version": 1, "state": {"tensor": "state[\'t\']"}}',
        '{"version": 1, "state": {"dict": [["a", {"object": "os.system"}]]}}',
        '{"version": 1, "state": {"dict": [["a", {"tensor": "other"}]]}}',
        '{"version": 1, "state": {"dict": [["a", {"tensor": []}]]}}',
        '{"version": 1, "state": {"dict": [["a", {"float": "00"}]]}}',
        '{"version": 1, "state": {"dict": [["a", {"float": 1}]]}}',
        '{"version": 1, "state": {"dict": [["a", {"tuple": 1}]]}}',
        '{"version": 1, "state": {"dict": [["a", {}]]}}',
        '{"version": 1, "state": {"dict": [["a", {"dict": [], "tuple": []}]]}}',
        '{"version": 1, "state": {"dict": [[["a"], 1]]}}',
        '{"version": 1, "state": {"dict": [["a"]]}}',
        '{"version": 1, "state": {"dict": [1]}}',
        '{"version": 1, "state": {"dict": null}}',
        "\N{EN DASH}",
    ],
)
def test_a_skeleton_that_is_none(tmp_path: Path, text: str) -> None:
    save_state({"t": torch.ones(1)}, tmp_path)
    (tmp_path / "state.json").write_text(text, encoding="utf-8")
    with pytest.raises(DamagedFolderError, match=r"'state.json': expected a state of version 1") as caught:
        load_state(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "state", ["[]", "{}", "7", '"x"', '{"tuple": 3}', '{"dict": [1]}', '{"dict": [], "tuple": []}']
)
def test_the_reason_is_none_of_python_s(tmp_path: Path, state: str) -> None:
    save_state({}, tmp_path)
    (tmp_path / "state.json").write_text(f'{{"version": 1, "state": {state}}}')
    with pytest.raises(DamagedFolderError, match=r"found .* another kind$"):
        load_state(tmp_path)


def test_an_unknown_tag_is_named(tmp_path: Path) -> None:
    save_state({}, tmp_path)
    (tmp_path / "state.json").write_text('{"version": 1, "state": {"object": "os.system"}}')
    with pytest.raises(DamagedFolderError, match=r"found unknown tag 'object'$"):
        load_state(tmp_path)


def test_tensors_that_are_missing_or_torn(tmp_path: Path) -> None:
    save_state({"t": torch.ones(100)}, tmp_path)
    path = tmp_path / "state.safetensors"
    whole = path.read_bytes()
    for torn in (b"", whole[:5], whole[:-1], b"\xff" * 100):
        path.write_bytes(torn)
        with pytest.raises(DamagedFolderError, match=r"'state.safetensors': expected a state of version 1"):
            load_state(tmp_path)
    path.unlink()
    with pytest.raises(DamagedFolderError, match=r"'state.safetensors'.*No such file"):
        load_state(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "state.json").unlink()
    with pytest.raises(DamagedFolderError, match=r"'state.json'.*No such file"):
        load_state(tmp_path)


def test_a_state_like_that_of_bitsandbytes_adamw8bit(tmp_path: Path) -> None:
    # 8-bit moments, and maps and block maxima in a nested dict; the maps are one tensor under many names.
    moments = {f"state{i}": torch.randint(0, 256, (64, 64), dtype=torch.uint8) for i in (1, 2)}
    shared_map = torch.linspace(-1, 1, 256)
    quantised = moments | {"qmap1": shared_map, "qmap2": shared_map, "absmax1": torch.rand(16)}
    state = {
        "state": {0: {"step": 7, "__bnb_optimizer_quant_state__": quantised}, 1: {"step": 7}},
        "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.95), "alpha": 0.0, "t_alpha": None, "params": [0, 1]}],
    }
    assert_same(round_trip(state, tmp_path), state)
