"""The layers in training against transformers' and peft's own: outputs, gradients, what is kept, what runs twice."""

from itertools import accumulate

import bitsandbytes
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_qlora.data.batching import collate
from lit_qlora.model import decoder
from lit_qlora.model.attention import find_places
from lit_qlora.model.base import find_base
from lit_qlora.model.decoder import extract_layers, why_not
from lit_qlora.model.load import load_base
from lit_qlora.model.lora import Lora, adapter_parameters, add_lora
from lit_qlora.model.module import QLoRAModule
from lit_qlora.model.pointwise import EAGER, compiled
from tests.tiny_llama import run_layers

B, T = 2, 12


def plain(model, ids):
    return model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state


def ours(model, ids, kept_layers=2, pointwise=EAGER):
    inner = model.get_base_model().model
    hidden = inner.embed_tokens(ids)
    places = find_places(inner.rotary_emb, hidden, ())
    return inner.norm(run_layers(extract_layers(model, pointwise), hidden, places, kept_layers))


def forward_and_gradients(run, model, seed=2, **options):
    torch.manual_seed(seed)
    ids = torch.randint(3, 512, (B, T))
    model.zero_grad()
    hidden = run(model, ids, **options)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return hidden.detach(), {name: value.grad.clone() for name, value in adapter_parameters(model).items()}


INPUTS = range(2, 18)
"""Seeds of the batches that errors are summed over: of a single batch, either side's rounding is a matter of luck."""


def relative_errors(found, truth):
    """How far gradients are from the true ones, each relative to its norm, summed up."""
    assert found.keys() == truth.keys()
    return sum(((found[name] - truth[name]).norm() / truth[name].norm()).item() for name in truth)


def in_fp64(model):
    """``model`` with its 4-bit weights as they are, and all arithmetic in fp64."""
    for module in list(model.modules()):
        if isinstance(base := getattr(module, "base_layer", None), bitsandbytes.nn.Linear4bit):
            module.base_layer = torch.nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            module.base_layer.bias = base.bias
            module.base_layer.weight.data = bitsandbytes.functional.dequantize_4bit(
                base.weight, base.weight.quant_state
            )
    return model.double()


@pytest.mark.parametrize("lora", [
    {}, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["down_proj", "o_proj"]},
    {"rslora": True, "alpha": 3.0}, {"rank": 1},
])  # fmt: skip
def test_outputs_and_gradients_are_those_of_transformers_and_peft(make_model, lora):
    """Both round: gradients are compared with fp64 on the same 4-bit weights, and ours are no further from it."""
    exact, model = in_fp64(make_model(**lora)), make_model(**lora)
    errors = {plain: 0.0, ours: 0.0}
    for seed in INPUTS:
        hidden, truth = forward_and_gradients(plain, exact, seed)
        assert all(value.norm() > 0 for value in truth.values())
        for run in errors:
            found_hidden, found = forward_and_gradients(run, model, seed)
            torch.testing.assert_close(found_hidden.double(), hidden, rtol=1e-5, atol=1e-5)
            errors[run] += relative_errors(found, truth)
    assert 0 < errors[ours] < 1.1 * errors[plain]


def test_in_bf16_the_gradients_are_as_near_to_the_truth_as_pefts(make_model):
    """The truth is fp32 on the same 4-bit weights."""
    exact, model = make_model(), make_model(torch.bfloat16)
    errors = {plain: 0.0, ours: 0.0}
    for seed in INPUTS:
        truth = forward_and_gradients(plain, exact, seed)[1]
        for run in errors:
            with torch.autocast("cpu", torch.bfloat16):
                found = forward_and_gradients(run, model, seed)[1]
            errors[run] += relative_errors(found, truth)
    assert 0 < errors[ours] < 1.05 * errors[plain]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_bit_equal_however_many_layers_keep(make_model, dtype, dropout):
    model = make_model(dtype, dropout=dropout)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = [forward_and_gradients(ours, model, kept_layers=kept) for kept in (0, 1, 2)]
    for hidden, gradients in found[1:]:
        assert torch.equal(hidden, found[0][0])
        assert all(torch.equal(gradients[name], found[0][1][name]) for name in gradients)
        assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_the_last_layers_keep_and_the_others_keep_their_input_only(make_model):
    model = make_model()
    inner = model.get_base_model().model
    hidden = inner.embed_tokens(torch.randint(3, 512, (B, T)))
    places = find_places(inner.rotary_emb, hidden, ())
    out = run_layers(extract_layers(model), hidden, places, kept_layers=1)
    last = out.grad_fn  # in torch 2.11, for as long as its tensor is there
    first = last.next_functions[0][0]
    assert first.kept == [None]
    assert [tuple(tensor.shape) for tensor in first.saved_tensors[:1]] == [(B, T, 64)]
    assert {id(tensor) for tensor in first.saved_tensors[1:]} == {id(value) for value in extract_layers(model)[0].lora}
    # 12h + 4I in 16 bits is 6h + 2I values per token; here keys and values have half of the heads.
    (kept,) = last.kept
    values = sum(tensor.numel() for tensor in (*kept.heads, kept.attended, *kept.feed_forward))
    assert values == B * T * (64 + 32 + 32 + 64 + 64 + 2 * 172)
    ranks = {part: hidden.shape[1] for part, hidden in kept.lora_hidden.items()}
    assert ranks == {(0, 1, 2): 12, (3,): 4, (4, 5): 8, (6,): 4}


@pytest.fixture
def dequantised(monkeypatch):
    """The shape of each weight that is dequantised, which goes before each matrix product with it."""
    from bitsandbytes import functional

    seen, real = [], functional.dequantize_4bit

    def counted(weight, state, *args, **kwargs):
        seen.append(tuple(state.shape))
        return real(weight, state, *args, **kwargs)

    monkeypatch.setattr(functional, "dequantize_4bit", counted)
    return seen


@pytest.mark.parametrize(("kept_layers", "expected"), [(2, 14 + 11), (1, 14 + 7 + 7), (0, 14 + 7 + 7)])
def test_no_weight_is_dequantised_twice_in_a_pass(make_model, dequantised, kept_layers, expected):
    """Seven in each layer forward and seven backward, the recomputed ones included; less q, k, v of the first."""
    forward_and_gradients(ours, make_model(), kept_layers=kept_layers)
    assert len(dequantised) == expected


def test_a_kept_layer_multiplies_nothing_twice(make_model, monkeypatch):
    calls = []
    real = decoder._Products.__call__
    monkeypatch.setattr(
        decoder._Products, "__call__", lambda self, group, x: calls.extend(group) or real(self, group, x)
    )
    model = make_model()
    forward_and_gradients(ours, model, kept_layers=2)
    assert calls == [0, 1, 2, 3, 4, 5, 6] * 2
    calls.clear()
    forward_and_gradients(ours, model, kept_layers=0)
    assert calls == [0, 1, 2, 3, 4, 5, 6] * 2 + [0, 1, 2, 3, 4, 5] * 2  # the last product is not needed again


@pytest.mark.parametrize("kept_layers", [0, 2])
def test_the_activation_is_computed_once_in_backward(make_model, kept_layers):
    """The activation's result, which LoRA's gradient needs, comes with its gradients."""
    calls = []
    point = EAGER._replace(
        swiglu=lambda *args: calls.append("forward") or EAGER.swiglu(*args),
        swiglu_backward=lambda *args: calls.append("backward") or EAGER.swiglu_backward(*args),
    )
    forward_and_gradients(ours, make_model(), kept_layers=kept_layers, pointwise=point)
    assert calls == ["forward"] * 2 + ["backward"] * 2


def test_dropout_follows_the_seed_and_drops_the_share_that_was_asked_for(make_model):
    model = make_model(dropout=0.25)
    first, second = (forward_and_gradients(ours, model)[0] for _ in range(2))
    assert torch.equal(first, second)
    ids = torch.randint(3, 512, (B, T))
    assert not torch.equal(ours(model, ids), ours(model, ids))  # another draw each time
    products = decoder._Products(extract_layers(model)[0], torch.float32)
    products.begin(7)
    mask = products._mask(0, torch.empty(400, 500))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (mask == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(mask, products._mask(1, torch.empty(400, 500)))


def test_out_of_train_mode_nothing_is_dropped(make_model):
    model = make_model(dropout=0.5).eval()
    ids = torch.randint(3, 512, (B, T))
    with torch.no_grad():
        torch.testing.assert_close(ours(model, ids), plain(model, ids), rtol=1e-5, atol=1e-5)


def test_an_adapter_that_is_switched_off_has_no_part(make_model):
    model = make_model()
    ids = torch.randint(3, 512, (B, T))
    with torch.no_grad(), model.disable_adapter():
        without = ours(model, ids)
        torch.testing.assert_close(without, plain(model, ids), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(without, ours(model, ids), atol=1e-2)


def test_without_gradients_nothing_is_kept(make_model):
    model = make_model()
    ids = torch.randint(3, 512, (B, T))
    with torch.no_grad():
        hidden = ours(model, ids)
    assert hidden.grad_fn is None
    torch.testing.assert_close(hidden, ours(model, ids), rtol=0, atol=0)
    with torch.inference_mode():
        assert torch.equal(ours(model, ids), hidden)


class Peak(TorchDispatchMode):
    """The most values that tensors made meanwhile held at any moment, storages counted once, but for ``given``'s."""

    def __init__(self, given):
        super().__init__()
        self.given, self.made, self.most = given.untyped_storage()._cdata, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata != self.given:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() // 4)
        self.made = {key: (storage, size) for key, (storage, size) in self.made.items() if not storage.expired()}
        self.most = max(self.most, sum(size for _, size in self.made.values()))
        return out


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kept_layers", [0, 2])
def test_without_gradients_no_inner_result_outlives_its_use(make_model, without, kept_layers):
    model, rows = make_model(), 40
    inner = model.get_base_model().model
    hidden = inner.embed_tokens(torch.randint(3, 512, (rows, T)))
    layers, places = extract_layers(model), find_places(inner.rotary_emb, hidden, ())
    with without(), Peak(hidden) as peak:
        run_layers(layers, hidden, places, kept_layers)
    # Where it needs the most, at the gated activation: a layer's input and middle; gate, up and two on the way to their
    # product; what lies between A and B; and A and B themselves in the dtype of activations.
    between, adapter = (3 + 1 + 2 + 1) * 4, sum(matrix.numel() for matrix in layers[0].lora)
    tables = rows * T * 8  # NF4's, of which there are few: the smallest tensor of all tokens has 32 values each
    assert rows * T * (64 + 4 * 172) < peak.most <= rows * T * (64 + 64 + 4 * 172 + between) + adapter + tables


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda attention, mlp: setattr(mlp.up_proj.base_layer, "bias", torch.nn.Parameter(torch.ones(172))), "biases"),
        (lambda attention, mlp: setattr(mlp, "act_fn", torch.nn.GELU()), "an activation"),
        (lambda attention, mlp: setattr(attention, "attention_dropout", 0.1), "a dropout"),
        (lambda attention, mlp: setattr(mlp, "residual_dropout", 0.1), "a dropout"),  # as Seed-OSS has one
        (lambda attention, mlp: setattr(mlp, "up_proj", torch.nn.Linear(64, 172, bias=False)), "not in 4 bits"),
        (lambda attention, mlp: setattr(mlp.up_proj, "base_layer", torch.nn.Linear(64, 172, bias=False)), "in 4 bits"),
        (lambda attention, mlp: mlp.up_proj.lora_B.update({"default": torch.nn.Linear(4, 172)}), "another kind"),
        (lambda attention, mlp: mlp.up_proj.lora_A.update({"default": torch.nn.Identity()}), "another kind"),
        (lambda attention, mlp: mlp.up_proj.lora_A.update({"other": mlp.up_proj.lora_A.default}), "another kind"),
        (lambda attention, mlp: mlp.up_proj.lora_variant.update({"default": object()}), "another kind"),
        (lambda attention, mlp: mlp.up_proj.lora_bias.update({"default": True}), "lora_bias"),
    ],
)
def test_what_these_layers_do_not_compute_is_left_to_the_libraries(make_model, change, why):
    """One module of the last layer is enough, whatever the configurations say."""
    model = make_model()
    layer = model.get_base_model().model.layers[-1]
    change(layer.self_attn, layer.mlp)
    assert why in why_not(model)


def test_what_these_layers_compute(make_model):
    assert why_not(make_model()) is None
    assert why_not(make_model(dropout=0.1)) is None
    assert why_not(make_model(target_modules=["q_proj"])) is None
    assert why_not(make_model(dora=True)) == "DoRA"


LENGTHS = (5, 1, 9, 3)


@pytest.mark.parametrize("dora", [False, True])
def test_packed_equals_separate(make_model, tiny, dora):
    """Sum of losses and gradients of conversations in one row, against each by itself."""
    ids = [torch.randint(3, 512, (length,)).tolist() for length in LENGTHS]
    examples = [(row, {"input_ids": part, "labels": part}) for row, part in enumerate(ids)]

    def measured(batches):
        module = QLoRAModule(tiny.location, rank=4, alpha=8.0, dora=dora)
        module.model = make_model(dora=dora)
        module.slow_because = why_not(module.model)
        module.kept_layers = 1
        loss = sum(module.summed_loss(batch)[0] for batch in batches)
        loss.backward()
        return loss.item(), {name: value.grad for name, value in adapter_parameters(module.model).items()}

    loss, gradients = measured([collate([example], 1) for example in examples])
    packed_loss, packed_gradients = measured([collate(examples, 1, packed=True)])
    padded_loss, _ = measured([collate(examples, 1)])
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert packed_loss == pytest.approx(padded_loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_packed_conversations_would_see_each_other_without_their_bounds(make_model):
    """The test above can fail: one long conversation of the same tokens gives something else."""
    model, ids = make_model(), torch.randint(3, 512, (1, sum(LENGTHS)))
    inner = model.get_base_model().model
    hidden = inner.embed_tokens(ids)
    apart, together = (
        run_layers(extract_layers(model), hidden, find_places(inner.rotary_emb, hidden, lengths), 0)
        for lengths in (LENGTHS, (sum(LENGTHS),))
    )
    torch.testing.assert_close(apart[0, : LENGTHS[0]], together[0, : LENGTHS[0]])
    assert (apart - together).abs().max() > 0.01


# On a GPU: other kernels, the same promises.


@pytest.fixture
def on_gpu(wide_folder):
    """Makes a model of heads as wide as Llama 2's, in 4-bit with an adapter, on the GPU."""

    def make(dtype):
        model = load_base(find_base(str(wide_folder)), dtype, torch.device("cuda"), "sdpa")
        model = add_lora(model, Lora(4, 8.0, 0.0, "all-linear", False, False))
        torch.manual_seed(1)
        for parameter in adapter_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.1)
        return model.train()

    return make


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "flash"), [(torch.float16, False), (torch.bfloat16, True), (torch.float16, True)])
def test_on_a_gpu_packed_equals_separate_compiled_equals_eager_and_kept_equals_recomputed(on_gpu, dtype, flash):
    """Equal but for rounding: none is further from fp32 than these layers, eager and with conversations apart, are."""
    model = on_gpu(dtype)
    lengths = (130, 5, 64, 301)
    ids = torch.randint(3, 512, (1, sum(lengths)), device="cuda")
    weigh = torch.linspace(-1, 1, ids.numel() * 256, device="cuda").view(1, -1, 256).to(dtype)

    inner = model.get_base_model().model

    def measured(pointwise, kept_layers, packed, dtype=dtype):
        model.zero_grad()
        layers, found = extract_layers(model, pointwise), []
        parts = (
            [slice(0, sum(lengths))]
            if packed
            else [slice(end - n, end) for n, end in zip(lengths, accumulate(lengths), strict=True)]
        )
        for part in parts:
            hidden = inner.embed_tokens(ids[:, part]).to(dtype)
            places = find_places(inner.rotary_emb, hidden, lengths if packed else ())
            hidden = run_layers(layers, hidden, places, kept_layers)
            (hidden * weigh[:, part].to(dtype)).sum().backward()
            found.append(hidden.detach())
        gradients = torch.cat([value.grad.flatten() for value in adapter_parameters(model).values()])
        return torch.cat(found, 1).float(), gradients

    def apart(first, second):
        return max(((one - other).norm() / other.norm()).item() for one, other in zip(first, second, strict=True))

    torch.backends.cuda.enable_flash_sdp(flash)
    try:
        truth = measured(EAGER, 2, False, torch.float32)  # on the same 4-bit weights
        packed = measured(EAGER, 2, True)
        rounding = apart(measured(EAGER, 2, False), truth)
        assert 0 < rounding < (6e-2 if dtype == torch.bfloat16 else 1e-2)
        assert apart(packed, truth) < 1.2 * rounding
        assert apart(measured(compiled(), 2, True), truth) < 1.2 * rounding
        for kept_layers in (0, 1):
            hidden, gradients = measured(EAGER, kept_layers, True)
            assert torch.equal(hidden, packed[0])
            # Flash attention's backward adds up in no fixed order.
            torch.testing.assert_close(gradients, packed[1], rtol=1e-2, atol=1e-3 * packed[1].abs().max().item())
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
