"""How sure a figure is: known intervals, and differences that are taken on the same rows."""

import numpy as np
import pytest

from lit_qlora.tools.scoring import intervals
from lit_qlora.tools.scoring.intervals import bootstrap, wilson


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(count, total, low, high):
    """Published examples: Newcombe 1998 has 81 of 263 as 0.2553 to 0.3662, and 0 of 10 as 0 to 0.2775."""
    found = wilson(count, total)
    assert found.value == count / total
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)


def mean(sums):
    return sums[:1] / sums[1]


def rows_of(values):
    return np.stack([values, np.ones_like(values)], 1)


def test_the_bootstrap_of_a_mean_is_the_normal_s():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    ((base, adapter, difference),) = bootstrap(rows_of(values), rows_of(values + 1), mean, 2000, seed=0)
    half = 1.96 * values.std() / 20
    assert base.value == pytest.approx(values.mean())
    assert (base.low, base.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    # The same rows for both: a shift that is the same everywhere is certain.
    assert (difference.value, difference.low, difference.high) == pytest.approx((1, 1, 1))
    assert adapter.high == pytest.approx(base.high + 1)


def test_the_bootstrap_follows_its_seed():
    rows = rows_of(np.arange(20.0))
    one, again, other = (bootstrap(rows, rows, mean, 200, seed) for seed in (3, 3, 4))
    assert one == again != other


def test_long_rows_weigh_more_than_short_ones(monkeypatch):
    """A figure is of all tokens, and not a mean over conversations."""
    monkeypatch.setattr(intervals, "FEWEST", 2)
    rows = np.array([[10.0, 10.0], [1.0, 90.0]])
    ((base, _, _),) = bootstrap(rows, rows, mean, 100, seed=0)
    assert base.value == pytest.approx(0.11)
    assert (base.low, base.high) == pytest.approx((1 / 90, 1.0))
