"""`rm-recipe curve RECIPE --samples 400,800,1600`: what more comparisons bring.

Trains by one recipe on ever more of its comparisons, and fits a line to held-out accuracy on the logarithm of
how many. Who sees it rise labels more; who sees it level off takes a larger base.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from rm_recipe.data.splits import load_splits
from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.findings import HELD_OUT
from rm_recipe.evaluation.format import decimal, interval, print_table, whole
from rm_recipe.evaluation.plots import CHOSEN, MUTED, SIZE, legend, own_settings
from rm_recipe.files import whole_file, write_json
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.pipeline import evaluate_or_skip, prepare, train_or_skip

NAME = "learning_curve"
AHEAD = (2, 4)  # times the largest run, for which the line says what to expect


def curve(path: Path, overrides: Sequence[str], samples: Sequence[int], output: Path | None = None) -> Any:
    """Train and evaluate on each number of comparisons; print and write the curve.

    Args:
        samples: how many comparisons each run gets, the first so many of the recipe's shuffle.
        output: gets a run folder for each and `learning_curve.json` and `.svg`; by default the recipe's
            `output_dir` with `_curve` behind it. Runs that are there and finished are not made again.

    Returns:
        the content of `learning_curve.json`.

    Raises:
        RecipeError: fewer than two sizes, or more comparisons than there are.
        TrainingError: a training failed.
    """
    sizes = sorted(set(samples))
    if len(sizes) < 2 or sizes[0] < 1:
        raise RecipeError("--samples needs two numbers of comparisons or more: 400,800,1600")
    recipe = read_recipe(path, overrides, check_inputs=False)
    prepare(recipe)
    folder = output or Path(f"{recipe.output_dir}_curve")
    keys = [[*overrides, "--max_train_samples", str(n), "--output_dir", str(folder / str(n))] for n in sizes]
    there = len(load_splits(read_recipe(path, keys[-1]))[0].comparisons)
    if there < sizes[-1]:
        raise RecipeError(f"--samples {sizes[-1]}: the recipe has {there} train comparisons")
    points = []
    for n, own in zip(sizes, keys, strict=True):
        of_run = read_recipe(path, own)
        train_or_skip(of_run, path, own, overwrite=False)
        figures = evaluate_or_skip(of_run)["datasets"][HELD_OUT]
        points.append({"comparisons": n, **{key: figures[key] for key in ("accuracy", "accuracy_ci95")}})
    content = {"points": points, **fit(points)}
    write_json(folder / f"{NAME}.json", content)
    draw(content, folder / f"{NAME}.svg")
    print_curve(content)
    print(f"written: {folder / NAME}.json and .svg")
    return content


def fit(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fit accuracy = a + b log2(comparisons), each point weighed by its interval.

    Returns:
        `per_doubling`, b, with its 95 % interval; and `expected` accuracy with its interval at `AHEAD` times
        the largest size. All runs are judged by the same held-out comparisons, so that their errors go
        together and the interval of b is rather too wide. A line ends above 1: do not trust it far ahead.
    """
    x = np.log2([point["comparisons"] for point in points])
    errors = np.array([np.ptp(point["accuracy_ci95"]) / 2 / 1.96 for point in points])
    line, covariance = np.polyfit(x, [point["accuracy"] for point in points], 1, w=1 / errors, cov="unscaled")

    def at(row: list[float]) -> dict[str, Any]:
        value, error = float(line @ row), float(np.sqrt(row @ covariance @ row))
        return {"accuracy": value, "ci95": [value - 1.96 * error, value + 1.96 * error]}

    slope = at([1.0, 0.0])
    ahead = [points[-1]["comparisons"] * times for times in AHEAD]
    return {
        "line": line.tolist(),
        "per_doubling": {"difference": slope["accuracy"], "ci95": slope["ci95"]},
        "expected": [{"comparisons": n, **at([float(np.log2(n)), 1.0])} for n in ahead],
    }


def draw(content: dict[str, Any], target: Path) -> None:
    """Write the curve as a picture: accuracies with their intervals, and the line."""
    n, accuracy = np.array([[point["comparisons"], point["accuracy"]] for point in content["points"]]).T
    ends = np.array([point["accuracy_ci95"] for point in content["points"]]).T
    until = np.array([n[0], content["expected"][-1]["comparisons"]])
    with whole_file(target) as partial, own_settings():
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.errorbar(n, accuracy, np.abs(ends - accuracy), fmt="o", color=CHOSEN, label="held-out accuracy")
        axes.plot(
            until, np.polyval(content["line"], np.log2(until)), "--", color=MUTED, label="line on log n"
        )
        axes.set_xscale("log", base=2)
        ticks = [*n, *(point["comparisons"] for point in content["expected"])]
        axes.set_xticks(ticks, [whole(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="comparisons trained on", ylabel="accuracy")
        legend(axes)
        figure.savefig(partial, format="svg", facecolor="white", metadata={"Date": None})


def print_curve(content: dict[str, Any], console: Console | None = None) -> None:
    """Print the points, and what the line says."""
    console, slope = console or Console(), content["per_doubling"]
    rows = [
        [whole(point["comparisons"]), decimal(point["accuracy"]), interval(point["accuracy_ci95"])]
        for point in content["points"]
    ]
    print_table("Learning curve", ["comparisons", "accuracy", "95 % interval"], rows, console)
    console.print(
        f"Twice the comparisons bring {decimal(slope['difference'], signed=True)} "
        f"({interval(slope['ci95'], signed=True)})."
    )
    for point in content["expected"]:
        n, accuracy = whole(point["comparisons"]), decimal(point["accuracy"])
        console.print(f"By the line {n} would give {accuracy} ({interval(point['ci95'])}).")
