"""A run that is wasted says so once, early; early stopping keeps the best model."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import logged, ready_trainer
from test_checkpoints import ctrl_c_at, same, watched_by
from transformers import TrainerControl, TrainerState

from rm_recipe.errors import Interrupted
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.checkpoints import checkpoints
from rm_recipe.training.monitoring import EarlySigns
from rm_recipe.training.train import train

STUCK, SOUND = {"loss": math.log(2)}, {"loss": 0.5}


@pytest.mark.parametrize(
    ("logs", "keys", "warning"),
    [
        ([SOUND] * 20, {}, None),
        ([STUCK] * 20, {}, "the loss is 0.693, where it began (ln 2 = 0.693). Raise learning_rate"),
        ([STUCK, STUCK, SOUND, SOUND], {}, None),  # it took a while
        ([STUCK] * 20, {"plain": False}, None),  # with margins
        ([STUCK] * 20, {"of_step": 1}, None),  # comparisons too few to tell
        ([STUCK] * 3, {"max_steps": 151}, None),  # a tenth of the steps is waited for
        ([STUCK] * 5, {"max_steps": 151}, "where it began"),
        ([STUCK] * 9 + [SOUND] * 11, {"warmup": 40}, None),
        ([STUCK], {"resumed_at": 50}, None),  # its first log is of the steps since the last one
        ([{**SOUND, "ties": 0.04}] * 9, {}, None),
        ([{**SOUND, "ties": 0.06}] * 9, {}, "6% of the comparisons get equal rewards: they have collapsed. "),
    ],
)
def test_each_sign_is_said_once_with_its_remedy(capsys, logs, keys, warning):
    """Of a run that logs every 5 steps."""
    usual = {"of_step": 32, "plain": True, "max_steps": 100, "warmup": 0, "resumed_at": 0} | keys
    signs = EarlySigns(usual["of_step"], usual["plain"])
    state = TrainerState(max_steps=usual["max_steps"], global_step=usual["resumed_at"])
    state.log_history = [{"step": state.global_step, "loss": 0.5}]
    signs.on_train_begin(SimpleNamespace(get_warmup_steps=lambda _: usual["warmup"]), state, TrainerControl())
    for log in logs:
        state.global_step += 5
        signs.on_log(None, state, TrainerControl(), logs=log)
    said = capsys.readouterr().err
    assert said.count("warning: ") == (warning is not None)
    assert (warning or "") in said


def test_a_real_run_that_cannot_learn_says_so_and_one_that_learns_does_not(write_recipe, capfd):
    for rate, times in ((1e-7, 1), (1e-2, 0)):
        recipe = write_recipe(learning_rate=rate, logging_steps=5, num_train_epochs=5)
        train(read_recipe(recipe), overwrite=True)
        said = capfd.readouterr().err
        assert said.count("warning: after 30 steps the loss is 0.") == said.count("warning: ") == times


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


def test_early_stopping_keeps_the_best_and_a_run_interrupted_or_stopped_ends_the_same(write_recipe, tmp_path):
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
