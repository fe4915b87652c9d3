"""Numbers of things, in the singular where there is one."""

import pytest

from lit_qlora.data.records import Lost
from lit_qlora.wording import duration, number_of, of_number


@pytest.mark.parametrize(
    ("words", "one"),
    [
        ("rows", "row"), ("micro-batches", "micro-batch"), ("processes of 3 machines", "process of 3 machines"),
        (Lost.UNANSWERED.value, "unanswered last turn dropped"),
        (Lost.NOT_LEARNED.value, "last answer dropped: not to be learned"),
        ("rows left out: some texts have no answers", "row left out: some texts have no answers"),
        ("texts longer than 80 tokens", "text longer than 80 tokens"),
        ("left out: no answer within", "left out: no answer within"), ("sparrows", "sparrows"),
    ],
)  # fmt: skip
def test_one_is_no_several(words, one):
    assert number_of(1, words) == f"1 {one}" and of_number(1, words) == one
    assert [number_of(0, words), number_of(2000, words)] == [f"0 {words}", f"2,000 {words}"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((0.36,), "under 1 s"), ((18,), "18 s"), ((90,), "90 s"), ((120,), "2 min"), ((6840,), "114 min"),
     ((10600,), "2.9 h"), ((5868, 8280), "1.6 to 2.3 h"), ((1800, 2520), "30 to 42 min"), ((0.36, 3.6), "0 to 4 s"),
     ((840, 850), "14 min")],
)  # fmt: skip
def test_durations(seconds, expected):
    assert duration(*seconds) == expected
