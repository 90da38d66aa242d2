"""The folder of a run: may it be used, is it the same run, are the data the same, what `run.json` says."""

import importlib.metadata
import math
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from accelerate import PartialState

from rm_recipe import __version__
from rm_recipe.data.dataset import Split, fingerprint_of_tokens
from rm_recipe.data.splits import load_splits, refuse_other_data
from rm_recipe.errors import DataError, RecipeError
from rm_recipe.files import is_scratch
from rm_recipe.processes import warn
from rm_recipe.recipe.reader import RUN_RECIPE, Recipe, is_run_folder, save_values, saved_values
from rm_recipe.recipe.schema import CHECKPOINTING
from rm_recipe.training.trainer import SharedPrefixRewardTrainer

DATA_REPORT = "data_report.json"
BENCHMARK = "benchmark.json"  # of the machine, not of a run: it may come first and it stays
PACKAGES = ("torch", "trl", "transformers", "datasets", "peft", "accelerate", "bitsandbytes")

# What a finished run is measured on, and what it has to reach.
EVALUATION = ("max_eval_samples", "target_accuracy", "gate_statistic")

# Keys that change what is printed, kept or measured, never what is learnt.
WITHOUT_EFFECT = """
    output_dir report_to run_name project disable_tqdm log_level log_level_replica push_to_hub hub_model_id
    hub_private_repo save_strategy save_steps save_total_limit logging_steps logging_strategy
    logging_first_step eval_strategy eval_steps per_device_eval_batch_size eval_delay eval_on_start
    eval_accumulation_steps dataset_num_proc dataloader_pin_memory dataloader_num_workers
    dataloader_prefetch_factor dataloader_persistent_workers comparisons_per_step micro_batch_tokens
"""

# How the comparisons of a step are divided. With smaller batches, and as many more of them, a run goes on
# after it has run out of memory.
ACCUMULATION = ("per_device_train_batch_size", "gradient_accumulation_steps")

# Which checkpoints there are to choose the best from, and what they are compared on.
CHOOSING = "eval_strategy eval_steps eval_delay eval_on_start save_strategy save_steps max_eval_samples"


def changed_keys(recipe: Recipe, run: Path) -> list[str]:
    """The keys in which a recipe differs from a run's, where that changes what is learnt."""
    now, then = recipe.resolved(), saved_values(run)
    plateau = recipe.training.lr_scheduler_type == "reduce_lr_on_plateau"  # which follows evaluations
    without_effect = {*WITHOUT_EFFECT.split(), *CHECKPOINTING, *EVALUATION}
    without_effect |= {"train_sampling_strategy"} - recipe.values.keys()  # settled by base and data
    if recipe.training.load_best_model_at_end or plateau:
        without_effect -= set(CHOOSING.split())
    if math.prod(now[key] for key in ACCUMULATION) == math.prod(then.get(key, 0) for key in ACCUMULATION):
        without_effect |= set(ACCUMULATION)
    return [key for key in now if key not in without_effect and now[key] != then.get(key)]


def check_run_folder(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that this run may not use.

    Raises:
        RecipeError: it is used and neither flag is given, it is no run folder, it belongs to
            another recipe, or there is nothing to resume.
    """
    folder = recipe.output_dir
    used = is_run_folder(folder)
    there = {path.name for path in folder.iterdir() if not is_scratch(path)} if folder.is_dir() else set()
    fault = ""
    if resume and overwrite:
        fault = "--resume and --overwrite exclude each other"
    elif folder.is_file() or (there - {DATA_REPORT, BENCHMARK} and not used):
        fault = f"'output_dir: {folder}' is a file or not empty, and is not a run folder; choose another"
    elif used and not (resume or overwrite):
        fault = f"{folder} holds a run already; add --resume or --overwrite, or give another --output_dir"
    elif resume and not used:
        fault = f"{folder} holds no run to resume"
    elif resume and (folder / "run.json").is_file():
        fault = f"{folder} is finished; there is nothing to resume"
    elif resume and (changed := changed_keys(recipe, folder)):
        fault = f"{folder} was started with another recipe; resuming needs the same {', '.join(changed)}"
    if fault:
        raise RecipeError(fault)


def identity_of(train_split: Split, test_split: Split) -> dict[str, Any]:
    """What has to be the same for a resumed run to equal one that was never interrupted.

    Token ids besides texts, as a base's tokenizer or a template's file may be another one by now.
    """
    return {
        "train comparisons": train_split.fingerprint,
        "held-out comparisons": test_split.fingerprint,
        "token ids that tokenizer and chat template give": fingerprint_of_tokens(train_split.comparisons),
        "processes": PartialState().num_processes,
    }


def check_identity(run: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with other data, token ids or another number of processes.

    Args:
        then: a checkpoint's manifest.

    Raises:
        RecipeError: saying which.
    """
    for what, value in now.items():
        if then.get(what) != value:
            fault = f"the {what} are not those that {run} was started with; resuming needs the same"
            raise RecipeError(f"{fault}, --overwrite starts anew")


def check_data(run: Path, recipe: Recipe) -> None:
    """Compare the data as they are now with a finished run's; where nothing can be read, it is said.

    Raises:
        RecipeError: they changed.
    """
    try:
        trained, held_out, _ = load_splits(recipe)
    except DataError as error:
        warn(f"whether the data of {run} changed since training cannot be told: {error}")
        return
    refuse_other_data(run, held_out=held_out.fingerprint, train=trained.fingerprint)


def adopt(recipe: Recipe, run: Path) -> None:
    """Write into a finished run's recipe what it is measured on from now on, and what it has to reach."""
    then, now = saved_values(run), recipe.resolved()
    new = {key: now[key] for key in EVALUATION}
    if any(then.get(key) != value for key, value in new.items()):
        save_values(run / RUN_RECIPE, then | new)


def empty(folder: Path) -> None:
    """Remove a run from its folder: first what says that it is finished, last what says that it is a run."""
    order = {"run.json": 0, RUN_RECIPE: 2}
    for path in sorted(folder.iterdir(), key=lambda path: order.get(path.name, 1)):
        if path.name == BENCHMARK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# --- `run.json` --------------------------------------------------------------------------------


def run_record(trainer: SharedPrefixRewardTrainer, resumed_from: int, cost: dict[str, Any]) -> dict[str, Any]:
    """The content of `run.json`.

    Args:
        resumed_from: the step of the checkpoint that training went on from, else 0.
        cost: what the whole training took, as `Run` counts it.
    """
    training, state, train, test = trainer.args, trainer.state, trainer.train_split, trainer.test_split
    seconds = cost["train_seconds"]
    # A gradient norm may overflow in fp16's first steps; JSON has no number for that.
    log = [{key: x if math.isfinite(x) else None for key, x in entry.items()} for entry in state.log_history]
    of_steps = state.global_step * trainer.get_total_train_batch_size(training)
    seen = min(of_steps, round(len(train.comparisons) * (state.epoch or 0)))
    return {
        "seed": training.seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "data_fingerprints": {"train": train.fingerprint, "held_out": test.fingerprint},
        "comparisons": {"train": len(train.comparisons)},
        "prefix_sharing": vars(trainer.sharing),
        "micro_batch_tokens": trainer.data_collator.budget,
        "device": str(training.device),
        "processes": training.world_size,
        "steps": state.global_step,
        "resumed_from_step": resumed_from,
        "comparisons_per_s": seen / seconds,
        "tokens_per_s": trainer._total_train_tokens / seconds,
        **cost,
        "final_loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
        "log": log,
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that a result depends on."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **installed, "rm-recipe": __version__}


def git_commit() -> str | None:
    """The commit of the source that runs, None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
