"""Each architecture that is accepted: our own layers against transformers' and peft's, what is read and refused."""

import json

import pytest
import torch
import transformers

from lit_qlora.data.batching import collate
from lit_qlora.errors import UserError
from lit_qlora.model import graphs, lora
from lit_qlora.model import load as loading
from lit_qlora.model.architectures import ARCHITECTURES
from lit_qlora.model.attention import find_places
from lit_qlora.model.base import check_context, find_base
from lit_qlora.model.config import for_transformers, read_config
from lit_qlora.model.decoder import extract_layers, why_not
from lit_qlora.model.fingerprint import fingerprint
from lit_qlora.model.generate import Sampling, generate
from lit_qlora.model.graphs import Graphs
from lit_qlora.model.lora import adapter_parameters
from lit_qlora.model.module import QLoRAModule
from lit_qlora.model.pointwise import EAGER, compiled
from lit_qlora.model.weights import check_weights
from lit_qlora.storage.weight_files import write_shards
from lit_qlora.tools.merging.arithmetic import LoraWeights, StoredWeights, merged_tensors
from lit_qlora.tools.merging.streamed import streamed_logits
from tests.model.test_decoder import INPUTS, forward_and_gradients, in_fp64, ours, plain, relative_errors
from tests.model.test_graphs import Rerun, embedded, learned
from tests.model.test_graphs import gradients as gradients_of
from tests.model.test_graphs import plain as once
from tests.small_bases import BASES, save_base
from tests.tiny_llama import run_layers

LENGTHS = (5, 1, 9, 3)


@pytest.fixture(scope="session")
def base_like(tmp_path_factory):
    """The base of `BASES` by its name, made once."""
    made = {}

    def base_like(name):
        if name not in made:
            made[name] = find_base(str(save_base(tmp_path_factory.mktemp("bases") / name.replace(" ", "-"), name)))
        return made[name]

    return base_like


@pytest.mark.parametrize("name", BASES)
def test_outputs_and_gradients_are_those_of_transformers_and_peft(make_model, base_like, name):
    """Against fp64 on the same 4-bit weights, ours are no further off than theirs."""
    base = base_like(name)
    exact, model = in_fp64(make_model(base=base)), make_model(base=base)
    assert why_not(model) is None
    errors = {plain: 0.0, ours: 0.0}
    for seed in list(INPUTS)[:6]:
        hidden, truth = forward_and_gradients(plain, exact, seed)
        assert all(value.norm() > 0 for value in truth.values())
        for run in errors:
            found_hidden, found = forward_and_gradients(run, model, seed)
            torch.testing.assert_close(found_hidden.double(), hidden, rtol=1e-5, atol=1e-5)
            errors[run] += relative_errors(found, truth)
    assert 0 < errors[ours] < 1.15 * errors[plain]


def module_of(base, model, **options):
    module = QLoRAModule(base.location, rank=4, alpha=8.0, **options)
    module.model, module.slow_because, module.kept_layers = model, why_not(model), 1
    return module


@pytest.mark.parametrize("dora", [False, True], ids=["own layers", "transformers'"])
@pytest.mark.parametrize("name", ["llama with biases", "mistral v0.1", "qwen2.5", "qwen3"])
def test_packed_equals_separate(make_model, base_like, name, dora):
    """Sum of losses and gradients of conversations in one row, against each by itself."""
    torch.manual_seed(0)
    base = base_like(name)
    ids = [torch.randint(3, 512, (length,)).tolist() for length in LENGTHS]
    examples = [(row, {"input_ids": part, "labels": part}) for row, part in enumerate(ids)]

    def measured(batches):
        module = module_of(base, make_model(base=base, dora=dora), dora=dora)
        assert (module.slow_because == "DoRA") == dora
        loss = sum(module.summed_loss(batch)[0] for batch in batches)
        loss.backward()
        return loss.item(), {name: value.grad for name, value in adapter_parameters(module.model).items()}

    loss, gradients = measured([collate([example], 1) for example in examples])
    packed_loss, packed_gradients = measured([collate(examples, 1, packed=True)])
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    for weight, gradient in gradients.items():
        assert (packed_gradients[weight] - gradient).norm() < 1e-5 * gradient.norm(), weight


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama with biases"])
@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.3), (torch.float16, 0.0), (torch.bfloat16, 0.3)])
def test_gradients_are_bit_equal_however_many_layers_keep(make_model, base_like, name, dtype, dropout):
    model = make_model(dtype, base=base_like(name), dropout=dropout)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = [forward_and_gradients(ours, model, kept_layers=kept) for kept in (0, 1, 2)]
    for hidden, gradients in found[1:]:
        assert torch.equal(hidden, found[0][0])
        assert all(torch.equal(gradients[name], found[0][1][name]) for name in gradients)


@pytest.mark.parametrize("name", BASES)
def test_what_is_counted_and_expected_is_what_is_stored(base_like, name):
    base = base_like(name)
    stored = sum(value.numel() for value in base.architecture.model_class().from_pretrained(base.location).parameters())
    assert base.shape.num_parameters == stored
    linears = sorted(name.removesuffix(".weight") for name in base_linears(base))
    assert sorted(check_weights(base)) == linears


def base_linears(base):
    parts = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in base.shape.linears}
    return [f"model.layers.{layer}.{part}.{name}" for layer in range(2) for name, part in parts.items()]


@pytest.mark.parametrize(("name", "key"), [("qwen2.5", "self_attn.q_proj.bias"), ("qwen3", "self_attn.k_norm.weight")])
def test_a_weight_of_the_architecture_that_is_missing_is_named(tmp_path, base_like, name, key):
    from safetensors.torch import load_file, save_file

    file = save_base(tmp_path / "base", name) / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.{key}"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=rf"model\.layers\.1\.{key} is missing, expected \["):
        check_weights(find_base(str(file.parent)))


def saved_config(folder, **changes):
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value != "gone"}), encoding="utf-8")
    return find_base(str(folder), weights=False)


@pytest.mark.parametrize(
    ("name", "changes", "window"),
    [
        ("mistral", {}, None),
        ("mistral", {"sliding_window": "gone"}, 4096),
        ("mistral v0.1", {}, 128),
        ("qwen2.5", {}, None),
        ("qwen2.5", {"sliding_window": 32, "use_sliding_window": False}, None),
        ("qwen2.5", {"layer_types": None, "use_sliding_window": True, "max_window_layers": 2}, None),
        (
            "qwen2.5",
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
            32,
        ),
        ("qwen2 that slides", {}, 64),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None}, None),
        ("llama 2", {"sliding_window": 8, "use_sliding_window": True}, None),
    ],
)
def test_a_window_is_the_longest_row_and_a_longer_one_is_refused(tmp_path, name, changes, window, expect_error):
    base = saved_config(save_base(tmp_path, name), **changes)
    assert base.window == window
    assert base.context_tokens == min(512, window or 512)
    check_context(base, base.context_tokens)
    words = "sliding_window" if window and window < 512 else "max_position_embeddings"
    expect_error(lambda: check_context(base, base.context_tokens + 1), words, base.name, option="data.max_length")


def test_rows_longer_than_the_window_from_elsewhere_are_refused_by_our_own_layers(make_model, base_like, expect_error):
    """transformers' own compute the window, as they do past it."""
    base = base_like("qwen2 that slides")
    ids = torch.randint(3, 512, (65,)).tolist()
    batch = collate([(0, {"input_ids": ids, "labels": ids})], 1)
    module = module_of(base, make_model(base=base))
    expect_error(lambda: module.summed_loss(batch), "65 tokens", "sliding_window", "own_layers", option="dataloaders")
    module.slow_because = "model.own_layers is false"
    loss, _, count = module.summed_loss(batch)
    assert count == 64 and loss.isfinite()


@pytest.mark.parametrize("name", BASES)
def test_a_config_comes_back_as_transformers_has_it(tmp_path, name):
    """What is read of a config.json makes the config that transformers makes of it, and the same fingerprint again."""
    base = find_base(str(save_base(tmp_path / "base", name)))
    expected = transformers.AutoConfig.from_pretrained(base.location)
    expected.use_cache = True
    found = for_transformers(base.config)
    ignored = {"architectures", "dtype", "initializer_range", "_name_or_path", "transformers_version", "name_or_path"}
    assert type(found) is type(expected)
    differ = {key for key, value in expected.to_dict().items() if found.to_dict().get(key) != value} - ignored
    assert differ <= {"max_window_layers", "sliding_window", "use_sliding_window", "layer_types"} - (
        {"sliding_window", "layer_types"} if base.window else set()
    ), differ
    again = tmp_path / "again"
    found.save_pretrained(again)
    (again / "model.safetensors").write_bytes((tmp_path / "base" / "model.safetensors").read_bytes())
    assert fingerprint(find_base(str(again))) == fingerprint(base)


def test_what_lacks_in_a_config_is_as_transformers_has_it(tmp_path):
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 9, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 8}
    for model_type, architecture in ARCHITECTURES.items():
        file = tmp_path / "config.json"
        file.write_text(json.dumps(sizes | {"model_type": model_type}), encoding="utf-8")
        expected = getattr(transformers, f"{architecture.prefix}Config")(**sizes)
        found = for_transformers(read_config("base", file))
        named = {"architectures": [architecture.class_name]}
        assert {key: found.to_dict().get(key) for key in expected.to_dict()} == expected.to_dict() | named


@pytest.mark.parametrize(
    ("one", "changes"),
    [
        ("qwen2.5", {"rms_norm_eps": 1e-5}),
        ("mistral v0.1", {"sliding_window": None}),
        ("mistral", {"model_type": "llama"}),
    ],
)
def test_another_config_is_another_base(tmp_path, one, changes):
    folder = save_base(tmp_path, one)
    before = fingerprint(find_base(str(folder)))
    changes |= {"architectures": None} if "model_type" in changes else {}
    saved_config(folder, **changes)
    assert fingerprint(find_base(str(folder))) != before


@pytest.mark.parametrize("name", ["llama with biases", "qwen3"])
def test_recorded_kernels_give_what_the_layers_give(monkeypatch, make_model, base_like, name):
    """A recording runs its code again on a CPU."""
    monkeypatch.setattr(graphs, "_record", Rerun)
    model = make_model(base=base_like(name))
    run = Graphs(extract_layers(model), 1, model.get_base_model().model.rotary_emb)
    found = []
    for way in (once(model), run, run):
        model.zero_grad()
        found.append((learned(way, model, embedded(model, 2, 32)), gradients_of(model).clone()))
    for out, gradients in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(gradients, found[0][1])


def test_the_norms_kernels_see_one_shape_for_each_width(make_model, base_like):
    """torch.compile makes one for each number of dimensions and each last one, and stops at eight of a function."""
    seen = set()

    def spied(x, *rest):
        seen.add((x.dim(), x.shape[-1]))
        return EAGER.rms_norm(x, *rest)

    model = make_model(base=base_like("qwen3"))
    learned(lambda hidden: run_all(model, hidden, EAGER._replace(rms_norm=spied)), model, embedded(model, 2, 8))
    assert seen == {(3, 64), (3, 32)}


def run_all(model, hidden, pointwise):
    places = find_places(model.get_base_model().model.rotary_emb, hidden, ())
    return run_layers(extract_layers(model, pointwise), hidden, places, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama with biases"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_compiled_recorded_and_recomputed_are_as_near_to_the_truth_as_eager(base_like, name, dtype):
    """The truth is fp32 on the same 4-bit weights."""
    model = loading.load_base(base_like(name), dtype, torch.device("cuda"), "sdpa")
    model = lora.add_lora(model, lora.Lora(4, 8.0, 0.0, "all-linear", False, False)).train()
    torch.manual_seed(1)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    inner = model.get_base_model().model

    def measured(pointwise, kept_layers, dtype=dtype, records=False):
        model.zero_grad()
        layers, hidden = extract_layers(model, pointwise), embedded(model, 4, 64).to(dtype)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            if records:
                run = Graphs(layers, kept_layers, inner.rotary_emb)
                return learned(run, model, hidden).float(), gradients_of(model).clone()
            places = find_places(inner.rotary_emb, hidden, ())
            out = learned(lambda hidden: run_layers(layers, hidden, places, kept_layers), model, hidden)
            return out.float(), gradients_of(model).clone()

    def apart(found):
        return max(((one - other).norm() / other.norm()).item() for one, other in zip(found, truth, strict=True))

    truth = measured(EAGER, 2, torch.float32)
    rounding = apart(measured(EAGER, 2))
    assert 0 < rounding < (6e-2 if dtype == torch.bfloat16 else 1e-2)
    assert apart(measured(EAGER, 0)) < 1.2 * rounding
    assert apart(measured(compiled(), 1)) < 1.2 * rounding
    assert apart(measured(compiled(), 1, records=True)) < 1.2 * rounding


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "mistral"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj"]])
def test_an_adapter_made_elsewhere_is_used_as_peft_uses_it(make_model, load, base_like, tmp_path, name, targets):
    base, ids = base_like(name), torch.randint(3, 512, (2, 12))
    made = make_model(base=base, target_modules=targets, use_rslora=True).eval()
    made.save_pretrained(str(tmp_path))
    assert not (tmp_path / "lit_qlora.json").exists()
    loaded = lora.load_adapter(load(base=base), base, tmp_path, trainable=False).eval()
    assert why_not(loaded) is None
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        assert not torch.allclose(load(base=base).eval()(input_ids=ids).logits, expected, atol=1e-3)
        torch.testing.assert_close(ours(loaded, ids), plain(made, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "mistral v0.1"])
def test_a_base_saved_in_4_bits_is_the_same_base(load, base_like, tmp_path, name):
    """Others publish biases and norms in 16 bits beside the packed weights."""
    base, ids = base_like(name), torch.randint(3, 512, (2, 12))
    model = load(base=base)
    model.save_pretrained(str(tmp_path))
    copy = find_base(str(tmp_path))
    assert copy.in_4_bits and copy.window == base.window
    assert check_weights(copy) == []
    with torch.no_grad():
        assert torch.equal(load(base=copy)(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["llama with biases", "mistral v0.1", "qwen2.5", "qwen3"])
def test_a_merge_is_base_and_adapter_in_plain_transformers(make_model, base_like, tmp_path, name):
    base, ids = base_like(name), torch.randint(3, 512, (2, 12))
    model = make_model(base=base).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    device = torch.device("cpu")
    tensors = merged_tensors(StoredWeights(base), LoraWeights(tmp_path / "adapter"), "quantized", torch.float32, device)
    write_shards(tmp_path, tensors)
    (tmp_path / "config.json").write_text(json.dumps(base.config), encoding="utf-8")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert getattr(merged.config, "sliding_window", None) == base.window
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            streamed_logits(find_base(str(tmp_path)), ids, device), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["mistral v0.1", "qwen2.5", "qwen3"])
def test_answers_are_those_of_plain_transformers(make_model, base_like, name):
    """Answers come with a cache, from a prompt that is padded beside a longer one."""
    model = make_model(base=base_like(name)).eval()
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in (5, 9)]
    found = generate(model, prompts, [2], Sampling(max_new_tokens=6))
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in answer:
            with torch.no_grad():
                likeliest = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
            assert token == likeliest
            ids.append(token)
