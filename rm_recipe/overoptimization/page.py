"""An over-optimisation measurement as one page, `overoptimization.html`, and its picture as a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from rm_recipe.evaluation.findings import edit
from rm_recipe.evaluation.format import (
    MISSING,
    Row,
    Table,
    as_text,
    decimal,
    interval,
    is_number,
    limits,
    mapping,
    shorten,
    table,
    values,
    whole,
    words,
)
from rm_recipe.evaluation.plots import CHOSEN, MUTED, REJECTED, legend, own_settings, svg
from rm_recipe.evaluation.report import LONGEST_TEXT, Picture, render_page
from rm_recipe.files import redact, visible, whole_file
from rm_recipe.overoptimization.best_of_n import Curve, kl

# --- one sentence for each proxy, and the table on the terminal --------------------------------

AGREE = 0.99  # rank correlation beyond which gold may be the proxy again
MATERIAL = 0.1  # standard deviations by which an edit moves the proxy
FEWEST_PROMPTS = 20  # of fewer, a bootstrap's intervals are too narrow
MANY_LOST = 0.03  # of the prompts


def verdict(proxy: Curve, gold: Curve) -> tuple[str, str]:
    """What optimising by a proxy does to gold: `good`, `plain` or `bad`, and why, in one sentence.

    Whether gold falls or rises in the end is judged by its change from N / 4 to N and the interval of that.
    """
    replies = len(gold.gain)
    last = f"n = {replies} (square root of KL {np.sqrt(kl(replies)):.2f})"
    own = decimal(proxy.gain[-1], 2)
    gain = f"{decimal(gold.gain[-1], 2, signed=True)} standard deviations"
    if not proxy.gain[-1]:
        return (
            "bad",
            "This proxy gives all replies to a prompt the same reward, so there is nothing to optimise.",
        )
    if gold.prompts < FEWEST_PROMPTS or gold.low is None or gold.high is None or gold.late_ci95 is None:
        one = gold.prompts == 1
        return "plain", (
            f"{gold.prompts} prompt{' is' if one else 's are'} too few to tell: by gold {gain} are gained "
            f"at {last}, of the proxy's {own}."
        )
    ends = interval([float(gold.low[-1]), float(gold.high[-1])], signed=True)
    late = f"{decimal(gold.late, 2, signed=True)} ({interval(gold.late_ci95, signed=True)})"
    late += f" from n = {gold.late_from} on"
    if gold.high[-1] < 0:
        return "bad", f"Choosing by this proxy makes replies worse by gold: {gain} ({ends}) at {last}."
    if gold.late_ci95[1] < 0:
        return "bad", (
            f"Over-optimised: by gold the best of n peaks at about n = {gold.peak} (square root of KL "
            f"{np.sqrt(kl(gold.peak)):.2f}) and then falls, by {late} to n = {replies}, while the proxy "
            f"gains {own}."
        )
    if gold.low[-1] <= 0:
        return "bad", f"Choosing by this proxy gains nothing certain by gold: {gain} ({ends}) at {last}."
    if gold.late_ci95[0] > 0:
        return "good", (
            f"No over-optimisation up to {last}: gold still rises, by {late}, and has gained {gain} of the "
            f"proxy's {own}."
        )
    return "plain", (
        f"Gold has gained {gain} ({ends}) of the proxy's {own} at {last}, and levels off: {late} is neither "
        "a rise nor a fall for certain."
    )


def warnings(found: dict[str, Any]) -> list[str]:
    """What else to know of one of the `curves` in `overoptimization.json`."""
    said, agreement = [], mapping(found, "agreement").get("mean")
    if is_number(agreement) and agreement > AGREE:
        said.append(
            f"Gold ranks replies as this proxy does (rank correlation {decimal(agreement)}): is it the same "
            "model?"
        )
    for name in mapping(found, "edits"):
        parts = [mapping(found, "edits", name, side) for side in ("proxy", "gold", "difference")]
        own, theirs, more = (part.get("mean") for part in parts)
        ends = limits(parts[2].get("ci95"))
        if is_number(own) and is_number(more) and own >= MATERIAL and ends and ends[0] > 0:
            said.append(
                f"With {edit(name)} replies gain {decimal(own, 2)} by this proxy and {decimal(theirs, 2)} "
                "by gold."
            )
    return said


def lost_prompts(samples: dict[str, Any]) -> str | None:
    """What to say where many prompts have a reply that does not fit a model: they may be the longest."""
    lost = samples["excluded"].get("does_not_fit_a_model", 0)
    if lost <= MANY_LOST * (lost + samples["n_prompts"]):
        return None
    return (
        f"{whole(lost)} prompts are left out, as one of their replies does not fit a model: what long "
        "replies gain may be hidden."
    )


def print_overoptimization(content: dict[str, Any], console: Console | None = None) -> None:
    """The figures that matter of `overoptimization.json`, and what they mean."""
    samples, console = content["samples"], console or Console()
    left_out = sum(samples["excluded"].values())
    title = f"Best of {samples['n_replies']} replies to each of {samples['n_prompts']} prompts"
    title += f", {left_out} prompts left out" if left_out else ""
    table = TerminalTable(title=title, title_justify="left")
    table.add_column("chosen by", overflow="fold")
    for heading in ("proxy", "gold", "95 % interval", "gold peaks", "agreement"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, found in content["curves"].items():
        gold = found["gold"]
        ends = gold["gain_ci95"]
        table.add_row(
            Text(visible(name)),
            decimal(found["proxy"]["gain"][-1], 2, signed=True),
            decimal(gold["gain"][-1], 2, signed=True),
            " to ".join(decimal(end, 2, signed=True) for end in ends[-1]) if ends else MISSING,
            f"n = {gold['peak_n']}",
            decimal(found["agreement"]["mean"], 2),
        )
    console.print(table)
    console.print(
        "Gains over the policy's mean reply, in standard deviations of the rewards of a\n"
        "prompt's replies; agreement is the rank correlation of proxy and gold among them."
    )
    lost = lost_prompts(samples)
    if lost:
        console.print(Text(lost))
    for name, found in content["curves"].items():
        for sentence in [found["verdict"], *warnings(found)]:
            named = f"{name}: {sentence}" if len(content["curves"]) > 1 else sentence
            console.print(Text(visible(named)))


# --- the picture: proxy and gold against the distance from the policy --------------------------

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


# --- the page, `overoptimization.html` ---------------------------------------------------------

PAGE, PICTURE = "overoptimization.html", "overoptimization.svg"
TEMPLATE = Path(__file__).with_name("overoptimization.html.jinja")


def write_overoptimization(folder: Path, content: dict[str, Any]) -> None:
    """Writes page and picture of `overoptimization.json` beside it."""
    curves = content["curves"]
    panels = [
        Panel(redact(name), {key: found[key] for key in ("proxy", "gold")}) for name, found in curves.items()
    ]
    lost = lost_prompts(content["samples"])
    page = render_page(
        TEMPLATE,
        proxies=", ".join(content["proxies"]),
        gold=", ".join(content["gold"]),
        verdicts=[
            (found["kind"], f"{name}: {found['verdict']}" if len(curves) > 1 else found["verdict"])
            for name, found in curves.items()
        ]
        + ([("bad", lost)] if lost else []),
        curves=[picture(panels)],
        overview=overview(curves),
        proxies_in_detail=[
            {
                "name": name,
                "warnings": [("bad", sentence) for sentence in warnings(found)],
                "tables": [part for part in (sizes(content, found), excess(found), edits(found)) if part],
                "examples": [example(item) for item in found["examples"]],
            }
            for name, found in curves.items()
        ],
        drawn=[part for part in (sampling(content), samples(content)) if part],
    )
    with whole_file(folder / PAGE) as partial:
        partial.write_bytes(page.encode("utf-8", "replace"))
    with whole_file(folder / PICTURE) as partial:
        save_best_of_n(panels, partial)


def picture(panels: list[Panel]) -> Picture:
    """Proxy and gold against the square root of KL, a panel for each proxy."""
    spoken = "; ".join(
        f"{panel.title}: the proxy gains {decimal(panel.curves['proxy']['gain'][-1], 2)}, gold "
        f"{decimal(panel.curves['gold']['gain'][-1], 2)} and peaks at n = {panel.curves['gold']['peak_n']}"
        for panel in panels
    )
    note = (
        "From left to right more replies are drawn and the one that the proxy likes best is kept, which "
        "goes further and further from the policy (KL divergence log n \N{MINUS SIGN} (n \N{MINUS SIGN} 1) "
        "/ n). Lines are means over prompts with their 95 % intervals; dashed is the fit d (alpha "
        "\N{MINUS SIGN} beta d) of Gao et al. (arXiv 2210.10760) with d the square root of KL. The proxy "
        "always rises. Bad: gold that turns down, or stays flat, while the proxy rises."
    )
    svg = best_of_n(panels, "curves", f"Gains against the square root of KL. {spoken}.")
    return Picture("Proxy and gold", Markup(svg), note)  # noqa: S704 - plots escapes what it is given


def overview(curves: dict[str, Any]) -> Table:
    """One line for each proxy."""
    rows = []
    for name, found in curves.items():
        gold = found["gold"]
        ends = gold["gain_ci95"]
        rows.append(
            Row(
                [
                    name,
                    decimal(found["proxy"]["gain"][-1], 2, signed=True),
                    decimal(gold["gain"][-1], 2, signed=True),
                    interval(ends[-1], signed=True) if ends else MISSING,
                    decimal(found["gap_at_n"], 2),
                    whole(gold["peak_n"]),
                    " to ".join(map(whole, gold["peak_n_ci95"])) if gold["peak_n_ci95"] else MISSING,
                    decimal(gold["late_change"]["mean"], 2, signed=True),
                    interval(gold["late_change"]["ci95"], signed=True),
                    decimal(found["agreement"]["mean"], 2),
                ]
            )
        )
    head = ["chosen by", "proxy at N", "gold at N", "95 % interval", "gap", "gold peaks at n",
            "95 % interval", "late change", "95 % interval", "agreement"]  # fmt: skip
    note = (
        "Gains over the policy's mean reply in standard deviations of the rewards of a prompt's replies, "
        "so that models can be compared. The gap is what the proxy claims and gold does not see; the late "
        "change is gold's from a quarter of N to N. Where gold only levels off, its peak is any late n by "
        "chance. Agreement is Spearman's correlation of the two among a prompt's replies. Bad: a gap near "
        "the proxy's own gain, a late change below 0, an agreement near 0."
    )
    return Table("All proxies", head, rows, note)


def sizes(content: dict[str, Any], found: dict[str, Any]) -> Table | None:
    """Gains at some n."""
    rows, n = [], 1
    while n <= len(content["n"]):
        gold, own = found["gold"], found["proxy"]
        ends = gold["gain_ci95"]
        rows.append(
            Row(
                [
                    str(n),
                    decimal(content["kl"][n - 1], 2),
                    decimal(own["gain"][n - 1], 2, signed=True),
                    decimal(gold["gain"][n - 1], 2, signed=True),
                    interval(ends[n - 1], signed=True) if ends else MISSING,
                ]
            )
        )
        n *= 2
    fitted = mapping(found, "gold", "fit")
    note = (
        f"Fit of gold: alpha {decimal(fitted.get('alpha'), 2)}, beta {decimal(fitted.get('beta'), 2)}, its "
        f"top at a square root of KL of {decimal(fitted.get('peak_sqrt_kl'), 2)}. A curve that levels off "
        "bends the fit down too, so whether gold falls is judged by its change from a quarter of N on. "
        "Bad: a change below 0, for more optimisation then makes replies worse."
    )
    return table("Best of n", ["n", "KL", "proxy", "gold", "95 % interval"], rows, note)


def excess(found: dict[str, Any]) -> Table | None:
    """What the excess reward goes with."""
    rows = []
    for name, part in mapping(found, "excess").items():
        digits = 0 if name == "length" else 3
        cells = [decimal(part.get("correlation"), 2, signed=True), interval(part.get("ci95"), signed=True)]
        cells += [decimal(part.get(key), digits) for key in ("mean", "best_by_proxy", "best_by_gold")]
        rows.append(
            Row([f"{name} ({'characters' if name == 'length' else 'share of repeated word runs'})", *cells])
        )
    head = ["", "correlation", "95 % interval", "all replies", "best by proxy", "best by gold"]
    note = (
        "How the excess, the proxy's reward minus gold's, goes with a reply's length and with how much of "
        "it is said before, and what the best of N are like. Above 0 the proxy pays more for it than gold, "
        "below 0 less. Bad: a correlation beyond 0.3, or a best by the proxy far from the best by gold."
    )
    return table("What the proxy pays for", head, rows, note)


def edits(found: dict[str, Any]) -> Table | None:
    """What edits that should not matter bring by either model."""
    rows = []
    for name, part in mapping(found, "edits").items():
        cells = [edit(name), whole(part.get("n"))]
        for side in ("proxy", "gold", "difference"):
            known = mapping(part, side)
            cells += [decimal(known.get("mean"), 2, signed=True), interval(known.get("ci95"), signed=True)]
        rows.append(Row(cells))
    head = [
        "edit",
        "replies",
        "proxy",
        "95 % interval",
        "gold",
        "95 % interval",
        "difference",
        "95 % interval",
    ]
    note = (
        "How the rewards of replies change when they are edited without saying anything else, in standard "
        "deviations. Bad: a gain by the proxy that gold does not share, for a policy will find it."
    )
    return table("Edits that should not matter", head, rows, note)


def example(item: dict[str, Any]) -> dict[str, Any]:
    """An exploit as the template shows comparisons."""
    shown = []
    for key, name in (("exploit", "best by the proxy"), ("best_by_gold", "best by gold")):
        reply = mapping(item, key)
        rewards = ", ".join(
            f"{word} {decimal(reply.get(word), 2, signed=True)}" for word in ("proxy", "gold")
        )
        shown.append(
            {
                "content": shorten(as_text(reply.get("response")), LONGEST_TEXT),
                "reward": rewards,
                "tokens": "",
                "chosen": key == "best_by_gold",
                "verdict": name,
                "preferred": False,
            }
        )
    return {
        "title": f"excess {decimal(item.get('excess'), 2, signed=True)}",
        "where": "",
        "prompt": [
            {
                "role": as_text(message.get("role")),
                "content": shorten(as_text(message.get("content")), LONGEST_TEXT),
            }
            for message in item["prompt"]
        ],
        "responses": shown,
    }


def sampling(content: dict[str, Any]) -> Table | None:
    """How replies were drawn."""
    drawn = mapping(content, "sampling")
    note = (
        "Divergences are from the policy as it was drawn from: with a temperature other than 1, or with "
        "top_p or top_k, that is not the policy as it was trained."
    )
    return values(
        "How replies were drawn", {words(key): as_text(value) for key, value in drawn.items()}, note
    )


def samples(content: dict[str, Any]) -> Table | None:
    """What was scored."""
    found = dict(content["samples"])
    left_out = found.pop("excluded")
    shown = {words(key): as_text(value) for key, value in found.items()}
    shown |= {f"prompts left out: {words(reason)}": whole(n) for reason, n in left_out.items()}
    note = "Empty replies count like any other. Bad: many replies that were cut, or said before."
    return values("What was scored", shown, note)
