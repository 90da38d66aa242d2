"""Accuracy, intervals, loss, rankings, buckets, paired differences and calibration, against known numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rm_recipe.data.comparison import pair_indices
from rm_recipe.evaluation.metrics import (
    PreferenceAccuracy,
    accuracy_by_bucket,
    accuracy_of,
    calibrate,
    paired_difference,
    preference_accuracy,
    ranking_agreement,
)

# --- preference accuracy -----------------------------------------------------------------------


def test_accuracy_is_over_comparisons_not_the_mean_of_batches_and_a_tie_is_one_half():
    """Five comparisons in batches of four, three right: TRL's mean of batch means says 0.75."""
    metric = PreferenceAccuracy()
    metric.add_batch(chosen=[1.0, 1.0, 0.0, 0.0], rejected=[0.0, 0.0, 1.0, 1.0])
    metric.add_batch(chosen=[1.0], rejected=[0.0])
    assert metric.compute()["accuracy"] == pytest.approx(0.6)
    result = metric.compute(chosen=[1.0, 0.5, 3.0, 0.0], rejected=[0.0, 0.5, 4.0, -1.0])
    assert result["accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert (result["ties"], result["n"]) == (1, 4)


def test_the_interval_is_wilsons():
    found = accuracy_of(np.array([1.0] * 69 + [0.5] * 2 + [0.0] * 29))["accuracy_ci95"]
    assert found == pytest.approx([0.60415, 0.78105], abs=1e-5)  # of 70 in 100


def test_each_comparison_weighs_one_however_many_responses_it_has():
    """Six pairs, all right, and one, wrong: 1/2 and not 6/7."""
    rewards = np.array([4.0, 3, 2, 1, 0, 1])
    better, worse, comparison = pair_indices([[0, 1, 2, 3], [0, 1]])
    result = preference_accuracy(rewards[better], rewards[worse], comparison)
    assert (result["accuracy"], result["n"]) == (0.5, 2)
    losses = np.logaddexp(0, rewards[worse] - rewards[better])
    assert result["loss"] == pytest.approx((losses[:6].mean() + losses[6]) / 2)
    assert result["mean_margin"] == pytest.approx(((1 + 2 + 3 + 1 + 2 + 1) / 6 - 1) / 2)


@pytest.mark.parametrize("chosen", [[math.nan], [math.inf], []])
def test_what_has_no_accuracy_raises(chosen):
    with pytest.raises(ValueError, match="non-empty rows of finite rewards"):
        preference_accuracy(chosen, [0.0] * len(chosen))


# --- rankings and parts ------------------------------------------------------------------------


def test_the_figures_of_rankings_by_hand():
    assert ranking_agreement([[3.0, 1.0, 2.0], [0.0, 1.0]], [[0, 1, 2], [0, 1]]) == {
        "pairs": 4,
        "pairwise_accuracy": 2 / 4,  # each pair weighs the same
        "best_of_k": 1 / 2,
        "kendall_tau": pytest.approx((1 / 3 - 1) / 2),
    }
    tied = ranking_agreement([[7.0, 7.0], [5.0, 5.0, 5.0]], [[0, 1], [0, 0, 1]])
    assert tied["best_of_k"] == pytest.approx((1 / 2 + 2 / 3) / 2)  # the chance of a draw
    assert tied["kendall_tau"] == 0


def test_a_few_values_get_a_bucket_each_and_many_are_cut_into_equal_ones():
    rows = accuracy_by_bucket([1, 3, 1, 2], np.array([1, 0, 0.5, 1]))
    found = [(row["label"], row["n"], row["accuracy"]) for row in rows]
    assert found == [("1", 2, 0.75), ("2", 1, 1), ("3", 1, 0)]
    values = np.random.default_rng(0).permutation(100)
    rows = accuracy_by_bucket(values, (values >= 40).astype(float))
    assert [row["label"] for row in rows] == ["0 to 19", "20 to 39", "40 to 59", "60 to 79", "80 to 99"]
    assert [row["accuracy"] for row in rows] == [0, 0, 1, 1, 1]


@given(st.lists(st.integers(-(10**6), 10**6) | st.integers(-2, 2), min_size=1, max_size=60))
def test_every_value_is_in_exactly_one_bucket(values):
    right = np.arange(len(values), dtype=float) % 2
    rows = accuracy_by_bucket(values, right)
    assert sum(row["n"] for row in rows) == len(values)
    assert sum(row["n"] * row["accuracy"] for row in rows) == pytest.approx(right.sum())


# --- two models on the same comparisons --------------------------------------------------------


def test_the_difference_and_who_is_right_alone_by_hand():
    found = paired_difference([1, 1, 1, 0, 0.5, 1], [1, 0, 0, 1, 0, 1])
    assert found["difference"] == pytest.approx((4.5 - 3) / 6)
    assert (found["only_this"], found["only_other"]) == (3, 1)
    assert found["p_value"] == pytest.approx(binomtest(3, 4).pvalue)
    assert paired_difference([1], [0])["ci95"] is None
    equal = paired_difference([1, 0, 1], [1, 0, 1])
    assert (equal["ci95"], equal["p_value"]) == ([0, 0], 1)


def test_calibration_error_by_hand():
    # Both margins are ln 9, so confidence is 0.9; one of the two is right.
    found = calibrate([math.log(9), -math.log(9)], np.arange(2))
    assert found["ece"] == pytest.approx(0.4)
    assert found["bins"] == [{"confidence": pytest.approx(0.9), "accuracy": 0.5, "n": 2}]
    assert calibrate([0.0, 0.0], np.arange(2))["ece"] == 0  # ties are half right at confidence 1/2
    # Three pairs of one comparison, sure and right, weigh as much as one that is sure and wrong.
    assert calibrate([50, 50, 50, -50], np.array([0, 0, 0, 1]))["ece"] == pytest.approx(0.5)
