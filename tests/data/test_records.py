import csv
import json
from pathlib import Path

import datasets
import pytest

from lit_qlora.data.records import Lost, Reading, check_early, load_records
from lit_qlora.data.row import read_row
from lit_qlora.data.sources import sources_of
from lit_qlora.errors import UserError
from lit_qlora.text.formats import SpecialTokens, make_format
from tests.data.talks import kept, said, text, write

REAL = Path(__file__).parents[2].parent / "shared" / "real" / "guanaco"


def parquet(name: str, rows: list[dict]) -> str:
    datasets.Dataset.from_list(rows).to_parquet(name)
    return name


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


ROWS = {
    "guanaco": {"text": "### Human: hi### Assistant: yo"},
    "llama2": {"text": "<s>[INST] hi [/INST] yo </s>"},
    "llama2 bare": {"text": "[INST] hi [/INST] yo"},
    "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    "messages beside a text": {
        "text": None,
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
    },
    "text beside no messages": {"text": "### Human: hi### Assistant: yo", "messages": None},
    "text beside empty messages": {"text": "### Human: hi### Assistant: yo", "conversations": ""},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_each_form_is_recognised(row):
    assert load_records(write("a.jsonl", row)) == kept("a.jsonl", [said("hi", "yo")], {})
    assert load_records(parquet("a.parquet", [row])) == kept("a.parquet", [said("hi", "yo")], {})


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_a_csv_holds_messages_as_json(form):
    (column, messages), *_ = ROWS[form].items()
    with Path("a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["id", column, "text"], ["1", json.dumps(messages), ""], ["2", "", "[INST] a [/INST] b"]]
        )
    unused = {"rows with what is not used: column 'id' (2)": 2}
    assert load_records("a.csv") == kept("a.csv", [said("hi", "yo"), said("a", "b")], unused)


def test_a_text_that_is_no_list_of_messages_stays_a_mistake():
    for words in ("hello", '{"role": "user"}', "[" * 100_000):
        with pytest.raises(UserError, match=r"^a\.jsonl:1: expected a list .*, got a text"):
            load_records(write("a.jsonl", {"messages": words}))


def test_forms_may_be_mixed():
    assert load_records(write("a.jsonl", *ROWS.values())).conversations == [said("hi", "yo")] * 8


def test_the_first_mark_decides_on_a_text():
    rows = (
        {"text": "[INST] hi [/INST] ### Human: is a mark"},
        {"text": "### Human: hi### Assistant: x [INST]"},
    )
    assert load_records(write("a.jsonl", *rows)) == kept(
        "a.jsonl", [said("hi", "### Human: is a mark")], {"rows left out: a Llama 2 tag inside a turn": 1}
    )


def test_a_form_may_be_forced(expect_error):
    source = write("a.jsonl", {"text": "[INST] hi [/INST] yo", "messages": "other"})
    assert load_records(source, reading=Reading(form="llama2")).conversations == [said("hi", "yo")]
    with pytest.raises(UserError, match=r"^a\.jsonl:1: no '### Human:' in the text; got \{'text': "):
        load_records(source, reading=Reading(form="guanaco"))
    with pytest.raises(
        UserError, match=r"^a\.jsonl:1: no column 'conversations', columns found: \['text', 'messages'\]"
    ):
        load_records(source, reading=Reading(form="sharegpt"))
    expect_error(
        lambda: load_records(source, reading=Reading(form="message")),
        "'message'",
        "did you mean 'messages'",
        option="data.form",
    )


def test_what_can_not_be_trained_on_is_left_out_and_counted():
    rows = [
        text("a", "b"),
        text("a", "b", "c"),
        text("d", "e", "f"),
        text("only asked"),
        text("say [INST]", "b"),
        text("a", "<</SYS>>", "c"),
        text("a", "b", "an [INST] in what is dropped"),
        {"messages": [{"role": "system", "content": "<<SYS>>"}, *ROWS["messages"]["messages"]]},
    ]
    assert load_records(write("a.jsonl", *rows)) == kept(
        "a.jsonl",
        [said("a", "b"), said("a", "b"), said("d", "e"), said("a", "b")],
        {
            "unanswered last turns dropped": 3,
            "rows left out: nothing answered": 1,
            "rows left out: a Llama 2 tag inside a turn": 3,
        },
    )


OWN = 'give {path: …, columns: {user: "prompt", assistant: "answer"}}'
NO_COLUMN = "no column 'messages' or 'conversations' or "
BAD_ROWS = {
    "wrong columns": ({"title": "hi", "body": "yo"}, [NO_COLUMN, "['title', 'body']", "write rows such as"]),
    "near column": ({"Texts": "hi"}, [NO_COLUMN, "['Texts']", "--data.columns.text Texts"]),
    "no columns": ({}, [NO_COLUMN, "got {}", '{"question": "…", "answer": "…"}']),
    "number": ({"text": 3.5}, ["'text' holds a number", "{'text': 3.5}"]),
    "null": ({"text": None}, ["'text' holds null"]),
    "list": ({"text": ["a"]}, ["'text' holds a list", "{'text': ['a']}"]),
    "no marks": ({"text": "a story"}, ["'### Human:'", "'[INST]'", "{'text': 'a story'}", "delete this row"]),
    "blank": ({"text": " "}, ["'### Human:'", "{'text': ' '}"]),
    "long": ({"text": "x" * 300}, [f"got {{'text': '{'x' * 96}…{'x' * 51}'}}; "]),
    "control characters": ({"text": "\x1b[31m\n\u2028"}, [r"{'text': '\x1b[31m\n\u2028'}"]),
    "assistant alone": ({"text": "### Assistant: yo"}, ["only the assistant speaks", "data.opening"]),
    "empty question": ({"text": "### Human:### Assistant: b"}, ["turn 1", "user is empty"]),
    "empty answer": ({"text": "[INST] a [/INST] </s>"}, ["turn 2", "assistant is empty"]),
    "unpaired tag": ({"text": "[INST] a"}, ["turn 1", "[INST] without its [/INST]"]),
    "open system text": ({"text": "[INST] <<SYS>> a [/INST] b"}, ["the system text", "never closed by <</SYS>>"]),
    "unknown role": (
        {"messages": [{"role": "robot", "content": "hi"}]},
        ["turn 1", "unknown role 'robot'", "system, user, human, assistant, gpt"],
    ),
    "no messages": ({"messages": []}, ["at least one turn", "{'messages': []}"]),
    "text for messages": ({"messages": "hi"}, ["a list of messages", "got a text"]),
    "no content": ({"conversations": [{"from": "human"}]}, ["turn 1", "the user's content", "got null", "'from'"]),
    "lone surrogate": ({"text": "### Human: a\ud800### Assistant: b"}, [r"lone surrogate", r"a\ud800###"]),
}


@pytest.mark.parametrize(("row", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_one_line_that_says_where_and_what_to_do(row, words, expect_error):
    expect_error(lambda: load_records(write("a.jsonl", text("a", "b"), row)), *words, place="a.jsonl:2")


def test_the_line_of_a_csv_record_is_the_file_s_own(expect_error):
    Path("a.csv").write_text('text\n"### Human: a\n### Assistant: b"\n\nstory\n', "utf-8")
    expect_error(lambda: load_records("a.csv"), "'### Human:'", "{'text': 'story'}", place="a.csv:5")


def test_an_answer_that_a_label_calls_bad_is_not_learned(expect_error):
    pair = {"prompt": "a", "completion": "b"}
    rows = [pair | {"label": label} for label in (False, True, "false", 0, "no")]
    records = load_records(write("a.jsonl", *rows, {"text": "### Human: a### Assistant: b", "label": False}))
    assert records == kept(
        "a.jsonl",
        [said("a", "b")] * 3,
        {
            "rows left out: no answer is to be learned": 3,
            "rows with label false, which calls the answer bad: not learned": 3,
            "rows with what is not used: column 'label' (2)": 2,
        },
    )
    assert [lost.where for lost in records.left_out] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:6"]
    records = load_records(write("tagged.jsonl", *(pair | {"kto_tag": label} for label in (True, False))))
    assert (
        len(records.kept) == 1 and "rows with label false, which calls the answer bad: not learned" in records.dropped
    )
    named = Reading(columns={"user": "prompt", "assistant": "label"})
    assert load_records(write("b.jsonl", {"prompt": "a", "label": "False"}), reading=named).conversations == [
        said("a", "False")
    ]
    named = Reading(columns={"user": "prompt", "assistant": "completion"})
    bad = write("c.jsonl", rows[0])
    expect_error(
        lambda: load_records(bad, reading=named), "no row to train on or score", "label false", place="c.jsonl"
    )


def test_a_label_says_nothing_of_a_whole_text_nor_of_a_prompt():
    read = read_row({"text": "A story.", "label": False}, is_whole=True)
    assert [turn.learned for turn in read.conversation.turns] == [True]
    read = read_row({"prompt": "a", "label": False}, use="prompts")
    assert (read.unused, read.changed) == (("column 'label'",), ())


def test_rows_with_questions_that_are_only_images_are_no_faults(expect_error):
    image = {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}]}
    dropped = {
        "rows left out: nothing answered": 2,
        "rows with parts of type 'image', which are not learned": 2,
        "rows whose last turn of the user has no text, left out with its answer": 2,
    }
    rows = write("a.jsonl", image, text("a", "b"), image)
    records = load_records(rows, reading=Reading(strict=True))
    assert records == kept("a.jsonl", [said("a", "b")], dropped)
    assert [lost.where for lost in records.left_out] == ["a.jsonl:1", "a.jsonl:3"]
    expect_error(lambda: load_records(write("b.jsonl", image)), "nothing answered: 1", "'image'", place="b.jsonl")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (text("only asked"), "rows left out: nothing answered: 1"),
        (text("an [INST]", "b"), "rows left out: a Llama 2 tag inside a turn: 1"),
        # What of the row was not used may be what is missing.
        (
            {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}},
            "rows with what is not used: column 'chosen' (1)",
        ),
    ],
)
def test_nothing_left_is_an_error(row, reason, expect_error):
    expect_error(
        lambda: load_records(write("a.jsonl", row)),
        reason,
        "no row to train on or score",
        "expected conversations that end",
        place="a.jsonl",
    )


def test_a_split_without_rows_on_the_hub_is_an_error(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: datasets.Dataset.from_list([]))
    with pytest.raises(UserError, match=r"^owner/name: no row .* \(no rows\); expected "):
        load_records("owner/name")


def test_answers_in_a_column_of_their_own_are_to_be_named(tmp_path, expect_error):
    row = {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yo"}}
    file = tmp_path / "a.jsonl"
    file.write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
    expect_error(lambda: load_records(str(file)), "nothing answered: 2", "data.columns.assistant", place=file)
    reading = Reading(columns={"user": "conversations", "assistant": "chosen"})
    assert load_records(str(file), reading=reading).conversations == [said("hi", "yo")] * 2


GOOD = [text("a", "b")] * 9
BAD = {
    "empty turn": text("", "b"),
    "wrong columns": {"title": "x"},
    "no object": [],
    "torn": '{"text": "### Hum',
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_one_broken_row_in_ten_of_a_file_is_left_out_counted_and_named(bad):
    lines = [json.dumps(row) for row in GOOD]
    lines.insert(3, bad if isinstance(bad, str) else json.dumps(bad))
    Path("a.jsonl").write_text("\n".join(lines), "utf-8")
    records = load_records("a.jsonl")
    assert records.conversations == [said("a", "b")] * 9
    ((reason, count),) = records.dropped.items()
    assert count == 1
    assert reason.startswith("rows left out: no whole conversation, the first at a.jsonl:4")
    with pytest.raises(UserError, match=r"^a\.jsonl:4: "):
        load_records("a.jsonl", reading=Reading(strict=True))
    Path("a.jsonl").write_text("\n".join(lines[1:]), "utf-8")
    with pytest.raises(UserError, match=r"^a\.jsonl:3: "):
        load_records("a.jsonl")


def test_the_same_rule_holds_for_every_kind_of_source(monkeypatch):
    rows = [*GOOD, text("", "b")]
    Path("a.json").write_text(json.dumps(rows), "utf-8")
    with Path("a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([row["text"]] for row in GOOD), ["x", "one too many"]])
    parquet("a.parquet", rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: datasets.Dataset.from_list(rows))
    for source in ("a.json", "a.csv", "a.parquet", "owner/name"):
        records = load_records(source)
        assert (len(records.conversations), [*records.dropped.values()]) == (9, [1])
        assert f"the first at {source}" in next(iter(records.dropped))
        with pytest.raises(UserError, match=f"^{source}"):
            load_records(source, reading=Reading(strict=True))


def test_more_than_one_broken_row_in_ten_is_an_error():
    source = parquet("a.parquet", [text("a", "b")] * 8 + [text("", "b")])
    with pytest.raises(UserError, match=r"^a\.parquet: row 9: turn 1: .* user is empty; got "):
        load_records(source)


def test_strict_stops_at_a_row_that_the_format_can_not_hold():
    source = write("a.jsonl", text("a", "b"), text("say [INST]", "b"))
    assert len(load_records(source).conversations) == 1
    with pytest.raises(UserError, match=r"^a\.jsonl:2: turn 1 holds .\[INST\]..*data\.strict"):
        load_records(source, reading=Reading(strict=True))
    assert load_records(write("b.jsonl", text("a", "b", "c"), text("asked")), reading=Reading(strict=True)).dropped


def weighed(*weights: int) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": f"t{n}", "weight": w} for n, w in enumerate(weights)]}


def test_answers_of_weight_0_stay_as_context_only():
    rows = [weighed(0, 0, 0, 1), weighed(0, 1, 0, 0), weighed(0, 0), weighed(0, 1, 0, 0, 0)]
    records = load_records(write("a.jsonl", *rows))
    assert records.conversations == [said("t0", "t1", "t2", "t3"), said("t0", "t1"), said("t0", "t1")]
    assert [[turn.learned for turn in c.turns] for c in records.conversations] == [
        [False, False, False, True],
        [False, True],
        [False, True],
    ]
    assert records.dropped == {
        "rows left out: no answer is to be learned": 1,
        "last answers dropped: not to be learned": 2,
    }
    with pytest.raises(UserError, match=r"rows left out: no answer .*: 1\)"):
        load_records(write("b.jsonl", weighed(0, 0)))


def test_what_is_not_used_is_named_once_with_its_rows():
    rows = [
        {"id": 7, "tags": [], "note": None, **ROWS["messages"]},
        {"id": 8, "messages": [{**turn, "name": "Bo"} for turn in ROWS["messages"]["messages"]]},
        ROWS["messages"],
    ]
    assert load_records(write("a.jsonl", *rows)).dropped == {
        "rows with what is not used: column 'id' (2), key 'name' of a turn (1)": 2
    }
    many = {f"c{number}": 1 for number in range(32)}
    (words,) = load_records(write("a.jsonl", ROWS["messages"] | many)).dropped
    assert words.endswith("column 'c23' (1), and 8 more")


@pytest.mark.parametrize(
    ("column", "values", "learned"),
    [
        ("split", ["train", "test", "validation", "train"], [0, 3]),
        ("Data_Split", ["Train", " DEV ", "train_sft", None], [0, 2, 3]),
        ("split", ["train", "train", "math", "train"], [0, 1, 2, 3]),
        ("split", ["test", "test", "test", "test"], [0, 1, 2, 3]),  # none is for training: they are given as they are
    ],
)
def test_rows_that_a_column_names_for_another_split_are_not_trained_on(column, values, learned):
    rows = [{"prompt": f"q{place}", "completion": "a", column: value} for place, value in enumerate(values)]
    write("rows.jsonl", *rows)
    records = load_records("rows.jsonl", seed=1)
    assert [one.turns[0].content for one in records.conversations] == [f"q{place}" for place in learned]
    left_out = {what: count for what, count in records.dropped.items() if f"column {column!r} says" in what}
    assert [*left_out.values()] == ([4 - len(learned)] if len(learned) < 4 else [])
    assert any("not used" in what for what in records.dropped) is (len(learned) == 4)
    lost = [one for one in records.left_out if one.reason.startswith(f"column {column!r} says ")]
    assert {one.where for one in lost} == {f"rows.jsonl:{place + 1}" for place in range(4) if place not in learned}
    assert len(load_records("rows.jsonl").kept) == 4  # to find those again that a run held out


def test_special_tokens_at_the_edges_are_taken_off_and_counted():
    rows = [text("a", "b</s>"), text("a", "b </s> \n</s>", "c", "<s>d</s>"), text("a", "b")]
    assert load_records(write("a.jsonl", *rows)) == kept(
        "a.jsonl",
        [said("a", "b"), said("a", "b", "c", "d"), said("a", "b")],
        {"rows had special tokens written out at the edges of turns, which were taken off: </s> (2), <s> (1)": 2},
    )
    own = load_records(
        write("b.jsonl", text("a", "b[STOP]")),
        reading=Reading(prompt_format=make_format().of(SpecialTokens(eos="[STOP]"))),
    )
    assert own.conversations == [said("a", "b")]


def test_each_conversation_and_each_row_left_out_knows_where_it_stands():
    rows = [text("a", "b"), text("only asked"), text("x [INST] x", "b"), text("c", "d", "e"), "no object"]
    rows += [text("f", "g")] * 9
    records = load_records(write("a.jsonl", *rows))
    assert records.where == ["a.jsonl:1", "a.jsonl:4", *(f"a.jsonl:{line}" for line in range(6, 15))]
    assert [where for where, *_ in records.left_out] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:5"]
    assert records.left_out[0].reason == "nothing answered"
    assert [lost for *_, lost in records.left_out] == [Lost.ALL_UNANSWERED, Lost.NOTHING, Lost.NOTHING]
    words = ("nothing answered", "[INST]", "expected an object")
    assert all(word in reason for word, (_, reason, _) in zip(words, records.left_out, strict=True))


@pytest.mark.skipif(not REAL.is_dir(), reason="no real rows beside the checkout")
def test_the_real_rows():
    records = load_records(str(REAL / "openassistant_best_replies_eval_first259.jsonl"))
    assert (len(records.conversations), records.dropped) == (259, {"unanswered last turns dropped": 64})
    source = REAL / "guanaco-llama2-1k.train.parquet"
    records = load_records(str(source))
    place = f"{source}: row 435 (turn 5: a turn of the user is empty)"
    dropped = {f"rows left out: no whole conversation, the first at {place}": 3}
    assert (len(records.conversations), records.dropped) == (997, dropped)


def test_a_marker_of_the_human_at_the_end_asks_nothing():
    records = load_records(write("a.jsonl", {"text": "### Human: a### Assistant: b\n### Human:"}))
    counts = {"rows whose last turn of the user has no text, left out with its answer": 1}
    assert records == kept("a.jsonl", [said("a", "b")], counts)


def test_how_rows_were_changed_is_counted():
    """Rows that are left out for want of an answer are counted, too."""
    user, assistant = ROWS["messages"]["messages"]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    rows = [{"messages": chat} for chat in ([user, user, assistant], [user, user, assistant, user], [user, call])]
    assert load_records(write("a.jsonl", *rows)) == kept(
        "a.jsonl",
        [said("hi\n\nhi", "yo")] * 2,
        {
            "unanswered last turns dropped": 1,
            "rows left out: nothing answered": 1,
            "rows with turns of the user in a row, joined": 2,
            "rows with tool calls, which are not learned": 1,
        },
    )


@pytest.mark.parametrize(
    ("columns", "words", "option"),
    [
        ({"user": "qestion", "assistant": "reply"}, ["'qestion'", "did you mean 'question'?"], "data.columns.user"),
        ({"user": "question", "assistant": "reply", "context": "given"}, ["'given'"], "data.columns.context"),
        ({"user": "question", "assistant": "reply", "system": "sys"}, ["'sys'"], "data.columns.system"),
        ({"messages": "chat"}, ["'chat'"], "data.columns.messages"),
    ],
)
def test_a_column_that_no_row_has_is_refused_with_those_that_are_there(columns, words, option, expect_error):
    source = write("a.jsonl", *[{"question": "hi", "reply": "yo"}] * 3)
    reading = Reading(columns=columns)
    found = "columns found: ['question', 'reply']"
    expect_error(lambda: load_records(source, reading=reading), *words, found, option=option, place="a.jsonl")
    rows = [{"question": "hi", "reply": "yo", "given": "x"}, {"question": "hi", "reply": "yo"}]
    reading = Reading(columns={"user": "question", "assistant": "reply", "context": "given"})
    assert load_records(write("b.jsonl", *rows), reading=reading).conversations == [
        said("hi\n\nx", "yo"),
        said("hi", "yo"),
    ]


@pytest.mark.parametrize(
    ("columns", "option"),
    [
        ({"user": "qestion", "assistant": "reply"}, "columns.user"),
        ({"user": "question"}, "columns"),
        ({"usr": "question", "assistant": "reply"}, "columns"),
        ({"user": "question", "assistant": " "}, "columns.assistant"),
    ],
)
@pytest.mark.parametrize("given", ["data.source", "data.validation_source", "data.test_source"])
def test_errors_of_a_source_s_own_columns_name_them(given, columns, option, expect_error):
    source = {"path": write("a.jsonl", {"question": "hi", "reply": "yo"}), "columns": columns}
    for value in (source, [source, "b.jsonl"]):
        first, *_ = sources_of(value, given)
        for reading in (Reading(), Reading(columns={"messages": "chat"})):
            for read in (check_early, load_records):
                expect_error(lambda: read(first, "train", reading), option=f"{given}.{option}", place="a.jsonl")  # noqa: B023


@pytest.mark.parametrize(
    ("value", "option", "columns", "remedy"),
    [
        ("q.jsonl", "data.source", None, "give --data.columns.user prompt --data.columns.assistant answer"),
        (["q.jsonl", "b.jsonl"], "data.source", None, OWN),
        ("q.jsonl", "data.validation_source", None, OWN),
        ({"path": "q.jsonl", "columns": {"messages": "chat"}}, "data.source", None, OWN),
    ],
)
def test_columns_of_one_of_several_sources_are_asked_for_in_it(value, option, columns, remedy, expect_error):
    write("q.jsonl", {"prompt": "a", "answer": "b"}, {"chat": [{"role": "user", "content": "c"}]})
    source, *_ = sources_of(value, option)
    expect_error(lambda: load_records(source), remedy, place="q.jsonl:1")


def test_columns_of_all_sources_that_one_lacks(expect_error):
    source, _ = sources_of([write("q.jsonl", {"prompt": "a", "answer": "b"}), "b.jsonl"])
    reading = Reading(columns={"user": "Frage", "assistant": "Antwort"})
    load = lambda: load_records(source, reading=reading)  # noqa: E731
    expect_error(load, "columns: {…}", option="data.columns.user", place="q.jsonl")


def test_plain_text_is_counted():
    source = write("a.jsonl", {"text": "A story."}, text("hi", "yo"))
    records = load_records(source, reading=Reading(is_whole=True))
    assert [conversation.is_text for conversation in records.conversations] == [True, False]
    assert records.dropped == {"rows of plain text, which is learned whole": 1}


def early(name, **options):
    source, *_ = sources_of({"path": name, **options})
    check_early(source, "train", seed=3)


def test_an_early_look_refuses_what_is_refused_later_by_the_same_row(monkeypatch):
    good, bad = text("hi", "yo"), {"a": 1}
    for rows in ([bad], [good] * 5 + [bad] * 2, [good] * 90 + [bad] * 20):
        source = write("a.jsonl", *rows)
        with pytest.raises(UserError) as first:
            early(source)
        with pytest.raises(UserError) as later:
            load_records(source)
        assert str(first.value) == str(later.value)
    early(write("b.jsonl", *[good] * 30, bad, *[good] * 30))  # a stray row is left out
    early(write("c.jsonl", *[good] * 100, *[bad] * 500))  # which the beginning does not show
    early(write("d.jsonl", *[bad] * 3, *[good] * 97))
    monkeypatch.setattr("lit_qlora.data.records.EARLY_BYTES", 5)
    early(write("e.jsonl", bad))  # too large to be read twice


def test_an_early_look_at_a_source_with_columns_or_a_share_of_its_own():
    early(write("a.jsonl", {"frage": "hi", "antwort": "yo"}), columns={"user": "frage", "assistant": "antwort"})
    with pytest.raises(UserError, match=r"no column 'fragen', columns found: .*did you mean 'frage'"):
        early("a.jsonl", columns={"user": "fragen", "assistant": "antwort"})
    source = write("b.jsonl", *[text("hi", "yo")] * 40, *[{"a": 1}] * 5)
    for share in (0.1, 0.5, 1.0):
        try:
            load_records(sources_of({"path": source, "share": share})[0], seed=3)
        except UserError as error:
            with pytest.raises(UserError) as first:
                early(source, share=share)
            assert str(first.value) == str(error)
        else:
            early(source, share=share)


CASES = Path(__file__).parents[2].parent / "shared" / "cases"


@pytest.mark.skipif(not CASES.is_dir(), reason="no small cases beside the checkout")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("alpaca.jsonl", 24), ("dolly.jsonl", 24), ("prompt_completion.jsonl", 24),
        ("sharegpt_system_column.jsonl", 24),
        ("messages_weight0.jsonl", 24), ("messages_consecutive.jsonl", 24), ("messages_two_systems.jsonl", 24),
        ("guanaco_eos.jsonl", 24), ("wrapped.json", 24), ("pandas_repr.csv", 24), ("unicode.jsonl", 12),
        ("split2", 16), ("split3", 16), ("hfclone", 16),
    ],
)  # fmt: skip
def test_the_commonest_rows_are_read(name, count):
    assert len(load_records(str(CASES / name)).conversations) == count
