"""What an evaluation's figures are worth."""

import pytest
from test_evaluation_table import FIGURES

from rm_recipe.evaluation.findings import best_baseline, gate, gate_words, readings
from rm_recipe.recipe.reader import read_recipe


@pytest.mark.parametrize(("statistic", "passed"), [("accuracy", True), ("ci_low", False)])
def test_the_gate_reads_the_intervals_lower_end_by_default(write_recipe, statistic, passed):
    recipe = read_recipe(write_recipe(target_accuracy=0.7, gate_statistic=statistic))
    figures = {"accuracy": 0.72, "accuracy_ci95": [0.66, 0.77]}
    assert gate(figures, recipe)["passed"] is passed
    assert read_recipe(write_recipe(gate_statistic="omit")).data.gate_statistic == "ci_low"


def test_the_gates_words_name_target_statistic_and_value():
    result = {"target": 0.65, "statistic": "accuracy", "value": 0.6123, "passed": False}
    assert gate_words(result) == {
        "passed": False,
        "verdict": "Target 0.65 not reached",
        "why": "the accuracy is 0.612",
    }
    assert gate_words(result | {"passed": True})["verdict"] == "Target 0.65 reached"
    assert gate_words({}) is gate_words(None) is None


def test_the_best_baseline_is_the_most_accurate():
    assert best_baseline(FIGURES) == ("bag_of_words", 0.61)
    assert best_baseline({"baselines": {"longer_wins": 0.5, "bag_of_words": None}}) == ("longer_wins", 0.5)
    assert best_baseline({}) is None


def kinds(figures):
    return [kind for kind, _ in readings(figures)]


def test_a_loss_of_chance_ties_and_reversed_answers_are_warned_of():
    assert kinds({"loss": 0.6931}) == kinds({"loss": 0.9}) == ["bad"]
    assert kinds({"loss": 0.6}) == []
    assert "about ln 2" in readings({"loss": 0.6931})[0][1]
    assert kinds({"ties": 6, "n_scored": 100}) == ["bad"]
    assert kinds({"ties": 5, "n_scored": 100}) == []
    assert kinds({"ties": 6, "n_scored": 100, "ranking": {"pairs": 1000}}) == []
    assert kinds({"accuracy": 0.3, "accuracy_ci95": [0.2, 0.4]}) == ["bad"]
    assert kinds({"accuracy": 0.99, "accuracy_ci95": [0.98, 1.0]}) == []


def test_the_best_baseline_is_named_where_nothing_says_whether_it_is_beaten():
    [(kind, sentence)] = readings({"baselines": {"longer_wins": 0.4, "shorter_wins": 0.6}})
    assert kind == "plain"
    assert "the shorter response wins" in sentence


def test_a_model_that_beats_no_baseline_is_told_so_and_one_that_does_too():
    lead = {"difference": -0.02, "ci95": [-0.05, 0.01]}
    figures = {"baselines": {"bag_of_words": 0.61}, "against_baselines": {"bag_of_words": lead}}
    [(kind, sentence)] = readings(figures | {"beats_baselines": False})
    assert kind == "bad"
    assert "has learnt little that the rule 'bag of words' does not know" in sentence
    assert "0.020 behind (95 % interval \u22120.050 to +0.010)" in sentence
    assert kinds(figures | {"beats_baselines": True}) == ["good"]


def test_what_was_trained_on_is_no_held_out_accuracy():
    [(kind, sentence)] = readings({"trained_prompts": 3, "n_scored": 990})
    assert kind == "bad"
    assert "3 of 990 comparisons have a prompt that was trained on" in sentence
    assert readings({"trained_prompts": 0, "n_scored": 990}) == []


def test_an_edit_that_makes_many_rejected_responses_win_is_named():
    edits = {"thank_you": {"wins": 0.02}, "repeated_sentence": {"wins": 0.32}}
    [(kind, sentence)] = readings({"consistency": edits})
    assert kind == "bad"
    assert "With its last sentence repeated a rejected response overtakes the chosen one in 32" in sentence


def test_another_model_is_compared_in_one_sentence():
    other = {
        "model": "other", "n": 980, "other_accuracy": 0.68, "difference": 0.02, "ci95": [-0.01, 0.05],
        "p_value": 0.2134,
    }  # fmt: skip
    [(kind, sentence)] = readings({"against": other})
    assert kind == "plain"
    for part in ("other has accuracy 0.680 on the 980", "+0.020 (\u22120.010 to +0.050)", "p 0.213."):
        assert part in sentence
    assert "(" not in readings({"against": other | {"ci95": None}})[0][1]
