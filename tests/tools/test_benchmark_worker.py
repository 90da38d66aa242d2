"""What one process measures: the timed steps, their real tokens, and equal starts."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from rm_recipe.data.dataset import Split
from rm_recipe.model.lora import add_lora
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.benchmark_worker import as_pairs, measure_scoring, measure_training, start_alike
from rm_recipe.training.train import load_data, load_model


def test_stock_gets_whole_conversations_the_better_one_as_chosen():
    rows = [
        {"prefix": [1, 2], "rests": [[3], [4, 5]], "ranks": [1, 0], "margins": [0.5]},
        {"prefix": [], "rests": [[6], [7]], "ranks": [0, 1], "margins": [1.0]},
    ]
    pairs = as_pairs(Split(Dataset.from_list(rows), rows=2))
    assert pairs[0] == {"chosen_ids": [1, 2, 4, 5], "rejected_ids": [1, 2, 3], "margin": 0.5}
    assert pairs[1] == {"chosen_ids": [6], "rejected_ids": [7], "margin": 1.0}


def test_adapters_start_alike_whatever_was_drawn_before(write_recipe):
    recipe = read_recipe(write_recipe())
    tokenizer = load_data(recipe)[0]
    drawn = []
    for numbers in (0, 3):
        model, new_modules = load_model(recipe, tokenizer)
        torch.rand(numbers)
        wrapped = add_lora(model, recipe.model, new_modules, autocast=False)
        before = {name: p.clone() for name, p in wrapped.named_parameters()}
        start_alike(wrapped, seed=0)
        changed = [name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])]
        assert changed
        assert all("lora_A" in name for name in changed)
        drawn.append(torch.cat([p.flatten() for name, p in wrapped.named_parameters() if "lora_" in name]))
        spread = [
            torch.cat([all_of[name].flatten() for name in changed]).std().item()
            for all_of in (before, dict(wrapped.named_parameters()))
        ]
        assert spread[1] == pytest.approx(spread[0], rel=0.1)
    assert torch.equal(*drawn)


def test_both_trainers_are_measured_on_the_same_comparisons_without_the_first_step(write_recipe):
    path = write_recipe(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3)
    stock, ours = (measure_training(read_recipe(path), what) for what in ("stock", "ours"))
    for result in (stock, ours):
        assert result["comparisons"] == 2 * 8
        assert len(result["losses"]) == 3
        assert result["seconds"] > 0
        assert result["peak_memory_bytes"] > 1e8
    assert np.allclose(stock["losses"], ours["losses"], atol=1e-5)
    recipe = read_recipe(path)
    split = load_data(recipe)[1]
    whole = [len(c.prefix) + len(rest) for c in split.encoded() for rest in c.rests]
    assert 2 * 16 * min(whole) <= stock["tokens"] <= 2 * 16 * max(whole)
    assert ours["tokens"] < stock["tokens"]  # the prompts stand there once
    assert ours["padding"] < stock["padding"]
    alone = measure_training(read_recipe(path, ["--max_steps", "1"]), "ours")
    assert alone["comparisons"] == 8  # a single step is timed all the same


def test_scoring_is_measured_in_turns_on_equal_rewards(write_recipe):
    result = measure_scoring(read_recipe(write_recipe()), repeats=2)
    assert len(result["plain"]) == len(result["ours"]) == 2
    assert result["max_reward_difference"] <= 1e-5
    assert result["comparisons"] == 40
