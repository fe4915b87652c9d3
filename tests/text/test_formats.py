"""A prompt format, whichever it is: what is recorded of it makes it again, and what was altered does not."""

import importlib.util
import re
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import pytest

from lit_qlora.data.templates import read_template
from lit_qlora.errors import UserError
from lit_qlora.text import formats
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.text.formats import SpecialTokens, built_in, from_record, make_format, names

CHATML = (Path(__file__).parents[1] / "templates" / "chatml.jinja").read_text(encoding="utf-8")
RECORDS = {
    "llama2": ({}, {"prompt_format": "llama2-chat"}),
    "llama2 with a system text": ({"system": "S"}, {"prompt_format": "llama2-chat", "system": "S"}),
    "a template": (
        {"template": "{{ 'ä' }}", "system": "S"},
        {
            "prompt_format": "jinja",
            "template": "{{ 'ä' }}",
            "template_sha256": "7822779aa2659c3038839cdca8c14c276eee968e24e09a86ed47aa61a7ed20ce",
            "system": "S",
        },
    ),
}


@pytest.mark.parametrize(("options", "record"), RECORDS.values(), ids=RECORDS)
def test_a_record_makes_the_format_again(options, record):
    found = make_format(**options)
    assert [*found.record().items()] == [*record.items()]
    again = from_record(record, "adp", "lit_qlora.json")
    assert again.record() == record and again.identity == found.identity and again.cache_key == found.cache_key


@pytest.mark.parametrize(
    ("changes", "option", "words"),
    [
        ({"prompt_format": "alpaca"}, None, "'alpaca', this version knows 'llama2-chat' and 'jinja'"),
        ({"template": "{{ 'a' }}"}, None, "template was altered: expected sha256 7822779aa265"),
        ({"template": None}, None, "is a Jinja template, and there is none"),
        ({"template_sha256": None}, None, "is a Jinja template, and there is none"),
        ({"template": "\ud800"}, "template", "half a character"),
        ({"system": "\ud800"}, "system", "half a character"),
        ({"system": ["S"] * 999}, "system", "expected a text, got ['S', 'S'"),
        ({"prompt_format": []}, "prompt_format", "expected a text, got []"),
    ],
)
def test_an_altered_record_is_refused_with_its_place(changes, option, words):
    with pytest.raises(UserError) as caught:
        from_record(RECORDS["a template"][1] | changes, "adp", "f.json")
    assert caught.value.option == option and words in caught.value.problem
    assert str(caught.value).startswith("adp: ") and len(str(caught.value)) < 240


def test_a_template_is_called_by_its_place():
    with pytest.raises(UserError, match="line 2 is no valid Jinja") as caught:
        make_format("\n{{ 1")
    assert (caught.value.place, caught.value.option) == (None, "data.template")
    record = {"prompt_format": "jinja", "template": "\n{{ 1", "template_sha256": sha256(b"\n{{ 1").hexdigest()}
    with pytest.raises(UserError, match="line 2 is no valid Jinja") as caught:
        from_record(record, "adp", "f.json")
    assert (caught.value.place, caught.value.option) == ("adp: f.json", "template")


@pytest.mark.parametrize("options", [{}, {"template": CHATML}], ids=["llama2", "chatml"])
def test_a_system_text_stands_in_where_a_conversation_brings_none(options):
    tokens, asked = SpecialTokens(), Conversation((Turn("user", "a"),))
    mine, plain = make_format(**options, system="S").of(tokens), make_format(**options).of(tokens)
    assert mine.pieces(asked) == plain.pieces(Conversation(asked.turns, "S"))
    for own in ("", "T"):
        brought = Conversation(asked.turns, own)
        assert mine.pieces(brought) == plain.pieces(brought)


@pytest.mark.parametrize("options", [{}, {"template": CHATML}], ids=["llama2", "chatml"])
@pytest.mark.parametrize("place", ["turn 1", "turn 2", "the system text"])
def test_half_a_character_is_refused(options, place):
    said = [("\ud800" if name == place else "a") for name in ("the system text", "turn 1", "turn 2")]
    conversation = Conversation((Turn("user", said[1]), Turn("assistant", said[2])), said[0])
    with pytest.raises(ValueError, match=f"^{place} holds bytes that are no UTF-8, or half a character"):
        make_format(**options).of(SpecialTokens()).pieces(conversation)
    for name in ("system", "template"):
        with pytest.raises(UserError, match=rf"^data\.{name}: .* half a character"):
            make_format(**{name: "{{ '\ud800' }}"})


def test_a_system_text_that_forges_is_refused():
    with pytest.raises(
        UserError, match=r"^data\.system: expected .* without '<<SYS>>', which the Llama 2 format writes"
    ):
        make_format(system="<<SYS>> x").check()
    mine = make_format(CHATML, "x<|im_start|>user")
    mine.check_system()  # its own texts hang on the tokenizer
    with pytest.raises(UserError, match=r"^data\.system: .* without '<\|im_start\|>user', which data\.template writes"):
        mine.of(SpecialTokens()).check()


def test_the_modelfile():
    text = make_format(system="Be kind.").modelfile(Path("x/mine.gguf"))
    assert text.startswith('FROM ./mine.gguf\nTEMPLATE """{{- $later := false }}')
    assert text.endswith('{{- end }}"""\nSYSTEM """Be kind."""\n')
    with pytest.raises(ValueError, match="three quotes"):
        make_format(system='a """ b').modelfile(Path("mine.gguf"))


OTHER_TOKENS = SpecialTokens("<|im_start|>", "<|im_end|>", ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))


LLAMA_3 = SpecialTokens(
    "<|begin_of_text|>", "<|end_of_text|>",
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)  # fmt: skip
NO_BOS = SpecialTokens("", "<|endoftext|>", ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
OWN_TOKENS = {"llama3": ["llama3"]}
"""Formats that write special tokens other than BOS and EOS, and the tokenizers that have them."""
TOKENS = {"llama": SpecialTokens(), "smollm2": OTHER_TOKENS, "llama3": LLAMA_3, "qwen": NO_BOS}


@pytest.mark.parametrize("name", built_in())
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_template_that_comes_along_holds_all_kinds_of_conversations(name, tokens, expect_error):
    for system in (None, "Be brief."):
        one = make_format(read_template(name), system).of(TOKENS[tokens])
        if tokens in OWN_TOKENS.get(name, TOKENS):
            one.check()
            continue
        others = ", ".join(other for other in names() if other != name)
        expect_error(one.check, name, "special token", others, option="data.template")


TALK = Conversation((Turn("user", "a"), Turn("assistant", " b\n"), Turn("user", "c"), Turn("assistant", "d")))
WRITTEN = {  # what is not learned | what is
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n|b<|eot_id|>|<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>"
    "assistant<|end_header_id|>\n\n|d<|eot_id|>",
    "chatml": "<|begin_of_text|><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n|b<|end_of_text|>|\n<|im_start|>"
    "user\nc<|im_end|>\n<|im_start|>assistant\n|d<|end_of_text|>",
    "alpaca": "<|begin_of_text|>Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\na\n\n### Response:\n|b<|end_of_text|>|\n\n### Instruction:\nc\n\n"
    "### Response:\n|d<|end_of_text|>",
    "vicuna": "<|begin_of_text|>A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions. USER: a ASSISTANT:| b<|end_of_text|>|USER: c "
    "ASSISTANT:| d<|end_of_text|>",
    "zephyr": "<|begin_of_text|><|user|>\na<|end_of_text|>\n<|assistant|>\n|b<|end_of_text|>|\n<|user|>\nc"
    "<|end_of_text|>\n<|assistant|>\n|d<|end_of_text|>",
    "plain": "<|begin_of_text|>a| b<|end_of_text|>|<|begin_of_text|>c| d<|end_of_text|>",
}
SYSTEM = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user",
    "chatml": "<|begin_of_text|><|im_start|>system\nS<|im_end|>\n<|im_start|>user\na",
    "alpaca": "<|begin_of_text|>S\n\n### Instruction:\na\n\n",
    "vicuna": "<|begin_of_text|>S USER: a ASSISTANT:",
    "zephyr": "<|begin_of_text|><|system|>\nS<|end_of_text|>\n<|user|>\na",
    "plain": "<|begin_of_text|>S\n\na b<|end_of_text|><|begin_of_text|>c",
}


@pytest.mark.parametrize("name", built_in())
def test_what_each_format_looks_like(name):
    one = make_format(read_template(name)).of(LLAMA_3)
    runs = groupby(one.pieces(TALK), lambda piece: piece.is_answer)
    assert (
        "|".join("".join(piece.text for piece in run) for _, run in runs).replace("<||", "<|").replace("||>", "|>")
        == (WRITTEN[name])
    )
    pieces = one.pieces(Conversation(TALK.turns, "S"))
    assert "".join(piece.text for piece in pieces).startswith(SYSTEM[name])
    assert one.end_of_turn == ("<|eot_id|>" if name == "llama3" else "<|end_of_text|>")


def test_the_page_shows_what_each_format_looks_like():
    page = (Path(__file__).parents[2] / "docs" / "prompt-formats.md").read_text(encoding="utf-8")
    talk = Conversation((Turn("user", "Who is Jonas?"), Turn("assistant", "A baker.")))
    for name in ("llama2", *built_in()):
        one = make_format(read_template(name)).of(LLAMA_3 if name == "llama3" else SpecialTokens())
        text = "".join(piece.text for piece in one.pieces(talk))
        assert f"```text\n{text}\n```\n" in page
        assert f"\n| `{name}`" in page


def test_every_built_in_format_is_written_out_above():
    assert {*WRITTEN} == {*SYSTEM} == {*built_in()} and names() == ["llama2", *built_in(), "base"]


def test_an_answer_may_end_in_another_special_token_than_eos():
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eot_id|>{% endfor %}"
    source += "{% if add_generation_prompt %}<assistant>{% endif %}"
    one = make_format(source).of(LLAMA_3)
    one.check()
    assert [piece.text for piece in one.pieces(TALK) if piece.is_answer] == ["b", "<|eot_id|>", "d", "<|eot_id|>"]
    assert one.end_of_turn == "<|eot_id|>" and one.writes("<|eot_id|>")
    with pytest.raises(UserError, match=r"is to end in EOS, .* never learns to stop"):
        make_format(source).of(SpecialTokens()).check()
    two = source.replace("<|eot_id|>", "{{ eos_token if loop.index == 4 else '<|eot_id|>' }}")
    with pytest.raises(UserError, match=r"data\.template: .*answers end in <\|end_of_text\|> and in <\|eot_id\|>"):
        make_format(two).of(LLAMA_3).check()
    opened = source.replace("<|eot_id|>", "{% if m.role == 'assistant' %}<|begin_of_text|>{% endif %}")
    with pytest.raises(UserError, match="is to end in EOS"):  # BOS begins a text, and ends none
        make_format(opened).of(LLAMA_3).check()


def test_a_base_with_a_template_of_its_own_is_named_where_llama_2_s_format_is_taken():
    note = "prompts in the Llama 2 format; the base has a chat template of its own, which data.template base takes"
    one = make_format().of(LLAMA_3)
    assert one.notes() == [] and one.notes(built_in()["llama3"]) == [note]
    assert one.notes("{{ this_fails() }}") == one.notes("{% if") == [note]
    assert (
        make_format(built_in()["llama3"])
        .of(LLAMA_3)
        .notes(built_in()["llama3"])[0]
        .startswith("prompts by data.template llama3 (")
    )
    llama_2 = (Path(__file__).parents[1] / "templates" / "llama2.jinja").read_text(encoding="utf-8")
    for own in (llama_2, make_format().chat_template(), make_format(system="S").chat_template()):
        assert make_format().of(SpecialTokens()).notes(own) == []


def test_a_template_that_refuses_what_could_forge_is_taken():
    """Templates written by this project refuse so: a merged model is a base, too."""
    for system in (None, "S"):
        for published in (make_format(None, system), make_format(CHATML, system)):
            own = published.of(SpecialTokens())
            again = make_format(own.chat_template()).of(SpecialTokens())
            again.check()
            for talk in (TALK, Conversation(TALK.turns[:1]), Conversation(TALK.turns, "T")):
                texts = ["".join(piece.text for piece in one.pieces(talk)) for one in (own, again)]
                assert texts[0].replace(" ", "") == texts[1].replace(" ", "")


def test_chatml_has_one_bos_and_ends_answers_in_eos():
    asked = Conversation((Turn("user", "a"), Turn("assistant", "b")))
    for tokens, start in ((SpecialTokens(), "<s><|im_start|>"), (OTHER_TOKENS, "<|im_start|>")):
        pieces = make_format(read_template("chatml")).of(tokens).pieces(asked)
        assert "".join(piece.text for piece in pieces) == (
            f"{start}user\na<|im_end|>\n<|im_start|>assistant\nb{tokens.eos}"
        )


def test_a_new_template_that_comes_along_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "mine.jinja").write_text("{{ eos_token }}", encoding="utf-8")
    monkeypatch.setattr(formats, "TEMPLATES", tmp_path)
    assert read_template("mine") == "{{ eos_token }}"
    with pytest.raises(UserError, match=r"^data\.template: chatml: expected llama2, mine, base, or a file"):
        read_template("chatml")


def test_special_tokens_of_the_tokenizer_are_marks_however_it_spells_them():
    tokens = SpecialTokens("<a>", "<b>", ("<a>", "<b>", "<my pad>", "x"))
    marks = make_format().of(tokens).marks
    assert {"<a>", "<b>", "<my pad>", "</s>", "<pad>"} <= {*marks}
    assert "x" not in marks


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def by_ollama(one, conversation, adds_bos=True):
    """What the Modelfile makes of a conversation, after the BOS that llama.cpp adds to most."""
    spec = importlib.util.spec_from_file_location("go_template", Path(__file__).with_name("go_template.py"))
    go_template = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(go_template)
    template = re.search(r'TEMPLATE """(.*?)"""\n', one.modelfile(Path("x.gguf"), (), adds_bos), re.DOTALL)[1]
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    rows = [*system, *({"role": turn.role, "content": turn.content} for turn in conversation.turns)]
    return one.spelled.bos * adds_bos + go_template.render(template, conversation.system or "", rows)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("tokens", [LLAMA_3, NO_BOS], ids=["llama3", "qwen"])
def test_ollama_writes_the_prompts_of_training(name, tokens):
    source = SMOLLM2 if name == "base" else read_template(name)
    if name == "llama3" and tokens is NO_BOS:
        return
    for system in (None, "Be brief."):
        one = make_format(source).of(OTHER_TOKENS if name == "base" else tokens)
        for count in (1, 3, 5):
            turns = [Turn(("user", "assistant")[place % 2], f"{place}: a\nb") for place in range(count)]
            asked = Conversation(tuple(turns), system)
            text = "".join(piece.text for piece in one.pieces(asked))
            if name == "llama2":  # an answer's space is its tokenizer's
                text = text.replace("[/INST]1", "[/INST] 1").replace("[/INST]3", "[/INST] 3")
            assert by_ollama(one, asked) == by_ollama(one, asked, adds_bos=False) == text


def test_a_bos_that_prompts_do_not_begin_with_is_in_no_modelfile():
    one = make_format(
        "{% for m in messages %}<{{ m.role }}>{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    ).of(LLAMA_3)
    assert one.modelfile(Path("x.gguf"), (), adds_bos=False) == one.modelfile(Path("x.gguf"))


def test_ollama_stops_where_answers_end():
    one = make_format(read_template("llama3")).of(LLAMA_3)
    text = one.modelfile(Path("x.gguf"), ["<|eot_id|>", "<|end_of_text|>"])
    assert text.endswith('PARAMETER stop "<|eot_id|>"\nPARAMETER stop "<|end_of_text|>"\n')
    assert "PARAMETER" not in make_format().of(SpecialTokens()).modelfile(
        Path("x.gguf"), ["</s>"]
    )  # which the weights name


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content + eos_token }}"
        "{% if loop.index == 2 %}!{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
        "{% for m in messages %}{{ '{{' + m.role + '}}' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}",
    ],
)
def test_prompts_that_go_can_t_write_have_no_modelfile(source):
    one = make_format(source).of(SpecialTokens())
    one.check()
    with pytest.raises(ValueError, match="which Ollama's templates can't have"):
        one.modelfile(Path("x.gguf"))
