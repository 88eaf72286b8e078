"""Lengths, packing losses and duplicates of the documents of a source, from one pass over its tokens.

The memory used is one shard and eight bytes for each document.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from data.best_fit import IntArray, waste
from data.settings import Packing
from data.token_store import Shard

BINS = 63  # lengths are below 2^63


@dataclass(frozen=True)
class Size:
    """Some of the documents, and all their tokens."""

    documents: int
    tokens: int


@dataclass(frozen=True)
class WasteShares:
    """What a packing loses, as shares."""

    cut: float  # of the documents
    padding: float  # of the tokens that the rows have room for


@dataclass(frozen=True)
class Statistics:
    """Figures of a source. Tokens include the markers of each document."""

    total: Size
    bytes_per_token: float  # UTF-8
    by_length: dict[int, Size]  # by a power of two n: documents of n to 2n - 1 tokens
    longer: dict[str, Size]  # by the name of each limit
    packings: dict[Packing, WasteShares]
    duplicates: float  # share of the documents whose tokens are those of an earlier one


def statistics(shards: Iterable[Shard], text_bytes: int, seq_len: int, limits: Mapping[str, int]) -> Statistics:
    """Figures of the documents in `shards`, which hold `text_bytes` bytes of text.

    Rows of `seq_len` tokens may reach from one shard into the next with `concat`, not with `best_fit`. `limits` are
    lengths in tokens.
    """
    packings, position, hashes = get_args(Packing), 0, bytearray()
    by_length, longer = np.zeros((BINS, 2), dtype=np.int64), np.zeros((len(limits), 2), dtype=np.int64)
    wasted = np.zeros((len(packings), 2), dtype=np.int64)
    for tokens, starts, _ in shards:
        lengths = np.diff(starts, append=len(tokens))
        by_length += _by_length(lengths)
        longer += _longer(lengths, np.array([*limits.values()], dtype=np.int64))
        wasted += [waste(lengths, seq_len, packing, position) for packing in packings]
        hashes += _hashes(tokens, starts, lengths)
        position += len(tokens)
    total = Size(*by_length.sum(axis=0).tolist())
    occupied = np.flatnonzero(by_length[:, 0]).tolist()
    return Statistics(
        total=total,
        bytes_per_token=text_bytes / total.tokens,
        by_length={1 << i: Size(*by_length[i].tolist()) for i in range(occupied[0], occupied[-1] + 1)},
        longer={name: Size(*row) for name, row in zip(limits, longer.tolist())},
        packings={
            packing: WasteShares(cut / total.documents, padding / (total.tokens + padding))
            for packing, (cut, padding) in zip(packings, wasted.tolist())
        },
        duplicates=_copies(hashes) / total.documents,
    )


def _by_length(lengths: IntArray) -> IntArray:
    """(BINS, 2) documents and tokens by the power of two in a length."""
    bins = np.frexp(lengths)[1] - 1
    counts = [np.bincount(bins, weights, BINS) for weights in (None, lengths)]
    return np.stack(counts, axis=1).astype(np.int64)


def _longer(lengths: IntArray, limits: IntArray) -> IntArray:
    """(limits, 2) documents and tokens above each limit."""
    above = lengths > limits[:, None]
    return np.stack((above.sum(axis=1), above @ lengths), axis=1)


def _hashes(tokens: NDArray[Any], starts: IntArray, lengths: IntArray) -> bytes:
    """Eight bytes for each document."""
    content, each = tokens.view(np.uint8).data, tokens.itemsize
    spans = zip((starts * each).tolist(), ((starts + lengths) * each).tolist())
    return b"".join(blake2b(content[start:end], digest_size=8).digest() for start, end in spans)


def _copies(hashes: bytearray) -> int:
    """How many of the 8-byte hashes are those of an earlier document. Sorts `hashes`, which costs no more memory."""
    numbers = np.frombuffer(hashes, dtype=np.uint64)
    numbers.sort()
    return int(np.count_nonzero(numbers[1:] == numbers[:-1]))
