"""At which distances recall is measured, and at which of them more closely."""

import math
from typing import Any

from data.tasks.distance import in_tokens
from eval.models import Examined
from model.errors import UserError


def protocol_distances(window: int, reach: int, product: int) -> list[int]:
    """1, W/2, W-1, W, W+1, 1.5W, 2W, then about six a doubling, R-1, R, R+1, W k, W k + W.

    >>> protocol_distances(4, 12, 16)
    [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 16, 20]
    """
    near = {1, window // 2, window - 1, window, window + 1, 3 * window // 2, 2 * window}
    doublings = math.log2(max(reach, 2 * window) / (2 * window))
    steps = int(6 * doublings)
    far = {round(2 * window * 2 ** (i / 6)) for i in range(steps + 1)}
    far = {d for d in far if d < reach - 1}
    edge = {reach - 1, reach, reach + 1, product, product + window}
    return sorted(d for d in near | far | edge if d >= 1)


def default_distances(examined: Examined, max_distance: int) -> list[int]:
    """The protocol's distances for this model; a stack of unbounded reach gets those of its sliding twin."""
    window, reach = examined.window, _reach(examined)
    if window is not None and reach is not None:
        wanted = protocol_distances(window, reach, examined.window_times_layers or examined.layers * window)
    else:
        wanted = [1, *(round(8 * 2 ** (i / 2)) for i in range(40))]
    return [d for d in wanted if d <= max_distance]


def asked_distances(text: str, examined: Examined) -> list[int]:
    """The distances of a list such as `1,W,.9R,R-1,R,R+1`. Raises UserError with the word that is none."""
    try:
        wanted = sorted({in_tokens(word, examined.window, _reach(examined)) for word in text.split(",")})
    except ValueError as error:
        raise UserError(
            f"--distances {text!r}: {error}; give tokens, or shares of W and R, such as 1,16,W,0.9R,R-1,R,R+1"
        ) from error
    if wanted[0] < 1:
        raise UserError(f"--distances {text!r}: a distance is at least 1 token")
    return wanted


def _reach(examined: Examined) -> int | None:
    """R; of a stack without bound, that of its sliding twin."""
    if examined.reach is not None or examined.window is None:
        return examined.reach
    return examined.layers * (examined.window - 1)


def near_transition(rows: list[dict[str, Any]], chance: float, window: int | None) -> set[int]:
    """Distances that deserve the full n: between floor and ceiling, at W, and around the 90 % crossing."""
    chosen = {d for d in (row["distance"] for row in rows) if window and abs(d - window) <= 1}
    for before, row, after in zip([rows[0], *rows[:-1]], rows, [*rows[1:], rows[-1]], strict=True):
        middling = row["high"] > chance + 0.1 and row["low"] < 0.95
        edge = (row["low"] >= 0.9) != (after["low"] >= 0.9) or (before["low"] >= 0.9) != (row["low"] >= 0.9)
        if middling or edge:
            chosen.add(row["distance"])
    return chosen
