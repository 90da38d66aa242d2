"""The report's figures: numbers in, SVG text out, which takes its colours from the page around it.

The same numbers give the same bytes. Nothing here changes matplotlib's settings for anyone else.
"""

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from rm_recipe.files import visible

Array = NDArray[np.float64]
Points = Sequence[tuple[float, float]]
Bucket = tuple[str, int, float, float, float]

# The page's colours by day, which nothing else has, so that each can be replaced by the page's variable.
INK, MUTED, LINE = "#1b2230", "#5a6475", "#dde1e8"
CHOSEN, REJECTED, GOOD, BAD = "#2166b0", "#c25e1a", "#1d7a46", "#b3332c"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", CHOSEN: "chosen", REJECTED: "rejected",
             GOOD: "good", BAD: "bad"}  # fmt: skip
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rm-recipe",
    "text.parse_math": False,  # a label of the data may hold dollar signs
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "savefig.facecolor": "none",
}
SIZE = (5.6, 3.2)  # inches; the page scales it
MOST_BUCKETS = 40


def edges_around_zero(values: ArrayLike, bars: int = 36) -> Array:
    """Edges of about `bars` equal bars that hold all values; wherever 0 lies among them, it is an edge.

    So no bar mixes positive with negative values. Steps are 1, 2 or 5 times a power of ten.
    """
    inside = np.clip(np.asarray(values, float), -1e100, 1e100)
    low, high = (float(inside.min()), float(inside.max())) if inside.size else (0.0, 0.0)
    largest = max(abs(low), abs(high))
    # Steps too small beside the values themselves would vanish in rounding.
    width = max(high - low, 1e-6 * largest) if high > low else max(largest, 1.0)
    power = 10.0 ** np.floor(np.log10(width / bars))
    step = power * min((m for m in (1, 2, 5, 10) if power * m * bars >= width), default=10)
    return np.asarray(np.arange(np.floor(low / step), np.floor(high / step) + 2) * step)


def counts_between(values: ArrayLike, edges: Array) -> NDArray[np.int64]:
    """How many values lie between each edge and the next, `(edges - 1,)`: the first edge belongs to it."""
    inside = np.clip(np.asarray(values, float), edges[0], edges[-1])
    return np.asarray(np.histogram(inside, edges)[0], np.int64)


def rewards(chosen: ArrayLike, rejected: ArrayLike, name: str, label: str) -> str:
    """Two histograms over the same bars: rewards of chosen and of rejected responses.

    Args:
        name: begins every id, so that two figures of a page share none.
        label: the text alternative.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        edges = edges_around_zero(np.concatenate([np.asarray(chosen, float), np.asarray(rejected, float)]))
        for values, colour, word in ((rejected, REJECTED, "rejected"), (chosen, CHOSEN, "chosen")):
            counts = counts_between(values, edges)
            _bars(axes, edges, counts, colour, word, alpha=0.4)
            axes.stairs(counts, edges, color=colour, linewidth=1.4)
        axes.set(xlabel="reward", ylabel="responses")
        legend(axes)

    return svg(draw, name, label)


def margins(values: ArrayLike, name: str, label: str) -> str:
    """A histogram of margins: those below 0 in another colour, ties as a thin bar at 0."""

    def draw(figure: Figure) -> None:
        axes, margin = figure.subplots(), np.asarray(values, float)
        edges = edges_around_zero(margin)
        counts = counts_between(margin[margin != 0], edges)
        wrong = edges[1:] <= (edges[1] - edges[0]) / 2  # up to 0, whatever rounding made of it
        for part, colour, word in ((wrong, BAD, "wrong"), (~wrong, CHOSEN, "right")):
            _bars(axes, edges, np.where(part, counts, 0), colour, word, alpha=0.75)
        if ties := int((margin == 0).sum()):
            axes.bar(0, ties, (edges[1] - edges[0]) / 3, color=INK, label="tie", gid="tie")
        axes.axvline(0, color=INK, linewidth=1.2)
        axes.set(xlabel="margin: reward of chosen \N{MINUS SIGN} reward of rejected", ylabel="comparisons")
        legend(axes)

    return svg(draw, name, label)


Bins = Sequence[tuple[float, float, int]]
RELIABILITY_SIZE = (SIZE[0], 3.7)


def reliability(bins: Bins, name: str, label: str) -> str:
    """Accuracy against confidence with the diagonal, above the number of pairs in each bin.

    Args:
        bins: confidence in [0.5, 1], accuracy, number of pairs.
    """
    return svg(partial(_draw_reliability, bins=bins), name, label, RELIABILITY_SIZE)


def save_reliability(bins: Bins, target: Path) -> None:
    """The same as a PNG on white, for a model card."""
    with own_settings():
        figure = Figure(figsize=RELIABILITY_SIZE, layout="constrained")
        _draw_reliability(figure, bins)
        figure.savefig(target, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def _draw_reliability(figure: Figure, bins: Bins) -> None:
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1.3))
    confidence, accuracy, n = np.array(bins, float).reshape(-1, 3).T
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linestyle="--", linewidth=1.2, label="ideal")
    axes.plot(confidence, accuracy, color=CHOSEN, marker="o", linewidth=1.6, label="model", gid="model")
    axes.set(ylabel="accuracy", ylim=(min(0.45, *accuracy - 0.05, 1), 1.03), xlim=(0.49, 1.01))
    _bars(below, confidence - 0.012, n, CHOSEN, "pairs", alpha=0.6, width=0.024)
    below.set(xlabel="confidence: sigmoid(|margin|)", ylabel="pairs")
    legend(axes)


def accuracy_by(buckets: Sequence[Bucket], what: str, name: str, label: str) -> str:
    """Accuracy with its interval in each bucket, the first on top.

    Args:
        buckets: label, number of comparisons, accuracy, lower and upper end of the interval.
        what: the quantity that the buckets divide, with its unit.
    """
    buckets = buckets[:MOST_BUCKETS]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        y = np.arange(len(buckets))
        accuracy, low, high = np.array([bucket[2:] for bucket in buckets], float).reshape(-1, 3).T
        axes.axvline(0.5, color=MUTED, linestyle="--", linewidth=1.2)
        axes.hlines(y, low, high, color=CHOSEN, linewidth=2.4, alpha=0.55)
        axes.plot(accuracy, y, "o", color=CHOSEN, gid="accuracy")
        axes.set_yticks(y, [f"{visible(text)[:24]}  (n {n:,})" for text, n, *_ in buckets])
        axes.set(xlabel="accuracy", xlim=(min(0.4, *low - 0.02, 1), 1.01), ylim=(len(buckets) - 0.5, -0.5))
        axes.set_title(what, fontsize=10, color=MUTED, loc="left")
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")

    return svg(draw, name, label, (SIZE[0], max(1.5 + 0.24 * len(buckets), 2.2)))


def curves(
    series: Mapping[str, Points],
    quantity: str,
    name: str,
    label: str,
    chance: tuple[float, str] | None = None,
) -> str:
    """Lines over training steps; a value that is no number leaves a gap.

    Args:
        series: for each line its name and its (step, value).
        chance: a value to compare with, and what it is.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (word, points), colour in zip(series.items(), (CHOSEN, REJECTED, GOOD, BAD), strict=False):
            steps, values = np.array(points, float).reshape(-1, 2).T
            dots = "o" if len(points) <= 40 else ""
            (line,) = axes.plot(steps, values, f"{dots}-", color=colour, linewidth=1.6, markersize=3.5)
            line.set(label=word, gid=f"line-{word.split()[0]}")
        if chance is not None:
            axes.axhline(chance[0], color=MUTED, linestyle="--", linewidth=1.2, label=chance[1])
        axes.set(xlabel="optimiser step", ylabel=quantity)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        if len(series) > 1 or chance is not None:
            legend(axes)

    return svg(draw, name, label, (SIZE[0], 2.7))


def _bars(
    axes: Axes, left: Array, counts: ArrayLike, colour: str, word: str, alpha: float, width: float = 0.0
) -> None:
    """Bars whose ids are the word and their number; those without a count are not drawn.

    Args:
        left: where each begins; without a `width` the edges, one more than bars.
    """
    counts = np.asarray(counts)
    drawn = np.flatnonzero(counts)
    widths = np.full(len(drawn), width) if width else np.diff(left)[drawn]
    bars = axes.bar(left[drawn], counts[drawn], widths, align="edge", color=colour, alpha=alpha, label=word)
    for number, bar in zip(drawn, bars, strict=True):
        bar.set_gid(f"{word}-{number}")


def legend(axes: Axes) -> None:
    """Above the axes, so that it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.1, handlelength=1.4)


@contextmanager
def own_settings() -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the user's matplotlibrc says; theirs afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        yield


def svg(draw: Callable[[Figure], None], name: str, label: str, size: tuple[float, float] = SIZE) -> str:
    """The drawing as an `<svg>` to stand inside a page: no size, no colours, no ids of its own."""
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
    for colour, variable in VARIABLES.items():
        inside = inside.replace(colour, f"var(--{variable})")
    spoken = html.escape(visible(label))
    return f'<svg {view[0]} role="img" aria-label="{spoken}">{inside.strip()}'
