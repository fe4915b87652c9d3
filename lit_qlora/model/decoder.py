"""Owns the decoder layers in training: a 4-bit base with LoRA, its gradients derived by hand.

transformers and peft hold the weights and define the arithmetic; here it is done with fewer tensors. A layer
keeps either its input alone, or the results of its matrix products and its attention, and nothing else: norms,
activations and dropout are computed again in backward, for they cost no matrix product. LoRA adds into the output
of the product it belongs to. Knows neither batches nor the loss.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lit_qlora.model.architectures import PLACES, Architecture, architecture_of
from lit_qlora.model.attention import Places, attend
from lit_qlora.model.config import SILU
from lit_qlora.model.dequantised import Quantised, Weights
from lit_qlora.model.offload import HostStore, Parked
from lit_qlora.model.pointwise import EAGER, Pointwise
from lit_qlora.model.shards import Shards

QKV, OUT, GATE_UP, DOWN = (0, 1, 2), (3,), (4, 5), (6,)
"""The linear layers of a decoder layer by number, grouped by the input that they read."""


class Linear(NamedTuple):
    """How a linear layer adds to its product, and its LoRA if it has one: ``x W' + bias + scaling · drop(x) A' B'``.

    Args:
        bias: ``[out]``; None without one.
        scaling: of LoRA, as peft has it.
        dropout: share of the inputs of LoRA that are dropped, from 0 to below 1.
        has_lora: False if the layer is left as it is.
    """

    bias: Tensor | None
    scaling: float
    dropout: float
    has_lora: bool


class Layer(NamedTuple):
    """The parts of a decoder layer.

    Args:
        linears: q, k, v, o, gate, up, down.
        weights: source of the dequantised weights of these, ``[out, in]``.
        lora: A ``[rank, in]`` and B ``[out, rank]`` of each with LoRA, in order.
        buffers: for 16-bit copies of these.
        norms: weights ``[h]`` of the norms before attention and before the MLP.
        head_norms: weights ``[head_width]`` of the norms of queries and keys, per head; None without such norms.
        epsilon: of all norms.
        head_width: of queries and keys.
        pointwise: the functions that are no products, compiled or not.
    """

    linears: tuple[Linear, ...]
    weights: Weights
    lora: tuple[Tensor, ...]
    buffers: "LoraBuffers"
    norms: tuple[Tensor, Tensor]
    head_norms: tuple[Tensor, Tensor] | None
    epsilon: float
    head_width: int
    pointwise: Pointwise


class LoraBuffers:
    """LoRA's weights of one layer in the dtype of activations: one set of buffers, refilled by each layer of its kind.

    The A of linear layers that read the same input form one matrix, for one product instead of three, unless dropout
    gives each its own input, or rank or scaling differ. The time of a step with a small batch is its number of kernels.

    Args:
        linears: of any of these layers: all have LoRA on the same linear layers, of the same ranks and scalings.
        lora: A and B of those that have it, in order.
    """

    def __init__(self, linears: Sequence[Linear], lora: Sequence[Tensor]) -> None:
        adapted = [index for index, linear in enumerate(linears) if linear.has_lora]
        self.shapes = {index: (lora[2 * at].shape, lora[2 * at + 1].shape) for at, index in enumerate(adapted)}
        self.parts: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        """Linear layers with LoRA in each of `QKV`, `OUT`, `GATE_UP` and `DOWN`, grouped if their A form one matrix."""
        for group in (QKV, OUT, GATE_UP, DOWN):
            alike: dict[Any, tuple[int, ...]] = {}
            for index in (index for index in group if index in self.shapes):
                kind = index if linears[index].dropout else (self.shapes[index][0], linears[index].scaling)
                alike[kind] = (*alike.get(kind, ()), index)
            self.parts[group] = [*alike.values()]
        self.a: dict[tuple[int, ...], Tensor] = {}
        self.b: dict[int, Tensor] = {}
        self._flat: list[Tensor] = []

    @torch.no_grad()
    def fill(self, lora: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Copy a layer's A and B into the buffers.

        Args:
            lora: A ``[rank, in]`` and B ``[out, rank]`` of each linear layer that has them, fp32, in order.
            dtype: of the buffers.
        """
        if not self._flat or self._flat[0].dtype != dtype:
            with torch.inference_mode(False):  # made while scoring, they must still serve in training
                self._allocate(lora[0], dtype)
        torch._foreach_copy_(self._flat, list(lora))

    def _allocate(self, like: Tensor, dtype: torch.dtype) -> None:
        first: dict[int, Tensor] = {}
        for part in (part for parts in self.parts.values() for part in parts):
            rank, width = self.shapes[part[0]][0]
            self.a[part] = torch.empty(len(part) * rank, width, dtype=dtype, device=like.device)
            first |= zip(part, self.a[part].split(rank), strict=True)
        self.b = {
            index: torch.empty(shapes[1], dtype=dtype, device=like.device) for index, shapes in self.shapes.items()
        }
        self._flat = [tensor for index in self.shapes for tensor in (first[index], self.b[index])]


def why_not_by_settings(config: Mapping[str, Any], own_layers: bool, dora: bool, lora_bias: bool) -> str | None:
    """What `why_not` will say of a model, as far as it is known before weights are loaded.

    Args:
        config: the base's config.json.
        own_layers: as ``model.own_layers``.
        dora: as ``model.dora``.
        lora_bias: True if the adapter to start from has LoRA with biases.
    """
    if not own_layers:
        return "model.own_layers is false"
    drops = any(value for name, value in config.items() if name.endswith("dropout"))
    if drops or config.get("hidden_act", "silu") not in SILU:
        return _OTHERWISE
    return _DORA if dora else _LORA_BIAS if lora_bias else None


def why_not(model: Any) -> str | None:
    """The reason why these layers can't compute ``model``, a 4-bit base with LoRA; None if they can.

    Decided by the modules that would compute it, not by their configurations. A sliding window is none of them: rows
    longer than that are refused (`Base.context_tokens`).
    """
    base_model = model.get_base_model()
    architecture = architecture_of(base_model.config.to_dict())
    found = (_why_not(layer, architecture) for layer in base_model.model.layers)
    return next((why for why in found if why), None)


def _why_not(layer: Any, architecture: Architecture) -> str | None:
    attention, mlp = layer.self_attn, layer.mlp
    parts = [layer, attention, mlp, layer.input_layernorm, layer.post_attention_layernorm]
    parts += [attention.q_norm, attention.k_norm] if architecture.has_head_norms else []
    own, of_attention, of_mlp, norm = architecture.layer_classes()
    if [type(part) for part in parts] != [own, of_attention, of_mlp, *[norm] * (len(parts) - 3)]:
        return f"layers that are not {architecture.prefix}'s"
    bases = [getattr(module, "base_layer", module) for module in _linears(layer)]
    drops = any(value for part in (attention, mlp) for name, value in vars(part).items() if name.endswith("dropout"))
    is_silu = torch.equal(mlp.act_fn(_PROBE), functional.silu(_PROBE))
    if not is_silu or drops:
        return _OTHERWISE
    if any(base.bias is not None and base.bias.requires_grad for base in bases):
        return "biases that are trained"
    if not all(hasattr(base.weight, "quant_state") for base in bases):
        return "layers that are not in 4 bits"
    return next((why for module in _linears(layer) if (why := _why_not_lora(module))), None)


def _why_not_lora(module: Any) -> str | None:
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import Linear4bit as Linear4bitWithLora

    if type(module) is Linear4bit:
        return None
    if type(module) is not Linear4bitWithLora or type(module.base_layer) is not Linear4bit:
        return f"layers of another kind ({type(module).__name__})"
    if len(module.lora_magnitude_vector):
        return _DORA
    if any(module.lora_bias.values()):
        return _LORA_BIAS
    parts = [*module.lora_A.values(), *module.lora_B.values()]
    is_plain = all(type(part) is torch.nn.Linear and part.bias is None for part in parts)
    if module.lora_variant or module.merged or [*module.lora_A] != ["default"] or not is_plain:
        return "LoRA of another kind"
    return None


_PROBE = torch.linspace(-3, 3, 7)
_OTHERWISE = "an activation or a dropout that is not Llama's"
_DORA, _LORA_BIAS = "DoRA", "LoRA with a bias (lora_bias)"


def weights_of(model: Any, shards: Shards | None = None, compiles: bool = False) -> list[Weights]:
    """The weights of each decoder layer of ``model``, a 4-bit base with LoRA; shared with it, not copied.

    Args:
        model: the 4-bit base with LoRA.
        shards: what brings them, where no device holds them all.
        compiles: as `Weights` has it.
    """
    layers = model.get_base_model().model.layers
    fetches = [partial(shards.open, at) if shards else None for at in range(len(layers))]
    pairs = zip(layers, fetches, strict=True)
    return [Weights([*map(_quantised, _linears(layer))], fetch, compiles) for layer, fetch in pairs]


def _quantised(module: Any) -> Quantised:
    base = getattr(module, "base_layer", module)
    # As a plain tensor: with bitsandbytes' own class, each call takes a detour through Python.
    state = base.weight.quant_state
    return Quantised(base.weight.detach().as_subclass(Tensor), state, state.offset.cpu() if state.nested else None)


def extract_layers(model: Any, pointwise: Pointwise = EAGER, weights: Sequence[Weights] | None = None) -> list[Layer]:
    """The decoder layers of ``model``, a 4-bit base with LoRA.

    Made for its current state: dropout is for train mode only, and a disabled adapter is left out.

    Args:
        model: the 4-bit base with LoRA.
        pointwise: what is computed between products.
        weights: what gives each layer its weights; default: `weights_of` the model.
    """
    buffers: dict[Any, LoraBuffers] = {}
    layers = model.get_base_model().model.layers
    pairs = zip(layers, weights or weights_of(model), strict=True)
    return [_extract_layer(layer, own, pointwise, buffers) for layer, own in pairs]


def _linears(layer: Any) -> list[Any]:
    return [layer.get_submodule(place) for place in PLACES.values()]


def _extract_layer(layer: Any, weights: Weights, pointwise: Pointwise, buffers: dict[Any, LoraBuffers]) -> Layer:
    """Layers whose LoRA is alike share one of ``buffers``."""
    linears, lora = [], list[Tensor]()
    for module in _linears(layer):
        base = getattr(module, "base_layer", module)
        bias = None if base.bias is None else base.bias.detach()
        if base is module or module.disable_adapters:
            linears.append(Linear(bias, 0.0, 0.0, False))
            continue
        dropout = getattr(module.lora_dropout["default"], "p", 0.0) if module.training else 0.0
        linears.append(Linear(bias, module.scaling["default"], dropout, True))
        lora += [module.lora_A["default"].weight, module.lora_B["default"].weight]
    kind = (*(linear[1:] for linear in linears), *(matrix.shape for matrix in lora))
    if kind not in buffers:
        buffers[kind] = LoraBuffers(linears, lora)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    attention = layer.self_attn
    return Layer(
        tuple(linears),
        weights,
        tuple(lora),
        buffers[kind],
        (norms[0].weight, norms[1].weight),
        (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None,
        norms[0].variance_epsilon,
        attention.head_dim,
        pointwise,
    )


class MicroBatch(NamedTuple):
    """A micro-batch before the layers.

    Args:
        hidden: ``[B, T, h]``.
        places: of its tokens.
        seeds: of dropout, one per layer.
        part: as of a `Batch`: what is dropped of a part is what would be dropped of it in the whole one.
    """

    hidden: Tensor
    places: Places
    seeds: tuple[int, ...]
    part: tuple[int, int] = (0, 0)


def draw_seeds(layers: Sequence[Layer]) -> tuple[int, ...]:
    """A seed of dropout for each of ``layers``, 0 for one without.

    Drawn on the host, so that dropout follows torch's seed and backward can repeat it.
    """
    return tuple(
        int(torch.randint(2**62, ())) if any(linear.dropout for linear in layer.linears) else 0 for layer in layers
    )


def run_together(
    layers: Sequence[Layer],
    micro_batches: Sequence[MicroBatch],
    kept_layers: int,
    store: HostStore | None = None,
    hosted_layers: int = 0,
    earlier: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """The hidden states ``[B, T, h]`` after the layers, of each of some micro-batches.

    All go through a layer before the next one, forward and backward, so that its weights are dequantised once for all
    of them; those of a shared base come once. Each has products of its own, and their gradients are added in order:
    what is learned is, to the last bit, what they would teach one by one.

    The last ``kept_layers`` of the layers keep the results of their matrix products, the others only their input: the
    kept tensors of the last are freed when the first recompute theirs. The first ``hosted_layers`` of those that keep
    them send their feed-forward's to ``store``: the way back is then longest. Without a backward, none keeps anything.

    Args:
        layers: all layers, in order.
        micro_batches: at least one.
        kept_layers: number of them.
        store: where a part of what is kept waits.
        hosted_layers: number of them.
        earlier: gradients of LoRA's weights, by their `id`, to which those of the first micro-batch are added, in a new
            tensor; read in backward.
    """
    if not torch.is_grad_enabled():
        kept_layers = 0
    first_kept = len(layers) - kept_layers
    hosted = range(first_kept, first_kept + hosted_layers) if store and kept_layers else range(0)
    if store:
        store.begin()
    earlier = {} if earlier is None else earlier  # an empty one may be filled by then
    places, parts = tuple(one.places for one in micro_batches), tuple(one.part for one in micro_batches)
    hidden = [one.hidden for one in micro_batches]
    # Dtypes are chosen by hand, so that backward, where autocast is off, recomputes the very same.
    with torch.autocast(hidden[0].device.type, enabled=False):
        for index, layer in enumerate(layers):
            seeds, sent_to = tuple(one.seeds[index] for one in micro_batches), store if index in hosted else None
            how = _How(layer, places, seeds, parts, index >= first_kept, sent_to, earlier)
            hidden = _DecoderLayer.apply(how, *hidden, *layer.lora)  # type: ignore[no-untyped-call]
            if store:
                store.settle(1 if sent_to else 0)
    return list(hidden)


class _How(NamedTuple):
    """How a layer computes: for micro-batches of which places, seeds and parts; whether it keeps, and where."""

    layer: Layer
    places: tuple[Places, ...]
    seeds: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    keeps: bool
    store: HostStore | None
    earlier: Mapping[int, Tensor]


class _Kept(NamedTuple):
    """The state from which a layer's backward starts: ``attended`` has a graph of its own, down to q, k and v.

    ``unnormed`` are q and k before their norms, where there are such.
    """

    heads: tuple[Tensor, Tensor, Tensor]
    unnormed: tuple[Tensor, ...]
    attended: Tensor
    feed_forward: tuple[Tensor, Tensor, Tensor] | Parked
    """The middle, gate and up; or where they wait."""
    lora_hidden: dict[tuple[int, ...], Tensor]
    """The hidden state between LoRA's A and B, ``[N, rank]`` per A."""


class _DecoderLayer(torch.autograd.Function):
    """One decoder layer: hidden states of each micro-batch and adapters in, hidden states out."""

    @staticmethod
    def forward(ctx: Any, how: _How, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(how.places)
        ctx.save_for_backward(*tensors)
        ctx.how = how
        ctx.kept = [None] * count
        if how.layer.weights.fetch:
            how.layer.weights.fetch(1)
        out = [*tensors[:count]]
        products = _Products(how.layer, out[0].dtype, holds=_holds(how))
        # The last first: the first is the first to go backward, and what waits on the host comes back in that order.
        for at in reversed(range(count)):
            products.begin(how.seeds[at], how.parts[at])
            out[at] = _forward(ctx, at, out[at], products)
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        how, count = ctx.how, len(grads)
        hidden, lora = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if how.layer.weights.fetch:
            how.layer.weights.fetch(-1)
        remembers = not (how.keeps or how.layer.weights.fetch)
        products = _Products(how.layer, hidden[0].dtype, remember=remembers, holds=_holds(how))
        passed, found = list[Tensor | None](), [how.earlier.get(id(weight)) for weight in lora]
        for at, grad in enumerate(grads):
            products.begin(how.seeds[at], how.parts[at])
            passed.append(_backward(ctx, at, hidden[at], grad, products))
            found = [
                own if sum_ is None else torch.add(sum_, own, out=sum_ if at else None)
                for sum_, own in zip(found, products.gradients(), strict=True)
            ]
        return None, *passed, *found


def _holds(how: _How) -> bool:
    """True if weights are dequantised once for all micro-batches. With a shared base, memory is short, and what takes
    time is that its layers come."""
    return len(how.places) > 1 and not how.layer.weights.fetch


def _forward(ctx: Any, at: int, hidden: Tensor, products: "_Products") -> Tensor:
    """A layer's output for micro-batch ``at`` of ``hidden``; what its backward starts from goes into ``ctx``."""
    how: _How = ctx.how
    layer, keeps = how.layer, how.keeps
    heads, unnormed, attended, middle = _attention(hidden, how.places[at], layer, products, with_graph=keeps)
    if not keeps:  # not held while the feed-forward is computed, which needs the most memory
        del heads, attended
    gate, up = _gate_and_up(middle, layer, products)
    if keeps:
        feed_forward = how.store.put((middle, gate, up)) if how.store else (middle, gate, up)
        ctx.kept[at] = _Kept(heads, unnormed, attended, feed_forward, products.lora_hidden)
        del feed_forward
    inner = layer.pointwise.swiglu(gate, up)
    del gate, up
    (out,) = products(DOWN, inner)
    return out.view_as(hidden).add_(middle)


def _backward(ctx: Any, at: int, hidden: Tensor, grad: Tensor, products: "_Products") -> Tensor | None:
    """The gradient of ``hidden``, of micro-batch ``at``; None where nothing below is trained. Collects LoRA's."""
    how: _How = ctx.how
    layer, places = how.layer, how.places[at]
    kept, ctx.kept[at] = ctx.kept[at] or _inner(hidden, places, layer, products), None
    heads, unnormed, attended, feed_forward, products.lora_hidden = kept
    if isinstance(feed_forward, Parked):
        assert how.store
        middle, gate, up = how.store.take(feed_forward)
    else:
        middle, gate, up = feed_forward
    del kept, feed_forward  # so that each tensor is freed after its last use
    point, grad = layer.pointwise, grad.contiguous()
    # The feed-forward: out = middle + down(swiglu(gate, up)), of x = norm(middle).
    grad_inner = products.input_grad(DOWN, [grad])
    *grad_gate_up, inner = point.swiglu_backward(grad_inner, gate, up)
    del grad_inner, gate, up
    products.weight_grad(DOWN, [grad], inner)
    del inner
    grad_x = products.input_grad(GATE_UP, grad_gate_up)
    x, scale = point.rms_norm(middle, layer.norms[1], layer.epsilon)
    products.weight_grad(GATE_UP, grad_gate_up, x)
    del grad_gate_up, x
    grad = point.rms_norm_backward(grad_x.view_as(grad), middle, scale, layer.norms[1], grad)
    del middle
    # Attention: middle = hidden + o(attention(q, k, v)), of x = norm(hidden).
    grad_x = products.input_grad(OUT, [grad])
    products.weight_grad(OUT, [grad], _merged(attended.detach()))
    grad_heads = grad_x.view(*hidden.shape[:2], -1, layer.head_width).transpose(1, 2)
    query, key, value = torch.autograd.grad(attended, heads, grad_heads)
    del attended, heads, grad_heads
    query, key, value = (head.transpose(1, 2) for head in (query, key, value))
    query, key = point.rotate(query, key, places.cos, -places.sin)
    if layer.head_norms:
        query, key = (
            _head_norm_backward(layer, index, head, unnormed[index]) for index, head in enumerate((query, key))
        )
    del unnormed
    x, scale = point.rms_norm(hidden, layer.norms[0], layer.epsilon)
    grad_qkv = [head.flatten(2) for head in (query, key, value)]
    below = products.input_grad(QKV, grad_qkv) if ctx.needs_input_grad[1] else None
    products.weight_grad(QKV, grad_qkv, x)
    if below is None:  # the first layer: nothing below it is trained
        return None
    del grad_qkv, x
    return point.rms_norm_backward(below.view_as(hidden), hidden, scale, layer.norms[0], grad)


def _inner(hidden: Tensor, places: Places, layer: Layer, products: "_Products") -> _Kept:
    """Compute a layer up to the input of its last product, for its backward."""
    heads, unnormed, attended, middle = _attention(hidden, places, layer, products, with_graph=True)
    gate, up = _gate_and_up(middle, layer, products)
    return _Kept(heads, unnormed, attended, (middle, gate, up), products.lora_hidden)


def _attention(
    hidden: Tensor, places: Places, layer: Layer, products: "_Products", with_graph: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...], Tensor, Tensor]:
    """q, k and v; q and k before their norms; the result of attention, and the middle.

    ``with_graph`` for a backward through all of it; without, nothing of before the norms is kept.
    """
    point, shape = layer.pointwise, hidden.shape
    x, _ = point.rms_norm(hidden, layer.norms[0], layer.epsilon)
    query, key, value = (product.view(*shape[:2], -1, layer.head_width) for product in products(QKV, x))
    del x
    unnormed: tuple[Tensor, ...] = ()
    if layer.head_norms:
        unnormed = (query, key) if with_graph else ()
        query, key = (_head_norm(layer, index, head)[0].view_as(head) for index, head in enumerate((query, key)))
    query, key = point.rotate(query, key, places.cos, places.sin)
    query, key, value = (head.transpose(1, 2) for head in (query, key, value))
    with torch.set_grad_enabled(with_graph):
        heads = (query.requires_grad_(with_graph), key.requires_grad_(with_graph), value.requires_grad_(with_graph))
        attended = attend(*heads, places)
    (middle,) = products(OUT, _merged(attended.detach()))
    return heads, unnormed, attended, middle.view_as(hidden).add_(hidden)


def _head_norm(layer: Layer, index: int, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Heads ``[B, T, heads, width]`` of queries (0) or keys (1) normed, ``[B, T · heads, width]``, and the scale."""
    assert layer.head_norms
    return layer.pointwise.rms_norm(heads.flatten(1, 2), layer.head_norms[index], layer.epsilon)


def _head_norm_backward(layer: Layer, index: int, grad: Tensor, heads: Tensor) -> Tensor:
    """The gradient of ``heads`` before the norm, from ``grad`` after it, ``[B, T, heads, width]`` each."""
    assert layer.head_norms
    _, scale = _head_norm(layer, index, heads)
    flat = layer.pointwise.rms_norm_backward(
        grad.flatten(1, 2), heads.flatten(1, 2), scale, layer.head_norms[index], None
    )
    return flat.view_as(heads)


def _gate_and_up(middle: Tensor, layer: Layer, products: "_Products") -> tuple[Tensor, Tensor]:
    x, _ = layer.pointwise.rms_norm(middle, layer.norms[1], layer.epsilon)
    gate, up = products(GATE_UP, x)
    return gate, up


class _Products:
    """The matrix products of one layer, forward and backward, of each micro-batch that `begin` turns to; collects the
    gradients of LoRA.

    Args:
        layer: the layer that they belong to.
        dtype: of activations; adapters are fp32 and take part in this one.
        remember: True to keep weights dequantised from a forward to the backward after it.
        holds: True to keep them from one micro-batch to the next.
    """

    def __init__(self, layer: Layer, dtype: torch.dtype, remember: bool = False, holds: bool = False) -> None:
        self.layer, self.dtype, self.remember, self.holds = layer, dtype, remember, holds
        self.buffers = layer.buffers
        if layer.lora:
            self.buffers.fill(layer.lora, dtype)
        self.weights: dict[int, Tensor] = {}

    def begin(self, seed: int, part: tuple[int, int] = (0, 0)) -> None:
        """Turn to a micro-batch, with the seed of its dropout."""
        self.seed, self.part = seed, part
        self.lora_hidden: dict[tuple[int, ...], Tensor] = {}
        self.grad_lora_hidden: dict[tuple[int, ...], Tensor] = {}
        self.grad_a: dict[int, Tensor] = {}
        self.grad_b: dict[int, Tensor] = {}

    def __call__(self, group: tuple[int, ...], x: Tensor) -> list[Tensor]:
        """``[N, out]`` of each linear layer of ``group``, for ``x`` of ``[..., in]``."""
        x = x.reshape(-1, x.shape[-1])
        found = {}
        for index in group:
            bias = self.layer.linears[index].bias
            weight = self._weight(index, again=self.remember)
            found[index] = functional.linear(x, weight, None if bias is None else bias.to(self.dtype))
        for part in self.buffers.parts[group]:
            for index, lora_hidden in self._columns(part, self._lora_hidden(part, x)):
                scaling = self.layer.linears[index].scaling
                found[index].addmm_(lora_hidden, self.buffers.b[index].t(), alpha=scaling)
        return list(found.values())

    def input_grad(self, group: tuple[int, ...], grads: Sequence[Tensor]) -> Tensor:
        """Returns the gradient of the input, ``[N, in]``, from those of the products."""
        into: Tensor | None = None
        flat = _flat(group, grads)
        for index, grad in flat.items():
            weight = self._weight(index, again=False)
            into = torch.mm(grad, weight) if into is None else into.addmm_(grad, weight)
        assert into is not None
        for part in self.buffers.parts[group]:
            grad_lora_hidden = self._grad_lora_hidden(part, flat)
            if self.layer.linears[part[0]].dropout:
                into += torch.mm(grad_lora_hidden, self.buffers.a[part]).mul_(self._mask(part[0], into))
            else:
                into.addmm_(grad_lora_hidden, self.buffers.a[part])
        return into

    def weight_grad(self, group: tuple[int, ...], grads: Sequence[Tensor], x: Tensor) -> None:
        """Collects the gradients of A and B, from the input ``x`` of ``[..., in]`` and the gradients of the products.

        After `input_grad`, where that is needed, too: what the two share is kept until then.
        """
        x = x.reshape(-1, x.shape[-1])
        flat = _flat(group, grads)
        for part in self.buffers.parts[group]:
            lora_hidden, grad_lora_hidden = self._lora_hidden(part, x), self._grad_lora_hidden(part, flat)
            del self.lora_hidden[part], self.grad_lora_hidden[part]
            for index, own in self._columns(part, lora_hidden):
                self.grad_b[index] = _wide_product(flat[index].t(), own, self.layer.linears[index].scaling)
            self.grad_a |= self._rows(part, _wide_product(grad_lora_hidden.t(), self._dropped(part[0], x)))

    def gradients(self) -> list[Tensor]:
        """Returns the fp32 gradients of every LoRA A and B, in layer order."""
        return [grads[index] for index in self.buffers.shapes for grads in (self.grad_a, self.grad_b)]

    def _lora_hidden(self, part: tuple[int, ...], x: Tensor) -> Tensor:
        """The LoRA hidden states of the linear layers of ``part``, ``[N, rank]`` each, side by side; computed once."""
        if part not in self.lora_hidden:
            self.lora_hidden[part] = self._dropped(part[0], x) @ self.buffers.a[part].t()
        return self.lora_hidden[part]

    def _grad_lora_hidden(self, part: tuple[int, ...], grads: dict[int, Tensor]) -> Tensor:
        """The gradients of `_lora_hidden`, from those of the products; computed once."""
        if part not in self.grad_lora_hidden:
            like, scaling = grads[part[0]], self.layer.linears[part[0]].scaling
            found = like.new_empty(len(like), self.buffers.a[part].shape[0])
            for index, own in self._columns(part, found):
                torch.mm(grads[index], self.buffers.b[index], out=own)
            self.grad_lora_hidden[part] = found if scaling == 1 else found.mul_(scaling)
        return self.grad_lora_hidden[part]

    def _columns(self, part: tuple[int, ...], lora_hidden: Tensor) -> list[tuple[int, Tensor]]:
        rank = lora_hidden.shape[1] // len(part)
        return list(zip(part, lora_hidden.split(rank, 1) if len(part) > 1 else (lora_hidden,), strict=True))

    def _rows(self, part: tuple[int, ...], grad_a: Tensor) -> dict[int, Tensor]:
        return dict(zip(part, grad_a.split(len(grad_a) // len(part)), strict=True))

    def _weight(self, index: int, again: bool) -> Tensor:
        """The dequantised weight, ``[out, in]``; remembered if this micro-batch needs it ``again``."""
        weight = self.weights.pop(index, None)
        if weight is None:
            weight = self.layer.weights.get(index, self.dtype)
        if again or self.holds:
            self.weights[index] = weight
        return weight

    def _dropped(self, index: int, x: Tensor) -> Tensor:
        return x * self._mask(index, x) if self.layer.linears[index].dropout else x

    def _mask(self, index: int, x: Tensor) -> Tensor:
        """The factors of dropout, always the same for one seed and one linear layer."""
        kept = 1 - self.layer.linears[index].dropout
        generator = torch.Generator(x.device).manual_seed(self.seed + index)
        start, size = self.part
        mask = torch.empty_like(x) if not size else x.new_empty(size, x.shape[1])
        return mask.bernoulli_(kept, generator=generator)[start : start + len(x)].div_(kept)


def _flat(group: tuple[int, ...], grads: Sequence[Tensor]) -> dict[int, Tensor]:
    return {index: grad.reshape(-1, grad.shape[-1]) for index, grad in zip(group, grads, strict=True)}


def _wide_product(left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """``scaling · left right`` in fp32; on a GPU without an intermediate in 16 bits."""
    wide = left.is_cuda and left.dtype != torch.float32
    product = torch.mm(left, right, out_dtype=torch.float32) if wide else torch.mm(left, right).float()
    return product if scaling == 1 else product.mul_(scaling)


def _merged(heads: Tensor) -> Tensor:
    """``[B, heads, T, width]`` to ``[B, T, heads · width]``."""
    return heads.transpose(1, 2).flatten(2)
