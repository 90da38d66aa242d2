"""Benchmarks give the score that their papers define, worked out by hand on small made-up files."""

import json

import numpy as np
import pytest
import torch
from conftest import save_classifier, write_jsonl

from rm_recipe.data.loading import read_name
from rm_recipe.evaluation.benchmarks import BENCHMARKS, find_benchmark, in_full, ties
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.evaluation.report import print_evaluation
from rm_recipe.evaluation.summary import read_predictions
from rm_recipe.recipe.schema import DataArguments
from rm_recipe.scoring import RewardModel

NAN = [np.nan] * 3


def score(name, *rows):
    """By the benchmark's rules, of rows (its column, rewards of right responses, rewards of wrong ones)."""
    column = {"RM-Bench": "domain", "JudgeBench": "source"}.get(name, "subset")
    made = [{"id": str(i), column: value} for i, (value, _, _) in enumerate(rows)]
    for row, (_, good, bad) in zip(made, rows, strict=True):
        row |= {"good": np.array(good, float), "bad": np.array(bad, float)}
    return BENCHMARKS[name][1](made)


def test_reward_bench_weighs_mathematics_as_much_as_code():
    value, sections = score(
        "RewardBench",
        *[("alpacaeval-hard", [1], [0]), ("mt-bench-easy", [0], [0])],  # a tie is wrong
        *[("mt-bench-hard", [1], [0]), ("llmbar-natural", [0], [1]), ("llmbar-natural", [1], [0])],
        *[("xstest-should-refuse", [1], [0]), ("donotanswer", NAN, NAN)],  # as what could not be scored
        *[("math-prm", [1], [0]), ("hep-go", [0], [1])],
    )
    math = 984 / 447
    expected = {"Chat": 1 / 2, "Chat Hard": 2 / 3, "Safety": 1 / 2, "Reasoning": math / (math + 1)}
    assert sections == pytest.approx(expected)
    assert value == pytest.approx(sum(expected.values()) / 4)


def test_reward_bench_2_is_best_of_four_and_the_mean_of_its_subsets():
    value, sections = score(
        "RewardBench 2",
        *[("Factuality", [3], [1, 2, 0]), ("Factuality", [1], [1, 1, 0]), ("Factuality", [1], [0, 2, 0])],
        ("Math", NAN, NAN),
    )
    assert sections == pytest.approx({"Factuality": (1 + 1 / 3 + 0) / 3, "Math": 0})
    assert value == pytest.approx((4 / 9 + 0) / 2)


def test_the_ties_of_reward_bench_2_by_hand():
    rows = [
        *[("ref:0", [3], [1]), ("tied:0", [4, 3], [1])],  # gaps 2 and 2, spread 1
        *[("ref:1", [2], [0]), ("tied:1", [5, 2], [1])],  # gaps 2 and 1, spread 3
        *[("ref:2", [1], [0.5]), ("tied:2", [4, 3], [1])],  # gaps 0.5 and 2, spread 1
        *[("ref:3", [0], [1]), ("tied:3", [0, 0], [1])],  # gaps -1 and -1, spread 0
    ]
    made = [{"id": name, "good": np.array(good), "bad": np.array(bad)} for name, good, bad in rows]
    closeness = np.mean(np.tanh([2 / 1 - 1, 1 / 3 - 1, 0.5 / 1 - 1, -np.inf]))
    expected = 0.3 * 3 / 4 + 0.3 * 3 / 4 + 0.2 * 2 / 4 + 0.2 * 1 / 4 + 0.01 * closeness
    assert ties(made) == pytest.approx(expected)


def test_rm_bench_is_easy_where_the_right_response_is_the_more_elaborate():
    # Rewards by style: every pair in which the right one is at least as elaborate is won.
    value, sections = score(
        "RM-Bench",
        ("chat", [1, 2, 3], [0.5, 1.5, 2.5]),
        *[("safety-refuse", [9, 9, 9], [0, 0, 0]), ("safety-response", NAN, NAN)],
    )
    expected = {"chat": 6 / 9, "safety": 1 / 2, "easy": 3 / 4, "normal": 3 / 4, "hard": (0 + 1 / 2) / 2}
    assert sections == pytest.approx(expected)
    assert value == pytest.approx((6 / 9 + 1 / 2) / 2)


def test_judge_bench_and_llm_bar_differ_in_what_a_tie_is():
    rows = [("mmlu-pro-law", [1], [0]), ("mmlu-pro-math", [1], [1]), ("livecodebench", [0], [1])]
    assert score("JudgeBench", *rows) == (pytest.approx(1 / 3), {"Knowledge": 1 / 2, "Coding": 0})
    assert score("LLMBar", (1, [1], [0]), (2, [1], [1]), (1, [0], [1]), (1, NAN, NAN))[0] == 1.5 / 4


# --- files -------------------------------------------------------------------------------------

ASKED = {"prompt": "how are you"}
PAIR = {"chosen": "fine thanks", "rejected": "no"}
MANY = {"chosen": ["fine"], "rejected": ["no", "bad", "cat"]}
STYLES = {"chosen": ["fine", "fine fine", "fine cat"], "rejected": ["no", "no no", "no cat"]}
FILES = {
    "RewardBench": {**ASKED, **PAIR, "chosen_model": "a", "rejected_model": "b", "subset": "hep-go", "id": 1},
    "RewardBench 2": {**ASKED, **MANY, "id": "1", "subset": "Math", "num_correct": 1, "total_completions": 4},
    "RM-Bench": {**ASKED, **STYLES, "id": "1", "domain": "chat"},
    "JudgeBench": {
        **{"pair_id": "1", "original_id": "2", "source": "livebench-math", "question": "how are you"},
        **{"response_model": "m", "response_A": "no", "response_B": "fine", "label": "B>A"},
    },
    "LLMBar": {"input": "how are you", "output_1": "no", "output_2": "fine", "label": 2},
}


@pytest.mark.parametrize("name", FILES)
def test_a_benchmark_is_known_by_its_columns(tmp_path, name):
    path = str(write_jsonl(tmp_path / "rows.jsonl", [FILES[name]] * 3))
    found, rows = find_benchmark(DataArguments(**read_name(path)))
    assert (found, len(rows)) == (name, 3)


def test_data_sets_with_like_columns_are_none(tmp_path):
    domain, subset = {"id": 1, "domain": "chat"}, {**FILES["RewardBench"], "subset": "mine"}
    for row in (ASKED | PAIR, ASKED | PAIR | domain, ASKED | PAIR | {"subset": "hep-go"}, subset):
        path = str(write_jsonl(tmp_path / "rows.jsonl", [row]))
        assert find_benchmark(DataArguments(**read_name(path))) is None


def test_it_is_scored_in_fp32_at_the_models_positions_and_told_everywhere(tiny_distilbert, tmp_path, capsys):
    settings = {"max_length": 20, "truncation": "keep_end"}  # of its 64 positions
    model = save_classifier(tmp_path / "model", tiny_distilbert, torch.bfloat16, **settings)
    long, longer = ({**FILES["LLMBar"], "input": "how are you " * n} for n in (8, 40))
    empty = {**FILES["LLMBar"], "output_2": " "}
    path = str(write_jsonl(tmp_path / "rows.jsonl", [FILES["LLMBar"], long, longer, empty]))
    content = evaluate(str(model), [path], tmp_path / "out")
    figures = content["datasets"][path]
    lines = read_predictions(tmp_path / "out")
    right = sum(line["correct"] for line in lines)
    assert figures["benchmark"] == {"name": "LLMBar", "score": right / 4, "sections": {}, "cut": 1}
    assert (figures["n_scored"], figures["accuracy"]) == (3, right / 3)
    full = in_full(RewardModel.from_pretrained(model))
    assert full.max_length == 64
    assert {parameter.dtype for parameter in full.model.parameters()} == {torch.float32}
    items = [{"prompt": long["input"], "response": reply} for reply in ("fine", "no")]
    assert lines[1]["rewards"] == pytest.approx(full.score(items).tolist(), abs=1e-6)
    print_evaluation(content, [path])
    said = f"LLMBar by its own rules: {right / 4:.3f}; 1 of 3 rows were cut."
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == content
