"""The estimator is the mean over all subsets, and the curve finds a peak that is known."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rm_recipe.overoptimization.best_of_n import (
    best_of_n,
    chances_of_best,
    gain_curve,
    kl,
    spread,
    standardised,
)


def by_brute_force(proxy, values, n):
    """The mean over all subsets of n; of replies that tie for the best each counts alike."""
    means = []
    for subset in combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        means.append(np.mean([values[i] for i in subset if proxy[i] == best]))
    return np.mean(means)


# Few different rewards, so that many tie.
FEW = arrays(float, (2, 7), elements=st.sampled_from([-1.5, 0.0, 0.25, 2.0]))
MANY = arrays(float, (2, 7), elements=st.floats(-5, 5))


@given(proxy=st.one_of(FEW, MANY), values=MANY)
def test_it_is_the_mean_over_all_subsets(proxy, values):
    found = best_of_n(proxy, values)
    for prompt in range(2):
        expected = [by_brute_force(proxy[prompt], values[prompt], n) for n in range(1, 8)]
        assert found[prompt] == pytest.approx(expected, abs=1e-9)


def test_each_subset_has_one_best_also_where_their_numbers_are_huge():
    found = chances_of_best(2000)
    assert found.sum(axis=1) == pytest.approx(np.ones(2000))
    assert (found >= 0).all()
    assert found[1, -1] == pytest.approx(2 / 2000)  # of pairs, those with the last reply


def test_the_divergence_is_the_papers():
    """log n - (n - 1) / n, which is that of the density n u^(n - 1) from the uniform one."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 16):
        density = n * u ** (n - 1)
        assert kl(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)


def peaked(u):
    """Gold as a function of the proxy's quantile: up to 0.9 the better, and then quickly the worse."""
    return 3 * u**2 - 2.5 * u**12


def expected_of_peaked(n):
    """The mean of `peaked` over the best of n: of u^p it is n / (n + p)."""
    return 3 * n / (n + 2) - 2.5 * n / (n + 12)


def simulated(prompts, replies=64, seed=0, noise=0.5):
    rng = np.random.default_rng(seed)
    u = rng.uniform(size=(prompts, replies))
    # The proxy's own scale and each prompt's zero do not matter.
    return 5 * u + rng.normal(size=(prompts, 1)), peaked(u) + noise * rng.normal(size=u.shape)


def test_a_peak_that_is_known_is_found():
    proxy, gold = simulated(400)
    found, sizes = gain_curve(proxy, gold), np.arange(1, 65)
    expected = expected_of_peaked(sizes) - expected_of_peaked(1)
    assert np.array(found["gain"]) * spread(gold) == pytest.approx(expected, abs=0.05)
    assert 4 <= found["peak_n"] <= 9
    late = found["late_change"]
    assert late["from_n"] == 16
    assert late["mean"] * spread(gold) == pytest.approx(expected[63] - expected[15], abs=0.05)
    assert late["ci95"][1] < 0
    assert (np.diff(gain_curve(proxy, proxy)["gain"]) > 0).all()


def test_intervals_hold_what_is_true_about_as_often_as_they_say():
    n, held = 16, 0
    true = expected_of_peaked(n) - expected_of_peaked(1)
    for seed in range(100):
        proxy, gold = simulated(20, replies=32, seed=seed)
        low, high = np.array(gain_curve(proxy, gold)["gain_ci95"][n - 1]) * spread(gold)
        held += low <= true <= high
    assert 84 <= held <= 100


def test_equal_rewards_gain_nothing():
    equal, gold = np.full((3, 8), 0.1), simulated(3, replies=8)[1]
    assert (standardised(equal) == 0).all()
    assert gain_curve(equal, equal)["gain"] == [0.0] * 8
    assert gain_curve(equal, gold)["gain"] == pytest.approx(np.zeros(8))  # any choice is a draw
