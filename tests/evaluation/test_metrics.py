"""Accuracy, intervals, loss, rankings, buckets, paired differences and calibration, against known numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, kendalltau
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, log_loss

from rm_recipe.data.comparison import pair_indices, pairwise_agreement
from rm_recipe.evaluation.metrics import (
    FEWEST,
    PreferenceAccuracy,
    accuracy_by_bucket,
    accuracy_by_subset,
    accuracy_interval,
    bradley_terry_loss,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    paired_difference,
    preference_accuracy,
    rank_correlation,
    ranking_agreement,
)

# --- preference accuracy -----------------------------------------------------------------------


def test_preference_accuracy_counts_comparisons_and_a_tie_as_one_half():
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


def test_accuracy_and_loss_are_scikit_learns_where_there_are_no_ties():
    rng = np.random.default_rng(1)
    chosen, rejected = rng.normal(0.5, 1, 50), rng.normal(0, 1, 50)
    probability, won = 1 / (1 + np.exp(rejected - chosen)), np.ones(50)
    result = preference_accuracy(chosen, rejected)
    assert result["accuracy"] == pytest.approx(accuracy_score(won, probability > 0.5))
    assert result["loss"] == pytest.approx(log_loss(won, probability, labels=[0, 1]))


def test_each_comparison_weighs_one_however_many_responses_it_has():
    """Six pairs, all right, and one, wrong: 1/2 and not 6/7."""
    ranks = [[0, 1, 2, 3], [0, 1]]
    rewards = np.array([4.0, 3, 2, 1, 0, 1])
    better, worse, comparison = pair_indices(ranks)
    result = preference_accuracy(rewards[better], rewards[worse], comparison)
    assert (result["accuracy"], result["n"]) == (0.5, 2)
    losses = np.logaddexp(0, rewards[worse] - rewards[better])
    assert result["loss"] == pytest.approx((losses[:6].mean() + losses[6]) / 2)
    assert result["mean_margin"] == pytest.approx(((1 + 2 + 3 + 1 + 2 + 1) / 6 - 1) / 2)


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [([math.nan], [0.0], "not finite"), ([math.inf], [0.0], "not finite"), ([], [], "non-empty")],
)
def test_what_has_no_accuracy_raises(chosen, rejected, message):
    with pytest.raises(ValueError, match=message):
        preference_accuracy(chosen, rejected)


# --- rankings ----------------------------------------------------------------------------------


def test_the_pairs_of_rankings_are_numbered_through_and_leave_ties_out():
    better, worse, comparison = pair_indices([[0, 1, 1], [0, 1], [0, 0, 2]])
    assert better.tolist() == [0, 0, 3, 5, 6]
    assert worse.tolist() == [1, 2, 4, 7, 7]
    assert comparison.tolist() == [0, 0, 1, 2, 2]


def test_agreement_with_a_ranking_is_kendalls_tau_on_another_scale():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.permutation(5)
        tau = (2 * pairwise_agreement(values, [[0, 1, 2, 3, 4]])[0]) - 1
        assert tau == pytest.approx(kendalltau(values, [4, 3, 2, 1, 0]).statistic)


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


# --- parts of the data -------------------------------------------------------------------------


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


def test_subsets_are_named_and_what_belongs_to_none_is_left_out():
    found = accuracy_by_subset(["a", "", "b", "a"], np.array([1, 0, 0.5, 0]))
    assert {name: (part["n"], part["accuracy"]) for name, part in found.items()} == {
        "a": (2, 0.5),
        "b": (1, 0.5),
    }


def test_rank_correlation_is_none_where_nothing_varies():
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1, 2, 30], [5, 6, 7]) == pytest.approx(1)


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

ONE_EACH = np.arange(2000)


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


def test_the_curve_is_scikit_learns():
    margins = drawn_margins(1.5)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    # Theirs has equal bins between 0 and 1, of which confidence fills the upper half.
    accuracy, mean_confidence = calibration_curve(margins > 0, confidence, n_bins=20)
    _, bins = expected_calibration_error(margins)
    assert [b["accuracy"] for b in bins] == pytest.approx(accuracy)
    assert [b["confidence"] for b in bins] == pytest.approx(mean_confidence)


def test_the_temperature_is_where_the_loss_is_least():
    margins = drawn_margins(3.0)
    best = minimize_scalar(
        lambda t: bradley_terry_loss(margins / t, np.zeros_like(margins)), bounds=(0.1, 10), method="bounded"
    )
    assert fit_temperature(margins, ONE_EACH) == pytest.approx(best.x, rel=1e-3)
    assert best.x == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("margins", [[1.0, 2.0, 0.0], [-1.0, -2.0, 0.5]])
def test_where_all_are_right_or_most_are_wrong_there_is_no_temperature(margins):
    assert fit_temperature(margins, np.arange(3)) is None


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_temperature_mends_what_is_too_sure_or_not_sure_enough(temperature):
    margins = drawn_margins(temperature)
    result = calibrate(margins, ONE_EACH)
    assert result["temperature"] == pytest.approx(temperature, rel=0.1)
    assert result["ece"] > 0.05 > 0.03 > result["ece_after"]
    assert result["loss_after"] < bradley_terry_loss(margins, np.zeros_like(margins))


def test_no_comparison_is_judged_by_a_temperature_that_it_helped_to_fit():
    """On what it was fitted to, a temperature looks better than it is."""
    margins = np.random.default_rng(1).normal(0.3, 1, FEWEST)
    temperature = fit_temperature(margins, np.arange(FEWEST))
    fitted_loss = bradley_terry_loss(margins / temperature, np.zeros_like(margins))
    assert calibrate(margins, np.arange(FEWEST))["loss_after"] > fitted_loss


def test_a_few_comparisons_have_no_temperature():
    result = calibrate(drawn_margins(2.0)[: FEWEST - 1], np.arange(FEWEST - 1))
    assert (result["temperature"], result["ece_after"], result["loss_after"]) == (None, None, None)
