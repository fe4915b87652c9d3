from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_qlora.text import llama2, llama2_rows, messages
from lit_qlora.text.conversation import Conversation, TextError, Turn
from tests.expect import check_line

REAL = Path(__file__).parents[2].parent / "shared" / "real" / "guanaco"


def said(*contents: str, system: str | None = None) -> Conversation:
    turns = (Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(contents))
    return Conversation(tuple(turns), system)


def read(text: str) -> Conversation:
    return messages.parse(llama2_rows.parse(text)).conversation


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (said("hi"), [("[INST] hi [/INST]", False)]),
        (said(" hi\n", "\nyo "), [("[INST] hi [/INST]", False), ("yo ", True)]),
        (
            said("a", "b", "c", system="be kind"),
            [
                ("[INST] <<SYS>>\nbe kind\n<</SYS>>\n\na [/INST]", False),
                ("b ", True),
                ("[INST] c [/INST]", False),
            ],
        ),
        # Only the whole is stripped, as in Meta's code: what stands inside keeps its spaces.
        (
            said("  a  ", system=" be kind "),
            [("[INST] <<SYS>>\n be kind \n<</SYS>>\n\n  a [/INST]", False)],
        ),
        (said("a", system=""), [("[INST] a [/INST]", False)]),
    ],
)
def test_segments_are_written_as_meta_writes_them(conversation, expected):
    assert llama2.segments(conversation) == expected


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize(
    ("template", "where"),
    [
        (("x{}", "b", "c", None), "turn 1"),
        (("a", "{}x", "c", None), "turn 2"),
        (("a", "b", "x{}x", None), "turn 3"),
        (("a", "b", "c", "{}"), "the system text"),
    ],
)
def test_a_tag_from_outside_is_refused(tag, template, where):
    *contents, system = [text and text.format(tag) for text in template]
    with pytest.raises(TextError) as caught:
        llama2.Llama2().pieces(said(*contents, system=system))
    assert str(caught.value) == f"{where} {caught.value.problem}"
    assert caught.value.problem.startswith(f"holds '{tag}', ")
    assert caught.value.turn == (0 if system else int(where.split()[-1]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<s>[INST] hi [/INST] yo </s>", said("hi", "yo")),
        ("[INST] hi [/INST] yo", said("hi", "yo")),
        ("<s><s>[INST] hi [/INST] yo", said("hi", "yo")),
        ("<|begin_of_text|>[INST] hi [/INST] yo", said("hi", "yo")),
        (" <s> [INST]hi[/INST]yo</s> ", said("hi", "yo")),
        ("<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>", said("a", "b", "c", "d")),
        ("[INST] a [/INST] b [INST] c [/INST] d", said("a", "b", "c", "d")),
        ("<s>[INST] a [/INST] b </s>\n<s>[INST] c [/INST]", said("a", "b", "c")),
        ("<s>[INST] hi [/INST]", said("hi")),
        ("<s>[INST] hi [/INST] yo </s><s>", said("hi", "yo")),
        (
            "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhi [/INST] yo </s>",
            said("hi", "yo", system="be kind"),
        ),
        ("<s>[INST] <<SYS>>\nbe kind\n<<SYS>>\n\nhi [/INST] yo </s>", said("hi", "yo", system="be kind")),
        ("[INST]<<SYS>>be kind<</SYS>>hi[/INST]", said("hi", system="be kind")),
        (
            "[INST] <<SYS>>s<</SYS>>a [/INST] b [INST] <<SYS>>s<</SYS>>c [/INST] d [INST] <<SYS>>t<</SYS>>e [/INST]",
            said("a", "b", "c", "d", "t\n\ne", system="s"),
        ),
        ("[INST] <<SYS>>\n\n<</SYS>>\n\nhi [/INST] yo", said("hi", "yo")),
        (
            "[INST] why </s> there? [/INST] an <s>end</s> marks it",
            said("why </s> there?", "an <s>end</s> marks it"),
        ),
    ],
)
def test_rows_are_read(text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no [INST]"]),
        ("### Human: hi", ["no [INST]"]),
        ("so: <s>[INST] hi [/INST] yo", ["before the first [INST]"]),
        ("<s>[INST] hi", ["turn 1", "[INST] without its [/INST]"]),
        ("[INST] a [INST] b [/INST] c", ["turn 1", "[INST] without its [/INST]"]),
        ("[INST] a [/INST] b </s><s>[INST] c", ["turn 3", "[INST] without its [/INST]"]),
        ("[INST] a [/INST] b [/INST] c", ["turn 2", "[/INST] without its [INST]"]),
        ("[INST] [/INST] b", ["turn 1", "user", "empty"]),
        ("[INST] <<SYS>> s <</SYS>> [/INST] b", ["turn 1", "user", "empty"]),
        ("[INST] a [/INST] </s>", ["turn 2", "assistant", "empty"]),
        ("[INST] a [/INST] [INST] b [/INST] c", ["turn 2", "assistant", "empty"]),
        ("[INST] a [/INST] b [INST] [/INST] c", ["turn 3", "user", "empty"]),
        ("[INST] <<SYS>> s [/INST] b", ["system", "<<SYS>>", "<</SYS>>"]),
    ],
)
def test_what_is_no_conversation_is_refused(text, words):
    with pytest.raises(ValueError) as caught:
        read(text)
    check_line(str(caught.value), *words)


def render(conversation: Conversation) -> str:
    """The row that shows it, BOS and EOS spelled out."""
    return "".join(f" {text}</s>" if is_answer else f"<s>{text}" for text, is_answer in llama2.segments(conversation))


@given(data=st.data())
def test_what_is_rendered_is_read_back(conversations, data):
    conversation = data.draw(conversations)
    assert read(render(conversation)) == conversation


@given(data=st.data())
def test_segments_take_turns_and_hold_every_word(conversations, data):
    conversation = data.draw(conversations)
    written = llama2.segments(conversation)
    assert [is_answer for _, is_answer in written] == [turn.role == "assistant" for turn in conversation.turns]
    for (text, is_answer), turn in zip(written, conversation.turns, strict=True):
        assert text.endswith(f"{turn.content} " if is_answer else f"{turn.content} [/INST]")


@pytest.mark.skipif(not REAL.is_dir(), reason="no real rows beside the checkout")
def test_every_real_row_is_read_and_written_back_or_has_an_empty_turn():
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(REAL / "guanaco-llama2-1k.train.parquet")["text"].to_pylist()
    refused, turns = {}, Counter()
    for number, row in enumerate(rows, start=1):
        try:
            conversation = read(row)
        except ValueError as error:
            refused[number] = str(error)
            continue
        assert render(conversation) == row
        turns[len(conversation.turns)] += 1
    assert refused == {
        435: "turn 5: a turn of the user is empty",
        511: "turn 3: a turn of the user is empty",
        900: "turn 4: a turn of the assistant is empty",
    }
    assert turns == {2: 647, 4: 336, 6: 11, 10: 1, 12: 1, 16: 1}
