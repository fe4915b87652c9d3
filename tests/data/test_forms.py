"""A row becomes a conversation, whatever its form; what of it is not used is named; a form that is not read, too."""

import json
import shlex

import numpy as np
import pytest

from lit_qlora.data import forms
from lit_qlora.data.forms import RowForm, check_columns, list_in
from lit_qlora.data.records import Reading, load_records
from lit_qlora.data.row import LEARNED_WHOLE, WRITE_TURNS, RowError, read_row
from lit_qlora.text import messages
from lit_qlora.text.conversation import Conversation, Turn
from tests.data.talks import said
from tests.expect import check_line

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
    assert read_row({**row, column: "Be kind."}) == (said("hi", "yo", system="Be kind."), (), (), ())
    for nothing in (None, "", " ", float("nan")):
        assert read_row({**row, column: nothing}) == (said("hi", "yo"), (), (), ())
    with pytest.raises(RowError, match=f"^column '{column}' holds a number, expected text$"):
        read_row({**row, column: 3})


def test_the_conversation_s_own_system_text_stands_and_another_is_named():
    row = {"messages": [{"role": "system", "content": "Mine."}, *TURNS]}
    assert read_row({**row, "system": "Mine. "}) == (said("hi", "yo", system="Mine."), (), (), ())
    assert read_row({**row, "system": "Other."}) == (
        said("hi", "yo", system="Mine."),
        (),
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
    assert read_row(row) == (said("hi", "yo"), (), tuple(unused), ())


def test_a_forced_form_names_the_column_that_it_passes_by():
    row = {"messages": TURNS, "text": "### Human: a### Assistant: b"}
    assert read_row(row, "guanaco") == (said("a", "b"), (), ("column 'messages' beside 'text'",), ())


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0), ("weight", 0.0), ("weight", "0"), ("loss_weight", 0), ("train", False), ("train", "False"),
     ("trainable", False), ("training", 0), ("loss", False), ("loss_mask", 0)],
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
    assert read == (said(*(turn["content"] for turn in AWKWARD)), (), (), ())


def test_a_list_with_a_backslash_that_means_nothing_is_read_without_a_warning():
    assert list_in(r"['\d', 'b']") == [r"\d", "b"]


@pytest.mark.parametrize("words", ["hello", "{'role': 'user'}", "[" * 100_000, "[__import__('os')]", "[1", ""])
def test_a_text_that_is_no_list_stays_one(words):
    assert list_in(words) in (words, None)


def test_a_text_that_begins_in_a_list_is_not_read_as_one():
    assert read_row({"text": f"[1] {TEXT}"}).conversation == said("hi", "yo", system="[1]")


HI = said("hi", "yo")
OTHERS = {
    "Alpaca": (
        {"instruction": "Sum up.", "input": "A long text.", "output": "Short."},
        said("Sum up.\n\nA long text.", "Short."),
    ),
    "Alpaca with nothing given": ({"instruction": "hi", "input": "", "output": "yo"}, HI),
    "Alpaca with null given": ({"instruction": "hi", "input": None, "output": "yo"}, HI),
    "Alpaca with all in its input": ({"instruction": "", "input": "hi", "output": "yo"}, HI),
    "Alpaca without input": ({"instruction": "hi", "output": "yo"}, HI),
    "Alpaca's own text beside": (
        {"instruction": "hi", "input": "", "output": "yo", "text": "Below is an instruction.\n\n### Instruction:\nhi"},
        HI,
    ),
    "Alpaca, system and history": (
        {"instruction": "c", "input": "", "output": "d", "system": "Be kind.", "history": [["a", "b"]]},
        said("a", "b", "c", "d", system="Be kind."),
    ),
    "history as messages": (
        {
            "instruction": "c",
            "output": "d",
            "history": [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}],
        },
        said("a", "b", "c", "d"),
    ),
    "history as pandas writes it": (
        {"instruction": "c", "output": "d", "history": "[['a', 'b']]"},
        said("a", "b", "c", "d"),
    ),
    "history of tuples, as pandas writes it": (
        {"instruction": "c", "output": "d", "history": "[('a', 'b')]"},
        said("a", "b", "c", "d"),
    ),
    "history as pandas writes what parquet held": (
        {
            "instruction": "c",
            "output": "d",
            "history": "[array(['a] [', 'b'], dtype=object)\n array(['e', 'f'], dtype=object)]",
        },
        said("a] [", "b", "e", "f", "c", "d"),
    ),
    "no history": ({"instruction": "hi", "output": "yo", "history": []}, HI),
    "Dolly": (
        {"instruction": "Sum up.", "context": "A long text.", "response": "Short."},
        said("Sum up.\n\nA long text.", "Short."),
    ),
    "Dolly with input": ({"instruction": "Sum.", "input": "1 2", "response": "3"}, said("Sum.\n\n1 2", "3")),
    "Alpaca with both": (
        {"instruction": "a", "input": "c", "context": "d", "output": "b"},
        said("a\n\nc\n\nd", "b"),
    ),
    "Dolly without context": ({"instruction": "hi", "context": "", "response": "yo"}, HI),
    "prompt and completion": ({"prompt": "hi", "completion": "yo"}, HI),
    "prompt and completion as messages": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, HI),
    "prompt and completion as one message each": ({"prompt": TURNS[0], "completion": TURNS[1]}, HI),
    "prompt and completion as a .csv has messages": (
        {"prompt": json.dumps(TURNS[:1]), "completion": str(TURNS[1:])},
        HI,
    ),
    "an answer that looks like messages": (
        {"prompt": "hi", "completion": json.dumps(TURNS)},
        said("hi", json.dumps(TURNS)),
    ),
    "prompt and response": ({"prompt": "hi", "response": "yo"}, HI),
    "question and answer": ({"question": "hi", "answer": "yo"}, HI),
    "question, context and answer": ({"question": "a", "context": "c", "answer": "b"}, said("a\n\nc", "b")),
    "OpenOrca": ({"system_prompt": "s", "question": "hi", "response": "yo"}, said("hi", "yo", system="s")),
    "query and response": ({"query": "hi", "response": "yo"}, HI),
    "input and output": ({"input": "hi", "output": "yo"}, HI),
    "user and assistant": ({"user": "hi", "assistant": "yo"}, HI),
    "ShareGPT": ({"conversations": SHARED}, HI),
    "conversation": ({"conversation": TURNS}, HI),
    "XTuner": ({"conversation": [{"system": "s", "input": "hi", "output": "yo"}]}, said("hi", "yo", system="s")),
    "messages as texts": ({"messages": [json.dumps(turn) for turn in TURNS]}, HI),
    "texts that are objects": ({"conversations": ['{"a": 1}', "{b"]}, said('{"a": 1}', "{b")),
    "dialog of texts": ({"dialog": ["hi", "yo"]}, HI),
    "dialogue": ({"dialogue": json.dumps(SHARED)}, HI),
}


@pytest.mark.parametrize(("row", "conversation"), OTHERS.values(), ids=OTHERS)
def test_a_form_is_known_by_its_columns(row, conversation):
    unused = ("column 'text' beside 'instruction' and 'output'",) if "text" in row else ()
    assert read_row(row) == (conversation, (), unused, ())


def test_a_text_in_a_known_form_comes_before_columns_beside():
    row = {"text": TEXT, "instruction": "a", "output": "b"}
    beside = ("column 'instruction' beside 'text'", "column 'output' beside 'text'")
    assert read_row(row) == (said("hi", "yo"), (), beside, ())
    assert read_row(row, "alpaca").conversation == said("a", "b")
    assert read_row({"text": "prose", "instruction": "a", "output": "b"}).conversation == said("a", "b")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a", "output": None}, ["'output'", "null"]),
        ({"question": "a", "answer": 4}, ["'answer'", "a number"]),
        ({"question": "a", "answer": ["b", "c"]}, ["'answer'", "a list"]),
        ({"question": "a", "context": ["b", "c"], "answer": "d"}, ["'context'", "a list"]),
        ({"prompt": " ", "completion": "b"}, ["turn 1", "user", "empty"]),
        ({"prompt": "a", "completion": ""}, ["turn 2", "assistant", "empty"]),
        ({"query": "a", "response": "b", "history": ["c"]}, ["history is a list", "a list of pairs"]),
        ({"query": "a", "response": "b", "history": "c"}, ["history is a text", "a list of pairs"]),
    ],
)  # fmt: skip
def test_columns_that_hold_no_conversation(row, words):
    with pytest.raises(RowError) as caught:
        read_row(row)
    check_line(str(caught.value), *words)


@pytest.mark.parametrize(
    ("columns", "row", "conversation"),
    [
        ({"user": "Frage", "assistant": "Antwort"}, {"Frage": "hi", "Antwort": "yo"}, HI),
        ({"user": "q", "assistant": "a", "context": "c", "system": "s"}, {"q": "A", "a": "B", "c": "C", "s": "S"},
         said("A\n\nC", "B", system="S")),
        ({"user": "q", "assistant": "a", "context": "c"}, {"q": "hi", "a": "yo", "c": None}, HI),
        ({"instruction": "q", "output": "a"}, {"q": "hi", "a": "yo"}, HI),
        ({"messages": "turns"}, {"turns": TURNS}, HI),
        ({"conversations": "items"}, {"items": json.dumps(SHARED)}, HI),
        ({"text": "body"}, {"body": TEXT}, HI),
        ({"text": "body"}, {"body": "[INST] hi [/INST] yo"}, HI),
        ({"user": "q", "assistant": "a", "input": "c"}, {"q": "A", "a": "B", "c": "C"}, said("A\n\nC", "B")),
        ({"user": "prompt", "assistant": "chosen"}, {"prompt": "hi", "chosen": "yo"}, HI),
        ({"user": "prompt", "assistant": "chosen"}, {"prompt": TURNS[:1], "chosen": TURNS[1:]}, HI),
    ],
)  # fmt: skip
def test_columns_by_other_names(columns, row, conversation):
    check_columns(columns)
    assert read_row(row, columns=columns) == (conversation, (), (), ())
    # Nothing else is used then, whatever it is called.
    beside = {**row, "messages": SHARED, "system": "x", "history": [["y", "z"]]}
    assert read_row(beside, columns=columns).conversation == conversation
    assert len(read_row(beside, columns=columns).unused) == 3


@pytest.mark.parametrize(
    ("columns", "form", "words", "option"),
    [
        ({"usr": "q", "assistant": "a"}, "auto", ["'usr' is unknown", "did you mean 'user'?"], "data.columns"),
        ({"user": "q"}, "auto", ["names user, expected user and assistant"], "data.columns"),
        ({"system": "s"}, "auto", ["names system, expected messages or"], "data.columns"),
        ({}, "auto", ["names no column, expected messages or"], "data.columns"),
        ({"user": "q", "assistant": "a"}, "alpaca", ["'user' is unknown, expected instruction,"], "data.columns"),
        ({"user": " ", "assistant": "a"}, "auto", ["blank"], "data.columns.user"),
    ],
)  # fmt: skip
def test_columns_that_make_up_no_form(columns, form, words, option, expect_error):
    expect_error(lambda: check_columns(columns, form), *words, option=option)


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"prompt": "a", "answer": "b"}, "give --data.columns.user prompt --data.columns.assistant answer"),
        ({"Question": "a", "Answer": "b"}, "give --data.columns.user Question --data.columns.assistant Answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"},
         "give --data.columns.user prompt --data.columns.assistant chosen"),
        ({"prompt": "a", "chosen": TURNS, "rejected": TURNS}, "give --data.columns.messages chosen"),
        ({"rejected": TURNS, "chosen": TURNS}, "give --data.columns.messages chosen"),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]},
         "give --data.columns.user prompt --data.columns.assistant chosen"),
        ({"Instruction ": "a", " Output": "b"},
         "give --data.columns.user 'Instruction ' --data.columns.assistant ' Output'"),
        ({"quesiton": "a", "awnser": "b"}, "give --data.columns.user quesiton --data.columns.assistant awnser"),
        ({"question": "a", "response_j": "better", "response_k": "worse"},
         "name them with --data.columns.user COLUMN --data.columns.assistant COLUMN,"
         ' or write rows such as {"question": "…", "answer": "…"}'),
        ({"inputs": "a", "targets": "b"}, "give --data.columns.user inputs --data.columns.assistant targets"),
        # What is named is read: an object is no answer, nor is what stands in it a row by its name alone.
        ({"question": "a", "answers": {"text": ["b"], "answer_start": [0]}},
         'write rows such as {"question": "…", "answer": "…"}'),
        ({"id": 1, "data": {"prompt": "a", "response": "b"}}, "write what stands in column 'data' as the row itself"),
        ({"id": 1, "talk": {"messages": TURNS}}, "write what stands in column 'talk' as the row itself"),
        ({"question": "a", "context": "c", "answers": "b", "system": "s"},
         "give --data.columns.user question --data.columns.context context --data.columns.assistant answers"
         " --data.columns.system system"),
        ({"formatted": "<s>[INST] a [/INST] b </s>", "id": "x"}, "give --data.columns.text formatted"),
        # An answer alone is no conversation, nor is the question that stands elsewhere.
        ({"input": {"messages": TURNS[:1]}, "preferred_output": TURNS[1:], "non_preferred_output": TURNS[1:]},
         'write rows such as {"question": "…", "answer": "…"}'),
        ({"My Question": "a", "Texts": TEXT}, "give --data.columns.text Texts"),
        ({"message": TURNS}, "give --data.columns.messages message"),
        ({"turns": TURNS, "system": "s"}, "give --data.columns.messages turns --data.columns.system system"),
        # What is written in a format that is not read says so.
        ({"system": "SYSTEM: s", "chat": "USER: a\n\n\nASSISTANT: b"}, WRITE_TURNS),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, WRITE_TURNS),
        ({"prompt": {"text": "a", "role": "prompter", "replies": []}},
         'write rows such as {"question": "…", "answer": "…"}'),
        ({"my items": SHARED}, "give --data.columns.messages 'my items'"),
        ({"turns": json.dumps(TURNS)}, "give --data.columns.messages turns"),
        ({"Frage": "hi", "Antwort": "yo"}, "name them with --data.columns.user COLUMN --data.columns.assistant COLUMN,"
         ' or write rows such as {"question": "…", "answer": "…"}'),
        # Not by its name alone.
        ({"message": "hi"}, 'write rows such as {"question": "…", "answer": "…"}'),
        ({"context": "hi"}, 'write rows such as {"question": "…", "answer": "…"}'),
        ({"texts": [1]}, 'write rows such as {"question": "…", "answer": "…"}'),
    ],
)  # fmt: skip
def test_a_row_that_is_not_read_has_the_options_named_that_read_it(row, remedy):
    problem = (
        r"(no column 'messages' or .* \(or others\), columns found: |column .* is written in .*, which is not read)"
    )
    with pytest.raises(RowError, match=f"^{problem}") as caught:
        read_row(row)
    assert caught.value.remedy == remedy
    if not remedy.startswith("give"):
        return
    words = shlex.split(remedy.removeprefix("give "))
    columns = {
        name.removeprefix("--data.columns."): column for name, column in zip(words[::2], words[1::2], strict=True)
    }
    check_columns(columns)
    assert read_row(row, columns=columns).conversation.is_answered


def test_of_a_plain_text_in_another_column_the_option_is_named_that_reads_it():
    row = {"content": "Once upon a time.", "id": 1}
    with pytest.raises(RowError) as caught:
        read_row(row, is_whole=True)
    assert caught.value.remedy.endswith("; for plain text, give --data.columns.text COLUMN")
    assert read_row(row, columns={"text": "content"}, is_whole=True).conversation.is_text


@pytest.mark.parametrize("blank", ["nan", "NaN", " <noinput> "])
def test_a_text_in_the_place_of_nothing_given_is_left_out_and_counted(blank):
    row = {"instruction": "hi", "input": blank, "output": "nan"}
    left_out = (f"rows with {blank.strip()!r} in column 'input', left out as nothing",)
    assert read_row(row) == (said("hi", "nan"), left_out, (), ())
    assert read_row({**row, "input": float("nan")}) == (said("hi", "nan"), (), (), ())
    assert read_row({**row, "input": "None"}).conversation == said("hi\n\nNone", "nan")


def test_a_text_and_its_class_are_to_be_named():
    with pytest.raises(RowError) as caught:
        read_row({"text": "great", "sentiment": "positive"})
    assert "--data.columns.user COLUMN --data.columns.assistant COLUMN" in caught.value.remedy
    named = {"user": "text", "assistant": "sentiment"}
    assert read_row({"text": "great", "sentiment": "positive"}, columns=named).conversation == said("great", "positive")


def test_plain_text_is_read_where_all_of_it_is_learned():
    row = {"text": "Once upon a time.", "system": "x"}
    with pytest.raises(RowError, match="neither '### Human:' nor '\\[INST\\]', expected a conversation") as caught:
        read_row(row)
    assert "data.train_on all" in caught.value.remedy
    story = Conversation((Turn("text", "Once upon a time."),))
    assert read_row(row, is_whole=True) == (story, (LEARNED_WHOLE,), ("column 'system' beside a plain text",), ())
    assert read_row({"text": "A story.</s>"}, "text", is_whole=True).taken_off == ("</s>",)
    assert read_row({"body": "A story."}, columns={"text": "body"}, is_whole=True).conversation.is_text
    # What has a form is a conversation even so, and what is written in an unknown one is no story.
    assert read_row({"text": TEXT}, is_whole=True) == (said("hi", "yo"), (), (), ())
    with pytest.raises(RowError, match="ChatML"):
        read_row({"text": "<|im_start|>user\nhi<|im_end|>"}, is_whole=True)
    assert read_row({"text": "### Human is no mark"}, "text", is_whole=True).conversation.is_text


def test_an_opening_of_the_assistant_s_is_left_out_or_kept():
    row = {"messages": [TURNS[1], *TURNS]}
    assert read_row(row) == (said("hi", "yo"), (messages.OPENING_LEFT_OUT,), (), ())
    assert read_row(row, opening="Begin!").conversation == said("Begin!", "yo", "hi", "yo")
    with pytest.raises(RowError, match="only the assistant speaks") as caught:
        read_row({"messages": TURNS[1:]})
    assert "data.opening" in caught.value.remedy
    with pytest.raises(RowError, match="only the assistant speaks") as caught:
        read_row({"messages": TURNS[1:]}, use="prompts")
    assert caught.value.remedy == "mend or delete this row"


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
    assert "data.form text" not in caught.value.remedy
    with pytest.raises(RowError) as caught:
        read_row({"text": text}, is_whole=True)
    is_plain = not text.startswith("<")  # what opens turns by special tokens is no plain text
    assert caught.value.remedy.endswith(", or learn it whole as it is with data.form text") is is_plain
    if is_plain:
        assert read_row({"text": text}, "text", is_whole=True).conversation.is_text


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
        "rows with what is not used: column 'id' (1), column 'text' beside 'ask' and 'reply' (1), "
        "column 'reply' beside 'messages' (1)": 3
    }
    for form in ("auto", "asked"):
        assert load_records(str(tmp_path / "a.csv"), reading=Reading(form)).conversations == [said("a\n\nb", "c")]
    prompt = read_row({"ask": "a", "given": "b", "reply": "c"}, use="prompts")
    assert prompt.conversation == said("a\n\nb", "c"), "not its first column alone"
    with pytest.raises(RowError, match=r"^column 'reply' holds a number, expected text$"):
        read_row({"ask": "a", "reply": 3})
    with pytest.raises(RowError, match=r"^no column 'messages' or .* \(or others\), columns found: \['ask'\]"):
        read_row({"ask": "a"})


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (4, 'write it as one text, such as "4", or delete this row'),
        (True, 'write it as one text, such as "True", or delete this row'),
        (["b", "c"], "write it as one text, or delete this row"),
        ({"text": "b"}, "write it as one text, or delete this row"),
        (b"b", "write it as one text, or delete this row"),
        (None, "mend or delete this row"),
        (float("nan"), "mend or delete this row"),
    ],
)
def test_an_answer_that_is_no_text_has_its_remedy(answer, remedy):
    with pytest.raises(RowError, match=r"^column 'answer' holds .*, expected text$") as caught:
        read_row({"question": "a", "answer": answer})
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            {"instruction": "Sum.</s>", "input": "<s>1 2</s>", "output": "<s>3</s>", "system": "be kind</s>"},
            None,
            said("Sum.\n\n1 2", "3", system="be kind"),
        ),
        ({"instruction": "Sum.</s>", "input": "</s>", "output": "3"}, None, said("Sum.", "3")),
        ({"instruction": "Sum.", "context": "1 2</s>", "response": "3</s>"}, None, said("Sum.\n\n1 2", "3")),
        (
            {"instruction": "c</s>", "output": "d", "history": [["<s>a", "b</s>"]]},
            None,
            said("a", "b", "c", "d"),
        ),
        (
            {"q": "Sum.</s>", "of": "1 2</s>", "a": "3"},
            {"user": "q", "context": "of", "assistant": "a"},
            said("Sum.\n\n1 2", "3"),
        ),
        ({"text": "### Human: a</s>### Human: b</s>### Assistant: c"}, None, said("a\n\nb", "c")),
        (
            {"text": "<s>### System: be kind</s>### Human: a### Assistant: c</s>"},
            None,
            said("a", "c", system="be kind"),
        ),
        ({"prompt": "<s>[INST] hi [/INST]", "completion": " yo </s>"}, None, said("hi", "yo")),
    ],
)
def test_marks_are_taken_off_what_is_joined(row, columns, expected):
    read = read_row(row, columns=columns)
    assert read.conversation == expected
    assert "</s>" in read.taken_off


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<<SYS>>\nbe kind\n<</SYS>>\n\na", said("a", "b", system="be kind")),
        ("<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\na [/INST]", said("a", "b", system="be kind")),
        ("[INST] a [/INST] c </s><s>[INST] d [/INST]", said("a", "c", "d", "b")),
        ("What does [INST] mean in <<SYS>>?", said("What does [INST] mean in <<SYS>>?", "b")),
        ("### Human: a### Assistant:", said("a", "b")),
        ("\n### Human: a### Assistant: c### Human: d", said("a", "c", "d", "b")),
        ("What does ### Human: mean?", said("What does ### Human: mean?", "b")),
        ("Human: a. And you?", said("Human: a. And you?", "b")),
    ],
)
def test_a_prompt_in_the_form_of_a_text_has_its_system_text_and_its_rounds(prompt, expected):
    assert read_row({"prompt": prompt, "completion": "b"}).conversation == expected
    assert read_row({"prompt": prompt}, use="prompts").conversation.turns == expected.turns[:-1]
    given = read_row({"instruction": prompt, "input": "x", "output": "b"}).conversation.turns
    assert given[-2].content == f"{expected.turns[-2].content}\n\nx"


@pytest.mark.parametrize("use", ["training", "prompts"])
@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Below is a task.\n\n### Instruction:\na\n\n### Response:\n", "Alpaca's format"),
        ("A chat. USER: a ASSISTANT:", "Vicuna's format"),
        ("\n\nHuman: a\n\nAssistant:", "plain Human: and Assistant:"),
    ],
)
def test_a_prompt_that_ends_where_another_format_begins_an_answer_is_refused(prompt, name, use):
    for row in ({"prompt": prompt, "completion": "b"}, {"question": prompt, "answer": "b"}):
        with pytest.raises(RowError, match=f"^the prompt is written in {name}") as caught:
            read_row(row, use=use)
        assert caught.value.remedy == WRITE_TURNS


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["<<SYS>>\nbe kind\n<</SYS>>\n\na", "b"], said("a", "b", system="be kind")),
        (["[INST] <<SYS>>\nbe kind\n<<SYS>>\n\na [/INST]", "b", "c", "d"], said("a", "b", "c", "d", system="be kind")),
        ([{"role": "system", "content": "<<SYS>>be kind<</SYS>>"}, "a", "b"], said("a", "b", system="be kind")),
        (["<<SYS>>\n\n<</SYS>>a", "b"], said("a", "b")),
        # It opens only there, and is closed; another system text stands.
        (["a", "b", "<<SYS>>x<</SYS>>c", "d"], said("a", "b", "<<SYS>>x<</SYS>>c", "d")),
        (["<<SYS>> is what?", "b"], said("<<SYS>> is what?", "b")),
        ([{"role": "system", "content": "s"}, "<<SYS>>x<</SYS>>a", "b"], said("<<SYS>>x<</SYS>>a", "b", system="s")),
    ],
)
def test_a_system_text_in_the_first_message_of_the_llama_2_format_stands_in_its_place(turns, expected):
    roles = iter(("user", "assistant", "user", "assistant"))
    rows = [turn if isinstance(turn, dict) else {"role": next(roles), "content": turn} for turn in turns]
    assert read_row({"messages": rows}).conversation == expected


def test_a_system_column_in_the_llama_2_format_holds_its_text():
    read = read_row({"system": "<<SYS>>\nbe kind\n<</SYS>>", "messages": TURNS})
    assert read.conversation == said("hi", "yo", system="be kind")


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|system|>\nbe kind</s>\n<|user|>\na</s>\n<|assistant|>",
        "<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nc<end_of_turn>\n<start_of_turn>user\nd",
    ],
    ids=["ChatML", "Llama 3", "Zephyr", "Gemma"],
)
def test_a_prompt_that_is_a_whole_conversation_is_none(prompt):
    for row in ({"prompt": prompt, "completion": "b"}, {"messages": [{"role": "user", "content": prompt}]}):
        with pytest.raises(RowError, match="opens turns inside, with '<") as caught:
            read_row(row)
        assert caught.value.remedy.startswith('write its turns as rows such as {"messages": [')


def test_a_text_that_speaks_of_a_format_is_read():
    words = "Does <|im_start|>user open a turn, and <|im_start|>assistant another?"
    assert read_row({"prompt": words, "completion": "Yes.</s>"}).conversation == said(words, "Yes.")


def test_a_tag_with_its_role_is_counted_as_a_whole():
    row = {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "completion": "yo<|im_end|>"}
    read = read_row(row)
    assert read.conversation == said("hi", "yo")
    assert read.taken_off == ("<|im_start|>user", "<|im_start|>assistant", "<|im_end|>")
