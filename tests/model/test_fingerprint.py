"""What makes a base another one: any of its weights. What does not: where it lies, in how many files, in which type."""

import re
import shutil
import struct

import pytest
import torch

from lit_qlora.errors import UserError
from lit_qlora.model import fingerprint as module
from lit_qlora.model.base import Base, find_base
from lit_qlora.model.fingerprint import fingerprint, identity, short
from lit_qlora.model.load import load_base
from lit_qlora.model.shape import Shape


def copy(tiny_folder, folder):
    shutil.copytree(tiny_folder, folder)
    return folder


def with_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return fingerprint(find_base(str(folder)))


def test_a_copy_has_the_same_fingerprint(tiny, tiny_folder, tmp_path):
    assert fingerprint(find_base(str(copy(tiny_folder, tmp_path / "copy")))) == fingerprint(tiny)
    assert re.fullmatch("v2-full(-[0-9a-f]{32}){2}", fingerprint(tiny))


def test_another_final_norm_is_another_base(tiny, tiny_folder, tmp_path):
    def nudge(tensors):
        tensors["model.norm.weight"][7] *= 1.001

    assert with_tensors(copy(tiny_folder, tmp_path / "copy"), nudge) != fingerprint(tiny)


def test_the_final_norm_is_found_wherever_it_stands(tiny, tiny_folder, tmp_path):
    def move(tensors):
        tensors["aaa"] = torch.ones(5)

    assert with_tensors(copy(tiny_folder, tmp_path / "copy"), move) == fingerprint(tiny)


@pytest.mark.parametrize("width", ["intermediate_size", "num_hidden_layers", "vocab_size", "num_key_value_heads"])
def test_other_widths_are_another_base(tiny, width):
    config = {**tiny.config, width: tiny.config[width] * 2}
    assert fingerprint(Base(tiny.name, tiny.location, config)) != fingerprint(tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_values_in_another_float_type_are_the_same_base(tiny_folder, tmp_path, dtype):
    folder = copy(tiny_folder, tmp_path / "copy")

    def rounded(tensors):  # to what both types can hold
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16().float()

    def narrow(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)

    wide = with_tensors(folder, rounded)
    assert with_tensors(folder, narrow) == wide


@pytest.mark.parametrize(
    "written",
    [
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"rope_theta": 10000, "rope_scaling": None},
        {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}},
    ],
)
def test_the_same_rules_in_another_versions_words_are_the_same_base(tiny, written):
    config = {name: value for name, value in tiny.config.items() if not name.startswith("rope_")}
    more = {"torch_dtype": "float16", "_name_or_path": "/home/somebody", "transformers_version": "4.31.0.dev0"}
    assert fingerprint(Base(tiny.name, tiny.location, {**config, **written, **more})) == fingerprint(tiny)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
    ],
)
def test_other_rules_at_the_same_widths_are_another_base(tiny, change):
    config = {**tiny.config, **change}
    assert Shape.of(config).linears["o_proj"] == tiny.shape.linears["o_proj"] or "head_dim" not in change
    assert fingerprint(Base(tiny.name, tiny.location, config)) != fingerprint(tiny)


def test_the_identity_of_a_base_shows_the_commit_where_it_is_known(tiny, tiny_folder, tmp_path, monkeypatch):
    assert identity(tiny) == {"name": "tiny-llama", "commit": None, "fingerprint": fingerprint(tiny)}
    snapshot = copy(tiny_folder, tmp_path / "models--owner--llama" / "snapshots" / "c0ffee")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda _, name: str(snapshot / name) if (snapshot / name).is_file() else None,
    )
    cached_base = Base("owner/llama", "owner/llama", tiny.config)
    assert identity(cached_base) == {"name": "owner/llama", "commit": "c0ffee", "fingerprint": fingerprint(tiny)}


def test_sharded_weights_are_the_same_base(tiny, tmp_path):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny.location)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "model.safetensors.index.json").exists()
    sharded = find_base(str(tmp_path))
    assert fingerprint(sharded) == fingerprint(tiny)
    loaded = load_base(sharded, torch.float32, torch.device("cpu"), "sdpa")
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


# Other weights


def double(name):
    def change(tensors):
        tensors[name] *= 2

    return change


def add_an_adapter(tensors):
    """What one step of rank 1 makes of a merged layer: a little in nearly every weight."""
    torch.manual_seed(0)
    for number in range(2):
        weight = tensors[f"model.layers.{number}.mlp.up_proj.weight"]
        weight += 1e-4 * torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])


CHANGES = {
    "q_proj": double("model.layers.1.self_attn.q_proj.weight"),
    "embeddings": double("model.embed_tokens.weight"),
    "head": double("lm_head.weight"),
    "norm": double("model.layers.0.input_layernorm.weight"),
    "merged": add_an_adapter,
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_are_another_base(tiny, tiny_folder, tmp_path, change):
    other = with_tensors(copy(tiny_folder, tmp_path / "copy"), CHANGES[change])
    assert other != fingerprint(tiny)
    assert short(other) != short(fingerprint(tiny))
    assert fingerprint(tiny) != fingerprint(find_base(str(tmp_path / "copy")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_of_a_base_in_another_float_type_is_the_same(tiny_folder, tmp_path, dtype):
    """Values that were bf16 once, as Llama 2's, are all held by fp16 but for the smallest."""
    folder = copy(tiny_folder, tmp_path / "copy")

    def once(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16().float()
            tensors[name].view(-1)[:3] = torch.tensor([1e-6, -3e-9, 1e-39]).bfloat16().float()

    def narrow(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype)

    wide = with_tensors(folder, once)
    assert with_tensors(folder, narrow) == wide


def test_a_tied_head_may_be_written_or_not(save_llama, tmp_path):
    folder = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    without = fingerprint(find_base(str(folder)))

    def write(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert with_tensors(folder, write) == without


def test_of_a_large_tensor_places_all_over_it_are_read():
    places = list(module._places("model.layers.0.self_attn.q_proj.weight", 4096 * 4096))
    assert len(places) == 8
    eighth = 4096 * 4096 // 8
    assert [first // eighth for first, _ in places] == [*range(8)]
    assert {count for _, count in places} == {512}
    assert len({first % 4096 for first, _ in places}) == 8
    assert list(module._places("model.norm.weight", 5120)) == [(0, 5120)]


# 4 bits


@pytest.fixture
def quantised(load, tmp_path):
    """The tiny Llama in 4 bits, as others save it: without a word of where it comes from."""
    load().save_pretrained(tmp_path / "quantised")
    return find_base(str(tmp_path / "quantised"))


def test_a_4_bit_copy_from_elsewhere_is_a_base_of_its_own(quantised, tiny):
    assert fingerprint(quantised).startswith("v2-4bit-")
    assert fingerprint(quantised) != fingerprint(tiny)


@pytest.mark.parametrize("part", [".weight", ".weight.nested_absmax"])
def test_other_4_bits_are_another_base(quantised, tmp_path, part):
    before = fingerprint(quantised)

    def change(tensors):
        tensors[f"model.layers.0.self_attn.q_proj{part}"] += 1

    assert with_tensors(tmp_path / "quantised", change) != before


def test_a_copy_that_shows_its_original_is_believed_while_it_is_as_it_was_written(quantised, tiny, tmp_path):
    module.write_original(tmp_path / "quantised", quantised, tiny)
    assert fingerprint(quantised) == fingerprint(tiny)

    def change(tensors):
        tensors["model.layers.0.self_attn.q_proj.weight"] += 1

    assert with_tensors(tmp_path / "quantised", change).startswith("v2-4bit-")


def test_weights_that_can_not_be_read_are_reported(tiny_folder, tmp_path):
    folder = copy(tiny_folder, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10**9) + b"{")
    with pytest.raises(UserError, match=f"model.base: the weights of {folder} can't be read: "):
        fingerprint(find_base(str(folder)))
