"""Claims about intervals and horizons."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eval import stats
from eval.reach import theory


@given(st.integers(1, 500), st.data())
def test_wilson_interval_holds_the_rate_and_stays_in_the_unit_interval(n, data):
    correct = data.draw(st.integers(0, n))
    low, high = stats.wilson(correct, n)
    assert -1e-12 <= low <= correct / n + 1e-12
    assert correct / n - 1e-12 <= high <= 1 + 1e-12


def test_one_dip_ends_h90_however_well_later_distances_do():
    assert stats.h90([1, 16, 32, 64], [400, 400, 300, 400], [400] * 4).value == 16


def test_ninety_percent_observed_is_not_enough_for_h90():
    assert stats.h90([1, 16], [400, 360], [400, 400]).value == 1


def test_h50_lies_between_the_distances_that_bracket_the_fall():
    horizon = stats.h50([16, 32, 64], [400, 400, 12], [400] * 3)
    assert 32 < horizon.value < 64
    assert horizon.low == 32
    assert horizon.high == 64
    assert not horizon.censored


def test_h50_is_censored_when_the_curve_never_falls():
    assert stats.h50([16, 32], [400, 400], [400, 400]).censored


def test_a_rise_after_the_fall_moves_h50_only_as_far_as_the_fit_allows():
    assert (
        stats.h50([16, 32, 64], [400, 0, 200], [400] * 3).value
        == stats.h50([16, 32, 64], [400, 100, 100], [400] * 3).value
    )


def test_mixture_mean_is_k_times_share_times_half_the_window():
    influence = theory.mixture([16] * 32, [0.9] * 32, 481)
    assert abs(influence.sum() - 1) < 1e-9
    assert abs(np.arange(481) @ influence - 32 * 0.1 * 7.5) < 1e-6
