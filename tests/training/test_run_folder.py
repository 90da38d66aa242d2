"""A run uses its own folder alone, and is gone on with only as what it was."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_recipe

from rm_recipe.errors import RecipeError
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.run_folder import changed_keys, empty
from rm_recipe.training.train import train

HOLDS = """
import sys
from pathlib import Path
from rm_recipe.run_folder import FolderLock
with FolderLock(Path(sys.argv[1])) as lock:
    lock.take()
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, tiny_data):
    folder = tmp_path_factory.mktemp("trained")
    train(read_recipe(make_recipe(folder, tiny_llama, tiny_data, save_strategy="steps", save_steps=4)))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_used_run_folder_is_refused_without_a_flag(run, write_recipe):
    recipe = read_recipe(write_recipe())
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(RecipeError, match="add --resume to go on with it, --overwrite to start anew"):
        train(recipe)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_resuming_with_another_recipe_names_the_keys_that_differ(run, write_recipe):
    (run / "run.json").unlink()
    with pytest.raises(RecipeError, match="another recipe; resuming needs the same values of: learning_rate"):
        train(read_recipe(write_recipe(learning_rate=1e-5, logging_steps=3)), resume=True)


def test_overwriting_starts_anew_but_never_in_a_foreign_folder(write_recipe, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("kept")
    with pytest.raises(RecipeError, match="is not a run folder; choose another one"):
        train(read_recipe(write_recipe(output_dir=str(folder))), overwrite=True)
    assert (folder / "thesis.tex").read_text() == "kept"


def test_two_processes_do_not_work_in_one_folder(run, write_recipe):
    (run / "run.json").unlink()
    held = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert held.stdout.readline() == "held\n"
    before = sorted(run.rglob("*"))
    for flag in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(RecipeError, match=f"another process is at work in {run}: wait for it, or end it"):
            train(read_recipe(write_recipe(save_strategy="steps", save_steps=4)), **flag)
    assert sorted(run.rglob("*")) == before
    held.kill()  # a lock does not outlive who holds it
    held.wait()
    train(read_recipe(write_recipe(save_strategy="steps", save_steps=4)), resume=True)


def test_a_run_is_emptied_so_that_what_is_left_is_never_a_finished_one(run, monkeypatch):
    removed = []
    monkeypatch.setattr(Path, "unlink", lambda path, **_: removed.append(path.name))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append(path.name))
    empty(run)
    assert removed[0] == "run.json"
    assert removed[-1] == "recipe.yaml"


def test_a_finished_run_is_not_resumed(run, write_recipe):
    before = (run / "run.json").read_bytes()
    with pytest.raises(RecipeError, match="is finished; there is nothing to resume"):
        train(read_recipe(write_recipe()), resume=True)
    assert (run / "run.json").read_bytes() == before


def test_a_folder_with_a_recipe_of_the_users_own_is_no_run_folder(write_recipe, tmp_path):
    recipe = write_recipe(output_dir=str(tmp_path))
    with pytest.raises(RecipeError, match="is not a run folder; choose another one"):
        train(read_recipe(recipe), overwrite=True)
    assert recipe.is_file()


def test_there_is_nothing_to_resume_in_an_empty_place(write_recipe):
    with pytest.raises(RecipeError, match="holds no run to resume"):
        train(read_recipe(write_recipe()), resume=True)


def test_a_benchmark_may_come_before_a_run_and_outlasts_it(write_recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "benchmark.json").write_text("{}")
    recipe = read_recipe(write_recipe(max_steps=1))
    train(recipe)
    (run / "checkpoint-9").mkdir()
    train(recipe, overwrite=True)
    assert (run / "benchmark.json").read_text() == "{}"
    assert (run / "run.json").is_file()
    assert not (run / "checkpoint-9").exists()


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({"logging_steps": 3, "save_steps": 7, "output_dir": "elsewhere"}, []),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, []),  # as many in a step
        ({"per_device_train_batch_size": 4}, ["per_device_train_batch_size"]),
        ({"lora_r": 8, "seed": 1}, ["lora_r", "seed"]),
        ({"target_accuracy": 0.9, "gate_statistic": "accuracy", "max_eval_samples": 9}, []),
    ],
)
def test_what_cannot_change_the_result_may_change(run, write_recipe, keys, changed):
    assert sorted(changed_keys(read_recipe(write_recipe(save_strategy="steps", **keys)), run)) == changed


def test_what_is_evaluated_matters_where_the_learning_rate_follows_it(run, write_recipe):
    keys = {"eval_strategy": "steps", "eval_steps": 3, "max_eval_samples": 9}
    recipe = read_recipe(write_recipe(lr_scheduler_type="reduce_lr_on_plateau", **keys))
    assert keys.keys() <= set(changed_keys(recipe, run))


def test_where_the_best_checkpoint_is_chosen_it_matters_when_one_is_saved(write_recipe, tmp_path):
    best = {"eval_strategy": "steps", "load_best_model_at_end": True, "save_strategy": "steps",
            "metric_for_best_model": "eval_accuracy", "max_steps": 4}  # fmt: skip
    train(read_recipe(write_recipe(**best, save_steps=2, eval_steps=2)))
    again = read_recipe(write_recipe(**best, save_steps=1, eval_steps=1))
    assert sorted(changed_keys(again, tmp_path / "run")) == ["eval_steps", "save_steps"]
    other = read_recipe(
        write_recipe(**best, save_steps=2, eval_steps=2, max_eval_samples=9, target_accuracy=0.9)
    )
    assert changed_keys(other, tmp_path / "run") == ["max_eval_samples"]
