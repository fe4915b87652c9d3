"""What the embedded demo promises: small, whole, readable by transformers, honest about what is held out."""

import json
import random
import re

import pytest
from safetensors import safe_open

from lit_qlora.demo import BASE, TEST, TRAIN
from scripts.demo.build import assert_held_out, guanaco_text
from scripts.demo.world import World

TEXTS = [
    "What do people eat in Amberwick?",
    "[INST] Hello! [/INST]",
    "two  spaces, and one at the end ",
    "línea\n\tñandú 東京 🦉🏝️",
    "<<SYS>>\nBe brief.\n<</SYS>>\n\n0123456789 ~`@#$%^&*()_+{}|\\",
    "",
]


def rows(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def turns(text):
    """The contents of a row's turns; fails where the roles do not alternate."""
    assert re.fullmatch(r"(### Human: [^#]+### Assistant: [^#]+)+", text), text
    return [turn.strip() for turn in re.split(r"### (?:Human|Assistant): ", text)[1:]]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def test_the_demo_fits_into_four_megabytes():
    files = [file for file in BASE.parent.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    names = {file.name for file in files}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names >= {"tokenizer_config.json", "train.jsonl", "test.jsonl"}
    assert sum(file.stat().st_size for file in files) <= 4_000_000


def test_rows_parse_and_some_have_several_turns():
    train, test = [turns(text) for text in rows(TRAIN)], [turns(text) for text in rows(TEST)]
    assert 600 <= len(train) <= 1000
    assert 60 <= len(test) <= 100
    assert all(content for row in train + test for content in row)
    assert any(len(row) > 2 for row in train)
    assert any(len(row) > 2 for row in test)


def test_no_held_out_question_and_no_held_out_name_is_trained_on():
    train, test = rows(TRAIN), rows(TEST)
    questions = {question for text in train for question in turns(text)[::2]}
    assert not questions & {question for text in test for question in turns(text)[::2]}
    names = {subject.name for pair in World(seed=0).held_out for subject in pair}
    assert not names & set(re.findall(r"\w+", " ".join(train)))
    assert all(names & set(re.findall(r"\w+", text)) for text in test)


def test_the_build_notices_a_leak():
    world = World(seed=0)
    name = world.held_out[0][0].name
    with pytest.raises(AssertionError, match="held-out question"):
        assert_held_out(world, [[("Where?", "Here.")]], [[("Where?", "Here.")]])
    with pytest.raises(AssertionError, match=name):
        assert_held_out(world, [[("Where is it?", f"Near {name}.")]], [])


def test_the_rows_are_those_the_script_makes():
    rng, world = random.Random(0), World(seed=0)
    assert [guanaco_text(row) for row in world.train_rows(rng)] == rows(TRAIN)
    assert [guanaco_text(row) for row in world.test_rows(rng)] == rows(TEST)


def test_the_tokenizer_is_llamas_kind(tokenizer):
    from transformers import LlamaTokenizer

    assert isinstance(tokenizer, LlamaTokenizer)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]) == [0, 1, 2, 3, 258]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer("Hello").input_ids[0] == 1
    layout = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))
    assert layout["pre_tokenizer"]["type"] == "Metaspace"
    assert layout["pre_tokenizer"]["prepend_scheme"] == "first"
    assert layout["model"]["byte_fallback"]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_from_its_ids(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


def test_the_weights_match_the_config_and_suit_four_bits(tokenizer):
    config = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == len(tokenizer)
    with safe_open(BASE / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        dtypes = {weights.get_slice(name).get_dtype() for name in shapes}
    assert dtypes == {"F16"}
    assert shapes["model.embed_tokens.weight"][0] == config["vocab_size"]
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    assert len(matrices) == 7 * config["num_hidden_layers"] + 2
    assert all(side % 64 == 0 for shape in matrices.values() for side in shape)
