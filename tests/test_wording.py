"""Numbers of things, in the singular where there is one."""

import pytest

from lit_qlora.data.faults import KINDS
from lit_qlora.data.records import NOT_LEARNED, UNANSWERED, UNUSED
from lit_qlora.wording import number_of, of_number


@pytest.mark.parametrize(
    ("words", "one"),
    [
        ("rows", "row"), ("micro-batches", "micro-batch"), ("processes of 3 machines", "process of 3 machines"),
        ("rows left out: nothing answered", "row left out: nothing answered"),
        (UNANSWERED, "unanswered last turn dropped"), (NOT_LEARNED, "last answer dropped: not to be learned"),
        (UNUSED, "row holds what is not used: "), ("conversations there are new", "conversation there is new"),
        ("texts longer than 80 tokens", "text longer than 80 tokens"), ("cut to 80 tokens", "cut to 80 tokens"),
        ("left out: no answer within 80 tokens", "left out: no answer within 80 tokens"),
        ("spell a special token", "spells a special token"), ("held-out rows hold it", "held-out row holds it"),
        ("of 20 held-out conversations are in training too", "of 20 held-out conversations is in training too"),
        (KINDS["unread"], "row that can't be learned from"),
        (KINDS["bos"], "row that does not begin each prompt with one BOS"),
        (KINDS["batch"], "row that stands otherwise in a batch than they were encoded"),
    ],
)  # fmt: skip
def test_one_is_no_several(words, one):
    assert number_of(1, words) == f"1 {one}" and of_number(1, words) == one
    assert [number_of(0, words), number_of(2000, words)] == [f"0 {words}", f"2,000 {words}"]
