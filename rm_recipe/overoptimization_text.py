"""What an over-optimisation measurement says: one sentence for each proxy, and the table on the terminal."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rm_recipe.best_of_n import Curve, kl
from rm_recipe.report_text import MISSING, decimal, interval, is_number, mapping, share, visible
from rm_recipe.verdict import edit

AGREE = 0.99  # rank correlation beyond which gold may be the proxy again
FOOLED = 0.25  # of the replies that an edit is tried on


def verdict(proxy: Curve, gold: Curve) -> tuple[str, str]:
    """What optimising by a proxy does to gold: `good`, `plain` or `bad`, and why, in one sentence.

    Whether gold falls is judged by the slope of its fitted curve at N, on which all sizes have a say, and by
    its interval.
    """
    replies = len(gold.gain)
    last = f"n = {replies} (square root of KL {np.sqrt(kl(replies)):.2f})"
    top, own = gold.gain[gold.peak - 1], proxy.gain[-1]
    gain = f"{decimal(gold.gain[-1], 2, signed=True)} standard deviations"
    if not own:
        return (
            "bad",
            "This proxy gives all replies to a prompt the same reward, so there is nothing to optimise.",
        )
    if gold.low is None or gold.high is None:
        return "plain", (
            f"One prompt gives no interval: by gold its best of n peaks at n = {gold.peak}, and {gain} are "
            f"gained at {last}."
        )
    ends = interval([float(gold.low[-1]), float(gold.high[-1])], signed=True)
    if gold.high[-1] < 0:
        return "bad", f"Choosing by this proxy makes replies worse by gold: {gain} ({ends}) at {last}."
    if gold.low[gold.peak - 1] <= 0:
        return "bad", f"Choosing by this proxy gains nothing certain by gold: {gain} ({ends}) at {last}."
    if gold.slope_ci95 is not None and gold.slope_ci95[1] < 0:
        return "bad", (
            f"Over-optimised: by gold the best of n peaks at n = {gold.peak} (square root of KL "
            f"{np.sqrt(kl(gold.peak)):.2f}) and has lost {decimal(gold.lost, 2)} of its {decimal(top, 2)} "
            f"standard deviations at n = {replies}, while the proxy gains {decimal(own, 2)}."
        )
    if gold.slope_ci95 is not None and gold.slope_ci95[0] > 0:
        return "good", (
            f"No over-optimisation up to {last}: gold still rises there, and has gained {gain} of the "
            f"proxy's {decimal(own, 2)}."
        )
    slope = f"slope {interval(gold.slope_ci95, signed=True)}" if gold.slope_ci95 else "too few sizes"
    return "plain", (
        f"Gold has gained {gain} ({ends}) at {last}, and whether it still rises there cannot be told from "
        f"these prompts ({slope})."
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
        fooled = mapping(found, "edits", name).get("fooled")
        if is_number(fooled) and fooled > FOOLED:
            said.append(f"With {edit(name)} {share(fooled)} of replies gain by this proxy and not by gold.")
    return said


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
    for name, found in content["curves"].items():
        for sentence in [found["verdict"], *warnings(found)]:
            named = f"{name}: {sentence}" if len(content["curves"]) > 1 else sentence
            console.print(Text(visible(named)))
