"""Theory of stacked windows: the reach of the sliding twin, and two predictions of how influence fades with distance.

Both predictions follow Guangxuan Xiao, "Why Stacking Sliding Windows Can't See Very Far" (2025). In each of k layers a
share alpha of the residual stream stays where it is, and a share 1 - alpha comes evenly from the W visible tokens.

* Xiao's bound W * ln(eps) / ln(1 - alpha) is the distance at which influence falls below eps. It does not grow with k.
* The exact mixture is what the same recurrence gives when it is iterated: Binomial(k, 1 - alpha) hops, each uniform on
  0..W-1. Its mean is k(1 - alpha)(W - 1)/2, which grows with k.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model import windows
from model.windows import LayerSpec

FloatArray = NDArray[np.float64]


def sliding_twin_reach(layers: int, window: int) -> int:
    """Reach R in tokens of the sliding twin: as many layers, all sliding with window W.

    A stack with full layers or global tokens has no bound. It is measured at the distances of its sliding twin.

    >>> sliding_twin_reach(32, 16)
    480
    """
    reach = windows.reach([LayerSpec("sliding", window)] * layers)
    assert reach is not None
    return reach


def xiao_bound(window: int, alpha: float, epsilon: float = 0.01) -> float:
    """Distance in tokens at which influence falls below epsilon, according to Xiao.

    >>> round(xiao_bound(16, 0.95) / 16, 2)
    1.54
    """
    if not 0.0 < alpha < 1.0:
        return math.inf if alpha <= 0.0 else 0.0
    return window * math.log(epsilon) / math.log(1.0 - alpha)


def mixture(
    windows: Sequence[int | None], alphas: Sequence[float], length: int, dilations: Sequence[int] | None = None
) -> FloatArray:
    """Influence by distance (length,) after all layers. It sums to 1 when `length` exceeds the reach.

    >>> influence = mixture([3, 3], [0.5, 0.5], 5)
    >>> influence.round(3).tolist()
    [0.444, 0.222, 0.25, 0.056, 0.028]
    >>> mixture([2], [0.5], 4, dilations=[3]).tolist()
    [0.75, 0.0, 0.0, 0.25]
    """
    influence = np.zeros(length)
    influence[0] = 1.0
    for window, alpha, dilation in zip(windows, alphas, dilations or [1] * len(windows), strict=True):
        seen = length if window is None else window
        one_layer = np.zeros(length)
        one_layer[: seen * dilation : dilation] = (1.0 - alpha) / seen
        one_layer[0] += alpha
        influence = np.convolve(influence, one_layer)[:length]
    return influence


def mixture_horizon(influence: FloatArray, epsilon: float = 0.01) -> int:
    """Largest distance (tokens) at or beyond which at least epsilon of the influence lies."""
    beyond = np.cumsum(influence[::-1])[::-1]
    return int(np.flatnonzero(beyond >= epsilon * influence.sum())[-1])
