"""Owns the decoder layers in training: a Llama with LoRA in 4-bit, its gradients derived by hand.

transformers and peft hold the weights and define the arithmetic; here it is done with fewer tensors. A layer
keeps either its input alone, or what its matrix products and its attention gave, and nothing else: norms,
activations and dropout are computed again in backward, for they cost no matrix product. LoRA adds into the output
of the product it belongs to. Knows neither batches nor the loss.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lit_qlora.model.attention import Places, attend
from lit_qlora.model.pointwise import EAGER, Pointwise


class Linear(NamedTuple):
    """A linear layer in 4 bits, and how its LoRA acts if it has one: ``y = x W' + scaling · drop(x) A' B'``."""

    weight: Tensor
    state: Any
    scaling: float
    dropout: float
    has_lora: bool


class Layer(NamedTuple):
    """A decoder layer, taken apart. ``linears`` are q, k, v, o, gate, up, down; ``lora`` A and B of those with LoRA."""

    linears: tuple[Linear, ...]
    lora: tuple[Tensor, ...]
    norms: tuple[Tensor, Tensor]
    epsilon: float
    head_width: int
    pointwise: Pointwise


def why_not(model: Any) -> str | None:
    """What of ``model``, a Llama with LoRA in 4-bit, these layers can't compute; None where they can."""
    config = model.get_base_model().config
    if any(getattr(peft_config, "use_dora", False) for peft_config in model.peft_config.values()):
        return "DoRA"
    if config.hidden_act != "silu" or config.attention_bias or config.mlp_bias or config.attention_dropout:
        return "an activation, biases or an attention dropout that are not Llama 2's"
    return None


def take_apart(model: Any, pointwise: Pointwise = EAGER) -> list[Layer]:
    """The decoder layers of ``model``, a Llama with LoRA in 4-bit. Weights are shared with it, not copied.

    As it stands: dropout is of train mode only, and an adapter that is switched off has no part in them.
    """
    llama = model.get_base_model()
    return [_take_apart(layer, pointwise) for layer in llama.model.layers]


def _take_apart(layer: Any, pointwise: Pointwise) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    modules = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    modules += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    linears, lora = [], list[Tensor]()
    for module in modules:
        base = getattr(module, "base_layer", module)
        if base is module or module.disable_adapters:
            linears.append(Linear(base.weight, base.weight.quant_state, 0.0, 0.0, False))
            continue
        dropout = getattr(module.lora_dropout["default"], "p", 0.0) if module.training else 0.0
        linears.append(Linear(base.weight, base.weight.quant_state, module.scaling["default"], dropout, True))
        lora += [module.lora_A["default"].weight, module.lora_B["default"].weight]
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return Layer(
        tuple(linears),
        tuple(lora),
        (norms[0].weight, norms[1].weight),
        norms[0].variance_epsilon,
        attention.head_dim,
        pointwise,
    )


def run_layers(layers: Sequence[Layer], hidden: Tensor, places: Places, kept_layers: int) -> Tensor:
    """The hidden states ``[B, T, h]`` behind the layers.

    The last ``kept_layers`` of them keep what their matrix products gave, the others only their input: kept
    tensors of the last are gone when the first compute theirs again.
    """
    for index, layer in enumerate(layers):
        keeps = index >= len(layers) - kept_layers
        # Drawn here, on the host, so that dropout follows the seed and backward can draw the same again.
        seed = int(torch.randint(2**62, ())) if any(linear.dropout for linear in layer.linears) else 0
        # Dtypes are chosen by hand, so that backward, where autocast is off, computes the very same again.
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = _DecoderLayer.apply(hidden, places, layer, keeps, seed, *layer.lora)  # type: ignore[no-untyped-call]
    return hidden


class _Kept(NamedTuple):
    """What a layer's backward starts from: ``attended`` has a graph of its own, down to q, k and v."""

    heads: tuple[Tensor, Tensor, Tensor]
    attended: Tensor
    middle: Tensor
    gate: Tensor
    up: Tensor


class _DecoderLayer(torch.autograd.Function):
    """One decoder layer: hidden states and adapters in, hidden states out."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, places: Places, layer: Layer, keeps: bool, seed: int, *lora: Tensor
    ) -> Tensor:
        products = _Products(layer, hidden.dtype, seed)
        kept = _inner(hidden, places, layer, products, with_graph=keeps)
        out = products(6, layer.pointwise.swiglu(kept.gate, kept.up)).view_as(hidden).add_(kept.middle)
        ctx.places, ctx.layer, ctx.seed, ctx.kept = places, layer, seed, kept if keeps else None
        ctx.save_for_backward(hidden, *lora)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        hidden, layer, places = ctx.saved_tensors[0], ctx.layer, ctx.places
        products = _Products(layer, hidden.dtype, ctx.seed, remember=ctx.kept is None)
        kept, ctx.kept = ctx.kept or _inner(hidden, places, layer, products, with_graph=True), None
        (query, key, value), attended, middle, gate, up = kept
        del kept  # so that each tensor goes when it has served
        point, grad = layer.pointwise, grad.contiguous()
        # The feed-forward: out = middle + down(swiglu(gate, up)), of x = norm(middle).
        grad_inner = products.pull(6, grad, point.swiglu(gate, up))
        grad_gate, grad_up = point.swiglu_backward(grad_inner, gate, up)
        del grad_inner, gate, up
        x, scale = point.rms_norm(middle, layer.norms[1], layer.epsilon)
        grad_x = products.pull(4, grad_gate, x)
        products.pull(5, grad_up, x, into=grad_x)
        del grad_gate, grad_up
        grad = point.rms_norm_backward(grad_x.view_as(grad), middle, scale, layer.norms[1], grad)
        del middle
        # Attention: middle = hidden + o(attention(q, k, v)), of x = norm(hidden).
        grad_x = products.pull(3, grad, _merged(attended.detach()))
        grad_heads = grad_x.view(*hidden.shape[:2], -1, layer.head_width).transpose(1, 2)
        query, key, value = torch.autograd.grad(attended, (query, key, value), grad_heads)
        del attended, grad_heads
        query, key, value = (head.transpose(1, 2) for head in (query, key, value))
        query, key = (point.rotate(head, places.cos, -places.sin) for head in (query, key))
        x, scale = point.rms_norm(hidden, layer.norms[0], layer.epsilon)
        if not ctx.needs_input_grad[0]:  # the first layer: nothing below it learns
            for index, head in enumerate((query, key, value)):
                products.learn(index, head.flatten(2), x)
            return None, None, None, None, None, *products.gradients()
        grad_x = products.pull(0, query.flatten(2), x)
        products.pull(1, key.flatten(2), x, into=grad_x)
        products.pull(2, value.flatten(2), x, into=grad_x)
        grad = point.rms_norm_backward(grad_x.view_as(hidden), hidden, scale, layer.norms[0], grad)
        return grad, None, None, None, None, *products.gradients()


def _inner(hidden: Tensor, places: Places, layer: Layer, products: "_Products", with_graph: bool) -> _Kept:
    """A layer up to the input of its last product; ``with_graph``, attention can be gone back through."""
    point, shape = layer.pointwise, hidden.shape
    x, _ = point.rms_norm(hidden, layer.norms[0], layer.epsilon)
    query, key, value = (products(index, x).view(*shape[:2], -1, layer.head_width) for index in range(3))
    query, key = (point.rotate(head, places.cos, places.sin) for head in (query, key))
    query, key, value = (head.transpose(1, 2) for head in (query, key, value))
    with torch.set_grad_enabled(with_graph):
        heads = (query.requires_grad_(with_graph), key.requires_grad_(with_graph), value.requires_grad_(with_graph))
        attended = attend(*heads, places)
    middle = products(3, _merged(attended.detach())).view_as(hidden).add_(hidden)
    x, _ = point.rms_norm(middle, layer.norms[1], layer.epsilon)
    return _Kept(heads, attended, middle, products(4, x), products(5, x))


class _Products:
    """The matrix products of one layer, forward and backward; gathers the gradients of LoRA.

    Args:
        layer: whose products.
        dtype: of activations; adapters are fp32 and take part in this one.
        seed: of LoRA's dropout.
        remember: whether weights stay dequantised from a forward to the backward behind it.
    """

    def __init__(self, layer: Layer, dtype: torch.dtype, seed: int, remember: bool = False) -> None:
        self.layer, self.dtype, self.seed, self.remember = layer, dtype, seed, remember
        self.weights: dict[int, Tensor] = {}
        self.found: dict[int, tuple[Tensor, Tensor]] = {}
        num_before = 0
        self.lora: dict[int, tuple[Tensor, Tensor]] = {}
        for index, linear in enumerate(layer.linears):
            if linear.has_lora:
                pair = layer.lora[num_before : num_before + 2]
                self.lora[index] = (pair[0].to(dtype), pair[1].to(dtype))
                num_before += 2

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """``[N, out]`` for ``x`` of ``[..., in]``."""
        x = x.reshape(-1, x.shape[-1])
        weight = self._weight(index)
        if self.remember:
            self.weights[index] = weight
        y = functional.linear(x, weight)
        if index in self.lora:
            a, b = self.lora[index]
            y.addmm_(self._dropped(index, x) @ a.t(), b.t(), alpha=self.layer.linears[index].scaling)
        return y

    def pull(self, index: int, grad: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
        """From the gradient of a product's output to that of its input ``x``, added to ``into`` where given."""
        grad = grad.reshape(-1, grad.shape[-1])
        weight = self.weights.pop(index, None)
        weight = self._weight(index) if weight is None else weight
        into = torch.mm(grad, weight) if into is None else into.addmm_(grad, weight)
        if index in self.lora:
            grad_low, a = self.learn(index, grad, x), self.lora[index][0]
            if self.layer.linears[index].dropout:
                into += torch.mm(grad_low, a).mul_(self._mask(index, x.view_as(into)))
            else:
                into.addmm_(grad_low, a)
        return into

    def learn(self, index: int, grad: Tensor, x: Tensor) -> Tensor:
        """Gathers the gradients of a product's A and B; returns that of what lies between the two, ``[N, rank]``."""
        if index not in self.lora:
            return grad
        grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        (a, b), scaling = self.lora[index], self.layer.linears[index].scaling
        dropped = self._dropped(index, x)
        grad_low = torch.mm(grad, b).mul_(scaling)
        grad_b = torch.mm(grad.t(), dropped @ a.t()).float().mul_(scaling)
        self.found[index] = (torch.mm(grad_low.t(), dropped).float(), grad_b)
        return grad_low

    def gradients(self) -> list[Tensor]:
        """Of A and B of each linear layer that has LoRA, in order, in fp32."""
        return [grad for index in sorted(self.lora) for grad in self.found[index]]

    def _weight(self, index: int) -> Tensor:
        """Dequantised, ``[out, in]``."""
        from bitsandbytes.functional import dequantize_4bit

        linear = self.layer.linears[index]
        return dequantize_4bit(linear.weight, linear.state).to(self.dtype)

    def _dropped(self, index: int, x: Tensor) -> Tensor:
        return x * self._mask(index, x) if self.layer.linears[index].dropout else x

    def _mask(self, index: int, x: Tensor) -> Tensor:
        """What dropout multiplies by: the same each time, for one seed and one linear layer."""
        kept = 1 - self.layer.linears[index].dropout
        generator = torch.Generator(x.device).manual_seed(self.seed + index)
        return torch.empty_like(x).bernoulli_(kept, generator=generator).div_(kept)


def _merged(heads: Tensor) -> Tensor:
    """``[B, heads, T, width]`` to ``[B, T, heads · width]``."""
    return heads.transpose(1, 2).flatten(2)
