"""A base in shares: the bits of a whole one, each byte read by the process that keeps it, and nothing else kept."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_qlora.devices.world import World
from lit_qlora.errors import UserError
from lit_qlora.model import copies, sharded_base, shards, weights
from lit_qlora.model.attention import find_places
from lit_qlora.model.base import find_base
from lit_qlora.model.copies import Copies
from lit_qlora.model.decoder import MicroBatch, extract_layers, run_together, weights_of
from lit_qlora.model.fingerprint import fingerprint
from lit_qlora.model.lora import Lora, adapter_parameters, add_lora
from lit_qlora.model.offload import HostStore
from lit_qlora.model.sharded_base import load_sharded
from tests.small_bases import save_base

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 77, 400, 5, 9, 11]])


@pytest.fixture
def copy_of(tmp_path, monkeypatch, load):
    """The 4-bit copy of a base."""

    def copy_of(base: Any) -> Any:
        monkeypatch.setattr(copies, "RESERVE_BYTES", 0)
        kept = Copies(str(tmp_path / "copies"))
        assert kept.keep(base, torch.float32, CPU)
        return kept.find(base, torch.float32, "cpu")

    return copy_of


@contextmanager
def as_processes(count: int, monkeypatch: pytest.MonkeyPatch, base: Any, on_host: bool) -> Iterator[list[Any]]:
    """The models of ``count`` processes, in this one: what is gathered is taken from all of their shares."""
    found = []
    for rank in range(count):
        here = World(rank, count, rank, count)
        monkeypatch.setattr(shards, "world", lambda here=here: here)
        found.append(load_sharded(base, torch.float32, CPU, "sdpa", on_host))
    own = [one._own for _, one in found]

    def gather(whole: torch.Tensor, part: torch.Tensor) -> Any:
        index = next(i for shares in own for i, share in enumerate(shares) if torch.equal(share, part))
        whole.copy_(torch.cat([shares[index] for shares in own]))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(shards, "_gather", gather)
    yield [model for model, _ in found]


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("from_copy", [False, True])
def test_each_process_has_the_bits_of_a_whole_base(count, on_host, from_copy, tiny, load, copy_of, monkeypatch):
    if count == 1 and not on_host:
        return  # nothing to share with: refused
    base = copy_of(tiny) if from_copy else tiny
    with torch.no_grad(), as_processes(count, monkeypatch, base, on_host) as models:
        expected = load()(IDS).logits
        for model in models:
            assert torch.equal(model(IDS).logits, expected)
            assert torch.equal(model(IDS).logits, expected)  # its layers have to come again


@pytest.mark.parametrize(
    "like", ["llama 3.2", "llama with biases", "mistral nemo", "qwen2.5 yarn", "qwen3 with biases"]
)
def test_any_architecture(like, tmp_path, load, monkeypatch):
    base = find_base(str(save_base(tmp_path / "base", like)))
    with torch.no_grad(), as_processes(2, monkeypatch, base, False) as models:
        assert torch.equal(models[1](IDS).logits, load(base=base)(IDS).logits)
        names = [dict(model.named_parameters()).keys() for model in (models[0], load(base=base))]
        assert names[0] == names[1]


@pytest.mark.parametrize(("here", "fits"), [(World(), False), (World(0, 2, 0, 2), False), (World(1, 2, 0, 1), True)])
def test_a_host_without_the_room_is_refused_before_a_weight_is_loaded(here, fits, tiny, monkeypatch):
    """Shares of all processes of a machine lie in its memory; those of another machine do not."""
    whole = tiny.shape.num_layers * tiny.shape.layer_bytes
    monkeypatch.setattr(sharded_base, "world", lambda: here)
    monkeypatch.setattr(sharded_base.host, "memory_bytes", lambda: (10**12, int(whole * 0.75)))
    with nullcontext() if fits else pytest.raises(UserError, match=r"^model\.shard_to: host: .* of the base's layers"):
        sharded_base.check_host(tiny.shape)
    monkeypatch.setattr(sharded_base.host, "memory_bytes", lambda: None)  # unknown
    sharded_base.check_host(tiny.shape)


def gradients(model: Any, layers: Any, kept: int, hosted: int, together: int) -> dict[str, torch.Tensor]:
    """The gradients of LoRA after four micro-batches."""
    weights, decoder = [*adapter_parameters(model).values()], model.get_base_model().model
    model.zero_grad()
    lengths = [5, 9, 7, 6]
    for first in range(0, len(lengths), together):
        batches = []
        for length in lengths[first : first + together]:
            hidden = decoder.embed_tokens(torch.arange(3, 3 + 2 * length).view(2, length))
            seeds = (length,) * len(layers)
            batches.append(MicroBatch(hidden, find_places(decoder.rotary_emb, hidden, ()), seeds))
        earlier = {id(one): one.grad for one in weights if one.grad is not None}
        model.zero_grad()
        out = run_together(layers, batches, kept, HostStore() if hosted else None, hosted, earlier)
        torch.stack([one.square().sum() for one in out]).sum().backward()
    return {name: one.grad.clone() for name, one in adapter_parameters(model).items()}


def test_layers_that_come_serve_all_that_is_done_with_them(tiny, load, monkeypatch):
    """Activations that stay or wait on the host, micro-batches that go together: to the last bit; each pass has the
    layers come once per direction."""
    loaded, shared = load_sharded(tiny, torch.float32, CPU, "sdpa", True)
    models = []
    for model in (load(), loaded):
        torch.manual_seed(1)
        models.append(add_lora(model, Lora(4, 8.0, 0.1, "all-linear", False, False)).train())
        for one in adapter_parameters(models[-1]).values():
            torch.nn.init.normal_(one, std=0.05)
    wanted = gradients(models[0], extract_layers(models[0]), 0, 0, 1)
    assert any(one.any() for one in wanted.values())
    opened, real = [], shards.Shards.open
    monkeypatch.setattr(shards.Shards, "open", lambda self, *args: opened.append(args) or real(self, *args))
    layers = extract_layers(models[1], weights=weights_of(models[1], shared))
    for kept, hosted, together in product((0, 1, 2), (0, 1), (1, 2, 3, 4)):
        opened.clear()
        found = gradients(models[1], layers, kept, hosted, together)
        assert all(torch.equal(found[name], one) for name, one in wanted.items()), (kept, hosted, together)
        assert opened == [(0, 1), (1, 1), (1, -1), (0, -1)] * -(-4 // together)


def test_a_layer_whose_bytes_do_not_divide(tiny):
    """Shares are multiples of 256 bytes, and the last one is filled up."""
    layer = shards.Shards(CPU, True)
    part = shards.TensorPart(
        torch.uint8, (1000, 1), lambda first, count: torch.arange(1000).to(torch.uint8)[first : first + count]
    )
    linear = torch.nn.Linear(1, 1)
    linear.weight = torch.nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
    state = SimpleNamespace(absmax=None)
    layer.size, layer.rank = 3, 2
    layer.add([(linear, shards.Packed(state, (part, part._replace(shape=(10,)))))])
    assert layer.own_bytes == 512 and (layer._own[0] == 0).sum() >= 512 - 10
    layer.size, layer.rank = 3, 1
    layer.add([(linear, shards.Packed(state, (part, part._replace(shape=(10,)))))])
    assert torch.equal(layer._own[1][:488], torch.arange(512, 1000).to(torch.uint8))


def storages(model: Any) -> dict[int, int]:
    """Bytes of each storage that the 4-bit weights and their scales are in."""
    found = {}
    for layer in model.model.layers:
        for module in layer.modules():
            if hasattr(module, "quant_state"):
                state = module.weight.quant_state
                for tensor in (module.weight.data, state.absmax, state.state2.absmax):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def packed() -> Iterator[torch.UntypedStorage]:
    """The storage of all byte tensors that anyone holds, but for small ones."""
    gc.collect()
    for one in gc.get_objects():
        if type(one) is torch.Tensor and one.dtype == torch.uint8 and one.numel() > 2000:
            yield one.untyped_storage()


def test_no_whole_weight_remains(tmp_path, monkeypatch):
    """Two buffers and the shares of eight layers are all: nothing else as large as a weight is held by anyone."""
    base = find_base(str(save_base(tmp_path / "base", "llama 2", num_hidden_layers=8)))
    others = [*packed()]  # of tests before this one, kept here so that no place in memory is used again
    with as_processes(2, monkeypatch, base, False) as models:
        for model in models:
            held = storages(model)
            assert len(held) == 2 and len({*held.values()}) == 1
        new = {one.data_ptr(): one.nbytes() for one in packed()}
        sizes = {place: size for place, size in new.items() if place not in {one.data_ptr() for one in others}}
        layer = max(held.values())
        assert sorted(sizes.values()) == [layer // 2] * 16 + [layer] * 4


def test_each_process_reads_its_share_of_a_copy_only(tiny, copy_of, monkeypatch):
    copy, read = copy_of(tiny), [0]
    real = weights.Stored.read

    def counted(self: Any, places: Any) -> Iterator[bytes]:
        for found in real(self, places):
            read[0] += len(found) * (self.dtype == "U8" and len(self.shape) == 2)
            yield found

    monkeypatch.setattr(weights.Stored, "read", counted)
    stored = weights.stored_tensors(copy).values()
    packed = sum(one.num_values for one in stored if one.dtype == "U8" and len(one.shape) == 2)
    for count in (1, 4):
        read[0] = 0
        with as_processes(count, monkeypatch, copy, True) as models:
            assert len(models) == count and read[0] == packed > 40_000


@pytest.mark.parametrize("like", ["llama 3.2", "qwen3 with biases"])
def test_a_copy_written_weight_by_weight_is_the_one_of_a_whole_base(like, tmp_path, load, monkeypatch):
    monkeypatch.setattr(copies, "RESERVE_BYTES", 0)
    monkeypatch.setattr(copies, "FILE_BYTES", 20_000)
    base = find_base(str(save_base(tmp_path / "base", like)))
    load(base=base).save_pretrained(tmp_path / "whole")
    kept = Copies(str(tmp_path / "parts"))
    assert kept.keep(base, torch.float32, CPU).startswith("a 4-bit copy (")
    found = find_base(str(tmp_path / "whole")), kept.find(base, torch.float32, "cpu")
    whole, parts = (weights.stored_tensors(copy) for copy in found)
    assert {name: one.shape for name, one in whole.items()} == {name: one.shape for name, one in parts.items()}
    for name, one in whole.items():
        (expected,), (own,) = (stored.read([(0, stored.num_values)]) for stored in (one, parts[name]))
        assert own == expected, name
    assert len({one.file for one in parts.values()}) > 2
    assert found[0].config == found[1].config and fingerprint(found[1]) == fingerprint(base)
    ids = IDS % 500
    with torch.no_grad():
        assert torch.equal(load(base=found[1])(ids).logits, load(base=base)(ids).logits)
