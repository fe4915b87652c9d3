"""How answers ended is said of all; what was not measured is not said."""

import pytest

from lit_qlora.figures.samples import ends_in_words


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
