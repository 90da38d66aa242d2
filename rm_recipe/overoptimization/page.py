"""An over-optimisation measurement as one page, `overoptimization.html`, and its picture as a file."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from rm_recipe.evaluation.findings import edit
from rm_recipe.evaluation.format import (
    MISSING,
    Row,
    Table,
    as_text,
    decimal,
    interval,
    mapping,
    shorten,
    table,
    values,
    whole,
    words,
)
from rm_recipe.evaluation.pages import render_page
from rm_recipe.evaluation.report_predictions import LONGEST_TEXT, Picture
from rm_recipe.files import whole_file
from rm_recipe.overoptimization.overoptimization_text import lost_prompts, warnings
from rm_recipe.overoptimization.plots_best_of_n import Panel, best_of_n, save_best_of_n
from rm_recipe.redaction import redact

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
