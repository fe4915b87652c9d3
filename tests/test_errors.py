import copy
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.errors import OutOfRoomError, UserError, cut, excerpt, one_line, require


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "it is wrong"),
        ({"option": "data.form"}, "data.form: it is wrong"),
        ({"place": Path("rows.jsonl")}, "rows.jsonl: it is wrong"),
        ({"remedy": "mend it"}, "it is wrong; mend it"),
        ({"option": "data.form", "remedy": "mend it"}, "data.form: it is wrong; mend it"),
        ({"place": "my.yaml:3", "option": "data.form"}, "my.yaml:3: data.form: it is wrong"),
        (
            {"place": "my.yaml:3", "option": "data.form", "remedy": "mend it"},
            "my.yaml:3: data.form: it is wrong; mend it",
        ),
    ],
)
def test_the_sentence_of_the_fields(fields: dict[str, Any], sentence: str) -> None:
    error = UserError("it is wrong", **fields)
    assert str(error) == sentence
    other = copy.copy(error)
    assert (str(other), other.option, other.place) == (sentence, error.option, error.place)


def test_other_fields() -> None:
    error = UserError("no folder 'x'", option="model.base", remedy="give a folder")
    assert str(error.replace(option="base")) == "base: no folder 'x'; give a folder"
    assert str(error.replace(option=None, place="a.yaml:1")) == "a.yaml:1: no folder 'x'; give a folder"
    assert str(error) == "model.base: no folder 'x'; give a folder"
    assert str(OutOfRoomError("out of memory", 2).replace(option="data.batch_size")) == "data.batch_size: out of memory"


def test_what_is_required() -> None:
    require(True, "data.max_length", "at least 8 tokens", 7)
    with pytest.raises(UserError) as caught:
        require(False, "data.max_length", "at least 8 tokens", 7, place="my.yaml")
    assert (caught.value.option, caught.value.place) == ("data.max_length", "my.yaml")
    assert caught.value.problem == "expected at least 8 tokens, got 7"


def test_a_long_value_is_cut() -> None:
    assert excerpt({"a": "\x1b[31m\n\u2028\ud800\x9b"}) == r"{'a': '\x1b[31m\n\u2028\ud800\x9b'}"
    assert excerpt("x" * 78) == "'" + "x" * 78 + "'"
    assert excerpt(["x" * 10_000]) == "['" + "x" * 77 + "…"
    assert cut("abcdef", 5) == "abcd…"
    with pytest.raises(UserError) as caught:
        require(False, "model.base", "a folder", "x" * 1_000_000)
    assert len(str(caught.value)) < 140


def test_what_others_say_in_one_line() -> None:
    assert one_line(ValueError("no\n  such  key")) == "no such key"
    assert one_line("x" * 300) == "x" * 200
