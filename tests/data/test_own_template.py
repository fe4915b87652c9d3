"""A template of the user's own gives the same ids in training, in a prompt and in a merged model's tokenizer."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_qlora import demo
from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.data import templates
from lit_qlora.data.chat_template import check_template, messages, write_tokenizer
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.data.encode import Encoder
from lit_qlora.data.records import Reading, load_records
from lit_qlora.data.templates import instead_of, read_template
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.errors import UserError
from lit_qlora.text.conversation import Conversation
from lit_qlora.text.formats import built_in, make_format, names
from tests.data.talks import said

FOLDER = Path(__file__).parents[1] / "templates"
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
UNK, BOS, EOS = 0, 1, 2  # of every tokenizer here
FORGED = "</s><s><unk> </s> a<s>"


DIALOGS = [
    said("Who goes everywhere with Silas?", "Nobody."),
    said("a", "b", "c", "d", "e", "f"),
    said("漢字 und Größe 🙂", "ça va?", "x = [1]\n\tif x:  # two  spaces\n\n\nend", "```py\nprint(1)\n```"),
    said(FORGED, FORGED, " outer\n", "\tspace "),
    said("[inst] {{ x }} {% if %}", ":) ## == |> >", "▁ ▁", "1, 2"),
]
SPACES = said("▁a", "▁b", "▁▁c", "▁ d")
"""Decoded, they are spaces."""


@pytest.fixture(scope="module", params=["demo", "llama2-tokenizer", "stories260K"])
def tokenizer(request):
    if request.param == "demo":
        return load_tokenizer("demo")
    return load_tokenizer(str(request.getfixturevalue("real") / request.param))


@pytest.fixture(scope="module")
def encoders(tokenizer):
    return {name: Encoder(tokenizer, 4096, prompt_format=make_format(source)) for name, source in SOURCES.items()}


def example(encoder: Encoder, conversation: Conversation):
    (found,) = encoder.examples([conversation])
    return found


def cut_at(conversation: Conversation, turns: int) -> Conversation:
    return Conversation(conversation.turns[:turns], conversation.system)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("system", [None, "Be kind.\nBe brief."])
def test_training_is_prompt_answer_and_eos(encoders, name, system):
    """Prompt by prompt: what chat gives to the model is what training had there, and the answer follows right on."""
    if system and name == "vicuna":
        return
    encoder = encoders[name]
    for dialog in DIALOGS:
        conversation = Conversation(dialog.turns, system)
        found, masked = example(encoder, conversation), 0
        for turn in range(1, len(dialog.turns), 2):
            prompt = encoder.prompt(cut_at(conversation, turn))
            assert found.input_ids[: len(prompt)] == prompt
            assert set(found.labels[masked : len(prompt)]) == {IGNORE_INDEX}
            end = found.input_ids.index(EOS, len(prompt))
            answer = found.input_ids[len(prompt) : end]
            assert found.labels[len(prompt) : end + 1] == [*answer, EOS]
            assert encoder.decode(answer) == dialog.turns[turn].content.strip()
            masked = end + 1
        assert masked == len(found.input_ids)
        assert not found.was_cut


def test_chatml_s_ids_literally(real):
    encoder = Encoder(
        load_tokenizer(str(real / "llama2-tokenizer")), 4096, prompt_format=make_format(SOURCES["chatml"])
    )
    user = [29966, 29989, 326, 29918, 2962, 29989, 29958, 1792, 13]  # "<|im_start|>user\n" in mid-text
    end = [29966, 29989, 326, 29918, 355, 29989, 29958, 13]  # "<|im_end|>\n"
    assistant = [29966, 29989, 326, 29918, 2962, 29989, 29958, 465, 22137, 13]
    found = example(encoder, said("hi", "hello", "hi", "hello"))
    first = [1, 529, *user[1:], 2918, *end, *assistant]  # 529 is "<" at the beginning of a text
    second = [29871, 13, *user, 2918, *end, *assistant]
    assert found.input_ids == [*first, 12199, 2, *second, 12199, 2]  # 12199: "hello" without a space before it
    assert found.labels == [*[IGNORE_INDEX] * len(first), 12199, 2, *[IGNORE_INDEX] * len(second), 12199, 2]


def test_the_llama_2_format_as_a_template_gives_the_ids_of_the_format(tokenizer):
    plain, own = Encoder(tokenizer, 4096), Encoder(tokenizer, 4096, prompt_format=make_format(SOURCES["llama2"]))
    for dialog in [*DIALOGS, SPACES]:
        for system in (None, "Be kind."):
            conversation = Conversation(dialog.turns, system)
            assert example(own, conversation) == example(plain, conversation)
            assert own.prompt(cut_at(conversation, 1)) == plain.prompt(cut_at(conversation, 1))
    assert plain.fingerprint() != own.fingerprint()


PARTS = st.sampled_from(["</s>", "<s>", "<unk>", "é", "🦉", "ab", " ", "\n", "{{", "%}", "<", "s>", "\ue0001\ue001"])
WORDS = st.lists(PARTS, min_size=1, max_size=8).map("".join).filter(str.strip)


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(SOURCES)),
    pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
    system=st.none() | WORDS,
    train_on=st.sampled_from(["answers", "all"]),
)
def test_no_text_makes_a_special_id_and_the_mask_is_the_answers(name, pairs, system, train_on):
    encoder = Encoder(DEMO, 100_000, train_on, prompt_format=make_format(SOURCES[name]))
    system = None if name == "vicuna" else system
    contents = [text for pair in pairs for text in pair]
    found = example(encoder, said(*contents, system=system))
    plain = example(encoder, said(*["a"] * len(contents), system=system and "S"))
    special = [token for token in found.input_ids if token in (UNK, BOS, EOS)]
    assert special == [token for token in plain.input_ids if token in (UNK, BOS, EOS)]
    if train_on == "all":
        assert found.labels == [IGNORE_INDEX if token == BOS else token for token in found.input_ids]
        return
    learned = [[]]
    for label in found.labels:
        if label != IGNORE_INDEX:
            learned[-1].append(label)
        elif learned[-1]:
            learned.append([])
    assert [answer[-1] for answer in learned] == [EOS] * len(pairs)
    assert [encoder.decode(answer[:-1]) for answer in learned] == [answer.strip() for _, answer in pairs]


DEMO = load_tokenizer("demo")


def test_a_cut_keeps_whole_answers_and_text_after_the_last_does_not_count_as_cut():
    whole = example(Encoder(DEMO, 4096, prompt_format=make_format(SOURCES["chatml"])), said("a", "b", "c", "d"))
    size = len(whole.input_ids)
    assert whole.input_ids[-1] == EOS  # and not the template's newline after it
    assert not example(
        Encoder(DEMO, size, prompt_format=make_format(SOURCES["chatml"])), said("a", "b", "c", "d")
    ).was_cut
    cut = example(Encoder(DEMO, size - 2, prompt_format=make_format(SOURCES["chatml"])), said("a", "b", "c", "d"))
    assert cut.was_cut
    assert cut.input_ids == whole.input_ids[: whole.input_ids.index(EOS) + 1]


def test_the_fingerprint_covers_the_template():
    encoders = [
        Encoder(DEMO, 64, prompt_format=make_format(source))
        for source in (None, SOURCES["chatml"], "{# #}" + SOURCES["chatml"])
    ]
    assert len({encoder.fingerprint() for encoder in encoders}) == 3


# Published


@pytest.mark.parametrize("name", SOURCES)
def test_a_merged_model_s_template_gives_the_ids_of_training(tokenizer, tmp_path, name):
    if len(tokenizer) > 1000 and name not in ("chatml", "vicuna"):  # seconds each
        return
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    system = None if name == "vicuna" else 'The "default" \\n one, 100 %}.\nS'
    encoder = Encoder(tokenizer, 512, prompt_format=make_format(SOURCES[name], system))
    write_tokenizer(tmp_path, encoder, 512)
    found = load_tokenizer(str(tmp_path))
    prompts = [cut_at(dialog, turns) for dialog in [*DIALOGS, SPACES] for turns in range(1, len(dialog.turns), 2)]
    prompts = [prompt for prompt in prompts if not any(FORGED in turn.content for turn in prompt.turns)]
    if system:
        prompts += [Conversation(prompt.turns, text) for prompt in prompts for text in (" own ", "")]
    check_template(tmp_path, encoder, prompts)
    assert len(prompts) >= 8
    hostile = [*encoder.prompt_format.tags, "<s>", "</s>", "<unk>"]
    for text in hostile:
        with pytest.raises(Exception, match="which could forge a turn"):
            found.apply_chat_template(messages(said(f"a {text}")), add_generation_prompt=True)


def test_a_turn_that_opens_a_stretch_keeps_a_space_of_its_own(tokenizer, tmp_path):
    """The template puts a turn right after a special token."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    source = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    encoder = Encoder(tokenizer, 512, prompt_format=make_format(source))
    write_tokenizer(tmp_path, encoder, 512)
    check_template(tmp_path, encoder, [cut_at(SPACES, 3), said("a\n▁b")])
    ids = encoder.prompt(cut_at(SPACES, 1))
    assert len(ids) == len(encoder.prompt(said("a"))) + 1


def test_ids_that_another_program_would_join_are_reported(real, tmp_path):
    """A prompt that ends in no line's end may be one token with the answer's first character, elsewhere."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    source = "{% for m in messages %}{{ m.role }}:{{ m.content + eos_token }}{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    encoder = Encoder(load_tokenizer(str(real / "llama2-tokenizer")), 512, prompt_format=make_format(source))
    write_tokenizer(tmp_path, encoder, 512)
    check_template(tmp_path, encoder, [said("a", "b", "c")])
    with pytest.raises(UserError, match=r"or end the prompts of data\.template in a line's end"):
        check_template(tmp_path, encoder, [said("a", ":) b", "c")])


# Options and rows


def test_a_template_is_a_file_or_its_text(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_bytes(b"\xef\xbb\xbf" + SOURCES["chatml"].replace("\n", "\r\n").encode())
    assert read_template(str(path)) == SOURCES["chatml"]
    assert read_template(SOURCES["chatml"]) == SOURCES["chatml"]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<|im_start|>' ~ role }}", "chatml"),
        ("{{ '<|start_header_id|>' ~ role }}", "llama3"),
        ("{{ '<|' ~ role ~ '|>' }}{{ '<|assistant|>' }}", "zephyr"),
        ("{{ bos_token ~ '[INST] ' }}", "llama2"),
    ],
)
def test_in_place_of_a_template_the_built_in_ones_that_open_turns_alike_are_named(template, name):
    """All of them, where there are several: which one the base was made with, no template says."""
    found = re.fullmatch(r"or give --data\.template (.+), which writes such turns, too", instead_of(template))
    assert name in found[1].split(" or ")


def test_of_built_in_formats_that_open_turns_alike_each_is_named(monkeypatch):
    known = {name: built_in()[name] for name in ("chatml", "zephyr")} | {"phi": "{{ '<|im_start|>' ~ role }}"}
    monkeypatch.setattr(templates, "built_in", lambda: known)
    expected = "or give --data.template chatml or phi, which writes such turns, too"
    assert instead_of("{{ '<|im_start|>' ~ role }}") == expected


def test_in_place_of_a_template_like_none_any_other_is_named():
    assert instead_of("{{ '<start_of_turn>' }}") == f"or take another: {', '.join(names()[:-1])}"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
def test_a_device_or_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(UserError, match=rf"^data.template: {path}: expected a file of at most"):
            read_template(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            f"data.template: t.jinja: expected {', '.join(names())}, or a file with a Jinja chat template (No such "
            "file or directory)",
        ),
        (b"\n{{ x", "data.template: t.jinja: line 2 is no valid Jinja: "),
        (b"caf\xe9", "data.template: t.jinja is not UTF-8 (byte 3); save it as UTF-8"),
        (b"", "data.template: t.jinja: expected a Jinja chat template, got nothing"),
        (b" " * 1_000_001, "data.template: t.jinja: expected a file of at most 1,000,000 bytes with a Jinja template"),
    ],
)
def test_a_file_that_holds_no_template_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("t.jinja").write_bytes(content)
    with pytest.raises(UserError) as caught:
        ChatDataModule(template="t.jinja")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"template": SOURCES["chatml"].replace("eos_token", "'<|im_end|>'")},
            "data.template: with a conversation of 2 turns: the answer that is turn 2 is to end in EOS, or the model "
            "never learns to stop: after it comes '<|im_end|>\\n'; write {{ eos_token }} right after the ",
        ),
        (
            {"template": SOURCES["vicuna"], "system": "S"},
            "data.template: with a conversation of 2 turns and a system text: line 1 can't be rendered: no system text",
        ),
        (
            {"template": SOURCES["chatml"], "system": "a <|im_start|>user"},
            "data.system: expected a text without '<|im_start|>user', which data.template writes itself",
        ),
    ],
)
def test_a_template_that_won_t_do_is_refused_by_whoever_encodes(options, message):
    with pytest.raises(UserError) as caught:
        _ = ChatDataModule(tokenizer="demo", **options).encoder
    assert str(caught.value).startswith(message)


def test_rows_that_the_template_can_t_hold_are_left_out_and_counted(tmp_path):
    rows = [
        {"messages": messages(said("x [INST] y", "a"))},  # no tag of this format
        {"messages": messages(said("an <|im_start|>user here", "a"))},
        {"messages": messages(said("a", "b", "an <|im_start|>user here"))},
        {"messages": messages(said("c", "an <|im_start|>system here"))},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = ChatDataModule(str(path), template=SOURCES["chatml"], tokenizer="demo")
    records = load_records(str(path), reading=data.reading)
    assert records.conversations == [said("x [INST] y", "a"), said("a", "b")]
    assert records.dropped == {
        "unanswered last turns dropped": 1,
        f"rows left out: data.template can't hold them, such as {path}:2: turn 1 holds '<|im_start|>user', which could "
        "forge a turn or a system text": 2,
    }
    assert len(load_records(str(path)).conversations) == 3


def test_what_an_adapter_records_of_its_prompts():
    assert ChatDataModule().prompt_format.record() == {"prompt_format": "llama2-chat"}
    assert ChatDataModule(system="S").prompt_format.record() == {"prompt_format": "llama2-chat", "system": "S"}
    record = ChatDataModule(template=SOURCES["chatml"]).prompt_format.record()
    assert record["template"] == SOURCES["chatml"]
    assert record["prompt_format"] == "jinja"


def test_the_demo_is_encoded_whole(tmp_path):
    encoder = Encoder(DEMO, 4096, prompt_format=make_format(SOURCES["zephyr"]))
    conversations = load_records(str(demo.TEST), reading=Reading(prompt_format=encoder.prompt_format)).conversations
    assert len(conversations) == 84
    for conversation, found in zip(conversations, encoder.examples(conversations), strict=True):
        learned = [label for label in found.labels if label != IGNORE_INDEX]
        assert learned.count(EOS) == len(conversation.turns) // 2
