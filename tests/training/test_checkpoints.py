"""What is killed goes on from the newest whole checkpoint, and ends with the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, each_trainer, filling_up, logged, make_recipe, set_keys, weights
from transformers import TrainerCallback

from rm_recipe.errors import Interrupted, RecipeError, TrainingError
from rm_recipe.files import tidy
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.checkpoints import MANIFEST, checkpoints, fault_of
from rm_recipe.training.run_folder import check_identity
from rm_recipe.training.train import train

# Two epochs of 11 steps; a step's dropout, order and schedule all depend on where it is.
KEYS = {
    **{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "lora_dropout": 0.1},
    **{"disable_dropout": False, "lr_scheduler_type": "cosine", "warmup_steps": 3, "logging_steps": 5},
    **{"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2},
}
BEST = {"eval_strategy": "steps", "eval_steps": 3}
BEST |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}
BY_EPOCH = dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "epoch")
BY_EPOCH |= {"save_steps": "omit", "logging_steps": "omit"}


def same(run: Path, other: Path) -> bool:
    """Whether two runs have the same weights, bit for bit, and the same log, but for what a clock counts."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for key in ("step", "loss", "grad_norm", "accuracy", "margin", "num_tokens", "eval_loss", "eval_margin"):
        assert logged(run, key) == logged(other, key), key
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- killed ----------------------------------------------------------------------------------


def kill(folder: Path, recipe: Path, times: int, change: str) -> dict:
    """What `killed.py` did; whatever it killed has ended as `whole`, which it did not kill."""
    command = [sys.executable, "tests/killed.py", str(folder), str(recipe), str(times), change]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    settings = {"capture_output": True, "text": True, "check": False, "cwd": REPOSITORY}
    result = subprocess.run(command, env=environment, **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    for run in folder.glob("finished-*"):
        assert same(run, folder / "whole"), run
        assert {path.name for path in run.iterdir()} == {path.name for path in (folder / "whole").iterdir()}
    return json.loads(result.stdout.splitlines()[-1])


def test_a_run_that_was_killed_ends_with_the_same_bits_and_losses(write_recipe, tmp_path):
    """At a random moment, and amid a checkpoint's files; it ends with its best model."""
    report = kill(tmp_path, write_recipe(**KEYS | BEST), times=1, change="40")
    assert report["kills"]  # the random moment may come after its end


@pytest.mark.slow
def test_no_kill_at_any_change_of_the_run_folder_or_at_random_moments_loses_anything(write_recipe, tmp_path):
    report = kill(tmp_path, write_recipe(**KEYS | BEST), times=24, change="all")
    moments = report["kills"].count("moment")  # of which some may come after the run's end
    assert moments > 12
    assert len(report["kills"]) - moments >= report["changes"] - 1  # the last change may follow run.json


# --- interrupted -----------------------------------------------------------------------------


class At(TrainerCallback):
    """Does something to the model, or to the process, when a step begins."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == self.step - 1:
            self.action(model)


def ctrl_c_at(step: int) -> At:
    return At(step, lambda _: signal.raise_signal(signal.SIGINT))


def watched_by(callback: TrainerCallback):
    """Within it, trainers have one more callback."""
    return each_trainer(lambda trainer: trainer.add_callback(callback))


@pytest.mark.parametrize(
    ("step", "keys"),
    [
        (11, BY_EPOCH),  # an epoch's last, whose evaluation a resumed run would not make up for
        (14, BEST),
        (14, {"prefix_sharing": "off"}),  # in the second epoch of batches that are grouped by length
        (13, {"max_steps": 13}),  # the last, amid an epoch: there is no step to be made after it
    ],
)
def test_ctrl_c_ends_and_saves_the_step_and_the_run_resumes_alike(write_recipe, tmp_path, capfd, step, keys):
    train(read_recipe(write_recipe(**KEYS | keys, output_dir=str(tmp_path / "whole"))))
    path = write_recipe(**KEYS | keys, output_dir=str(tmp_path / "resumed"))
    saved = rf"after step {step} of \d+, which is saved in .*-{step}$"
    with watched_by(ctrl_c_at(step)), pytest.raises(Interrupted, match=saved) as caught:
        train(read_recipe(path))
    grouped = "train_sampling_strategy: group_by_length" in (tmp_path / "whole/recipe.yaml").read_text()
    assert grouped == ("prefix_sharing" in keys)
    assert caught.value.exit_code == 130
    assert "finishing this step and saving it" in capfd.readouterr().err
    assert fault_of(tmp_path / "resumed" / f"checkpoint-{step}") is None
    assert not (tmp_path / "resumed" / "model").exists()
    train(read_recipe(path), resume=True)
    assert same(tmp_path / "resumed", tmp_path / "whole")
    record = json.loads((tmp_path / "resumed" / "run.json").read_text())
    assert record["resumed_from_step"] == step
    assert record["steps"] == json.loads((tmp_path / "whole" / "run.json").read_text())["steps"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama, tiny_data):
    """A folder with `whole`, a finished run, and `run`, which stands at step 8 with checkpoints 6 and 8."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = make_recipe(folder, tiny_llama, tiny_data, **KEYS)
    train(read_recipe(recipe, ["--output_dir", str(folder / "whole")]))
    with watched_by(ctrl_c_at(8)), pytest.raises(Interrupted):
        train(read_recipe(recipe))
    return folder


@pytest.fixture
def whole(runs):
    return runs / "whole"


@pytest.fixture
def interrupted(runs, write_recipe, tmp_path):
    """A copy of the run that stands at step 8, and its recipe."""
    return shutil.copytree(runs / "run", tmp_path / "run"), write_recipe(**KEYS)


BROKEN = "it was not finished, or its manifest.json is broken"
CUT = "optimizer.pt is missing or not as it was written"
FROM_6 = "resuming from {run}/checkpoint-6\n"


def unfinished(run: Path) -> None:
    for folder in checkpoints(run):
        (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "fault", "said"),
    [
        (lambda run: (run / "checkpoint-8" / MANIFEST).write_text("{"), BROKEN, FROM_6),
        (lambda run: os.truncate(run / "checkpoint-8" / "optimizer.pt", 500), CUT, FROM_6),
        (unfinished, BROKEN, "no checkpoint to resume from: starting anew\n"),
    ],
)
def test_a_checkpoint_that_is_not_as_it_was_finished_is_named_and_the_one_before_is_used(
    interrupted, whole, capsys, damage, fault, said
):
    run, recipe = interrupted
    damage(run)
    train(read_recipe(recipe), resume=True)
    printed = capsys.readouterr()
    assert f"warning: {run / 'checkpoint-8'} does not count: {fault}\n" in printed.err
    assert said.format(run=run) in printed.out
    assert same(run, whole)
    assert [path.name for path in checkpoints(run)] == [path.name for path in checkpoints(whole)]


def test_other_data_tokens_or_process_counts_are_refused_and_a_copy_is_not(interrupted, tmp_path, tiny_data):
    run, recipe = interrupted
    manifest = json.loads((run / "checkpoint-8" / MANIFEST).read_text())
    for what in ("processes", "token ids that tokenizer and chat template give"):
        with pytest.raises(RecipeError, match=f"the {what} are not those that .*run was started with"):
            check_identity(run, manifest, {what: "another"})
    copy = shutil.copytree(tiny_data, tmp_path / "data")
    for path in (recipe, run / "recipe.yaml"):
        path.write_text(path.read_text().replace(str(tiny_data), str(copy)))
    rows = (copy / "train.jsonl").read_text()
    (copy / "train.jsonl").write_text("".join(rows.splitlines(keepends=True)[::-1]))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match="the train comparisons are not those that .*run was started with"):
        train(read_recipe(recipe), resume=True)
    assert {path: path.read_bytes() for path in before} == before
    (copy / "train.jsonl").write_text(rows)
    train(read_recipe(recipe), resume=True)


def test_a_resumed_run_counts_time_speed_and_memory_of_the_whole_run(interrupted):
    run, recipe = interrupted
    path = run / "checkpoint-8" / MANIFEST
    assert 0 < json.loads(path.read_text())["cost"]["train_seconds"] < 100
    set_keys(path, cost={"train_seconds": 1e4, "peak_memory_bytes": 10**15})
    train(read_recipe(recipe), resume=True)
    record = json.loads((run / "run.json").read_text())
    assert 1e4 < record["train_seconds"] < 1.1e4
    assert record["peak_memory_bytes"] == 10**15
    assert record["comparisons_per_s"] == pytest.approx(2 * 64 / record["train_seconds"])
    tokens = max(entry.get("num_tokens", 0) for entry in record["log"])
    assert record["tokens_per_s"] == pytest.approx(tokens / record["train_seconds"])


# --- full disks, and what is no number -------------------------------------------------------


@pytest.mark.parametrize(("step", "broken", "kept"), [(6, "checkpoint-6", [3]), (23, "model", [22, 21])])
def test_a_full_disk_is_told_once_and_loses_no_checkpoint(write_recipe, tmp_path, whole, step, broken, kept):
    recipe, run = write_recipe(**KEYS), tmp_path / "run"
    with filling_up(2000) as fill:
        callback = At(step, fill)
        callback.on_train_end = fill
        said = f"{run}/{broken} could not be written, with "
        with watched_by(callback), pytest.raises(TrainingError, match=said):
            train(read_recipe(recipe))
    names = {"recipe.yaml", "data_report.json", *(f"checkpoint-{number}" for number in kept)}
    assert {path.name for path in run.iterdir()} == names
    train(read_recipe(recipe), resume=True)
    assert same(run, whole)


def test_how_often_is_evaluated_changes_nothing(write_recipe, tmp_path, whole):
    """With dropout: an evaluation takes no random number from training."""
    train(read_recipe(write_recipe(**KEYS, eval_strategy="steps", eval_steps=2)))
    never, often = weights(whole), weights(tmp_path / "run")
    assert all(torch.equal(never[key], often[key]) for key in never)


def test_a_nan_loss_names_step_and_rows_and_leaves_the_checkpoint_before(write_recipe, tmp_path, whole):
    def overflow(model):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    recipe, run = write_recipe(**KEYS), tmp_path / "run"
    said = r"the loss is not a finite number in step 5, of row \d+, \d+, \d+; "
    with watched_by(At(5, overflow)), pytest.raises(TrainingError, match=said):
        train(read_recipe(recipe))
    assert [path.name for path in checkpoints(run)] == ["checkpoint-3"]
    train(read_recipe(recipe), resume=True)
    assert same(run, whole)


def test_what_a_kill_left_unfinished_is_removed_and_what_was_about_to_be_replaced_is_put_back(tmp_path):
    (tmp_path / ".run.json.part").write_text("{")
    (tmp_path / ".model-x1.part" / "old").mkdir(parents=True)
    (tmp_path / ".model-x1.part" / "old" / "weights").write_text("trained")
    (tmp_path / ".export-x2.part" / "new").mkdir(parents=True)
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "trained"
