"""Intervals and horizons: what may be said from so many right answers out of so many.

A horizon is a distance in tokens. H90 is deliberately hard to earn: it is the largest measured distance such
that there *and at every shorter measured distance* the lower Wilson bound is at least .90. H50 is read from a
decreasing fit. Utilisation is a horizon divided by the exact reach R = k(W-1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import binomtest

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Horizon:
    """A distance in tokens with a 95 % interval; `censored` when the curve never came down within the distances."""

    value: float
    low: float
    high: float
    censored: bool = False

    def over(self, reach: int | None) -> "Horizon | None":
        """The horizon as a share of the reach (tokens); None where the reach is unbounded."""
        if not reach:
            return None
        return Horizon(self.value / reach, self.low / reach, self.high / reach, self.censored)


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    >>> low, high = wilson(391, 400)
    >>> round(low, 3), round(high, 3)
    (0.958, 0.988)
    """
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def last_distance_holding(distances: Sequence[int], values: Sequence[float], threshold: float) -> int:
    """Largest distance up to which every value is at least the threshold; 0 when the first one already fails.

    One dip ends it, however well later distances do:

    >>> last_distance_holding([1, 8, 16, 32], [1.0, 0.95, 0.5, 0.99], 0.9)
    8
    """
    held = 0
    for distance, value in sorted(zip(distances, values, strict=True)):
        if value < threshold:
            break
        held = distance
    return held


def h90(distances: Sequence[int], correct: Sequence[int], n: Sequence[int], threshold: float = 0.9) -> Horizon:
    """H90 of the protocol. Its interval runs from itself (lower bounds hold) to where the upper bounds stop holding."""
    bounds = [wilson(c, m) for c, m in zip(correct, n, strict=True)]
    low = last_distance_holding(distances, [b[0] for b in bounds], threshold)
    high = last_distance_holding(distances, [b[1] for b in bounds], threshold)
    return Horizon(low, low, high, censored=low == max(distances))


def decreasing_fit(accuracy: FloatArray, weights: FloatArray) -> FloatArray:
    """The non-increasing sequence nearest to `accuracy` in weighted least squares (pool adjacent violators)."""
    return np.asarray(isotonic_regression(accuracy, weights=weights, increasing=False).x, dtype=np.float64)


def crossing(distances: FloatArray, fit: FloatArray, level: float) -> float:
    """Where a non-increasing fit comes down through `level`, linear between neighbouring distances.

    >>> crossing(np.array([10.0, 20.0, 30.0]), np.array([1.0, 0.75, 0.25]), 0.5)
    25.0
    """
    below = np.flatnonzero(fit < level)
    if below.size == 0:
        return float(distances[-1])
    right = int(below[0])
    if right == 0:
        return 0.0
    left = right - 1
    share = (fit[left] - level) / (fit[left] - fit[right])
    return float(distances[left] + share * (distances[right] - distances[left]))


def h50(
    distances: Sequence[int],
    correct: Sequence[int],
    n: Sequence[int],
    level: float = 0.5,
    resamples: int = 400,
    seed: int = 0,
) -> Horizon:
    """Distance at which the decreasing fit falls through one half.

    The interval is a parametric bootstrap of the *bracket*: between two measured distances nothing is known, so
    it never ends inside the gap that holds the crossing.
    """
    order = np.argsort(distances)
    at = np.asarray(distances, dtype=np.float64)[order]
    trials = np.asarray(n, dtype=np.int64)[order]
    rate = np.asarray(correct, dtype=np.float64)[order] / trials
    weights = trials.astype(np.float64)
    fit = decreasing_fit(rate, weights)
    draws = np.random.default_rng(seed).binomial(trials, rate, size=(resamples, at.size)) / trials
    brackets = np.array([_bracket(at, decreasing_fit(draw, weights), level) for draw in draws])
    low, high = np.quantile(brackets[:, 0], 0.025), np.quantile(brackets[:, 1], 0.975)
    value = crossing(at, fit, level)
    return Horizon(value, min(float(low), value), max(float(high), value), censored=bool(fit[-1] >= level))


def _bracket(distances: FloatArray, fit: FloatArray, level: float) -> tuple[float, float]:
    """The last distance that holds the level and the first that does not."""
    holding = int(np.count_nonzero(fit >= level))
    low = 0.0 if holding == 0 else float(distances[holding - 1])
    return low, float(distances[min(holding, distances.size - 1)])
