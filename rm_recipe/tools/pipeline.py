"""`rm-recipe run RECIPE`: prepare, train, evaluate, export; finished stages are skipped.

What `make train` calls. Training goes through `accelerate launch` with a configuration from
`accelerate_configs/`, in a process of its own.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from rm_recipe.data.augmentation import augment
from rm_recipe.data.splits import refuse_leakage
from rm_recipe.errors import INTERRUPTS, UNDER_RUN, Interrupted, RecipeError, TrainingError
from rm_recipe.evaluation.evaluate import evaluate, weights_of
from rm_recipe.evaluation.findings import HELD_OUT, gate
from rm_recipe.evaluation.report import print_evaluation
from rm_recipe.evaluation.summary import read_evaluation
from rm_recipe.exporting.export import export
from rm_recipe.exporting.push import check_destination, push
from rm_recipe.files import read_json
from rm_recipe.recipe.reader import Recipe, is_run_folder, read_recipe, shipped
from rm_recipe.recipe.schema import DEVICE_KEYS
from rm_recipe.tools.offline import FOLDERS, prepare_offline
from rm_recipe.training.checkpoints import newest_manifest
from rm_recipe.training.run_folder import adopt, changed_keys, check_data, check_identity, identity_of
from rm_recipe.training.train import load_data

CONFIGS = shipped("accelerate_configs")


def run(recipe_path: Path, overrides: Sequence[str], *, overwrite: bool = False) -> None:
    """Go from a recipe to an exported reward model, saying what is done and what is skipped.

    With `push_to_hub: true` the export is uploaded at the end.

    Args:
        overrides: `--key value` strings for the recipe.
        overwrite: start anew where a run is there already.

    Raises:
        RecipeError: the recipe is wrong, or the run folder holds a run of another recipe.
        TrainingError: training failed; what it printed says why.
        PushError: the export could not be uploaded.
    """
    recipe = read_recipe(recipe_path, overrides, check_inputs=False)
    repository = str(recipe.hub.hub_model_id)
    if recipe.hub.push_to_hub:  # hours before it is needed
        check_destination(repository)
    prepare(recipe)
    recipe = read_recipe(recipe_path, overrides)
    folder = recipe.output_dir
    train_or_skip(recipe, recipe_path, overrides, overwrite=overwrite)
    evaluation = evaluate_or_skip(recipe)
    if is_exported(folder):
        stage("export", f"finished already, skipped: {folder}/export")
    else:
        stage("export", str(folder / "export"))
        print_export(export(folder, overwrite=True))
    print()
    print_evaluation(evaluation, [HELD_OUT])
    print_summary(folder)
    if recipe.hub.push_to_hub:
        stage("push", repository)
        print(push(folder / "export", repository, private=bool(recipe.hub.hub_private_repo)))


def is_exported(folder: Path) -> bool:
    """Whether a run's export is proven, and has the run's evaluation as it is now."""
    try:
        proof, exported = (read_json(folder / "export" / f"{name}.json") for name in ("proof", "evaluation"))
        return bool(proof["passed"]) and exported == read_evaluation(folder)
    except (RecipeError, KeyError):
        return False


def train_or_skip(recipe: Recipe, path: Path, overrides: Sequence[str], *, overwrite: bool) -> None:
    """Train, or go on with an interrupted run of the same recipe; leave a finished one.

    Raises:
        RecipeError: the folder holds a run of another recipe, or of other data.
        TrainingError: training failed.
    """
    folder = recipe.output_dir
    before = is_run_folder(folder) and not overwrite
    finished = before and (folder / "run.json").is_file()
    changed = changed_keys(recipe, folder) if before else []
    if finished:  # on another machine they may be others, unless they are asked for
        asked = {word.partition("=")[0].removeprefix("--") for word in overrides}
        changed = [key for key in changed if key in asked or key not in DEVICE_KEYS]
    if changed:
        raise RecipeError(
            f"{folder} holds a run of another recipe (other {', '.join(changed)}); add "
            "--overwrite to replace it, or give another --output_dir"
        )
    if finished:
        check_data(folder, recipe)
        stage("train", f"finished already, skipped: {folder}/model")
        adopt(recipe, folder)
    else:
        stage("train", "resuming" if before else str(path))
        examine_data(recipe, resume=before)
        launch_training(recipe, path, overrides, "--resume" if before else "--overwrite")


def examine_data(recipe: Recipe, *, resume: bool) -> None:
    """Say what is wrong with the data, with its own exit code, before a training is started.

    Raises:
        RecipeError, DataError: as `train` does.
    """
    tokenizer, train, test, leakage = load_data(recipe)
    refuse_leakage(leakage)
    manifest = newest_manifest(recipe.output_dir) if resume else None
    if manifest:
        now = identity_of(augment(recipe, tokenizer, train), test)
        check_identity(recipe.output_dir, manifest, now)


def evaluate_or_skip(recipe: Recipe) -> dict[str, Any]:
    """Evaluate a run, unless its model was on these comparisons, by this gate."""
    folder = recipe.output_dir
    before = read_evaluation(folder)
    figures, then = before.get("datasets", {}).get(HELD_OUT), before.get("recipe") or {}
    same = before.get("weights") == weights_of(str(folder))
    same = same and then.get("max_eval_samples") == recipe.data.max_eval_samples
    if figures and same and before.get("gate") == gate(figures, recipe):
        stage("evaluate", f"finished already, skipped: {folder}/evaluation.json")
        return before
    stage("evaluate", "held-out comparisons")
    return evaluate(str(folder))


def stage(name: str, what: str) -> None:
    """Announce a stage."""
    print(f"\n[{name}] {what}", flush=True)


def prepare(recipe: Recipe) -> None:
    """Make the offline base model and data where the recipe names them."""
    named = {recipe.values.get("model_name_or_path"), recipe.values.get("dataset_name")}
    for line in prepare_offline([path for path in FOLDERS if str(path) in named]):
        print(f"[prepare] {line}", flush=True)


def launch_training(recipe: Recipe, path: Path, overrides: Sequence[str], flag: str) -> None:
    """Train in a process of its own, through `accelerate launch`.

    It gets a session of its own, so that Ctrl-C reaches it through us alone: accelerate answers
    every signal with a traceback.

    Raises:
        TrainingError: it failed.
        Interrupted: by a signal, after the training process has ended.
    """
    name = "cpu.yaml" if recipe.training.use_cpu else "single_gpu.yaml"
    own = Path("accelerate_configs", name)  # as `init` writes it, to be changed
    config = own if own.is_file() else CONFIGS / name
    # As many threads as accelerate would choose anyway, which it otherwise warns about.
    threads = os.environ.get("OMP_NUM_THREADS", str(psutil.cpu_count(logical=False) or 1))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--num_cpu_threads_per_process", threads, "--config_file", str(config)]
    command += ["-m", "rm_recipe", "train", str(path), *overrides, flag]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, UNDER_RUN: "1"})
    with INTERRUPTS.listening():
        try:
            code = process.wait()
        except KeyboardInterrupt:
            number = INTERRUPTS.received or signal.SIGINT
            pass_on(number, process)
            anew = flag == "--overwrite" and (recipe.output_dir / "run.json").is_file()  # still the old run's
            go_on = shlex.join(["rm-recipe", "run", str(path), *overrides, *["--overwrite"] * anew])
            raise Interrupted(f"go on with: {go_on}", number) from None
    if code:
        raise TrainingError("training failed; its message stands above")


def pass_on(number: int, launcher: subprocess.Popen[bytes]) -> None:
    """Send a signal to what the launcher started, or to itself if that is nothing, and wait for its end.

    That saves first. Another signal meanwhile is passed on as well. On Windows psutil sends no SIGINT, and
    need not: the console gives Ctrl-C to all its processes.
    """
    while launcher.poll() is None:
        process = psutil.Process(launcher.pid)
        with suppress(psutil.NoSuchProcess, ValueError):
            for target in process.children() or [process]:
                target.send_signal(number)
        with suppress(KeyboardInterrupt):
            launcher.wait()


def print_export(proof: dict[str, Any]) -> None:
    """Print how the export was proven, in a few lines."""
    moved, steps = proof["max_abs_diff"], proof["steps"]
    print(
        f"{proof['n_sequences']} held-out replies scored again by plain transformers from the exported\n"
        f"files: equal to {moved['fresh_process']:.0e}. Its pipeline and TRL's RLOOTrainer get the same.\n"
        f"Merging in fp32 moved rewards by at most {steps['merge']:.0e}; rounding, in the evaluation\n"
        f"and in the merged weights, by {moved['merged']:.3f}."
    )


def print_summary(folder: Path) -> None:
    """Print what it took, where everything is, and what to try next."""
    record = read_json(folder / "run.json")
    minutes, gigabytes = record["train_seconds"] / 60, record["peak_memory_bytes"] / 1e9
    print(
        f"Trained in {minutes:.1f} minutes, {record['comparisons_per_s']:.1f} comparisons/s, "
        f"at most {gigabytes:.1f} GB.\n\n"
        f"  {folder}/export: the reward model, merged: load it with transformers\n"
        f"  {folder}/report.html: what it learnt and where it errs, in pictures\n\n"
        f"Try next{'' if shutil.which('rm-recipe') else ' (`source .venv/bin/activate` first)'}:\n"
        f"  rm-recipe score {folder}/export \\\n"
        '      --prompt "How was your weekend?" --response "Great, we went hiking!"\n'
        f"  rm-recipe evaluate {folder} --dataset YOUR_COMPARISONS.jsonl\n"
        f"  rm-recipe run {folder}/recipe.yaml --seed 1 --output_dir outputs/s1\n"
    )
