"""Activations on the host: the same bits, really away in between, and one micro-batch's after the other."""

import gc
import mmap
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lit_qlora.data.batching import collate
from lit_qlora.errors import UserError
from lit_qlora.forecast import memory
from lit_qlora.model import offload
from lit_qlora.model.attention import find_places
from lit_qlora.model.base import find_base
from lit_qlora.model.decoder import MicroBatch, draw_seeds, extract_layers, run_together
from lit_qlora.model.load import load_base
from lit_qlora.model.lora import Lora, adapter_parameters, add_lora
from lit_qlora.model.module import QLoRAModule
from lit_qlora.model.offload import HostStore, _on_own_pages
from lit_qlora.model.shape import Shape

ROWS, TOKENS = 2, 12


def run(layers, hidden, places, kept_layers, store, hosted_layers):
    return run_together(layers, [MicroBatch(hidden, places, draw_seeds(layers))], kept_layers, store, hosted_layers)[0]


def hidden_and_gradients(model, store=None, hosted_layers=0, kept_layers=2, lengths=(), tokens=TOKENS):
    torch.manual_seed(3)
    inner = model.get_base_model().model
    ids = torch.randint(3, 512, (1, sum(lengths)) if lengths else (ROWS, tokens))
    hidden = inner.embed_tokens(ids.to(model.device))
    places = find_places(inner.rotary_emb, hidden, lengths)
    model.zero_grad()
    hidden = run(extract_layers(model), hidden, places, kept_layers, store, hosted_layers)
    hidden.square().sum().backward()
    return hidden.detach(), {name: value.grad.clone() for name, value in adapter_parameters(model).items()}


def assert_same_bits(found, wanted):
    assert torch.equal(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])


@pytest.mark.parametrize("lengths", [(), (7, 5)])
@pytest.mark.parametrize("lora", [{}, {"dropout": 0.3}])
@pytest.mark.parametrize(("kept", "hosted"), [(1, 1), (2, 1), (2, 2)])
def test_hosted_layers_give_the_same_bits(make_model, lora, kept, hosted, lengths):
    model, store = make_model(**lora), HostStore()
    wanted = hidden_and_gradients(model, lengths=lengths)
    for _ in range(2):  # the second time with buffers that are there
        assert_same_bits(hidden_and_gradients(model, store, hosted, kept, lengths), wanted)


def test_the_lowest_kept_layers_are_sent_and_leave(make_model, monkeypatch):
    model, sent, real = make_model(), [], HostStore.put

    def put(self, tensors):
        sent.append([StorageWeakRef(tensor.untyped_storage()) for tensor in tensors])
        return real(self, tensors)

    monkeypatch.setattr(HostStore, "put", put)
    inner, store = model.get_base_model().model, HostStore()
    hidden = inner.embed_tokens(torch.randint(3, 512, (ROWS, TOKENS)))
    layers, places = extract_layers(model), find_places(inner.rotary_emb, hidden, ())
    out = run(layers, hidden, places, 2, store, 1)
    assert len(sent) == 1 and all(reference.expired() for reference in sent[0])  # the residual, gate and up
    assert [tensor.numel() for tensor in store._buffers] == [ROWS * TOKENS * (64 + 2 * 172)]
    out.sum().backward()


def test_what_is_sent_is_what_the_forecast_counts(make_model):
    shape_step = memory.Step(
        Shape.of({
            "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "vocab_size": 512,
            "num_attention_heads": 4, "num_key_value_heads": 4,
        }), tokens=ROWS * TOKENS, scored_tokens=1, kept_layers=2, hosted_layers=2, element=4,
    )  # fmt: skip
    store = HostStore()
    hidden_and_gradients(make_model(), store, 2)
    assert sum(buffer.nbytes for buffer in store._buffers) == memory.host_bytes(shape_step)
    store.close()
    assert store._buffers == []


def test_an_abandoned_forward_leaves_nothing_behind(make_model):
    model, store = make_model(), HostStore()
    wanted = hidden_and_gradients(model)
    inner = model.get_base_model().model
    hidden = inner.embed_tokens(torch.randint(3, 512, (1, 5)))
    run(extract_layers(model), hidden, find_places(inner.rotary_emb, hidden, ()), 2, store, 2)
    assert_same_bits(hidden_and_gradients(model, store, 2), wanted)
    assert len(store._buffers) == 2


def test_without_a_backward_nothing_is_sent(make_model):
    model, store = make_model(), HostStore()
    inner = model.get_base_model().model
    hidden = inner.embed_tokens(torch.randint(3, 512, (1, 5)))
    with torch.no_grad():
        run(extract_layers(model), hidden, find_places(inner.rotary_emb, hidden, ()), 2, store, 2)
    assert store._buffers == []


def test_a_module_sends_while_it_learns_and_not_while_it_scores(make_model, tiny):
    module = QLoRAModule(tiny.location, rank=4, alpha=8.0)
    module.model, module.kept_layers, module.hosted_layers = make_model(), 2, 1
    batch = collate([(0, {"input_ids": [*range(5, 17)], "labels": [*range(5, 17)]})], 11)
    module.train().summed_loss(batch)[0].backward()
    assert len(module._host_store._buffers) == 1
    module.release()
    module.eval()
    with torch.no_grad():
        module.summed_loss(batch)
    assert module._host_store._buffers == []
    module._recompute()
    assert (module.kept_layers, module.hosted_layers) == (0, 0)


# On a GPU: page-locked, beside the computation


@pytest.fixture
def deterministic(monkeypatch):
    """Attention's backward, too."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_on_a_gpu_hosted_layers_give_the_same_bits(wide_folder):
    model = load_base(find_base(str(wide_folder)), torch.float16, torch.device("cuda"), "sdpa")
    model = add_lora(model, Lora(4, 8.0, 0.0, "all-linear", False, False)).train()
    num_layers = len(model.get_base_model().model.layers)
    run = partial(hidden_and_gradients, model, kept_layers=num_layers, tokens=500)
    store, wanted = HostStore(), run()
    assert_same_bits(run(), wanted)
    for _ in range(3):
        assert_same_bits(run(store, num_layers), wanted)
    assert store._buffers and all(buffer.is_pinned() for buffer in store._buffers)
    assert offload.copy_gb_per_s(2**24) > 0.1
    store.close()


def test_page_locked_buffers_are_whole_pages_of_their_own():
    buffers = [_on_own_pages(size, dtype) for size in (0, 1, 5, 4096, 5000) for dtype in (torch.uint8, torch.float16)]
    starts = [one.untyped_storage().data_ptr() for one in buffers]
    lengths = [one.untyped_storage().nbytes() for one in buffers]
    ends = sorted(start + length for start, length in zip(starts, lengths, strict=True))
    assert all(start >= end for start, end in zip(sorted(starts)[1:], ends, strict=False))
    assert [start % mmap.PAGESIZE for start in starts] == [0] * 10
    assert [length / mmap.PAGESIZE for length in lengths] == [1, 1, 1, 1, 1, 1, 1, 2, 2, 3]
    assert [len(one) for one in buffers] == [0, 0, 1, 1, 5, 5, 4096, 4096, 5000, 5000]
    for number, one in enumerate(buffers):
        one.fill_(number)
    assert all((one == number).all() for number, one in enumerate(buffers))


ON_CARD = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cpu"))


def runtime(monkeypatch, status):
    """CUDA's calls from now on; it locks nothing."""
    calls = []

    def note(name, gives):
        return lambda *args: calls.append((name, *args)) or gives

    made = SimpleNamespace(
        cudaError=SimpleNamespace(success=0),
        cudaHostRegister=note("register", status),
        cudaHostUnregister=note("unregister", 0),
        cudaGetErrorString=lambda status: f"error {status}",
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "check_error", lambda status: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return calls


def test_whole_pages_are_locked_and_unlocked_when_their_owner_is_gone(monkeypatch):
    calls, store = runtime(monkeypatch, 0), HostStore()
    for size in (3000, 5):
        store._buffers.append(offload.locked(size, ON_CARD))
    starts = [one.data_ptr() for one in store._buffers]
    assert calls == [("register", starts[0], 2 * mmap.PAGESIZE, 0), ("register", starts[1], mmap.PAGESIZE, 0)]
    del calls[:], store
    gc.collect()
    assert calls == [("unregister", start) for start in starts]


def test_a_part_of_a_locked_buffer_unlocks_it_once_and_others_are_left_alone(monkeypatch):
    calls, buffer = runtime(monkeypatch, 0), offload.locked(3000, ON_CARD)
    start = buffer.data_ptr()
    offload.unlock(torch.empty(10), torch.empty(0), buffer[1000:], buffer)
    assert calls == [("register", start, 2 * mmap.PAGESIZE, 0), ("unregister", start)]


def test_memory_that_cannot_be_locked_is_one_line(monkeypatch):
    runtime(monkeypatch, 1)
    with pytest.raises(UserError, match=r"^4\.1 kB .* page-locked: CUDA says 'error 1'; .*--model\.offload false"):
        offload.locked(5, ON_CARD)

    def full(*args):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(offload.mmap, "mmap", full)
    with pytest.raises(UserError, match=r"^10\.0 MB .* had: Cannot allocate memory; "):
        offload.locked(5_000_000, ON_CARD)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 256, 4096, 5000, 70_000, 3_000_000])
def test_on_a_gpu_many_buffers_of_any_size_are_locked_and_freed_in_any_order(size):
    """Each is really locked, copied both ways, and what comes to lie in its place can be locked again."""
    like = torch.empty(0, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        buffers = [offload.locked(size, like) for _ in range(40)]
        assert all(one.is_pinned() for one in buffers)
        for number, one in enumerate(buffers):
            one.copy_(torch.full((size,), number, dtype=torch.uint8, device="cuda"), non_blocking=True)
        back = [one.to("cuda", non_blocking=True) for one in buffers]
        assert all((one == number).all() for number, one in enumerate(back))
        for one in [*buffers[1::2], *buffers[::2]]:
            offload.unlock(one)
        assert not any(one.is_pinned() for one in buffers)


@pytest.mark.gpu
def test_on_a_gpu_nothing_stays_locked_where_a_rate_was_measured():
    """What is mapped there next would be copied to the card from the pages of then."""
    offload.copy_gb_per_s(2**24)
    assert not offload._locked
    for _ in range(8):
        pages = torch.frombuffer(mmap.mmap(-1, 2**24), dtype=torch.uint8)
        assert not pages.is_pinned()
        assert (pages.fill_(7).to("cuda") == 7).all()
