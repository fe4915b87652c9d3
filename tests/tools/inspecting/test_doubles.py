"""Doubles: by words, exactly as brute force finds them, and quickly."""

import random
import time

import pytest

from lit_qlora.tools.inspecting import doubles
from lit_qlora.tools.inspecting.doubles import find_doubles
from tests.data.talks import said

TEXT = "the quick brown fox jumps over the lazy dog and runs home to see what there is for dinner on a rainy day"


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        (TEXT, TEXT, "same"),
        (TEXT, f" {TEXT.upper()} !", "same"),
        (TEXT, TEXT.replace(" ", "\n"), "same"),
        (TEXT, TEXT.replace("lazy", "sleepy"), "near"),
        (TEXT, TEXT.replace("on a rainy day", "today"), "near"),
        (TEXT, TEXT.replace("lazy", "sleepy").replace("home", "away").replace("dinner", "tea"), None),
        (
            "東京都は日本の首都であり世界最大級の都市圏です",
            "東京都は日本の首都であり、世界最大級の都市圏です。",
            "same",
        ),
        ("東京都は日本の首都であり世界最大級の都市圏です", "東京都は日本の首都であり世界最大級の都会圏です", "near"),
        ("yes", "no", None),
        ("!!!", "???", None),
        ("!!!", "!!!", "same"),
        ("ﬁne Größe", "FINE GRÖSSE", "same"),
    ],
    ids=range(12),
)
def test_what_is_alike(one, other, kind):
    found = find_doubles([said("something else", "entirely"), said("a", one)], [said("a" if kind else "b", other)])
    assert [(double.held_out, double.train, double.kind) for double in found] == ([(0, 1, kind)] if kind else [])


def test_the_closest_kind_counts_and_a_system_text_does_not():
    train = [said("who?", "an answer", system=TEXT), said("who?", TEXT), said("who?", f"{TEXT} indeed")]
    held_out = [said("who?", f"{TEXT} indeed", system="x"), said("who?", "other", system=TEXT)]
    assert find_doubles(train, held_out) == [(0, 2, "same"), (1, 0, "question")]


def test_no_pair_is_overlooked(monkeypatch):
    """Against comparing all with all, on texts of few words, which share many."""
    draw = random.Random(3)

    def talk():
        return said("q", " ".join(draw.choice("abcd") for _ in range(draw.randrange(1, 12))))

    for _ in range(20):
        train, held_out = ([talk() for _ in range(40)] for _ in range(2))
        sets = [
            [doubles._in_a_row(doubles._words(f"q {one.turns[1].content}")) for one in side]
            for side in (train, held_out)
        ]
        near = {
            number
            for number, one in enumerate(sets[1])
            if any(len(one & two) >= 0.7 * len(one | two) for two in sets[0])
        }
        assert {double.held_out for double in find_doubles(train, held_out) if double.kind != "question"} == near


def test_ten_thousand_rows_of_one_pattern_take_seconds():
    draw = random.Random(1)

    def talk(number):
        words = " ".join(str(draw.randrange(10**6)) for _ in range(6))
        return said(f"Please classify the following review and say why in two sentences: {words}", f"It is {number}.")

    rows = [talk(number) for number in range(10_500)]
    started = time.monotonic()
    assert find_doubles(rows[:10_000], rows[10_000:]) == []
    assert time.monotonic() - started < 20
