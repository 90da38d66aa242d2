"""`rm-recipe benchmark RECIPE`: this trainer and stock `trl.RewardTrainer` on the same samples.

Both train the same base on the same comparisons in the same order, from the same weights, in the
recipe's precision, each time in a fresh process and in turns, because a machine's speed drifts.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.evaluation.format import print_table, print_text
from rm_recipe.files import write_json
from rm_recipe.processes import NO_MEMORY
from rm_recipe.recipe.reader import Recipe
from rm_recipe.training.run_folder import BENCHMARK, check_run_folder, versions
from rm_recipe.training.train import load_data

STOCK_BATCHES = (1, 2, 4, 8, 16, 32)  # per device: large ones pay for padding, small ones for idle arithmetic
# Of a measurement's recipe: nothing but training, in this process alone.
OVERRIDES = """
    --save_strategy no --eval_strategy no --logging_strategy no --report_to [] --disable_tqdm true
    --load_best_model_at_end false --dataloader_num_workers 0 --dataloader_persistent_workers false
    --train_sampling_strategy random
"""


def benchmark(
    recipe: Recipe, *, steps: int, repeats: int, stock_batch: int | None = None, output: Path | None = None
) -> dict[str, Any]:
    """Measure, print a table and write `benchmark.json`.

    Args:
        steps: optimizer steps of each training; the first warms up and is not timed.
        repeats: how often each is measured, in turns; medians count.
        stock_batch: stock's best per-device batch where it is known; else it is looked for.
        output: the folder of `benchmark.json`, by default the recipe's `output_dir`.

    Raises:
        RecipeError: there is nothing to compare, as stock TRL takes pairs only; or too few comparisons.
        TrainingError: a measurement failed; the message has the end of what it printed. Stock TRL or
            the padded scoring loop running out of memory is a result, not a failure.
    """
    target = output or recipe.output_dir
    if output is None:
        check_run_folder(recipe, resume=False, overwrite=True)
    check_comparable(recipe, steps, stock_batch)
    target.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix="rm-recipe-benchmark-") as folder:
        train = partial(measure_training, recipe, Path(folder))
        stock_batch = stock_batch or best_batch(recipe, train)
        results = in_turns(train, stock_batch, steps, repeats)
        scoring = measure(recipe, Path(folder), "scoring", str(repeats))
    setting = {"steps": steps, "repeats": repeats, "stock_batch": stock_batch, "recipe": recipe.resolved()}
    content = {"machine": machine(), "setting": setting, **summarise(results, scoring)}
    write_json(target / BENCHMARK, content)
    print_benchmark(content)
    print(f"written: {target / BENCHMARK}")
    return content


def check_comparable(recipe: Recipe, steps: int, stock_batch: int | None) -> None:
    """Raise RecipeError where stock TRL cannot train on the same samples; reads the data."""
    batch = recipe.training.train_batch_size * recipe.training.gradient_accumulation_steps
    if stock_batch is not None and batch % stock_batch:
        raise RecipeError(f"--stock-batch has to divide the effective batch of {batch}")
    comparisons = load_data(recipe)[1].comparisons  # what is wrong with the data is said once, here
    if any(len(ranks) != 2 for ranks in comparisons["ranks"]):
        raise RecipeError("benchmark needs pairs: stock TRL has no loss for rankings of three and more")
    if len(comparisons) < batch * steps:
        raise RecipeError(
            f"benchmark needs {batch * steps} comparisons for {steps} steps; the data has fewer"
        )


def measure_training(
    recipe: Recipe, folder: Path, what: str, batch: int | None, steps: int
) -> dict[str, Any] | None:
    """What `benchmark_worker.measure_training` says of `stock` or `ours`; None where memory is not enough.

    Args:
        batch: comparisons of a micro-batch, by default the recipe's; the effective batch stays.
    """
    size = recipe.training.train_batch_size
    batch = batch or size
    accumulated = size * recipe.training.gradient_accumulation_steps // batch
    keys = f"--max_steps {steps} --per_device_train_batch_size {batch} --gradient_accumulation_steps"
    result = measure(recipe, folder, what, *keys.split(), str(accumulated))
    found = f"{result['comparisons_per_s']:.2f} comparisons/s" if result else "not enough memory"
    print(f"{what}, per-device batch {batch}: {found}", flush=True)
    return result


def measure(recipe: Recipe, folder: Path, what: str, *words: str) -> dict[str, Any] | None:
    """The result of `benchmark_worker` in a fresh process, None where memory is not enough.

    Raises:
        TrainingError: it failed otherwise.
    """
    path, result = folder / "recipe.yaml", folder / "result.json"
    recipe.save(path)
    command = [sys.executable, "-m", "rm_recipe.tools.benchmark_worker", what, str(path), str(result), *words]
    done = run_worker([*command, *OVERRIDES.split(), "--output_dir", str(folder / "run")])
    return dict(json.loads(result.read_text(encoding="utf-8"))) if done else None


def run_worker(command: list[str]) -> bool:
    """Run a measurement; whether there was memory enough.

    Raises:
        TrainingError: it failed otherwise.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    killed = done.returncode == -9  # by SIGKILL, as the kernel does where memory is full
    if killed or (done.returncode and re.search(NO_MEMORY, done.stdout)):
        return False
    if done.returncode:
        raise TrainingError("a measurement failed:\n" + "\n".join(done.stdout.splitlines()[-12:]))
    return True


def best_batch(recipe: Recipe, train: Any) -> int:
    """Find stock's fastest batch: the recipe's own, or one of `STOCK_BATCHES` that divides its step."""
    configured = recipe.training.train_batch_size
    batch = configured * recipe.training.gradient_accumulation_steps
    speeds = {configured: 0.0}
    for size in sorted({size for size in STOCK_BATCHES if batch % size == 0} | {configured}):
        result = train("stock", size, 2)
        if result is None:  # what is larger needs more memory, too
            break
        speeds[size] = result["comparisons_per_s"]
    return max(speeds, key=lambda size: speeds[size])


def in_turns(train: Any, stock_batch: int, steps: int, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Each repeat's measurement of the three trainers; none of a stock trainer that ran out of memory once.

    Raises:
        TrainingError: this project's own does.
    """
    batches = {"stock": None, "stock_tuned": stock_batch, "ours": None}
    results: dict[str, list[Any]] = {name: [] for name in batches}
    for _ in range(repeats):
        for name, found in results.items():
            if None not in found:
                found.append(train(name.partition("_")[0], batches[name], steps))
    if None in results["ours"]:
        raise TrainingError("ours: the recipe's batch needs more memory than there is")
    return {name: [] if None in found else found for name, found in results.items()}


def machine() -> dict[str, Any]:
    """What it ran on."""
    listed = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"model name\s*: (.+)", listed)
    return {
        "cpu": named[1] if named else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
    }


# --- medians, ratios, and the table that is printed --------------------------------------------


def summarise(results: dict[str, list[dict[str, Any]]], scoring: dict[str, Any] | None) -> dict[str, Any]:
    """Medians over repeats, and ratios as medians of each repeat's ratio, so that slow spells cancel.

    Args:
        results: of `stock`, `stock_tuned` and `ours` each repeat's `benchmark_worker.measure_training`; an
            empty list for a stock trainer that ran out of memory.
        scoring: `benchmark_worker.measure_scoring`, None if that ran out of memory.

    Returns:
        the figures of `benchmark.json`. What has no measurement, and every ratio to it, is None. The
        tuned ratio is to the better of stock's two batches.
    """

    def ratio(key: str, *stock: str) -> float | None:
        """Ours to the larger of stock's."""
        theirs = [[result[key] for result in results[name]] for name in stock if results[name]]
        if not theirs:
            return None
        ours = [result[key] for result in results["ours"]]
        return statistics.median(own / max(other) for own, *other in zip(ours, *theirs, strict=True))

    content: dict[str, Any] = {name: _medians(repeats) for name, repeats in results.items()}
    content["ratio"] = {
        "comparisons_per_s": ratio("comparisons_per_s", "stock"),
        "peak_memory": ratio("peak_memory_bytes", "stock"),
        "tuned_comparisons_per_s": ratio("comparisons_per_s", "stock_tuned", "stock"),
        "scoring": scoring and scoring["ratio"],
    }
    content["max_loss_difference"], stock = None, results["stock"] or results["stock_tuned"]
    if stock:  # the same samples at either batch
        pairs = zip(stock[0]["losses"], results["ours"][0]["losses"], strict=True)
        content["max_loss_difference"] = max(abs(a - b) for a, b in pairs)
    content["scoring"] = scoring
    return content


def _medians(repeats: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of each figure the median, and the losses, which are the same each time; None of no repeats."""
    if not repeats:
        return None
    figures = [key for key in repeats[0] if key != "losses"]
    medians = {key: statistics.median(result[key] for result in repeats) for key in figures}
    return medians | {"losses": repeats[0]["losses"]}


def print_benchmark(content: dict[str, Any]) -> None:
    """Print the figures as a table of 80 columns, and the ratios in words.

    Args:
        content: what `benchmark.json` holds.
    """
    ratio, scoring = content["ratio"], content["scoring"]
    tuned, rows = f"stock, batch {content['setting']['stock_batch']}", []
    for key, name in (("stock", "stock TRL"), ("stock_tuned", tuned), ("ours", "rm_recipe")):
        cells = ["out of memory"]
        if figures := content[key]:
            cells = [f"{figures['comparisons_per_s']:.2f}", f"{figures['tokens_per_s']:.0f}"]
            cells += [f"{figures['padding_share']:.0%}", f"{figures['peak_memory_bytes'] / 1e9:.2f} GB"]
            cells += [f"{figures['tflops']:.3g}"]
        rows.append([name, *cells])
    head = ("trainer", "comparisons/s", "tokens/s", "padding", "peak memory", "TFLOP/s")
    print_table("Training", head, rows)
    for key, sentence in (
        ("comparisons_per_s", "{:.2f} times stock TRL's speed, {peak_memory:.2f} of its memory"),
        ("tuned_comparisons_per_s", "{:.2f} times stock TRL's speed at its best batch"),
        ("scoring", "Scoring: {:.2f} times the speed of padded batches in the data's order"),
    ):
        if ratio[key]:
            print_text(sentence.format(ratio[key], **ratio))
    if content["max_loss_difference"] is not None:
        rewards = f"; rewards by at most {scoring['max_reward_difference']:.1e}" if scoring else ""
        losses = f"Losses differ by at most {content['max_loss_difference']:.1e}"
        print_text(f"{losses}{rewards}.")
