"""Predictions are sorted into what is drawn and what is read."""

import re

from rm_recipe.evaluation.report import LONGEST_TEXT, Predictions, by_data_set, examples, pictures

TEXT = {"prompt": [{"role": "user", "content": "Why?"}], "responses": ["Because.", "No."]}


def test_rewards_go_to_chosen_or_rejected_by_rank():
    lines = [
        {"dataset": "a", "rewards": [1.0, -1.0], "ranks": [0, 1], "margin": 2.0},
        {"dataset": "a", "rewards": [3.0, 2.0, 0.5], "ranks": [0, 0, 1], "margin": 2.0},
        {"dataset": "b", "rewards": [None, 0.5], "ranks": [0, 1], "margin": None},
    ]
    found = by_data_set(lines)
    assert (found["a"].chosen, found["a"].rejected) == ([1.0, 3.0, 2.0], [-1.0, 0.5])
    assert found["a"].margins == [2.0, 2.0]
    assert (found["b"].chosen, found["b"].rejected, found["b"].margins) == ([], [0.5], [])
    assert by_data_set([]) == {}


def test_only_lines_with_text_are_read_and_ten_of_a_kind():
    lines = [{"dataset": "a", "shown": "mistake", "text": TEXT, "margin": -1.0}] * 12
    lines += [{"dataset": "a", "shown": "close"}, {"dataset": "a", "shown": "other", "text": TEXT}]
    found = by_data_set(lines)
    assert {kind: len(kept) for kind, kept in found["a"].shown.items()} == {"mistake": 10, "close": 0}


def test_the_surest_mistakes_and_the_closest_calls_come_first():
    lines = [{"margin": margin, "text": TEXT} for margin in (-1.0, None, -3.0, 0.5)]
    surest = [example["title"].removeprefix("margin ") for example in examples(lines, "mistake")]
    closest = [example["title"].removeprefix("margin ") for example in examples(lines, "close")]
    minus, dash = "\N{MINUS SIGN}", "\N{EN DASH}"
    assert surest == [f"{minus}3.000", f"{minus}1.000", "+0.500", dash]
    assert closest == ["+0.500", f"{minus}1.000", f"{minus}3.000", dash]


def test_an_example_marks_what_was_chosen_and_what_the_model_prefers():
    line = {"row": 17, "subset": "chat", "turns": 3, "rewards": [-1.0, 2.0], "ranks": [0, 1], "text": TEXT,
            "response_tokens": [20, 31], "margin": -3.0}  # fmt: skip
    (example,) = examples([line], "mistake")
    assert example["where"] == "row 17, subset chat, 3 turns"
    assert example["prompt"] == [{"role": "user", "content": "Why?"}]
    chosen, rejected = example["responses"]
    assert (chosen["verdict"], chosen["chosen"], chosen["preferred"]) == ("chosen", True, False)
    assert (rejected["verdict"], rejected["chosen"], rejected["preferred"]) == ("rejected", False, True)
    assert (rejected["reward"], rejected["tokens"], rejected["content"]) == ("reward +2.000", "31", "No.")


def test_neither_of_two_equal_rewards_is_preferred_and_ranks_beyond_two_are_told():
    text = {"prompt": "Why?", "responses": ["a", "b", "c"]}
    (example,) = examples([{"rewards": [1.0, 1.0, 0.0], "ranks": [0, 1, 2], "text": text}], "close")
    assert [response["verdict"] for response in example["responses"]] == ["chosen", "rank 2", "rank 3"]
    assert not any(response["preferred"] for response in example["responses"])
    assert example["prompt"] == [{"role": "prompt", "content": "Why?"}]


def test_an_example_of_odd_shape_is_shown_as_far_as_it_goes():
    text = {"prompt": [{"role": None, "content": [{"type": "text"}]}, 3], "responses": ["x" * 30_000, None]}
    (example,) = examples([{"text": text, "rewards": "no"}], "mistake")
    assert example["prompt"] == [{"role": "?", "content": '[{"type": "text"}]'}]
    assert [response["verdict"] for response in example["responses"]] == ["response", "response"]
    assert example["responses"][0]["content"].endswith("[and 10,000 more characters]")
    assert len(example["responses"][0]["content"]) < LONGEST_TEXT + 100


def test_pictures_are_made_of_what_there_is():
    bins = [{"confidence": 0.6, "accuracy": 0.5, "n": 10}, {"confidence": None, "accuracy": 0.5, "n": 10}]
    part = {"label": "1 to 5", "n": 5, "accuracy": 0.6, "accuracy_ci95": [0.5, 0.7]}
    figures = {
        "calibration": {"ece": 0.1, "bins": bins, "temperature": 1.4, "ece_after": 0.02, "loss_after": 0.5},
        "by": {"length_difference": [part, {**part, "accuracy": None}]},
    }
    own = Predictions(chosen=[1.0], rejected=[0.0], margins=[1.0, -1.0, 0.0])
    made = {picture.title: picture for picture in pictures(figures, own, "set-1")}
    assert list(made) == ["Rewards", "Margins", "Calibration", "Accuracy by length difference"]
    assert "1 of 3 comparisons lie left of 0" in made["Margins"].note
    assert "divided by 1.40 (temperature): the model is too sure" in made["Calibration"].note
    assert "error 0.020, loss 0.500 (cross-validated)" in made["Calibration"].note
    ids = [ident for picture in made.values() for ident in re.findall(r'\bid="([^"]*)"', picture.svg)]
    assert len(ids) == len(set(ids))
    assert pictures({}, Predictions(), "set-1") == []
