"""Distances as people write them, in tokens or as a share of the window W or the reach R; and horizons."""

import re
from collections.abc import Iterable
from itertools import takewhile

PATTERN = r"(?P<share>\d*\.?\d+)?(?P<unit>[WR])(/(?P<part>[1-9]\d{0,8}))?(?P<more>[+-]\d{1,9})?"


def in_tokens(word: str, window: int | None, reach: int | None) -> int:
    """The distance in tokens that `word` means: a number, or a share of W or R plus or minus some tokens.

    Raises ValueError for other words, and for W or R where the model has none.

    >>> [in_tokens(word, window=16, reach=120) for word in ("48", "W", "1.5W", "0.9R", "R/8+1", "R-1")]
    [48, 16, 24, 108, 16, 119]
    """
    word = word.strip()
    if re.fullmatch(r"\d{1,9}", word):
        return int(word)
    parts = re.fullmatch(PATTERN, word)
    if parts is None:
        raise ValueError(f"{word!r} is no distance")
    unit = {"W": window, "R": reach}[parts["unit"]]
    if unit is None:
        raise ValueError(f"this model has no {parts['unit']}")
    return round(float(parts["share"] or 1) * unit / int(parts["part"] or 1)) + int(parts["more"] or 0)


def last_distance_holding(distances: Iterable[int], values: Iterable[float], threshold: float) -> int:
    """Largest distance up to which every value is at least the threshold; 0 if the first one is not.

    A single low value ends it, however high later values are:

    >>> last_distance_holding([1, 8, 16, 32], [1.0, 0.95, 0.5, 0.99], 0.9)
    8
    """
    pairs = sorted(zip(distances, values, strict=True))
    return max((distance for distance, _ in takewhile(lambda pair: pair[1] >= threshold, pairs)), default=0)
