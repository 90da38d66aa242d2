"""The figures of a data set against known numbers, its lines, and which of them are shown."""

import json
import math

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import binomtest

from rm_recipe.data.comparison import pair_indices
from rm_recipe.data.dataset import Split
from rm_recipe.evaluation import metrics, summary
from rm_recipe.evaluation.summary import predictions, summarise

# --- preference accuracy -----------------------------------------------------------------------


def test_accuracy_is_over_comparisons_not_the_mean_of_batches_and_a_tie_is_one_half():
    """Five comparisons in batches of four, three right: TRL's mean of batch means says 0.75."""
    metric = metrics.PreferenceAccuracy()
    metric.add_batch(chosen=[1.0, 1.0, 0.0, 0.0], rejected=[0.0, 0.0, 1.0, 1.0])
    metric.add_batch(chosen=[1.0], rejected=[0.0])
    assert metric.compute()["accuracy"] == pytest.approx(0.6)
    result = metric.compute(chosen=[1.0, 0.5, 3.0, 0.0], rejected=[0.0, 0.5, 4.0, -1.0])
    assert result["accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert (result["ties"], result["n"]) == (1, 4)


def test_the_interval_is_wilsons():
    found = metrics.accuracy_of(np.array([1.0] * 69 + [0.5] * 2 + [0.0] * 29))["accuracy_ci95"]
    assert found == pytest.approx([0.60415, 0.78105], abs=1e-5)  # of 70 in 100


def test_each_comparison_weighs_one_however_many_responses_it_has():
    """Six pairs, all right, and one, wrong: 1/2 and not 6/7."""
    rewards = np.array([4.0, 3, 2, 1, 0, 1])
    better, worse, comparison = pair_indices([[0, 1, 2, 3], [0, 1]])
    result = metrics.preference_accuracy(rewards[better], rewards[worse], comparison)
    assert (result["accuracy"], result["n"]) == (0.5, 2)
    losses = np.logaddexp(0, rewards[worse] - rewards[better])
    assert result["loss"] == pytest.approx((losses[:6].mean() + losses[6]) / 2)
    assert result["mean_margin"] == pytest.approx(((1 + 2 + 3 + 1 + 2 + 1) / 6 - 1) / 2)


@pytest.mark.parametrize("chosen", [[math.nan], [math.inf], []])
def test_what_has_no_accuracy_raises(chosen):
    with pytest.raises(ValueError, match="non-empty rows of finite rewards"):
        metrics.preference_accuracy(chosen, [0.0] * len(chosen))


# --- rankings and parts ------------------------------------------------------------------------


def test_the_figures_of_rankings_by_hand():
    assert summarise(make_lines([[3.0, 1.0, 2.0], [0.0, 1.0]]))["ranking"] == {
        "pairs": 4,
        "pairwise_accuracy": 2 / 4,  # each pair weighs the same
        "best_of_k": 1 / 2,
        "kendall_tau": pytest.approx((1 / 3 - 1) / 2),
    }
    tied = metrics.ranking_agreement([[7.0, 7.0], [5.0, 5.0, 5.0]], [[0, 1], [0, 0, 1]])
    assert tied == {"best_of_k": pytest.approx((1 / 2 + 2 / 3) / 2), "kendall_tau": 0}  # the chance of a draw


def test_a_few_values_get_a_bucket_each_and_many_are_cut_into_equal_ones():
    rows = metrics.accuracy_by_bucket([1, 3, 1, 2], np.array([1, 0, 0.5, 1]))
    found = [(row["label"], row["n"], row["accuracy"]) for row in rows]
    assert found == [("1", 2, 0.75), ("2", 1, 1), ("3", 1, 0)]
    values = np.random.default_rng(0).permutation(100)
    rows = metrics.accuracy_by_bucket(values, (values >= 40).astype(float))
    assert [row["label"] for row in rows] == ["0 to 19", "20 to 39", "40 to 59", "60 to 79", "80 to 99"]
    assert [row["accuracy"] for row in rows] == [0, 0, 1, 1, 1]


@given(st.lists(st.integers(-(10**6), 10**6) | st.integers(-2, 2), min_size=1, max_size=60))
def test_every_value_is_in_exactly_one_bucket(values):
    right = np.arange(len(values), dtype=float) % 2
    rows = metrics.accuracy_by_bucket(values, right)
    assert sum(row["n"] for row in rows) == len(values)
    assert sum(row["n"] * row["accuracy"] for row in rows) == pytest.approx(right.sum())


# --- two models on the same comparisons --------------------------------------------------------


def test_the_difference_and_who_is_right_alone_by_hand():
    found = metrics.paired_difference([1, 1, 1, 0, 0.5, 1], [1, 0, 0, 1, 0, 1])
    assert found["difference"] == pytest.approx((4.5 - 3) / 6)
    assert (found["only_this"], found["only_other"]) == (3, 1)
    assert found["p_value"] == pytest.approx(binomtest(3, 4).pvalue)
    assert metrics.paired_difference([1], [0])["ci95"] is None
    equal = metrics.paired_difference([1, 0, 1], [1, 0, 1])
    assert (equal["ci95"], equal["p_value"]) == ([0, 0], 1)


def test_calibration_error_by_hand():
    # Both margins are ln 9, so confidence is 0.9; one of the two is right.
    found = metrics.calibrate([math.log(9), -math.log(9)], np.arange(2))
    assert found["ece"] == pytest.approx(0.4)
    assert found["bins"] == [{"confidence": pytest.approx(0.9), "accuracy": 0.5, "n": 2}]
    assert metrics.calibrate([0.0, 0.0], np.arange(2))["ece"] == 0  # ties are half right at confidence 1/2
    # Three pairs of one comparison, sure and right, weigh as much as one that is sure and wrong.
    assert metrics.calibrate([50, 50, 50, -50], np.array([0, 0, 0, 1]))["ece"] == pytest.approx(0.5)


@pytest.mark.parametrize("n", [30, 300])
def test_the_calibration_error_of_a_calibrated_model_is_what_is_said_of_chance(n):
    """Which is 0.18 of 30 pairs, and would look like a fault of the model."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        size = np.abs(rng.normal(0, 1.5, n))
        right = rng.random(n) < expit(size)
        found.append(metrics.calibrate(np.where(right, size, -size), np.arange(n)))
    error, by_chance = (np.mean([own[key] for own in found]) for key in ("ece", "ece_by_chance"))
    assert by_chance == pytest.approx(error, rel=0.06)


# --- a data set's lines and what follows from them ---------------------------------------------


def make_lines(rewards, lengths=None, subsets=None):
    """The lines of comparisons with these rewards; the K-th reply has K tokens unless said otherwise."""
    lengths = lengths or [[1 + k for k in range(len(own))] for own in rewards]
    rows = [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "responses": [f"reply {i} {k}" for k in range(len(own))],
            **{"ranks": list(range(len(own))), "margins": [], "row": 10 + i, "tools": ""},
            "subset": subsets[i] if subsets else "",
            **{"prefix": [1] * (i + 1), "suffixes": [[2] * n for n in lengths[i]]},
            "reply_lengths": lengths[i],
        }
        for i, own in enumerate(rewards)
    ]
    split = Split(Dataset.from_list(rows), len(rows))
    return predictions("x", split, [np.array(own, np.float32) for own in rewards])


def test_length_figures_by_hand():
    rewards, lengths = [[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]], [[5, 2], [1, 4], [3, 3]]
    figures = summarise(make_lines(rewards, lengths, subsets=["a", "b", "a"]))
    assert figures["length"]["accuracy_chosen_shorter"] == 0
    assert figures["against_baselines"]["shorter_wins"]["difference"] == pytest.approx(2 / 3 - 1 / 2)
    assert figures["length"]["spearman_margin"] == pytest.approx(np.sqrt(3) / 2)  # ranks 3 1 2, 2.5 1 2.5
    assert figures["subsets"]["a"]["accuracy"] == 1
    assert figures["subsets"]["b"]["n"] == 1
    assert [row["label"] for row in figures["by"]["length_difference"]] == ["-3", "0", "3"]


def test_where_there_is_no_correlation_or_no_certainty_the_figures_say_none():
    ties, alone = summarise(make_lines([[0.0, 0.0]] * 60)), summarise(make_lines([[1.0, 0.0]]))
    assert (ties["accuracy"], ties["ties"], ties["length"]["spearman"]) == (0.5, 60, None)
    assert (alone["accuracy"], alone["ranking"]) == (1, None)
    assert alone["against_baselines"]["longer_wins"]["ci95"] is None
    json.dumps([ties, alone], allow_nan=False)


def test_the_worst_mistakes_and_the_closest_of_the_others_are_shown_with_their_texts(monkeypatch):
    monkeypatch.setattr(summary, "SHOWN", 2)
    lines = make_lines([[margin, 0.0] for margin in (-5.0, 3.0, 0.1, -0.2, -7.0, 0.0)])
    shown = {line["index"]: line["shown"] for line in lines if "shown" in line}
    assert shown == {4: "mistake", 0: "mistake", 5: "close", 2: "close"}
    assert all(("text" in line) == ("shown" in line) for line in lines)
    assert lines[4]["text"]["responses"] == ["reply 4 0", "reply 4 1"]
    assert (lines[4]["row"], lines[4]["margin"], lines[4]["tokens"]) == (14, -7, [6, 7])
