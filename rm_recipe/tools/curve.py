"""`rm-recipe curve RECIPE --samples 400,800,1600`: what more comparisons bring.

Trains by one recipe on ever more of its comparisons, and fits a line to the log-odds of held-out accuracy on
the logarithm of how many. Who sees it rise labels more; who sees it level off takes a larger base.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import chi2

from rm_recipe.data.splits import load_splits
from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.findings import HELD_OUT, curve_words
from rm_recipe.evaluation.format import decimal, interval, print_table, print_text, whole
from rm_recipe.evaluation.plots import save_learning_curve
from rm_recipe.evaluation.report import CURVE, write_report
from rm_recipe.files import write_json
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.pipeline import evaluate_or_skip, prepare, train_or_skip

AHEAD = (2, 4)  # times the largest run, for which the line says what to expect


def curve(path: Path, overrides: Sequence[str], samples: Sequence[int], output: Path | None = None) -> Any:
    """Train and evaluate on each number of comparisons; print and write the curve.

    Args:
        samples: how many comparisons each run gets, the first so many of the recipe's shuffle.
        output: gets a run folder for each and `learning_curve.json` and `.svg`; by default the recipe's
            `output_dir` with `_curve` behind it, where the report of the recipe's own run finds it, too.
            Runs that are there and finished are not made again.

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
    write_json(folder / CURVE, content)
    picture = (folder / CURVE).with_suffix(".svg")
    save_learning_curve(content, picture)
    print_curve(content)
    print(f"written: {folder / CURVE} and {picture.name}")
    for run in (recipe.output_dir, *(folder / str(n) for n in sizes)):
        if (run / "evaluation.json").is_file():
            write_report(run)
    return content


def fit(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fit log(accuracy / (1 - accuracy)) = a + b log2(comparisons), each point weighed by its interval.

    Returns:
        `line`, (b, a); `expected` accuracy with its interval at `AHEAD` times the largest size;
        `per_doubling`, what the line says that the first doubling from there brings; and `p_value`, how
        probable points this far off the line are if there is one (chi-squared; None of two). All runs are
        judged by the same held-out comparisons, and what another seed would change is not in the intervals:
        take these and the p-value as rough.
    """
    x = np.log2([point["comparisons"] for point in points])
    ends = np.array([point["accuracy_ci95"] for point in points])
    middle = ends.mean(axis=1)  # of Wilson's interval, which is never 0 or 1
    errors = np.ptp(ends, axis=1) / 2 / 1.96 / (middle * (1 - middle))
    line, covariance = np.polyfit(x, logit(middle), 1, w=1 / errors, cov="unscaled")
    off = float((((logit(middle) - np.polyval(line, x)) / errors) ** 2).sum())

    def at(n: int) -> dict[str, Any]:
        row = np.array([np.log2(n), 1.0])
        value, error = float(line @ row), float(np.sqrt(row @ covariance @ row))
        ci95 = expit([value - 1.96 * error, value + 1.96 * error]).tolist()
        return {"comparisons": n, "accuracy": float(expit(value)), "ci95": ci95}

    largest = at(points[-1]["comparisons"])
    slope, error = line[0], float(np.sqrt(covariance[0, 0]))
    gains = expit(logit(largest["accuracy"]) + np.array([slope, slope - 1.96 * error, slope + 1.96 * error]))
    difference, *ci95 = (gains - largest["accuracy"]).tolist()
    return {
        "line": line.tolist(),
        "p_value": float(chi2.sf(off, len(x) - 2)) if len(x) > 2 else None,
        "per_doubling": {"difference": difference, "ci95": ci95},
        "expected": [at(points[-1]["comparisons"] * times) for times in AHEAD],
    }


def print_curve(content: dict[str, Any]) -> None:
    """Print the points, and what the line says."""
    rows = [
        [whole(point["comparisons"]), decimal(point["accuracy"]), interval(point["accuracy_ci95"])]
        for point in content["points"]
    ]
    print_table("Learning curve", ["comparisons", "accuracy", "95 % interval"], rows)
    for sentence in curve_words(content):
        print_text(sentence)
