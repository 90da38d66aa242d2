"""Both trainers on the same samples, measured in turns, each in a fresh process."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_cli, write_jsonl
from datasets import Dataset

from rm_recipe.data.dataset import Split
from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.benchmark import benchmark, best_batch, in_turns, print_benchmark, run_worker, summarise
from rm_recipe.tools.benchmark_worker import as_pairs, measure_training

RATIOS = ("comparisons_per_s", "peak_memory", "tuned_comparisons_per_s", "scoring")


def test_both_trainers_see_the_same_losses_and_the_file_says_what_was_run(write_recipe, tmp_path):
    recipe = write_recipe(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3)
    options = ["--steps", "3", "--repeats", "1", "--stock-batch", "4", "--output", str(tmp_path)]
    result = run_cli("benchmark", str(recipe), *options)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "benchmark.json").read_text())
    for name in ("stock", "stock_tuned", "ours"):
        assert len(content[name]["losses"]) == 3
        assert content[name]["comparisons_per_s"] > 0
        assert content[name]["peak_memory_bytes"] > 1e8
    assert content["max_loss_difference"] <= 1e-5
    assert content["stock"]["losses"][0] != content["stock"]["losses"][2]
    assert content["scoring"]["max_reward_difference"] <= 1e-5
    assert all(content["ratio"][key] > 0 for key in RATIOS)
    # The same real tokens give fewer of them here: the prompt stands there once.
    assert content["ours"]["padding_share"] < content["stock"]["padding_share"]
    assert content["setting"]["recipe"]["per_device_train_batch_size"] == 2
    assert content["machine"]["versions"]["trl"]
    assert "times stock TRL's speed" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if "written:" not in line) <= 80
    assert not (tmp_path / "run").exists()  # nothing is left of the trainings


@pytest.mark.parametrize(
    ("keys", "batch", "said"),
    [
        ({"per_device_train_batch_size": 64}, None, "the data has fewer"),
        ({}, 3, "has to divide the effective batch of 8"),
        ({"dataset_name": "rankings"}, None, "benchmark needs pairs"),
    ],
)
def test_what_cannot_be_compared_to_stock_is_refused(write_recipe, tmp_path, monkeypatch, keys, batch, said):
    monkeypatch.chdir(tmp_path)
    row = {"responses": ["good", "bad", "no"], "ranks": [1, 2, 3]}
    for name in ("train", "test"):
        write_jsonl(Path(f"rankings/{name}.jsonl"), [row | {"prompt": f"{name} {n}"} for n in range(16)])
    with pytest.raises(RecipeError, match=said):
        benchmark(read_recipe(write_recipe(**keys)), steps=2, repeats=1, stock_batch=batch)


def measured(table):
    """Measurements that take a batch size's comparisons a second from a table; None: out of memory."""

    def training(what, batch, steps):
        found = table["ours" if what == "ours" else batch]
        return found and {"comparisons_per_s": found}

    return training


def test_stocks_best_batch_is_the_fastest_of_those_that_divide_the_effective_one():
    recipe = SimpleNamespace(training=SimpleNamespace(train_batch_size=3, gradient_accumulation_steps=4))
    assert best_batch(recipe, measured({1: 2, 2: 5, 3: 4, 4: None})) == 2


def test_stock_without_enough_memory_is_left_out_and_ours_is_not():
    found = in_turns(measured({None: None, 2: 5, "ours": 9}), 2, steps=2, repeats=3)
    assert [len(found[name]) for name in ("stock", "stock_tuned", "ours")] == [0, 3, 3]
    assert [one["comparisons_per_s"] for one in found["stock_tuned"] + found["ours"]] == [5] * 3 + [9] * 3
    with pytest.raises(TrainingError, match="ours"):
        in_turns(measured({None: 1, 2: 5, "ours": None}), 2, steps=2, repeats=3)


def test_a_measurement_that_fails_says_why_unless_it_found_no_memory():
    with pytest.raises(TrainingError, match="no such thing"):
        run_worker([sys.executable, "-c", "raise SystemExit('no such thing')"])
    for end in ("raise SystemExit('CUDA out of memory.')", "import os; os.kill(os.getpid(), 9)"):
        assert not run_worker([sys.executable, "-c", end])
    assert run_worker([sys.executable, "-c", ""])


# --- ratios, and what is said ----------------------------------------------------------------

SCORING = {"ratio": 4.5, "max_reward_difference": 0.0}


def run(speed, losses=(1.0, 0.5), memory=8):
    figures = {"comparisons_per_s": speed, "tokens_per_s": 10 * speed, "peak_memory_bytes": memory}
    return {**figures, "padding_share": 0.2, "tflops": 1.0, "losses": list(losses)}


@pytest.fixture
def printed(monkeypatch, capsys):
    """A function: what is printed of figures on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def of(content):
        print_benchmark(content | {"setting": {"stock_batch": 2}})
        return capsys.readouterr().out

    return of


def test_ratios_are_taken_within_a_repeat_so_that_a_slow_spell_cancels(printed):
    results = {
        "stock": [run(20), run(2), run(20)],
        "stock_tuned": [run(40, memory=4), run(4, memory=4), run(10, memory=4)],
        "ours": [run(80, (1.0, 0.25)), run(8), run(40)],
    }
    content = summarise(results, SCORING)
    assert [content["ratio"][key] for key in RATIOS] == [4, 1, 2, 4.5]
    assert content["max_loss_difference"] == 0.25
    assert content["ours"]["comparisons_per_s"] == 40
    assert "4.00 times stock TRL's speed" in printed(content)


@pytest.mark.parametrize(("stock", "ratios"), [([], (None, 4)), ([run(1)], (8, 4))])
def test_of_what_ran_out_of_memory_nothing_is_claimed(stock, ratios, printed):
    content = summarise({"stock": stock, "stock_tuned": [run(2)], "ours": [run(8, (1.0, 0.25))]}, None)
    found = content["ratio"]
    assert (found["comparisons_per_s"], found["tuned_comparisons_per_s"]) == ratios
    assert found["scoring"] is content["scoring"] is None
    assert content["max_loss_difference"] == 0.25
    assert printed(content).count("out of memory") == 1 - len(stock)


# --- one measurement -------------------------------------------------------------------------


def test_stock_gets_whole_conversations_the_better_one_as_chosen():
    rows = [
        {"prefix": [1, 2], "suffixes": [[3], [4, 5]], "ranks": [1, 0], "margins": [0.5]},
        {"prefix": [], "suffixes": [[6], [7]], "ranks": [0, 1], "margins": [1.0]},
    ]
    pairs = as_pairs(Split(Dataset.from_list(rows), rows=2))
    assert pairs[0] == {"chosen_ids": [1, 2, 4, 5], "rejected_ids": [1, 2, 3], "margin": 0.5}
    assert pairs[1] == {"chosen_ids": [6], "rejected_ids": [7], "margin": 1.0}


def test_the_first_step_warms_up_and_prompts_that_stand_once_are_fewer_tokens(write_recipe, monkeypatch):
    monkeypatch.setattr("rm_recipe.tools.benchmark_worker._now", itertools.count().__next__)  # a tick each
    path = write_recipe(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3)
    stock, ours = (measure_training(read_recipe(path), what) for what in ("stock", "ours"))
    assert stock["comparisons_per_s"] == ours["comparisons_per_s"] == 8
    assert ours["tokens_per_s"] < stock["tokens_per_s"]
