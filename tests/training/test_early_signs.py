"""A run that is wasted says so once, early; early stopping keeps the best model."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import logged, make_rows, ready_trainer, write_jsonl
from test_checkpoints import ctrl_c_at, same, watched_by
from transformers import TrainerControl, TrainerState

from rm_recipe.errors import Interrupted
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.checkpoints import checkpoints
from rm_recipe.training.monitoring import EarlySigns
from rm_recipe.training.train import train


def said(capsys, logs, every=5, max_steps=100, of_step=32, plain=True, state=None, warmup=None):
    """The warnings of a run that logs every so many steps; a log with `eval_accuracy` is an evaluation."""
    signs = EarlySigns(of_step, held_out=1000, plain=plain)
    state = state or TrainerState(max_steps=max_steps)
    if warmup is not None:
        arguments = SimpleNamespace(get_warmup_steps=lambda _: warmup)
        signs.on_train_begin(arguments, state, TrainerControl())
    for log in logs:
        if "eval_accuracy" in log:
            signs.on_evaluate(None, state, TrainerControl(), metrics=log)
        else:
            state.global_step += every
            signs.on_log(None, state, TrainerControl(), logs=log)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


STUCK = {"loss": math.log(2), "accuracy": 0.7}
SOUND = {"loss": 0.5, "accuracy": 0.75}


@pytest.mark.parametrize(
    ("logs", "warnings"),
    [
        ([SOUND] * 20, []),
        ([STUCK] * 20, ["the loss is 0.693, where it began (ln 2 = 0.693)"]),
        ([STUCK, SOUND, SOUND], []),  # it took a while
        ([{"loss": 0.6, "accuracy": 0.5}] * 4, []),  # too few to tell
        ([{"loss": 0.6, "accuracy": 0.5}] * 20, ["0.500 of the last 1120 comparisons are judged right"]),
        ([{"loss": 0.6, "accuracy": 0.56}] * 20, []),
        ([{**SOUND, "ties": 0.04}] * 9, []),
        ([{**SOUND, "ties": 0.06}] * 9, ["6% of the comparisons get equal rewards"]),
        ([{"loss": 0.1, "accuracy": 0.98}] * 2 + [{"eval_accuracy": 0.7}] * 2, ["train accuracy is 0.98"]),
        ([{"loss": 0.1, "accuracy": 0.84}] * 2 + [{"eval_accuracy": 0.7}], []),
    ],
)
def test_each_sign_is_said_once_with_its_remedy(capsys, logs, warnings):
    found = said(capsys, logs)
    assert len(found) == len(warnings)
    for line, expected in zip(found, warnings, strict=True):
        assert expected in line
        assert any(word in line for word in ("Raise", "Lower", "Train for fewer"))


def test_a_tenth_of_the_steps_and_all_of_a_warm_up_are_waited_for(capsys):
    assert said(capsys, [STUCK] * 3, max_steps=151) == []
    assert said(capsys, [STUCK] * 4, max_steps=151) != []
    assert said(capsys, [STUCK] * 41 + [SOUND] * 59, every=1, of_step=256, warmup=40) == []
    assert said(capsys, [STUCK] * 8, every=1, of_step=256, max_steps=8) == []
    assert said(capsys, [{"loss": 0.9, "accuracy": 0.7}] * 9, plain=False) == []  # with margins


def test_of_a_resumed_run_only_what_came_since_the_last_log_counts(capsys):
    state = TrainerState(max_steps=100, global_step=50)
    state.log_history = [{"step": 45, "loss": 0.5}, {"step": 50, "eval_accuracy": 0.7}]
    logs = [{"loss": 0.1, "accuracy": 1.0}, {"eval_accuracy": 0.7}]  # of 5 steps: 160 comparisons
    assert said(capsys, logs, every=0, state=state, warmup=0) == []


def test_a_real_run_that_cannot_learn_says_so_and_one_that_learns_does_not(write_recipe, tmp_path, capfd):
    """Of half of the comparisons the opposite is true."""
    rows = make_rows(300, seed=1)
    for row in rows[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    write_jsonl(tmp_path / "data" / "test.jsonl", make_rows(200, seed=2))
    keys = {"dataset_name": str(tmp_path / "data"), "logging_steps": 5, "num_train_epochs": 5}
    train(read_recipe(write_recipe(**keys, learning_rate=1e-3)))
    assert capfd.readouterr().err.count("warning: after ") in (1, 2)
    train(read_recipe(write_recipe(output_dir=str(tmp_path / "good"), logging_steps=2, num_train_epochs=8)))
    assert "warning:" not in capfd.readouterr().err


def test_equal_rewards_are_counted(write_recipe):
    """A head and adapters that stay 0 give every response the same reward."""
    trainer = ready_trainer(read_recipe(write_recipe()))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "score" in name:
                parameter.zero_()
    assert trainer.evaluate()["eval_ties"] == 1.0


# --- early stopping --------------------------------------------------------------------------

STOPPING = {"early_stopping_patience": 2, "save_steps": 2, "num_train_epochs": 20, "save_total_limit": 2}
STOPPING |= {"logging_steps": 3, "save_strategy": "omit"}


def test_early_stopping_keeps_the_best_and_a_run_that_was_interrupted_or_had_stopped_ends_the_same(
    write_recipe, tmp_path
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(read_recipe(write_recipe(**STOPPING, output_dir=str(whole))))
    accuracies = logged(whole, "eval_accuracy")
    steps = json.loads((whole / "run.json").read_text())["steps"]
    assert steps == 2 * len(accuracies) < 160
    assert accuracies.index(max(accuracies)) == len(accuracies) - 1 - 2
    assert evaluate(str(whole))["datasets"]["held_out"]["accuracy"] == max(accuracies)
    recipe = read_recipe(write_recipe(**STOPPING))
    with watched_by(ctrl_c_at(steps - 1)), pytest.raises(Interrupted):
        train(recipe)
    train(recipe, resume=True)
    assert same(run, whole)
    (run / "run.json").unlink()
    (run / "model").rename(tmp_path / "model")
    train(recipe, resume=True)  # from where it had stopped
    assert same(run, whole)
    assert len(checkpoints(run)) == 3  # save_total_limit, and the best
