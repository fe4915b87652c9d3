"""Texts of any script fit the columns of a terminal, and steer none."""

import pytest

from lit_qlora.columns import columns, in_column, lines_of, printable, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a↵b⇥c"),
        ("\x1b[2J\r\0", "\\x1b[2J\\r\\x00"),
        ("a\u202eb\u2028", "a\\u202eb\\u2028"),
        ("漢 ß 🙂", "漢 ß 🙂"),
    ],
)
def test_nothing_reaches_the_terminal_that_it_would_obey(text, shown):
    assert printable(text) == shown


def test_wide_characters_take_two_columns():
    assert [columns(text) for text in ("abc", "漢字", "e\u0301")] == [3, 4, 1]
    assert shortened("漢" * 40, 20) == "漢" * 6 + "…" + "漢" * 3
    assert shortened("abc", 3) == "abc"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("one two  three", ["one two", "three"]),
        ("  if x:  y", ["  if x:", "y"]),
        ("a longer-word b", ["a longer", "-word b"]),
        ("a 漢字漢字漢 b", ["a 漢字漢", "字漢 b"]),
        ("   漢字漢字", ["   漢字", "漢字"]),
        ("         x", ["x"]),
        ("e\u0301" * 9, ["e\u0301" * 8, "e\u0301"]),
    ],
)
def test_lines_break_at_spaces_or_in_what_has_none(text, lines):
    assert [*lines_of(text, 8)] == lines


def test_a_column_is_as_wide_whatever_is_in_it():
    assert [in_column(text, 5) for text in ("ab", "漢", "e\u0301", "too long")] == [
        "ab   ",
        "漢   ",
        "e\u0301    ",
        "too long",
    ]
