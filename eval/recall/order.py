"""What a recall measurement asks for: the order, and the distances of the protocol.

This module does not import torch, so that a mistake on the command line is answered at once.
"""

import math
from dataclasses import dataclass, field

from data.tasks.distance import in_tokens
from eval.models import Examined
from model.errors import UserError

CONTROLS = ("distractors", "untrained")
NEEDLES = ("needle", "needle-noise")  # the tasks for a model that was trained on none
SIZE_NAMES = {"pairs": "keys", "span_pairs": "span-pairs", "hops": "hops", "rules": "rules"}  # on the command line
ALIGNED = 32  # tokens: attention runs a third faster on lengths that are a multiple of it
SCREENING = 200  # items per distance at first; more follow only where recall changes


@dataclass(frozen=True)
class Order:
    """What is to be measured."""

    tasks: tuple[str, ...]
    distances: tuple[int, ...]  # tokens
    n: int  # items per distance
    seed: int
    precision: str  # `fp32` or `bf16`
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by field of `TaskOptions`; each is an entry
    controls: tuple[str, ...] = ()


def aligned(length: int) -> int:
    """The smallest possible length of items, in tokens, that is at least `length`: a multiple of ALIGNED."""
    return length + -length % ALIGNED


def protocol_distances(window: int, reach: int, window_times_layers: int) -> list[int]:
    """1, W/2, W-1, W, W+1, 1.5W, 2W, then about six per doubling, R-1, R, R+1, W k, W k + W.

    >>> protocol_distances(4, 12, 16)
    [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 16, 20]
    """
    near = {1, window // 2, window - 1, window, window + 1, 3 * window // 2, 2 * window}
    doublings = math.log2(max(reach, 2 * window) / (2 * window))
    far = {round(2 * window * 2 ** (i / 6)) for i in range(int(6 * doublings) + 1)}
    edge = {reach - 1, reach, reach + 1, window_times_layers, window_times_layers + window}
    return sorted(d for d in near | {d for d in far if d < reach - 1} | edge if d >= 1)


def default_distances(examined: Examined, max_distance: int) -> list[int]:
    """The distances of the protocol for this model, up to `max_distance`; without any window, two per doubling.

    A stack of unbounded reach gets those of a stack with the same window in every layer.
    """
    window, reach = examined.window, examined.nominal_reach
    if window is None or reach is None:
        wanted = [1, *(round(8 * 2 ** (i / 2)) for i in range(40))]
    else:
        wanted = protocol_distances(window, reach, examined.window_times_layers or examined.layers * window)
    longest = min(max_distance, examined.max_tokens - 64) if examined.max_tokens else max_distance
    return [d for d in wanted if d <= longest]


def parse_distances(text: str, window: int | None, reach: int | None) -> list[int]:
    """The distances of a list such as `1,W,.9R,R-1,R,R+1`. Raises UserError with the word that is no distance."""
    try:
        distances = sorted({in_tokens(word, window, reach) for word in text.split(",")})
    except ValueError as error:
        raise UserError(
            f"--distances {text!r}: {error}; give tokens, or shares of W and R, such as 1,16,W,0.9R,R-1,R,R+1"
        ) from error
    if distances[0] < 1:
        raise UserError(f"--distances {text!r}: a distance is at least 1 token")
    return distances
