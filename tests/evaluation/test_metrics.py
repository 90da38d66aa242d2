"""Accuracy, intervals, loss, rankings, buckets, paired differences and calibration, against known numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from rm_recipe.data.comparison import pair_indices
from rm_recipe.evaluation.metrics import (
    FEWEST,
    PreferenceAccuracy,
    accuracy_by_bucket,
    accuracy_of,
    bradley_terry_loss,
    calibrate,
    expected_calibration_error,
    fit_temperature,
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
    n, p, z = 100, 0.7, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    found = accuracy_of(np.array([1.0] * 69 + [0.5] * 2 + [0.0] * 29))["accuracy_ci95"]
    assert found == pytest.approx([centre - half, centre + half])


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


def test_a_few_whole_numbers_get_a_bucket_each_and_many_are_cut_into_equal_ones():
    rows = accuracy_by_bucket([1, 3, 1, 2], np.array([1, 0, 0.5, 1]))
    found = [(row["label"], row["n"], row["accuracy"]) for row in rows]
    assert found == [("1", 2, 0.75), ("2", 1, 1), ("3", 1, 0)]
    values = np.random.default_rng(0).permutation(100)
    rows = accuracy_by_bucket(values, (values >= 40).astype(float))
    assert [row["label"] for row in rows] == ["0 to 19", "20 to 39", "40 to 59", "60 to 79", "80 to 99"]
    assert [row["accuracy"] for row in rows] == [0, 0, 1, 1, 1]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(0.0), min_size=1, max_size=60))
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


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        other, this = rng.random(200) < 0.6, rng.random(200) < 0.7
        low, high = paired_difference(this, other)["ci95"]
        covered += low <= 0.1 <= high
    assert 88 <= covered <= 100


# --- calibration -------------------------------------------------------------------------------


def drawn_margins(temperature: float, n: int = 2000) -> np.ndarray:
    """Margins of a model whose sigmoid(margin / temperature) is how often it is right."""
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, n)
    wins = rng.random(n) < 1 / (1 + np.exp(-true))
    return temperature * np.where(wins, true, -true)


def test_calibration_error_by_hand():
    # Both margins are ln 9, so confidence is 0.9; one of the two is right.
    error, bins = expected_calibration_error([math.log(9), -math.log(9)])
    assert error == pytest.approx(0.4)
    assert bins == [{"confidence": pytest.approx(0.9), "accuracy": 0.5, "n": 2}]
    assert expected_calibration_error([0.0, 0.0])[0] == 0  # ties are half right at confidence 1/2
    # Three pairs of one comparison, sure and right, weigh as much as one that is sure and wrong.
    assert expected_calibration_error([50, 50, 50, -50], np.array([0, 0, 0, 1]))[0] == pytest.approx(0.5)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_is_where_the_loss_is_least_and_mends_the_calibration(temperature):
    margins = drawn_margins(temperature)
    best = minimize_scalar(
        lambda t: bradley_terry_loss(margins / t, np.zeros_like(margins)), bounds=(0.1, 10), method="bounded"
    )
    result = calibrate(margins, np.arange(2000))
    assert result["temperature"] == pytest.approx(best.x, rel=1e-3)
    assert best.x == pytest.approx(temperature, rel=0.1)
    assert result["ece"] > 0.05 > 0.03 > result["ece_after"]
    assert result["loss_after"] < bradley_terry_loss(margins, np.zeros_like(margins))


@pytest.mark.parametrize("margins", [[1.0, 2.0, 0.0], [-1.0, -2.0, 0.5]])
def test_where_all_are_right_or_most_are_wrong_or_few_there_is_no_temperature(margins):
    assert fit_temperature(margins, np.arange(3)) is None
    result = calibrate(drawn_margins(2.0)[: FEWEST - 1], np.arange(FEWEST - 1))
    assert (result["temperature"], result["ece_after"], result["loss_after"]) == (None, None, None)


def test_no_comparison_is_judged_by_a_temperature_that_it_helped_to_fit():
    """On what it was fitted to, a temperature looks better than it is."""
    margins = np.random.default_rng(1).normal(0.3, 1, FEWEST)
    temperature = fit_temperature(margins, np.arange(FEWEST))
    fitted_loss = bradley_terry_loss(margins / temperature, np.zeros_like(margins))
    assert calibrate(margins, np.arange(FEWEST))["loss_after"] > fitted_loss
