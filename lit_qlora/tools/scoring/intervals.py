"""Owns 95 % confidence intervals: of shares, of figures over rows, and of differences on the same rows.

Knows numbers only.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959964
"""Standard deviations that hold 95 % of the normal distribution."""
ENDS = (2.5, 97.5)
FEWEST = 10
"""Fewest rows for an interval: resamples of fewer vary too little, or not at all."""
Array = NDArray[np.float64]


class Figure(NamedTuple):
    """A value and its 95 % interval; None for too few rows."""

    value: float
    low: float | None
    high: float | None

    def of(self, count: int) -> "Figure":
        """The figure as reported for ``count`` rows."""
        return self if count >= FEWEST else Figure(self.value, None, None)


def wilson(count: int, total: int) -> Figure:
    """A share with Wilson's interval, which stays within 0 and 1, and holds for few or rare ones, too."""
    share, square = count / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return Figure(share, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(
    base: Array, adapter: Array, figures: Callable[[Array], Array], draws: int, seed: int
) -> list[tuple[Figure, Figure, Figure]]:
    """Each figure of the base, of the adapter, and of the second minus the first.

    Rows are drawn with replacement, the same ones for both, so that a row that is hard for both does not widen the
    interval of the difference.

    Args:
        base: ``[rows, k]``, contributions of each row to ``k`` sums.
        adapter: the same for the adapter.
        figures: maps ``[k]`` sums to ``[f]`` figures.
        draws: number of resamples.
        seed: seed of the bootstrap.
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
