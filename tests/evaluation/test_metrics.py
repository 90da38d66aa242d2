"""Accuracy, ties, intervals, loss and calibration, against numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy.stats import kendalltau
from sklearn.metrics import accuracy_score, log_loss

from rm_recipe.data.comparison import agreement, pair_indices, pairwise_agreement
from rm_recipe.evaluation.metrics import (
    PreferenceAccuracy,
    RankingAgreement,
    accuracy_interval,
    best_of_k,
    bradley_terry_loss,
    kendall_tau,
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


def test_accuracy_and_loss_are_scikit_learns_where_there_are_no_ties():
    rng = np.random.default_rng(1)
    chosen, rejected = rng.normal(0.5, 1, 50), rng.normal(0, 1, 50)
    probability, won = 1 / (1 + np.exp(rejected - chosen)), np.ones(50)
    result = PreferenceAccuracy().compute(chosen=chosen, rejected=rejected)
    assert result["accuracy"] == pytest.approx(accuracy_score(won, probability > 0.5))
    assert result["loss"] == pytest.approx(log_loss(won, probability, labels=[0, 1]))


def test_the_pairs_of_rankings_are_numbered_through_and_leave_ties_out():
    better, worse, comparison = pair_indices([[0, 1, 1], [0, 1], [0, 0, 2]])
    assert better.tolist() == [0, 0, 3, 5, 6]
    assert worse.tolist() == [1, 2, 4, 7, 7]
    assert comparison.tolist() == [0, 0, 1, 2, 2]


def test_agreement_with_a_ranking_is_kendalls_tau_on_another_scale():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.integers(0, 4, 5)
        tau_a = (2 * pairwise_agreement(values, [[0, 1, 2, 3, 4]])[0]) - 1
        concordance = [np.sign(values[i] - values[j]) for i in range(5) for j in range(i + 1, 5)]
        assert tau_a == pytest.approx(np.mean(concordance))
        if len(set(values)) == 5:
            assert tau_a == pytest.approx(kendalltau(values, [4, 3, 2, 1, 0]).statistic)


def test_each_comparison_weighs_one_however_many_responses_it_has():
    """Six pairs, all right, and one, wrong: 1/2 and not 6/7."""
    ranks = [[0, 1, 2, 3], [0, 1]]
    rewards = np.array([4.0, 3, 2, 1, 0, 1])
    better, worse, comparison = pair_indices(ranks)
    result = PreferenceAccuracy().compute(
        chosen=rewards[better], rejected=rewards[worse], comparison=comparison
    )
    assert (result["accuracy"], result["n"]) == (0.5, 2)
    assert pairwise_agreement([1, 2, 3, 4, 9, 1], ranks).tolist() == [0, 1]
    losses = np.logaddexp(0, rewards[worse] - rewards[better])
    expected = (losses[:6].mean() + losses[6]) / 2
    assert bradley_terry_loss(rewards[better], rewards[worse], comparison) == pytest.approx(expected)
    assert result["loss"] == pytest.approx(expected)
    assert result["mean_margin"] == pytest.approx(((1 + 2 + 3 + 1 + 2 + 1) / 6 - 1) / 2)


def test_best_of_k_asks_whether_the_highest_reward_is_a_best_responses():
    ranks = [[0, 1, 2], [0, 0, 1], [0, 1, 1], [0, 1]]
    rewards = [3, 2, 1, 1, 5, 4, 1, 2, 2, 7, 7]
    assert best_of_k(rewards, ranks).tolist() == [1, 1, 0, 0.5]


def test_kendalls_tau_is_scipys_with_ties_on_both_sides():
    rng = np.random.default_rng(2)
    ranks = [sorted(rng.integers(0, 3, k)) for k in (2, 3, 5, 9)]
    rewards = rng.integers(0, 4, 19).astype(float)
    by_hand = []
    for own, values in zip(ranks, np.split(rewards, [2, 5, 10]), strict=True):
        pairs = [(i, j) for i in range(len(own)) for j in range(i)]
        signs = [np.sign(own[j] - own[i]) * np.sign(values[i] - values[j]) for i, j in pairs]
        untied = [sum(x[i] != x[j] for i, j in pairs) for x in (own, values)]
        by_hand.append(sum(signs) / math.sqrt(math.prod(untied)) if all(untied) else 0)
    assert kendall_tau(rewards, ranks) == pytest.approx(by_hand)
    assert kendall_tau([1, 1, 1], [[0, 1, 2]]).tolist() == [0]


def test_the_figures_of_rankings_by_hand():
    result = RankingAgreement().compute(rewards=[[3.0, 1.0, 2.0], [0.0, 1.0]], ranks=[[0, 1, 2], [0, 1]])
    assert result == {
        "pairs": 4,
        "pairwise_accuracy": 2 / 4,  # each pair weighs the same
        "best_of_k": 1 / 2,
        "kendall_tau": pytest.approx((1 / 3 - 1) / 2),
        "n": 2,
    }


@pytest.mark.parametrize(
    ("rewards", "ranks", "message"),
    [
        ([], [], "at least one"),
        ([[1.0]], [[0, 1]], "a rank for every reward"),
        ([[1.0, float("nan")]], [[0, 1]], "not finite"),
    ],
)
def test_rankings_that_cannot_be_judged_raise(rewards, ranks, message):
    with pytest.raises(ValueError, match=message):
        RankingAgreement()._compute(rewards, ranks)


@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")]])
def test_a_reward_that_is_no_number_never_becomes_an_accuracy(bad):
    with pytest.raises(ValueError, match="not finite"):
        PreferenceAccuracy()._compute(np.array(bad), np.array([0.0]))


def test_no_comparison_has_no_accuracy():
    with pytest.raises(ValueError, match="non-empty"):
        PreferenceAccuracy()._compute(np.array([]), np.array([]))
