"""A merge's arithmetic against bitsandbytes', transformers' and peft's own, weight by weight."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lit_qlora.model.base import find_base
from lit_qlora.model.load import load_base
from lit_qlora.model.lora import save_adapter
from lit_qlora.model.weights import is_linear
from lit_qlora.tools.merging.arithmetic import LoraWeights, StoredWeights, as_trained, merged_tensors
from lit_qlora.tools.merging.streamed import streamed_logits

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def adapter_of(model, base, folder):
    folder.mkdir()
    save_adapter(model, base, folder)
    return folder


def peft_adapter(llama, **options):
    """peft's LoRA on a model, with matrices and magnitudes that are not those it began with."""
    torch.manual_seed(3)
    model = get_peft_model(llama, LoraConfig(**{"r": 4, "lora_alpha": 24, "target_modules": "all-linear", **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_base_is_what_training_loads(tiny, load, dtype):
    """Bit for bit the levels and block scales that transformers' own loading ends up with."""
    from bitsandbytes.functional import dequantize_4bit

    weights, count = StoredWeights(tiny), 0
    for name, module in load(dtype).named_modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            state.dtype = torch.float32
            trained_on = dequantize_4bit(module.weight.data, state)
            assert torch.equal(as_trained(weights[f"{name}.weight"], dtype), trained_on)
            count += 1
    assert count == 14
    assert not torch.equal(as_trained(weights["model.layers.0.mlp.up_proj.weight"], dtype), trained_on)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj"]}])
def test_onto_the_original_it_is_peft_s_own_merge(tiny, tiny_folder, tmp_path, options):
    model = peft_adapter(LlamaForCausalLM.from_pretrained(tiny_folder), **options)
    folder = adapter_of(model, tiny, tmp_path / "adapter")
    merged = dict(merged_tensors(StoredWeights(tiny), LoraWeights(folder), "original", torch.float32, CPU))
    expected = model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-5)


def test_onto_the_quantized_every_linear_layer_is_what_was_trained_on(tiny, tiny_folder, tmp_path):
    model = peft_adapter(LlamaForCausalLM.from_pretrained(tiny_folder), target_modules=["q_proj"])
    folder = adapter_of(model, tiny, tmp_path / "adapter")
    weights = StoredWeights(tiny)
    merged = dict(merged_tensors(weights, LoraWeights(folder), "quantized", torch.float16, CPU))
    untouched = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(merged[untouched], as_trained(weights[untouched], torch.float16))
    assert not torch.equal(merged[untouched], weights[untouched])
    head = "lm_head.weight"
    assert torch.equal(merged[head], weights[head].half().float())
    assert {name for name in merged if is_linear(name)} == {
        name for name in weights.names if "proj" in name
    }  # fmt: skip


@pytest.mark.parametrize("dora", [False, True])
def test_a_base_that_is_stored_in_4_bits(tiny, make_model, tmp_path, dora):
    """Written by transformers, then read back without it: the same as from the 16-bit weights."""
    model = make_model(dora=dora)
    folder = adapter_of(model, tiny, tmp_path / "adapter")
    load_base(tiny, torch.float32, CPU, "sdpa").save_pretrained(tmp_path / "packed")
    packed = find_base(str(tmp_path / "packed"))
    lora = LoraWeights(folder)
    expected = dict(merged_tensors(StoredWeights(tiny), lora, "quantized", torch.float32, CPU))
    found = dict(merged_tensors(StoredWeights(packed), lora, "quantized", torch.float32, CPU))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_no_one_reads_is_left_out(tiny, tiny_folder, tmp_path):
    stored = load_file(tiny_folder / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert StoredWeights(find_base(str(tmp_path))).names == StoredWeights(tiny).names


def test_layers_come_in_their_order(tiny):
    layers = [name.split(".")[2] for name in StoredWeights(tiny).names if ".layers." in name]
    assert layers == ["0"] * 9 + ["1"] * 9


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_a_streamed_pass_gives_the_logits_of_a_loaded_model(save_llama, tmp_path, changes):
    folder = save_llama(tmp_path / "llama", **changes)
    whole = LlamaForCausalLM.from_pretrained(folder).eval()
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    ids = torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
    for path in (folder, tmp_path / "sharded"):
        torch.testing.assert_close(streamed_logits(find_base(str(path)), ids, CPU), expected, atol=1e-5, rtol=1e-5)
