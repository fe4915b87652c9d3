"""The record of a run's rows: small, the same for the same rows, and one line where it is damaged."""

import json
import re

import pytest

from lit_qlora.data.run_rows import RunRows, turns_digest
from lit_qlora.errors import UserError
from lit_qlora.text.conversation import Conversation, Turn
from tests.expect import check_line


def said(question: str, system: str | None = None) -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", "a")), system)


ROWS = RunRows.of([said("a"), said("b"), said("a")], [said("c"), said("d"), said("c")], "there.jsonl")


def test_it_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "rows.json"
    ROWS.write(file)
    assert RunRows.read(file) == ROWS
    assert ROWS.held_out == (turns_digest(said("c")), turns_digest(said("d")), turns_digest(said("c")))
    assert ROWS.train == {turns_digest(said("a")), turns_digest(said("b"))}
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_the_same_rows_are_the_same_bytes_and_are_not_written_again(tmp_path):
    file = tmp_path / "rows.json"
    ROWS.write(file)
    before = file.read_bytes(), file.stat().st_mtime_ns
    RunRows.of([said("b"), said("a")], [said("c"), said("d"), said("c")], "there.jsonl").write(file)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_a_digest_is_of_all_words_and_the_same_on_every_machine():
    # Written out once: a change here makes the rows of every run unknown.
    assert turns_digest(said("a")) == "9424086ef345ea44"
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    assert len({*map(turns_digest, (said("a"), said("a", "s"), Conversation(turns), said("A")))}) == 4


def test_it_takes_few_bytes_per_row(tmp_path):
    file = tmp_path / "rows.json"
    RunRows.of([said(str(number)) for number in range(1000)], [said("x")], None).write(file)
    assert file.stat().st_size < 21_000


def test_without_a_record_there_is_none(tmp_path):
    assert RunRows.read(tmp_path / "rows.json") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:40],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace("held_out", "held"),
        lambda text: json.dumps(json.loads(text) | {"held_out": [3]}),
        lambda text: json.dumps(json.loads(text) | {"held_out": []}),
        lambda text: json.dumps(json.loads(text) | {"train": None}),
        lambda text: json.dumps(json.loads(text) | {"validation_source": 3}),
        lambda text: "[" * 200_000,
    ],
)
def test_a_damaged_one_is_one_line(tmp_path, damage):
    file = tmp_path / "rows.json"
    ROWS.write(file)
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))} is damaged \(.*remove it") as caught:
        RunRows.read(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"{\xff}", "it is not UTF-8 (byte 1)"),
        (b"{]", "it is no JSON: see line 1"),
        (b'{"version": 1,', "it is no JSON: its end is missing"),
        (b"null", "it holds values of another kind"),
        (b"[1]", "it holds values of another kind"),
        (b'"x"', "it holds values of another kind"),
        (b"9" * 5000, "it holds a number of too many digits"),
        (b"[" * 200_000, "it is nested too deeply"),
        (b"{}", "it has no 'version'"),
        (b'{"version": null}', "its version is null, expected 1"),
        (b'{"version": 1, "validation_source": null, "held_out": 3}', "it holds values of another kind"),
        (b'{"version": 1, "validation_source": null, "held_out": [null]}', "null is no digest of a row"),
    ],
)
def test_the_reason_is_none_of_python_s(tmp_path, content, reason):
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        RunRows.read(file)
    check_line(str(caught.value), f"({reason})", "held out", begins=f"{file} is damaged ")


@pytest.mark.parametrize(
    ("train", "held_out", "words"),
    [
        ("abe", "cd", {"train_rows": "1 new conversation"}),
        ("bef", "cd", {"train_rows": "1 of 2 conversations gone and 2 new conversations"}),
        ("ab", "x", {"held_out_rows": "2 of 2 conversations gone and 1 new conversation"}),
        ("ac", "bde", {"train_rows": "2 conversations drawn to the other part, training or held out"}),
        (
            "abd",
            "cfg",
            {
                "train_rows": "1 conversation drawn to the other part, training or held out",
                "held_out_rows": "2 new conversations and 1 conversation drawn to the other part, training or held out",
            },
        ),
        ("ab", "dc", {"held_out_rows": "the same conversations, in another order or number, or learned otherwise"}),
    ],
)
def test_what_became_of_rows_is_counted(train, held_out, words):
    found = ROWS.changes(RunRows.of(map(said, train), map(said, held_out), None))
    assert found.items() >= words.items()
