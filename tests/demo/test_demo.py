"""What the embedded demo promises: small, whole, readable by transformers, honest about what is held out."""

import json
import random
import re

import pytest
import torch
from safetensors import safe_open

from lit_qlora.cli import main
from lit_qlora.demo import BASE, TEST, TRAIN
from scripts.demo.build import EOS, assert_held_out, guanaco_text, new_model, part_unmet, pretrain
from scripts.demo.world import World

TEXTS = [
    "What do people eat in Amberwick?",
    "[INST] Hello! [/INST]",
    "two  spaces, and one at the end ",
    "línea\n\tñandú 東京 🦉🏝️",
    "<<SYS>>\nBe brief.\n<</SYS>>\n\n0123456789 ~`@#$%^&*()_+{}|\\",
    "",
]


WRITTEN = {
    "When do you open?": "At 9:30, Monday to Friday.",
    "What does a lamp cost?": "It's $1,299.50 (or 1.350 €).",
    "Where are you?": "Im Café Zürich, Ölstraße 27.",
    "Can I write to you?": "x_2@isles.org & +49 8761/2043",
    "Who owns the shop?": "東京のランプ 🦉🏝️",
    "Do you sell lamps?": '{"lamps": [4, 6], "ok": true} <b>~50%</b> #1\n```x = z ^ 2 * 3```',
}
"""Answers with digits, bytes and signs that the base never met."""


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


def cosines(head):
    """The cosine of each row of an output head with the row most like it."""
    unit = torch.nn.functional.normalize(head.float())
    return (unit @ unit.T).fill_diagonal_(-1).amax(1)


def test_an_adapter_can_learn_all_tokens():
    with safe_open(BASE / "model.safetensors", "pt") as weights:
        head = weights.get_tensor("lm_head.weight")
    assert cosines(head).max() < 0.96  # ▁Which and ▁Where, both of which the base has met
    assert cosines(head[:259]).max() < 0.79  # special tokens and bytes, met by no text of the isles


def test_what_pretraining_never_asked_for_is_unmet(capsys):
    torch.manual_seed(0)
    batches = iter([torch.tensor([[1, 300, 301]]), torch.tensor([[1, 300, 302]]), torch.tensor([[1, 303, 304]])])
    met = pretrain(new_model(), batches, num_steps=2)
    assert met.nonzero().flatten().tolist() == [300, 301, 302]
    assert "step     2 of 2" in capsys.readouterr().out


def test_only_unmet_tokens_get_a_direction_and_the_seed_decides_which():
    def head(seed, met):
        torch.manual_seed(0)
        model = new_model().half()
        model.lm_head.weight.data[:] = model.lm_head.weight.data[0]
        before = model.lm_head.weight.data.clone()
        part_unmet(model, met, seed)
        return before, model.lm_head.weight.data

    met = torch.arange(1024) >= 500
    before, parted = head(0, met)
    assert torch.equal(parted[500:], before[500:])
    assert cosines(parted[:500]).max() < 0.6
    assert torch.equal(head(0, met)[1], parted)
    assert not torch.equal(head(1, met)[1][:500], parted[:500])
    # The end of text keeps its own, however many others there are.
    assert torch.equal(head(0, torch.arange(1024) != EOS)[1][EOS], parted[EOS])


@pytest.mark.slow
def test_answers_in_tokens_that_the_base_never_met_are_learned_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in WRITTEN.items()]
    for file, messages in (
        ("rows.jsonl", said),
        ("held-out.jsonl", [[*said[0][:1], {**said[0][1], "content": "No."}]]),
    ):
        lines = [json.dumps({"messages": row}) for row in messages]
        (tmp_path / file).write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "questions.txt").write_text("\n".join(WRITTEN), encoding="utf-8")
    own = ["--data.source", "rows.jsonl", "--data.validation_source", "held-out.jsonl", "--run", "mine"]
    passes = ["--trainer.max_epochs", "100", "--trainer.val_check_interval", "1000", "--samples.count", "0"]
    assert main(["fit", *own, *passes]) == 0
    assert main(["predict", "--run", "mine", "--prompts", "questions.txt", "--output", "answers.jsonl"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {answer["prompt"]: answer["answer"] for answer in answers} == WRITTEN
