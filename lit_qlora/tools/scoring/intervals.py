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
    """A ``value`` with the ends of its 95 % interval, ``low`` and ``high``; these are None below `FEWEST` rows."""

    value: float
    low: float | None
    high: float | None


class Compared(NamedTuple):
    """A figure of the ``base``, of the ``adapter``, and its ``difference``, the adapter's minus the base's."""

    base: Figure
    adapter: Figure
    difference: Figure


def wilson(count: int, total: int) -> Figure:
    """The share ``count / total`` with Wilson's interval, which stays within 0 and 1 for few or rare ones, too.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    Args:
        count: rows that count.
        total: all rows, at least one.
    """
    if total < FEWEST:
        return Figure(count / total, None, None)
    share, square = count / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return Figure(share, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(base: Array, adapter: Array, figures: Callable[[Array], Array], draws: int, seed: int) -> list[Compared]:
    """Each figure with percentile intervals of the bootstrap.

    Rows are drawn with replacement, the same ones for both, so that a row that is hard for both does not widen the
    interval of the difference.

    Args:
        base: ``[rows, k]``, contributions of each row to ``k`` sums.
        adapter: the same for the adapter.
        figures: maps ``[k]`` sums to ``[f]`` figures.
        draws: number of resamples.
        seed: seed of the bootstrap.

    Returns:
        A comparison for each of the ``f`` figures.
    """
    chance = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        rows = chance.integers(len(base), size=len(base))
        drawn.append([figures(base[rows].sum(0)), figures(adapter[rows].sum(0))])
    values = np.array([figures(base.sum(0)), figures(adapter.sum(0))])
    samples = np.array(drawn)
    both = [(values[0], samples[:, 0]), (values[1], samples[:, 1])]
    both.append((values[1] - values[0], samples[:, 1] - samples[:, 0]))
    parts = [_figures(value, np.percentile(sample, ENDS, axis=0), len(base)) for value, sample in both]
    return [Compared(*one) for one in zip(*parts, strict=True)]


def _figures(values: Array, ends: Array, count: int) -> list[Figure]:
    shown = ends.T.tolist() if count >= FEWEST else [(None, None)] * len(values)
    return [Figure(float(value), low, high) for value, (low, high) in zip(values, shown, strict=True)]
