"""`run.json` can always be written, and says how fast and how large a run was."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

import rm_recipe.training.train
from rm_recipe.data.splits import Split
from rm_recipe.model.memory import peak_memory
from rm_recipe.model.shared_prefix import Sharing
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import run_record


def record(log: list[dict[str, float]]) -> dict:
    split = Split(Dataset.from_dict({"prefix": [[1]] * 10}), 12, {"empty_response": 2})
    training = SimpleNamespace(
        seed=3, device="cpu", world_size=2, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    state = SimpleNamespace(global_step=2, epoch=1.6, log_history=log)
    trainer = SimpleNamespace(state=state, _total_train_tokens=500)
    recipe = SimpleNamespace(training=training)
    cost = {"train_seconds": 4.0, "peak_memory_bytes": 10**9}
    return run_record(recipe, trainer, Sharing(True, "equal", 1e-7), split, split, cost)


def test_speed_counts_comparisons_over_all_processes():
    found = record([{"loss": 0.7}, {"loss": 0.5}, {"train_runtime": 4.0}])
    assert found["comparisons_per_s"] == 16 / 4  # 2 steps of 2 x 2 on 2 processes
    assert found["tokens_per_s"] == 500 / 4
    assert found["final_loss"] == 0.5
    assert (found["train_seconds"], found["peak_memory_bytes"]) == (4.0, 10**9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_norm_that_overflowed_does_not_lose_the_record(value):
    found = record([{"loss": 0.7, "grad_norm": value}])
    assert json.loads(json.dumps(found, allow_nan=False))["log"] == [{"loss": 0.7, "grad_norm": None}]


@pytest.mark.skipif(
    torch.cuda.is_available() or not Path("/proc/self/clear_refs").exists(),
    reason="resident memory's peak can be reset on Linux alone",
)
def test_peak_memory_is_of_the_training_not_of_the_preflight(write_recipe, tmp_path, monkeypatch):
    before = []

    def preflight(*_):
        taken = b"x" * 2**29
        before.append(peak_memory() * bool(taken))

    monkeypatch.setattr(rm_recipe.training.train, "preflight", preflight)
    rm_recipe.training.train.train(read_recipe(write_recipe(max_steps=1)))
    found = json.loads((tmp_path / "run" / "run.json").read_text())["peak_memory_bytes"]
    assert 1e8 < found < before[0] - 2**28
