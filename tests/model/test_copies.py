"""The 4-bit copy of a base: the same bits, the same identity, found again, and never a damaged one."""

import shutil
from pathlib import Path

import pytest
import torch

from lit_qlora.model import copies as module
from lit_qlora.model.base import find_base
from lit_qlora.model.copies import Copies
from lit_qlora.model.fingerprint import fingerprint
from lit_qlora.model.load import load_base

CPU = torch.device("cpu")


@pytest.fixture
def kept(tiny, load, tmp_path, monkeypatch) -> Copies:
    """A folder that holds a copy of the tiny Llama."""
    monkeypatch.setattr(module, "RESERVE_BYTES", 0)
    copies = Copies(str(tmp_path / "copies"))
    line = copies.keep(load(), tiny, torch.float32, "cpu")
    assert line.startswith("a 4-bit copy (0.0 GB) is kept in ")
    return copies


def test_a_copy_computes_with_the_same_bits(kept, tiny, load):
    copy = kept.find(tiny, torch.float32, "cpu")
    assert Path(copy.location).parent == kept.root
    first, second = load().state_dict(), load_base(copy, torch.float32, CPU, "sdpa").state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ids = torch.tensor([[1, 77, 400, 5]])
    with torch.no_grad():
        assert torch.equal(load()(ids).logits, load_base(copy, torch.float32, CPU, "sdpa")(ids).logits)


def test_a_copy_is_the_same_base(kept, tiny):
    copy = kept.find(tiny, torch.float32, "cpu")
    assert (copy.name, copy.public_name, copy.shape) == (tiny.name, tiny.public_name, tiny.shape)
    assert fingerprint(copy) == fingerprint(tiny)


def test_a_copy_is_of_one_base_one_dtype_and_one_kind_of_device(kept, tiny, other_tiny):
    assert kept.find(tiny, None, "*") is not None
    assert kept.find(tiny, torch.float16, "cpu") is None
    assert kept.find(tiny, torch.float32, "cuda") is None
    assert kept.find(other_tiny, torch.float32, "cpu") is None


def test_a_damaged_copy_is_not_used_and_goes(kept, tiny):
    (folder,) = kept.root.iterdir()
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert kept.find(tiny, torch.float32, "cpu") is None
    assert list(kept.root.iterdir()) == []


def test_small_bases_are_kept_only_where_a_folder_is_named(tiny, load, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    for place in ("auto", "none"):
        assert Copies(place).keep(load(), tiny, torch.float32, "cpu") is None
        assert Copies(place).find(tiny, torch.float32, "cpu") is None
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "KEPT_FROM", 1)
    monkeypatch.setattr(module, "RESERVE_BYTES", 0)
    assert str(tmp_path / "lit_qlora" / "4bit") in Copies("auto").keep(load(), tiny, torch.float32, "cpu")


def test_a_copy_is_left_out_where_it_can_not_be_kept(tiny, load, tmp_path, monkeypatch):
    full = shutil._ntuple_diskusage(10, 9, 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    line = Copies(str(tmp_path / "a")).keep(load(), tiny, torch.float32, "cpu")
    assert line == "no 4-bit copy kept: 0.0 GB, and 0.0 GB are free"
    (tmp_path / "b").write_text("")
    line = Copies(str(tmp_path / "b")).keep(load(), tiny, torch.float32, "cpu")
    assert line == "no 4-bit copy kept: File exists"


def test_a_base_that_is_in_4_bits_already_needs_no_copy(kept, tiny, load):
    copy = kept.find(tiny, torch.float32, "cpu")
    quantised = find_base(copy.location)
    assert kept.keep(load(), quantised, torch.float32, "cpu") is None
    assert kept.find(quantised, torch.float32, "cpu") is None
