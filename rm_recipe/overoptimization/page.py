"""What an over-optimisation measurement comes to: sentences, the terminal, a page and its picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rm_recipe.evaluation.findings import EDITS
from rm_recipe.evaluation.format import decimal, interval, print_table, print_text, write_page
from rm_recipe.evaluation.plots import CHOSEN, MUTED, REJECTED, svg
from rm_recipe.files import redact, visible
from rm_recipe.overoptimization.best_of_n import kl

AGREE = 0.99  # rank correlation beyond which gold may be the proxy again
MATERIAL = 0.1  # standard deviations by which an edit moves the proxy
FEWEST_PROMPTS = 20  # of fewer, a bootstrap's intervals are too narrow

# --- what to think of it -----------------------------------------------------------------------


def verdict(proxy: dict[str, Any], gold: dict[str, Any], prompts: int) -> tuple[str, str]:
    """What optimising by a proxy does to gold: `good`, `plain` or `bad`, and why, in one sentence.

    Whether gold falls or rises in the end is judged by its change from N / 4 to N and the interval of that.

    Args:
        proxy, gold: of `best_of_n.gain_curve`.
    """
    replies, own, peak = len(gold["gain"]), decimal(proxy["gain"][-1], 2), gold["peak_n"]
    last, highest = (f"n = {n} (square root of KL {np.sqrt(kl(n)):.2f})" for n in (replies, peak))
    gain = f"{decimal(gold['gain'][-1], 2, signed=True)} standard deviations"
    if prompts < FEWEST_PROMPTS:
        few = f"{prompts} prompts are too few to tell"
        return "plain", f"{few}: by gold {gain} are gained at {last}, of the proxy's {own}."
    change, ends = gold["late_change"], gold["gain_ci95"][-1]
    with_ends = f"{gain} ({interval(ends, signed=True)})"
    late = f"{decimal(change['mean'], 2, signed=True)} ({interval(change['ci95'], signed=True)})"
    late += f" from n = {change['from_n']} on"
    if change["ci95"][1] < 0:
        falls = f"peaks at about {highest} and then falls, by {late} to n = {replies}"
        return "bad", f"Over-optimised: by gold the best of n {falls}, while the proxy gains {own}."
    if ends[1] < 0:
        return "bad", f"Choosing by this proxy makes replies worse by gold: {with_ends} at {last}."
    if ends[0] <= 0:
        return "bad", f"Choosing by this proxy gains nothing certain by gold: {with_ends} at {last}."
    if change["ci95"][0] > 0:
        rises = f"gold still rises, by {late}, and has gained {gain} of the proxy's {own}"
        return "good", f"No over-optimisation up to {last}: {rises}."
    flat = f"levels off: {late} is neither a rise nor a fall for certain"
    return "plain", f"Gold has gained {with_ends} of the proxy's {own} at {last}, and {flat}."


def warnings(found: dict[str, Any]) -> list[str]:
    """What else to know of one of the `curves` in `overoptimization.json`."""
    said, agreement = [], found["agreement"]["mean"]
    if agreement is not None and agreement > AGREE:
        how = f"as this proxy does (rank correlation {decimal(agreement)})"
        said.append(f"Gold ranks replies {how}: is it the same model?")
    for name, part in found["edits"].items():
        own, theirs, ends = part["proxy"]["mean"], part["gold"]["mean"], part["difference"]["ci95"]
        if own >= MATERIAL and ends[0] > 0:
            gains = f"{decimal(own, 2)} by this proxy and {decimal(theirs, 2)} by gold"
            said.append(f"With {EDITS[name]} replies gain {gains}.")
    return said


HEAD = ["chosen by", "proxy", "gold", "95 % interval", "gold peaks", "agreement"]


def overview(name: str, found: dict[str, Any]) -> list[str]:
    """A proxy's line under `HEAD`, of the page and of the terminal."""
    gold = found["gold"]
    return [
        name,
        decimal(found["proxy"]["gain"][-1], 2, signed=True),
        decimal(gold["gain"][-1], 2, signed=True),
        interval(gold["gain_ci95"][-1], 2, signed=True),
        f"n = {gold['peak_n']}",
        decimal(found["agreement"]["mean"], 2),
    ]


def print_overoptimization(content: dict[str, Any]) -> None:
    """Print the figures that matter of `overoptimization.json`, and what they mean."""
    samples, curves = content["samples"], content["curves"]
    left_out = sum(samples["excluded"].values())
    title = f"Best of {samples['n_replies']} replies to each of {samples['n_prompts']} prompts"
    title += f", {left_out} prompts left out" if left_out else ""
    print_table(title, HEAD, [overview(*item) for item in curves.items()])
    print_text(
        "Gains over the policy's mean reply, in standard deviations of the rewards of a prompt's replies; "
        "agreement is the rank correlation of proxy and gold among them."
    )
    for name, found in curves.items():
        of = f"{name}: " if len(curves) > 1 else ""
        for sentence in [found["verdict"], *warnings(found)]:
            print_text(of + sentence)


# --- the page and the picture ------------------------------------------------------------------

PANEL = (7.0, 3.4)  # inches
LONGEST_TITLE = 66


def write_overoptimization(folder: Path, content: dict[str, Any]) -> None:
    """Write the page of `overoptimization.json` beside it."""
    curves = {redact(name): found for name, found in content["curves"].items()}
    size = PANEL[0], PANEL[1] * len(curves)
    spoken = " ".join(f"{name}: {found['verdict']}" for name, found in curves.items())
    picture = svg(draw_curves, f"Gains against the square root of KL. {spoken}", size, curves=curves)
    write_page(
        folder / "overoptimization.html",
        Path(__file__).with_name("overoptimization.html.jinja"),
        content=content,
        head=HEAD,
        overview=overview,
        edits=EDITS,
        warnings=warnings,
        picture_of_curves=picture,
    )


def draw_curves(figure: Figure, curves: dict[str, dict[str, Any]]) -> None:
    """Draw proxy and gold against the distance from the policy, a panel for each proxy."""
    panels = figure.subplots(len(curves), sharey=True, squeeze=False).ravel()
    for axes, (name, found) in zip(panels, curves.items(), strict=True):
        _draw_panel(axes, visible(name)[-LONGEST_TITLE:], found)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _draw_panel(axes: Axes, title: str, found: dict[str, Any]) -> None:
    d = np.sqrt(kl(np.arange(1, len(found["gold"]["gain"]) + 1)))
    for word, colour in (("proxy", CHOSEN), ("gold", REJECTED)):
        axes.plot(d, found[word]["gain"], color=colour, linewidth=1.8, label=word)
        axes.fill_between(d, *np.transpose(found[word]["gain_ci95"]), color=colour, alpha=0.18, linewidth=0)
    sizes, peak = [2**k for k in range(len(d).bit_length())], found["gold"]["peak_n"]
    axes.set_xticks([d[n - 1] for n in sizes], [f"{d[n - 1]:.2f}\n{n}" for n in sizes])
    axes.set(xlabel="square root of KL, in nats; below it n", ylabel="gain, in standard deviations")
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.axvline(d[peak - 1], color=MUTED, linewidth=1.1, linestyle=":")
    axes.set_title(f"{title}; gold peaks at n = {peak}", fontsize=10, color=MUTED, loc="left")
