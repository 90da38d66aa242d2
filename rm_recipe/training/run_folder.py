"""The folder of a run: may it be used, is it the same run, and what of it is gone on from."""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from rm_recipe.data.dataset import Split, fingerprint_of_tokens
from rm_recipe.data.splits import changed_data, check_held_out, load_splits
from rm_recipe.errors import DataError, RecipeError
from rm_recipe.files import FolderLock, is_scratch, tidy
from rm_recipe.processes import say
from rm_recipe.recipe.reader import RUN_RECIPE, Recipe, is_run_folder, save_values, saved_values
from rm_recipe.recipe.schema import CHECKPOINTING
from rm_recipe.training.checkpoints import newest_whole

DATA_REPORT = "data_report.json"
BENCHMARK = "benchmark.json"  # of the machine, not of a run: it may come first and it stays

# What a finished run is measured on, and what it has to reach.
EVALUATION = ("max_eval_samples", "target_accuracy", "gate_statistic")

# Keys that change what is printed, kept or measured, never what is learnt.
WITHOUT_EFFECT = {
    "output_dir", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "logging_strategy",
    "logging_first_step", "report_to", "run_name", "project", "disable_tqdm", "eval_strategy", "eval_steps",
    "per_device_eval_batch_size", "eval_delay", "eval_on_start", "eval_accumulation_steps", *CHECKPOINTING,
    "dataset_num_proc", "log_level", "log_level_replica", "dataloader_pin_memory", "dataloader_num_workers",
    "dataloader_prefetch_factor", "dataloader_persistent_workers", *EVALUATION,
    "push_to_hub", "hub_model_id", "hub_private_repo",
}  # fmt: skip

# How the comparisons of a step are divided. With smaller batches, and as many more of them, a run goes on
# after it has run out of memory.
ACCUMULATION = ("per_device_train_batch_size", "gradient_accumulation_steps")

# Which checkpoints there are to choose the best from, and what they are compared on.
CHOOSING = {
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps",
    "max_eval_samples",
}  # fmt: skip


def changed_keys(recipe: Recipe, run: Path) -> list[str]:
    """The keys in which a recipe differs from a run's, where that changes what is learnt."""
    now, then = recipe.resolved(), saved_values(run)
    plateau = recipe.training.lr_scheduler_type == "reduce_lr_on_plateau"  # which follows evaluations
    evaluated = recipe.training.load_best_model_at_end or plateau
    without_effect = WITHOUT_EFFECT - (CHOOSING if evaluated else set())
    if math.prod(now[key] for key in ACCUMULATION) == math.prod(then.get(key, 0) for key in ACCUMULATION):
        without_effect |= set(ACCUMULATION)
    return [key for key in now if key not in without_effect and now[key] != then.get(key)]


def check_run_folder(
    recipe: Recipe, *, resume: bool, overwrite: bool, lock: FolderLock | None = None
) -> tuple[Path | None, dict[Path, str]]:
    """Whether this run may use its folder; the checkpoint to go on from, and those that do not count.

    Args:
        lock: taken if the folder is there and the run will write into it.

    Raises:
        RecipeError: it is used and neither flag is given, it is no run folder, it belongs to
            another recipe, or there is nothing to resume.
    """
    folder = recipe.output_dir
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    if folder.is_file():
        raise RecipeError(f"'output_dir: {folder}' is a file")
    if lock is not None and PartialState().is_main_process:
        lock.take()
    used = is_run_folder(folder)
    there = [path for path in folder.iterdir() if not is_scratch(path)] if folder.is_dir() else []
    if not used and {path.name for path in there} - {DATA_REPORT, BENCHMARK}:
        raise RecipeError(f"'output_dir: {folder}' is not empty and is not a run folder; choose another one")
    if used and not (resume or overwrite):
        raise RecipeError(
            f"{folder} holds a run already; add --resume to go on with it, --overwrite to start "
            "anew, or give another --output_dir"
        )
    if resume:
        if not used:
            raise RecipeError(f"{folder} holds no run to resume")
        if (folder / "run.json").is_file():
            raise RecipeError(f"{folder} is finished; there is nothing to resume")
        changed = changed_keys(recipe, folder)
        if changed:
            raise RecipeError(
                f"{folder} was started with another recipe; resuming needs the same values of: "
                f"{', '.join(changed)}"
            )
        if any(recipe.resolved()[key] != saved_values(folder).get(key) for key in ACCUMULATION):
            say(
                "other batches than before, with as many comparisons a step: the same, but for rounding and, "
                "where they do not divide the data, an epoch's last step"
            )
        checkpoint, faulty = newest_whole(folder)
        for path, fault in faulty.items():
            say(f"warning: {path} does not count: {fault}")
        say(f"resuming from {checkpoint}" if checkpoint else "no checkpoint to resume from: starting anew")
        return checkpoint, faulty
    return None, {}


def identity_of(train_split: Split, test_split: Split) -> dict[str, Any]:
    """What has to be the same for a resumed run to equal one that was never interrupted.

    Token ids besides texts, as a base's tokenizer or a template's file may be another one by now.
    """
    return {
        **data_identity(train_split, test_split),
        "tokens": fingerprint_of_tokens(train_split.comparisons),
        "processes": PartialState().num_processes,
    }


def data_identity(train_split: Split, test_split: Split) -> dict[str, dict[str, str]]:
    """What `run.json` and a checkpoint's manifest know a run's comparisons by."""
    return {"data_fingerprints": {"train": train_split.fingerprint, "held_out": test_split.fingerprint}}


def check_identity(run: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with other data, or with another number of processes.

    Args:
        then: a checkpoint's manifest.

    Raises:
        RecipeError: saying which.
    """
    if then["processes"] != now["processes"]:
        raise RecipeError(
            f"{run} was started with {then['processes']} process(es), and here are {now['processes']}: they "
            "would meet the comparisons in another order"
        )
    check_same_data(run, then, now)


def check_same_data(run: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with other data; `check_identity` without the processes."""
    if "tokens" not in then:
        raise RecipeError(
            f"{run} was started by an older version of rm_recipe, which knew its data by other fingerprints; "
            "go on with that version, or start anew with --overwrite"
        )
    for name, found in now["data_fingerprints"].items():
        if then["data_fingerprints"][name] != found:
            raise RecipeError(
                f"the {name.replace('_', '-')} comparisons are not those that {run} was started with; "
                "resuming needs the same data, --overwrite starts anew"
            )
    if then["tokens"] != now["tokens"]:
        raise RecipeError(
            f"the base's tokenizer or chat template gives other token ids than those that {run} was started "
            "with; resuming needs the same, --overwrite starts anew"
        )


def check_data(run: Path, recipe: Recipe, *, train: bool = False) -> None:
    """Compares the data as they are now with a finished run's.

    Where only train comparisons changed, or nothing can be read, it is said.

    Args:
        train: other train comparisons are a reason to refuse, too.

    Raises:
        RecipeError: what is held out changed.
    """
    try:
        trained, held_out, _ = load_splits(recipe)
    except DataError as error:
        say(f"warning: whether the data of {run} changed since training cannot be told: {error}")
        return
    check_held_out(run, held_out)
    if not changed_data(run, train=trained.fingerprint):
        return
    message = f"the train comparisons are not those that {run} was trained with: the data changed since"
    if train:
        raise RecipeError(f"{message}; restore the data, or train anew with --overwrite")
    say(f"warning: {message}")


def adopt(recipe: Recipe, run: Path) -> None:
    """Writes into a finished run's recipe what it is measured on from now on, and what it has to reach."""
    then, now = saved_values(run), recipe.resolved()
    new = {key: now[key] for key in EVALUATION}
    if any(then.get(key) != value for key, value in new.items()):
        save_values(run / RUN_RECIPE, then | new)


def claim_run_folder(recipe: Recipe, faulty: Iterable[Path], *, overwrite: bool, lock: FolderLock) -> None:
    """Makes the run folder and writes the recipe.

    Before that it removes the checkpoints that do not count, which rotation would keep instead of whole
    ones, and with `overwrite` everything.
    """
    folder, state = recipe.output_dir, PartialState()
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        lock.take()
        if overwrite:
            empty(folder)
        tidy(folder)
        for checkpoint in faulty:
            shutil.rmtree(checkpoint)
        recipe.save(folder / RUN_RECIPE)
    state.wait_for_everyone()


def empty(folder: Path) -> None:
    """Removes a run from its folder: first what says that it is finished, last what says that it is a run."""
    order = {"run.json": 0, RUN_RECIPE: 2}
    for path in sorted(folder.iterdir(), key=lambda path: order.get(path.name, 1)):
        if path.name == BENCHMARK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
