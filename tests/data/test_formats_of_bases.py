"""Every format on every kind of tokenizer: the ids of `apply_chat_template`, learned answers with their ends, stops."""

import json
import os

import pytest

from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.data.chat_template import check_template, messages, write_tokenizer
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.data.encode import Encoder
from lit_qlora.data.templates import read_template
from lit_qlora.data.tokenizer import load_tokenizer, stop_ids, template_beside
from lit_qlora.errors import UserError
from lit_qlora.text.conversation import Conversation
from lit_qlora.text.formats import built_in, make_format
from tests.data.talks import said
from tests.llama3_like import BOS, END_OF_TEXT, EOT, TEMPLATE, write_base

TALKS = [
    said("Who goes everywhere with Silas?", "Nobody."),
    said("a", "b", "c d", "e\nf", "g"),
    said("漢字 und Größe 🙂", "ça va?", "x = [1]\n\tif x:  # two  spaces\n\n\nend", "print(1)", "and?"),
    said("Be brief: 12345 + 6", "  Yes.\n", "Why?", system="You count."),
]


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("smollm2", "llama2-tokenizer")]
"""Seconds for each of their tests."""


@pytest.fixture(scope="module", params=["llama3-like", "demo", *LARGE])
def base(request, tmp_path_factory):
    """A folder with a tokenizer, or the demo."""
    if request.param == "llama3-like":
        return str(write_base(tmp_path_factory.mktemp("llama3")))
    if request.param == "smollm2":
        if not (folder := os.environ.get("LIT_QLORA_SMOLLM2")):
            pytest.skip("LIT_QLORA_SMOLLM2 names no folder")
        return folder
    return "demo" if request.param == "demo" else str(request.getfixturevalue("real") / request.param)


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def opened(talk: Conversation) -> list[Conversation]:
    return [Conversation(talk.turns[:count], talk.system) for count in range(1, len(talk.turns) + 1, 2)]


def formats(tokenizer) -> dict[str, str]:
    """The built-in ones that the tokenizer can write, and its own."""
    own = {"base": template_beside(tokenizer)} if template_beside(tokenizer) else {}
    has_eot = "<|eot_id|>" in tokenizer.get_vocab()
    return {name: source for name, source in built_in().items() if name != "llama3" or has_eot} | own


def test_each_format_has_the_ids_and_the_text_of_apply_chat_template(base, tokenizer):
    """Training has the same prompt, then the answer and its end, which alone are learned."""
    is_byte_level = tokenizer.convert_tokens_to_ids("▁") in (None, tokenizer.unk_token_id)
    for source in formats(tokenizer).values():
        encoder = Encoder(tokenizer, 4096, prompt_format=make_format(source))
        end = encoder.stop_ids[0]
        for talk in TALKS:
            whole = Conversation(talk.turns[: len(talk.turns) // 2 * 2], talk.system)
            (example,) = encoder.examples([whole])
            learned = [number for number in example.labels if number != IGNORE_INDEX]
            assert learned.count(end) == len(whole.turns) // 2 and learned[-1] == end == example.input_ids[-1]
            for prompt in opened(talk):
                # As training has them.
                rows = [row | {"content": row["content"].strip()} for row in messages(prompt)]
                options = {"chat_template": source, "add_generation_prompt": True}
                text = tokenizer.apply_chat_template(rows, **options, tokenize=False)
                assert "".join(piece.text for piece in encoder.prompt_format.pieces(prompt)) == text
                ids = encoder.prompt(prompt)
                if is_byte_level:
                    assert tokenizer.apply_chat_template(rows, **options, return_dict=False) == ids
                if len(prompt.turns) < len(whole.turns):
                    assert example.input_ids[: len(ids)] == ids
                    assert example.labels[len(ids)] == example.input_ids[len(ids)] != IGNORE_INDEX
                    assert example.labels[len(ids) - 1] == IGNORE_INDEX


def test_what_is_published_gives_the_ids_of_training_in_each_format(base, tokenizer, tmp_path):
    for name, source in [("llama2", None), *formats(tokenizer).items()]:
        if name == "llama2" and base != "demo" and "llama2" not in base:
            continue  # which writes an answer's space as a token of Llama 2's
        folder = tmp_path / name
        folder.mkdir()
        encoder = Encoder(tokenizer, 512, prompt_format=make_format(source, "Be kind."))
        write_tokenizer(folder, encoder, 512)
        check_template(folder, encoder, [prompt for talk in TALKS for prompt in opened(talk)])
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        ends = encoder.stop_ids
        assert generation == {
            "bos_token_id": encoder.bos_id,
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": encoder.eos_id,
        }
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == config["chat_template"]


def test_the_ids_of_llama_3_s_format_literally(tmp_path):
    tokenizer = load_tokenizer(str(write_base(tmp_path)))
    encoder = Encoder(tokenizer, 512, prompt_format=make_format(built_in()["llama3"]))
    letter = tokenizer.convert_tokens_to_ids

    def header(role):
        return [258, *map(letter, role), 259, letter("Ċ"), letter("Ċ")]

    (example,) = encoder.examples([said("a", "b", "c", "d")])
    question = [BOS, *header("user"), letter("a"), EOT, *header("assistant")]
    second = [*header("user"), letter("c"), EOT, *header("assistant")]
    assert example.input_ids == [*question, letter("b"), EOT, *second, letter("d"), EOT]
    hidden = [IGNORE_INDEX]
    assert example.labels == [
        *hidden * len(question), letter("b"), EOT, *hidden * len(second), letter("d"), EOT,
    ]  # fmt: skip
    own = Encoder(tokenizer, 512, prompt_format=make_format(TEMPLATE))
    assert [*own.examples([said("a", "b", "c", "d")])] == [example]


@pytest.mark.parametrize(
    ("stops", "template", "expected"),
    [
        (END_OF_TEXT, "llama3", [EOT, END_OF_TEXT]),
        ([END_OF_TEXT, EOT], "llama3", [EOT, END_OF_TEXT]),
        ([END_OF_TEXT, EOT], "llama2", [END_OF_TEXT, EOT]),
        (EOT, "chatml", [END_OF_TEXT, EOT]),
        ([END_OF_TEXT, BOS, 5, 99999, None, {}, 261], "chatml", [END_OF_TEXT, 261]),  # BOS ends nothing, nor do words
        (None, "chatml", [END_OF_TEXT]),
    ],
)
def test_an_answer_ends_at_what_is_learned_at_eos_and_at_what_the_base_says(tmp_path, stops, template, expected):
    write_base(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
    encoder = Encoder(load_tokenizer(str(tmp_path)), 512, prompt_format=make_format(read_template(template)))
    assert encoder.stop_ids == expected
    for end in expected:
        assert encoder.answer([65, end]) == (encoder.decode([65]), True)
    assert encoder.answer([65, 66]) == (encoder.decode([65, 66]), False)


def test_a_special_token_may_be_the_text_that_ends_an_answer(tmp_path):
    """No answer's text has it, so that it would never be found there."""
    write_base(tmp_path)
    encoder = Encoder(load_tokenizer(str(tmp_path)), 512)
    ids, stop = [65, 66, EOT, 67, 68], ["<|eot_id|>", "###"]
    assert EOT not in encoder.stop_ids
    ends = encoder.is_over(stop)
    assert [ends(ids[:size]) for size in (2, 3)] == [False, True]
    assert encoder.answer(ids, stop) == encoder.answer(ids[:3], stop) == (encoder.decode([65, 66]), True)
    assert encoder.answer(ids, ["###"])[1] is False


def test_without_a_generation_config_eos_alone_ends_an_answer(tmp_path):
    write_base(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert stop_ids(load_tokenizer(str(tmp_path))) == []
    (tmp_path / "generation_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        stop_ids(load_tokenizer(str(tmp_path)))


# data.template


def test_base_is_the_base_s_own_template(tmp_path):
    folder = str(write_base(tmp_path))
    assert read_template("base", folder) == TEMPLATE
    assert read_template("llama2") is None
    data = ChatDataModule(template="base", tokenizer=folder, system="S")
    assert data.encoder.prompt_format.record()["template"] == TEMPLATE
    assert data.prompt_format.system == "S"
    line = data.describe()[0]
    assert line.startswith("prompts by data.template (sha256 ")
    plain = ChatDataModule(tokenizer=folder)
    assert "the base has a chat template of its own, which data.template base takes" in plain.describe()[0]


def test_of_several_templates_the_default_one_is_meant(tmp_path):
    write_base(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    file = tmp_path / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": TEMPLATE}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": several}), encoding="utf-8")
    assert read_template("base", str(tmp_path)) == TEMPLATE


def test_a_base_without_a_template_is_refused_with_what_to_take():
    with pytest.raises(UserError) as caught:
        read_template("base", "demo")
    assert caught.value.option == "data.template"
    assert "has no chat template of its own" in caught.value.problem
    assert caught.value.remedy == f"take one of llama2, {', '.join(built_in())}, or a file with one"


def test_a_template_with_a_clock_takes_its_own_date_in_training_and_where_it_is_published(tmp_path):
    """Other programs would write today's date into each prompt, as with Llama 3.2's template."""
    source = (
        "{{ bos_token }}{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% else %}"
        "{% set date = '26 Jul 2024' %}{% endif %}{{ 'Today: ' + date + '\n' }}"
        "{% for m in messages %}{{ '[' + m.role + ']\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
    )
    encoder = Encoder(load_tokenizer(str(write_base(tmp_path))), 512, prompt_format=make_format(source))
    assert "Today: 26 Jul 2024\n[user]\na" in encoder.tokenizer.decode(encoder.prompt(said("a")))
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(out, encoder, 512)
    check_template(out, encoder, [said("a"), said("a", "b", "c")])
    assert (
        "strftime_now"
        not in Encoder(encoder.tokenizer, 512, prompt_format=make_format(TEMPLATE)).prompt_format.chat_template()
    )
