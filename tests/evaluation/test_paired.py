"""Two judges on the same comparisons."""

import numpy as np
import pytest
from scipy.stats import binomtest

from rm_recipe.evaluation.metrics import EXACT_BELOW, paired_difference


def test_the_difference_and_who_is_right_alone_by_hand():
    found = paired_difference([1, 1, 1, 0, 0.5, 1], [1, 0, 0, 1, 0, 1])
    assert found["difference"] == pytest.approx((4.5 - 3) / 6)
    assert (found["only_this"], found["only_other"]) == (3, 1)
    assert found["p_value"] == pytest.approx(binomtest(3, 4).pvalue)


def test_equal_judges_do_not_differ():
    assert paired_difference([1, 0, 1], [1, 0, 1]) == {
        "difference": 0, "ci95": [0, 0], "only_this": 0, "only_other": 0, "p_value": 1,
    }  # fmt: skip


def test_the_interval_of_a_pair_is_narrower_than_those_of_its_accuracies():
    rng = np.random.default_rng(0)
    other = rng.random(1000) < 0.7
    this = other | (rng.random(1000) < 0.1)  # never wrong where the other is right
    low, high = paired_difference(this, other)["ci95"]
    assert 0 < low < this.mean() - other.mean() < high
    assert high - low < 0.03  # those of the accuracies are 0.06 wide


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        other, this = rng.random(200) < 0.6, rng.random(200) < 0.7
        low, high = paired_difference(this, other)["ci95"]
        covered += low <= 0.1 <= high
    assert 88 <= covered <= 100


def test_many_differing_comparisons_give_about_the_exact_p_value():
    this = np.repeat([1, 0], [EXACT_BELOW, EXACT_BELOW - 30])
    found = paired_difference(this, 1 - this)
    assert found["p_value"] == pytest.approx(binomtest(EXACT_BELOW, 2 * EXACT_BELOW - 30).pvalue, rel=0.1)


def test_one_comparison_has_no_interval():
    assert paired_difference([1], [0])["ci95"] is None
