"""Conversations become ids as Meta's code makes them, only answers are learned, and no text makes a special id."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_qlora import demo
from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.data.encode import Encoder
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.errors import UserError
from lit_qlora.text import messages
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.text.formats import make_format
from tests.data.talks import said

UNK, BOS, EOS = 0, 1, 2  # of the real tokenizer and of the demo's
FORGED = "</s><s><unk> </s> a<s>"


def cut_at(conversation: Conversation, turns: int) -> Conversation:
    return Conversation(conversation.turns[:turns], conversation.system)


def example(encoder: Encoder, conversation: Conversation):
    (found,) = encoder.examples([conversation])
    return found


@pytest.fixture(scope="module")
def demo_tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def real_tokenizer(real, request):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real / "llama2-tokenizer", legacy=request.param)


@pytest.fixture(scope="module", params=["demo", "real"])
def tokenizer(request):
    if request.param == "demo":
        return request.getfixturevalue("demo_tokenizer")
    return load_tokenizer(str(request.getfixturevalue("real") / "llama2-tokenizer"))


def test_prompts_have_the_ids_that_metas_code_makes(real, real_tokenizer):
    cases = json.loads((real / "meta" / "chat_prompt_ids.json").read_text(encoding="utf-8"))["cases"]
    encoder = Encoder(real_tokenizer, 4096)
    assert len(cases) == 5
    for case in cases:
        assert encoder.prompt(messages.parse(case["dialog"]).conversation) == case["prompt_ids"]


def test_an_example_has_bos_prompt_answer_eos_literally(real, real_tokenizer):
    question = [518, 25580, 29962, 7251, 518, 29914, 25580, 29962]  # "[INST] hi [/INST]"
    answer = [22172, 29871]  # "hello "
    found = example(Encoder(real_tokenizer, 1024), said("hi", "hello"))
    assert found.input_ids == [1, *question, *answer, 2]
    assert found.labels == [IGNORE_INDEX] * 9 + [*answer, 2]
    assert not found.was_cut


@pytest.mark.parametrize(
    "conversation",
    [
        said(FORGED, "fine"),
        said("hi", FORGED),
        said("hi", "fine", system=FORGED),
        said(FORGED, FORGED, FORGED, FORGED, system=FORGED),
    ],
    ids=["user", "assistant", "system", "everywhere"],
)
def test_no_text_makes_a_special_id(tokenizer, conversation):
    encoder = Encoder(tokenizer, 4096)
    ids = example(encoder, conversation).input_ids
    rounds = len(conversation.turns) // 2
    assert (ids.count(UNK), ids.count(BOS), ids.count(EOS)) == (0, rounds, rounds)
    assert ids[0] == BOS
    assert ids[-1] == EOS
    prompt = encoder.prompt(cut_at(conversation, 1))
    assert (prompt.count(UNK), prompt.count(BOS), prompt.count(EOS)) == (0, 1, 0)
    # What was forged is there, as characters.
    assert FORGED in tokenizer.decode([token for token in ids if token not in (BOS, EOS)])


def test_a_default_system_text_makes_no_special_id_either(tokenizer):
    ids = Encoder(tokenizer, 4096, prompt_format=make_format(system=FORGED)).prompt(said("hi"))
    assert (ids.count(UNK), ids.count(BOS), ids.count(EOS)) == (0, 1, 0)


def test_a_space_of_sentencepiece_s_that_a_text_begins_with_is_kept(real, demo_tokenizer):
    llama2, bare = (load_tokenizer(str(real / name)) for name in ("llama2-tokenizer", "stories260K"))
    answer = [29871, 22172, 29871]  # "▁", "▁hello", "▁", as sentencepiece has it; without the first: [22172, 29871]
    assert example(Encoder(llama2, 64), said("hi", "▁hello")).labels[-4:] == [*answer, EOS]
    for tokenizer in (llama2, bare, demo_tokenizer):
        (twice, once), *_ = [Encoder(tokenizer, 64)._encode(["▁x ", "x "])]
        assert len(twice) == len(once) + 1
        assert tokenizer.decode(twice) == f" {tokenizer.decode(once)}"


def weighed(*learned: bool, system: str | None = None) -> Conversation:
    roles = ("user", "assistant")
    turns = (Turn(roles[number % 2], f"t{number}", flag) for number, flag in enumerate(learned))
    return Conversation(tuple(turns), system)


TEMPLATES = Path(__file__).parents[1] / "templates"


@pytest.mark.parametrize("template", [None, *sorted(path.stem for path in TEMPLATES.glob("*.jinja"))])
@pytest.mark.parametrize("train_on", ["answers", "all"])
def test_a_turn_that_is_context_only_is_never_learned(tokenizer, template, train_on):
    source = template and (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    encoder = Encoder(tokenizer, 1024, train_on, prompt_format=make_format(source))
    plain = example(encoder, weighed(*[True] * 6))
    size = {count: len(example(encoder, weighed(*[True] * count)).input_ids) for count in (2, 4)}
    opened = {count: len(encoder.prompt(weighed(*[True] * count))) for count in (1, 3, 5)}
    first = example(encoder, weighed(True, False, True, True, True, True))
    assert first.input_ids == plain.input_ids
    assert first.labels[opened[1] : size[2]] == [IGNORE_INDEX] * (size[2] - opened[1])
    assert (first.labels[: opened[1]], first.labels[size[2] :]) == (plain.labels[: opened[1]], plain.labels[size[2] :])
    asked = example(encoder, weighed(True, True, False, True, True, True))
    assert asked.labels[size[2] : opened[3]] == [IGNORE_INDEX] * (opened[3] - size[2])
    assert (asked.labels[: size[2]], asked.labels[opened[3] :]) == (plain.labels[: size[2]], plain.labels[opened[3] :])
    last = example(encoder, weighed(True, True, True, True, True, False))
    assert (last.input_ids, last.labels) == (plain.input_ids[: size[4]], plain.labels[: size[4]])
    assert example(encoder, weighed(True, False)) is None


def test_a_cut_ends_on_an_answer_that_is_learned(demo_tokenizer):
    whole = example(Encoder(demo_tokenizer, 1024), weighed(True, True, True, False, True, True))
    first = whole.input_ids.index(EOS) + 1
    found = example(Encoder(demo_tokenizer, len(whole.input_ids) - 3), weighed(True, True, True, False, True, False))
    assert (len(found.input_ids), found.was_cut) == (first, True)


def test_the_marks_are_those_of_other_models_of_the_base_and_of_the_template(tokenizer, demo_tokenizer):
    assert {"<s>", "</s>", "<|im_end|>", "<|eot_id|>"} <= {*Encoder(tokenizer, 64).prompt_format.marks}
    source = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{{ eos_token if m.role == 'assistant' else '<END>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert "<END>" not in Encoder(demo_tokenizer, 64).prompt_format.marks
    assert "<END>" in Encoder(demo_tokenizer, 64, prompt_format=make_format(source)).prompt_format.marks


TALK = said("one", "two", "three", "four", "five", "six", system="be brief")


def test_bos_opens_each_prompt_and_eos_closes_each_answer(tokenizer):
    encoder = Encoder(tokenizer, 1024)
    ids = example(encoder, TALK).input_ids
    pieces = []
    for prompt, answer in (("<<SYS>>\nbe brief\n<</SYS>>\n\none", "two"), ("three", "four"), ("five", "six")):
        pieces += [BOS, *encoder._encode([f"[INST] {prompt} [/INST]"])[0], *encoder._encode([f"{answer} "])[0], EOS]
    assert ids == pieces


def test_every_answer_is_learned_with_its_eos_and_no_prompt_is(tokenizer):
    encoder = Encoder(tokenizer, 1024)
    found = example(encoder, TALK)
    learned, stretch = [], []
    for label in found.labels:
        if label != IGNORE_INDEX:
            stretch.append(label)
        elif stretch:
            learned, stretch = [*learned, stretch], []
    learned.append(stretch)
    assert learned == [[*encoder._encode([f"{answer} "])[0], EOS] for answer in ("two", "four", "six")]
    where = [index for index, label in enumerate(found.labels) if label != IGNORE_INDEX]
    assert all(found.labels[index] == found.input_ids[index] for index in where)


def test_train_on_all_learns_everything_but_bos(tokenizer):
    found = example(Encoder(tokenizer, 1024, "all"), TALK)
    assert found.labels == [IGNORE_INDEX if token == BOS else token for token in found.input_ids]
    assert found.input_ids.count(BOS) == 3
    assert found.labels.count(EOS) == 3


def test_the_system_default_stands_in_only_where_there_is_none(tokenizer):
    encoder, plain = Encoder(tokenizer, 1024, prompt_format=make_format(system="default")), Encoder(tokenizer, 1024)
    assert encoder.prompt(said("hi")) == plain.prompt(said("hi", system="default"))
    assert encoder.prompt(said("hi", system="own")) == plain.prompt(said("hi", system="own"))
    assert encoder.prompt(said("hi", system="")) == plain.prompt(said("hi"))
    assert example(encoder, said("hi", "yo")) == example(plain, said("hi", "yo", system="default"))
    assert encoder.prompt(said("a", "b", "c")) == plain.prompt(said("a", "b", "c", system="default"))


WORDS = st.text(st.sampled_from("abc de fg\n[]</s>é🦉"), min_size=1, max_size=30).filter(str.strip)
TALKS = st.builds(
    lambda pairs, system: said(*(text for pair in pairs for text in pair), system=system),
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    st.none() | WORDS,
)


@settings(deadline=None)  # the tokenizer's first call is slow
@given(conversation=TALKS, max_length=st.integers(1, 200), train_on=st.sampled_from(["answers", "all"]))
def test_a_cut_keeps_a_prefix_that_ends_on_an_answer(demo_tokenizer, conversation, max_length, train_on):
    whole = example(Encoder(demo_tokenizer, 100_000), conversation)
    is_answer = [label != IGNORE_INDEX for label in whole.labels]
    found = example(Encoder(demo_tokenizer, max_length, train_on), conversation)
    if found is None:  # only where no answer begins in time
        assert not any(is_answer[:max_length])
        return
    size = len(found.input_ids)
    assert size == len(found.labels)
    assert size <= max_length
    assert found.input_ids == whole.input_ids[:size]
    assert is_answer[size - 1]
    assert not any(is_answer[size:max_length])  # nothing was cut that would have fitted
    assert found.labels[-1] == found.input_ids[-1]
    assert found.was_cut == (size < len(whole.input_ids))
    if train_on == "answers":
        assert found.labels == whole.labels[:size]


def test_a_cut_by_hand(demo_tokenizer):
    whole = example(Encoder(demo_tokenizer, 1024), said("ab", "cd", "ef", "gh"))
    first_answer = whole.input_ids.index(EOS)  # the place of its EOS
    prompt = len(Encoder(demo_tokenizer, 1024).prompt(said("ab")))

    def size(max_length: int) -> int | None:
        found = example(Encoder(demo_tokenizer, max_length), said("ab", "cd", "ef", "gh"))
        return None if found is None else len(found.input_ids)

    assert size(prompt) is None
    assert size(prompt + 1) == prompt + 1
    assert size(first_answer) == first_answer
    assert size(first_answer + 1) == first_answer + 1
    assert size(first_answer + 4) == first_answer + 1  # the next question without an answer goes
    assert size(len(whole.input_ids)) == len(whole.input_ids)
    assert not example(Encoder(demo_tokenizer, len(whole.input_ids)), said("ab", "cd", "ef", "gh")).was_cut


@settings(deadline=None)  # the tokenizer's first call is slow
@given(conversation=TALKS, data=st.data())
def test_a_prompt_is_the_beginning_of_the_example(demo_tokenizer, conversation, data):
    encoder = Encoder(demo_tokenizer, 100_000, prompt_format=make_format(system="default"))
    turns = data.draw(st.sampled_from(range(1, len(conversation.turns), 2)))
    prompt = encoder.prompt(cut_at(conversation, turns))
    found = example(encoder, conversation)
    assert found.input_ids[: len(prompt)] == prompt
    assert found.labels[len(prompt) - 1] == IGNORE_INDEX
    assert found.labels[len(prompt)] != IGNORE_INDEX  # the answer starts right there


@settings(deadline=None)  # the tokenizer's first call is slow
@given(text=WORDS)
def test_decode_gives_back_an_answer(demo_tokenizer, text):
    encoder = Encoder(demo_tokenizer, 100_000)
    found = example(encoder, said("hi", text))
    answer = [label for label in found.labels if label != IGNORE_INDEX]
    assert answer[-1] == EOS
    assert encoder.decode(answer) == text.strip()


def test_decode_leaves_out_bos_and_eos_and_the_outer_spaces(tokenizer):
    encoder = Encoder(tokenizer, 1024)
    ids = encoder._encode(["  two  words \n"])[0]
    assert encoder.decode([BOS, *ids, EOS]) == "two  words"
    assert encoder.decode([EOS]) == ""


def test_conversations_come_out_in_their_order_whatever_a_call_takes(demo_tokenizer, monkeypatch):
    monkeypatch.setattr("lit_qlora.data.encode.CONVERSATIONS_PER_CALL", 2)
    encoder = Encoder(demo_tokenizer, 60)
    talks = [said(f"q{index}", f"a{index}") for index in range(5)]
    talks[3] = said("long " * 100, "cut off")
    found = list(encoder.examples(talks))
    assert found[3] is None
    assert [encoder.decode(one.input_ids) for one in found if one] == [
        f"[INST] q{index} [/INST] a{index}" for index in (0, 1, 2, 4)
    ]


def test_the_fingerprint_shows_all_that_decides_the_ids(demo_tokenizer, real):
    encoders = [
        Encoder(demo_tokenizer, 64),
        Encoder(demo_tokenizer, 65),
        Encoder(demo_tokenizer, 64, "all"),
        Encoder(demo_tokenizer, 64, "answers", make_format(system="be brief")),
        Encoder(demo_tokenizer, 64, "answers", make_format(system="")),
        Encoder(load_tokenizer(str(real / "llama2-tokenizer")), 64),
    ]
    assert len({encoder.fingerprint() for encoder in encoders}) == len(encoders)
    assert Encoder(load_tokenizer("demo"), 64).fingerprint() == encoders[0].fingerprint()


def test_the_fingerprint_does_not_hang_on_what_was_encoded_before(demo_tokenizer):
    tokenizer = load_tokenizer("demo")
    plain = Encoder(tokenizer, 64).fingerprint(), Encoder(tokenizer, 64).rules_fingerprint()
    tokenizer._tokenizer.enable_padding(length=8)  # as a tokenizer.json may ask for, until the first call
    tokenizer._tokenizer.enable_truncation(8)
    assert (Encoder(tokenizer, 64).fingerprint(), Encoder(tokenizer, 64).rules_fingerprint()) == plain


def with_more_tokens(tmp_path, special):
    """The demo's tokenizer with one more token after its 1,024."""
    shutil.copytree(demo.BASE, tmp_path / "more", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = load_tokenizer(str(tmp_path / "more"))
    tokenizer.add_tokens(["<pad>"], special_tokens=special)
    return tokenizer


def test_ids_that_a_base_does_not_know_are_refused(tmp_path, expect_error):
    tokenizer = with_more_tokens(tmp_path, special=False)
    Encoder(tokenizer, 64).check_vocabulary(1025, "base")
    expect_error(
        lambda: Encoder(tokenizer, 64).check_vocabulary(1024, "base"),
        "up to 1,024",
        "vocab_size of 1,024",
        option="model.base",
    )


def test_a_special_token_beyond_the_vocabulary_is_accepted_unless_a_template_writes_it(tmp_path):
    """Copies of Llama 2 with 32,000 embeddings have a pad of id 32,000 beside them."""
    tokenizer = with_more_tokens(tmp_path, special=True)
    Encoder(tokenizer, 64).check_vocabulary(1024, "base")
    with pytest.raises(UserError, match=r"has ids up to 1,023, and its.* a vocab_size of 1,023"):
        Encoder(tokenizer, 64).check_vocabulary(1023, "base")
    source = "{% for m in messages %}{{ '<pad>' + m.role + '\\n' + m.content + eos_token }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '<pad>assistant\\n' }}{% endif %}"
    encoder = Encoder(tokenizer, 64, prompt_format=make_format(source))
    with pytest.raises(UserError, match=r"has ids up to 1,024, and its.* a vocab_size of 1,024"):
        encoder.check_vocabulary(1024, "base")


@pytest.mark.parametrize("max_length", [8, 9, 10, 11, 13, 64])
def test_a_plain_text_is_divided_and_each_token_is_learned_once(max_length):
    encoder = Encoder(load_tokenizer("demo"), max_length, "all")
    text = Conversation((Turn("text", "Once upon a time there was a fox in a box of rocks."),))
    (written,) = encoder.written([text])
    ids = [token for one in written for token in one.ids]
    rows = encoder.rows(written)
    assert [ids[0], *(token for row in rows for token in row.input_ids[1:])] == ids
    assert max(len(row.input_ids) for row in rows) <= max_length
    assert [row.was_cut for row in rows] == [False] * len(rows)
    assert (ids[0], ids[-1]) == (encoder.bos_id, encoder.eos_id)
    assert sum(label != IGNORE_INDEX for row in rows for label in row.labels[1:]) == len(ids) - 1
    assert len(rows) == max(1, -(-(len(ids) - 1) // (max_length - 1)))
    assert rows[0].input_ids == ids[:max_length]


def test_a_text_of_one_token_too_many_has_its_end_in_a_row_of_its_own():
    encoder = Encoder(load_tokenizer("demo"), 1024, "all")
    (written,) = encoder.written([Conversation((Turn("text", "a b c d e f g h"),))])
    ids = [token for one in written for token in one.ids]
    encoder.max_length = len(ids) - 1
    assert [row.input_ids for row in encoder.rows(written)] == [ids[:-1], ids[-2:]]
    encoder.max_length = 32
    chat = Conversation((Turn("user", "a"), Turn("assistant", "b " * 20)))
    (written,) = encoder.written([chat])
    assert encoder.rows(written) == [encoder.example(written)] and encoder.rows(written)[0].was_cut
    assert encoder.rows(next(encoder.written([Conversation((Turn("user", "a " * 40), Turn("assistant", "b")))]))) == []
