"""Gradients of the arithmetic between products, against autograd in fp64, and compiled against eager."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lit_qlora.model.pointwise import EAGER, compiled, rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_the_norm_is_that_of_transformers():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        module = LlamaRMSNorm(16, 1e-5).to(dtype)
        module.weight.data.uniform_(0.5, 1.5)
        x = draw(2, 3, 16, dtype=dtype)
        assert torch.equal(rms_norm(x, module.weight, 1e-5)[0], module(x))


def test_the_gradient_of_the_norm():
    x, weight, grad, residual = draw(5, 16).requires_grad_(), draw(16, seed=1), draw(5, 16, seed=2), draw(5, 16, seed=3)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    (expected,) = torch.autograd.grad(x * scale * weight, x, grad)
    found = rms_norm_backward(grad, x.detach(), scale.detach(), weight, residual)
    torch.testing.assert_close(found, expected + residual, rtol=1e-6, atol=1e-6)  # it computes in fp32


def test_the_gradients_of_swiglu():
    gate, up, grad = draw(5, 8).requires_grad_(), draw(5, 8, seed=1).requires_grad_(), draw(5, 8, seed=2)
    inner = swiglu(gate, up)
    expected = torch.autograd.grad(inner, (gate, up), grad)
    *found, again = swiglu_backward(grad, gate.detach(), up.detach())
    torch.testing.assert_close(tuple(found), expected)
    assert torch.equal(again, inner)


def test_rotation_is_that_of_transformers_and_turns_back():
    x = draw(2, 5, 3, 8)
    angle = draw(1, 5, 4, seed=1).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    negated = torch.cat((-sin[..., :4], sin[..., 4:]), -1)
    fewer = draw(2, 5, 1, 8, seed=2)  # heads of keys may be fewer
    turned = rotate(x, fewer, cos, negated)
    expected = apply_rotary_pos_emb(x.transpose(1, 2), fewer.transpose(1, 2), cos, sin)
    for found, wanted in zip(turned, expected, strict=True):
        torch.testing.assert_close(found, wanted.transpose(1, 2))
    for found, wanted in zip(rotate(*turned, cos, -negated), (x, fewer), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.slow  # a compiler runs
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inside of torch's own compiler
@pytest.mark.filterwarnings(r"ignore:\s*Only use the public API")  # of jsonargparse: torch looks at every module
def test_compiled_is_eager_but_for_rounding_and_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    kernels = compiled()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (7, 9, 40):
            leaves = (draw(2, length, 16, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(3))
            x, other, grad = (leaf * 1 for leaf in leaves)  # as hidden states are: with a graph behind them
            weight = draw(16, dtype=torch.float32)
            calls = [
                ("rms_norm", (x, weight, 1e-5)),
                ("rms_norm_backward", (grad, x, rms_norm(x, weight, 1e-5)[1], weight, other)),
                ("swiglu", (x, other)),
                ("swiglu_backward", (grad, x, other)),
                ("rotate", (*(one.view(2, length, 2, 8) for one in (x, grad)), other[:1, :, :8], grad[:1, :, :8])),
            ]
            for name, args in calls:
                torch.testing.assert_close(getattr(kernels, name)(*args), getattr(EAGER, name)(*args))
