"""What is held out: rows of a source of their own, of the source's split, or a seeded share; never what is learned."""

from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_qlora.data.held_out import Parts, _divide, _draw
from lit_qlora.data.records import Kept, Records
from lit_qlora.data.run_rows import RunRows
from lit_qlora.data.sources import as_text
from lit_qlora.errors import UserError
from tests.data.talks import kept, said, text, write


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ten() -> str:
    return write("ten.jsonl", *(text(f"q{number}", "a") for number in range(10)))


def questions(records: Records) -> list[str]:
    return [conversation.turns[0].content for conversation in records.conversations]


def test_a_share_is_held_out_by_the_seed_alone(ten):
    train, held_out = Parts(ten, None, 0.2, seed=0).train_and_held_out()
    assert questions(train) == ["q0", "q1", "q2", "q3", "q4", "q5", "q7", "q8"]
    assert questions(held_out) == ["q6", "q9"]
    assert (train.name, held_out.name) == ("ten.jsonl", "ten.jsonl, held out")
    assert Parts(ten, None, 0.2, seed=0).train_and_held_out() == (train, held_out)
    assert questions(Parts(ten, None, 0.2, seed=1).train_and_held_out()[1]) != ["q6", "q9"]


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.3, 3), (0.999, 9)])
def test_both_sides_get_at_least_one_row(ten, share, count):
    train, held_out = Parts(ten, None, share, seed=7).train_and_held_out()
    assert (len(train.conversations), len(held_out.conversations)) == (10 - count, count)


@given(
    st.lists(st.sampled_from("abcd"), min_size=2).filter(lambda said: len(set(said)) > 1),
    st.floats(0.01, 0.99),
)
def test_no_conversation_stands_on_both_sides(names, share):
    undivided = Records("rows", [Kept(said(name, "yo"), name) for name in names], {"x": 1})
    train, held_out = _divide(undivided, _draw(undivided, share, seed=3))
    assert questions(train)
    assert questions(held_out)
    assert not set(questions(train)) & set(questions(held_out))
    assert sorted(questions(train) + questions(held_out)) == sorted(names)
    assert (train.dropped, held_out.dropped) == ({"x": 1}, {})
    assert [train.where, held_out.where] == [questions(train), questions(held_out)]


@pytest.mark.parametrize("share", [0, 0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_holds_out_nothing_or_all_is_an_error(ten, share, expect_error):
    expect_error(
        lambda: Parts(ten, None, share, seed=0).train_and_held_out(),
        share,
        "0.05",
        "ten.jsonl",
        "0.0001 holds out one",
        option="data.validation_share",
    )
    train, held_out = Parts(ten, None, 0.0001, seed=0).train_and_held_out()
    assert (len(train.conversations), len(held_out.conversations)) == (9, 1)


def test_one_conversation_can_not_be_split(expect_error):
    source = write("a.jsonl", text("a", "b"), text("a", "b", "c"))
    expect_error(
        lambda: Parts(source, None, 0.5, seed=0).train_and_held_out(),
        "one conversation only",
        "data.validation_source",
        place="a.jsonl",
    )


def test_the_source_s_own_test_split_is_held_out(ten):
    write("mine/train.jsonl", text("a", "b"))
    write("mine/test.jsonl", text("c", "d", "e"))
    train, held_out = Parts("mine", None, 0.5, seed=0).train_and_held_out()
    assert train == kept("mine", [said("a", "b")], {})
    assert held_out == kept("mine (test)", [said("c", "d")], {"unanswered last turns dropped": 1})
    assert Parts(ten, "mine", 0.5, seed=0).train_and_held_out()[1] == held_out
    assert Parts("mine", "mine", 0.5, seed=0).train_and_held_out()[1] == held_out


def folder_of(name: str, **splits: str) -> str:
    """A folder with a file for each split; each letter is a conversation."""
    for split, letters in splits.items():
        write(f"{name}/{split}.jsonl", *(text(letter, "a") for letter in letters))
    return name


def test_the_validation_split_comes_before_the_test_split(ten):
    folder_of("three", train="abc", validation="de", test="fg")
    for parts in (Parts("three"), Parts(ten, "three"), Parts("three", "three"), Parts("three", "./three/")):
        assert questions(parts.train_and_held_out()[1]) == ["d", "e"]
    assert Parts("three").train_and_held_out()[1].name == "three (validation)"
    folder_of("two", train="abc", val="de")
    train, held_out = Parts("two", share=0.5).train_and_held_out()
    assert (questions(train), questions(held_out), held_out.name) == (["a", "b", "c"], ["d", "e"], "two (val)")


@pytest.mark.parametrize(
    ("splits", "validation_source", "expected"),
    [
        ({"train": "abc", "validation": "de", "test": "fg"}, None, ["f", "g"]),
        ({"train": "abc", "test": "fg"}, None, None),
        ({"train": "abc", "test": "fg"}, "mine", None),
        ({"train": "abc", "test": "fg"}, "ten.jsonl", ["f", "g"]),
        ({"train": "abc", "validation": "de"}, None, None),
        ({"train": "abc"}, None, None),
    ],
)
def test_the_test_split_is_for_the_test_unless_it_is_held_out(ten, splits, validation_source, expected):
    records = Parts(folder_of("mine", **splits), validation_source).test()
    assert (records and questions(records)) == expected


def test_test_rows_that_are_trained_on_are_counted():
    assert Parts(folder_of("mine", train="abc", validation="d", test="cef")).test().dropped == {
        "test conversations, of 3, in training too": 1
    }
    with pytest.raises(UserError, match=r"^data.source: all 2 conversations of same \(test\) are training data"):
        Parts(folder_of("same", train="abc", validation="d", test="ac")).test()


def test_of_a_test_source_the_test_split_is_taken_and_never_the_training_data(ten):
    folder_of("three", train="abc", validation="de", test="fg")
    folder_of("two", train="abc", validation="de")
    assert questions(Parts(ten).test_of("three")) == ["f", "g"]
    assert questions(Parts(ten).test_of("two")) == ["d", "e"]
    assert questions(Parts(ten).test_of("three/train.jsonl")) == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"^data.test_source: \./ten.jsonl is the training data itself"):
        Parts(ten).test_of("./ten.jsonl")


def test_what_is_not_read_is_named(ten):
    folder_of("mine", train="abc", validation="de", test="fg", more="h")
    assert [*Parts("mine").unread().values()] == [["more.jsonl"]]
    assert [*Parts("mine", ten).unread().values()] == [["validation", "more.jsonl"]]
    assert [*Parts(ten, "mine").unread().values()] == []


# By the record of a run


def rows_of(parts: Parts) -> RunRows:
    train, held_out = parts.train_and_held_out()
    return RunRows.of(train.conversations, held_out.conversations, parts.validation_source)


def test_what_was_held_out_is_found_again_in_a_source_that_grew(ten):
    parts = Parts(ten, share=0.3, seed=0)
    _, before = parts.train_and_held_out()
    rows = rows_of(parts)
    write(ten, *(text(f"q{number}", "a") for number in range(20)))
    drawn = parts.train_and_held_out()[1]
    assert {*questions(drawn)} - {*questions(before)}  # some of which were trained on
    records, gone = parts.recall(rows)
    assert (questions(records), gone, records.name) == (questions(before), 0, "ten.jsonl, held out")
    assert records.dropped == {"new conversations there since the run began, not scored": 10}


def test_neither_order_nor_seed_nor_copies_change_what_was_held_out(ten):
    twice = write("a.jsonl", *(text(f"q{number % 8}", "a", "?") for number in range(16)))
    parts = Parts(twice, share=0.25, seed=0)
    _, before = parts.train_and_held_out()
    rows = rows_of(parts)
    assert parts.recall(rows) == (before, 0)
    assert len(before.conversations) == 4
    write(twice, *(text(f"q{number % 8}", "a", "?") for number in reversed(range(24))))
    found, gone = Parts(twice, share=0.9, seed=5).recall(rows)
    assert (found, gone) == (before, 0)
    assert all(one.lost_turn for one in (*found.kept, *before.kept))


def test_what_is_gone_is_counted_and_nothing_takes_its_place(ten, expect_error):
    parts = Parts(ten, share=0.3, seed=0)
    before = questions(parts.train_and_held_out()[1])
    rows = rows_of(parts)
    write(ten, *(text(f"q{number}", "a") for number in range(10) if f"q{number}" != before[1]))
    records, gone = parts.recall(rows)
    assert (questions(records), gone) == ([before[0], before[2]], 1)
    write(ten, text("new", "a"))
    expect_error(
        lambda: parts.recall(rows), "none of the 3", "ten.jsonl", "--data.validation_source", option="data.source"
    )


def test_a_split_that_is_added_later_changes_nothing():
    folder_of("mine", train="abcdefgh")
    parts = Parts("mine", share=0.25, seed=0)
    before = questions(parts.train_and_held_out()[1])
    rows = rows_of(parts)
    folder_of("mine", validation="xy", test="z")
    again = Parts("mine", share=0.25, seed=0)
    assert questions(again.train_and_held_out()[1]) == ["x", "y"]
    assert questions(again.recall(rows)[0]) == before


def test_rows_that_move_from_one_split_to_another_are_found():
    rows = rows_of(Parts(folder_of("mine", train="abc", test="de")))
    folder_of("mine", train="abc", validation="d", test="e")
    records, gone = Parts("mine").recall(rows)
    assert (questions(records), gone, records.name) == (["d", "e"], 0, "mine (validation) and mine (test)")


def test_held_out_rows_that_were_learned_stay_counted(ten):
    parts = Parts(ten, write("other.jsonl", text("q3", "a"), text("c", "d")))
    _, before = parts.train_and_held_out()
    assert parts.recall(rows_of(parts)) == (before, 0)
    assert before.dropped == {"held-out conversations, of 2, in training too": 1}


def test_the_run_s_own_validation_source_is_looked_in_where_none_is_given(ten):
    rows = rows_of(Parts(ten, write("other.jsonl", text("c", "d"))))
    for source in (None, "other.jsonl"):
        assert questions(Parts(ten, source).held_out(rows)[0]) == ["c"]


def test_another_validation_source_than_the_run_s_is_scored_where_it_is_given(ten):
    rows = rows_of(Parts(ten, write("other.jsonl", text("c", "d"))))
    assert questions(Parts(ten, write("third.jsonl", text("e", "f"))).held_out(rows)[0]) == ["e"]
    assert questions(Parts(ten, "other.jsonl").held_out(None)[0]) == ["c"]


def test_other_rows_are_scored_where_the_training_rows_are_gone(ten, expect_error):
    rows = rows_of(Parts(ten, share=0.5))
    (learned,) = questions(Parts(ten, share=0.5).train_and_held_out()[0])[:1]
    Path(ten).unlink()
    others = write("others.jsonl", text(learned, "a"), text("c", "d"))
    found, num_gone = Parts(ten, others).held_out(rows)
    assert (questions(found), num_gone) == ([learned, "c"], 0)
    assert found.dropped == {"held-out conversations, of 2, in training too": 1}
    assert questions(Parts(ten).test_of(others)) == [learned, "c"]
    write("others.jsonl", text(learned, "a"))
    expect_error(
        lambda: Parts(ten, others).held_out(rows), "training data, too", "run recorded", option="data.validation_source"
    )


def test_a_validation_source_without_a_test_split_is_held_out_whole(ten):
    train, held_out = Parts(ten, write("other.jsonl", text("c", "d")), 0, seed=0).train_and_held_out()
    assert len(train.conversations) == 10
    assert held_out == kept("other.jsonl", [said("c", "d")], {})


def test_the_training_rows_are_not_held_out_whole(ten, expect_error):
    expect_error(
        lambda: Parts(ten, ten, 0.1, seed=0).train_and_held_out(),
        "ten.jsonl",
        "the training data itself",
        option="data.validation_source",
    )


def test_what_is_held_out_and_in_training_too_is_counted(ten):
    other = write("other.jsonl", text("q3", "a"), text("c", "d"), text("e", "f", "g"))
    _, held_out = Parts(ten, other, 0, seed=0).train_and_held_out()
    assert held_out.dropped == {
        "held-out conversations, of 3, in training too": 1,
        "unanswered last turns dropped": 1,
    }


def test_training_data_under_another_name_is_not_held_out(ten, expect_error):
    Path("copy.jsonl").write_bytes(Path(ten).read_bytes())
    expect_error(
        lambda: Parts(ten, "copy.jsonl", 0.1, seed=0).train_and_held_out(),
        "all 10",
        "copy.jsonl",
        "(ten.jsonl)",
        option="data.validation_source",
    )


def test_each_side_counts_its_own_unanswered_turns():
    rows = [text(f"q{number}", "a", *(["more"] if number % 2 else [])) for number in range(40)]
    train, held_out = Parts(write("a.jsonl", *rows), None, 0.25, seed=3).train_and_held_out()
    for records in (train, held_out):
        odd = sum(int(conversation.turns[0].content[1:]) % 2 for conversation in records.conversations)
        assert records.dropped == {"unanswered last turns dropped": odd}
        assert odd > 1


def test_a_side_without_unanswered_turns_counts_none():
    kept = [Kept(said("a", "b"), lost_turn=True), Kept(said("c", "d"))]
    undivided = Records("rows", kept, {"unanswered last turns dropped": 1, "x": 1})
    train, held_out = _divide(undivided, {said("a", "b")})
    assert (train.dropped, held_out.dropped) == ({"x": 1}, {"unanswered last turns dropped": 1})


@pytest.mark.parametrize(("splits", "expected"), [(["train", "test"], "test"), (["train"], "train")])
def test_a_validation_source_on_the_hub(ten, monkeypatch, splits, expected):
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: splits)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda source, split: datasets.Dataset.from_list([text(f"{source} {split}", "a")]),
    )
    _, held_out = Parts(ten, "owner/name", 0.1, seed=0).train_and_held_out()
    assert questions(held_out) == [f"owner/name {expected}"]


def test_rows_of_the_source_itself_that_are_all_learned_are_its_mistake(expect_error):
    source = folder_of("mine", train=("a", "b"), validation=("a",))
    expect_error(Parts(source).train_and_held_out, "training data, too", option="data.source")


def test_a_share_that_is_not_drawn_is_no_draw(ten):
    assert Parts(ten).draws()
    assert not Parts(folder_of("mine", train=("a", "b"), test=("c",))).draws()
    assert not Parts(ten, folder_of("other", train=("z",))).draws()


def test_other_splits_beside_a_file_are_named_unless_they_are_read():
    folder = folder_of("mine", train=("a", "b"), validation=("c",), test=("d",))
    assert [*Parts(f"{folder}/train.jsonl").unread().values()] == [["test.jsonl", "validation.jsonl"]]
    assert [*Parts(f"{folder}/train.jsonl", f"{folder}/validation.jsonl").unread().values()] == [["test.jsonl"]]
    both = [f"{folder}/train.jsonl", f"{folder}/validation.jsonl"]
    assert [*Parts(both).unread().values()] == [["test.jsonl"]]
    Path(folder, "train.jsonl").rename(Path(folder, "mine.jsonl"))
    assert [*Parts(f"{folder}/mine.jsonl").unread().values()] == []


@pytest.mark.parametrize(
    ("source", "unread"),
    [
        ("my_train.jsonl", ["my-test.jsonl", "my_val.jsonl"]),
        ("a/train/rows.jsonl", ["validation"]),
        ("a/train", ["validation"]),
        ("b/Train", ["Validation"]),
    ],
)
def test_other_splits_beside_a_file_or_folder_go_by_the_rest_of_its_name(source, unread):
    names = ("my_train", "my_val", "my-test", "other_test", "test", "a/train/rows", "a/validation/rows", "a/test/x.txt",
             "b/Train/rows", "b/Validation/rows")  # fmt: skip
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write(f"{name}.jsonl" if "." not in name else name, text("q", "a"), text("r", "a"))
    assert Parts(source).unread() == {source: unread}
    read = Parts(
        source, source.replace("my_train", "my_val").replace("train", "validation").replace("Train", "Validation")
    )
    assert read.unread() == ({source: unread[:-1]} if unread[:-1] else {})


def test_a_number_after_a_name_is_the_rest_of_it():
    for name in ("train2", "test2", "test3", "test"):
        write(f"{name}.jsonl", text("q", "a"), text("r", "a"))
    assert Parts("train2.jsonl").unread() == {"train2.jsonl": ["test2.jsonl"]}


def test_a_split_as_the_hub_names_its_file_is_one():
    folder = Path(folder_of("mine", train=("a", "b"), test=("c",)))
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").rename(folder / f"{split}-00000-of-00001.jsonl")
    train, held_out = Parts(str(folder)).train_and_held_out()
    assert (questions(train), questions(held_out)) == (["a", "b"], ["c"])
    assert [*Parts(str(folder / "train-00000-of-00001.jsonl")).unread().values()] == [["test-00000-of-00001.jsonl"]]
    (folder / "data").mkdir()
    for file in folder.glob("*.jsonl"):
        file.rename(folder / "data" / file.name)
    train, held_out = Parts(str(folder)).train_and_held_out()
    assert (questions(train), questions(held_out)) == (["a", "b"], ["c"])


# Several sources


def test_sources_are_read_one_after_the_other_and_a_share_is_held_out_of_all(ten):
    other = write("other.jsonl", *(text(f"r{number}", "a") for number in range(10)), text("asked"))
    train, held_out = Parts([ten, other], None, 0.2, seed=0).train_and_held_out()
    assert len(train.conversations) == 16 and len(held_out.conversations) == 4
    assert sorted(questions(train) + questions(held_out)) == sorted(f"{n}{i}" for n in "qr" for i in range(10))
    assert [(part.name, len(part.conversations)) for part in train.parts] == [
        ("ten.jsonl", len([q for q in questions(train) if q[0] == "q"])),
        ("other.jsonl", len([q for q in questions(train) if q[0] == "r"])),
    ]
    assert [part.dropped for part in train.parts] == [{}, {"rows left out: nothing answered": 1}]
    assert [part.name for part in held_out.parts] == ["ten.jsonl, held out", "other.jsonl, held out"]
    assert (train.name, held_out.where[0][:3]) == ("ten.jsonl and other.jsonl", "ten")
    assert Parts([ten, other], None, 0.2, seed=0).train_and_held_out() == (train, held_out)
    assert Parts([ten], None, 0.2, seed=0).train_and_held_out() == Parts(ten, None, 0.2, seed=0).train_and_held_out()
    # One that stands in both is on one side.
    twin = Path("twin.jsonl")
    twin.write_bytes(Path(ten).read_bytes())
    for seed in range(20):
        train, held_out = Parts([ten, str(twin)], None, 0.2, seed=seed).train_and_held_out()
        assert not {*train.conversations} & {*held_out.conversations}


def test_each_source_s_own_split_is_held_out_and_a_share_of_the_others(ten):
    folder_of("mine", train="abc", validation="de", test="fg")
    folder_of("two", train="hij", test="kl")
    parts = Parts(["mine", ten, "two"], None, 0.2, seed=0)
    train, held_out = parts.train_and_held_out()
    assert questions(train)[:3] == ["a", "b", "c"] and questions(train)[-3:] == ["h", "i", "j"]
    assert questions(held_out) == ["d", "e", "k", "l", "q6", "q9"]
    assert parts.draws()
    assert questions(parts.test()) == ["f", "g"]
    assert parts.unread() == {}
    # Without a share, all of what has no such split is learned.
    train, held_out = Parts(["mine", ten], None, 0.0, seed=0).train_and_held_out()
    assert (len(questions(train)), questions(held_out)) == (13, ["d", "e"])
    # What a share holds out of one source is not learned from another.
    write("again.jsonl", *(text(letter, "a") for letter in "abcxyz"))
    for seed in range(10):
        train, held_out = Parts(["mine", "again.jsonl"], None, 0.5, seed=seed).train_and_held_out()
        assert not {*questions(train)} & {*questions(held_out)}


def test_what_one_source_trains_on_is_held_out_of_no_other(ten):
    folder_of("mine", train="abc", validation="de", test="fg")
    parts = Parts(["mine:train", "mine:validation"])
    train, held_out = parts.train_and_held_out()
    assert (questions(train), questions(held_out)) == (["a", "b", "c", "d", "e"], ["f", "g"])
    assert (parts.test(), parts.unread()) == (None, {})
    parts = Parts([{"path": "mine", "split": "train"}, {"path": f"{Path('mine').resolve()}", "split": "test"}])
    train, held_out = parts.train_and_held_out()
    assert (questions(train), questions(held_out)) == (["a", "b", "c", "f", "g"], ["d", "e"])
    assert parts.test() is None


def test_a_source_s_share_of_its_training_rows_is_drawn_by_the_seed(ten):
    folder_of("mine", train="abcdefgh", validation="yz")
    source = [{"path": "mine", "share": 0.5}, ten]
    train, held_out = Parts(source, None, 0.2, seed=0).train_and_held_out()
    kept = [question for question in questions(train) if question in "abcdefgh"]
    assert len(kept) == 4 and kept == sorted(kept)
    assert questions(held_out)[:2] == ["y", "z"]
    assert train.parts[0].dropped == {"rows not used, for its share is 0.5": 4}
    assert Parts(source, None, 0.2, seed=0).train_and_held_out() == (train, held_out)
    drawn = {tuple(questions(Parts(source, None, 0.2, seed=seed).train_and_held_out()[0])) for seed in range(5)}
    assert len(drawn) > 1
    (alone, _) = Parts({"path": "mine", "share": 0.01}, seed=3).train_and_held_out()
    assert len(alone.conversations) == 1


def test_what_a_run_held_out_is_found_again_in_several_sources(ten):
    folder_of("mine", train="abc", validation="de")
    source = ["mine", {"path": ten, "share": 0.6}]
    parts = Parts(source, None, 0.4, seed=0)
    train, held_out = parts.train_and_held_out()
    rows = RunRows.of(train.conversations, held_out.conversations, None)
    again, gone = parts.recall(rows)
    assert (again.conversations, gone) == (held_out.conversations, 0)
    assert again.dropped == {}
    # By other shares and seeds, too, and where a source grew.
    write(ten, *(text(f"q{number}", "a") for number in range(20)))
    again, gone = Parts([ten, "mine"], None, 0.1, seed=7).recall(rows)
    assert (again.conversations, gone) == (held_out.conversations, 0)


def test_held_out_rows_may_come_from_several_sources(ten):
    folder_of("mine", train="abc", validation="de", test="fg")
    given = [{"path": "mine", "split": "test"}, "mine:validation"]
    parts = Parts(ten, given)
    train, held_out = parts.train_and_held_out()
    assert (len(train.conversations), questions(held_out)) == (10, ["f", "g", "d", "e"])
    rows = RunRows.of(train.conversations, held_out.conversations, as_text(given))
    assert Parts(ten, given).held_out(rows)[0].conversations == held_out.conversations
    assert Parts(ten).held_out(rows)[0].conversations == held_out.conversations
    assert questions(Parts(ten, "mine").held_out(rows)[0]) == ["d", "e"]
    assert questions(Parts(ten).test_of(["mine", "mine:validation"])) == ["f", "g", "d", "e"]


def test_a_source_that_names_its_split_is_trained_on_that(ten):
    folder_of("mine", train="abc", validation="de", test="fg")
    train, held_out = Parts("mine:test").train_and_held_out()
    assert (questions(train), questions(held_out)) == (["f", "g"], ["d", "e"])
    assert Parts("mine:test").test() is None
    train, held_out = Parts("mine:validation").train_and_held_out()
    assert (questions(train), questions(held_out)) == (["d", "e"], ["f", "g"])
    assert Parts("mine:validation").unread() == {"mine": ["train"]}


def test_a_source_may_have_columns_of_its_own(ten):
    write("de.jsonl", *({"Frage": f"f{number}", "Antwort": "a"} for number in range(3)))
    source = [ten, {"path": "de.jsonl", "columns": {"user": "Frage", "assistant": "Antwort"}}]
    train, held_out = Parts(source, None, 0.1).train_and_held_out()
    assert len(train.conversations + held_out.conversations) == 13
