"""The figures of a data set, worked out by hand from its lines; the lines, and which of them are shown."""

import json

import numpy as np
import pytest
from datasets import Dataset

from rm_recipe.data.dataset import Split
from rm_recipe.evaluation import summary
from rm_recipe.evaluation.summary import predictions, summarise


def make_lines(rewards, lengths=None, ranks=None, subsets=None):
    """The lines of comparisons with these rewards; the K-th reply has K tokens unless said otherwise."""
    lengths = lengths or [[1 + k for k in range(len(own))] for own in rewards]
    ranks = ranks or [list(range(len(own))) for own in rewards]
    rows = [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "responses": [f"reply {i} {k}" for k in range(len(own))],
            **{"ranks": ranks[i], "margins": [], "subset": subsets[i] if subsets else "", "row": 10 + i},
            **{"prefix": [1] * (i + 1), "suffixes": [[2] * n for n in lengths[i]]},
        }
        for i, own in enumerate(rewards)
    ]
    split = Split(Dataset.from_list(rows), len(rows))
    return predictions("x", split, [np.array(own, np.float32) for own in rewards])


def test_length_figures_by_hand():
    rewards, lengths = [[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]], [[5, 2], [1, 4], [3, 3]]
    figures = summarise(make_lines(rewards, lengths, subsets=["a", "b", "a"]))
    assert figures["baselines"] == {"longer_wins": 0.5, "shorter_wins": 0.5}
    assert figures["length"]["accuracy_chosen_longer"] == 1
    assert figures["length"]["accuracy_chosen_shorter"] == 0
    assert figures["length"]["spearman_margin"] == pytest.approx(np.sqrt(3) / 2)  # ranks 3 1 2, 2.5 1 2.5
    assert figures["subsets"]["a"]["accuracy"] == 1
    assert figures["subsets"]["b"]["n"] == 1
    assert [row["label"] for row in figures["by"]["length_difference"]] == ["-3", "0", "3"]


def test_where_there_is_no_correlation_or_no_certainty_the_figures_say_none():
    ties, alone = summarise(make_lines([[0.0, 0.0]] * 60)), summarise(make_lines([[1.0, 0.0]]))
    assert (ties["accuracy"], ties["ties"], ties["length"]["spearman"]) == (0.5, 60, None)
    assert (alone["accuracy"], alone["ranking"]) == (1, None)
    assert alone["against_baselines"]["longer_wins"]["ci95"] is None
    for figures in (ties, alone):
        assert figures["beats_baselines"] is False
        json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize(("n_right", "beats"), [(95, True), (70, False), (20, False)])
def test_a_model_beats_the_baselines_where_it_surely_beats_the_best_of_them(n_right, beats):
    """The longer response is chosen in 65 of 100; whether the model agrees is unrelated to that."""
    rng = np.random.default_rng(0)
    right, longer = rng.permutation(100) < n_right, rng.permutation(100) < 65
    rewards = [[1.0, 0.0] if own else [0.0, 1.0] for own in right]
    figures = summarise(make_lines(rewards, [[9, 2] if own else [2, 9] for own in longer]))
    difference = figures["against_baselines"]["longer_wins"]
    assert figures["beats_baselines"] is beats
    assert difference["difference"] == pytest.approx(n_right / 100 - 0.65)
    assert (difference["ci95"][0] > 0) is beats


def test_the_worst_mistakes_and_the_closest_of_the_others_are_shown_with_their_texts(monkeypatch):
    monkeypatch.setattr(summary, "SHOWN", 2)
    lines = make_lines([[margin, 0.0] for margin in (-5.0, 3.0, 0.1, -0.2, -7.0, 0.0)])
    shown = {line["index"]: line["shown"] for line in lines if "shown" in line}
    assert shown == {4: "mistake", 0: "mistake", 5: "close", 2: "close"}
    assert all(("text" in line) == ("shown" in line) for line in lines)
    assert lines[4]["text"]["responses"] == ["reply 4 0", "reply 4 1"]
    assert (lines[4]["row"], lines[4]["margin"], lines[4]["tokens"]) == (14, -7, [6, 7])
