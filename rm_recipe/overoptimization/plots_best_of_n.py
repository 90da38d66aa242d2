"""The picture of over-optimisation: proxy and gold against how far best-of-n goes from the policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from rm_recipe.evaluation.format import limits, mapping, visible
from rm_recipe.evaluation.plots import CHOSEN, MUTED, REJECTED, legend, own_settings, svg
from rm_recipe.overoptimization.best_of_n import kl

COLUMNS = 2
PANEL = (5.0, 3.4)  # inches
LONGEST_TITLE = 46


@dataclass(frozen=True)
class Panel:
    """One proxy: its name, and the curves of `overoptimization.json` by their names, `proxy` and `gold`."""

    title: str
    curves: dict[str, dict[str, Any]]


def best_of_n(panels: Sequence[Panel], name: str, label: str) -> str:
    """Panels to stand inside a page.

    Args:
        name: begins every id.
        label: the text alternative.
    """
    return svg(partial(_draw, panels=panels), name, label, _size(panels))


def save_best_of_n(panels: Sequence[Panel], target: Path) -> None:
    """The same as an SVG file on white."""
    with own_settings():
        figure = Figure(figsize=_size(panels), layout="constrained")
        _draw(figure, panels)
        figure.savefig(target, format="svg", facecolor="white", metadata={"Date": None})


def _size(panels: Sequence[Panel]) -> tuple[float, float]:
    columns = min(COLUMNS, len(panels))
    return PANEL[0] * columns, PANEL[1] * -(-len(panels) // columns)


def _draw(figure: Figure, panels: Sequence[Panel]) -> None:
    columns = min(COLUMNS, len(panels))
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(hspace=0.08)
    grid = figure.subplots(-(-len(panels) // columns), columns, sharey=True, squeeze=False)
    places = grid.ravel().tolist()
    for axes, panel in zip(places, panels, strict=False):
        _draw_panel(axes, panel)
    for axes in places[len(panels) :]:
        axes.set_visible(False)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for word, colour in (("proxy", CHOSEN), ("gold", REJECTED)):
        curve = panel.curves[word]
        gain = np.array(curve["gain"], float)
        d = np.sqrt(kl(np.arange(1, len(gain) + 1)))
        axes.plot(d, gain, color=colour, linewidth=1.8, label=word)
        ends = [limits(pair) for pair in curve["gain_ci95"] or []]
        if ends and all(ends):
            low, high = np.array(ends, float).T
            axes.fill_between(d, low, high, color=colour, alpha=0.18, linewidth=0)
        fit = mapping(curve, "fit")
        if fit.get("alpha") is not None:
            fitted = d * (fit["alpha"] - fit["beta"] * d)
            axes.plot(d, fitted, color=colour, linewidth=1.1, linestyle="--", label=f"{word}, fitted")
    gold = panel.curves["gold"]
    if gold["peak_n"] < len(gold["gain"]):
        place = float(np.sqrt(kl(gold["peak_n"])))
        axes.axvline(
            place, color=MUTED, linewidth=1.1, linestyle=":", label=f"gold peaks, n = {gold['peak_n']}"
        )
    sizes = [n for n in 2 ** np.arange(12) if n <= len(gold["gain"])]
    axes.set_xticks(np.sqrt(kl(sizes)), [f"{np.sqrt(kl(n)):.2f}\n{n}" for n in sizes])
    axes.set(xlabel="square root of KL, in nats; below it n", ylabel="gain, in standard deviations")
    title = visible(panel.title)
    title = title if len(title) <= LONGEST_TITLE else f"...{title[-LONGEST_TITLE:]}"
    axes.axhline(0, color=MUTED, linewidth=0.8)
    legend(axes)
    axes.set_title(title, fontsize=10, color=MUTED, loc="left", pad=24)
