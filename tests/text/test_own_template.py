"""A template of the user's own: its answers end in EOS, its prompts begin what is trained, and nothing said forges."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_qlora.errors import UserError
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.text.formats import Piece, SpecialTokens
from lit_qlora.text.own_template import Template

SOURCES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parents[1] / "templates").glob("*.jinja"))
}
SPECIALS = ("<unk>", "<s>", "</s>")


def template(source: str, system: str | None = None, specials: tuple[str, ...] = SPECIALS) -> Template:
    return Template(source=source, system=system, tokens=SpecialTokens("<s>", "</s>", specials))


def said(*contents: str, system: str | None = None) -> Conversation:
    turns = (Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(contents))
    return Conversation(tuple(turns), system)


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_chatml_cut_into_pieces():
    assert template(SOURCES["chatml"]).pieces(said("hi", " hello\n", "bye", "ciao", system="S")) == [
        ("<s>", False, "token"),
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False, "stretch"),
        ("hello", True, "rest"),
        ("</s>", True, "token"),
        ("\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n", False, "stretch"),
        ("ciao", True, "rest"),
        ("</s>", True, "token"),
    ]


def test_the_space_before_an_answer_is_the_answer_s_where_the_prompt_has_none():
    assert template(SOURCES["llama2"]).pieces(said("a", "b", "c")) == [
        ("<s>", False, "token"),
        ("[INST] a [/INST]", False, "stretch"),
        (" b ", True, "rest"),
        ("</s>", True, "token"),
        ("<s>", False, "token"),
        ("[INST] c [/INST]", False, "stretch"),
    ]


def test_a_question_s_own_eos_is_no_answer_s():
    assert template(SOURCES["zephyr"]).pieces(said("a", "b")) == [
        ("<|user|>\na", False, "stretch"),
        ("</s>", False, "token"),
        ("\n<|assistant|>\n", False, "stretch"),
        ("b", True, "rest"),
        ("</s>", True, "token"),
    ]


@pytest.mark.parametrize("name", SOURCES)
def test_each_template_holds_for_all_kinds_of_conversations(name):
    template(SOURCES[name]).check()
    if name != "vicuna":
        template(SOURCES[name], " Be kind. ").check()


def test_what_is_reported_of_a_template():
    assert [line.partition(" (sha256 ")[0] for line in template(SOURCES["chatml"]).notes()] == [
        "prompts by data.template"
    ]
    assert template(SOURCES["zephyr"]).notes()[1:] == [
        "data.template writes no BOS, with which this base's texts begin; {{ bos_token }} would"
    ]
    assert template(SOURCES["vicuna"]).notes()[1:] == [
        "data.template can't write a system text: with a conversation of 2 turns and a system text: line 1 can't be "
        "rendered: no system text, please"
    ]


PARTS = ["</s>", "<s>", "<unk>", "\ue0001\ue001", "é", "🦉", "a", " ", "\n", "{{", "%}", "<"]
HOSTILE = st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("".join)
WORDS = HOSTILE.map(str.strip).filter(bool)


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(SOURCES)),
    pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    system=st.none() | WORDS,
    data=st.data(),
)
def test_answers_are_exactly_the_answers_and_prompts_begin_them(name, pairs, system, data):
    """Whatever is said: special tokens are the template's own, each answer is its text and EOS, and each prompt is
    the beginning of what is trained."""
    one, contents = template(SOURCES[name]), [text for pair in pairs for text in pair]
    conversation = said(*contents, system=None if name == "vicuna" else system)
    pieces = one.pieces(conversation)
    answers, run = [], list[Piece]()
    for piece in pieces:
        if piece.is_answer:
            run.append(piece)
        elif run:
            answers, run = [*answers, run], []
    assert [(one.text.strip(), end) for one, end in [*answers, run]] == [
        (answer, Piece("</s>", True, "token")) for _, answer in pairs
    ]
    plain = one.pieces(said(*["a"] * len(contents), system=None if name == "vicuna" or system is None else "S"))
    assert [piece.text for piece in pieces if piece.kind == "token"] == [
        piece.text for piece in plain if piece.kind == "token"
    ]
    count = data.draw(st.sampled_from(range(1, len(contents), 2)))
    prompt = one.pieces(Conversation(conversation.turns[:count], conversation.system))
    assert pieces[: len(prompt)] == prompt
    assert pieces[len(prompt)].is_answer
    if name not in ("alpaca", "trl", "zephyr", "chatml"):  # these write something after the last answer
        assert text_of(pieces) == one._render([conversation.system or "", *contents], False)


@pytest.mark.parametrize("name", SOURCES)
def test_the_template_s_own_words_may_not_be_said(name):
    one = template(SOURCES[name])
    assert one.tags
    for tag in one.tags:
        places = {"turn 1": said(f"x {tag} y"), "turn 2": said("a", tag, "b"), "the system text": said("a", system=tag)}
        for place, conversation in places.items():
            with pytest.raises(ValueError, match="could forge a turn ") as caught:
                one.pieces(conversation)
            assert str(caught.value).startswith(f"{place} holds '")


@pytest.mark.parametrize("source", [
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>\n\n' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>\n\n' }}{% endif %}",
])  # fmt: skip
def test_a_role_after_a_special_token_is_a_word_like_any_other(source):
    one = template(source, specials=(*SPECIALS, "<|im_start|>", "<|im_sep|>"))
    assert one.tags == []
    assert text_of(one.pieces(said("What does the user of a system say?", "The assistant knows."))).count("user") == 2
    without = template(source)  # to a tokenizer that has no such token, it's a text, and could be forged
    assert [tag for tag in without.tags if "user" in tag and "<|im_start|>" in tag]


def test_the_tags_of_the_llama_2_format_are_found_again():
    assert set(template(SOURCES["llama2"]).tags) == {"[INST]", "[/INST]", "[INST] <<SYS>>", "<</SYS>>"}


HEAD, CLOSE = (
    "{% for m in messages %}<{{ m.role }}>\n",
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}",
)
AT_2 = "with a conversation of 2 turns: "


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (  # an EOS that never comes
            HEAD + "{{ m.content }}<|im_end|>\n" + CLOSE,
            AT_2 + "the answer that is turn 2 is to end in EOS, or the model never learns to stop: after it comes "
            "'<|im_end|>\\n'; write {{ eos_token }} right after the assistant's content",
        ),
        (  # one that comes after the question alone
            HEAD + "{{ m.content }}{{ eos_token if m.role == 'user' }}\n" + CLOSE,
            AT_2 + "the answer that is turn 2 is to end in EOS",
        ),
        (  # one for the last answer alone
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if loop.last }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            AT_2 + "the prompt for turn 2, with add_generation_prompt, is to be the beginning of what is trained",
        ),
        (
            HEAD + "{{ m.content }}<|im_end|>{{ eos_token }}\n" + CLOSE,
            AT_2 + "between the answer that is turn 2 and its EOS may stand nothing, for it would be shown as part of "
            "each answer, and '<|im_end|>' does; write {{ eos_token }} in its place",
        ),
        (  # the mask would begin too early
            HEAD + "{{ m.content + eos_token }}{% endfor %}",
            AT_2 + "the prompt for turn 2 is to go up to the answer, and lacks '<assistant>\\n'; write that where "
            "add_generation_prompt is set, too",
        ),
        (  # prompts that are no prefix
            "{% for m in messages %}<{{ m.role }} {{ loop.revindex }}>{{ m.content + eos_token }}{% endfor %}",
            AT_2 + "the prompt for turn 2, with add_generation_prompt, is to be the beginning of what is trained: "
            "expected '<user 2>(turn 1)</s><assistant…', got '<user 1>(turn 1)</s>'; write nothing that depends on "
            "later messages",
        ),
        (
            "{% for m in messages %}<{{ m.role }}> {{ m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant> {% endif %}",
            AT_2 + "the prompt for turn 2 is to end in no space, for a word's token brings its own, and ends in "
            "'…user> (turn 1)</s><assistant> '; write the space before the assistant's content instead",
        ),
        (  # what is said gets lost
            "{% for m in messages if m.role == 'assistant' %}{{ m.content + eos_token }}{% endfor %}",
            AT_2 + "turn 1 is to be written once, and is written 0 times; write the content of each message",
        ),
        (
            "{% for m in messages[-2:] %}<{{ m.role }}>{{ m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "with a conversation of 6 turns: turn 1 is to be written once, and is written 0 times",
        ),
        (
            HEAD + "{{ m.content + m.content + eos_token }}" + CLOSE,
            AT_2 + "turn 1 is to be written once, and is written 2 times",
        ),
        (
            "{% for m in messages | reverse %}{{ m.content + eos_token }}{% endfor %}",
            AT_2 + "the turns are written in another order: turn 2, turn 1",
        ),
        (
            HEAD + "{{ m.content | upper + eos_token }}" + CLOSE,
            "it changes messages, or depends on their text: expected '<user>\\nHello</s><assistant>\\nHe…', got "
            "'<user>\\nHELLO</s><assistant>\\nHE…'; write each message's content as it is (| trim does no harm)",
        ),
        (
            HEAD + "{{ m.content[:200] + eos_token }}" + CLOSE,
            "it changes messages, or depends on their text: expected ",
        ),
        (
            HEAD + "{{ (m.content | tojson)[1:-1] + eos_token }}" + CLOSE,
            "it changes messages, or depends on their text: expected ",
        ),
        (
            HEAD + "{{ m.content }}{% if eos_token in m.content %}!{% endif %}{{ eos_token }}" + CLOSE,
            "it changes messages, or depends on their text: expected ",
        ),
        (HEAD + "\n{{ m.text + eos_token }}" + CLOSE, AT_2 + "line 3 can't be rendered: 'dict object' has no"),
    ],
    ids=range(16),
)  # fmt: skip
def test_a_template_that_would_train_something_else_is_refused(source, message):
    with pytest.raises(UserError) as caught:
        template(source).check()
    assert str(caught.value).startswith(f"data.template: {message}")
    assert "\n" not in str(caught.value)


def test_a_template_that_looks_at_what_is_said_is_refused_where_it_matters():
    """A template may take thoughts out of an earlier answer: such a conversation is refused, and no other."""
    source = SOURCES["chatml"].replace("message['content']", "message['content'].split('</think>')[-1]")
    one = template(source)
    one.check()
    assert one.pieces(said("a", "b")) == template(SOURCES["chatml"]).pieces(said("a", "b"))
    with pytest.raises(ValueError, match=r"it changes messages, .*: expected .*hmm</think>b"):
        one.pieces(said("a", "hmm</think>b"))


def test_a_system_text_that_gets_lost_is_refused_where_there_is_one():
    source = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>\n{{ m.content + eos_token }}" + CLOSE
    one = template(source)
    one.check()
    message = (
        "with a conversation of 2 turns and a system text: the system text is to be written once, and is written 0"
    )
    for system in ("S", "</s>"):
        with pytest.raises(ValueError, match=message):
            one.pieces(said("a", "b", system=system))
    with pytest.raises(UserError, match=message):
        template(source, "S").check()


def test_a_special_token_that_the_template_spells_out_is_one():
    source = SOURCES["chatml"].replace("eos_token", "'</s>'").replace("bos_token", "'<s>'")
    assert template(source).pieces(said("a", "b")) == template(SOURCES["chatml"]).pieces(said("a", "b"))


def test_a_system_text_is_no_answer():
    """A branch meant for the assistant catches the system turn, too."""
    otherwise = template(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    otherwise.check()
    expected = "the system text is written just as an answer is, and nobody asked; give the role system a branch of its"
    with pytest.raises(UserError, match=expected):
        replace(otherwise, system="Be brief.").check()
    with pytest.raises(ValueError, match=expected):
        otherwise.pieces(said("a", "b", system="S"))
    for name in ("chatml", "zephyr"):
        assert [piece for piece in template(SOURCES[name]).pieces(said("a", "b", system="S")) if piece.is_answer] == [
            ("b", True, "rest"),
            ("</s>", True, "token"),
        ]
