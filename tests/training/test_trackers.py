"""A tracker that a recipe asks for gets what was learnt, step by step, offline."""

import json
import sqlite3

import pytest
from conftest import logged, run_cli

from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train

KEYS = {"logging_steps": 4, "eval_strategy": "epoch"}
# As trackers name them, and as the run's own log does.
ENDS = ("accuracy_ci95_low", "accuracy_ci95_high")
SENT = {f"train/{key}": key for key in ("loss", "accuracy", "margin", "learning_rate")}
SENT |= {f"eval/{key}": f"eval_{key}" for key in ("loss", "accuracy", "margin", "ties", *ENDS)}


def test_held_out_accuracy_is_logged_with_the_interval_of_an_evaluation(write_recipe, tmp_path):
    train(read_recipe(write_recipe(**KEYS)))
    run = tmp_path / "run"
    figures = evaluate(str(run))["datasets"]["held_out"]
    assert logged(run, "eval_accuracy")[-1] == pytest.approx(figures["accuracy"])
    assert [logged(run, f"eval_{end}")[-1] for end in ENDS] == pytest.approx(figures["accuracy_ci95"])
    assert all(len(logged(run, f"eval_{end}")) == 2 for end in ENDS)  # one for each epoch
    assert not logged(run, ENDS[0])  # a step of training has too few for one


def test_tensorboard_gets_the_figures_of_training_and_of_evaluation(write_recipe, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    train(read_recipe(write_recipe(**KEYS, report_to="tensorboard")))
    [events] = (tmp_path / "run" / "runs").iterdir()
    arrived = accumulator.EventAccumulator(str(events)).Reload()
    for name, key in SENT.items():
        values = [event.value for event in arrived.Scalars(name)]
        assert values == pytest.approx(logged(tmp_path / "run", key)), name
    assert [event.step for event in arrived.Scalars("train/loss")] == [4, 8, 12, 16]


def test_trackio_gets_them_too(write_recipe, tmp_path):
    pytest.importorskip("trackio")
    recipe = write_recipe(**KEYS, report_to="trackio", project="rewards", run_name="first")
    result = run_cli("train", str(recipe), TRACKIO_DIR=str(tmp_path / "trackio"))
    assert result.returncode == 0, result.stderr
    with sqlite3.connect(tmp_path / "trackio" / "rewards.db") as file:
        rows = [json.loads(row) for (row,) in file.execute("SELECT metrics FROM metrics ORDER BY id")]
    for name, key in SENT.items():
        values = [row[name] for row in rows if name in row]
        assert values == pytest.approx(logged(tmp_path / "run", key)), name


def test_wandb_gets_them_too(write_recipe, tmp_path, monkeypatch):
    """Its file holds the names as they are."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # of this process, which writes when it ends
    recipe = write_recipe(**KEYS, report_to="wandb", project="rewards", run_name="first")
    result = run_cli("train", str(recipe), WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    [file] = tmp_path.rglob("*.wandb")
    held = file.read_bytes()
    assert [name for name in SENT if name.encode() not in held] == []
