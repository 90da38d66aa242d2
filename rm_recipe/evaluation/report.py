"""What a run came to, as one page to read and to pass on: `report.html`, and the headline on the terminal.

The page is made of files that already stand in the folder; nothing is scored anew. It loads
nothing, runs no script and says nothing of when or where it was made: the same files give the same
bytes. A file that is absent leaves its part of the page out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation import plots
from rm_recipe.evaluation.findings import EDITS, HELD_OUT, best_baseline, gate_words, readings, rule
from rm_recipe.evaluation.format import MISSING, TEMPLATES, decimal, interval, print_table, whole, write_page
from rm_recipe.evaluation.summary import read_evaluation, read_predictions
from rm_recipe.files import read_json, visible

Figures = dict[str, Any]

HEAD = ["data set", "accuracy", "95 % interval", "n", "left out", "ties", "loss", "best baseline"]
RECORDS = ("run.json", "data_report.json")
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
    if HELD_OUT in names and (words := gate_words(content["gate"])):
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
    if not evaluation:
        raise RecipeError(f"{folder} holds no evaluation; `rm-recipe evaluate {folder}` writes one")
    datasets = dict(sorted(evaluation["datasets"].items(), key=lambda item: item[0] != HELD_OUT))
    lines, target = read_predictions(folder), folder / "report.html"
    run, data = (read_json(path) if path.is_file() else {} for path in map(folder.joinpath, RECORDS))
    recipe = folder / "recipe.yaml"
    write_page(
        target,
        TEMPLATES / "report.html.jinja",
        model=evaluation["model"],
        base=evaluation["base"],
        gate=gate_words(evaluation["gate"]),
        held_out=datasets.get(HELD_OUT),
        datasets=[_data_set(f"set-{i}", lines, *item) for i, item in enumerate(datasets.items(), 1)],
        head=HEAD,
        rule=rule,
        edits=EDITS,
        run=run,
        plots=plots,
        data=data,
        recipe=recipe.read_text(encoding="utf-8").strip() if recipe.is_file() else "",
    )
    return target


def _data_set(ident: str, lines: list[dict[str, Any]], name: str, figures: Figures) -> dict[str, Any]:
    own = [line for line in lines if line["dataset"] == name]
    return {
        "id": ident,
        "name": name,
        "figures": figures,
        "overview": overview(name, figures),
        "readings": readings(figures),
        "lines": own,
        "shown": sorted((line for line in own if "shown" in line), key=lambda line: abs(line["margin"])),
    }
