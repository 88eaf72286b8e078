"""Random numbers for recall rows: `Draws` for rows of training, `ItemDraws` for one evaluation item.

Numbers of training are a pure function of (seed, step, row, name, index). There is no state to save, and rows can be
drawn in any order. Each is a SplitMix64 hash (Steele, Lea and Flood, 2014) of its address.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """Draws for B rows: the rows `rows` (global numbers) of a step. Each name is an independent stream."""

    def __init__(self, seed: int, step: int, rows: range):
        numbers = np.arange(rows.start, rows.stop, dtype=np.uint64)
        self.keys = mix(mix(mix(np.full_like(numbers, seed)) + np.uint64(step)) + numbers)

    def uniform(self, name: str, n: int) -> NDArray[np.float64]:
        """(B, n) on [0, 1), in steps of 2**-53."""
        stream = mix(self.keys + np.uint64(zlib.crc32(name.encode())))
        bits = mix(stream[:, None] + np.arange(n, dtype=np.uint64) * _GOLDEN)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, name: str, n: int, high: int) -> IntArray:
        """(B, n) on [0, high)."""
        return (self.uniform(name, n) * high).astype(np.int64)

    def distinct(self, name: str, n: int, count: int, high: int) -> IntArray:
        """(B, n, count) on [0, high), without repetition along the last axis."""
        if count == 1:
            return self.integers(name, n, high)[..., None]
        keyed = self.uniform(name, n * high).reshape(-1, n, high)
        return np.argsort(keyed, axis=-1, kind="stable")[..., :count]

    def deciding(self, n: int, count: int, high: int) -> IntArray:
        """(B, n, count) on [0, high), distinct: the values of each question, of which the first decides the answer."""
        return self.distinct("value", n, count, high)

    def up_to(self, name: str, n: int, high: int) -> IntArray:
        """(B, n) on [1, high]: the size of each question."""
        return 1 + self.integers(name, n, high)

    def of(self, chosen: NDArray[np.bool_]) -> "Draws":
        """The draws of some of the rows: `chosen` (B,)."""
        some = Draws.__new__(Draws)
        some.keys = self.keys[chosen]
        return some


class ItemDraws:
    """Draws for one row (B = 1), with the methods of `Draws`. A name that was drawn keeps its numbers."""

    def __init__(self, rng: np.random.Generator, drawn: dict[str, IntArray] | None = None, member: int = 0):
        self.rng, self.drawn, self.member = rng, {} if drawn is None else drawn, member

    def counterfactual(self) -> "ItemDraws":
        """The same draws, except for the first question's deciding number."""
        return ItemDraws(self.rng, self.drawn, member=1)

    def integers(self, name: str, n: int, high: int) -> IntArray:
        if name not in self.drawn:
            self.drawn[name] = self.rng.integers(high, size=(1, n))
        return self.drawn[name]

    def distinct(self, name: str, n: int, count: int, high: int) -> IntArray:
        if name not in self.drawn:
            self.drawn[name] = np.array([[self.rng.choice(high, size=count, replace=False) for _ in range(n)]])
        return self.drawn[name]

    def deciding(self, n: int, count: int, high: int) -> IntArray:
        """The counterfactual has an extra number in place of the first. Other questions draw without regard to both."""
        if "deciding" not in self.drawn:
            self.drawn["deciding"] = self.rng.choice(high, size=count + 1, replace=False)
        first, *others, alternative = self.drawn["deciding"]
        asked = np.array([[[alternative if self.member else first, *others]]], dtype=np.int64)
        return np.concatenate((asked, self.distinct("older", n - 1, count, high)), axis=1) if n > 1 else asked

    def up_to(self, name: str, n: int, high: int) -> IntArray:
        """Evaluation asks questions of the largest size."""
        return np.full((1, n), high)


TaskDraws = Draws | ItemDraws


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
