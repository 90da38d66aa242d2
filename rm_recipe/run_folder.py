"""The folder of a run: may it be used, is it the same run, and what of it is gone on from."""

import math
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState

from rm_recipe.artifacts import is_scratch, tidy
from rm_recipe.checkpoints import newest_whole
from rm_recipe.distribution import say
from rm_recipe.errors import RecipeError
from rm_recipe.fitting import CHECKPOINTING
from rm_recipe.recipe import RUN_RECIPE, Recipe, is_run_folder, saved_values
from rm_recipe.split import Split

DATA_REPORT = "data_report.json"
BENCHMARK = "benchmark.json"  # of the machine, not of a run: it may come first and it stays

# Keys that change what is printed or kept, never what is learnt.
WITHOUT_EFFECT = {
    "output_dir", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "logging_strategy",
    "logging_first_step", "report_to", "run_name", "project", "disable_tqdm", "eval_strategy", "eval_steps",
    "per_device_eval_batch_size", *CHECKPOINTING,
    "dataset_num_proc", "log_level", "log_level_replica", "dataloader_pin_memory",
    "push_to_hub", "hub_model_id", "hub_private_repo", "do_train", "do_eval", "do_predict",
}  # fmt: skip

# How the comparisons of a step are divided. With smaller batches, and as many more of them, a run goes on
# after it has run out of memory.
ACCUMULATION = ("per_device_train_batch_size", "gradient_accumulation_steps")

# Which checkpoints there are to choose the best from.
CHOOSING = {"eval_strategy", "eval_steps", "save_strategy", "save_steps"}


class FolderLock:
    """Keeps other processes from working in a run's folder while this one does, by `flock` on the folder.

    A process that was killed holds none. Where the system or the disk knows no such lock, there is none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._held = folder, -1

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def take(self) -> None:
        """Takes it once the folder is there.

        Raises:
            RecipeError: another process has it.
        """
        if self._held >= 0 or not self._folder.is_dir():
            return
        with suppress(ImportError):
            import fcntl

            self._held = os.open(self._folder, os.O_RDONLY)
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.__exit__()
                raise RecipeError(
                    f"another process is at work in {self._folder}: wait for it, or end it"
                ) from None
            except OSError:
                self.__exit__()


def changed_keys(recipe: Recipe, run: Path) -> list[str]:
    """The keys in which a recipe differs from a run's, where that changes what is learnt."""
    now, then = recipe.resolved(), saved_values(run)
    without_effect = WITHOUT_EFFECT - (CHOOSING if recipe.training.load_best_model_at_end else set())
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
    """What has to be the same for a resumed run to equal one that was never interrupted."""
    return {
        "data_fingerprints": {
            "train": train_split.comparisons._fingerprint,
            "held_out": test_split.comparisons._fingerprint,
        },
        "processes": PartialState().num_processes,
    }


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
    for name, fingerprint in now["data_fingerprints"].items():
        if then["data_fingerprints"][name] != fingerprint:
            raise RecipeError(
                f"the {name.replace('_', '-')} comparisons are not those that {run} was started with; "
                "resuming needs the same data, --overwrite starts anew"
            )


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
