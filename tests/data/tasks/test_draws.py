"""Stateless random numbers."""

import numpy as np

from data.tasks.draws import Draws


def test_a_row_has_its_numbers_whatever_rows_stand_beside_it():
    whole = Draws(7, 3, range(10)).uniform("x", 50)
    np.testing.assert_array_equal(Draws(7, 3, range(4, 6)).uniform("x", 50), whole[4:6])
    np.testing.assert_array_equal(Draws(7, 3, range(10)).uniform("x", 20), whole[:, :20])


def test_seed_step_row_and_name_each_change_the_numbers():
    made = [
        Draws(seed, step, range(row, row + 1)).uniform(name, 4)[0]
        for seed in (0, 1) for step in (0, 1) for row in (0, 1) for name in ("a", "b")
    ]  # fmt: skip
    assert len({tuple(numbers) for numbers in made}) == 16


def test_numbers_are_uniform_and_uncorrelated_between_rows_names_and_neighbours():
    draws = Draws(0, 0, range(400))
    a, b = draws.uniform("a", 400), draws.uniform("b", 400)
    assert a.min() >= 0
    assert a.max() < 1
    counts = np.histogram(a, bins=20, range=(0, 1))[0]
    assert ((counts - 8000) ** 2 / 8000).sum() < 45  # chi squared, 19 degrees of freedom, p < 0.001
    for x, y in ((a, b), (a[:-1], a[1:]), (a[:, :-1], a[:, 1:])):
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.01


def test_integers_cover_their_range():
    assert set(Draws(0, 0, range(10)).integers("x", 100, 5).ravel()) == {0, 1, 2, 3, 4}
