"""A row becomes a conversation, whatever its form; what of it is not used is named; a form that is not read, too."""

import json

import numpy as np
import pytest

from lit_qlora.data import forms
from lit_qlora.data.forms import RowError, RowForm, list_in, read_row
from lit_qlora.data.records import Reading, load_records
from lit_qlora.text.conversation import Conversation
from tests.data.talks import said

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
TEXT = "### Human: hi### Assistant: yo"


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(
    "row",
    [{"messages": TURNS}, {"conversations": SHARED}, {"text": TEXT}, {"text": "[INST] hi [/INST] yo"}],
    ids=["messages", "sharegpt", "guanaco", "llama2"],
)
def test_a_system_column_stands_in_where_the_conversation_brings_none(row, column):
    assert read_row({**row, column: "Be kind."}) == (said("hi", "yo", system="Be kind."), (), ())
    for nothing in (None, "", " ", float("nan")):
        assert read_row({**row, column: nothing}) == (said("hi", "yo"), (), ())
    with pytest.raises(RowError, match=f"^column '{column}' holds a number, expected text$"):
        read_row({**row, column: 3})


def test_the_conversation_s_own_system_text_stands_and_another_is_named():
    row = {"messages": [{"role": "system", "content": "Mine."}, *TURNS]}
    assert read_row({**row, "system": "Mine. "}) == (said("hi", "yo", system="Mine."), (), ())
    assert read_row({**row, "system": "Other."}) == (
        said("hi", "yo", system="Mine."),
        ("column 'system' where another system text stands already",),
        (),
    )
    blank = {"messages": [{"role": "system", "content": " "}, *TURNS], "system": "Other."}
    assert read_row(blank).conversation == said("hi", "yo", system="Other.")


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"messages": TURNS, "text": TEXT}, ["column 'text' beside 'messages'"]),
        ({"messages": TURNS, "conversations": SHARED}, ["column 'conversations' beside 'messages'"]),
        ({"messages": TURNS, "text": " ", "conversations": []}, []),
        ({"text": TEXT, "messages": [{"role": None, "content": None}]}, []),
        ({"text": TEXT, "tools": [{"name": "f"}], "images": []}, ["column 'tools'"]),
        ({"messages": TURNS, "score": 0, "flag": False}, ["column 'score'", "column 'flag'"]),
        ({"messages": TURNS, "score": float("nan"), "meta": {"a": None, "b": []}}, []),
        (
            {"messages": [{**TURNS[0], "name": "Bo"}, {**TURNS[1], "tool_calls": [], "reasoning_content": "hm"}]},
            ["key 'name' of a turn", "key 'reasoning_content' of a turn"],
        ),
        ({"messages": [{**turn, "from": None, "value": None} for turn in TURNS]}, []),
        ({"messages": [{**turn, "weight": 1} for turn in TURNS]}, ["key 'weight' of a turn that is not the assistant's"]),  # noqa: E501
        ({"messages": [{**TURNS[0], "train": False}, {**TURNS[1], "weight": 1.0}]}, []),
        ({"messages": [TURNS[0], {**TURNS[1], "loss": 2.5}]}, ["key 'loss' of a turn"]),
    ],
)  # fmt: skip
def test_what_is_not_used_is_named(row, unused):
    assert read_row(row) == (said("hi", "yo"), tuple(unused), ())


def test_a_forced_form_names_the_column_that_it_passes_by():
    row = {"messages": TURNS, "text": "### Human: a### Assistant: b"}
    assert read_row(row, "guanaco") == (said("a", "b"), ("column 'messages' beside 'text'",), ())


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0), ("weight", 0.0), ("weight", "0"), ("loss_weight", 0), ("train", False), ("train", "False"),
     ("trainable", False), ("training", 0), ("loss", False)],
)  # fmt: skip
@pytest.mark.parametrize("turns", [TURNS, SHARED], ids=["messages", "sharegpt"])
def test_a_turn_of_weight_0_is_not_learned(turns, key, value):
    read = read_row({"messages": [turns[0], {**turns[1], key: value}, *turns]})
    assert [turn.learned for turn in read.conversation.turns] == [True, False, True, True]
    assert read.unused == ()
    for nothing in (None, float("nan"), 1, True):
        read = read_row({"messages": [turns[0], {**turns[1], key: nothing}]})
        assert [turn.learned for turn in read.conversation.turns] == [True, True]


def test_a_system_text_of_weight_0_takes_its_prompt_along():
    rows = [{"role": "system", "content": "s", "weight": 0}, *TURNS, *TURNS]
    read = read_row({"messages": rows})
    assert [turn.learned for turn in read.conversation.turns] == [False, True, True, True]


@pytest.mark.parametrize("weight", [0.5, 2, -1, "half", [0], float("inf")])
def test_a_weight_that_can_not_be_kept_is_refused(weight):
    with pytest.raises(RowError, match=r"^turn 2: its weight is .*, expected 0 \(context only\) or 1 \(learned\)"):
        read_row({"messages": [TURNS[0], {**TURNS[1], "weight": weight}]})


AWKWARD = [{"role": "user", "content": 'it\'s "} {" \\ nan\n {x}'}, {"role": "assistant", "content": "ja\n{}"}]


@pytest.mark.parametrize(
    "written",
    [
        json.dumps(AWKWARD),
        repr(AWKWARD),
        str(np.array(AWKWARD, dtype=object)),
        repr(np.array(AWKWARD, dtype=object)),
        repr([{**turn, "weight": None} for turn in AWKWARD]),
        repr([{**turn, "weight": float("nan")} for turn in AWKWARD]),
    ],
    ids=["JSON", "pandas", "numpy", "array", "None", "nan"],
)
def test_a_list_is_read_as_json_pandas_and_numpy_write_it(written):
    read = read_row({"messages": written})
    assert read == (said(*(turn["content"] for turn in AWKWARD)), (), ())


@pytest.mark.parametrize("words", ["hello", "{'role': 'user'}", "[" * 100_000, "[__import__('os')]", "[1", ""])
def test_a_text_that_is_no_list_stays_one(words):
    assert list_in(words) in (words, None)


def test_a_text_that_begins_in_a_list_is_not_read_as_one():
    assert read_row({"text": f"[1] {TEXT}"}).conversation == said("hi", "yo", system="[1]")


def row_to_write(error: RowError) -> dict:
    head, _, row = error.remedy.partition("{")
    assert head == "write each row as "
    return json.loads("{" + row)


OTHERS = {
    "Dolly": (
        {"instruction": "Sum up.", "context": "A long text.", "response": "Short.", "category": "x"},
        "Dolly's form (instruction, context, response) is not read",
        said("Sum up.\n\nA long text.", "Short."),
    ),
    "Alpaca": (
        {"instruction": "Say hi.", "input": "", "output": "Hi."},
        "Alpaca's form (instruction, input, output) is not read",
        said("Say hi.", "Hi."),
    ),
    "Alpaca without input": (
        {"instruction": "Say hi.", "output": "Hi."},
        "Alpaca's form (instruction, output) is not read",
        said("Say hi.", "Hi."),
    ),
    "prompt and completion": (
        {"prompt": "a", "completion": "b"},
        "a form of questions and answers (prompt, completion) is not read",
        said("a", "b"),
    ),
    "preferences": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "a form of preferences (prompt, chosen) is not read",
        said("a", "b"),
    ),
    "preferences as messages": (
        {"prompt": "a", "chosen": [TURNS[0], {"role": "assistant", "content": "b"}], "rejected": TURNS},
        "a form of preferences (prompt, chosen) is not read",
        said("a", "b"),
    ),
    "SQuAD": (
        {"id": "1", "context": "c", "question": "a", "answers": "b"},
        "a form of questions and answers (question, context, answers) is not read",
        said("a\n\nc", "b"),
    ),
    "OpenOrca": (
        {"id": "1", "system_prompt": "s", "question": "a", "response": "b"},
        "a form of questions and answers (question, response) is not read",
        said("a", "b", system="s"),
    ),
    "capitals": (
        {"Question": "a", "Answer": "b"},
        "a form of questions and answers (Question, Answer) is not read",
        said("a", "b"),
    ),
    "input and output": (
        {"input": "a", "output": "b"},
        "a form of questions and answers (input, output) is not read",
        said("a", "b"),
    ),
}


@pytest.mark.parametrize(("row", "message", "conversation"), OTHERS.values(), ids=OTHERS)
def test_a_form_that_is_not_read_is_named_with_the_row_to_write(row, message, conversation):
    with pytest.raises(RowError) as caught:
        read_row(row)
    assert str(caught.value) == message
    assert read_row(row_to_write(caught.value)).conversation == conversation


def test_the_row_to_write_is_short():
    with pytest.raises(RowError) as caught:
        read_row({"prompt": "x" * 1000, "completion": "y\n" * 1000})
    assert len(caught.value.remedy) < 300 and "\n" not in caught.value.remedy


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"Texts": TEXT}, "rename 'Texts' to 'text'"),
        ({"message": TURNS}, "rename 'message' to 'messages'"),
        ({"dialog": TURNS}, "rename 'dialog' to 'messages'"),
        ({"items": SHARED}, "rename 'items' to 'messages'"),
        ({"turns": json.dumps(TURNS)}, "rename 'turns' to 'messages'"),
        # Not by its name alone.
        ({"message": "hi"}, 'write rows such as {"text": "### Human: …### Assistant: …"}'),
        ({"context": "hi"}, 'write rows such as {"text": "### Human: …### Assistant: …"}'),
        ({"texts": [1]}, 'write rows such as {"text": "### Human: …### Assistant: …"}'),
    ],
)
def test_a_column_is_to_be_renamed_only_where_that_helps(row, remedy):
    with pytest.raises(RowError) as caught:
        read_row(row)
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>", "ChatML"),
        ("### Instruction:\nhi\n\n### Response:\nyo", "Alpaca's format"),
        ("A chat.\nUSER: hi ASSISTANT: yo</s>", "Vicuna's format"),
        ("<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "Llama 3's format"),
        ("\n\nHuman: hi\n\nAssistant: yo", "plain Human: and Assistant:"),
    ],
)
def test_a_text_of_another_format_is_named(text, name):
    with pytest.raises(RowError, match=f"^column 'text' is written in {name} ") as caught:
        read_row({"text": text})
    assert caught.value.remedy.startswith('write its turns as rows such as {"messages": [')


def asked(ask: str, reply: str, given: str | None) -> Conversation:
    return said("\n\n".join(filter(None, [ask, given])), reply)


def test_a_new_form_is_one_entry(tmp_path, monkeypatch):
    """Read from every kind of file, by itself or by its name, with what it uses and what it does not."""
    entry = RowForm("asked", "questions and replies", ("ask", "reply"), asked, may_have=("given",))
    monkeypatch.setattr(forms, "FORMS", [entry, *forms.FORMS])
    (tmp_path / "a.jsonl").write_text(
        '{"ask": "a", "given": "b", "reply": "c", "system": "S", "id": 7}\n'
        '{"ask": "a", "given": "", "reply": "c", "text": "x"}\n'
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "reply": "x"}\n'
    )
    (tmp_path / "a.csv").write_text("ask,given,reply\na,b,c\n")
    read = load_records(str(tmp_path / "a.jsonl"))
    assert read.conversations == [said("a\n\nb", "c", system="S"), said("a", "c"), said("hi", "yo")]
    assert read.dropped == {
        "rows hold what is not used: column 'id' (1), column 'text' beside 'ask' and 'reply' (1), "
        "column 'reply' beside 'messages' (1)": 3
    }
    for form in ("auto", "asked"):
        assert load_records(str(tmp_path / "a.csv"), reading=Reading(form)).conversations == [said("a\n\nb", "c")]
    with pytest.raises(RowError, match=r"^column 'reply' holds a number, expected text$"):
        read_row({"ask": "a", "reply": 3})
    with pytest.raises(RowError, match=r"^no column 'ask' and 'reply' or 'messages' or"):
        read_row({"ask": "a"})
