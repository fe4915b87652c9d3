"""A base's config.json: every key is as it should be or named in one line, and nothing else of it gets further."""

import dataclasses
import json
import math

import pytest
import torch

from lit_qlora.errors import UserError
from lit_qlora.model.architectures import ARCHITECTURES
from lit_qlora.model.base import find_base
from lit_qlora.model.config import ACTIVATIONS, OPTIONAL, SIZES, for_transformers, read_config, rope_of
from lit_qlora.model.fingerprint import rules_of
from lit_qlora.storage.foreign import LARGEST_FILE

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 172,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
ODD = ["64", "", 0, -1, True, 1.5, 64.0, math.nan, math.inf, 10**40, [], [1], {"a": 1}]
DEEP = "[" * 200_000 + "]" * 200_000


def read(tmp_path, config):
    file = tmp_path / "config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return read_config("base", file)


def refusal(tmp_path, config):
    with pytest.raises(UserError) as caught:
        read(tmp_path, config)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message.removeprefix("model.base: base: config.json")


@pytest.mark.parametrize("key", SIZES)
def test_a_size_is_a_whole_number_from_1(tmp_path, key):
    for value in ODD:
        assert refusal(tmp_path, CONFIG | {key: value}).startswith(f": {key}: expected a whole number from 1 to ")
    assert refusal(tmp_path, CONFIG | {key: None}) == f" has no {key}"


OF_LLAMA = OPTIONAL | ARCHITECTURES["llama"].keys


@pytest.mark.parametrize("key", OF_LLAMA)
def test_what_may_lack_is_right_where_it_is_there(tmp_path, key):
    """No odd value gets through unless it says the same as a usual one; null says nothing."""
    assert key not in read(tmp_path, CONFIG | {key: None}).keys() - {"max_position_embeddings"}
    harmless = {
        "rms_norm_eps": [],
        "attention_dropout": [0],
        "tie_word_embeddings": [True],
        "attention_bias": [True],
        "mlp_bias": [True],
        "rope_theta": [1.5, 64.0],
        "rope_scaling": [{"a": 1}],
        "rope_parameters": [{"a": 1}],
    }
    for value in ODD:
        if any(value is fine or value == fine for fine in harmless.get(key, []) if type(value) is type(fine)):
            read(tmp_path, CONFIG | {key: value})
        else:
            message = refusal(tmp_path, CONFIG | {key: value})
            assert key in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor of hidden_size (64), got 5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads (4), got 3"),
        (
            {"head_dim": 15},
            "head_dim: expected an even number (default: hidden_size / num_attention_heads)",
        ),
        (
            {"num_attention_heads": 64},
            'an even number (default: hidden_size / num_attention_heads), got "64',
        ),
        ({"hidden_act": "siluu"}, "hidden_act: expected one of silu, swish, gelu"),
        ({"architectures": "LlamaForCausalLM"}, 'architectures: expected ["LlamaForCausalLM"], got "LlamaForCausalLM"'),
        ({"architectures": ["X"]}, 'architectures: expected ["LlamaForCausalLM"], got ["X"]'),
        ({"architectures": 5}, "architectures: expected"),
        (
            {"rope_scaling": {"type": "su"}},
            "rope_type: expected one of default, linear, dynamic, yarn, longrope, llama3",
        ),
        ({"rope_scaling": {"type": [1]}}, "rope_type: expected one of"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has no factor, and linear needs it: a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "rope_scaling has no factor, and linear needs it"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "rope_parameters.factor: expected a number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_parameters.rope_theta: expected"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention: expected a plain",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8}},
            "has no long_factor, and longrope needs it",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
            "rope_scaling.long_factor: expected a list of 8 numbers above 0, got [1.0,",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "rope_scaling.high_freq_factor: expected more than low_freq_factor (4), got 4",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "truncate": "no"}},
            "rope_scaling.truncate: expected true or false",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_type": "linear", "factor": 2}},
            "rope_scaling: expected what rope_parameters says, or one of the two alone",
        ),
        ({"quantization_config": ["int8"]}, "quantization_config: expected a JSON object"),
        ({"quantization_config": "awq"}, 'quantization_config: expected a JSON object, got "awq"'),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}},
            "quantization_config.bnb_4bit_quant_type: expected one of nf4, fp4",
        ),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_use_double_quant": "yes"}},
            "quantization_config.bnb_4bit_use_double_quant: expected true or false",
        ),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}},
            "quantization_config.bnb_4bit_quant_storage: expected one of uint8",
        ),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path, changes, expected):
    assert expected in refusal(tmp_path, CONFIG | changes)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "awq"},
        {"quant_method": "fp8", "load_in_4bit": True},
        {"load_in_4bit": "true"},
        {"quant_method": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True},
    ],
)
def test_other_quantisations_are_refused(tmp_path, quantization):
    assert "by the quantization_config of its config.json" in refusal(
        tmp_path, CONFIG | {"quantization_config": quantization}
    )


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "7", "null", '{"model_type": "llama"', DEEP, f'{{"rope_scaling": {DEEP}}}']
)
def test_what_is_no_json_object_is_one_line(tmp_path, text):
    assert refusal(tmp_path, text).startswith((" can't be read: ", ": expected a JSON object, got "))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_another_encoding_is_one_line(tmp_path, encoding):
    (tmp_path / "config.json").write_bytes(json.dumps(CONFIG).encode(encoding))
    with pytest.raises(UserError, match=r"^model.base: base: config.json can't be read: [^\n]+$"):
        read_config("base", tmp_path / "config.json")


def test_a_huge_one_is_not_read(tmp_path):
    assert "bytes, expected at most 10,000,000" in refusal(tmp_path, " " * LARGEST_FILE + json.dumps(CONFIG))


def test_odd_values_of_what_is_not_used_are_no_hindrance(tmp_path):
    """Every other key of LlamaConfig, and those that transformers takes from anywhere."""
    from transformers import LlamaConfig

    plain = read(tmp_path, CONFIG)
    known = {field.name for field in dataclasses.fields(LlamaConfig)}
    others = {
        "torch_dtype",
        "id2label",
        "num_labels",
        "problem_type",
        "per_layer_config",
        "pad_token_id",
        "layer_types",
    }
    for key in sorted((known | others) - {*SIZES, *OF_LLAMA, "architectures"}):
        for value in (*ODD, None):
            assert read(tmp_path, CONFIG | {key: value}) == plain


CODE = {
    "_attn_implementation": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "_attn_implementation_internal": "evil/k",
    "experts_implementation": "evil/kernel",
    "_experts_implementation": "evil/kernel",
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "evil/kernel"},
    "fusion_config": {"a": True},
    "distributed_config": {"tp_plan": "auto"},
    "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    "trust_remote_code": True,
    "custom_pipelines": {"text-generation": {"impl": "evil.Evil"}},
    "custom_generate": "evil/repo",
    "transformers_weights": "other.safetensors",
    "tokenizer_class": "Evil",
    "base_model_tp_plan": {"a": "b"},
    "disable_mmap": True,
    "per_layer_config": {"0": {"hidden_act": "gelu"}},
    "name_or_path": "evil/repo",
}
"""Keys by which transformers, of one version or another, loads code, kernels or other files."""


def test_nothing_that_names_code_gets_through(tmp_path):
    config = read(tmp_path, CONFIG | CODE | {"quantization_config": {"load_in_4bit": True, "modules": "evil/kernel"}})
    assert "evil" not in json.dumps(config)
    assert "evil" not in for_transformers(config).to_json_string()


ROPES = [
    {"rope_type": "default"},
    {"type": "linear", "factor": 4},
    {"rope_type": "dynamic", "factor": 2.0},
    {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "finetuned": True, "attention_factor": 1},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2] * 8, "note": "of its own"},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 5e5,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.get("rope_type") or rope["type"])
def test_each_kind_of_rope_is_transformers_own(tmp_path, rope, key, recwarn):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = read(tmp_path, CONFIG | {key: rope, "rope_theta": 20000})
    raw = {name: value for name, value in rope.items() if name not in ("finetuned", "note")}
    raw |= {"attention_factor": 1.0} if "attention_factor" in raw else {}
    expected = LlamaRotaryEmbedding(LlamaConfig.from_dict(CONFIG | {key: raw, "rope_theta": 20000}))
    found = LlamaRotaryEmbedding(for_transformers(config))
    assert torch.equal(found.inv_freq, expected.inv_freq)
    assert (found.attention_scaling, found.rope_type) == (expected.attention_scaling, expected.rope_type)
    assert rules_of(config)[1:3] == (rope.get("rope_theta", 20000.0), rope_of(config).kind)
    assert not recwarn


def test_activations_are_transformers_own():
    from transformers.activations import ACT2FN

    assert all(not [*ACT2FN[name].parameters()] for name in ACTIVATIONS)


def test_what_is_missing_is_as_transformers_has_it(tmp_path):
    from transformers import LlamaConfig

    found, expected = for_transformers(read(tmp_path, CONFIG)), LlamaConfig.from_dict(CONFIG)
    assert found.to_dict() == expected.to_dict()


def test_a_base_of_an_early_conversion_is_a_llama(tmp_path):
    config = CONFIG | {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    assert read(tmp_path, config)["architectures"] == ["LlamaForCausalLM"]


def test_a_base_s_context_is_there_where_config_json_has_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    assert find_base(str(tmp_path), weights=False).context_tokens == 2048
