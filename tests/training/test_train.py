"""A run leaves what the contract says, moves what it should, and uses its own folder alone."""

import json
import logging
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import REPOSITORY, logged, make_recipe, make_tokenizer
from test_checkpoints import watched_by
from transformers import TrainerCallback

import rm_recipe.training.train
from rm_recipe import RewardModel
from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.export import export
from rm_recipe.files import locked
from rm_recipe.model.memory import peak_memory
from rm_recipe.recipe.reader import is_run_folder, read_recipe
from rm_recipe.training.run_folder import changed_keys, empty
from rm_recipe.training.train import train

ITEMS = [{"prompt": "hello 3 cat", "response": response} for response in ("good good", "bad bad")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, tiny_data):
    folder = tmp_path_factory.mktemp("trained")
    train(read_recipe(make_recipe(folder, tiny_llama, tiny_data, save_strategy="steps", save_steps=4)))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_leaves_the_files_and_keys_of_the_contract(trained):
    record = json.loads((trained / "run.json").read_text())
    assert record.keys() >= set(
        "seed versions git_commit data_fingerprints prefix_sharing steps comparisons_per_s tokens_per_s "
        "train_seconds peak_memory_bytes final_loss".split()
    )
    assert record["prefix_sharing"].keys() == {"used", "reason", "max_abs_diff"}
    assert record["prefix_sharing"]["used"]
    assert record["steps"] == 16
    assert {path.name for path in trained.iterdir()} >= {"recipe.yaml", "data_report.json", "checkpoint-16"}
    assert not (trained / "README.md").exists()
    names = {path.name for path in (trained / "model").iterdir()}
    assert names >= {"adapter_model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"}
    assert not names & {"training_args.bin", "README.md"}  # a token, and the folder of the base


def test_a_base_without_a_token_to_pad_with_gets_one_and_is_read_back(write_recipe, tmp_path, tiny_llama):
    tokenizer = make_tokenizer()
    tokenizer.unk_token = None
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    tokenizer.save_pretrained(base)
    train(read_recipe(write_recipe(model_name_or_path=str(base))))
    reward_model = RewardModel.from_pretrained(tmp_path / "run")
    assert reward_model.tokenizer.pad_token == "<|pad|>"
    good, bad = reward_model.score(ITEMS)
    assert good > bad


RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[] if "offline" in p.stem else pytest.mark.slow) for p in RECIPES],
)
def test_every_recipe_trains_evaluates_and_exports_a_model_of_its_kind(path, tiny_base, tiny_data, tmp_path):
    """With its own keys, but for the model, the data and how long: what a recipe says works together."""
    encoder = "distilbert" if "distilbert" in path.stem else "bert" if "minilm" in path.stem else None
    overrides = {
        "model_name_or_path": tiny_base(encoder or "llama"),
        "dataset_name": tiny_data,
        "output_dir": tmp_path / "run",
        **dict.fromkeys(("dataset_subsets", "max_train_samples", "max_eval_samples"), "null"),
        **{"max_length": 128, "max_steps": 2, "use_cpu": "true", "disable_tqdm": "true"},
    }
    if path.stem == "smollm2_offline":
        overrides["lora_target_modules"] = r".*layers\.1\..*_proj"  # its upper half
    recipe = read_recipe(path, [word for key, own in overrides.items() for word in (f"--{key}", str(own))])
    train(recipe)
    run = recipe.output_dir
    assert json.loads((run / "run.json").read_text())["prefix_sharing"]["used"] is (encoder is None)
    assert (run / "model" / "adapter_config.json").is_file() is bool(recipe.model.use_peft)
    assert evaluate(str(run))["datasets"]["held_out"]["n_scored"] == 40
    assert export(run)["passed"]


# --- what is said ----------------------------------------------------------------------------


def test_a_users_handler_sees_each_line_and_log_level_silences_it(write_recipe, capfd, caplog):
    logger = logging.getLogger("rm_recipe")
    logger.handlers = []  # as in a library; the command line has its own
    logger.setLevel(logging.NOTSET)
    train(read_recipe(write_recipe(max_steps=1)))
    assert "preflight: " not in "".join(capfd.readouterr())
    with caplog.at_level(logging.INFO):
        train(read_recipe(write_recipe(max_steps=1)), overwrite=True)
        assert [r.levelname for r in caplog.records if r.message.startswith("preflight: ")] == ["INFO"]
        caplog.clear()
        train(read_recipe(write_recipe(max_steps=1, log_level="error")), overwrite=True)
    assert not [record for record in caplog.records if record.name == "rm_recipe"]


# --- run.json --------------------------------------------------------------------------------


def test_a_gradient_norm_that_overflowed_is_null_in_the_record(write_recipe, tmp_path):
    """As in fp16's first steps; JSON has no number for it."""

    class Overflowing(TrainerCallback):
        def on_log(self, args, state, control, **_):
            state.log_history[0]["grad_norm"] = math.inf

    with watched_by(Overflowing()):
        train(read_recipe(write_recipe(max_steps=1, logging_steps=1)))
    assert logged(tmp_path / "run", "grad_norm") == [None]


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
    train(read_recipe(write_recipe(max_steps=1)))
    found = json.loads((tmp_path / "run" / "run.json").read_text())["peak_memory_bytes"]
    assert 1e8 < found < before[0] - 2**28


# --- the run folder --------------------------------------------------------------------------


def test_a_run_folder_that_may_not_be_used_is_refused_and_left_alone(run, write_recipe):
    def refused(message: str, resume: bool, **keys) -> None:
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        with pytest.raises(RecipeError, match=message):
            train(read_recipe(write_recipe(**keys)), resume=resume)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    refused("add --resume or --overwrite", resume=False)
    refused("is finished; there is nothing to resume", resume=True)
    (run / "run.json").unlink()
    refused("resuming needs the same learning_rate$", resume=True, learning_rate=1e-5, logging_steps=3)


def test_overwriting_starts_anew_but_never_in_a_foreign_folder(write_recipe, tmp_path):
    """A recipe of the user's own does not make it a run's."""
    (tmp_path / "thesis.tex").write_text("kept")
    recipe = write_recipe(output_dir=str(tmp_path))
    with pytest.raises(RecipeError, match="is not a run folder; choose another"):
        train(read_recipe(recipe), overwrite=True)
    assert recipe.is_file()
    assert (tmp_path / "thesis.tex").read_text() == "kept"


def test_two_processes_do_not_work_in_one_folder(run, write_recipe):
    (run / "run.json").unlink()
    before = sorted(run.rglob("*"))
    recipe = read_recipe(write_recipe(save_strategy="steps", save_steps=4))
    with locked(run):
        for flag in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RecipeError, match=f"another process is at work in {run}"):
                train(recipe, **flag)
    assert sorted(run.rglob("*")) == before
    train(recipe, resume=True)


def test_a_run_that_is_removed_half_way_is_neither_finished_nor_foreign(run, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        empty(run)
    assert not (run / "run.json").exists()
    assert is_run_folder(run)


def test_overwriting_removes_the_run_before_and_keeps_a_benchmark(run, write_recipe):
    (run / "benchmark.json").write_text("{}")
    train(read_recipe(write_recipe(max_steps=1)), overwrite=True)
    assert (run / "benchmark.json").read_text() == "{}"
    assert (run / "run.json").is_file()
    assert not list(run.glob("checkpoint-*"))


def test_what_cannot_change_the_result_may_change(run, write_recipe):
    for keys, changed in (
        ({"logging_steps": 3, "save_steps": 7, "output_dir": "elsewhere", "target_accuracy": 0.9}, []),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, []),  # as many in a step
        ({"per_device_train_batch_size": 4}, ["per_device_train_batch_size"]),
        ({"lora_r": 8, "seed": 1}, ["lora_r", "seed"]),
    ):
        assert sorted(changed_keys(read_recipe(write_recipe(save_strategy="steps", **keys)), run)) == changed


def test_when_and_on_what_is_evaluated_matters_where_checkpoint_or_learning_rate_follow_it(run, write_recipe):
    keys = {"eval_strategy": "steps", "eval_steps": 3, "max_eval_samples": 9}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy", "save_steps": 3}
    for following in ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {**best, "save_strategy": "steps"}):
        recipe = read_recipe(write_recipe(**following, **keys, target_accuracy=0.9))
        assert keys.keys() <= set(changed_keys(recipe, run))
        assert "target_accuracy" not in changed_keys(recipe, run)


def test_a_single_step_learns_although_a_share_of_it_is_warm_up_and_is_logged(write_recipe, tmp_path):
    train(read_recipe(write_recipe(warmup_steps=0.03, max_steps=1, logging_steps=10)))  # or no head moves
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["steps"] == 1
    assert 0.5 < record["final_loss"] < 1
