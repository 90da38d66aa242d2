"""`rm-recipe benchmark RECIPE`: this trainer and stock `trl.RewardTrainer` on the same samples.

Both train the same base on the same comparisons in the same order, from the same weights, in the
recipe's precision, each time in a fresh process and in turns, because a machine's speed drifts.
"""

import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from rm_recipe.artifacts import write_json
from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.recipe import Recipe
from rm_recipe.run_record import PACKAGES, package_version
from rm_recipe.train import BENCHMARK, check_run_folder, load_data

# Dense bf16/fp16 peak in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "T4": 65e12,
}  # fmt: skip
Measure = Callable[..., dict[str, Any]]


def benchmark(
    recipe: Recipe, *, steps: int, repeats: int, stock_batch: int | None = None, output: Path | None = None
) -> dict[str, Any]:
    """Measures, prints a table and writes `benchmark.json`.

    Args:
        steps: optimizer steps of each training; the first warms up and is not timed.
        repeats: how often each is measured, in turns; medians count.
        stock_batch: stock's best per-device batch where it is known; else it is looked for.
        output: the folder of `benchmark.json`, by default the recipe's `output_dir`.

    Raises:
        RecipeError: there is nothing to compare, as stock TRL takes pairs only.
        TrainingError: a measurement failed; the message has the end of what it printed.
    """
    if steps < 2 or repeats < 1:
        raise RecipeError("benchmark needs --steps of at least 2 (the first warms up) and 1 --repeats")
    target = output or recipe.output_dir
    if output is None:
        check_run_folder(recipe, resume=False, overwrite=True)
    training = recipe.training
    batch = training.train_batch_size * training.gradient_accumulation_steps
    train_split = load_data(recipe)[1]  # what is wrong with the data is said once, here
    if any(len(ranks) != 2 for ranks in train_split.comparisons["ranks"]):
        raise RecipeError("benchmark needs pairs: stock TRL has no loss for rankings of three and more")
    if stock_batch is not None and (stock_batch < 1 or batch % stock_batch):
        raise RecipeError(f"--stock-batch has to divide the effective batch of {batch}")
    if len(train_split.comparisons) < batch * steps:
        raise RecipeError(
            f"benchmark needs {batch * steps} comparisons for {steps} steps; the data has fewer"
        )
    target.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix="rm-recipe-benchmark-") as folder:
        measure = _measuring(recipe, Path(folder), steps)
        tried: dict[int, float | None] = {}
        if stock_batch is None:
            stock_batch, tried = best_batch_size(batch, training.train_batch_size, measure)
        sizes = {"stock": None, "stock_tuned": stock_batch, "ours": None}
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in sizes}
        for repeat in range(repeats):
            for name, size in sizes.items():
                try:
                    result = measure("ours" if name == "ours" else "stock", size)
                except OutOfMemoryError:
                    raise OutOfMemoryError(f"{name}: this batch needs more memory than there is") from None
                results[name].append(result)
                _say(f"{repeat + 1} of {repeats}: {name:11} {_speed(result):6.2f} comparisons/s")
        scoring = measure("scoring", repeats=repeats)
    content = summarise(results, scoring) | {"machine": machine(), "setting": setting(recipe, steps, repeats)}
    content["stock_tuned"] |= {"per_device_train_batch_size": stock_batch, "tried": tried}
    print_benchmark(content)
    write_json(target / BENCHMARK, content)
    print(f"written: {target / BENCHMARK}")
    return content


def _say(line: str) -> None:
    print(line, flush=True)


# --- measuring -------------------------------------------------------------------------------


def _measuring(recipe: Recipe, folder: Path, steps: int) -> Measure:
    """A function that runs `benchmark_worker` in a fresh process."""
    path, batch = folder / "recipe.yaml", recipe.training.train_batch_size
    recipe.save(path)
    effective = batch * recipe.training.gradient_accumulation_steps
    quiet = {
        "output_dir": folder / "run", "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no",
        "report_to": "[]", "disable_tqdm": "true", "load_best_model_at_end": "false",
        "dataloader_num_workers": 0, "dataloader_persistent_workers": "false",
    }  # fmt: skip

    def measure(
        what: str, size: int | None = None, steps: int = steps, repeats: int | None = None
    ) -> dict[str, Any]:
        keys = quiet | {"max_steps": steps, "per_device_train_batch_size": size or batch}
        keys["gradient_accumulation_steps"] = effective // (size or batch)
        overrides = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
        result = folder / "result.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, "-m", "rm_recipe.benchmark_worker", what, str(path), str(result)]
        run_worker([*command, *([str(repeats)] if repeats else []), *overrides])
        return dict(json.loads(result.read_text(encoding="utf-8")))

    return measure


class OutOfMemoryError(TrainingError):
    """A measurement needs more memory than there is."""


def run_worker(command: list[str]) -> None:
    """Runs a measurement; ends it when it has used up the machine's memory.

    Raises:
        OutOfMemoryError: it has, or CUDA's.
        TrainingError: it failed otherwise.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not leaving it behind
        try:
            while process.poll() is None:
                if psutil.virtual_memory().percent > 95:
                    raise OutOfMemoryError("not enough memory")
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
            signal.signal(signal.SIGTERM, before)
        if process.returncode:
            log.seek(0)
            said = log.read()
            if "OutOfMemoryError" in said or process.returncode == -9:
                raise OutOfMemoryError("not enough memory")
            raise TrainingError("a measurement failed:\n" + "\n".join(said.splitlines()[-12:]))


def best_batch_size(batch: int, configured: int, measure: Measure) -> tuple[int, dict[int, float | None]]:
    """Stock's fastest per-device batch of the same effective batch, and what was tried.

    Goes from the configured size to smaller and to larger divisors of the batch, as long as that
    helps. Large batches pay for padding, small ones for idle arithmetic.
    """
    sizes = [size for size in range(1, batch + 1) if batch % size == 0]
    tried: dict[int, float | None] = {}

    def speed(size: int) -> float:
        if size not in tried:
            try:
                tried[size] = _speed(measure("stock", size, steps=2))
            except OutOfMemoryError:
                tried[size] = None
            found = f"{tried[size]:.2f} comparisons/s" if tried[size] else "not enough memory"
            _say(f"stock TRL, per-device batch {size}: {found}")
        return tried[size] or 0.0

    best = configured
    for direction in (-1, 1):
        at = sizes.index(best) + direction
        while 0 <= at < len(sizes) and speed(sizes[at]) > speed(best):
            best, at = sizes[at], at + direction
        if best != configured:
            break
    return best, tried


def _speed(result: dict[str, Any]) -> float:
    return float(result["comparisons"] / result["seconds"])


# --- what it comes to ------------------------------------------------------------------------


def summarise(results: dict[str, list[dict[str, Any]]], scoring: dict[str, Any]) -> dict[str, Any]:
    """Medians over repeats, and ratios as medians of each repeat's ratio."""
    content: dict[str, Any] = {name: _median(repeats) for name, repeats in results.items()}
    stock, ours = results["stock"], results["ours"]

    def ratio(top: list[float], bottom: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(top, bottom, strict=True))

    speeds = {name: [_speed(result) for result in repeats] for name, repeats in results.items()}
    best = [max(pair) for pair in zip(speeds["stock"], speeds["stock_tuned"], strict=True)]
    memory = [[result["peak_memory_bytes"] for result in repeats] for repeats in (ours, stock)]
    content["ratio"] = {
        "comparisons_per_s": ratio(speeds["ours"], speeds["stock"]),
        "peak_memory": ratio(*memory),
        "tuned_comparisons_per_s": ratio(speeds["ours"], best),
        "scoring": ratio(scoring["ours"], scoring["plain"]),
    }
    pairs = zip(stock[0]["losses"], ours[0]["losses"], strict=True)
    differences = [abs(a - b) for a, b in pairs]
    content["max_loss_difference"] = max(differences)
    content["first_loss_difference"] = differences[0]
    content["scoring"] = {
        "plain_conversations_per_s": statistics.median(scoring["plain"]),
        "conversations_per_s": statistics.median(scoring["ours"]),
        "max_reward_difference": scoring["max_reward_difference"],
        "comparisons": scoring["comparisons"],
    }
    return content


def _median(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    first = repeats[0]
    tokens_per_s = statistics.median(result["tokens"] / result["seconds"] for result in repeats)
    return {
        "comparisons_per_s": statistics.median(map(_speed, repeats)),
        "comparisons_per_s_each": [_speed(result) for result in repeats],
        "tokens_per_s": tokens_per_s,
        "padding_share": first["padding"] / (first["padding"] + first["tokens"]),
        "peak_memory_bytes": round(statistics.median(result["peak_memory_bytes"] for result in repeats)),
        "model_flop_utilisation": utilisation(tokens_per_s * first["flop_per_token"]),
        "losses": first["losses"],
    }


def utilisation(flop_per_s: float) -> float | None:
    """Model FLOP/s over the GPU's peak in half precision; None without a known GPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
    return flop_per_s / peak if peak else None


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in PACKAGES},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def setting(recipe: Recipe, steps: int, repeats: int) -> dict[str, Any]:
    """What was run: the resolved recipe, and how often."""
    return {"steps": steps, "repeats": repeats, "recipe": recipe.resolved()}


def print_benchmark(content: dict[str, Any], console: Console | None = None) -> None:
    """The figures as a table of 80 columns, and the ratios in words."""
    table = Table(title="Training", title_justify="left")
    table.add_column("trainer")
    for heading in ("comparisons/s", "tokens/s", "padding", "peak memory", "MFU"):
        table.add_column(heading, justify="right", no_wrap=True)
    tuned = content["stock_tuned"]["per_device_train_batch_size"]
    names = {"stock": "stock TRL", "stock_tuned": f"stock, batch {tuned}", "ours": "rm_recipe"}
    for key, name in names.items():
        figures = content[key]
        share = figures["model_flop_utilisation"]
        table.add_row(
            name,
            f"{figures['comparisons_per_s']:.2f}",
            f"{figures['tokens_per_s']:.0f}",
            f"{figures['padding_share']:.0%}",
            f"{figures['peak_memory_bytes'] / 1e9:.2f} GB",
            "-" if share is None else f"{share:.0%}",
        )
    ratio, scoring = content["ratio"], content["scoring"]
    console = console or Console()
    console.print(table)
    console.print(
        f"{ratio['comparisons_per_s']:.2f} times stock TRL's speed at {ratio['peak_memory']:.2f} of its "
        f"memory; {ratio['tuned_comparisons_per_s']:.2f} times at its best batch.\n"
        f"Losses differ by {content['first_loss_difference']:.1e} in the first step and by at most "
        f"{content['max_loss_difference']:.1e} in {len(content['ours']['losses'])}.\n"
        f"Scoring: {scoring['conversations_per_s']:.1f} conversations/s, {ratio['scoring']:.2f} times a "
        f"loop over padded batches in the data's order ({scoring['plain_conversations_per_s']:.1f}); rewards "
        f"differ by at most {scoring['max_reward_difference']:.1e}.",
        highlight=False,
    )
