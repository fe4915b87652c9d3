import pytest

from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.text.edges import WRITTEN_OUT, clean, take_off


@pytest.mark.parametrize(
    ("text", "rest", "found"),
    [
        ("grey.</s>", "grey.", ["</s>"]),
        ("grey. </s>\n", "grey.", ["</s>"]),
        ("<s> grey.</s><s>", "grey.", ["<s>", "</s>"]),
        ("grey.</s></s>", "grey.", ["</s>"]),
        ("<|begin_of_text|>grey.<|eot_id|>", "grey.", ["<|begin_of_text|>", "<|eot_id|>"]),
        ("grey.<|im_end|>\n<|endoftext|>", "grey.", ["<|endoftext|>", "<|im_end|>"]),
        ("</s>", "", ["</s>"]),
        ("grey.</s><pad><pad>", "grey.", ["</s>", "<pad>"]),
        ("grey.</s>[PAD]", "grey.", ["</s>", "[PAD]"]),
        ("grey.</s><unk><unk>", "grey.", ["</s>", "<unk>"]),
        ("[BOS]grey.[EOS]", "grey.", ["[BOS]", "[EOS]"]),
        ("grey.<|eot|>", "grey.", ["<|eot|>"]),
        ("grey.<|return|>", "grey.", ["<|return|>"]),
        ("grey.<｜end▁of▁sentence｜>", "grey.", ["<｜end▁of▁sentence｜>"]),  # noqa: RUF001
        # Inside, and all but the whole mark, is text, and so is white space where there is nothing to take off.
        ("an <s>end</s> marks it", "an <s>end</s> marks it", []),
        ("grey.</s>.", "grey.</s>.", []),
        ("grey.</S>", "grey.</S>", []),
        ("</s", "</s", []),
        (" grey. ", " grey. ", []),
        ("", "", []),
    ],
)
def test_marks_are_taken_off_both_ends(text, rest, found):
    marks = sorted(WRITTEN_OUT)
    assert take_off(text, marks)[0] == rest
    assert sorted(take_off(text, marks)[1]) == sorted(found)


def test_a_mark_of_nothing_is_none():
    assert take_off("grey", ["", " "]) == ("grey", [])


def talk(*contents: str, system: str | None = None) -> Conversation:
    turns = (Turn("assistant" if index % 2 else "user", text, index != 1) for index, text in enumerate(contents))
    return Conversation(tuple(turns), system)


def test_each_turn_and_the_system_text_are_cleaned():
    found, taken = clean(talk("<s>a", "b</s>", "c", "d</s>", system="<s>"), WRITTEN_OUT)
    assert (found, sorted(taken)) == (talk("a", "b", "c", "d"), ["</s>", "<s>"])
    assert [turn.learned for turn in found.turns] == [True, False, True, True]
    plain = talk(" a ", "b", system="be <s> kind ")
    assert clean(plain, WRITTEN_OUT) == (plain, [])


def test_a_turn_of_nothing_else_is_named():
    with pytest.raises(ValueError, match=r"^turn 2: the assistant holds nothing but </s>$"):
        clean(talk("a", " </s> </s>"), WRITTEN_OUT)
