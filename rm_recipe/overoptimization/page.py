"""What an over-optimisation measurement comes to: sentences, the terminal, a page and its picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from rm_recipe.evaluation.findings import EDITS
from rm_recipe.evaluation.format import decimal, interval, print_table, whole, write_page
from rm_recipe.evaluation.plots import CHOSEN, MUTED, REJECTED, own_settings, svg
from rm_recipe.files import redact, visible, whole_file
from rm_recipe.overoptimization.best_of_n import kl

AGREE = 0.99  # rank correlation beyond which gold may be the proxy again
MATERIAL = 0.1  # standard deviations by which an edit moves the proxy
FEWEST_PROMPTS = 20  # of fewer, a bootstrap's intervals are too narrow
MANY_LOST = 0.03  # of the prompts

# --- what to think of it -----------------------------------------------------------------------


def verdict(proxy: dict[str, Any], gold: dict[str, Any], prompts: int) -> tuple[str, str]:
    """What optimising by a proxy does to gold: `good`, `plain` or `bad`, and why, in one sentence.

    Whether gold falls or rises in the end is judged by its change from N / 4 to N and the interval of that.

    Args:
        proxy, gold: of `best_of_n.curve`.
    """
    replies, own = len(gold["gain"]), decimal(proxy["gain"][-1], 2)
    last = f"n = {replies} (square root of KL {np.sqrt(kl(replies)):.2f})"
    gain = f"{decimal(gold['gain'][-1], 2, signed=True)} standard deviations"
    if not proxy["gain"][-1]:
        return (
            "bad",
            "This proxy gives all replies to a prompt the same reward, so there is nothing to optimise.",
        )
    if prompts < FEWEST_PROMPTS:
        few = f"{prompts} prompt{' is' if prompts == 1 else 's are'} too few to tell"
        return "plain", f"{few}: by gold {gain} are gained at {last}, of the proxy's {own}."
    change, (low, high) = gold["late_change"], gold["gain_ci95"][-1]
    gain_with_ends = f"{gain} ({interval([low, high], signed=True)})"
    late = f"{decimal(change['mean'], 2, signed=True)} ({interval(change['ci95'], signed=True)})"
    late += f" from n = {change['from_n']} on"
    if high < 0:
        return "bad", f"Choosing by this proxy makes replies worse by gold: {gain_with_ends} at {last}."
    if change["ci95"][1] < 0:
        where = f"n = {gold['peak_n']} (square root of KL {np.sqrt(kl(gold['peak_n'])):.2f})"
        falls = f"peaks at about {where} and then falls, by {late} to n = {replies}"
        return "bad", f"Over-optimised: by gold the best of n {falls}, while the proxy gains {own}."
    if low <= 0:
        return "bad", f"Choosing by this proxy gains nothing certain by gold: {gain_with_ends} at {last}."
    if change["ci95"][0] > 0:
        rises = f"gold still rises, by {late}, and has gained {gain} of the proxy's {own}"
        return "good", f"No over-optimisation up to {last}: {rises}."
    flat = f"{late} is neither a rise nor a fall for certain"
    return (
        "plain",
        f"Gold has gained {gain_with_ends} of the proxy's {own} at {last}, and levels off: {flat}.",
    )


def warnings(found: dict[str, Any]) -> list[str]:
    """What else to know of one of the `curves` in `overoptimization.json`."""
    said, agreement = [], found["agreement"]["mean"]
    if agreement is not None and agreement > AGREE:
        how = f"rank correlation {decimal(agreement)}"
        said.append(f"Gold ranks replies as this proxy does ({how}): is it the same model?")
    for name, part in found["edits"].items():
        own, theirs, ends = part["proxy"]["mean"], part["gold"]["mean"], part["difference"]["ci95"]
        if own >= MATERIAL and ends and ends[0] > 0:
            gains = f"{decimal(own, 2)} by this proxy and {decimal(theirs, 2)} by gold"
            said.append(f"With {EDITS[name]} replies gain {gains}.")
    return said


def lost_prompts(samples: dict[str, Any]) -> list[str]:
    """What to say where many prompts have a reply that does not fit a model: they may be the longest."""
    lost = samples["excluded"].get("does_not_fit_a_model", 0)
    if lost <= MANY_LOST * (lost + samples["n_prompts"]):
        return []
    why = "as one of their replies does not fit a model: what long replies gain may be hidden"
    return [f"{whole(lost)} prompts are left out, {why}."]


def print_overoptimization(content: dict[str, Any], console: Console | None = None) -> None:
    """Print the figures that matter of `overoptimization.json`, and what they mean."""
    samples, curves, console = content["samples"], content["curves"], console or Console()
    left_out = sum(samples["excluded"].values())
    title = f"Best of {samples['n_replies']} replies to each of {samples['n_prompts']} prompts"
    title += f", {left_out} prompts left out" if left_out else ""
    rows = [
        [
            name,
            decimal(found["proxy"]["gain"][-1], 2, signed=True),
            decimal(found["gold"]["gain"][-1], 2, signed=True),
            interval((found["gold"]["gain_ci95"] or [None])[-1], 2, signed=True),
            f"n = {found['gold']['peak_n']}",
            decimal(found["agreement"]["mean"], 2),
        ]
        for name, found in curves.items()
    ]
    head = ["chosen by", "proxy", "gold", "95 % interval", "gold peaks", "agreement"]
    print_table(title, head, rows, console)
    console.print(
        "Gains over the policy's mean reply, in standard deviations of the rewards of a\n"
        "prompt's replies; agreement is the rank correlation of proxy and gold among them."
    )
    said = lost_prompts(samples)
    for name, found in curves.items():
        of = f"{name}: " if len(curves) > 1 else ""
        said += [of + sentence for sentence in [found["verdict"], *warnings(found)]]
    for sentence in said:
        console.print(Text(visible(sentence)))


# --- the page and the picture ------------------------------------------------------------------

PAGE, PICTURE = "overoptimization.html", "overoptimization.svg"
TEMPLATE = Path(__file__).with_name("overoptimization.html.jinja")
COLUMNS = 2
PANEL = (5.0, 3.4)  # inches
LONGEST_TITLE = 46

Curves = dict[str, dict[str, Any]]  # of `overoptimization.json`, by proxy


def write_overoptimization(folder: Path, content: dict[str, Any]) -> None:
    """Write page and picture of `overoptimization.json` beside it."""
    curves = {redact(name): found for name, found in content["curves"].items()}
    spoken = "; ".join(
        f"{name}: the proxy gains {decimal(found['proxy']['gain'][-1], 2)}, gold "
        f"{decimal(found['gold']['gain'][-1], 2)} and peaks at n = {found['gold']['peak_n']}"
        for name, found in curves.items()
    )
    size = _size(len(curves))
    label = f"Gains against the square root of KL. {spoken}."
    write_page(
        folder / PAGE,
        TEMPLATE,
        content=content,
        sizes=[n for n in 2 ** np.arange(12) if n <= len(content["n"])],
        edits=EDITS,
        warnings=warnings,
        lost=lost_prompts(content["samples"]),
        picture_of_curves=svg(lambda figure: _draw(figure, curves), "curves", label, size),
    )
    with whole_file(folder / PICTURE) as partial, own_settings():
        figure = Figure(figsize=size, layout="constrained")
        _draw(figure, curves)
        figure.savefig(partial, format="svg", facecolor="white", metadata={"Date": None})


def _size(panels: int) -> tuple[float, float]:
    return PANEL[0] * min(COLUMNS, panels), PANEL[1] * -(-panels // COLUMNS)


def _draw(figure: Figure, curves: Curves) -> None:
    """Proxy and gold against the distance from the policy, a panel for each proxy."""
    columns = min(COLUMNS, len(curves))
    grid = figure.subplots(-(-len(curves) // columns), columns, sharey=True, squeeze=False)
    for axes in grid.ravel()[len(curves) :]:
        axes.set_visible(False)
    for axes, (name, found) in zip(grid.ravel(), curves.items(), strict=False):
        _draw_panel(axes, visible(name), found)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _draw_panel(axes: Axes, title: str, found: dict[str, Any]) -> None:
    for word, colour in (("proxy", CHOSEN), ("gold", REJECTED)):
        gain, ends, fit = (found[word][key] for key in ("gain", "gain_ci95", "fit"))
        d = np.sqrt(kl(np.arange(1, len(gain) + 1)))
        axes.plot(d, gain, color=colour, linewidth=1.8, label=word)
        if ends:
            axes.fill_between(d, *np.transpose(ends), color=colour, alpha=0.18, linewidth=0)
        if fit["alpha"] is not None:
            fitted = d * (fit["alpha"] - fit["beta"] * d)
            axes.plot(d, fitted, color=colour, linewidth=1.1, linestyle="--", label=f"{word}, fitted")
    peak, replies = found["gold"]["peak_n"], len(found["gold"]["gain"])
    if peak < replies:
        place = float(np.sqrt(kl(peak)))
        axes.axvline(place, color=MUTED, linewidth=1.1, linestyle=":")
        over_axes, side = axes.get_xaxis_transform(), "right" if peak > 2 else "left"
        axes.text(place, 0.08, f" gold peaks, n = {peak} ", transform=over_axes, ha=side, fontsize=9)
    sizes = [n for n in 2 ** np.arange(12) if n <= replies]
    axes.set_xticks(np.sqrt(kl(sizes)), [f"{np.sqrt(kl(n)):.2f}\n{n}" for n in sizes])
    axes.set(xlabel="square root of KL, in nats; below it n", ylabel="gain, in standard deviations")
    axes.axhline(0, color=MUTED, linewidth=0.8)
    title = title if len(title) <= LONGEST_TITLE else f"...{title[-LONGEST_TITLE:]}"
    axes.set_title(title, fontsize=10, color=MUTED, loc="left")
