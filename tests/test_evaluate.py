"""Accuracy that can be believed: every comparison counted, and reproduced by plain transformers."""

import json

import numpy as np
import pytest
import torch
from conftest import make_rows, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe.batching import Encoded
from rm_recipe.errors import RecipeError
from rm_recipe.evaluate import HELD_OUT, evaluate, gate, print_evaluation, summarise
from rm_recipe.export import export
from rm_recipe.recipe import read_recipe
from rm_recipe.train import train


@pytest.fixture
def run(write_recipe, tmp_path):
    train(read_recipe(write_recipe(num_train_epochs=1, learning_rate=1e-3, gate_statistic="accuracy")))
    return tmp_path / "run"


def test_the_figures_have_the_contracts_keys(run):
    content = evaluate(str(run))
    assert content.keys() == {"model", "recipe", "datasets", "gate"}
    figures = content["datasets"][HELD_OUT]
    assert figures.keys() >= {
        "n_comparisons", "n_scored", "excluded", "accuracy", "accuracy_ci95", "ties", "loss",
        "mean_margin", "baselines", "calibration", "length", "subsets",
    }  # fmt: skip
    assert figures["n_comparisons"] == figures["n_scored"] + sum(figures["excluded"].values()) == 40
    assert content["gate"] == {
        "target": 0.65, "statistic": "accuracy", "value": figures["accuracy"],
        "passed": figures["accuracy"] >= 0.65,
    }  # fmt: skip
    assert json.loads((run / "evaluation.json").read_text()) == content


def test_ten_lines_of_plain_transformers_give_the_same_accuracy(run, tiny_data):
    figures = evaluate(str(run))["datasets"][HELD_OUT]
    export(run)
    model = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    rewards = []
    for row in map(json.loads, (tiny_data / "test.jsonl").open()):
        for side in ("chosen", "rejected"):
            messages = [*row["prompt"], {"role": "assistant", "content": row[side]}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
            with torch.no_grad():
                rewards.append(model(input_ids=ids).logits.item())
    margins = np.subtract(*np.array(rewards).reshape(-1, 2).T)
    assert figures["accuracy"] == np.mean((np.sign(margins) + 1) / 2)
    assert figures["mean_margin"] == pytest.approx(margins.mean(), abs=1e-5)


def test_another_data_set_is_added_and_the_held_out_figures_stay(run, tmp_path):
    evaluate(str(run))
    rows = make_rows(4, seed=9)
    rows[0]["chosen"] = ""
    path = str(write_jsonl(tmp_path / "other.jsonl", rows))
    content = evaluate(str(run), [path])
    assert set(content["datasets"]) == {HELD_OUT, path}
    assert content["datasets"][path]["excluded"] == {"empty_response": 1}
    lines = [json.loads(line) for line in (run / "predictions.jsonl").open()]
    assert [line["dataset"] for line in lines] == [HELD_OUT] * 40 + [path] * 3
    for line in lines:
        assert line["margin"] == pytest.approx(line["rewards"][0] - line["rewards"][1])
        assert line["correct"] == (line["margin"] > 0)


def test_raw_hh_rlhf_transcripts_are_recognised(run, tmp_path):
    row = {side: f"\n\nHuman: hello\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    path = str(write_jsonl(tmp_path / "hh.jsonl", [row]))
    assert evaluate(str(run), [path])["datasets"][path]["n_scored"] == 1


def test_an_export_can_be_evaluated_where_it_lies(run, tiny_data, tmp_path):
    export(run)
    content = evaluate(str(run / "export"), [str(tiny_data / "test.jsonl")], tmp_path / "out")
    assert (tmp_path / "out" / "evaluation.json").is_file()
    expected = evaluate(str(run))["datasets"][HELD_OUT]["accuracy"]
    assert content["datasets"][str(tiny_data / "test.jsonl")]["accuracy"] == expected


def test_a_model_without_a_recipe_needs_a_data_set(tiny_llama):
    with pytest.raises(RecipeError, match="no held-out split; name one with --dataset"):
        evaluate(str(tiny_llama))


def encoded(*lengths: tuple[int, int]) -> list[Encoded]:
    return [Encoded([1], [[2] * a, [3] * b]) for a, b in lengths]


def test_length_figures_by_hand():
    rewards = [np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([2.0, 1.0])]
    figures = summarise(rewards, encoded((5, 2), (1, 4), (3, 3)), ["a", "b", "a"], [[0, 1]] * 3)
    assert figures["baselines"] == {"longer_wins": 0.5, "shorter_wins": 0.5}
    assert figures["length"]["accuracy_chosen_longer"] == 1
    assert figures["length"]["accuracy_chosen_shorter"] == 0
    assert figures["subsets"]["a"]["accuracy"] == 1
    assert figures["subsets"]["b"]["n"] == 1


def test_all_ties_are_half_right_and_have_no_rank_correlation():
    figures = summarise([np.zeros(2)] * 3, encoded((1, 2), (2, 1), (1, 1)), ["", "", ""], [[0, 1]] * 3)
    assert (figures["accuracy"], figures["ties"]) == (0.5, 3)
    assert figures["length"]["spearman"] is None
    json.dumps(figures, allow_nan=False)


def test_in_a_ranking_each_untied_pair_weighs_the_same_and_each_comparison_one():
    """Three pairs, two of them right, beside one pair that is wrong: 1/3, not 2/4."""
    rewards = [np.array([3.0, 1.0, 2.0]), np.array([0.0, 1.0])]
    comparisons = [Encoded([1], [[2] * 5, [3] * 2, [4]]), Encoded([1], [[2], [3] * 4])]
    figures = summarise(rewards, comparisons, ["", ""], [[0, 1, 2], [0, 1]])
    assert figures["accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert figures["mean_margin"] == pytest.approx(((2 + 1 - 1) / 3 - 1) / 2)
    assert figures["baselines"]["longer_wins"] == pytest.approx((1 + 0) / 2)
    tied = summarise([np.array([3.0, 1.0, 2.0])], comparisons[:1], [""], [[0, 1, 1]])
    assert tied["accuracy"] == 1  # the two last are tied and give no pair


def test_rankings_are_evaluated_and_told_in_the_predictions(run, tmp_path):
    rows = [
        {"prompt": f"hello {n}", "responses": ["bad bad", "good good", "bad bad cat"], "ranks": [2, 1, 2]}
        for n in range(4)
    ]
    path = str(write_jsonl(tmp_path / "rankings.jsonl", rows))
    figures = evaluate(str(run), [path])["datasets"][path]
    assert figures["n_scored"] == 4
    lines = [json.loads(line) for line in (run / "predictions.jsonl").open()]
    assert [line["ranks"] for line in lines] == [[0, 1, 1]] * 4
    for line in lines:
        best, *others = line["rewards"]
        assert line["correct"] == np.mean([best > other for other in others])
        assert line["margin"] == pytest.approx(best - np.mean(others), abs=1e-6)
    assert figures["accuracy"] == pytest.approx(np.mean([line["correct"] for line in lines]))


@pytest.mark.parametrize(("statistic", "passed"), [("accuracy", True), ("ci_low", False)])
def test_the_gate_reads_the_intervals_lower_end_by_default(write_recipe, statistic, passed):
    recipe = read_recipe(write_recipe(target_accuracy=0.7, gate_statistic=statistic))
    figures = {"accuracy": 0.72, "accuracy_ci95": [0.66, 0.77]}
    assert gate(figures, recipe)["passed"] is passed
    assert read_recipe(write_recipe(gate_statistic="omit")).data.gate_statistic == "ci_low"


def test_the_table_fits_a_terminal_of_80_columns(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_evaluation(evaluate(str(run)), [HELD_OUT])
    printed = capsys.readouterr().out
    assert "Target 0.65" in printed
    assert max(map(len, printed.splitlines())) <= 80
