"""Attention: the same whichever kernel computes it, within each conversation; and on a GPU never by plain products."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_qlora.batch import Batch, answer_targets
from lit_qlora.model import attention
from lit_qlora.model.attention import OWN_SDPA, Places, attend, find_places, implementation_of
from lit_qlora.model.base import find_base
from lit_qlora.model.decoder import why_not
from lit_qlora.model.generate import Sampling, generate
from lit_qlora.model.load import load_base
from lit_qlora.model.lora import Lora, adapter_parameters, add_lora
from lit_qlora.model.module import QLoRAModule
from lit_qlora.tools.merging.compare import _compute_in_fp32

ALONE = Places(torch.empty(0), torch.empty(0))
SIZES = [(groups, width, tokens) for groups in (1, 3, 8) for width in (64, 100, 128) for tokens in (1, 37)]
"""Query heads to a key head, widths of a head (OpenLLaMA-3B's is no multiple of 8), tokens."""


def heads_of(groups, width, tokens, dtype=torch.float32, device="cpu", rows=2, key_heads=2):
    torch.manual_seed(3)
    sizes = [(rows, count, tokens, width) for count in (groups * key_heads, key_heads, key_heads)]
    return [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]


def reference(query, key, value, lengths=()):
    """Output, and the gradients of query, key and value, by the formula in fp32."""
    heads = [part.detach().float().requires_grad_() for part in (query, key, value)]
    query, key, value = heads
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    places = torch.arange(query.shape[2], device=query.device)
    owner = torch.bucketize(places, torch.tensor(lengths or [len(places)], device=query.device).cumsum(0), right=True)
    sees = (places[:, None] >= places) & (owner[:, None] == owner)
    weights = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~sees, -torch.inf).softmax(-1)
    return with_gradients(weights @ value, heads)


def with_gradients(attended, heads):
    weigh = torch.linspace(-1, 1, attended.numel(), device=attended.device).view(attended.shape)
    gradients = torch.autograd.grad((attended.float() * weigh).sum(), heads)
    return [attended.detach().float(), *(gradient.float() for gradient in gradients)]


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of torch's attention."""
    seen, real = [], functional.scaled_dot_product_attention

    def counted(query, key, value, **options):
        seen.append({"width": query.shape[-1], "heads": (query.shape[1], key.shape[1]), **options})
        return real(query, key, value, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    return seen


@pytest.mark.parametrize(("groups", "width", "tokens"), SIZES)
def test_what_a_gpu_without_flash_runs_is_the_same_and_in_reach_of_its_kernel(calls, groups, width, tokens):
    heads = heads_of(groups, width, tokens)
    for run in (attend, attention._attend_on_gpu):
        calls.clear()
        found = with_gradients(run(*heads, ALONE), heads)
        for part, expected in zip(found, reference(*heads), strict=True):
            torch.testing.assert_close(part, expected, atol=2e-5, rtol=1e-5)
    (call,) = calls
    assert not call.get("enable_gqa")
    assert call["heads"] == (2 * groups, 2 * groups)
    assert call["width"] % 8 == 0


def test_what_no_backward_follows_is_let_go():
    """No garbage collection is needed, which knows nothing of a card's memory: a validation would fill it."""
    gc.disable()
    try:
        attended = attention._attend_on_gpu(*heads_of(3, 64, 37), ALONE)
        seen = weakref.ref(attended)
        del attended
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("width", [64, 128])
def test_heads_that_are_not_shared_are_computed_as_ever(width):
    heads = heads_of(1, width, 37)
    plain = functional.scaled_dot_product_attention(*heads, is_causal=True)
    assert torch.equal(attend(*heads, ALONE), plain)
    assert torch.equal(attention._attend_on_gpu(*heads, ALONE), plain)


def test_copies_of_keys_and_values_are_not_kept(held_bytes, monkeypatch):
    """What a forward leaves beside its inputs: the output, and a sum in fp32 for each query."""
    heads = heads_of(8, 64, 128)
    lean = 2 * 16 * 128 * (64 + 1) * 4
    assert held_bytes(lambda: attention._attend_on_gpu(*heads, ALONE)) == lean
    copies = 2 * 2 * 16 * 128 * 64 * 4
    monkeypatch.setattr(
        attention, "_widened",
        lambda groups, *narrow: memoryless([heads.repeat_interleave(groups, 1) for heads in narrow]),
    )  # fmt: skip
    assert held_bytes(lambda: attention._attend_on_gpu(*heads, ALONE)) == lean + copies


class memoryless:  # noqa: N801  # stands for a function
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        pass


def test_where_flash_takes_shared_heads_nothing_is_copied(calls, monkeypatch):
    monkeypatch.setattr(attention, "has_flash", lambda *_, **__: True)
    attention._attend_on_gpu(*heads_of(3, 64, 37), ALONE)
    assert [(call["heads"], call["enable_gqa"]) for call in calls] == [((6, 2), True)]


# transformers' layers


def test_only_sdpa_is_replaced():
    assert [implementation_of(name) for name in ("eager", "flash_attention_2")] == ["eager", "flash_attention_2"]
    assert implementation_of("sdpa") == OWN_SDPA


def test_on_a_cpu_transformers_layers_are_its_own_to_the_last_bit(load, tmp_path):
    model, ids = load().eval(), torch.randint(3, 512, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}, {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])}):
            model.set_attn_implementation(OWN_SDPA)
            found = model(input_ids=ids, use_cache=False, **options).logits
            model.set_attn_implementation("sdpa")
            assert torch.equal(found, model(input_ids=ids, use_cache=False, **options).logits), options
    model.set_attn_implementation(OWN_SDPA)
    model.save_pretrained(tmp_path)
    assert OWN_SDPA not in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(("groups", "width", "tokens"), SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_transformers_attention_on_a_gpu_without_flash(calls, groups, width, tokens, masked):
    """Shapes are those that come: training, the first pass over a prompt, and one token after a cache."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = (part.detach() for part in heads_of(groups, width, 37))
    query, mask = query[:, :, -tokens:], None
    if masked:  # padding on the left
        places = torch.arange(37)
        mask = (places[-tokens:, None] >= places) & (places >= torch.tensor([0, 9])[:, None, None, None])
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=width**-0.5)
    calls.clear()
    found, _ = attention._sdpa_on_gpu(module, query, key, value, mask, scaling=width**-0.5, dropout=0.0)
    visible = expected.isfinite()
    torch.testing.assert_close(found[visible], expected[visible], atol=1e-5, rtol=1e-5)
    (call,) = calls
    assert not call.get("enable_gqa")
    assert call["heads"][0] == call["heads"][1]
    assert call["width"] % 8 == 0


# On a GPU: with nothing but the memory-efficient kernel, as on a T4, where torch raises rather than fall back.

KERNELS = {
    "without flash": [SDPBackend.EFFICIENT_ATTENTION],
    "with flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
}


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [64, 100, 128])
@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_no_attention_falls_back(dtype, groups, width, packed, kernels):
    for lengths in ((1,), (37,), (301,), (130, 5, 1, 64)):
        if packed == (len(lengths) == 1):
            continue
        tokens = sum(lengths)
        heads = heads_of(groups, width, tokens, dtype, "cuda", rows=1 if packed else 2)
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
        places = Places(torch.empty(0), torch.empty(0), lengths, bounds) if packed else ALONE
        with sdpa_kernel(KERNELS[kernels]):
            found = with_gradients(attend(*heads, places), heads)
        truth = reference(*heads, lengths)
        # A token by itself has no gradient of query and key, only rounding of the size of the others.
        largest = max(expected.norm() for expected in truth)
        for part, expected in zip(found, truth, strict=True):
            bound = 4e-3 if dtype == torch.float16 else 3e-2
            size = expected.norm() if sum(lengths) > 1 else largest
            assert (part - expected).norm() <= bound * size, lengths


@pytest.fixture(scope="session")
def wide_model(save_llama, tmp_path_factory):
    """Makes a model in 4 bits on the GPU, its heads shared as in SmolLM2 or TinyLlama, or of an odd width."""

    def make(groups, width, dora=False):
        sizes = {
            "hidden_size": groups * width,
            "intermediate_size": 192,  # bitsandbytes warns of sizes that are no multiple of 64: no Llama has them
            "num_attention_heads": groups,
            "num_key_value_heads": 1,
            "initializer_range": 0.03,
        }
        folder = save_llama(tmp_path_factory.mktemp("bases") / "llama", **sizes)
        model = load_base(find_base(str(folder)), torch.float16, torch.device("cuda"), "sdpa")
        model = add_lora(model, Lora(4, 8.0, 0.0, "all-linear", False, dora))
        torch.manual_seed(1)
        for name, parameter in adapter_parameters(model).items():
            if "magnitude" not in name:
                torch.nn.init.normal_(parameter, std=0.03)
        return model.train(), folder

    return make


@pytest.mark.parametrize(
    ("is_recurrent", "has_flash", "may_plan"), [(False, True, False), (True, True, True), (False, False, True)]
)
def test_cudnn_plans_for_recurrent_shapes_only(monkeypatch, is_recurrent, has_flash, may_plan):
    monkeypatch.setattr(attention, "has_flash", lambda *_, **__: has_flash)
    seen, real = [], functional.scaled_dot_product_attention

    def watched(*heads, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        with sdpa_kernel(SDPBackend.MATH):
            return real(*heads, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    attention._attend_on_gpu(*heads_of(1, 64, 8), ALONE._replace(is_recurrent=is_recurrent))
    assert seen == [may_plan]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def near(found, truth, bound=2e-2):
    return 0 < (found.float() - truth.float()).norm() < bound * truth.float().norm()


@pytest.mark.gpu
def test_on_a_gpu_places_are_found_without_waiting_for_it():
    hidden, lengths = torch.zeros(1, 20_000, 4, device="cuda"), (19_000, 999, 1)
    find_places(lambda _, positions: (positions, positions), hidden, lengths)  # kernels are loaded at their first use
    torch.cuda._sleep(2_000_000_000)  # cycles, about a second
    places = find_places(lambda _, positions: (positions, positions), hidden, lengths)
    assert not torch.cuda.current_stream().query()
    assert places.cos.tolist() == [[place for length in lengths for place in range(length)]]
    assert places.bounds.tolist() == [0, 19_000, 19_999, 20_000]


@pytest.mark.gpu
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("groups", "width"), [(3, 64), (8, 128), (1, 64), (16, 100)])
def test_on_a_gpu_training_and_validation_never_fall_back(wide_model, groups, width, dora):
    """Our layers, and with DoRA transformers' own; conversations apart, and packed. The truth is fp32, as on a CPU."""
    model, folder = wide_model(groups, width, dora)
    module = QLoRAModule(str(folder), rank=4, alpha=8.0, dora=dora)
    module.model, module.slow_because, module.kept_layers = model, why_not(model), 1
    assert bool(module.slow_because) == dora
    lengths = (37, 1, 130, 5)
    ids = torch.randint(3, 512, (1, sum(lengths)))
    batches = [Batch(ids, *answer_targets(ids), (0,), ids.numel(), ids.numel())]
    batches += [batches[0]._replace(rows=(0, 1, 2, 3), lengths=lengths)]

    def measured(batch, dtype):
        batch = batch._replace(**{name: getattr(batch, name).cuda() for name in ("input_ids", "positions", "targets")})
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = module.train().summed_loss(batch)[0]
            loss.backward()
            with torch.no_grad():
                scored = module.eval().summed_loss(batch)[0]
        assert torch.isclose(loss, scored, rtol=1e-3)
        return loss, torch.cat([value.grad.flatten() for value in adapter_parameters(model).values()])

    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        found = [measured(batch, torch.float16) for batch in batches]
    _compute_in_fp32(model)
    module._layers.clear()
    for (loss, gradients), batch in zip(found, batches, strict=True):
        true_loss, truth = measured(batch, torch.float32)
        assert torch.isclose(loss.float(), true_loss, rtol=2e-3)
        assert near(gradients, truth, 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "width"), [(3, 64), (8, 128), (1, 64), (16, 100)])
def test_on_a_gpu_answers_never_fall_back(wide_model, groups, width):
    """A padded batch and a single prompt: the first pass, and one token at a time after it."""
    model, _ = wide_model(groups, width)
    model.eval()
    prompts = [torch.randint(3, 512, (count,)).tolist() for count in (37, 5, 1)]
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), torch.autocast("cuda", torch.float16):
        for some in (prompts, prompts[:1], prompts[2:]):
            assert [len(answer) for answer in generate(model, some, [511], Sampling(9))]
    ids = torch.randint(3, 512, (2, 37), device="cuda")
    for mask in (None, (torch.arange(37, device="cuda") >= torch.tensor([[0], [9]], device="cuda")).long()):
        seen = ids.bool() if mask is None else mask.bool()
        with torch.no_grad():
            options = {} if mask is None else {"attention_mask": mask}
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), torch.autocast("cuda", torch.float16):
                first = {name: value[:, :-1] for name, value in options.items()}
                begun = model(input_ids=ids[:, :-1], use_cache=True, **first)
                last = model(input_ids=ids[:, -1:], past_key_values=begun.past_key_values, **options)
                found = torch.cat((begun.logits, last.logits), 1)
            truth = in_fp32(model, ids, options)
        assert near(found[seen], truth[seen])


def in_fp32(model, ids, options):
    """The logits of a model in fp32, on the same 4-bit weights; the model stays as it was."""
    kept = {name: value.data for name, value in model.named_parameters()}
    modules = [module for module in model.modules() if hasattr(module, "compute_dtype")]
    _compute_in_fp32(model)
    logits = model(input_ids=ids, use_cache=False, **options).logits
    for name, value in model.named_parameters():
        value.data = kept[name]
    for module in modules:
        module.compute_dtype = torch.float16
    return logits
