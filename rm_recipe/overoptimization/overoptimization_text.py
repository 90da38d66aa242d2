"""What an over-optimisation measurement says: one sentence for each proxy, and the table on the terminal."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rm_recipe.evaluation.findings import edit
from rm_recipe.evaluation.format import MISSING, decimal, interval, is_number, limits, mapping, visible, whole
from rm_recipe.overoptimization.best_of_n import Curve, kl

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
    table = Table(title=title, title_justify="left")
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
