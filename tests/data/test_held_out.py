"""What is held out: rows of a source of their own, of the source's split, or a seeded share; never what is learned."""

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_qlora.data.held_out import _split, load_train_and_held_out
from lit_qlora.data.records import Records
from lit_qlora.errors import UserError
from lit_qlora.text.conversation import Conversation, Turn


def said(*contents: str, system: str | None = None) -> Conversation:
    turns = (Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(contents))
    return Conversation(tuple(turns), system)


def write(name: str, *rows: object) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return name


def text(*contents: str) -> dict[str, str]:
    marks = ("### Human: ", "### Assistant: ")
    return {"text": "".join(marks[index % 2] + content for index, content in enumerate(contents))}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ten() -> str:
    return write("ten.jsonl", *(text(f"q{number}", "a") for number in range(10)))


def questions(records: Records) -> list[str]:
    return [conversation.turns[0].content for conversation in records.conversations]


def test_a_share_is_held_out_by_the_seed_alone(ten):
    train, held_out = load_train_and_held_out(ten, None, 0.2, seed=0)
    assert questions(train) == ["q0", "q1", "q2", "q3", "q4", "q5", "q7", "q8"]
    assert questions(held_out) == ["q6", "q9"]
    assert (train.name, held_out.name) == ("ten.jsonl", "ten.jsonl, held out")
    assert load_train_and_held_out(ten, None, 0.2, seed=0) == (train, held_out)
    assert questions(load_train_and_held_out(ten, None, 0.2, seed=1)[1]) != ["q6", "q9"]


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.3, 3), (0.999, 9)])
def test_both_sides_get_at_least_one_row(ten, share, count):
    train, held_out = load_train_and_held_out(ten, None, share, seed=7)
    assert (len(train.conversations), len(held_out.conversations)) == (10 - count, count)


@given(
    st.lists(st.sampled_from("abcd"), min_size=2).filter(lambda said: len(set(said)) > 1),
    st.floats(0.01, 0.99),
)
def test_no_conversation_stands_on_both_sides(names, share):
    records = Records("rows", [said(name, "yo") for name in names], {"x": 1})
    train, held_out = _split(records, share, seed=3)
    assert questions(train)
    assert questions(held_out)
    assert not set(questions(train)) & set(questions(held_out))
    assert sorted(questions(train) + questions(held_out)) == sorted(names)
    assert (train.dropped, held_out.dropped) == ({"x": 1}, {})


@pytest.mark.parametrize("share", [0, 0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_holds_out_nothing_or_all_is_an_error(ten, share):
    with pytest.raises(UserError) as caught:
        load_train_and_held_out(ten, None, share, seed=0)
    assert str(caught.value) == (
        f"data.validation_share: is {share}, expected between 0 and 1, such as 0.05, because ten.jsonl has"
        " no test split; or give data.validation_source"
    )


def test_one_conversation_can_not_be_split():
    source = write("a.jsonl", text("a", "b"), text("a", "b", "c"))
    with pytest.raises(UserError) as caught:
        load_train_and_held_out(source, None, 0.5, seed=0)
    assert str(caught.value) == (
        "a.jsonl: has one conversation only, so none can be held out; add rows, or give data.validation_source"
    )


def test_the_source_s_own_test_split_is_held_out(ten):
    write("mine/train.jsonl", text("a", "b"))
    write("mine/test.jsonl", text("c", "d", "e"))
    train, held_out = load_train_and_held_out("mine", None, 0.5, seed=0)
    assert train == Records("mine", [said("a", "b")], {})
    assert held_out == Records("mine (test)", [said("c", "d")], {"unanswered last turns dropped": 1})
    assert load_train_and_held_out(ten, "mine", 0.5, seed=0)[1] == held_out
    assert load_train_and_held_out("mine", "mine", 0.5, seed=0)[1] == held_out


def test_a_validation_source_without_a_test_split_is_held_out_whole(ten):
    train, held_out = load_train_and_held_out(ten, write("other.jsonl", text("c", "d")), 0, seed=0)
    assert len(train.conversations) == 10
    assert held_out == Records("other.jsonl", [said("c", "d")], {})


def test_the_training_rows_are_not_held_out_whole(ten):
    with pytest.raises(UserError) as caught:
        load_train_and_held_out(ten, ten, 0.1, seed=0)
    assert str(caught.value) == (
        "data.validation_source: ten.jsonl is the training data itself; leave it out to hold out a share"
    )


def test_what_is_held_out_and_in_training_too_is_counted(ten):
    other = write("other.jsonl", text("q3", "a"), text("c", "d"), text("e", "f", "g"))
    _, held_out = load_train_and_held_out(ten, other, 0, seed=0)
    assert held_out.dropped == {
        "of 3 held-out conversations are in training too": 1,
        "unanswered last turns dropped": 1,
    }


def test_training_data_under_another_name_is_not_held_out(ten):
    Path("copy.jsonl").write_bytes(Path(ten).read_bytes())
    with pytest.raises(UserError) as caught:
        load_train_and_held_out(ten, "copy.jsonl", 0.1, seed=0)
    assert str(caught.value) == (
        "data.validation_source: all 10 conversations of copy.jsonl are training data, too (ten.jsonl), and say "
        "nothing of new ones; give others, or hold out a share of the source"
    )


def test_each_side_counts_its_own_unanswered_turns():
    rows = [text(f"q{number}", "a", *(["more"] if number % 2 else [])) for number in range(40)]
    train, held_out = load_train_and_held_out(write("a.jsonl", *rows), None, 0.25, seed=3)
    for records in (train, held_out):
        odd = sum(int(conversation.turns[0].content[1:]) % 2 for conversation in records.conversations)
        assert records.dropped == {"unanswered last turns dropped": odd}
        assert odd > 1


@pytest.mark.parametrize(("splits", "expected"), [(["train", "test"], "test"), (["train"], "train")])
def test_a_validation_source_on_the_hub(ten, monkeypatch, splits, expected):
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: splits)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda source, split: datasets.Dataset.from_list([text(f"{source} {split}", "a")]),
    )
    _, held_out = load_train_and_held_out(ten, "owner/name", 0.1, seed=0)
    assert questions(held_out) == [f"owner/name {expected}"]
