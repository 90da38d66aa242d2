"""A run that is wasted says so once, early, and a sound one says nothing."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import test_checkpoints
import torch
from conftest import make_rows, write_jsonl
from transformers import TrainerControl, TrainerState

from rm_recipe.errors import Interrupted, RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.checkpoints import checkpoints
from rm_recipe.training.monitoring import EarlySigns
from rm_recipe.training.train import make_ready, train


def said(capsys, logs: list[dict[str, float]], plain: bool = True, max_steps: int = 100) -> list[str]:
    """The warnings of a run of 32 comparisons a step that logs every 5 steps; `eval_accuracy` evaluates."""
    signs, state = EarlySigns(32, held_out=1000, plain=plain), TrainerState(max_steps=max_steps)
    for log in logs:
        if "eval_accuracy" in log:
            signs.on_evaluate(None, state, TrainerControl(), metrics=log)
        else:
            state.global_step += 5
            signs.on_log(None, state, TrainerControl(), logs=log)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def warming_up(steps: int) -> SimpleNamespace:
    """As much of TrainingArguments."""
    return SimpleNamespace(get_warmup_steps=lambda _: steps)


STUCK = {"loss": math.log(2), "accuracy": 0.7}
SOUND = {"loss": 0.5, "accuracy": 0.75}


@pytest.mark.parametrize(
    ("logs", "warnings"),
    [
        ([SOUND] * 20, []),
        ([STUCK] * 20, ["the loss is 0.693, where it began (ln 2 = 0.693)"]),
        ([STUCK, SOUND, SOUND], []),  # it took a while
        ([{"loss": 0.6, "accuracy": 0.5}] * 4, []),
        ([{"loss": 0.6, "accuracy": 0.5}] * 20, ["0.500 of the last 1120 comparisons are judged right"]),
        ([{"loss": 0.6, "accuracy": 0.3}] * 20, ["0.300 of the last 1120 comparisons are judged right"]),
        ([{"loss": 0.6, "accuracy": 0.56}] * 20, []),
        ([{**SOUND, "ties": 0.04}] * 9, []),
        ([{**SOUND, "ties": 0.06}] * 9, ["6% of the comparisons get equal rewards"]),
        ([{"loss": 0.1, "accuracy": 0.98}] * 2 + [{"eval_accuracy": 0.7}] * 2, ["train accuracy is 0.98"]),
        ([{"loss": 0.1, "accuracy": 0.8}] * 2 + [{"eval_accuracy": 0.7}], []),
    ],
)  # fmt: skip
def test_each_sign_is_said_once_with_its_remedy(capsys, logs, warnings):
    found = said(capsys, logs)
    assert len(found) == len(warnings)
    for line, expected in zip(found, warnings, strict=True):
        assert expected in line
        assert any(word in line for word in ("Raise", "Lower", "Train for fewer"))


def test_a_loss_with_margins_does_not_start_at_ln_2(capsys):
    assert said(capsys, [{"loss": 0.9, "accuracy": 0.7}] * 9, plain=False) == []


def test_a_tenth_of_the_steps_and_enough_comparisons_are_waited_for(capsys):
    assert said(capsys, [STUCK] * 3, max_steps=151) == []
    assert said(capsys, [STUCK] * 4, max_steps=151) != []


def test_of_a_resumed_run_only_what_came_since_the_last_log_counts(capsys):
    signs = EarlySigns(32, held_out=1000, plain=True)
    state = TrainerState(max_steps=100, global_step=50)
    state.log_history = [{"step": 45, "loss": 0.5}, {"step": 50, "eval_accuracy": 0.7}]
    signs.on_train_begin(warming_up(0), state, TrainerControl())
    signs.on_log(None, state, TrainerControl(), logs={"loss": 0.1, "accuracy": 1.0})  # of 5 steps: 160
    signs.on_evaluate(None, state, TrainerControl(), metrics={"eval_accuracy": 0.7})
    assert "warning" not in capsys.readouterr().out


def test_what_was_judged_before_any_update_is_no_sign(capsys):
    """The first step's loss, and all of a warm-up, are those of the base."""
    signs, state = EarlySigns(256, held_out=1000, plain=True), TrainerState(max_steps=8)
    for state.global_step in range(1, 9):
        signs.on_log(None, state, TrainerControl(), logs=STUCK)
    assert "warning" not in capsys.readouterr().out
    signs, state = EarlySigns(256, held_out=1000, plain=True), TrainerState(max_steps=100)
    signs.on_train_begin(warming_up(40), state, TrainerControl())
    for state.global_step in range(1, 101):
        signs.on_log(None, state, TrainerControl(), logs=STUCK if state.global_step <= 41 else SOUND)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("true", "least", "most"), [(0.5, 0.7, 1.0), (0.55, 0.0, 0.02), (0.6, 0.0, 0.001)])
def test_a_run_that_learns_a_little_is_rarely_taken_for_one_at_chance(capsys, true, least, most):
    rng, runs = np.random.default_rng(0), 2000
    for _ in range(runs):
        right = rng.binomial(160, true, 20) / 160
        signs, state = EarlySigns(32, held_out=1000, plain=True), TrainerState(max_steps=100)
        for accuracy in right:
            state.global_step += 5
            signs.on_log(None, state, TrainerControl(), logs={"loss": 0.6, "accuracy": accuracy})
    assert least <= capsys.readouterr().out.count("as by chance") / runs <= most


def contradictory(folder):
    """Comparisons of which the opposite is there too: nothing can be learnt."""
    rows = make_rows(300, seed=1)
    for row in rows[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", make_rows(200, seed=2))
    return str(folder)


def test_a_real_run_that_cannot_learn_says_so_and_one_that_learns_does_not(write_recipe, tmp_path, capfd):
    keys = {"dataset_name": contradictory(tmp_path / "data"), "logging_steps": 5, "num_train_epochs": 10}
    train(read_recipe(write_recipe(**keys, learning_rate=1e-3)))
    out = capfd.readouterr().out
    assert out.count("warning: after ") in (1, 2)
    train(read_recipe(write_recipe(output_dir=str(tmp_path / "good"), logging_steps=2, num_train_epochs=8)))
    assert "warning:" not in capfd.readouterr().out


def test_equal_rewards_are_counted(write_recipe, tmp_path, capfd):
    """A head and adapters that stay 0 give every response the same reward."""
    ready = make_ready(read_recipe(write_recipe()))
    with torch.no_grad():
        ready.trainer.model.get_base_model().score.weight.zero_()
        for name, parameter in ready.trainer.model.named_parameters():
            if "score" in name:
                parameter.zero_()
    assert ready.trainer.evaluate()["eval_ties"] == 1.0


STOPPING = {"early_stopping_patience": 2, "save_steps": 2, "num_train_epochs": 20, "save_total_limit": 2,
            "logging_steps": 3, "save_strategy": "omit"}  # fmt: skip


def test_early_stopping_keeps_the_best_checkpoint_by_held_out_accuracy(write_recipe, tmp_path):
    train(read_recipe(write_recipe(**STOPPING)))
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text())
    accuracies = [entry["eval_accuracy"] for entry in record["log"] if "eval_accuracy" in entry]
    assert record["steps"] == 2 * len(accuracies) < 160
    best = max(accuracies)
    assert accuracies.index(best) == len(accuracies) - 1 - 2
    assert evaluate(str(run))["datasets"]["held_out"]["accuracy"] == best


def test_early_stopping_without_save_steps_keeps_the_best_too(write_recipe, tmp_path):
    train(read_recipe(write_recipe(**STOPPING | {"save_steps": "omit", "num_train_epochs": 4})))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    accuracies = [entry["eval_accuracy"] for entry in record["log"] if "eval_accuracy" in entry]
    assert len(accuracies) > 2
    assert evaluate(str(tmp_path / "run"))["datasets"]["held_out"]["accuracy"] == max(accuracies)


def test_early_stopping_goes_on_counting_after_an_interrupt(write_recipe, tmp_path, monkeypatch):
    train(read_recipe(write_recipe(**STOPPING, output_dir=str(tmp_path / "whole"))))
    steps = json.loads((tmp_path / "whole" / "run.json").read_text())["steps"]
    recipe = read_recipe(write_recipe(**STOPPING))
    make = test_checkpoints.rm_recipe.training.train.make_trainer

    def interrupted(*args):
        trainer = make(*args)
        trainer.add_callback(test_checkpoints.SignalAt(steps - 1))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(test_checkpoints.rm_recipe.training.train, "make_trainer", interrupted)
        with pytest.raises(Interrupted):
            train(recipe)
    train(recipe, resume=True)
    assert test_checkpoints.same(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_had_stopped_early_is_not_trained_on_when_resumed(write_recipe, tmp_path):
    recipe = read_recipe(write_recipe(**STOPPING))
    train(recipe)
    run = tmp_path / "run"
    before = (run / "run.json").rename(tmp_path / "run.json")
    weights = test_checkpoints.weights(run)
    (run / "model").rename(tmp_path / "model")
    train(recipe, resume=True)
    ours, theirs = (json.loads(path.read_text())["steps"] for path in (run / "run.json", before))
    assert ours == theirs
    assert all((value == test_checkpoints.weights(run)[key]).all() for key, value in weights.items())
    assert len(checkpoints(run)) == 3  # save_total_limit, and the best


@pytest.mark.parametrize("keys", [{}, {"save_steps": 4}, {"eval_steps": 4}], ids=str)
@pytest.mark.parametrize("asked", [{"early_stopping_patience": 2}, {"load_best_model_at_end": True}], ids=str)
def test_the_best_checkpoint_is_looked_for_where_one_is_saved(write_recipe, keys, asked):
    """Trainer would look at every `logging_steps` and save at every 500: it keeps the last model, unsaid."""
    training = read_recipe(write_recipe(save_strategy="omit", logging_steps=3, **asked, **keys)).training
    assert training.eval_steps == training.save_steps == (4 if keys else 0.1)
    assert training.eval_strategy == training.save_strategy == "steps"
    assert training.load_best_model_at_end


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"eval_steps": 1}, "'eval_steps: 1.0' must equal 'save_steps: 2.0', or leave it out"),
        ({"eval_strategy": "no"}, "needs what 'eval_strategy: no' forbids"),
        ({"load_best_model_at_end": False}, "needs what 'load_best_model_at_end: False' forbids"),
        ({"early_stopping_patience": 0}, "'early_stopping_patience: 0' must be above 0"),
    ],
)
def test_early_stopping_that_cannot_work_is_refused(write_recipe, keys, fault):
    with pytest.raises(RecipeError, match=fault):
        read_recipe(write_recipe(**STOPPING | keys))
