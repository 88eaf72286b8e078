"""Packing by best fit: every token once, only long documents cut, and as few rows as the algorithm promises."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.best_fit import best_fit, waste

ROW_SIZES = st.integers(1, 40)
LENGTHS = st.lists(st.integers(1, 100), max_size=60)


def packed(lengths, row):
    """[(start, length), ...] of each row."""
    rows = best_fit(np.array(lengths, dtype=np.int64), row)
    pieces = list(zip(rows.starts.tolist(), rows.lengths.tolist()))
    return [pieces[first:end] for first, end in pairwise(rows.first_pieces.tolist())]


def longest_first(lengths, row):
    rests = [length % row for length in lengths if length % row]
    return sorted([row] * sum(length // row for length in lengths) + rests, reverse=True)


def free_one_by_one(lengths, row):
    """Free space of each row when best-fit decreasing places one piece at a time, as in the textbook."""
    free = []
    for size in longest_first(lengths, row):
        room = [space for space in free if space >= size]
        if room:
            free.remove(min(room))
        free.append((min(room) if room else row) - size)
    return sorted(free)


def fewest_rows(sizes, row, free=()):
    """By trying every placement."""
    if not sizes:
        return len(free)
    size, *others = sizes
    used = {
        fewest_rows(others, row, (*free[:i], space - size, *free[i + 1 :]))
        for i, space in enumerate(free)
        if space >= size
    }
    return min(used | {fewest_rows(others, row, (*free, row - size))})


@given(LENGTHS, ROW_SIZES)
def test_every_token_is_in_exactly_one_row_and_no_row_is_too_long(lengths, row):
    rows = packed(lengths, row)
    tokens = [token for pieces in rows for start, length in pieces for token in range(start, start + length)]
    assert sorted(tokens) == list(range(sum(lengths)))
    assert all(1 <= sum(length for _, length in pieces) <= row for pieces in rows)


@given(LENGTHS, ROW_SIZES)
def test_only_documents_longer_than_a_row_are_cut_and_only_where_a_row_is_full(lengths, row):
    ends = np.cumsum(lengths)
    for start, length in (piece for pieces in packed(lengths, row) for piece in pieces):
        document = np.searchsorted(ends, start, side="right")
        offset = start - (ends[document] - lengths[document])
        assert offset % row == 0
        assert length == min(row, lengths[document] - offset)


@given(LENGTHS, ROW_SIZES)
def test_free_space_is_that_of_one_piece_at_a_time(lengths, row):
    free = [row - sum(length for _, length in pieces) for pieces in packed(lengths, row)]
    assert sorted(free) == free_one_by_one(lengths, row)


@given(st.lists(st.integers(1, 30), max_size=7), st.integers(6, 30))
def test_rows_are_at_most_half_more_than_the_fewest_possible(lengths, row):
    """The bound of best-fit decreasing: Simchi-Levi 1994, "New worst-case results for the bin-packing problem"."""
    sizes = longest_first(lengths, row)
    rests = [size for size in sizes if size < row]
    fewest = len(sizes) - len(rests) + fewest_rows(rests, row)
    assert fewest <= len(packed(lengths, row)) <= 1.5 * fewest


def test_many_documents_leave_almost_no_padding():
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64) + 1
    assert waste(lengths, 2048, "best_fit").padding < 2048


@given(LENGTHS, ROW_SIZES, st.integers(0, 100))
def test_waste_is_what_the_rows_show(lengths, row, position):
    array, rows = np.array(lengths, dtype=np.int64), packed(lengths, row)
    ends, multiples = position + np.cumsum(array), set(range(0, position + sum(lengths), row))
    assert waste(array, row, "best_fit") == (sum(n > row for n in lengths), len(rows) * row - sum(lengths))
    cut = sum(any(token in multiples for token in range(end - n + 1, end)) for end, n in zip(ends, lengths))
    assert waste(array, row, "concat", position) == (cut, 0)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_no_documents_waste_nothing(packing):
    assert waste(np.array([], dtype=np.int64), 8, packing) == (0, 0)
