"""Both trainers on the same samples, measured in turns, each in a fresh process."""

import json
import sys

import pytest
from conftest import run_cli, write_jsonl

from rm_recipe import benchmark
from rm_recipe.benchmark import OutOfMemoryError, best_batch_size, run_worker, summarise
from rm_recipe.errors import TrainingError

FIGURES = {"comparisons_per_s", "tokens_per_s", "padding_share", "peak_memory_bytes", "losses"}


def test_both_trainers_see_the_same_losses_and_the_file_says_what_was_run(write_recipe, tmp_path):
    recipe = write_recipe(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3)
    result = run_cli("benchmark", str(recipe), "--steps", "3", "--repeats", "1", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "benchmark.json").read_text())
    for name in ("stock", "stock_tuned", "ours"):
        assert content[name].keys() >= FIGURES
        assert len(content[name]["losses"]) == 3
        assert len(content[name]["comparisons_per_s_each"]) == 1
        assert content[name]["comparisons_per_s"] > 0
        assert content[name]["model_flop_utilisation"] is None  # no GPU
    assert content["max_loss_difference"] <= 1e-5
    assert content["stock"]["losses"][0] != content["stock"]["losses"][2]
    assert content["scoring"]["max_reward_difference"] <= 1e-5
    assert content["ratio"].keys() == {
        "comparisons_per_s", "peak_memory", "tuned_comparisons_per_s", "scoring"
    }  # fmt: skip
    # The same real tokens give fewer of them here: the prompt stands there once.
    assert content["ours"]["padding_share"] < content["stock"]["padding_share"]
    assert content["setting"]["recipe"]["per_device_train_batch_size"] == 2
    assert content["stock_tuned"]["per_device_train_batch_size"] in (1, 2, 4)
    assert content["machine"]["versions"]["trl"]
    assert "times stock TRL's speed" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if "written:" not in line) <= 80
    assert not (tmp_path / "run").exists()  # nothing is left of the trainings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "--steps of at least 2"),
        (["--repeats", "0"], "1 --repeats"),
        (["--per_device_train_batch_size", "65"], "the data has fewer"),
        (["--stock-batch", "3"], "has to divide the effective batch of 8"),
    ],
)
def test_what_cannot_be_compared_is_refused(write_recipe, arguments, message):
    result = run_cli("benchmark", str(write_recipe()), *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_rankings_are_refused_because_stock_takes_pairs(write_recipe, tmp_path):
    row = {"prompt": "hello", "responses": ["good", "bad", "no"], "ranks": [1, 2, 3]}
    for name in ("train", "test"):
        rows = [row | {"prompt": f"{name} {n}"} for n in range(8)]
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    result = run_cli("benchmark", str(write_recipe(dataset_name=str(tmp_path / "data"))))
    assert result.returncode == 2
    assert "benchmark needs pairs" in result.stderr


def speeds(table):
    def measure(what, size, steps):
        if table[size] is None:
            raise OutOfMemoryError("not enough memory")
        return {"comparisons": table[size], "seconds": 1.0}

    return measure


@pytest.mark.parametrize(
    ("table", "best", "tried"),
    [
        ({1: 2, 2: 5, 4: 4, 8: 3, 16: 9, 32: 9}, 2, {4, 8, 2, 1}),
        ({1: 1, 2: 1, 4: 1, 8: 3, 16: 4, 32: None}, 16, {4, 8, 16, 32}),
        ({1: 1, 2: 1, 4: 1, 8: 3, 16: None, 32: 9}, 8, {4, 8, 16}),
    ],
)
def test_stocks_best_batch_is_found_without_trying_everything(table, best, tried):
    found, seen = best_batch_size(32, 8, speeds(table))
    assert found == best
    assert set(seen) == tried


def test_ratios_are_taken_within_a_repeat_so_that_a_slow_spell_cancels():
    def run(seconds, losses=(1.0, 0.5)):
        return {
            "comparisons": 10, "seconds": seconds, "tokens": 100, "padding": 25, "losses": list(losses),
            "peak_memory_bytes": 8, "flop_per_token": 1,
        }  # fmt: skip

    results = {
        "stock": [run(4), run(40), run(4)],
        "stock_tuned": [run(2), run(20), run(8)],
        "ours": [run(1, (1.0, 0.25)), run(10), run(2)],
    }
    scoring = {"plain": [1, 2], "ours": [4, 10], "max_reward_difference": 0.0, "comparisons": 3}
    content = summarise(results, scoring)
    assert content["ratio"] == {
        "comparisons_per_s": 4, "peak_memory": 1, "tuned_comparisons_per_s": 2, "scoring": 4.5
    }  # fmt: skip
    assert content["max_loss_difference"] == 0.25
    assert content["first_loss_difference"] == 0
    assert content["ours"]["padding_share"] == 0.2


def test_a_measurement_that_fails_says_why_and_one_that_fills_the_memory_is_ended(monkeypatch):
    with pytest.raises(TrainingError, match="no such thing"):
        run_worker([sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.raises(OutOfMemoryError):
        run_worker([sys.executable, "-c", "raise SystemExit('torch.OutOfMemoryError')"])

    class Full:
        percent = 96.0

    monkeypatch.setattr(benchmark.psutil, "virtual_memory", Full)
    with pytest.raises(OutOfMemoryError):
        run_worker([sys.executable, "-c", "import time; time.sleep(60)"])
