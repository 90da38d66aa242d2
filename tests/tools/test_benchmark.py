"""Both trainers on the same samples, measured in turns, each in a fresh process."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_cli, write_jsonl
from datasets import Dataset
from rich.console import Console

from rm_recipe.data.dataset import Split
from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.model.lora import add_lora
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.benchmark import benchmark, best_batch, in_turns, print_benchmark, run_worker, summarise
from rm_recipe.tools.benchmark_worker import as_pairs, measure_training, start_alike
from rm_recipe.training.train import load_data, load_model

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
    ("keys", "options", "message"),
    [
        ({}, {"steps": 1}, "--steps of at least 2"),
        ({"per_device_train_batch_size": 64}, {}, "the data has fewer"),
        ({}, {"stock_batch": 3}, "has to divide the effective batch of 8"),
    ],
)
def test_what_cannot_be_compared_is_refused(write_recipe, keys, options, message):
    with pytest.raises(RecipeError, match=message):
        benchmark(read_recipe(write_recipe(**keys)), **{"steps": 2, "repeats": 1, **options})


def test_rankings_are_refused_because_stock_takes_pairs(write_recipe, tmp_path):
    row = {"responses": ["good", "bad", "no"], "ranks": [1, 2, 3]}
    for name in ("train", "test"):
        rows = [row | {"prompt": f"{name} {n}"} for n in range(8)]
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    with pytest.raises(RecipeError, match="benchmark needs pairs"):
        benchmark(read_recipe(write_recipe(dataset_name=str(tmp_path / "data"))), steps=2, repeats=1)


def measured(table):
    """Measurements that take a batch size's comparisons a second from a table; None: out of memory."""

    def training(what, batch, steps):
        found = table["ours" if what == "ours" else batch]
        return found and {"comparisons": found, "seconds": 1.0}

    return training


def test_stocks_best_batch_is_the_fastest_of_those_that_divide_the_effective_one():
    recipe = SimpleNamespace(training=SimpleNamespace(train_batch_size=3, gradient_accumulation_steps=4))
    assert best_batch(recipe, measured({1: 2, 2: 5, 3: 4, 4: None})) == 2


def test_stock_without_enough_memory_is_left_out_and_ours_is_not():
    found = in_turns(measured({None: None, 2: 5, "ours": 9}), 2, steps=2, repeats=3)
    assert [len(found[name]) for name in ("stock", "stock_tuned", "ours")] == [0, 3, 3]
    assert [one["comparisons"] for one in found["stock_tuned"] + found["ours"]] == [5] * 3 + [9] * 3
    with pytest.raises(TrainingError, match="ours"):
        in_turns(measured({None: 1, 2: 5, "ours": None}), 2, steps=2, repeats=3)


def test_a_measurement_that_fails_says_why_unless_it_found_no_memory():
    with pytest.raises(TrainingError, match="no such thing"):
        run_worker([sys.executable, "-c", "raise SystemExit('no such thing')"])
    for end in ("raise SystemExit('CUDA out of memory.')", "import os; os.kill(os.getpid(), 9)"):
        assert not run_worker([sys.executable, "-c", end])
    assert run_worker([sys.executable, "-c", ""])


# --- ratios, and what is said ----------------------------------------------------------------

SCORING = {"plain": [1, 2], "ours": [4, 10], "max_reward_difference": 0.0}


def run(seconds, losses=(1.0, 0.5), memory=8):
    counted = {"comparisons": 10, "tokens": 100, "padding": 25, "flop_per_token": 1}
    return {"seconds": seconds, "losses": list(losses), "peak_memory_bytes": memory, **counted}


def printed(content):
    target = io.StringIO()
    print_benchmark(content | {"setting": {"stock_batch": 2}}, Console(file=target, width=80))
    return target.getvalue()


def test_ratios_are_taken_within_a_repeat_so_that_a_slow_spell_cancels():
    results = {
        "stock": [run(4), run(40), run(4)],
        "stock_tuned": [run(2, memory=4), run(20, memory=4), run(8, memory=4)],
        "ours": [run(1, (1.0, 0.25)), run(10), run(2)],
    }
    content = summarise(results, SCORING)
    assert [content["ratio"][key] for key in RATIOS] == [4, 1, 2, 4.5]
    assert content["max_loss_difference"] == 0.25
    assert content["ours"]["padding_share"] == 0.2
    assert "4.00 times stock TRL's speed" in printed(content)


@pytest.mark.parametrize(("stock", "ratios"), [([], (None, 4)), ([run(8)], (8, 4))])
def test_of_what_ran_out_of_memory_nothing_is_claimed(stock, ratios):
    content = summarise({"stock": stock, "stock_tuned": [run(4)], "ours": [run(1, (1.0, 0.25))]}, None)
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


def test_adapters_start_alike_whatever_was_drawn_before(write_recipe):
    recipe = read_recipe(write_recipe())
    tokenizer = load_data(recipe)[0]
    drawn = []
    for numbers in (0, 3):
        model, modules_to_save = load_model(recipe, tokenizer)
        torch.rand(numbers)
        wrapped = add_lora(model, recipe.model, modules_to_save, autocast=False)
        before = {name: p.clone() for name, p in wrapped.named_parameters()}
        start_alike(wrapped, seed=0)
        changed = [name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])]
        assert changed
        assert all("lora_A" in name for name in changed)
        drawn.append(torch.cat([p.flatten() for name, p in wrapped.named_parameters() if "lora_" in name]))
        after = dict(wrapped.named_parameters())
        spread = [torch.cat([of[name].flatten() for name in changed]).std().item() for of in (before, after)]
        assert spread[1] == pytest.approx(spread[0], rel=0.1)
    assert torch.equal(*drawn)


def test_the_first_step_warms_up_and_prompts_that_stand_once_are_fewer_tokens(write_recipe):
    path = write_recipe(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3)
    stock, ours = (measure_training(read_recipe(path), what) for what in ("stock", "ours"))
    assert stock["comparisons"] == ours["comparisons"] == 2 * 8
    assert np.allclose(stock["losses"], ours["losses"], atol=1e-5)
    assert ours["tokens"] < stock["tokens"]
