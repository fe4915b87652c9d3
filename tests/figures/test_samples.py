"""How answers ended is said of all; what was not measured is not said."""

import json
from unicodedata import east_asian_width

import pytest

from lit_qlora.figures.samples import ends_in_words, short_prompts, side_by_side


def ends(ended, cut, limit=128, **beyond):
    """The figures of so many answers."""
    counts = {"samples/ended": ended, "samples/cut": cut, "samples/max_new_tokens": limit, **beyond}
    return counts | {"samples/stopped_share": ended / (ended + cut + sum(beyond.values()))}


ENDED = "that ended by themselves"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (ends(0, 8), ends(6, 2), [(ENDED, "0 of 8", "6 of 8"), ("cut at 128 tokens", "8 of 8", "2 of 8")]),
        ({}, ends(6, 2), [(ENDED, None, "6 of 8"), ("cut at 128 tokens", None, "2 of 8")]),
        (  # a run that was resumed with another limit
            ends(0, 8),
            ends(6, 2, limit=1024),
            [(ENDED, "0 of 8", "6 of 8"), ("cut at 1,024 or 128 tokens", "8 of 8", "2 of 8")],
        ),
        (
            ends(0, 8),
            ends(5, 2, **{"samples/cut_by_context": 1}),
            [
                (ENDED, "0 of 8", "5 of 8"),
                ("cut at 128 tokens", "8 of 8", "2 of 8"),
                ("cut by the base's context", "0 of 8", "1 of 8"),
            ],
        ),
        ({"samples/stopped_share": 0.25}, {"samples/stopped_share": 0.5}, []),  # of an earlier version
        ({}, {}, []),
    ],
)
def test_how_answers_ended_is_said_of_all(before, after, words):
    assert ends_in_words(before, after) == [(f"answers {title}", first, last) for title, first, last in words]


@pytest.mark.parametrize(
    "text",
    ["", "short", "words " * 60, "x" * 200, "字" * 100, "a 字" * 50, "tab\tand\nline\x1b[31m", "é" * 100, "🙂 " * 60],
)
def test_answers_side_by_side_fit_80_columns(text):
    row = {"prompt": text, "base": {"text": text, "cut_by": None}, "adapter": {"text": text[::-1], "cut_by": None}}
    shown = side_by_side([row] * 5)
    assert shown[0].split() == ["base", "alone", "with", "the", "adapter"]
    assert max(sum(2 if east_asian_width(one) in "WF" else 1 for one in line) for line in shown) <= 80
    assert "\x1b" not in "".join(shown) and len(shown) <= 1 + 3 * 4


def test_answers_side_by_side_stand_in_their_columns():
    row = {"prompt": "Who?", "base": {"text": "a " * 30, "cut_by": None}, "adapter": {"text": "Silas.", "cut_by": None}}
    assert side_by_side([row]) == [
        "  base alone                             with the adapter",
        "Who?",
        "  a a a a a a a a a a a a a a a a a a a  Silas.",
        "  a a a a a a a a a a a",
    ]
    assert side_by_side([{"prompt": "p", "base": {"text": "b"}}]) == side_by_side([]) == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "a"}, {"prompt": "b\nc"}, {"prompt": "x" * 101}, {"prompt": "a"}, {"prompt": "d"}], ["a", "d"]),
        ("nothing", []), ([3, {"prompt": None}, {"prompt": " "}, {"prompt": "\x1b[31m"}], []),
    ],
)  # fmt: skip
def test_short_prompts_are_of_one_line(tmp_path, rows, expected):
    file = tmp_path / "samples.jsonl"
    assert short_prompts(file) == []
    file.write_text(json.dumps({"step": 0, "answers": rows}) + "\n")
    assert short_prompts(file) == expected
