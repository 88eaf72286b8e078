"""Claims about the predictions of others: the mixture is the binomial one, and ends where the windows end."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from eval.reach import theory
from model import windows
from model.windows import LayerSpec

window_sizes, depths, shares = st.integers(2, 9), st.integers(1, 8), st.floats(0.05, 0.95)


def binomial_mixture(window, layers, alpha, length):
    """Written out: the number of hops is binomial, and each is uniform on 0..W-1."""
    total, hops = np.zeros(length), np.eye(1, length)[0]
    uniform = np.zeros(length)
    uniform[:window] = 1 / window
    for number in range(layers + 1):
        total += binom.pmf(number, layers, 1 - alpha) * hops
        hops = np.convolve(hops, uniform)[:length]
    return total


@given(window_sizes, depths, shares)
def test_the_recurrence_iterated_is_the_binomial_mixture(window, layers, alpha):
    length = layers * (window - 1) + 1
    influence = theory.mixture([window] * layers, [alpha] * layers, length)
    assert np.allclose(influence, binomial_mixture(window, layers, alpha, length))
    assert influence.sum() == pytest.approx(1.0)
    assert np.arange(length) @ influence == pytest.approx(layers * (1 - alpha) * (window - 1) / 2)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=5), shares)
def test_influence_lies_exactly_on_what_is_reachable(layers, alpha):
    specs = [LayerSpec("dilated" if d > 1 else "sliding", w, d) for w, d in layers]
    length = windows.reach(specs) + 4
    influence = theory.mixture([w for w, _ in layers], [alpha] * len(layers), length, [d for _, d in layers])
    assert ((influence > 0) == windows.reachable(specs, length).numpy()).all()


@given(window_sizes, shares)
def test_the_bound_does_not_grow_with_depth_and_the_mixture_does(window, alpha):
    shallow, deep = (
        theory.mixture_horizon(theory.mixture([window] * k, [alpha] * k, k * (window - 1) + 1)) for k in (4, 64)
    )
    assert deep > shallow
    assert theory.xiao_bound(window, alpha) == pytest.approx(window * math.log(0.01) / math.log(1 - alpha))


@pytest.mark.parametrize(("alpha", "bound"), [(0.0, math.inf), (1.0, 0.0)])
def test_a_stream_that_keeps_nothing_or_all_has_a_bound_too(alpha, bound):
    assert theory.xiao_bound(16, alpha) == bound


def test_the_horizon_is_where_the_rest_falls_below_epsilon():
    influence = np.array([0.9, 0.05, 0.04, 0.01])
    assert theory.mixture_horizon(influence, 0.05) == 2
    assert theory.mixture_horizon(influence, 0.06) == 1
