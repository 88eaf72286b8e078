"""Permutes n numbers without memory: a keyed permutation, computed for each number separately.

It is a Feistel network over the bits of the number (Luby and Rackoff, 1988). It permutes the numbers below a power of
two. A result that is not below n goes through the network again until it is ("cycle walking"; Black and Rogaway, 2002).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.tasks.draws import IntArray, mix

ROUNDS = 6


def permuted(numbers: IntArray, n: int, key: Sequence[int]) -> IntArray:
    """Where each of `numbers`, all in 0…n-1, stands in the order that `key` names. Any shape, at most 2^62 numbers.

    >>> sorted(permuted(np.arange(5), 5, key=[1, 2]).tolist())
    [0, 1, 2, 3, 4]
    """
    bits = max(2, (n - 1).bit_length())
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64).astype(np.uint64)
    result = _feistel(numbers.astype(np.uint64), bits, keys)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], bits, keys)
    return result.astype(np.int64)


def _feistel(numbers: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A one-to-one map of the numbers below 2^bits. The two halves of a number take turns in changing the other."""
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    left, right = numbers >> low, numbers & _ones(low)  # of `high` and of `low` bits
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & _ones(high))
        low, high = high, low
    return (left << low) | right


def _ones(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)
