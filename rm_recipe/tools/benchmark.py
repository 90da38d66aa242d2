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
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.files import write_json
from rm_recipe.recipe.reader import Recipe
from rm_recipe.training.run_folder import BENCHMARK, check_run_folder
from rm_recipe.training.train import PACKAGES, load_data, package_version


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
        RecipeError: there is nothing to compare, as stock TRL takes pairs only; or too few comparisons,
            steps or repeats.
        TrainingError: a measurement failed; the message has the end of what it printed. Stock TRL or
            the padded scoring loop running out of memory is a result, not a failure.
    """
    if steps < 2 or repeats < 1:
        raise RecipeError("benchmark needs --steps of at least 2 (the first warms up) and 1 --repeats")
    target = output or recipe.output_dir
    if output is None:
        check_run_folder(recipe, resume=False, overwrite=True)
    check_comparable(recipe, steps, stock_batch)
    target.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix="rm-recipe-benchmark-") as folder:
        measurements = Measurements(recipe, Path(folder), steps)
        tried: dict[int, float | None] = {}
        if stock_batch is None:
            stock_batch, tried = best_batch_size(recipe, measurements)
        results = in_turns(measurements, stock_batch, repeats)
        try:
            scoring = measurements.scoring(repeats)
        except OutOfMemoryError:
            scoring = None
    content = summarise(results, scoring)
    content["machine"] = machine()
    content["setting"] = {
        "steps": steps, "repeats": repeats, "stock_batch": stock_batch, "recipe": recipe.resolved()
    }  # fmt: skip
    content["stock_batches_tried"] = {str(size): found for size, found in tried.items()}
    write_json(target / BENCHMARK, content)
    print_benchmark(content)
    print(f"written: {target / BENCHMARK}")
    return content


def check_comparable(recipe: Recipe, steps: int, stock_batch: int | None) -> None:
    """Raises RecipeError where stock TRL cannot train on the same samples; reads the data."""
    batch = recipe.training.train_batch_size * recipe.training.gradient_accumulation_steps
    if stock_batch is not None and (stock_batch < 1 or batch % stock_batch):
        raise RecipeError(f"--stock-batch has to divide the effective batch of {batch}")
    comparisons = load_data(recipe)[1].comparisons  # what is wrong with the data is said once, here
    if any(len(ranks) != 2 for ranks in comparisons["ranks"]):
        raise RecipeError("benchmark needs pairs: stock TRL has no loss for rankings of three and more")
    if len(comparisons) < batch * steps:
        raise RecipeError(
            f"benchmark needs {batch * steps} comparisons for {steps} steps; the data has fewer"
        )


class OutOfMemoryError(TrainingError):
    """A measurement needs more memory than there is."""


class Measurements:
    """Runs `benchmark_worker`, each time in a fresh process."""

    def __init__(self, recipe: Recipe, folder: Path, steps: int) -> None:
        """Writes the recipe into `folder`, which takes each result, too; `steps` are each training's."""
        self.path, self.result = folder / "recipe.yaml", folder / "result.json"
        self.steps = steps
        self.batch = recipe.training.train_batch_size
        self.effective_batch = self.batch * recipe.training.gradient_accumulation_steps
        recipe.save(self.path)
        self.overrides = {
            "output_dir": folder / "run", "save_strategy": "no", "eval_strategy": "no",
            "logging_strategy": "no", "report_to": "[]", "disable_tqdm": "true",
            "load_best_model_at_end": "false", "dataloader_num_workers": 0,
            "dataloader_persistent_workers": "false",
        }  # fmt: skip

    def training(self, what: str, batch: int | None = None, steps: int | None = None) -> dict[str, Any]:
        """What `benchmark_worker.measure_training` says of `stock` or `ours`.

        Args:
            batch: comparisons of a micro-batch, by default the recipe's; the effective batch stays.
        """
        batch = batch or self.batch
        return self._run(
            what,
            max_steps=steps or self.steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=self.effective_batch // batch,
        )

    def scoring(self, repeats: int) -> dict[str, Any]:
        """What `benchmark_worker.measure_scoring` says."""
        return self._run("scoring", repeats)

    def _run(self, what: str, *arguments: int, **overrides: int) -> dict[str, Any]:
        keys = [part for key, value in (self.overrides | overrides).items() for part in (f"--{key}", value)]
        self.result.unlink(missing_ok=True)
        worker = [sys.executable, "-m", "rm_recipe.tools.benchmark_worker", what, self.path, self.result]
        run_worker([str(part) for part in (*worker, *arguments, *keys)])
        return dict(json.loads(self.result.read_text(encoding="utf-8")))


# How a process says that it found no memory: CUDA's, torch's on a CPU, Python's, C++'s.
NO_MEMORY = ("OutOfMemoryError", "out of memory", "ALLOC_FAILED", "can't allocate memory", "MemoryError",
             "bad_alloc")  # fmt: skip
FULL = 95  # percent of the machine's memory at which a measurement is ended, before the system swaps
BUSY = 80  # percent that others may have taken; what ran out of the rest would not be the trainer's fault


def run_worker(command: list[str]) -> None:
    """Runs a measurement; ends it when it has used up the machine's memory.

    Raises:
        OutOfMemoryError: it has, or CUDA's.
        TrainingError: it failed otherwise, or others already use most of the memory.
    """
    used = psutil.virtual_memory().percent
    if used > BUSY:
        raise TrainingError(f"{used:.0f} % of the memory is in use already; a benchmark needs it for itself")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not leaving it behind
        try:
            while process.poll() is None:
                if psutil.virtual_memory().percent > FULL:
                    raise OutOfMemoryError("not enough memory")
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
            signal.signal(signal.SIGTERM, before)
        if process.returncode:
            log.seek(0)
            said = log.read()
            if process.returncode == -signal.SIGKILL or any(words in said for words in NO_MEMORY):
                raise OutOfMemoryError("not enough memory")
            raise TrainingError("a measurement failed:\n" + "\n".join(said.splitlines()[-12:]))


def best_batch_size(recipe: Recipe, measurements: Measurements) -> tuple[int, dict[int, float | None]]:
    """Stock's fastest per-device batch of the recipe's effective batch, and the speeds that were tried.

    Goes from the recipe's size to smaller divisors of the effective batch until one fits in memory, then on
    to smaller, else to larger ones, as long as that helps. Large batches pay for padding, small ones for
    idle arithmetic. The speed is None where memory was not enough.
    """
    configured = recipe.training.train_batch_size
    batch = configured * recipe.training.gradient_accumulation_steps
    sizes = [size for size in range(1, batch + 1) if batch % size == 0]
    tried: dict[int, float | None] = {}

    def tried_speed(size: int) -> float:
        """Comparisons a second, 0 where memory is not enough; each size is measured once."""
        if size not in tried:
            try:
                tried[size] = speed(measurements.training("stock", size, steps=2))
            except OutOfMemoryError:
                tried[size] = None
            _say(f"stock TRL, per-device batch {size}", tried[size])
        return tried[size] or 0.0

    first = sizes.index(configured)
    while first > 0 and not tried_speed(sizes[first]):
        first -= 1
    best = first
    for direction in (-1, 1):
        while 0 <= best + direction < len(sizes) and (
            tried_speed(sizes[best + direction]) > tried_speed(sizes[best])
        ):
            best += direction
        if best != first:
            break
    return sizes[best], tried


def in_turns(measurements: Measurements, stock_batch: int, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Each repeat's measurement of the three trainers; none of a stock trainer that ran out of memory once.

    Raises:
        OutOfMemoryError: this project's own does.
    """
    batches = {"stock": None, "stock_tuned": stock_batch, "ours": None}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in batches}
    out_of_memory: set[str] = set()
    for repeat in range(repeats):
        for name, batch in batches.items():
            if name in out_of_memory:
                continue
            line = f"{repeat + 1} of {repeats}, {name}"
            try:
                results[name].append(measurements.training("ours" if name == "ours" else "stock", batch))
                _say(line, speed(results[name][-1]))
            except OutOfMemoryError:
                if name == "ours":
                    raise OutOfMemoryError(
                        "ours: the recipe's batch needs more memory than there is"
                    ) from None
                _say(line, None)
                results[name] = []
                out_of_memory.add(name)
    return results


def _say(what: str, found: float | None) -> None:
    figure = "not enough memory" if found is None else f"{found:.2f} comparisons/s"
    print(f"{what}: {figure}", flush=True)


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


# --- medians, ratios, and the table that is printed --------------------------------------------

# Dense bf16/fp16 peak in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "T4": 65e12,
}  # fmt: skip


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
    content: dict[str, Any] = {name: _medians(repeats) for name, repeats in results.items()}
    speeds = {name: [speed(result) for result in repeats] for name, repeats in results.items()}
    memory = {name: [result["peak_memory_bytes"] for result in repeats] for name, repeats in results.items()}
    stocks = [each for each in (speeds["stock"], speeds["stock_tuned"]) if each]
    best = [max(each) for each in zip(*stocks, strict=True)] if speeds["stock_tuned"] else []
    content["ratio"] = {
        "comparisons_per_s": _ratio(speeds["ours"], speeds["stock"]),
        "peak_memory": _ratio(memory["ours"], memory["stock"]),
        "tuned_comparisons_per_s": _ratio(speeds["ours"], best),
        "tuned_peak_memory": _ratio(memory["ours"], memory["stock_tuned"]),
        "scoring": _ratio(scoring["ours"], scoring["plain"]) if scoring else None,
    }
    differences = []
    if stocks:
        stock = (results["stock"] or results["stock_tuned"])[0]  # the same samples at either batch
        differences = [abs(a - b) for a, b in zip(stock["losses"], results["ours"][0]["losses"], strict=True)]
    content["max_loss_difference"] = max(differences, default=None)
    content["first_loss_difference"] = differences[0] if differences else None
    content["scoring"] = scoring and {
        "plain_conversations_per_s": statistics.median(scoring["plain"]),
        "conversations_per_s": statistics.median(scoring["ours"]),
        "max_reward_difference": scoring["max_reward_difference"],
        "comparisons": scoring["comparisons"],
    }
    return content


def speed(result: dict[str, Any]) -> float:
    """Comparisons a second of one measurement."""
    return float(result["comparisons"] / result["seconds"])


def _ratio(top: list[float], bottom: list[float]) -> float | None:
    if not bottom:
        return None
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


def _medians(repeats: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not repeats:
        return None
    first = repeats[0]
    tokens_per_s = statistics.median(result["tokens"] / result["seconds"] for result in repeats)
    return {
        "comparisons_per_s": statistics.median(map(speed, repeats)),
        "comparisons_per_s_each": [speed(result) for result in repeats],
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


def print_benchmark(content: dict[str, Any], console: Console | None = None) -> None:
    """The figures as a table of 80 columns, and the ratios in words.

    Args:
        content: what `benchmark.json` holds.
    """
    table = Table(title="Training", title_justify="left")
    table.add_column("trainer")
    for heading in ("comparisons/s", "tokens/s", "padding", "peak memory", "MFU"):
        table.add_column(heading, justify="right", no_wrap=True)
    tuned = content["setting"]["stock_batch"]
    names = {"stock": "stock TRL", "stock_tuned": f"stock, batch {tuned}", "ours": "rm_recipe"}
    for key, name in names.items():
        table.add_row(name, *_cells(content[key]))
    console = console or Console()
    console.print(table)
    for sentence in _sentences(content):
        console.print(sentence, highlight=False)


def _cells(figures: dict[str, Any] | None) -> list[str]:
    if figures is None:
        return ["out of memory"]
    share = figures["model_flop_utilisation"]
    return [
        f"{figures['comparisons_per_s']:.2f}",
        f"{figures['tokens_per_s']:.0f}",
        f"{figures['padding_share']:.0%}",
        f"{figures['peak_memory_bytes'] / 1e9:.2f} GB",
        "-" if share is None else f"{share:.0%}",
    ]


def _sentences(content: dict[str, Any]) -> list[str]:
    ratio, scoring, ours = content["ratio"], content["scoring"], content["ours"]
    sentences = ["Tokens without padding."]
    stock = content["stock"] or content["stock_tuned"]
    if stock:
        fewer = _tokens_per_comparison(ours) / _tokens_per_comparison(stock)
        sentences = [f"Tokens without padding; rm_recipe computes {fewer:.2f} of stock TRL's."]
    if ratio["comparisons_per_s"]:
        sentences.append(
            f"{ratio['comparisons_per_s']:.2f} times stock TRL's speed at {ratio['peak_memory']:.2f} of its "
            "memory."
        )
    if ratio["tuned_comparisons_per_s"]:
        sentences.append(
            f"{ratio['tuned_comparisons_per_s']:.2f} times stock TRL at its best batch, at "
            f"{ratio['tuned_peak_memory']:.2f} of the memory of batch {content['setting']['stock_batch']}."
        )
    if stock:
        sentences.append(
            f"Losses differ by {content['first_loss_difference']:.1e} in the first step and by at most "
            f"{content['max_loss_difference']:.1e} in {len(ours['losses'])}."
        )
    if scoring is None:
        return [*sentences, "Scoring: the padded loop ran out of memory."]
    sentences.append(
        f"Scoring: {scoring['conversations_per_s']:.1f} conversations/s, {ratio['scoring']:.2f} times a "
        f"loop over padded batches in the data's order ({scoring['plain_conversations_per_s']:.1f}); rewards "
        f"differ by at most {scoring['max_reward_difference']:.1e}."
    )
    return sentences


def _tokens_per_comparison(figures: dict[str, Any]) -> float:
    return float(figures["tokens_per_s"] / figures["comparisons_per_s"])
