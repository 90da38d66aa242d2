"""The reports' pictures: numbers in, an HTML image out that holds its SVG.

The same numbers give the same bytes. Nothing here changes matplotlib's settings for anyone else.
"""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from scipy.special import expit

from rm_recipe.evaluation.findings import LN2
from rm_recipe.evaluation.format import TEMPLATES, whole, words
from rm_recipe.files import visible, whole_file

# The page's colours by day; by night it inverts its pictures.
INK, MUTED, CHOSEN, REJECTED, BAD = "#1b2230", "#5a6475", "#2166b0", "#c25e1a", "#b3332c"
SIZE = (5.6, 3.2)  # inches; the page scales it
HIGH, BROAD = (5.6, 3.7), (11.6, 5.4)
SVG: dict[str, Any] = {"format": "svg", "metadata": {"Date": None}}
BARS = 36
# The quantities of the training log that are drawn, and what chance gives.
CURVES = {"loss": LN2, "accuracy": 0.5, "learning_rate": None, "grad_norm": None}


def draw_rewards(figure: Figure, lines: Sequence[dict[str, Any]]) -> None:
    """Draw two histograms over the same bars: rewards of the best responses and of the others.

    Args:
        lines: of `predictions.jsonl`.
    """
    rewards, ranks = (np.concatenate([line[key] for line in lines]) for key in ("rewards", "ranks"))
    axes, edges = figure.subplots(), edges_of(rewards)
    for part, colour, word in ((ranks > 0, REJECTED, "rejected"), (ranks == 0, CHOSEN, "chosen")):
        axes.hist(
            rewards[part], edges, label=word, histtype="stepfilled", fc=(colour, 0.4), ec=colour, lw=1.4
        )
    axes.set(xlabel="reward", ylabel="responses")
    legend(axes)


def draw_margins(figure: Figure, lines: Sequence[dict[str, Any]]) -> None:
    """Draw a histogram of margins: those below 0 in another colour, ties as a thin bar at 0."""
    margin = np.array([line["margin"] for line in lines])
    axes, edges = figure.subplots(), edges_of(margin)
    for part, colour, word in ((margin < 0, BAD, "wrong"), (margin > 0, CHOSEN, "right")):
        axes.hist(margin[part], edges, color=colour, alpha=0.75, label=word)
    if ties := int((margin == 0).sum()):
        axes.bar(0, ties, (edges[1] - edges[0]) / 3, color=INK, label="tie")
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.set(xlabel="margin: reward of chosen \N{MINUS SIGN} reward of rejected", ylabel="comparisons")
    legend(axes)


def edges_of(values: ArrayLike) -> Any:
    """Edges of about `BARS` equal bars that hold all values; 0, where it lies among them, is an edge."""
    low, high = np.min(values), np.max(values)
    edges = MaxNLocator(BARS, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [min(edges[0], low), *edges[1:-1], max(edges[-1], high)]  # whatever rounding made of them


def draw_reliability(figure: Figure, bins: Sequence[dict[str, float]]) -> None:
    """Draw accuracy against confidence with the diagonal, above the number of pairs in each bin.

    Args:
        bins: of `metrics.calibrate`.
    """
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1.3))
    confidence, accuracy, n = np.array([list(part.values()) for part in bins]).T
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linestyle="--", linewidth=1.2, label="ideal")
    axes.plot(confidence, accuracy, color=CHOSEN, marker="o", linewidth=1.6, label="model")
    axes.set(ylabel="accuracy", ylim=(min(0.45, *accuracy - 0.05), 1.03), xlim=(0.49, 1.01))
    below.bar(confidence, n, 0.024, color=CHOSEN, alpha=0.6)
    below.set(xlabel="confidence: sigmoid(|margin|)", ylabel="pairs")
    legend(axes)


def save_reliability(bins: Sequence[dict[str, float]], target: Path) -> None:
    """Write the same as a PNG on white, for a model card."""
    options = {"format": "png", "dpi": 150, "facecolor": "white", "metadata": {"Software": None}}
    _save(target, draw_reliability, HIGH, options, bins=bins)


def draw_curves(figure: Figure, log: Sequence[dict[str, Any]]) -> None:
    """Draw what a training's log holds over its steps, one panel a quantity; None leaves a gap.

    Args:
        log: `run.json`'s.
    """
    for axes, (key, chance) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for word, own, colour in (("train", key, CHOSEN), ("held out", f"eval_{key}", REJECTED)):
            points = np.array([(entry["step"], entry[own]) for entry in log if own in entry], float)
            if len(points):
                axes.plot(*points.T, "o-", color=colour, linewidth=1.4, markersize=2.5, label=word)
        if chance:
            axes.axhline(chance, color=MUTED, linestyle="--", linewidth=1.2, label="chance")
            legend(axes)
        axes.set(xlabel="optimiser step", ylabel=words(key))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))


def draw_learning_curve(figure: Figure, curve: dict[str, Any]) -> None:
    """Draw held-out accuracies with their intervals against the number of comparisons, and the fitted line.

    Args:
        curve: the content of `learning_curve.json`.
    """
    n, accuracy = np.array([[point["comparisons"], point["accuracy"]] for point in curve["points"]]).T
    ends = np.array([point["accuracy_ci95"] for point in curve["points"]]).T
    until = np.geomspace(n[0], curve["expected"][-1]["comparisons"])
    axes = figure.subplots()
    axes.errorbar(n, accuracy, np.abs(ends - accuracy), fmt="o", color=CHOSEN, label="held-out accuracy")
    line = expit(np.polyval(curve["line"], np.log2(until)))
    axes.plot(until, line, "--", color=MUTED, label="log-odds, a line on log n")
    axes.set_xscale("log", base=2)
    ticks = [*n, *(point["comparisons"] for point in curve["expected"])]
    axes.set_xticks(ticks, [whole(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="comparisons trained on", ylabel="accuracy")
    legend(axes)


def save_learning_curve(curve: dict[str, Any], target: Path) -> None:
    """Write the same as an SVG on white."""
    with whole_file(target) as partial:
        _save(partial, draw_learning_curve, SIZE, SVG | {"facecolor": "white"}, curve=curve)


def legend(axes: Axes) -> None:
    """Put the legend above the axes, so that it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.1, handlelength=1.4)


def _save(
    target: Path | io.BytesIO, draw: Callable[..., None], size: tuple[float, float], options: Any, **data: Any
) -> None:
    """Draw the `data` on an empty figure and save it, by these options of matplotlib's `savefig`."""
    # matplotlib's defaults and ours, whatever the user's matplotlibrc says; theirs afterwards
    with style.context(TEMPLATES / "report.mplstyle", after_reset=True):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, **data)
        figure.savefig(target, **options)


def svg(draw: Callable[..., None], label: str, size: tuple[float, float] = SIZE, **data: Any) -> Markup:
    """Make the drawing an image to stand inside a page, where nothing of it can reach the page.

    Args:
        draw: gets an empty figure, and the `data`.
        label: the text alternative.
    """
    buffer = io.BytesIO()
    _save(buffer, draw, size, SVG, **data)
    source = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img src="data:image/svg+xml;base64,{}" alt="{}">').format(source, visible(label))
