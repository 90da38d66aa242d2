"""Accuracy, ties, intervals, loss and calibration, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from rm_recipe.metrics import (
    PreferenceAccuracy,
    accuracy_interval,
    agreement,
    bradley_terry_loss,
    expected_calibration_error,
)


def test_a_tie_counts_one_half():
    assert agreement([2, 1, 0], [1, 1, 1]).tolist() == [1, 0.5, 0]


def test_preference_accuracy_counts_comparisons_and_names_its_ties():
    result = PreferenceAccuracy().compute(chosen=[1.0, 0.5, 3.0, 0.0], rejected=[0.0, 0.5, 4.0, -1.0])
    assert result["accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert (result["ties"], result["n"]) == (1, 4)


def test_accuracy_is_over_comparisons_and_not_the_mean_of_batches():
    """Five comparisons in batches of four, three right: TRL's mean of batch means says 0.75."""
    metric = PreferenceAccuracy()
    metric.add_batch(chosen=[1.0, 1.0, 0.0, 0.0], rejected=[0.0, 0.0, 1.0, 1.0])
    metric.add_batch(chosen=[1.0], rejected=[0.0])
    assert metric.compute()["accuracy"] == pytest.approx(0.6)


def test_the_interval_is_wilsons():
    n, p, z = 100, 0.7, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert accuracy_interval(p, n) == pytest.approx([centre - half, centre + half])


def test_the_loss_is_ln_2_where_rewards_say_nothing_and_does_not_overflow():
    assert bradley_terry_loss([0.0, 5.0], [0.0, 5.0]) == pytest.approx(math.log(2))
    assert bradley_terry_loss([0.0], [1e4]) == pytest.approx(1e4)


def test_calibration_error_by_hand():
    # Both margins are ln 9, so confidence is 0.9; one of the two is right.
    margin = math.log(9)
    error, bins = expected_calibration_error([margin, 0], [0, margin])
    assert error == pytest.approx(0.4)
    assert bins == [{"confidence": pytest.approx(0.9), "accuracy": 0.5, "n": 2}]


@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")]])
def test_a_reward_that_is_no_number_never_becomes_an_accuracy(bad):
    with pytest.raises(ValueError, match="not finite"):
        PreferenceAccuracy()._compute(np.array(bad), np.array([0.0]))


def test_no_comparison_has_no_accuracy():
    with pytest.raises(ValueError, match="non-empty"):
        PreferenceAccuracy()._compute(np.array([]), np.array([]))
