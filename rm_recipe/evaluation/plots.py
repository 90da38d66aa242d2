"""The reports' pictures: numbers in, SVG text out, which takes its colours from the page around it.

The same numbers give the same bytes. Nothing here changes matplotlib's settings for anyone else.
"""

import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from rm_recipe.evaluation.format import TEMPLATES
from rm_recipe.files import visible

Points = Sequence[tuple[float, float]]

# The page's colours by day, which nothing else has, so that each can be replaced by the page's variable.
COLOURS = {
    "ink": "#1b2230",
    "muted": "#5a6475",
    "line": "#dde1e8",
    "chosen": "#2166b0",
    "rejected": "#c25e1a",
    "good": "#1d7a46",
    "bad": "#b3332c",
}
INK, MUTED, _, CHOSEN, REJECTED, GOOD, BAD = COLOURS.values()
SIZE = (5.6, 3.2)  # inches; the page scales it
RELIABILITY_SIZE = (5.6, 3.7)
BARS = 36
MOST_BUCKETS = 40


def rewards(chosen: ArrayLike, rejected: ArrayLike, name: str, label: str) -> Markup:
    """Draw two histograms over the same bars: rewards of chosen and of rejected responses.

    Args:
        name: begins every id, so that two pictures of a page share none.
        label: the text alternative.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        edges = edges_of(np.concatenate([chosen, rejected]))
        for values, colour, word in ((rejected, REJECTED, "rejected"), (chosen, CHOSEN, "chosen")):
            axes.hist(values, edges, color=colour, alpha=0.4, label=word)
            axes.hist(values, edges, color=colour, linewidth=1.4, histtype="step")
        axes.set(xlabel="reward", ylabel="responses")
        legend(axes)

    return svg(draw, name, label)


def margins(values: ArrayLike, name: str, label: str) -> Markup:
    """Draw a histogram of margins: those below 0 in another colour, ties as a thin bar at 0."""

    def draw(figure: Figure) -> None:
        axes, margin = figure.subplots(), np.asarray(values, float)
        edges = edges_of(margin)
        for part, colour, word in ((margin < 0, BAD, "wrong"), (margin > 0, CHOSEN, "right")):
            axes.hist(margin[part], edges, color=colour, alpha=0.75, label=word)
        if ties := int((margin == 0).sum()):
            axes.bar(0, ties, (edges[1] - edges[0]) / 3, color=INK, label="tie")
        axes.axvline(0, color=INK, linewidth=1.2)
        axes.set(xlabel="margin: reward of chosen \N{MINUS SIGN} reward of rejected", ylabel="comparisons")
        legend(axes)

    return svg(draw, name, label)


def edges_of(values: ArrayLike) -> Any:
    """Edges of about `BARS` equal bars that hold all values; 0, where it lies among them, is an edge."""
    low, high = np.min(values), np.max(values)
    edges = MaxNLocator(BARS, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [min(edges[0], low), *edges[1:-1], max(edges[-1], high)]  # whatever rounding made of them


def reliability(bins: Sequence[tuple[float, float, int]], name: str, label: str) -> Markup:
    """Draw accuracy against confidence with the diagonal, above the number of pairs in each bin.

    Args:
        bins: confidence in [0.5, 1], accuracy, number of pairs.
    """
    return svg(lambda figure: _draw_reliability(figure, bins), name, label, RELIABILITY_SIZE)


def save_reliability(bins: Sequence[tuple[float, float, int]], target: Path) -> None:
    """Write the same as a PNG on white, for a model card."""
    with own_settings():
        figure = Figure(figsize=RELIABILITY_SIZE, layout="constrained")
        _draw_reliability(figure, bins)
        figure.savefig(target, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def _draw_reliability(figure: Figure, bins: Sequence[tuple[float, float, int]]) -> None:
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1.3))
    confidence, accuracy, n = np.array(bins, float).T
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linestyle="--", linewidth=1.2, label="ideal")
    axes.plot(confidence, accuracy, color=CHOSEN, marker="o", linewidth=1.6, label="model")
    axes.set(ylabel="accuracy", ylim=(min(0.45, *accuracy - 0.05), 1.03), xlim=(0.49, 1.01))
    below.bar(confidence, n, 0.024, color=CHOSEN, alpha=0.6)
    below.set(xlabel="confidence: sigmoid(|margin|)", ylabel="pairs")
    legend(axes)


def accuracy_by(buckets: Sequence[dict[str, Any]], what: str, name: str, label: str) -> Markup:
    """Draw accuracy with its interval in each bucket, the first on top.

    Args:
        buckets: of `metrics.accuracy_by_bucket`.
        what: the quantity that the buckets divide, with its unit.
    """
    buckets = buckets[:MOST_BUCKETS]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        y = np.arange(len(buckets))
        low, high = np.array([bucket["accuracy_ci95"] for bucket in buckets]).T
        axes.axvline(0.5, color=MUTED, linestyle="--", linewidth=1.2)
        axes.hlines(y, low, high, color=CHOSEN, linewidth=2.4, alpha=0.55)
        axes.plot([bucket["accuracy"] for bucket in buckets], y, "o", color=CHOSEN)
        axes.set_yticks(y, [f"{visible(bucket['label'])[:24]}  (n {bucket['n']:,})" for bucket in buckets])
        axes.set(xlabel="accuracy", xlim=(min(0.4, *low - 0.02), 1.01), ylim=(len(buckets) - 0.5, -0.5))
        axes.set_title(what, fontsize=10, color=MUTED, loc="left")
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")

    return svg(draw, name, label, (SIZE[0], max(1.5 + 0.24 * len(buckets), 2.2)))


def curves(
    series: Mapping[str, Points], quantity: str, name: str, label: str, chance: tuple[float, str] | None
) -> Markup:
    """Draw lines over training steps; a value that is NaN leaves a gap.

    Args:
        series: for each line its name and its (step, value).
        chance: a value to compare with, and what it is.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (word, points), colour in zip(series.items(), (CHOSEN, REJECTED), strict=False):
            steps, values = np.array(points, float).T
            dots = "o-" if len(points) <= 40 else "-"
            axes.plot(steps, values, dots, color=colour, linewidth=1.6, markersize=3.5, label=word)
        if chance:
            axes.axhline(chance[0], color=MUTED, linestyle="--", linewidth=1.2, label=chance[1])
        axes.set(xlabel="optimiser step", ylabel=quantity)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        legend(axes)

    return svg(draw, name, label, (SIZE[0], 2.7))


def legend(axes: Axes) -> None:
    """Put the legend above the axes, so that it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.1, handlelength=1.4)


def own_settings() -> AbstractContextManager[None]:
    """Use matplotlib's defaults and ours, whatever the user's matplotlibrc says; theirs afterwards."""
    return style.context(TEMPLATES / "report.mplstyle", after_reset=True)


def svg(draw: Callable[[Figure], None], name: str, label: str, size: tuple[float, float] = SIZE) -> Markup:
    """Make the drawing an `<svg>` to stand inside a page: no size, no colours, no ids of its own."""
    buffer = io.StringIO()
    with own_settings(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # its font measures only; the browser has others
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # Its style sheet would hold for the whole page; its metadata name addresses.
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    inside = text[text.index(">", text.index("<svg")) + 1 :].replace("xlink:href", "href")
    inside = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", inside)
    for variable, colour in COLOURS.items():
        inside = inside.replace(colour, f"var(--{variable})")
    spoken = html.escape(visible(label))
    return Markup(f'<svg {view[0]} role="img" aria-label="{spoken}">{inside.strip()}')  # noqa: S704 - escaped
