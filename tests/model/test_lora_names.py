"""What peft's names of LoRA's weights say."""

import pytest

from lit_qlora.model.lora_names import parse_name

AT = "base_model.model.model.layers.12.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (f"{AT}.lora_A.weight", ("model.layers.12.mlp.up_proj", "12", "up_proj", "A")),
        (f"{AT}.lora_B.default.weight", ("model.layers.12.mlp.up_proj", "12", "up_proj", "B")),
        (f"{AT}.lora_B.bias", ("model.layers.12.mlp.up_proj", "12", "up_proj", "B.bias")),
        (f"{AT}.lora_magnitude_vector", ("model.layers.12.mlp.up_proj", "12", "up_proj", "magnitude_vector")),
        ("base_model.model.lm_head.lora_A.weight", ("lm_head", None, None, "A")),
        ("base_model.model.model.embed.lora_embedding_A", ("model.embed", None, None, "embedding_A")),
    ],
)  # fmt: skip
def test_the_parts_of_a_name(name, parts):
    found = parse_name(name)
    assert found and tuple(found[part] for part in ("module", "layer", "linear", "part")) == parts


@pytest.mark.parametrize("name", [AT, f"{AT}.weight", f"{AT[11:]}.lora_A.weight", f"{AT}.lora_A.other.weight"])
def test_other_names(name):
    assert parse_name(name) is None
