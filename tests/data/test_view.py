"""A row as the model sees it: every token's text, printable; and the example of a fit, in one line or two."""

import pytest

from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.columns import columns
from lit_qlora.data.encode import Encoder
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.data.view import example_lines, tokens
from lit_qlora.text.conversation import Conversation, Turn
from tests.data.talks import said


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer("demo"), 400)


def row(encoder: Encoder, conversation: Conversation) -> tuple[list[int], list[int]]:
    example = next(encoder.examples([conversation]))
    assert example is not None
    return example.input_ids, example.labels


def test_tokens_keep_their_spaces_and_know_what_they_are(encoder):
    ids, labels = row(encoder, said("When?", "In June."))
    found = tokens(encoder.tokenizer, ids, [label != -100 for label in labels])
    assert "".join(token.text for token in found) == "<s> [INST] When? [/INST] In June. </s>"
    assert [token.id for token in found] == ids
    assert [token.text for token in found if token.special] == ["<s>", "</s>"]
    assert "".join(token.text for token in found if token.learned) == " In June. </s>"


def test_a_special_tokens_spelling_is_no_special_token(encoder):
    ids, labels = row(encoder, said("a </s> b", "c"))
    found = tokens(encoder.tokenizer, ids, [label != -100 for label in labels])
    assert sum(token.special for token in found) == 2


def test_parts_of_characters_are_shown_as_bytes(encoder):
    ids = encoder.plain("漢")
    assert [token.text for token in tokens(encoder.tokenizer, ids, [False] * len(ids))][-3:] == [
        "<0xE6>",
        "<0xBC>",
        "<0xA2>",
    ]


def test_parts_of_characters_of_a_byte_level_vocabulary_are_bytes_too(encoder):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"Ġæ": 0, "¼": 1, "¢": 2, "Ġa": 3, "b": 4}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert [token.text for token in tokens(tokenizer, [0, 1, 2, 3, 4], [True] * 5)] == [
        "<0x20 0xE6>", "<0xBC>", "<0xA2>", " a", "b"
    ]  # fmt: skip


def example(encoder, conversation, most):
    lines = example_lines(encoder.tokenizer, *row(encoder, conversation), 72, most)
    assert len(lines) <= most and max(map(columns, lines)) <= 72
    return lines


def test_a_short_example_is_one_line(encoder):
    for most in (1, 2):
        assert example(encoder, said("When?", "In June."), most) == ["[INST] When? [/INST] **In June.** ⏹"]


def test_a_long_example_is_two_lines_or_one_that_is_cut(encoder):
    asked, answer = "When should I come to see it? " * 4, "Come in June, when it's warm. " * 4
    first, second = example(encoder, said(asked, answer, "and?", "so"), 2)
    assert first.startswith("[INST] When should I come to see it?") and first.endswith("? [/INST]") and "…" in first
    assert second.startswith("**Come in June") and second.endswith("when it's warm.** ⏹") and "…" in second
    (only,) = example(encoder, said(asked, answer), 1)
    assert only.startswith("[INST] When") and only.endswith("warm.** ⏹") and "[/INST] **Come" in only
    (short,) = example(encoder, said(asked, "In June."), 1)
    assert short.endswith(" [/INST] **In June.** ⏹") and columns(short) > 65
    for text in ("漢字" * 60, "e\u0301" * 60, "\x1b" * 60):
        for most in (1, 2):
            example(encoder, said(text, text), most)


def test_an_answer_that_is_cut_has_no_end(encoder):
    short = Encoder(encoder.tokenizer, 30)
    assert not example(short, said("q", "word " * 60), 1)[0].endswith("⏹")


def test_an_answer_that_is_context_only_is_none(encoder):
    turns = (Turn("user", "a"), Turn("assistant", "b", learned=False), Turn("user", "c"), Turn("assistant", "d"))
    assert example(encoder, Conversation(turns), 2) == ["[INST] a [/INST] b  [INST] c [/INST] **d** ⏹"]


def test_a_row_that_is_learned_whole_is_all_of_it(encoder):
    whole = Encoder(encoder.tokenizer, 400, train_on="all")
    assert example(whole, said("a", "b"), 2) == ["**[INST] a [/INST] b** ⏹"]


def test_with_prompts_learned_it_is_the_first_stretch_with_its_end_and_no_empty_line(encoder):
    """A format that writes BOS before each turn divides a row where no answer is."""
    ids, labels = row(Encoder(encoder.tokenizer, 400, train_on="all"), said("When? " * 20, "In June. " * 20))
    for place in (1, 9):
        ids[place] = encoder.bos_id
        labels[place] = IGNORE_INDEX
    (line,) = example_lines(encoder.tokenizer, ids, labels, 72, 2)
    assert line.endswith("June.** ⏹") and columns(line) <= 72
