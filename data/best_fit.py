"""Packs documents into rows without cutting those that fit into a row (best-fit decreasing), and counts what is lost.

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.

A piece is a document, or a part of one that is longer than a row. The pieces are placed from the longest to the
shortest. Each goes into the row with the least free space that still holds it.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.settings import Packing

IntArray = NDArray[np.int64]


class PackedRows(NamedTuple):
    """Pieces sorted by row. Row r holds the pieces `first_pieces[r]` to `first_pieces[r + 1] - 1`."""

    starts: IntArray  # (pieces,) position of the first token, where all documents lie one after another
    lengths: IntArray  # (pieces,) tokens
    first_pieces: IntArray  # (rows + 1,)


class Waste(NamedTuple):
    """What a packing loses."""

    cut: int  # documents
    padding: int  # tokens


def best_fit(lengths: IntArray, row: int) -> PackedRows:
    """Rows of at most `row` tokens from documents of `lengths` (documents,) tokens.

    Only documents longer than a row are cut, into full rows and one rest. The result depends on the arguments alone.

    >>> rows = best_fit(np.array([3, 9, 5]), 8)
    >>> rows.starts, rows.lengths, rows.first_pieces
    (array([ 3, 12,  0, 11]), array([8, 5, 3, 1]), array([0, 1, 3, 4]))
    """
    starts, lengths = _pieces(lengths, row)
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths)
    sizes = np.flatnonzero(counts)[::-1]
    rows = _placed(zip(sizes.tolist(), counts[sizes].tolist()), len(lengths), row)
    by_row = order[np.argsort(rows, kind="stable")]
    first_pieces = np.concatenate(([0], np.cumsum(np.bincount(rows))))
    return PackedRows(starts[by_row], lengths[by_row], first_pieces)


def waste(lengths: IntArray, row: int, packing: Packing, position: int = 0) -> Waste:
    """What rows of `row` tokens from documents of `lengths` (documents,) tokens lose. All lengths are at least 1.

    `concat` joins the documents, the first of which starts at token `position`, and cuts at every multiple of `row`. It
    leaves out the last tokens that fill no row.

    >>> waste(np.array([3, 9, 5]), 8, "concat"), waste(np.array([3, 9, 5]), 8, "best_fit")
    (Waste(cut=2, padding=0), Waste(cut=1, padding=7))
    """
    if packing == "best_fit":
        rows = len(best_fit(lengths, row).first_pieces) - 1
        return Waste(int(np.count_nonzero(lengths > row)), rows * row - int(lengths.sum()))
    ends = position + np.cumsum(lengths)
    return Waste(int(np.count_nonzero((ends - lengths) // row != (ends - 1) // row)), 0)


def _pieces(lengths: IntArray, row: int) -> tuple[IntArray, IntArray]:
    """Start and length of each piece, in the order of the text."""
    ends, parts = np.cumsum(lengths), -(-lengths // row)
    number = _counted(parts)
    starts = np.repeat(ends - lengths, parts) + number * row
    return starts, np.minimum(row, np.repeat(ends, parts) - starts)


def _placed(sizes: Iterable[tuple[int, int]], pieces: int, row: int) -> IntArray:
    """(pieces,) the row of each piece. `sizes` are (tokens, number of such pieces), the longest first.

    Pieces of one size go into many rows at once. Rows with equal free space are kept as ranges (first row, number of
    rows). A row that takes one piece of a size has less space than before, so it also takes the next of that size,
    while there is room.
    """
    open_rows: dict[int, list[tuple[int, int]]] = defaultdict(list, {row: [(0, pieces)]})
    spaces = [row]  # the keys with rows, ascending
    placements: list[tuple[int, int, int]] = []  # first row, number of rows, pieces in each

    def put(space: int, first: int, rows: int) -> None:
        if not open_rows[space]:
            insort(spaces, space)
        open_rows[space].append((first, rows))

    for size, count in sizes:
        while count:
            i = bisect_left(spaces, size)
            space = spaces[i]
            first, rows = open_rows[space].pop()
            if not open_rows[space]:
                del spaces[i]
            each = min(space // size, count)
            used = min(rows, count // each)
            placements.append((first, used, each))
            count -= used * each
            put(space - each * size, first, used)
            if used < rows:
                put(space, first + used, rows - used)
    firsts, rows_of, each_of = np.array(placements, dtype=np.int64).reshape(-1, 3).T
    return np.repeat(np.repeat(firsts, rows_of) + _counted(rows_of), np.repeat(each_of, rows_of))


def _counted(counts: IntArray) -> IntArray:
    """0, 1, ... up to each count, one after another.

    >>> _counted(np.array([2, 0, 3]))
    array([0, 1, 0, 1, 2])
    """
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
