"""The 4-bit copy of a base: the same bits, the same identity, found again, and never a damaged one."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
    line = copies.keep(tiny, torch.float32, CPU)
    assert line.startswith("a 4-bit copy (325.5 kB) is kept in ")
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


def test_the_bytes_of_a_copy_are_those_by_formula(kept, tiny):
    shape, copy = tiny.shape, kept.find(tiny, torch.float32, "cpu")
    tensors = [one for file in Path(copy.location).glob("*.safetensors") for one in load_file(file).items()]
    stored = sum(value.nbytes for name, value in tensors if "bitsandbytes" not in name)
    offsets = 4 * sum("bitsandbytes" in name for name, _ in tensors)  # which a file has as text
    assert stored + offsets == shape.num_layers * shape.layer_bytes + shape.unshared_bytes(4)


def test_a_copy_is_of_one_base_one_dtype_and_one_kind_of_device(kept, tiny, other_tiny):
    assert kept.find(tiny, None, "*") is not None
    assert kept.find(tiny, torch.float16, "cpu") is None
    assert kept.find(tiny, torch.float32, "cuda") is None
    assert kept.find(other_tiny, torch.float32, "cpu") is None


def found(kept, tiny):
    return kept.find(tiny, torch.float32, "cpu")


def test_a_later_start_does_not_read_the_whole_copy(kept, tiny, monkeypatch):
    monkeypatch.setattr(module, "verify_folder", lambda *_, **__: pytest.fail("it was read whole"))
    assert found(kept, tiny) is not None
    assert found(kept, tiny) is not None


def test_a_copy_whose_times_are_others_is_read_whole_once(kept, tiny, monkeypatch):
    """One that came from elsewhere, or from an earlier version, which noted nothing."""
    verify, times = module.verify_folder, []
    monkeypatch.setattr(module, "verify_folder", lambda *a, **k: times.append(1) or verify(*a, **k))
    (folder,) = kept.root.iterdir()
    for change in (lambda: os.utime(folder / "config.json", (5, 5)), (folder / "checked.json").unlink):
        change()
        assert found(kept, tiny) is not None
        assert found(kept, tiny) is not None
    assert len(times) == 2


def _keeping_its_time(change):
    def changed(file):
        state = file.stat()
        change(file)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))

    return changed


def _flip(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def _zero_the_tail(file):
    content = file.read_bytes()
    file.write_bytes(content[:-5000] + bytes(5000))


def _cut(file):
    os.truncate(file, file.stat().st_size - 1)


def _replace(file):
    (file.parent / "new").write_bytes(bytes(file.stat().st_size))
    (file.parent / "new").replace(file)


DAMAGE = {
    "flipped": _flip,
    "cut": _keeping_its_time(_cut),
    "a zeroed tail": _keeping_its_time(_zero_the_tail),
    "replaced": _replace,
    "missing": Path.unlink,
    "one more": lambda file: (file.parent / "more.safetensors").touch(),
    "no manifest": lambda file: (file.parent / "manifest.json").unlink(),
    "another manifest": lambda file: (file.parent / "manifest.json").write_text("{}", encoding="utf-8"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_copy_is_not_used_and_goes(kept, tiny, damage):
    (folder,) = kept.root.iterdir()
    found(kept, tiny)
    damage(folder / "model.safetensors")
    assert found(kept, tiny) is None
    assert list(kept.root.iterdir()) == []


def test_a_zeroed_tail_of_a_large_file_is_in_its_sample(tmp_path):
    file = tmp_path / "large"
    file.write_bytes(os.urandom(3_000_000))
    before = module._sample(file)
    assert module._sample(file) == before
    _zero_the_tail(file)
    assert module._sample(file) != before


# How many stay


def others(kept, *ages_s, size=10):
    """Copies of other bases, by the time since they were used last."""
    folders = []
    for number, age in enumerate(ages_s):
        folder = kept.root / f"other-{number}-0123456789ab-nf4-float16-cuda"
        folder.mkdir(parents=True)
        for name in ("manifest.json", "lit_qlora_original.json"):
            (folder / name).write_text("{}", encoding="utf-8")
        (folder / "model.safetensors").write_bytes(bytes(size * 10**6))
        os.utime(folder / "manifest.json", (time.time() - age,) * 2)
        folders.append(folder)
    return folders


def keep(tmp_path, monkeypatch, load, tiny, before):
    monkeypatch.setattr(module, "RESERVE_BYTES", 0)
    copies = Copies(str(tmp_path / "copies"))
    before(copies)
    return copies, copies.keep(tiny, torch.float32, CPU)


def test_the_three_last_used_stay_and_the_rest_is_reported(tiny, load, tmp_path, monkeypatch):
    foreign = []

    def before(copies):
        old = others(copies, 500, 10, 4000, 300)
        foreign.extend([copies.root / "photos-0a-nf4-x-y", copies.root / "notes.txt", old[1], old[3]])
        foreign[0].mkdir()  # whose name is like a copy's
        foreign[1].touch()

    copies, line = keep(tmp_path, monkeypatch, load, tiny, before)
    (target,) = copies.root.glob("tiny-llama-*")
    assert {*copies.root.iterdir()} == {*foreign, target}
    assert line.endswith(
        "the next start reads that; other-0-0123456789ab-nf4-float16-cuda (10.0 MB), "
        "other-2-0123456789ab-nf4-float16-cuda (10.0 MB) removed: the 3 last used stay"
    )


def test_a_copy_that_was_read_lately_outlives_one_that_was_made_lately(kept, tiny):
    (mine,) = kept.root.iterdir()
    os.utime(mine / "manifest.json", (5, 5))
    found(kept, tiny)
    module._in_use.pop(mine).close()
    others(kept, 100, 200, 300)
    kept._prune(kept.root / "new")
    assert mine in kept.root.iterdir()
    assert len([*kept.root.iterdir()]) == 2


def test_a_copy_in_use_stays_until_its_process_ends(kept, tiny):
    """However long ago it was used first, and however that process ends."""
    folder, *_ = others(kept, 9000, 10, 20, 30)
    code = "import sys, time; from pathlib import Path; from lit_qlora.storage.in_use import Held\n"  # as a start does
    code += "held = Held(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        os.utime(folder / "manifest.json", (5, 5))
        kept._prune(kept.root / "new")
        assert folder.is_dir()
        process.kill()
    kept._prune(kept.root / "new")
    assert not folder.exists()


def test_this_process_s_own_copy_stays(kept, tiny):
    (mine,) = kept.root.iterdir()
    found(kept, tiny)
    os.utime(mine / "manifest.json", (5, 5))
    others(kept, 10, 20, 30)
    assert "tiny-llama" not in kept._prune(kept.root / "new")
    assert mine.is_dir()
    assert fingerprint(kept.find(tiny, torch.float32, "cpu")) == fingerprint(tiny)


def test_where_no_locks_are_nothing_is_removed(kept, tiny, monkeypatch):
    def none(*_, **__):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    assert found(kept, tiny) is not None
    folders = others(kept, 10, 20, 30, 40)
    assert kept._prune(kept.root / "new") == ""
    assert all(folder.is_dir() for folder in folders)


def test_a_copy_that_was_cut_short_goes_after_a_day(kept):
    left, young = (kept.root / f".{name}-0a-nf4-float16-cuda.tmp-1-0123abcd" for name in ("a", "b"))
    left.mkdir()
    young.mkdir()
    os.utime(left, (5, 5))
    kept._prune(kept.root / "new")
    assert not left.exists()
    assert young.exists()


def test_room_is_made_before_a_copy_is_given_up(tiny, load, tmp_path, monkeypatch):
    free = {True: 9, False: 10**12}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda root: shutil._ntuple_diskusage(0, 0, free[len([*root.iterdir()]) > 2])
    )
    _, line = keep(tmp_path, monkeypatch, load, tiny, lambda copies: others(copies, 10, 20, 30))
    assert "is kept in" in line
    assert "other-2-0123456789ab-nf4-float16-cuda (10.0 MB) removed" in line


def test_small_bases_are_kept_only_where_a_folder_is_named(tiny, load, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    for place in ("auto", "none"):
        assert Copies(place).keep(tiny, torch.float32, CPU) is None
        assert Copies(place).find(tiny, torch.float32, "cpu") is None
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "KEPT_FROM", 1)
    monkeypatch.setattr(module, "RESERVE_BYTES", 0)
    assert str(tmp_path / "lit_qlora" / "4bit") in Copies("auto").keep(tiny, torch.float32, CPU)


def test_a_copy_is_left_out_where_it_can_not_be_kept(tiny, load, tmp_path, monkeypatch):
    full = shutil._ntuple_diskusage(10, 9, 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    line = Copies(str(tmp_path / "a")).keep(tiny, torch.float32, CPU)
    assert line == "no 4-bit copy kept: 325.5 kB, and 1.0 MB are free"
    (tmp_path / "b").write_text("")
    line = Copies(str(tmp_path / "b")).keep(tiny, torch.float32, CPU)
    assert line == "no 4-bit copy kept: File exists"


def test_a_base_that_is_in_4_bits_already_needs_no_copy(kept, tiny, load):
    copy = kept.find(tiny, torch.float32, "cpu")
    quantised = find_base(copy.location)
    assert kept.keep(quantised, torch.float32, CPU) is None
    assert kept.find(quantised, torch.float32, "cpu") is None
