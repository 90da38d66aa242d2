"""`rm-recipe evaluate RUN_OR_MODEL`: held-out preference accuracy that can be believed."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from rm_recipe import metrics
from rm_recipe.artifacts import whole_file, write_json
from rm_recipe.batching import Encoded
from rm_recipe.datasets import load_held_out_split, load_split
from rm_recipe.distribution import each_once, main_process_first, processes
from rm_recipe.encoding import tokenize
from rm_recipe.errors import RecipeError
from rm_recipe.recipe import Recipe, read_run_recipe
from rm_recipe.recipe_keys import DataArguments
from rm_recipe.scoring import RewardModel
from rm_recipe.split import Split

HELD_OUT = "held_out"


def evaluate(target: str, datasets: list[str] | None = None, output: Path | None = None) -> dict[str, Any]:
    """Scores a model's held-out comparisons, or those of other data sets, and writes the result.

    Several processes share the comparisons, each scored exactly once; the main one writes.

    Args:
        target: a run folder, an export or a one-label model.
        datasets: names or paths; by default the held-out split of the run's recipe.
        output: where `evaluation.json` and `predictions.jsonl` go; by default into the run or model.

    Returns:
        the content of `evaluation.json`: what was there before, with the new data sets in it.

    Raises:
        RecipeError: the target cannot be evaluated.
        DataError: a data set cannot be read.
    """
    recipe = recipe_of(Path(target))
    if not datasets and recipe is None:
        raise RecipeError(f"{target} is no run folder, so it has no held-out split; name one with --dataset")
    if recipe is None and HELD_OUT in (datasets or []):
        raise RecipeError(f"{target} has no recipe, so it has no held-out split")
    if output is not None and output.is_file():
        raise RecipeError(f"{output} is a file; --output names a folder")
    if output is None:
        if not Path(target).is_dir():
            raise RecipeError(f"{target} is not a local folder; say with --output where the result goes")
        output = Path(target)
    model = RewardModel.from_pretrained(target, device=str(processes().device))
    results: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []
    for name in datasets or [HELD_OUT]:
        with main_process_first():
            split = _load(name, recipe)
            split = tokenize(split, model.tokenizer, model.max_length, model.truncation)
        results[name], predictions = evaluate_split(model, split)
        lines += [{"dataset": name, **line} for line in predictions]
    content = _merge(output, target, recipe, results)
    if not processes().is_main_process:
        return content
    _write_predictions(output / "predictions.jsonl", lines)
    write_json(output / "evaluation.json", content)
    return content


def recipe_of(folder: Path) -> Recipe | None:
    """The recipe of a run folder or of the run that an export lies in, else None."""
    for place in (folder, folder.parent):
        if (place / "recipe.yaml").is_file():
            return read_run_recipe(place)
    return None


def _load(name: str, recipe: Recipe | None) -> Split:
    if name == HELD_OUT:
        assert recipe is not None
        return load_held_out_split(recipe)
    data = DataArguments(dataset_name=name)
    if recipe is not None:
        data = replace(data, dataset_test_split=recipe.data.dataset_test_split)
    return load_split(data, data.dataset_test_split)


def evaluate_split(model: RewardModel, split: Split) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of one data set, and one prediction for each comparison."""
    encoded = split.encoded()
    rewards = each_once(encoded, partial(model.score_encoded, progress=processes().is_main_process))
    subsets, ranks = split.comparisons["subset"][:], split.comparisons["ranks"][:]
    figures = summarise(rewards, encoded, subsets, ranks)
    figures = {
        "n_comparisons": split.rows,
        "n_scored": len(rewards),
        "excluded": dict(split.excluded),
        **figures,
    }
    flat = np.concatenate(rewards).astype(float)
    better, worse, owner = metrics.pair_indices(ranks)
    margins = metrics.mean_by_comparison(flat[better] - flat[worse], owner)
    right = metrics.pairwise_agreement(flat, ranks)
    predictions = [
        {
            "index": index,
            "rewards": rewards[index].tolist(),
            "ranks": ranks[index],
            "margin": float(margins[index]),
            "correct": float(right[index]),
            "subset": subsets[index],
            "tokens": [len(ids) for ids in encoded[index].conversations()],
        }
        for index in range(len(encoded))
    ]
    return figures, predictions


def summarise(
    rewards: list[Any], encoded: list[Encoded], subsets: list[str], ranks: list[list[int]]
) -> dict[str, Any]:
    """The figures of `evaluation.json` for the rewards (best first) of each comparison.

    In accuracy, loss, margin and baselines each comparison weighs 1; ties, calibration and the length
    figures count pairs. Lengths are token counts of the responses, which share their prompt.
    """
    flat = np.concatenate(rewards).astype(float)
    lengths = np.array([len(rest) for comparison in encoded for rest in comparison.rests])
    better, worse, owner = metrics.pair_indices(ranks)
    chosen, rejected = flat[better], flat[worse]
    longer, shorter = lengths[better] > lengths[worse], lengths[better] < lengths[worse]
    right_pairs = metrics.agreement(chosen, rejected)
    right = metrics.mean_by_comparison(right_pairs, owner)
    result = metrics.PreferenceAccuracy().compute(chosen=chosen, rejected=rejected, comparison=owner)
    ece, bins = metrics.expected_calibration_error(chosen, rejected)
    names = np.array(subsets)
    return {
        "accuracy": result["accuracy"],
        "accuracy_ci95": result["accuracy_ci95"],
        "ties": result["ties"],
        "loss": metrics.bradley_terry_loss(chosen, rejected, owner),
        "mean_margin": float(metrics.mean_by_comparison(chosen - rejected, owner).mean()),
        "mean_reward": float(flat.mean()),
        "std_reward": float(flat.std()),
        "baselines": metrics.length_baselines(lengths, ranks),
        "calibration": {"ece": ece, "bins": bins},
        "length": {
            "spearman": _spearman(flat, lengths),
            "accuracy_chosen_longer": _mean(right_pairs[longer]),
            "accuracy_chosen_shorter": _mean(right_pairs[shorter]),
        },
        "subsets": {
            str(name): {
                "n": int((names == name).sum()),
                "accuracy": float(right[names == name].mean()),
                "accuracy_ci95": metrics.accuracy_interval(
                    float(right[names == name].mean()), int((names == name).sum())
                ),
            }
            for name in np.unique(names)
            if name
        },
    }


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _spearman(rewards: Any, lengths: Any) -> float | None:
    """None where one of the two does not vary, so that no rank correlation exists."""
    if np.ptp(rewards) == 0 or np.ptp(lengths) == 0:
        return None
    return float(spearmanr(rewards, lengths).statistic)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The content of a folder's `evaluation.json`; empty if there is none."""
    path = folder / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def gate(figures: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Whether held-out accuracy (its interval's lower end by default) reaches the target."""
    statistic = recipe.data.gate_statistic
    value = figures["accuracy"] if statistic == "accuracy" else figures["accuracy_ci95"][0]
    target = recipe.data.target_accuracy
    return {"target": target, "statistic": statistic, "value": value, "passed": value >= target}


def _merge(output: Path, target: str, recipe: Recipe | None, results: dict[str, Any]) -> dict[str, Any]:
    """The earlier evaluation with the new data sets in it; `held_out` is never lost."""
    before = read_evaluation(output)
    datasets = {**before.get("datasets", {}), **results}
    passed = gate(datasets[HELD_OUT], recipe) if recipe and HELD_OUT in datasets else before.get("gate")
    name = recipe.model.model_name_or_path if recipe else target
    return {
        "model": name,
        "recipe": recipe.resolved() if recipe else None,
        "datasets": datasets,
        "gate": passed,
    }


def _write_predictions(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replaces the predictions of the data sets evaluated now and keeps the others'."""
    replaced = {line["dataset"] for line in lines}
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            kept = [line for line in map(json.loads, file) if line["dataset"] not in replaced]
        lines = kept + lines
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def print_evaluation(content: dict[str, Any], names: list[str], console: Console | None = None) -> None:
    """The figures that matter as a table, and the gate."""
    table = Table(title="Preference accuracy", title_justify="left")
    table.add_column("data set", overflow="fold")
    for heading in ("accuracy", "95 % interval", "n", "excluded", "ties", "longer wins"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        figures = content["datasets"][name]
        low, high = figures["accuracy_ci95"]
        table.add_row(
            name,
            f"{figures['accuracy']:.3f}",
            f"{low:.3f} to {high:.3f}",
            str(figures["n_scored"]),
            str(sum(figures["excluded"].values())),
            str(figures["ties"]),
            f"{figures['baselines']['longer_wins']:.3f}",
        )
    console = console or Console()
    console.print(table)
    if HELD_OUT in names and content["gate"]:
        result = content["gate"]
        what = "interval's lower end" if result["statistic"] == "ci_low" else "accuracy"
        verdict = "reached" if result["passed"] else "not reached"
        console.print(f"Target {result['target']:.2f} {verdict}: the {what} is {result['value']:.3f}.")
