"""Owns how sure a figure is: 95 % intervals of shares, of figures over rows, and of differences on the same rows.

Knows numbers only.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959964
"""Of the normal distribution, 95 % of which lies within so many standard deviations."""
ENDS = (2.5, 97.5)
FEWEST = 10
"""Rows for an interval: of fewer, drawn again and again, too little varies, and none may vary at all."""
Array = NDArray[np.float64]


class Figure(NamedTuple):
    """A value and the interval that holds the true one in 95 of 100 such samples; of too few, none."""

    value: float
    low: float | None
    high: float | None

    def of(self, count: int) -> "Figure":
        """Itself, as it may be told of ``count`` rows."""
        return self if count >= FEWEST else Figure(self.value, None, None)


def wilson(count: int, total: int) -> Figure:
    """A share, with Wilson's interval: it stays within 0 and 1, and holds for few and for rare ones too."""
    share, square = count / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return Figure(share, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(
    base: Array, adapter: Array, figures: Callable[[Array], Array], draws: int, seed: int
) -> list[tuple[Figure, Figure, Figure]]:
    """Each figure of the base, of the adapter, and of the second minus the first.

    Rows are drawn with replacement, the same ones for both, so that a row that is hard for both does not blur the
    difference.

    Args:
        base: ``[rows, k]``, what each row adds to ``k`` sums.
        adapter: the same rows.
        figures: ``[k]`` sums to ``[f]`` figures.
        draws: how often all rows are drawn.
        seed: of the draws.
    """
    chance = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        rows = chance.integers(len(base), size=len(base))
        drawn.append([figures(base[rows].sum(0)), figures(adapter[rows].sum(0))])
    values = np.array([figures(base.sum(0)), figures(adapter.sum(0))])
    samples = np.array(drawn)
    rows_of = [(values[0], samples[:, 0]), (values[1], samples[:, 1])]
    rows_of.append((values[1] - values[0], samples[:, 1] - samples[:, 0]))
    ends = [(value, *np.percentile(sample, ENDS, axis=0)) for value, sample in rows_of]
    return [
        (_figure(ends[0], index), _figure(ends[1], index), _figure(ends[2], index)) for index in range(len(values[0]))
    ]


def _figure(ends: tuple[Array, ...], index: int) -> Figure:
    return Figure(*(float(end[index]) for end in ends))
