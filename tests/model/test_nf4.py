"""Dequantisation in one kernel of a GPU: the bits of bitsandbytes, of every dtype, scale and shape."""

import pytest
import torch
from bitsandbytes import functional

from lit_qlora.model.decoder import weights_of

pytestmark = pytest.mark.gpu
SHAPES = [(4096, 11008), (576, 1536), (1000, 1032), (48, 40), (1, 8)]
"""The last three end within a block; the last has a single word."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block", [64, 128, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_are_those_of_bitsandbytes(shape, block, nested, dtype):
    from lit_qlora.model import nf4

    torch.manual_seed(5)
    weight = torch.randn(shape, device="cuda", dtype=dtype) * 0.02
    values, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=nested)
    assert nf4.can_dequantise(values, state)
    found = nf4.dequantise(values, state, state.offset.cpu() if nested else None)
    assert found.shape == shape
    assert torch.equal(found, functional.dequantize_4bit(values, state))


@pytest.mark.parametrize(("kind", "shape"), [("fp4", (64, 64)), ("nf4", (3, 4)), ("nf4", (7, 9))])
def test_other_four_bits_and_parts_of_a_word_are_left_to_bitsandbytes(kind, shape):
    from lit_qlora.model import nf4

    values, state = functional.quantize_4bit(torch.randn(shape, device="cuda"), quant_type=kind)
    assert not nf4.can_dequantise(values, state)


def test_values_that_begin_within_a_word_are_left_to_bitsandbytes():
    from lit_qlora.model import nf4

    values, state = functional.quantize_4bit(torch.randn(64, 64, device="cuda"), quant_type="nf4")
    shifted = torch.cat([values[:1], values])[1:]
    assert nf4.can_dequantise(values, state) and not nf4.can_dequantise(shifted, state)


@pytest.mark.parametrize("other", ["dtype of nested scales", "values apart", "scales apart"])
def test_states_made_elsewhere_are_left_to_bitsandbytes(other):
    from lit_qlora.model import nf4

    weight = torch.randn(64, 64, device="cuda")
    values, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert nf4.can_dequantise(values, state)
    if other == "dtype of nested scales":
        state.state2.dtype = torch.bfloat16
    elif other == "values apart":
        values = torch.cat([values, values], 1)[:, :1]
    else:
        state.absmax = torch.stack([state.absmax, state.absmax], 1)[:, 0]
    assert not nf4.can_dequantise(values, state)


@pytest.mark.parametrize(
    ("capability", "dtypes"), [((6, 0), []), ((7, 5), [torch.float16]), ((8, 0), [torch.float16, torch.bfloat16])]
)
def test_an_older_card_leaves_it_to_bitsandbytes(monkeypatch, capability, dtypes):
    from lit_qlora.model import nf4

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for dtype in (torch.float16, torch.bfloat16):
        weight = torch.randn(64, 64, device="cuda", dtype=dtype)
        assert nf4.can_dequantise(*functional.quantize_4bit(weight, quant_type="nf4")) == (dtype in dtypes)


def test_a_layer_with_compiled_kernels_takes_it(make_model, monkeypatch):
    model = make_model().to("cuda")
    expected = weights_of(model)[0].get(5, torch.float32)
    monkeypatch.setattr(functional, "dequantize_4bit", None)
    assert torch.equal(weights_of(model, compiles=True)[0].get(5, torch.float32), expected)
