"""Weights in files of limited size: all there, each once, under the names that Hugging Face reads."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lit_qlora.storage.weight_files import write_shards

WEIGHTS = {
    name: torch.full((8,), float(value), dtype=torch.float16) for value, name in enumerate("abcdefg")
}  # 16 bytes


@pytest.mark.parametrize(
    ("shard_bytes", "expected"),
    [(16, [1] * 7), (15, [1] * 7), (32, [2, 2, 2, 1]), (47, [2, 2, 2, 1]), (48, [3, 3, 1])],
)
def test_no_file_is_larger_than_asked(tmp_path, shard_bytes, expected):
    assert write_shards(tmp_path, WEIGHTS.items(), shard_bytes) == 112
    names = [f"model-{at:05d}-of-{len(expected):05d}.safetensors" for at in range(1, len(expected) + 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    loaded = [load_file(tmp_path / name) for name in names]
    assert [len(shard) for shard in loaded] == expected
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": 112}
    assert index["weight_map"] == {name: file for file, shard in zip(names, loaded, strict=True) for name in shard}
    for shard in loaded:
        assert all(torch.equal(value, WEIGHTS[name]) for name, value in shard.items())


def test_one_file_has_no_index(tmp_path):
    write_shards(tmp_path, WEIGHTS.items(), 112)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_no_more_than_one_file_s_worth_is_held(tmp_path):
    import weakref

    living = []

    def fresh():
        for name in "abcdef":
            tensor = torch.zeros(4)
            living.append(weakref.ref(tensor))
            assert sum(reference() is not None for reference in living) <= 3  # two held and this one
            yield name, tensor

    write_shards(tmp_path, fresh(), 32)
