"""`rm-recipe run RECIPE`: prepare, train, evaluate, export; finished stages are skipped.

What `make train` calls. Training goes through `accelerate launch` with a configuration from
`accelerate_configs/`, in a process of its own.
"""

import json
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

from rm_recipe.errors import INTERRUPTS, UNDER_RUN, Interrupted, RecipeError, TrainingError
from rm_recipe.files import read_json
from rm_recipe.recipe.reader import Recipe, is_run_folder, read_recipe, shipped
from rm_recipe.recipe.schema import DEVICE_KEYS

CONFIGS = shipped("accelerate_configs")


def run(recipe_path: Path, overrides: Sequence[str], *, overwrite: bool = False) -> None:
    """Goes from a recipe to an exported reward model, and says what it does and what it skips.

    With `push_to_hub: true` the export is uploaded at the end.

    Args:
        overrides: `--key value` strings for the recipe.
        overwrite: start anew where a run is there already.

    Raises:
        RecipeError: the recipe is wrong, or the run folder holds a run of another recipe.
        TrainingError: training failed; what it printed says why.
        PushError: the export could not be uploaded.
    """
    from rm_recipe.evaluation.findings import HELD_OUT
    from rm_recipe.evaluation.report import print_evaluation
    from rm_recipe.exporting.export import export
    from rm_recipe.exporting.push import check_destination
    from rm_recipe.training.run_folder import adopt, changed_keys, check_data

    recipe = read_recipe(recipe_path, overrides, check_inputs=False)
    if recipe.hub.push_to_hub:  # hours before it is needed
        check_destination(str(recipe.hub.hub_model_id))
    prepare(recipe)
    recipe = read_recipe(recipe_path, overrides)
    folder = recipe.output_dir

    before = is_run_folder(folder) and not overwrite
    finished = before and (folder / "run.json").is_file()
    if before:
        changed = [key for key in changed_keys(recipe, folder) if not (finished and key in DEVICE_KEYS)]
        if changed:
            raise RecipeError(
                f"{folder} holds a run of another recipe ({', '.join(changed)} differ); add "
                "--overwrite to replace it, or give another --output_dir"
            )
    if finished:
        check_data(folder, recipe, train=True)
        skip("train", folder / "model")
        adopt(recipe, folder)
    else:
        stage("train", "resuming" if before else str(recipe_path))
        examine_data(recipe, resume=before)
        launch_training(recipe, recipe_path, overrides, "--resume" if before else "--overwrite")
    evaluation = evaluate_run(recipe)
    if is_exported(folder):
        skip("export", folder / "export")
    else:
        stage("export", str(folder / "export"))
        print_export(export(folder, overwrite=True))
    print()
    print_evaluation(evaluation, [HELD_OUT])
    print_summary(folder, recipe_path)
    if recipe.hub.push_to_hub:
        push_export(recipe)


def examine_data(recipe: Recipe, *, resume: bool) -> None:
    """Says what is wrong with the data, with its own exit code, before a training is started.

    Raises:
        RecipeError, DataError: as `train` does.
    """
    from rm_recipe.data.splits import refuse_leakage
    from rm_recipe.training.checkpoints import newest_manifest
    from rm_recipe.training.run_folder import check_identity, identity_of
    from rm_recipe.training.train import load_data

    _, train, test, leakage = load_data(recipe)
    refuse_leakage(recipe, leakage)
    manifest = newest_manifest(recipe.output_dir) if resume else None
    if manifest:
        check_identity(recipe.output_dir, manifest, identity_of(train, test))


def evaluate_run(recipe: Recipe) -> dict[str, Any]:
    """Evaluates a run, unless its model was on these comparisons; judges it anew by another gate."""
    from rm_recipe.evaluation.evaluate import evaluate, judge_anew, weights_of
    from rm_recipe.evaluation.findings import HELD_OUT, gate
    from rm_recipe.evaluation.summary import read_evaluation

    folder = recipe.output_dir
    before = read_evaluation(folder)
    figures, then = before.get("datasets", {}).get(HELD_OUT), before.get("recipe") or {}
    same_model = before.get("weights") == weights_of(str(folder))
    if not (figures and same_model and then.get("max_eval_samples") == recipe.data.max_eval_samples):
        stage("evaluate", "held-out comparisons")
        return evaluate(str(folder))
    if before.get("gate") == gate(figures, recipe):
        skip("evaluate", folder / "evaluation.json")
        return before
    stage("evaluate", "the gate alone: the comparisons were scored already")
    return judge_anew(folder)


def is_exported(folder: Path) -> bool:
    """Whether a run's export is proven, file by file, and has the run's evaluation as it is now."""
    export = folder / "export"
    try:
        proof, shown = read_json(export / "proof.json"), read_json(export / "evaluation.json")
        current = proof["passed"] and proof["files"] and "ppo" in proof["contracts"]  # older ones lack it
        return bool(current) and shown == read_json(folder / "evaluation.json")
    except (RecipeError, KeyError):
        return False


def push_export(recipe: Recipe) -> None:
    """Uploads what `run` has exported to where the recipe says.

    Raises:
        RecipeError, PushError: as `push.push` does; the export stays.
    """
    from rm_recipe.exporting.push import push

    stage("push", str(recipe.hub.hub_model_id))
    private = bool(recipe.hub.hub_private_repo)
    print(push(recipe.output_dir / "export", str(recipe.hub.hub_model_id), private=private))


def stage(name: str, what: str) -> None:
    """Announces a stage."""
    print(f"\n[{name}] {what}", flush=True)


def skip(name: str, what: Path) -> None:
    """Announces a stage that is finished already."""
    print(f"[{name}] finished already, skipped: {what}", flush=True)


def prepare(recipe: Recipe) -> None:
    """Makes the offline base model and data where the recipe names them."""
    from rm_recipe.tools.offline import FOLDERS, prepare_offline

    named = {recipe.values.get("model_name_or_path"), recipe.values.get("dataset_name")}
    for line in prepare_offline([path for path in FOLDERS if str(path) in named]):
        print(f"[prepare] {line}", flush=True)


def launch_training(recipe: Recipe, path: Path, overrides: Sequence[str], flag: str) -> None:
    """Trains in a process of its own, through `accelerate launch`.

    It gets a session of its own, so that Ctrl-C reaches it through us alone: accelerate answers
    every signal with a traceback.

    Raises:
        TrainingError: it failed.
        Interrupted: by a signal, after the training process has ended.
    """
    command = [sys.executable, "-m", "rm_recipe", "train", str(path), *overrides, flag]
    config = CONFIGS / ("cpu.yaml" if recipe.training.use_cpu else "single_gpu.yaml")
    if config.is_file():  # not there when the package is installed without its repository
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
        # As many threads as accelerate would choose anyway, which it otherwise warns about.
        threads = os.environ.get("OMP_NUM_THREADS", str(psutil.cpu_count(logical=False) or 1))
        launcher += ["--num_cpu_threads_per_process", threads]
        command = [*launcher, "--config_file", str(config), *command[1:]]
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
    """Sends a signal to what the launcher started, or to itself if that is nothing, and waits for its end.

    That saves first. Another signal meanwhile is passed on as well.
    """
    while launcher.poll() is None:
        process = psutil.Process(launcher.pid)
        with suppress(psutil.NoSuchProcess):
            for target in process.children() or [process]:
                target.send_signal(number)
        with suppress(KeyboardInterrupt):
            launcher.wait()


def print_export(proof: dict[str, Any]) -> None:
    """How the export was proven, in a few lines."""
    moved, steps = proof["max_abs_diff"], proof["steps"]
    print(
        f"{proof['n_sequences']} held-out replies scored again by plain transformers from the exported\n"
        f"files: equal to {moved['fresh_process']:.0e}. Its pipeline and TRL's RLOOTrainer get the same.\n"
        f"Merging in fp32 moved rewards by at most {steps['merge']:.0e}; half precision, in the "
        f"evaluation\nand in the merged weights, by {moved['merged']:.3f}."
    )


def print_summary(folder: Path, recipe_path: Path) -> None:
    """Where everything is, and what to try next."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    minutes, gigabytes = record["train_seconds"] / 60, record["peak_memory_bytes"] / 1e9
    print(
        f"Trained in {minutes:.1f} minutes, {record['comparisons_per_s']:.1f} comparisons/s, "
        f"at most {gigabytes:.1f} GB.\n"
    )
    for name, what in (
        ("export", "the reward model, merged: load it with transformers"),
        ("model", "the trained adapter and head"),
        ("report.html", "what it learnt and where it errs, in pictures: open it in a browser"),
        ("evaluation.json", "every figure; predictions.jsonl: every comparison"),
        ("run.json", "seed, versions, cost, training log"),
    ):
        print(f"  {folder / name}\n      {what}")
    print(
        f"\nTry next{'' if shutil.which('rm-recipe') else ' (`source .venv/bin/activate` first)'}:\n"
        f"  rm-recipe score {folder}/export \\\n"
        '      --prompt "How was your weekend?" --response "Great, we went hiking!"\n'
        f"  rm-recipe evaluate {folder} --dataset YOUR_COMPARISONS.jsonl\n"
        f"  rm-recipe run {recipe_path} --seed 1 --output_dir outputs/s1\n"
    )
