"""Dequantised weights that stay: the same bits, made once, where there is the memory."""

import pytest
import torch
from bitsandbytes import functional

from lit_qlora.devices.world import World
from lit_qlora.model import host, lora
from lit_qlora.model.attention import find_places
from lit_qlora.model.decoder import extract_layers, weights_of
from lit_qlora.model.lora import adapter_parameters
from lit_qlora.model.module import QLoRAModule
from tests.tiny_llama import run_layers

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def made(monkeypatch):
    """The shape of each weight that is dequantised."""
    seen, real = [], functional.dequantize_4bit

    def counted(values, state, *args, **kwargs):
        seen.append(tuple(state.shape))
        return real(values, state, *args, **kwargs)

    monkeypatch.setattr(functional, "dequantize_4bit", counted)
    return seen


def learned(model, layers, kept_layers, dtype, lengths=()):
    """The layers' output, and each gradient of LoRA."""
    torch.manual_seed(3)
    inner = model.get_base_model().model
    hidden = torch.randn(1 if lengths else 3, 24, 64).to(dtype)
    out = run_layers(layers, hidden, find_places(inner.rotary_emb, hidden, lengths), kept_layers)
    model.zero_grad()
    (out.float() ** 2).sum().backward()
    return out.detach(), {name: value.grad.clone() for name, value in adapter_parameters(model).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(), (7, 17)], ids=["padded", "packed"])
@pytest.mark.parametrize("kept_layers", [0, 1, 2])
def test_kept_weights_change_no_bit(make_model, made, dtype, lengths, kept_layers):
    model = make_model(dtype, dropout=0.1)
    expected = learned(model, extract_layers(model), kept_layers, dtype, lengths)
    for num_kept in (1, 2):
        weights = weights_of(model)
        for one in weights[:num_kept]:
            one.keep(dtype)
        made.clear()
        for _ in range(2):
            out, gradients = learned(model, extract_layers(model, weights=weights), kept_layers, dtype, lengths)
            assert torch.equal(out, expected[0])
            assert all(torch.equal(gradients[name], value) for name, value in expected[1].items())
        assert bool(made) == (num_kept == 1)  # each of the other layer's, and none where both keep


def test_weights_are_made_once_for_a_dtype_and_anew_for_another(make_model, made):
    weights = weights_of(make_model())[0]
    with torch.inference_mode():
        weights.keep(torch.float32)
    assert len(made) == 7
    kept = weights.get(5, torch.float32)
    assert kept is weights.get(5, torch.float32)
    assert not kept.is_inference()
    assert kept.shape == (172, 64)
    weights.keep(torch.float32)
    assert len(made) == 7
    assert torch.equal(weights.get(5, torch.bfloat16), kept.bfloat16())  # made for this once
    assert len(made) == 8
    weights.keep(torch.bfloat16)
    assert weights.get(5, torch.bfloat16) is weights.get(5, torch.bfloat16)
    assert len(made) == 15


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nested_scales_get_their_offset_from_the_host_and_change_no_bit(make_model, monkeypatch, device):
    model = make_model().to(device)
    weights, seen, real = weights_of(model)[0], [], functional.dequantize_4bit
    values, state, offset = weights.quantised[5]
    expected = real(values, state)
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args: seen.append(args[1].offset) or real(*args))
    assert torch.equal(weights.get(5, state.dtype), expected)
    assert offset.device.type == "cpu" and offset != 0
    assert seen[0] is offset
    # Answers read it on their own device.
    assert state.offset.device.type == device


@pytest.mark.parametrize(("free", "processes", "expected"), [(16_000, 1, 8_000), (16_000, 3, 2_666), (1, 1, 0)])
def test_half_of_the_hosts_free_memory_is_shared_by_its_processes(monkeypatch, free, processes, expected):
    monkeypatch.setattr(host, "memory_bytes", lambda: (10**10, free))
    monkeypatch.setattr(host, "world", lambda: World(0, processes, 0, processes))
    assert host.room_bytes() == expected


def test_a_host_of_unknown_memory_has_no_room(monkeypatch):
    monkeypatch.setattr(host, "memory_bytes", lambda: None)
    assert host.room_bytes() == 0


@pytest.mark.parametrize(("layers", "expected"), [(0, 0), (0.99, 0), (1, 1), (1.99, 1), (2, 2), (9, 2)])
def test_as_many_layers_stay_dequantised_on_a_cpu_as_the_host_has_room_for(tiny, monkeypatch, layers, expected):
    built = QLoRAModule(tiny.location)
    layer_bytes = 4 * tiny.shape.num_quantized // tiny.shape.num_layers
    monkeypatch.setattr(host, "room_bytes", lambda: int(layers * layer_bytes))
    built.configure_model()
    assert (built.dequantised_layers, tiny.shape.num_layers) == (expected, 2)


def test_on_another_device_nothing_is_chosen_by_the_hosts_room(tiny, monkeypatch):
    """While it is loaded, and Lightning has not moved it there yet."""
    add_lora = lora.add_lora

    def elsewhere(*args):
        model = add_lora(*args)
        model.get_base_model().model.embed_tokens.to("meta")
        return model

    monkeypatch.setattr(lora, "add_lora", elsewhere)
    monkeypatch.setattr(host, "room_bytes", lambda: 10**12)
    module = QLoRAModule(tiny.location)
    module.configure_model()
    assert module.device.type == "meta"
    assert (module.kept_layers, module.dequantised_layers) == (0, 0)
