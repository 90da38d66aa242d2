"""What a run came to, as one page to read and to pass on: `report.html`.

The page is made of files that already stand in the folder; nothing is scored anew. It loads
nothing, runs no script and says nothing of when or where it was made: the same files give the same
bytes. A file or a figure that is absent leaves its part of the page out.
"""

from pathlib import Path
from typing import Any

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation import report_run, report_tables
from rm_recipe.evaluation.findings import HELD_OUT, gate_words, readings
from rm_recipe.evaluation.format import as_text, decimal, interval, limits, mapping, strip, whole
from rm_recipe.evaluation.pages import TEMPLATES, render_page
from rm_recipe.evaluation.predictions import read_predictions
from rm_recipe.evaluation.report_predictions import Predictions, by_data_set, examples, pictures
from rm_recipe.files import read_json, whole_file

TEMPLATE = TEMPLATES / "report.html.jinja"


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run folder, an export or wherever an evaluation was written.

    Args:
        folder: holds `evaluation.json`, and `predictions.jsonl`, `run.json`, `data_report.json` and
            `recipe.yaml` as far as there are any.

    Returns:
        the path of the page.

    Raises:
        RecipeError: there is no evaluation, or one of the files cannot be read.
    """
    evaluation, recipe = _read_evaluation(folder / "evaluation.json"), folder / "recipe.yaml"
    page = render(
        evaluation,
        by_data_set(read_predictions(folder)),
        read_json(folder / "run.json") if (folder / "run.json").is_file() else {},
        read_json(folder / "data_report.json") if (folder / "data_report.json").is_file() else {},
        recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
    )
    target = folder / "report.html"
    with whole_file(target) as partial:
        partial.write_bytes(page.encode("utf-8", "replace"))
    return target


def _read_evaluation(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"{path} is missing; `rm-recipe evaluate {path.parent}` writes it")
    evaluation = read_json(path)
    if not mapping(evaluation, "datasets"):
        raise RecipeError(f"{path} holds no data set; `rm-recipe evaluate {path.parent}` adds one")
    return evaluation


def render(
    evaluation: dict[str, Any],
    predictions: dict[str, Predictions],
    run: dict[str, Any],
    data: dict[str, Any],
    recipe: str,
) -> str:
    """The page. Everything but the first may be empty."""
    found = {str(name): mapping(figures) for name, figures in mapping(evaluation, "datasets").items()}
    evaluated = {name: found[name] for name in sorted(found, key=lambda name: name != HELD_OUT)}
    parts = [
        _data_set(f"set-{number}", name, figures, predictions.get(name, Predictions()))
        for number, (name, figures) in enumerate(evaluated.items(), 1)
    ]
    return render_page(
        TEMPLATE,
        model=as_text(evaluation.get("model")) or "unnamed model",
        base=as_text(evaluation.get("base")),
        headline=_headline(evaluated[HELD_OUT], evaluation.get("gate")) if HELD_OUT in evaluated else None,
        overview=report_tables.data_sets(evaluated),
        data_sets=parts,
        training=report_run.training_pictures(run),
        data_tables=report_run.data_tables(data),
        leakage=report_run.leakage_words(data),
        run_tables=[table for table in (report_run.cost(run), report_run.versions(run)) if table],
        recipe=recipe.strip(),
    )


def _headline(figures: dict[str, Any], gate: Any) -> dict[str, Any]:
    accuracy, ends = figures.get("accuracy"), figures.get("accuracy_ci95")
    return {
        "accuracy": decimal(accuracy),
        "interval": interval(ends) if limits(ends) else "",
        "n": whole(figures.get("n_scored")),
        "strip": strip(accuracy, ends),
        "gate": gate_words(gate),
    }


def _data_set(ident: str, name: str, figures: dict[str, Any], own: Predictions) -> dict[str, Any]:
    tables = [
        report_tables.baselines(figures),
        report_tables.other_model(figures),
        report_tables.ranking(figures),
        report_tables.subsets(figures),
        *(report_tables.buckets(figures, key) for key in report_tables.BUCKETS),
        report_tables.length(figures),
        report_tables.consistency(figures),
        report_tables.excluded(figures),
    ]
    return {
        "id": ident,
        "name": name,
        "accuracy": decimal(figures.get("accuracy")),
        "n": whole(figures.get("n_scored")),
        "readings": readings(figures),
        "pictures": pictures(figures, own, ident),
        "tables": [table for table in tables if table],
        "mistakes": examples(own.shown["mistake"], "mistake"),
        "close": examples(own.shown["close"], "close"),
    }
