"""The folder of a run: may it be used, is it the same run, and what of it is gone on from."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from rm_recipe.data.dataset import Split, fingerprint_of_tokens
from rm_recipe.data.splits import changed_data, check_held_out, load_splits
from rm_recipe.errors import INTERRUPTS, DataError, Interrupted, RecipeError
from rm_recipe.files import FolderLock, is_scratch, read_json, tidy
from rm_recipe.processes import say
from rm_recipe.recipe.reader import RUN_RECIPE, Recipe, is_run_folder, save_values, saved_values
from rm_recipe.recipe.schema import CHECKPOINTING
from rm_recipe.training.checkpoints import MANIFEST, newest_whole

DATA_REPORT = "data_report.json"
BENCHMARK = "benchmark.json"  # of the machine, not of a run: it may come first and it stays

# What a finished run is measured on, and what it has to reach.
EVALUATION = ("max_eval_samples", "target_accuracy", "gate_statistic")

# Keys that change what is printed, kept or measured, never what is learnt.
WITHOUT_EFFECT = """
    output_dir report_to run_name project disable_tqdm log_level log_level_replica push_to_hub hub_model_id
    hub_private_repo save_strategy save_steps save_total_limit logging_steps logging_strategy
    logging_first_step eval_strategy eval_steps per_device_eval_batch_size eval_delay eval_on_start
    eval_accumulation_steps dataset_num_proc dataloader_pin_memory dataloader_num_workers
    dataloader_prefetch_factor dataloader_persistent_workers
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
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    if folder.is_file() or (there - {DATA_REPORT, BENCHMARK} and not used):
        raise RecipeError(
            f"'output_dir: {folder}' is a file, or is not empty and is not a run folder; choose another one"
        )
    if used and not (resume or overwrite):
        raise RecipeError(
            f"{folder} holds a run already; add --resume to go on with it, --overwrite to start "
            "anew, or give another --output_dir"
        )
    if not resume:
        return
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


@dataclass
class Run:
    """The folder of a run that training works in.

    Attributes:
        checkpoint: to go on from, with its manifest; None to begin at the beginning.
        identity: what must not change between a run and its resumption; known once it has begun.
    """

    recipe: Recipe
    overwrite: bool
    checkpoint: Path | None = None
    manifest: dict[str, Any] | None = None
    faulty: dict[Path, str] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)

    def find_checkpoint(self) -> None:
        """Find what to go on from, and say what it is and which newer ones do not count."""
        folder, now = self.recipe.output_dir, self.recipe.resolved()
        if any(now[key] != saved_values(folder).get(key) for key in ACCUMULATION):
            say(
                "other batches than before, with as many comparisons a step: the same, but for rounding and, "
                "where they do not divide the data, an epoch's last step"
            )
        self.checkpoint, self.faulty = newest_whole(folder)
        for path, fault in self.faulty.items():
            say(f"warning: {path} does not count: {fault}")
        if self.checkpoint is None:
            say("no checkpoint to resume from: starting anew")
        else:
            self.manifest = read_json(self.checkpoint / MANIFEST)
            say(f"resuming from {self.checkpoint}")

    def begin(self, train_split: Split, test_split: Split) -> None:
        """Make the folder this run's and write the recipe; with `overwrite` remove the run before.

        Checkpoints that do not count go too, as rotation would keep them instead of whole ones.

        Raises:
            RecipeError: the data are not those that the checkpoint was trained on.
        """
        identity, folder, state = identity_of(train_split, test_split), self.recipe.output_dir, PartialState()
        if self.manifest:
            check_identity(folder, self.manifest, identity)
        self.identity = identity
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            if self.overwrite:
                empty(folder)
            tidy(folder)
            for checkpoint in self.faulty:
                shutil.rmtree(checkpoint)
            self.recipe.save(folder / RUN_RECIPE)
        state.wait_for_everyone()


@contextmanager
def open_run(recipe: Recipe, *, resume: bool, overwrite: bool) -> Iterator[Run]:
    """Check that a run may use its folder, keep other processes out, and choose the checkpoint to go on from.

    Raises:
        RecipeError: as `check_run_folder` does, or another process is at work in it.
        Interrupted: saying what is kept.
    """
    with INTERRUPTS.listening(), FolderLock(recipe.output_dir) as lock:
        run = Run(recipe, overwrite)
        try:
            if PartialState().is_main_process:
                lock.take()
            check_run_folder(recipe, resume=resume, overwrite=overwrite)
            if resume:
                run.find_checkpoint()
            yield run
        except KeyboardInterrupt:
            if not run.identity:
                raise Interrupted("interrupted before training began", INTERRUPTS.received) from None
            kept, _ = newest_whole(recipe.output_dir)
            what = f"{kept} is the newest checkpoint" if kept else "there is no checkpoint yet"
            raise Interrupted(f"interrupted; {what}", INTERRUPTS.received, resumable=True) from None


def identity_of(train_split: Split, test_split: Split) -> dict[str, Any]:
    """What has to be the same for a resumed run to equal one that was never interrupted.

    Token ids besides texts, as a base's tokenizer or a template's file may be another one by now.
    """
    return {
        "data_fingerprints": {"train": train_split.fingerprint, "held_out": test_split.fingerprint},
        "tokens": fingerprint_of_tokens(train_split.comparisons),
        "processes": PartialState().num_processes,
    }


def check_identity(run: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with other data, token ids or another number of processes.

    Args:
        then: a checkpoint's manifest.

    Raises:
        RecipeError: saying which.
    """
    same = {
        f"the {name.replace('_', '-')} comparisons": then["data_fingerprints"][name] == found
        for name, found in now["data_fingerprints"].items()
    }
    same["the token ids that tokenizer and chat template give"] = then["tokens"] == now["tokens"]
    same[f"{now['processes']} process(es)"] = then["processes"] == now["processes"]
    for what, unchanged in same.items():
        if not unchanged:
            raise RecipeError(
                f"{what} are not those that {run} was started with; resuming needs the same, --overwrite "
                "starts anew"
            )


def check_data(run: Path, recipe: Recipe, *, train: bool = False) -> None:
    """Compare the data as they are now with a finished run's.

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
