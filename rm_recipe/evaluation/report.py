"""What a run came to, as one page to read and to pass on: `report.html`, and the headline on the terminal.

The page is made of files that already stand in the folder; nothing is scored anew. It loads
nothing, runs no script and says nothing of when or where it was made: the same files give the same
bytes. A file that is absent leaves its part of the page out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation import findings, plots
from rm_recipe.evaluation.findings import HELD_OUT, best_baseline, gate_words, readings, rule
from rm_recipe.evaluation.format import (
    MISSING,
    TEMPLATES,
    decimal,
    interval,
    print_table,
    print_text,
    whole,
    write_page,
)
from rm_recipe.evaluation.metrics import paired_difference
from rm_recipe.evaluation.summary import read_evaluation, read_predictions
from rm_recipe.files import read_json

HEAD = ["data set", "accuracy", "95 % interval", "n", "left out", "ties", "loss", "best baseline"]
RECORDS = ("run.json", "data_report.json")
CURVE = "learning_curve.json"
IN_TERMINAL = 6  # of these columns fit a terminal; the sentences below the table name the best baseline


def overview(name: str, figures: dict[str, Any]) -> list[str]:
    """A data set's line under `HEAD`, of the page and of the terminal."""
    best, accuracy = best_baseline(figures)
    return [
        name,
        decimal(figures["accuracy"]),
        interval(figures["accuracy_ci95"]),
        whole(figures["n_scored"]),
        whole(sum(figures["excluded"].values())),
        whole(figures["ties"]),
        decimal(figures["loss"]),
        f"{decimal(accuracy)} ({rule(best)})",
    ]


def print_evaluation(content: dict[str, Any], names: Sequence[str]) -> None:
    """Print the figures that matter of some data sets, what to think of them, and the gate.

    Args:
        content: of `evaluation.json`.
    """
    rows = [overview(name, content["datasets"][name])[:IN_TERMINAL] for name in names]
    print_table("Preference accuracy", HEAD[:IN_TERMINAL], rows)
    for name in names:
        for _, sentence in readings(content["datasets"][name]):
            print_text(f"{name}: {sentence}" if len(names) > 1 else sentence)
    if HELD_OUT in names and (words := gate_words(content["gate"])):
        print_text(f"{words['verdict']}: {words['why']}.")


def print_comparison(runs: Sequence[Path]) -> None:
    """Print runs that were evaluated on the same held-out comparisons, and each one's lead over the first.

    Raises:
        RecipeError: one was not evaluated, or on others.
    """
    rows: list[list[str]] = []
    for run in runs:
        figures = read_evaluation(run).get("datasets", {}).get(HELD_OUT)
        lines = [line for line in read_predictions(run) if line["dataset"] == HELD_OUT]
        if not figures or not lines or not (run / RECORDS[0]).is_file():
            raise RecipeError(f"{run} is no run that was evaluated: rm-recipe evaluate RUN")
        data = read_json(run / RECORDS[0]).get("data_fingerprints", {}).get("held_out")
        seen = [data, *((line["subset"], line["row"], line["ranks"]) for line in lines)]
        right = [line["correct"] for line in lines]
        if not rows:
            first = seen, right
        if seen != first[0]:
            why = f"{run} was not evaluated on the comparisons of {runs[0]}"
            raise RecipeError(
                f"{why}; score both on those of {run}: rm-recipe evaluate {run} --against {runs[0]}"
            )
        lead = paired_difference(right, first[1])
        ahead = f"{decimal(lead['difference'], signed=True)} ({interval(lead['ci95'], signed=True)})"
        own = overview(str(run), figures)
        rows.append([*own[:3], own[6], ahead if rows else MISSING])
    head = ["run", *HEAD[1:3], HEAD[6], "minus the first (95 % interval)"]
    print_table("Held-out comparisons", head, rows)


def write_report(folder: Path) -> None:
    """Write `report.html` into a run folder or wherever an evaluation was written.

    Args:
        folder: holds `evaluation.json`, and `predictions.jsonl`, `run.json`, `data_report.json` and
            `recipe.yaml` as far as there are any. A learning curve is where `rm-recipe curve` puts it: beside
            the folder if that is one of its runs, else in a folder beside a run of the same recipe.
    """
    evaluation, recipe = read_evaluation(folder), folder / "recipe.yaml"
    run, data = (read_json(folder / name, missing_ok=True) for name in RECORDS)
    own = folder.resolve()
    curves = [Path(f"{own}_curve", CURVE), *[own.parent / CURVE] * own.name.isdecimal()]
    write_page(
        folder / "report.html",
        TEMPLATES / "report.html.jinja",
        evaluation=evaluation,
        datasets=dict(sorted(evaluation["datasets"].items(), key=lambda item: item[0] != HELD_OUT)),
        lines=sorted(read_predictions(folder), key=lambda line: abs(line["margin"])),
        head=HEAD,
        overview=overview,
        findings=findings,
        plots=plots,
        run=run,
        data=data,
        curve=next((read_json(path) for path in curves if path.is_file()), None),
        recipe=recipe.read_text(encoding="utf-8").strip() if recipe.is_file() else "",
    )
