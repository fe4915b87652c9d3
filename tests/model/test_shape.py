"""What follows from a config.json: the published parameter counts of Llama 2, and those of a real module."""

import pytest

from lit_qlora.model.lora import adapter_parameters
from lit_qlora.model.shape import Shape, known_config

LLAMA2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
LLAMA2_13B = LLAMA2_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "num_hidden_layers": 40,
}
LLAMA2_70B = LLAMA2_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
}


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [(LLAMA2_7B, 6_738_415_616), (LLAMA2_13B, 13_015_864_320), (LLAMA2_70B, 68_976_648_192)],
)
def test_published_counts(config, num_parameters):
    assert Shape.of(config).num_parameters == num_parameters


def test_quantised_weights_of_7b():
    assert Shape.of(LLAMA2_7B).num_quantized == 6_476_005_376


@pytest.mark.parametrize(
    ("rank", "targets", "expected"),
    [(16, "all-linear", 39_976_960), (64, ["q_proj", "v_proj"], 33_554_432), (16, ["q_proj", "v_proj"], 8_388_608)],
)
def test_lora_weights_of_7b(rank, targets, expected):
    assert Shape.of(LLAMA2_7B).num_lora(rank, targets) == expected


def test_heads_stand_in_for_missing_key_value_heads():
    config = {name: value for name, value in LLAMA2_7B.items() if name != "num_key_value_heads"}
    assert Shape.of(config) == Shape.of(LLAMA2_7B)
    assert Shape.of(config | {"num_key_value_heads": None}) == Shape.of(LLAMA2_7B)


def test_a_head_width_of_its_own():
    shape = Shape.of(LLAMA2_70B | {"head_dim": 64})
    assert shape.linears["q_proj"] == (8192, 4096)
    assert shape.linears["k_proj"] == (8192, 512)
    assert shape.linears["o_proj"] == (4096, 8192)


def test_tied_embeddings_count_once():
    tied = Shape.of(LLAMA2_7B | {"tie_word_embeddings": True})
    assert tied.num_parameters == 6_738_415_616 - 32000 * 4096


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NousResearch/Llama-2-7b-hf", LLAMA2_7B),
        ("meta-llama/Llama-2-7b-chat-hf", LLAMA2_7B),
        ("meta-llama/Llama-2-13b-hf", LLAMA2_13B),
        ("NousResearch/Llama-2-70b-hf", LLAMA2_70B),
    ],
)
def test_sizes_known_without_asking(name, expected):
    config = known_config(name)
    assert Shape.of(config) == Shape.of(expected)
    assert config["model_type"] == "llama"


@pytest.mark.parametrize("name", ["demo", "meta-llama/Llama-2-7b", "someone/Llama-2-7b-hf", "meta-llama/Llama-2-8b-hf"])
def test_sizes_of_others_are_not_guessed(name):
    assert known_config(name) is None


def test_what_a_fingerprint_is_taken_over_stays_the_same():
    assert repr(Shape.of(LLAMA2_7B)).endswith("'up_proj': (4096, 11008), 'down_proj': (11008, 4096)})")
    assert Shape.of(LLAMA2_7B).num_heads == 32


@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_count_of_a_real_module(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=172,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=tied,
    )
    counted = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    assert Shape.of(config.to_dict()).num_parameters == counted


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"], "k_proj"])
def test_equals_the_count_of_a_real_adapter(make_model, tiny, targets):
    counted = sum(weight.numel() for weight in adapter_parameters(make_model(rank=3, target_modules=targets)).values())
    assert tiny.shape.num_lora(3, targets) == counted
