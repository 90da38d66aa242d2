"""What a run came to, as one page to read and to pass on: `report.html`, and the headline on the terminal.

The page is made of files that already stand in the folder; nothing is scored anew. It loads
nothing, runs no script and says nothing of when or where it was made: the same files give the same
bytes. A file that is absent leaves its part of the page out.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation import plots
from rm_recipe.evaluation.findings import EDITS, HELD_OUT, LN2, best_baseline, gate_words, readings, rule
from rm_recipe.evaluation.format import MISSING, TEMPLATES, decimal, interval, print_table, whole, write_page
from rm_recipe.evaluation.summary import read_evaluation, read_predictions
from rm_recipe.files import read_json, visible

Figures = dict[str, Any]

HEAD = ["data set", "accuracy", "95 % interval", "n", "left out", "ties", "loss", "best baseline"]
IN_TERMINAL = 6  # of these columns fit a terminal; the sentences below the table name the best baseline


def overview(name: str, figures: Figures) -> list[str]:
    """A data set's line under `HEAD`, of the page and of the terminal."""
    best = best_baseline(figures)
    return [
        name,
        decimal(figures.get("accuracy")),
        interval(figures.get("accuracy_ci95")),
        whole(figures.get("n_scored")),
        whole(sum(figures.get("excluded", {}).values())),
        whole(figures.get("ties")),
        decimal(figures.get("loss")),
        f"{decimal(best[1])} ({rule(best[0])})" if best else MISSING,
    ]


def print_evaluation(content: dict[str, Any], names: Sequence[str], console: Console | None = None) -> None:
    """Print the figures that matter of some data sets, what to think of them, and the gate.

    Args:
        content: of `evaluation.json`.
    """
    console = console or Console()
    rows = [overview(name, content["datasets"][name])[:IN_TERMINAL] for name in names]
    print_table("Preference accuracy", HEAD[:IN_TERMINAL], rows, console)
    for name in names:
        for _, sentence in readings(content["datasets"][name]):
            console.print(Text(visible(f"{name}: {sentence}" if len(names) > 1 else sentence)))
    words = gate_words(content["gate"])
    if HELD_OUT in names and words:
        console.print(f"{words['verdict']}: {words['why']}.")


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder or wherever an evaluation was written.

    Args:
        folder: holds `evaluation.json`, and `predictions.jsonl`, `run.json`, `data_report.json` and
            `recipe.yaml` as far as there are any.

    Returns:
        the path of the page.

    Raises:
        RecipeError: there is no evaluation, or one of the files cannot be read.
    """
    evaluation = read_evaluation(folder)
    if not evaluation.get("datasets"):
        raise RecipeError(f"{folder} holds no evaluation; `rm-recipe evaluate {folder}` writes one")
    datasets = dict(sorted(evaluation["datasets"].items(), key=lambda item: item[0] != HELD_OUT))
    lines = read_predictions(folder)
    run, data = _read(folder / "run.json"), _read(folder / "data_report.json")
    recipe = folder / "recipe.yaml"
    target = folder / "report.html"
    write_page(
        target,
        TEMPLATES / "report.html.jinja",
        model=evaluation["model"],
        base=evaluation.get("base"),
        gate=gate_words(evaluation.get("gate")),
        held_out=datasets.get(HELD_OUT),
        datasets=[
            _data_set(f"set-{number}", name, figures, [line for line in lines if line["dataset"] == name])
            for number, (name, figures) in enumerate(datasets.items(), 1)
        ],
        head=HEAD,
        rule=rule,
        edits=EDITS,
        run=run,
        curves=training_curves(run.get("log", [])),
        data=data,
        recipe=recipe.read_text(encoding="utf-8").strip() if recipe.is_file() else "",
    )
    return target


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _data_set(ident: str, name: str, figures: Figures, lines: list[dict[str, Any]]) -> dict[str, Any]:
    shown = {kind: [line for line in lines if line.get("shown") == kind] for kind in ("mistake", "close")}
    return {
        "id": ident,
        "name": name,
        "figures": figures,
        "overview": overview(name, figures),
        "readings": readings(figures),
        "below": sum(line["margin"] < 0 for line in lines),
        "total": len(lines),
        "pictures": pictures(figures, lines, ident),
        "mistakes": sorted(shown["mistake"], key=lambda line: line["margin"]),
        "close": sorted(shown["close"], key=lambda line: abs(line["margin"])),
    }


def pictures(figures: Figures, lines: list[dict[str, Any]], name: str) -> dict[str, Markup]:
    """Draw a data set's pictures, by what they show.

    Args:
        lines: its predictions.
        name: begins the ids inside them.
    """
    drawn = {}
    if lines:
        pairs = [pair for line in lines for pair in zip(line["rewards"], line["ranks"], strict=True)]
        chosen = [reward for reward, rank in pairs if rank == 0]
        rejected = [reward for reward, rank in pairs if rank > 0]
        label = f"Histograms of {len(chosen):,} chosen and {len(rejected):,} rejected responses' rewards."
        drawn["rewards"] = plots.rewards(chosen, rejected, f"{name}-rewards", label)
        margins = [line["margin"] for line in lines]
        label = f"Histogram of {len(margins):,} margins: {sum(m < 0 for m in margins):,} lie below 0."
        drawn["margins"] = plots.margins(margins, f"{name}-margins", label)
    if bins := figures.get("calibration", {}).get("bins"):
        points = [(part["confidence"], part["accuracy"], part["n"]) for part in bins]
        spoken = ", ".join(f"{confidence:.2f} right {accuracy:.2f}" for confidence, accuracy, _ in points)
        label = f"Reliability curve: confident {spoken}."
        drawn["reliability"] = plots.reliability(points, f"{name}-reliability", label)
    if buckets := figures.get("by", {}).get("length_difference"):
        what = "chosen minus rejected, response tokens"
        spoken = "; ".join(f"{part['label']}: {part['accuracy']:.3f}" for part in buckets)
        label = f"Accuracy by length difference ({what}): {spoken}."
        drawn["length"] = plots.accuracy_by(buckets, what, f"{name}-length", label)
    return drawn


# The training curves: their lines with the lines' keys in the log, and what they are compared with.
CURVES: dict[str, tuple[dict[str, str], tuple[float, str] | None]] = {
    "loss": ({"train": "loss", "held out": "eval_loss"}, (LN2, "chance (ln 2)")),
    "accuracy": ({"train": "accuracy", "held out": "eval_accuracy"}, (0.5, "chance")),
    "learning rate": ({"learning rate": "learning_rate"}, None),
    "gradient norm": ({"gradient norm": "grad_norm"}, None),
}


def training_curves(log: list[dict[str, Any]]) -> dict[str, Markup]:
    """Draw the quantities that `run.json`'s log holds against the step, by their names."""
    drawn = {}
    for title, (lines, chance) in CURVES.items():
        series = {}
        for word, key in lines.items():
            # A gradient that overflowed stands in the log as null, and leaves a gap.
            points = [(e["step"], math.nan if e[key] is None else e[key]) for e in log if key in e]
            if any(not math.isnan(value) for _, value in points):
                series[word] = points
        if series:
            ends = ", ".join(f"{word} ends at {points[-1][1]:.4g}" for word, points in series.items())
            label = f"{title.capitalize()} against the step: {ends}."
            drawn[title] = plots.curves(series, title, f"training-{title.replace(' ', '-')}", label, chance)
    return drawn
