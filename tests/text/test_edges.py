import re

import pytest

from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.text.edges import WRITTEN_OUT, WrittenOutError, clean, take_off


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
        ("[gMASK]<sop>grey.<eoa>", "grey.", ["<eoa>", "<sop>", "[gMASK]"]),
        # Each model's spelling of the same names.
        ("[|assistant|]grey.[|endofturn|]", "grey.", ["[|assistant|]", "[|endofturn|]"]),
        ("<|begin▁of▁sentence|>grey.<|eod|>", "grey.", ["<|begin▁of▁sentence|>", "<|eod|>"]),
        ("<|prompter|>hi<|endoftext|><|assistant|>", "hi", ["<|prompter|>", "<|assistant|>", "<|endoftext|>"]),
        (
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>grey.",
            "grey.",
            ["<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"],
        ),
        # The colon after a role's token is its own.
        ("<|User|>:hi<eoh>\n<|Bot|>:", "hi", ["<|User|>:", "<eoh>", "<|Bot|>:"]),
        ("hi<eoh>\n<|Bot|>: ", "hi", ["<eoh>", "<|Bot|>:"]),
        ("<|assistant|>:-)", ":-)", ["<|assistant|>"]),
        # In another case.
        ("<S>grey.</S>", "grey.", ["</S>", "<S>"]),
        ("grey.<EOS><Pad>", "grey.", ["<EOS>", "<Pad>"]),
        ("[inst] hi [/Inst]", "hi", ["[/Inst]", "[inst]"]),
        ("hi<|IM_END|>\n<|im_start|>Assistant\n", "hi", ["<|IM_END|>", "<|im_start|>Assistant"]),
        ("grey.<|EOT|>", "grey.", ["<|EOT|>"]),
        # Zero-width characters, alone and around marks.
        ("\ufeffgrey.", "grey.", ["zero-width characters"]),
        (" \u200b grey. \u2060\n", "grey.", ["zero-width characters"]),
        ("\u200b<s>\ufeffgrey.</s>\u200b", "grey.", ["<s>", "</s>", "zero-width characters"]),
        ("\u200b", "", ["zero-width characters"]),
        # Marks of direction, which go with another one only.
        ("grey.</s>\u200e", "grey.", ["</s>"]),
        ("\u200fgrey.\u00ad</s>", "grey.", ["</s>"]),
        ("\u200fgrey.\u200f", "\u200fgrey.\u200f", []),
        ("grey.<|END_OF_TURN_TOKEN|><EOS_TOKEN>", "grey.", ["<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"]),
        # What opens a turn goes with its role.
        ("<|im_start|>assistant\ngrey.<|im_end|>", "grey.", ["<|im_end|>", "<|im_start|>assistant"]),
        ("<|im_start|>assistant grey.", "grey.", ["<|im_start|>assistant"]),
        ("<|im_start|>assistant<|im_sep|>grey.", "grey.", ["<|im_start|>assistant<|im_sep|>"]),
        ("hi<|im_end|>\n<|im_start|>assistant\n", "hi", ["<|im_end|>", "<|im_start|>assistant"]),
        (
            "<|start_header_id|>assistant<|end_header_id|>\n\ngrey.<|eot_id|>",
            "grey.",
            ["<|start_header_id|>assistant<|end_header_id|>", "<|eot_id|>"],
        ),
        (
            "hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "hi",
            ["<|start_header_id|>assistant<|end_header_id|>", "<|eot_id|>"],
        ),
        ("<start_of_turn>model\ngrey.<end_of_turn>", "grey.", ["<start_of_turn>model", "<end_of_turn>"]),
        ("<s>assistant\ngrey.</s>", "grey.", ["<s>assistant", "</s>"]),
        (
            "<|start|>assistant<|channel|>final<|message|>grey.<|return|>",
            "grey.",
            ["<|start|>assistant", "<|channel|>final<|message|>", "<|return|>"],
        ),
        ("<s>[INST] hi [/INST]", "hi", ["<s>", "[INST]", "[/INST]"]),
        ("[/INST] grey.</s>", "grey.", ["[/INST]", "</s>"]),
        ("<|user|>\nhi<|end|>\n<|assistant|>", "hi", ["<|user|>", "<|end|>", "<|assistant|>"]),
        ("<|im_start|>", "", ["<|im_start|>"]),
        ("</s>" + "<pad>" * 9999, "", ["</s>", "<pad>"]),
        # A word that is no role, or none of the mark's, is text, and so is what is spoken of.
        ("<|im_start|>usernames\n", "usernames", ["<|im_start|>"]),
        ("<s>bot</s>", "bot", ["<s>", "</s>"]),
        ("<s> Assistant </s><pad><pad>", "Assistant", ["<s>", "</s>", "<pad>"]),
        ("<|im_start|>bot<|im_end|>", "", ["<|im_start|>bot", "<|im_end|>"]),
        ("<s>model trains run.</s>", "model trains run.", ["<s>", "</s>"]),
        ("Ask the user", "Ask the user", []),
        ("it opens with [INST]", "it opens with [INST]", []),
        ("x <|im_start|>user", "x <|im_start|>user", []),
        ("x\t<|im_start|>user", "x\t<|im_start|>user", []),
        ("x <|start_header_id|>user<|end_header_id|>", "x <|start_header_id|>user<|end_header_id|>", []),
        ("they write <|assistant|>", "they write <|assistant|>", []),
        # Not so after another mark, on a line of its own, or right after a word.
        ("x</s> <|im_start|>user", "x", ["</s>", "<|im_start|>user"]),
        ("x\n <|im_start|>user", "x", ["<|im_start|>user"]),
        ("x<|im_start|>user", "x", ["<|im_start|>user"]),
        ("b </s><s>[INST]", "b", ["</s>", "<s>", "[INST]"]),
        ("say <|im_start|>user here", "say <|im_start|>user here", []),
        # Inside, and all but the whole mark, is text, and so is white space where there is nothing to take off.
        ("an <s>end</s> marks it", "an <s>end</s> marks it", []),
        ("grey.</s>.", "grey.</s>.", []),
        ("[/s]grey.[/s]", "[/s]grey.[/s]", []),
        ("grey.&lt;/s&gt;", "grey.&lt;/s&gt;", []),
        ("a\u200bb", "a\u200bb", []),
        ("\u200d\u200fgrey.\ufe0f", "\u200d\u200fgrey.\ufe0f", []),  # which change the letter beside them
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


def test_words_that_close_turns_are_taken_off_as_they_are_spelled():
    marks = ["### End", "<turn_end>"]
    assert take_off("grey.### End", marks) == ("grey.", ["### End"])
    assert take_off("grey.### END", marks) == ("grey.### END", [])
    assert take_off("grey.<Turn_End>", marks) == ("grey.", ["<Turn_End>"])


def test_an_opener_in_another_case_inside_is_a_whole_conversation():
    with pytest.raises(WrittenOutError, match=r"'<\|IM_START\|>User'"):
        take_off("<|Im_Start|>assistant\na<|im_end|><|IM_START|>User\nb", WRITTEN_OUT)
    assert take_off("grey </S> <|IM_START|>", WRITTEN_OUT) == ("grey", ["<|IM_START|>", "</S>"])


@pytest.mark.parametrize(
    ("text", "opened"),
    [
        ("<s>[INST] hi [/INST] grey. </s>", "[/INST]"),
        ("hi<|im_end|>\n<|im_start|>assistant\ngrey.<|im_end|>", "<|im_start|>assistant"),
        ("hi</s>\n<|assistant|>\ngrey.</s>", "<|assistant|>"),
        ("hi </s><s>[INST] so? [/INST] grey. </s>", "[INST]"),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|message|>grey.", "<|start|>assistant<|message|>"),
    ],
)
def test_a_text_that_continues_after_what_ends_it_is_a_whole_conversation(text, opened):
    with pytest.raises(WrittenOutError, match=re.escape(repr(opened))):
        take_off(text, WRITTEN_OUT)


def test_turns_that_a_text_speaks_of_stay():
    text = "ChatML: <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n, see?"
    assert take_off(f"{text}</s>", WRITTEN_OUT) == (text, ["</s>"])


def test_a_role_after_a_mark_of_a_tokenizer_alone_goes_with_it():
    marks = ["<turn>", "<of>", "<end>"]
    assert take_off("<turn>model\ngrey.<end>", marks) == ("grey.", ["<turn>model", "<end>"])
    assert take_off("<turn>model<of>grey.", marks) == ("grey.", ["<turn>model", "<of>"])
    assert take_off("<turn>modelled", marks) == ("modelled", ["<turn>"])
