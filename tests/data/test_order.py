"""The order of rows: a permutation for any number of them, another for each key, without a pattern, and for ever."""

import numpy as np
import pytest
from scipy import stats

from data.order import permuted


def order(n, *key):
    return permuted(np.arange(n), n, key)


@pytest.mark.parametrize("sizes", [range(1, 301), [1023, 1024, 1025, 65_537, 300_001]], ids=["small", "large"])
def test_every_number_comes_exactly_once(sizes):
    for n in sizes:
        np.testing.assert_array_equal(np.sort(order(n, 7, 1)), np.arange(n))


def test_each_number_is_computed_by_itself_in_any_shape():
    some = np.array([[5, 700], [0, 999]])
    np.testing.assert_array_equal(permuted(some, 1000, [3]), order(1000, 3)[some])


def test_far_more_numbers_than_memory_stay_within_their_range_and_apart():
    numbers, n = np.arange(10_000) * 10**13, 10**17 + 3
    places = permuted(numbers, n, [0])
    assert ((places >= 0) & (places < n)).all()
    assert len(np.unique(places)) == len(numbers)


@pytest.mark.parametrize("n", [1000, 4096])
def test_orders_of_neighbouring_keys_are_unrelated_to_each_other_and_to_the_numbers(n):
    """Correlations of n pairs by chance have a standard deviation of 1 / sqrt(n)."""
    orders = [
        np.arange(n),
        *(order(n, seed, 0, source, epoch) for seed in (0, 1) for source in (0, 9) for epoch in (0, 1)),
    ]
    correlations = np.corrcoef(orders)[np.triu_indices(len(orders), 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(n)
    for shuffled in orders[1:]:
        assert abs(np.corrcoef(shuffled[1:], shuffled[:-1])[0, 1]) < 4.5 / np.sqrt(n)


def test_every_place_is_as_likely_as_any_other():
    """Where the first, a middle and the last of 10 numbers stand under 5,000 keys, by a chi-squared test."""
    orders = np.array([order(10, key) for key in range(5000)])
    for number in (0, 4, 9):
        assert stats.chisquare(np.bincount(orders[:, number], minlength=10)).pvalue > 1e-4


def test_all_orders_of_four_occur_about_equally_often():
    _, counts = np.unique([order(4, key) for key in range(4800)], axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_the_order_never_changes_silently():
    """A run that is resumed by another version must read on where it stopped; else raise ROW_ORDER in run/folder.py."""
    assert order(10, 0).tolist() == [5, 6, 7, 4, 8, 9, 3, 1, 2, 0]
    assert order(10, 1, 2, 3).tolist() == [1, 2, 0, 5, 4, 9, 3, 6, 8, 7]
    assert permuted(np.array([0, 1, 10**15]), 10**16, [5]).tolist() == [
        1748976446498451,
        4755978467095559,
        5046450181571514,
    ]
