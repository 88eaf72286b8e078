"""Intervals and horizons: what n items, of which so many were answered right, say about recall.

A horizon is a distance in tokens. H90 is strict on purpose: it is the largest measured distance such that there *and
at every shorter measured distance* the lower Wilson bound is at least .90. H50 is read from a decreasing fit.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import binomtest

from data.tasks.distance import last_distance_holding

FloatArray = NDArray[np.float64]
RESAMPLES = 400  # of the bootstrap of H50


class Horizon(NamedTuple):
    """A distance in tokens with a 95 % interval. `censored`: recall never fell within the measured distances."""

    value: float
    low: float
    high: float
    censored: bool = False


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    >>> [round(bound, 3) for bound in wilson(391, 400)]
    [0.958, 0.988]
    """
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def h90(distances: Sequence[int], correct: Sequence[int], n: Sequence[int]) -> Horizon:
    """H90, where the lower bounds stop being at least .90. Its interval ends where the upper bounds do."""
    bounds = zip(*map(wilson, correct, n), strict=True)
    low, high = (last_distance_holding(distances, bound, 0.9) for bound in bounds)
    return Horizon(low, low, high, censored=low == max(distances))


def h50(distances: Sequence[int], correct: Sequence[int], n: Sequence[int]) -> Horizon:
    """The distance at which a non-increasing least-squares fit falls through one half, linear between the distances.

    The interval is a parametric bootstrap of the two distances around the fall; it never ends inside that gap.
    """
    ascending, trials = np.asarray(distances, dtype=np.float64), np.asarray(n, dtype=np.int64)
    rate, nearest = np.asarray(correct) / trials, partial(isotonic_regression, weights=trials, increasing=False)
    draws = np.random.default_rng(0).binomial(trials, rate, size=(RESAMPLES, len(rate))) / trials
    gaps = np.array([_fall(ascending, nearest(draw).x)[:2] for draw in draws])
    low, high = np.quantile(gaps[:, 0], 0.025), np.quantile(gaps[:, 1], 0.975)
    last, _, value = _fall(ascending, nearest(rate).x)
    return Horizon(value, min(float(low), value), max(float(high), value), censored=bool(last == ascending[-1]))


def _fall(distances: FloatArray, fit: FloatArray) -> tuple[float, float, float]:
    """The last distance at which a non-increasing fit is at least one half, the next one, and the crossing in between.

    >>> _fall(np.array([10.0, 20.0, 30.0]), np.array([1.0, 0.75, 0.25]))
    (20.0, 30.0, 25.0)
    """
    holding = int(np.count_nonzero(fit >= 0.5))
    if holding == 0:
        return 0.0, float(distances[0]), 0.0
    left, right = holding - 1, min(holding, len(fit) - 1)
    share = (fit[left] - 0.5) / (fit[left] - fit[right]) if left < right else 0.0
    crossing = distances[left] + share * (distances[right] - distances[left])
    return float(distances[left]), float(distances[right]), float(crossing)
