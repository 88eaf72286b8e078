"""Random numbers that are a pure function of (seed, step, row, name, index): no state, any order, all rows at once.

Each is a SplitMix64 hash (Steele, Lea and Flood, 2014) of its address.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """The draws of the rows `rows` (global numbers) of a step. Each name is a stream of its own; B rows."""

    def __init__(self, seed: int, step: int, rows: range):
        numbers = np.arange(rows.start, rows.stop, dtype=np.uint64)
        key: NDArray[np.uint64] = _mix(_mix(np.full_like(numbers, seed)) + np.uint64(step))
        self.keys = _mix(key + numbers)

    def uniform(self, name: str, n: int) -> NDArray[np.float64]:
        """(B, n) on [0, 1), in steps of 2**-53."""
        stream = _mix(self.keys + np.uint64(zlib.crc32(name.encode())))
        bits = _mix(stream[:, None] + np.arange(n, dtype=np.uint64) * _GOLDEN)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, name: str, n: int, high: int) -> NDArray[np.int64]:
        """(B, n) on [0, high)."""
        return (self.uniform(name, n) * high).astype(np.int64)

    def distinct(self, name: str, n: int, count: int, high: int) -> NDArray[np.int64]:
        """(B, n, count) on [0, high), without repetition within the last axis."""
        if count == 1:
            return self.integers(name, n, high)[..., None]
        assert count <= high, "more distinct numbers than there are"
        keyed = self.uniform(name, n * high).reshape(-1, n, high)
        return np.argsort(keyed, axis=-1, kind="stable")[..., :count]

    def deciding(self, n: int, count: int, high: int) -> NDArray[np.int64]:
        """(B, n, count) distinct numbers on [0, high): of a question's values, the first of which is asked."""
        return self.distinct("value", n, count, high)

    def up_to(self, name: str, n: int, high: int) -> NDArray[np.int64]:
        """(B, n) on [1, high]."""
        return 1 + self.integers(name, n, high)

    def of(self, chosen: NDArray[np.bool_]) -> "Draws":
        """The draws of some rows: `chosen` (B,)."""
        some = Draws.__new__(Draws)
        some.keys = self.keys[chosen]
        return some


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
