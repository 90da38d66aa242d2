"""The figures of a data set, worked out by hand from rewards, lengths and ranks."""

import json
from typing import Any

import numpy as np
import pytest

from rm_recipe.evaluation.summary import Scored, summarise


def make_scored(
    rewards: list[list[float]],
    lengths: list[list[int]] | None = None,
    ranks: list[list[int]] | None = None,
    subsets: list[str] | None = None,
) -> Scored:
    lengths = lengths or [[1 + k for k in range(len(own))] for own in rewards]
    n = len(rewards)
    return Scored(
        rewards=np.concatenate([np.array(own, float) for own in rewards]),
        response_tokens=np.concatenate([np.array(own) for own in lengths]),
        ranks=ranks or [list(range(len(own))) for own in rewards],
        prompt_tokens=np.arange(1, n + 1),
        turns=np.ones(n, int),
        subsets=subsets or [""] * n,
    )


def figures_of(scored: Scored) -> dict[str, Any]:
    length = scored.response_tokens.astype(float)
    return summarise(scored, {"longer_wins": length, "shorter_wins": -length})


def test_length_figures_by_hand():
    rewards, lengths = [[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]], [[5, 2], [1, 4], [3, 3]]
    figures = figures_of(make_scored(rewards, lengths, subsets=["a", "b", "a"]))
    assert figures["baselines"] == {"longer_wins": 0.5, "shorter_wins": 0.5}
    assert figures["length"]["accuracy_chosen_longer"] == 1
    assert figures["length"]["accuracy_chosen_shorter"] == 0
    assert figures["length"]["spearman_margin"] == pytest.approx(np.sqrt(3) / 2)  # ranks 3 1 2, 2.5 1 2.5
    assert figures["subsets"]["a"]["accuracy"] == 1
    assert figures["subsets"]["b"]["n"] == 1
    assert [row["label"] for row in figures["by"]["length_difference"]] == ["-3", "0", "3"]


def test_all_ties_are_half_right_and_have_no_rank_correlation():
    figures = figures_of(make_scored([[0.0, 0.0]] * 60))
    assert (figures["accuracy"], figures["ties"]) == (0.5, 60)
    assert figures["length"]["spearman"] is None
    assert figures["calibration"]["temperature"] is None
    assert figures["beats_baselines"] is False
    json.dumps(figures, allow_nan=False)


def test_in_a_ranking_each_untied_pair_weighs_the_same_and_each_comparison_one():
    """Three pairs, two of them right, beside one pair that is wrong: 1/3, not 2/4."""
    rewards, lengths = [[3.0, 1.0, 2.0], [0.0, 1.0]], [[5, 2, 1], [1, 4]]
    figures = figures_of(make_scored(rewards, lengths))
    assert figures["accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert figures["mean_margin"] == pytest.approx(((2 + 1 - 1) / 3 - 1) / 2)
    assert figures["baselines"]["longer_wins"] == pytest.approx((1 + 0) / 2)
    assert figures["ranking"]["pairwise_accuracy"] == 2 / 4
    assert figures["ranking"]["best_of_k"] == 1 / 2
    tied = figures_of(make_scored(rewards[:1], lengths[:1], [[0, 1, 1]]))
    assert tied["accuracy"] == 1  # the two last are tied and give no pair


def test_pairs_alone_have_no_figures_of_rankings():
    assert figures_of(make_scored([[1.0, 0.0]]))["ranking"] is None


def test_one_comparison_has_figures_without_any_certainty():
    figures = figures_of(make_scored([[1.0, 0.0]]))
    assert figures["accuracy"] == 1
    assert figures["accuracy_ci95"][0] < 0.3
    assert figures["against_baselines"]["longer_wins"]["ci95"] is None
    assert figures["beats_baselines"] is False
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize(("n_right", "beats"), [(95, True), (70, False), (20, False)])
def test_a_model_beats_the_baselines_where_it_surely_beats_the_best_of_them(n_right, beats):
    """The longer response is chosen in 65 of 100; whether the model agrees is unrelated to that."""
    rng = np.random.default_rng(0)
    right, longer = rng.permutation(100) < n_right, rng.permutation(100) < 65
    rewards = [[1.0, 0.0] if own else [0.0, 1.0] for own in right]
    figures = figures_of(make_scored(rewards, [[9, 2] if own else [2, 9] for own in longer]))
    difference = figures["against_baselines"]["longer_wins"]
    assert figures["beats_baselines"] is beats
    assert difference["difference"] == pytest.approx(n_right / 100 - 0.65)
    assert (difference["ci95"][0] > 0) is beats


def test_every_comparison_or_pair_is_in_one_bucket_of_each_kind():
    rng = np.random.default_rng(1)
    rewards = [rng.normal(size=3).tolist() for _ in range(40)]
    figures = figures_of(make_scored(rewards, [rng.integers(1, 50, 3).tolist() for _ in rewards]))
    sizes = {name: sum(row["n"] for row in rows) for name, rows in figures["by"].items()}
    assert sizes == {"turns": 40, "prompt_tokens": 40, "length_difference": 120, "margin": 120}
