"""An evaluation's headline on the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rm_recipe.evaluation.findings import HELD_OUT, best_baseline, gate_words, readings
from rm_recipe.evaluation.format import decimal, visible


def print_evaluation(content: dict[str, Any], names: Sequence[str], console: Console | None = None) -> None:
    """The figures that matter of some data sets, what to think of them, and the gate where it read one.

    Args:
        content: of `evaluation.json`.
    """
    table = Table(title="Preference accuracy", title_justify="left")
    table.add_column("data set", overflow="fold")
    for heading in ("accuracy", "95 % interval", "n", "excluded", "ties", "best rule"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        figures = content["datasets"][name]
        (low, high), best = figures["accuracy_ci95"], best_baseline(figures)
        table.add_row(
            Text(visible(name)),
            f"{figures['accuracy']:.3f}",
            f"{low:.3f} to {high:.3f}",
            str(figures["n_scored"]),
            str(sum(figures["excluded"].values())),
            str(figures["ties"]),
            decimal(best[1] if best else None),
        )
    console = console or Console()
    console.print(table)
    for name in names:
        for _, sentence in readings(content["datasets"][name]):
            console.print(Text(visible(f"{name}: {sentence}" if len(names) > 1 else sentence)))
    words = gate_words(content["gate"])
    if HELD_OUT in names and words:
        console.print(f"{words['verdict']}: {words['why']}.")
