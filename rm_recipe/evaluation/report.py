"""What a run came to, as one page to read and to pass on: `report.html`.

The page is made of files that already stand in the folder; nothing is scored anew. It loads
nothing, runs no script and says nothing of when or where it was made: the same files give the same
bytes. A file or a figure that is absent leaves its part of the page out.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation import plots
from rm_recipe.evaluation.findings import HELD_OUT, best_baseline, edit, gate_words, readings, rule
from rm_recipe.evaluation.format import (
    MISSING,
    Row,
    Table,
    as_text,
    decimal,
    duration,
    interval,
    is_number,
    limits,
    mapping,
    objects,
    p_value,
    share,
    shorten,
    strip,
    table,
    values,
    whole,
    words,
)
from rm_recipe.evaluation.summary import read_predictions
from rm_recipe.files import read_json, redact, visible, whole_file

# --- tables of one data set's figures ----------------------------------------------------------
# Every function takes the figures of one data set as `evaluation.json` holds them and returns None
# where they are absent, so that files of an older version give a shorter report.

Figures = dict[str, Any]
BUCKETS = {
    "turns": (
        "Number of turns",
        "turns",
        "Comparisons by the number of turns in the conversation. Bad: accuracy that falls as it grows.",
    ),
    "prompt_tokens": (
        "Length of the prompt",
        "prompt tokens",
        "Prompts by their number of tokens. Bad: accuracy near 0.5 for long prompts; were they truncated?",
    ),
    "margin": (
        "Size of the margin",
        "|margin|",
        "Comparisons by how far apart the two rewards are. Where the model is sure it should be right: "
        "accuracy should rise from row to row. Bad: large margins and accuracy far below 1.",
    ),
}


def data_sets(evaluated: dict[str, Figures]) -> Table:
    """One line for each data set, all of them."""
    rows = []
    for name, figures in evaluated.items():
        accuracy, ends, best = figures.get("accuracy"), figures.get("accuracy_ci95"), best_baseline(figures)
        cells = [
            name,
            decimal(accuracy),
            interval(ends),
            whole(figures.get("n_scored")),
            whole(sum(n for n in mapping(figures, "excluded").values() if is_number(n))),
            whole(figures.get("ties")),
            decimal(figures.get("loss")),
            f"{decimal(best[1])} ({rule(best[0])})" if best else MISSING,
        ]
        rows.append(Row(cells, strip(accuracy, ends)))
    note = (
        "Accuracy is the share of comparisons whose chosen response got the higher reward; guessing gives "
        "0.5. n comparisons were scored. Bad: an interval that reaches down to 0.5 or to the best "
        "baseline, a loss near 0.693 or above, many ties or many comparisons left out."
    )
    head = ["data set", "accuracy", "95 % interval", "n", "left out", "ties", "loss", "best baseline"]
    return Table("All data sets", head, rows, note)  # whole: no data set is left out


def baselines(figures: Figures) -> Table | None:
    """Rules that need no reward model, and how far the model is ahead of each."""
    against, rules = mapping(figures, "against_baselines"), mapping(figures, "baselines")
    rows = []
    for name in dict.fromkeys([*rules, *against]):
        lead = mapping(against, name)
        ahead = [decimal(lead.get("difference"), signed=True), interval(lead.get("ci95"), signed=True)]
        rows.append(Row([rule(name), decimal(rules.get(name)), *ahead, p_value(lead.get("p_value"))]))
    note = (
        "Simple rules on the same comparisons; bag of words counts words and knows no order. The "
        "difference is the model's accuracy minus the rule's, its interval from a paired bootstrap, p "
        "from McNemar's test. Bad: an interval that holds 0, for then the rule explains what the model "
        "knows."
    )
    return table("Baselines", ["rule", "accuracy", "model minus rule", "95 % interval", "p"], rows, note)


def other_model(figures: Figures) -> Table | None:
    """This model and another one on the same comparisons."""
    other = mapping(figures, "against")
    found = {
        "comparisons that both scored": whole(other.get("n")),
        "accuracy of this model": decimal(other.get("accuracy")),
        "accuracy of the other": decimal(other.get("other_accuracy")),
        "difference": decimal(other.get("difference"), signed=True),
        "95 % interval of the difference": interval(other.get("ci95"), signed=True),
        "p (McNemar)": p_value(other.get("p_value")),
        "only this model is right": whole(other.get("only_this")),
        "only the other is right": whole(other.get("only_other")),
    }
    note = (
        "The comparisons on which only one model is right decide. While the interval of the difference "
        "holds 0, these data do not show which model is better."
    )
    return values(f"Against {as_text(other.get('model')) or 'another model'}", found, note)


def ranking(figures: Figures) -> Table | None:
    """Figures of comparisons with more than two responses."""
    ranked = mapping(figures, "ranking")
    found = {
        "pairs of different rank": whole(ranked.get("pairs")),
        "pairs ordered rightly": decimal(ranked.get("pairwise_accuracy")),
        "best response got the highest reward": decimal(ranked.get("best_of_k")),
        "Kendall's tau": decimal(ranked.get("kendall_tau"), signed=True),
    }
    note = (
        "Comparisons with more than two responses give several pairs. Tau is 1 where the order is right, "
        "0 where it is random, \N{MINUS SIGN}1 where it is reversed. Bad: tau near 0 or below, pairs near "
        "0.5."
    )
    return values("Rankings", found, note)


def subsets(figures: Figures) -> Table | None:
    """The largest subsets first."""
    found = [(name, mapping(figures, "subsets", name)) for name in mapping(figures, "subsets")]
    found.sort(key=lambda item: (-item[1]["n"] if is_number(item[1].get("n")) else 0, item[0]))
    note = (
        "Parts that the data set names, the largest first. Bad: a part whose whole interval lies below "
        "the others', and above all below 0.5. Wide intervals say only that a part is small."
    )
    return _accuracies("Subsets", "subset", found, note)


def buckets(figures: Figures, key: str) -> Table | None:
    """Accuracy in the ordered buckets of one of `BUCKETS`."""
    title, head, note = BUCKETS[key]
    found = objects(mapping(figures, "by"), key)
    return _accuracies(title, head, [(as_text(bucket.get("label")), bucket) for bucket in found], note)


def _accuracies(title: str, head: str, found: list[tuple[str, Figures]], note: str) -> Table | None:
    rows = []
    for name, part in found:
        accuracy, ends = part.get("accuracy"), part.get("accuracy_ci95")
        cells = [name, whole(part.get("n")), decimal(accuracy), interval(ends)]
        rows.append(Row(cells, strip(accuracy, ends)))
    return table(title, [head, "n", "accuracy", "95 % interval"], rows, note)


def length(figures: Figures) -> Table | None:
    """How far rewards follow length."""
    known = mapping(figures, "length")
    found = {
        "rank correlation of reward and response tokens": decimal(known.get("spearman"), signed=True),
        "rank correlation of margin and chosen minus rejected tokens": decimal(
            known.get("spearman_margin"), signed=True
        ),
        "accuracy where the chosen response is longer": decimal(known.get("accuracy_chosen_longer")),
        "accuracy where the chosen response is shorter": decimal(known.get("accuracy_chosen_shorter")),
    }
    note = (
        "Correlations are Spearman's, from \N{MINUS SIGN}1 to 1; 0 is no relation. Bad: correlations "
        "beyond about 0.3 either way, or accuracies far apart: the model then pays for length rather than "
        "content, and a policy trained on it will write ever longer (or shorter) answers."
    )
    return values("Length bias", found, note)


def consistency(figures: Figures) -> Table | None:
    """What edits that change no meaning do to rewards."""
    spread, rows = figures.get("std_reward"), []
    for name in mapping(figures, "consistency"):
        found = mapping(figures, "consistency", name)
        change = found.get("mean_change")
        relative = MISSING
        if is_number(change) and is_number(spread) and spread > 0:
            relative = decimal(change / spread, 2, signed=True)
        cells = [
            edit(name),
            whole(found.get("n")),
            decimal(change, signed=True),
            relative,
            decimal(found.get("std_change")),
            decimal(found.get("largest")),
            share(found.get("share_up")),
            share(found.get("wins")),
        ]
        rows.append(Row(cells))
    head = [
        "edit",
        "n",
        "mean change",
        "in std of rewards",
        "std of change",
        "largest (either way)",
        "raised",
        "wins by it",
    ]
    note = (
        "Responses were edited without changing what they say. Changes are in units of reward, and once "
        "more in standard deviations of all rewards. Raised: share of responses whose reward rises. Wins "
        "by it: share of rejected responses that overtake the chosen one. Bad: a mean beyond a quarter of "
        "a standard deviation, or more than a few per cent of wins, for a policy will find that trick."
    )
    return table("Edits that should not matter", head, rows, note)


def excluded(figures: Figures) -> Table | None:
    """Comparisons that were not scored, by reason."""
    total, rows = figures.get("n_comparisons"), []
    for reason, n in mapping(figures, "excluded").items():
        if is_number(n) and n:
            part = share(n / total) if is_number(total) and total else MISSING
            rows.append(Row([words(reason), whole(n), part]))
    note = (
        "Comparisons that were read but not scored. Bad: more than a few per cent, for the accuracy speaks "
        "only of the rest."
    )
    return table("Left out", ["reason", "comparisons", "of all"], rows, note)


# --- `predictions.jsonl`: pictures, and comparisons to read ------------------------------------

LONGEST_TEXT = 20_000  # characters of one message that are shown
MOST_SHOWN = 10


@dataclass
class Predictions:
    """What the report needs of one data set's predictions."""

    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    shown: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"mistake": [], "close": []})


@dataclass(frozen=True)
class Picture:
    """A figure of the report. `note` says how to read it and what would be bad."""

    title: str
    svg: Markup
    note: str


def by_data_set(lines: Iterable[dict[str, Any]]) -> dict[str, Predictions]:
    """The lines of `predictions.jsonl` by their data set. Lines without rewards count for nothing."""
    found: dict[str, Predictions] = {}
    for line in lines:
        _add(found, line)
    return found


def _add(found: dict[str, Predictions], line: dict[str, Any]) -> None:
    own = found.setdefault(as_text(line.get("dataset")), Predictions())
    rewards, ranks = line.get("rewards"), line.get("ranks")
    if isinstance(rewards, list) and isinstance(ranks, list) and len(rewards) == len(ranks):
        pairs = [(reward, rank) for reward, rank in zip(rewards, ranks, strict=True) if is_number(reward)]
        best = min((rank for rank in ranks if is_number(rank)), default=0)
        own.chosen += [reward for reward, rank in pairs if rank == best]
        own.rejected += [reward for reward, rank in pairs if rank != best]
    if is_number(line.get("margin")):
        own.margins.append(line["margin"])
    kept = own.shown.get(as_text(line.get("shown")))
    if kept is not None and len(kept) < MOST_SHOWN and mapping(line, "text"):
        kept.append(line)


# --- comparisons to read ---------------------------------------------------------------------


def examples(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Comparisons as the template shows them; the surest mistakes, or the closest calls, first."""
    sign = 1 if kind == "mistake" else -1
    known = [line for line in lines if is_number(line.get("margin"))]
    size = {id(line): abs(line["margin"]) * sign for line in known}
    return [_example(line) for line in sorted(lines, key=lambda line: -size.get(id(line), float("-inf")))]


def _example(line: dict[str, Any]) -> dict[str, Any]:
    text = mapping(line, "text")
    prompt = text.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "prompt", "content": prompt}]
    messages = [
        {"role": as_text(message.get("role")) or "?", "content": _content(message.get("content"))}
        for message in objects({"prompt": prompt}, "prompt")
    ]
    where = [f"row {as_text(line['row'])}"] if line.get("row") is not None else []
    where += [f"subset {as_text(line['subset'])}"] if line.get("subset") else []
    where += [f"{whole(line['turns'])} turns"] if is_number(line.get("turns")) else []
    return {
        "title": f"margin {decimal(line.get('margin'), 3, signed=True)}",
        "where": ", ".join(where),
        "prompt": messages,
        "responses": _responses(line, text.get("responses")),
    }


def _responses(line: dict[str, Any], texts: Any) -> list[dict[str, Any]]:
    texts = texts if isinstance(texts, list) else []
    values = {
        key: line[key] if isinstance(line.get(key), list) else []
        for key in ("rewards", "ranks", "response_tokens")
    }
    columns = [values[key] + [None] * (len(texts) - len(values[key])) for key in values]
    rewards, ranks, tokens = columns
    best = min((rank for rank in ranks if is_number(rank)), default=0)
    highest = max((reward for reward in rewards if is_number(reward)), default=None)
    alone = highest is not None and rewards.count(highest) == 1
    return [
        {
            "content": _content(content),
            "reward": f"reward {decimal(rewards[i], 3, signed=True)}",
            "tokens": whole(tokens[i]) if is_number(tokens[i]) else "",
            "chosen": ranks[i] == best,
            "verdict": _verdict(ranks[i], best, len(texts)),
            "preferred": alone and rewards[i] == highest,
        }
        for i, content in enumerate(texts)
    ]


def _verdict(rank: Any, best: Any, responses: int) -> str:
    if not is_number(rank):
        return "response"
    if rank == best:
        return "chosen"
    return "rejected" if responses == 2 else f"rank {whole(rank + 1)}"


def _content(content: Any) -> str:
    return shorten(as_text(content), LONGEST_TEXT)


# --- pictures --------------------------------------------------------------------------------


def pictures(figures: dict[str, Any], own: Predictions, name: str) -> list[Picture]:
    """The figures of one data set, of those that its numbers allow.

    Args:
        name: begins the ids inside them.
    """
    made = [_rewards(own, name), _margins(own, name), _reliability(figures, name), _by_length(figures, name)]
    return [picture for picture in made if picture is not None]


def _rewards(own: Predictions, name: str) -> Picture | None:
    if not own.chosen and not own.rejected:
        return None
    label = f"Histograms of {len(own.chosen):,} chosen and {len(own.rejected):,} rejected responses' rewards."
    svg = plots.rewards(own.chosen, own.rejected, f"{name}-rewards", label)
    note = (
        "Rewards have no unit and no zero of their own; only differences mean something. Chosen responses "
        "should lie to the right of rejected ones. Bad: two shapes on top of each other, or one lonely "
        "spike."
    )
    return Picture("Rewards", Markup(svg), note)  # noqa: S704 - plots escapes what it is given


def _margins(own: Predictions, name: str) -> Picture | None:
    if not own.margins:
        return None
    below, total = sum(margin < 0 for margin in own.margins), len(own.margins)
    label = f"Histogram of {total:,} margins: {below:,} lie below 0."
    svg = plots.margins(own.margins, f"{name}-margins", label)
    note = (
        f"How much more the chosen response got, in units of reward: {below:,} of {total:,} comparisons "
        "lie left of 0, where the model prefers the rejected response. Bad: much left of 0, and above all "
        "far left: mistakes that the model is sure of."
    )
    return Picture("Margins", Markup(svg), note)  # noqa: S704


def _reliability(figures: dict[str, Any], name: str) -> Picture | None:
    found = objects(mapping(figures, "calibration"), "bins")
    keys = ("confidence", "accuracy", "n")
    bins = [
        tuple(item[key] for key in keys) for item in found if all(is_number(item.get(key)) for key in keys)
    ]
    if not bins:
        return None
    pairs = ", ".join(f"{confidence:.2f} right {accuracy:.2f}" for confidence, accuracy, _ in bins)
    svg = plots.reliability(bins, f"{name}-reliability", f"Reliability curve: confident {pairs}.")
    note = (
        "Where the model says 80 %, it should be right in 80 % of pairs: "
        "points on the dashed line. Bad: points below it (too sure). Points "
        "of few pairs scatter." + _calibration_words(figures)
    )
    return Picture("Calibration", Markup(svg), note)  # noqa: S704


def _by_length(figures: dict[str, Any], name: str) -> Picture | None:
    rows = []
    for item in objects(mapping(figures, "by"), "length_difference"):
        ends = limits(item.get("accuracy_ci95"))
        if ends and is_number(item.get("accuracy")) and is_number(item.get("n")):
            rows.append((as_text(item.get("label")), int(item["n"]), float(item["accuracy"]), *ends))
    if not rows:
        return None
    spoken = "; ".join(f"{label}: {accuracy:.3f}" for label, _, accuracy, *_ in rows[: plots.MOST_BUCKETS])
    what = "chosen minus rejected, response tokens"
    svg = plots.accuracy_by(
        rows, what, f"{name}-length", f"Accuracy by length difference ({what}): {spoken}."
    )
    note = (
        "Each point is the accuracy where the chosen response is so many tokens longer (shorter: minus) "
        "than the rejected one; the line is its 95 % interval. Bad: a slope from below 0.5 up to 1, or "
        "down: the model judges by length."
    )
    return Picture("Accuracy by length difference", Markup(svg), note)  # noqa: S704


def _calibration_words(figures: dict[str, Any]) -> str:
    """What the reliability curve comes to, in sentences."""
    found, text = mapping(figures, "calibration"), ""
    if is_number(found.get("ece")):
        text += f" The mean gap between the two (expected calibration error) is {decimal(found['ece'])}."
    heat, after, loss = (found.get(key) for key in ("temperature", "ece_after", "loss_after"))
    if is_number(heat):
        kind = "too sure" if heat > 1.005 else "not sure enough" if heat < 0.995 else "as sure as it may be"
        text += f" Rewards are best divided by {decimal(heat, 2)} (temperature): the model is {kind}."
        gains = [f"error {decimal(after)}"] if is_number(after) else []
        gains += [f"loss {decimal(loss)}"] if is_number(loss) else []
        text += f" So divided: {', '.join(gains)} (cross-validated)." if gains else ""
    return text


# --- the training run: curves, the data report, versions and cost ------------------------------

Record = dict[str, Any]
PERCENTILES = {"p50": "median", "p90": "90 % have at most", "p99": "99 % have at most", "max": "longest"}
LN2 = math.log(2)
# Figure: its lines with their keys in the log, what they are compared with, and how to read them.
CURVES: tuple[tuple[str, dict[str, str], tuple[float, str] | None, str], ...] = (
    ("loss", {"train": "loss", "held out": "eval_loss"}, (LN2, "chance (ln 2)"),
     "Mean of \N{MINUS SIGN}log sigmoid(margin), in nats; equal rewards give ln 2 = 0.693. It should "
     "fall and level off. Bad: it stays at 0.693, it jumps, or held out rises while training falls "
     "(overfitting)."),
    ("accuracy", {"train": "accuracy", "held out": "eval_accuracy"}, (0.5, "chance"),
     "Share of pairs whose chosen response got the higher reward. It should rise from 0.5. "
     "Bad: training near 1 while held out stays behind."),
    ("learning rate", {"learning rate": "learning_rate"}, None,
     "The size of the optimiser's steps, no unit: up during warm-up, then down as the schedule says. "
     "Bad: a shape that you did not ask for."),
    ("gradient norm", {"gradient norm": "grad_norm"}, None,
     "The gradient's length before clipping, no unit. Bad: it grows without end, sits at 0, or has "
     "gaps, which are steps whose gradient overflowed."),
)  # fmt: skip


def training_pictures(record: Record) -> list[Picture]:
    """Curves against the step, of those quantities that `run.json`'s log holds."""
    pictures = []
    log = [entry for entry in objects(record, "log") if is_number(entry.get("step"))]
    for title, lines, chance, note in CURVES:
        series: dict[str, plots.Points] = {}
        for word, key in lines.items():
            entries = [entry for entry in log if key in entry]
            points = [(entry["step"], entry[key] if is_number(entry[key]) else math.nan) for entry in entries]
            if any(not math.isnan(value) for _, value in points):
                series[word] = points
        if not series:
            continue
        ends = [f"{word} ends at {_last(points)}" for word, points in series.items()]
        label = f"{title.capitalize()} against the step: {', '.join(ends)}."
        svg = plots.curves(series, title, f"training-{title.replace(' ', '-')}", label, chance)
        pictures.append(Picture(title.capitalize(), Markup(svg), note))  # noqa: S704 - plots escapes
    return pictures


def _last(points: plots.Points) -> str:
    return f"{[value for _, value in points if not math.isnan(value)][-1]:.4g}"


def cost(record: Record) -> Table | None:
    """What the run was and took."""
    sharing, memory = mapping(record, "prefix_sharing"), record.get("peak_memory_bytes")
    used, reason = sharing.get("used"), as_text(sharing.get("reason"))
    shared = MISSING if not isinstance(used, bool) else "yes" if used else "no"
    found = {
        "comparisons trained on": whole(mapping(record, "comparisons").get("train")),
        "optimiser steps": whole(record.get("steps")),
        "final training loss": decimal(record.get("final_loss")),
        "training time": duration(record.get("train_seconds")),
        "comparisons per second": decimal(record.get("comparisons_per_s"), 1),
        "tokens per second": whole(record.get("tokens_per_s")),
        "peak memory": f"{decimal(memory / 2**30, 1)} GiB" if is_number(memory) else MISSING,
        "device": as_text(record.get("device")),
        "processes": whole(record.get("processes")),
        "prompts encoded once for both responses": f"{shared} ({reason})" if reason else shared,
    }
    note = (
        "What the training took on the machine that ran it. Memory is the GPU's where there is one, else the "
        "process's. Bad: a final loss near 0.693, or fewer comparisons than you meant to train on."
    )
    return values("Cost", found, note)


def versions(record: Record) -> Table | None:
    """What to install and check out in order to repeat the run."""
    found = {name: as_text(version) for name, version in mapping(record, "versions").items()}
    found["source commit"] = as_text(record.get("git_commit"))
    found["seed"] = as_text(record.get("seed"))
    for name, fingerprint in mapping(record, "data_fingerprints").items():
        found[f"fingerprint of {words(name)} data"] = as_text(fingerprint)
    note = (
        "What a repetition needs. Bad: a missing source commit, for then nobody knows which code ran, or "
        "fingerprints that differ from those of a run to compare with: that one saw other data."
    )
    return values("Versions", found, note)


# --- the data report -----------------------------------------------------------------------


def data_tables(report: Record) -> list[Table]:
    """What the data report says of each split: what was kept, what repeats, how long it is."""
    splits = {name: mapping(report, "splits", name) for name in mapping(report, "splits")}
    if not splits:
        return []
    reasons = dict.fromkeys(reason for split in splits.values() for reason in mapping(split, "excluded"))
    kept = [_row("rows read", splits, ("rows",))]
    kept += [_row(f"left out: {words(reason)}", splits, ("excluded", reason), "0") for reason in reasons]
    kept += [_row("comparisons", splits, ("comparisons",)), _row("pairs in them", splits, ("pairs",))]
    kept += [_row("truncated", splits, ("truncated",))]
    repeats = [
        _row("exact duplicates", splits, ("duplicates", "exact")),
        _row("of these with the opposite verdict", splits, ("duplicates", "contradictory")),
        _row("near duplicates", splits, ("duplicates", "near")),
        _row("comparisons of a prompt seen before", splits, ("duplicates", "repeated_prompts")),
        _row("prompts that differ before the last reply", splits, ("differing_prompts",)),
        _row("identical after tokenising", splits, ("identical_after_truncation",)),
    ]
    sizes = [_row(text, splits, ("tokens", key)) for key, text in PERCENTILES.items()]
    sizes += [
        _decimals(f"accuracy of: {rule(name)}", splits, name) for name in ("longer_wins", "shorter_wins")
    ]
    limit = report.get("max_length")
    told = f" The limit is {whole(limit)} tokens." if is_number(limit) else ""
    notes = {
        "What is used": "Rows become comparisons unless something is wrong with them. Bad: many left out for "
        "another reason than sampling.",
        "What repeats": "Duplicates make training see the same thing twice; with the opposite verdict they "
        "contradict each other. Bad: anything above a few per cent.",
        "How long it is": "Tokens of whole conversations before truncation, and how often length alone "
        f"decides the preference.{told} Bad: a longest far above the limit, or a rule far above 0.5.",
    }
    tables = []
    for (title, note), rows in zip(notes.items(), (kept, repeats, sizes), strict=True):
        known = [row for row in rows if set(row.cells[1:]) != {MISSING}]
        tables.append(table(title, ["", *splits], known, note))
    return [found for found in tables if found]


def _row(title: str, splits: dict[str, Record], path: tuple[str, ...], absent: str = MISSING) -> Row:
    values = [mapping(split, *path[:-1]).get(path[-1]) for split in splits.values()]
    return Row([title, *(whole(value) if value is not None else absent for value in values)])


def _decimals(title: str, splits: dict[str, Record], name: str) -> Row:
    return Row([title, *(decimal(mapping(split, "baselines").get(name)) for split in splits.values())])


def leakage_words(report: Record) -> str:
    """What the data report says of prompts that stand on both sides."""
    found, held_out = mapping(report, "leakage"), report.get("held_out_by_prompt")
    text = ""
    if is_number(held_out):
        text = f"{share(held_out)} of the prompts were held out, with all their comparisons. "
    count = found.get("comparisons")
    if not is_number(count):
        return text
    if not count:
        return text + "No held-out prompt stands among the training comparisons, as it should be."
    what = {
        "drop": "they were left out of training, so that held-out accuracy can be believed",
        "allow": "they were trained on all the same, which makes held-out accuracy too high",
    }
    fate = what.get(as_text(found.get("policy")), "the recipe does not allow that")
    prompts = whole(found.get("prompts"))
    return f"{text}{whole(count)} training comparisons stand on {prompts} held-out prompts; {fate}."


# --- pages: templates filled with text that is redacted, visible and escaped -------------------

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: Path, **values: Any) -> str:
    """A page of a template, which may use those of `TEMPLATES`. Markup of our own passes as it is."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    return environment.get_template(template.name).render(**values)


def _finalize(value: Any) -> Any:
    return visible(redact(value)) if type(value) is str else value


# --- the page, `report.html` -------------------------------------------------------------------

TEMPLATE = TEMPLATES / "report.html.jinja"


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run folder, an export or wherever an evaluation was written.

    Args:
        folder: holds `evaluation.json`, and `predictions.jsonl`, `run.json`, `data_report.json` and
            `recipe.yaml` as far as there are any.

    Returns:
        the path of the page.

    Raises:
        RecipeError: there is no evaluation, or one of the files cannot be read.
    """
    evaluation, recipe = _read_evaluation(folder / "evaluation.json"), folder / "recipe.yaml"
    page = render(
        evaluation,
        by_data_set(read_predictions(folder)),
        read_json(folder / "run.json") if (folder / "run.json").is_file() else {},
        read_json(folder / "data_report.json") if (folder / "data_report.json").is_file() else {},
        recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
    )
    target = folder / "report.html"
    with whole_file(target) as partial:
        partial.write_bytes(page.encode("utf-8", "replace"))
    return target


def _read_evaluation(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"{path} is missing; `rm-recipe evaluate {path.parent}` writes it")
    evaluation = read_json(path)
    if not mapping(evaluation, "datasets"):
        raise RecipeError(f"{path} holds no data set; `rm-recipe evaluate {path.parent}` adds one")
    return evaluation


def render(
    evaluation: dict[str, Any],
    predictions: dict[str, Predictions],
    run: dict[str, Any],
    data: dict[str, Any],
    recipe: str,
) -> str:
    """The page. Everything but the first may be empty."""
    found = {str(name): mapping(figures) for name, figures in mapping(evaluation, "datasets").items()}
    evaluated = {name: found[name] for name in sorted(found, key=lambda name: name != HELD_OUT)}
    parts = [
        _data_set(f"set-{number}", name, figures, predictions.get(name, Predictions()))
        for number, (name, figures) in enumerate(evaluated.items(), 1)
    ]
    return render_page(
        TEMPLATE,
        model=as_text(evaluation.get("model")) or "unnamed model",
        base=as_text(evaluation.get("base")),
        headline=_headline(evaluated[HELD_OUT], evaluation.get("gate")) if HELD_OUT in evaluated else None,
        overview=data_sets(evaluated),
        data_sets=parts,
        training=training_pictures(run),
        data_tables=data_tables(data),
        leakage=leakage_words(data),
        run_tables=[table for table in (cost(run), versions(run)) if table],
        recipe=recipe.strip(),
    )


def _headline(figures: dict[str, Any], gate: Any) -> dict[str, Any]:
    accuracy, ends = figures.get("accuracy"), figures.get("accuracy_ci95")
    return {
        "accuracy": decimal(accuracy),
        "interval": interval(ends) if limits(ends) else "",
        "n": whole(figures.get("n_scored")),
        "strip": strip(accuracy, ends),
        "gate": gate_words(gate),
    }


def _data_set(ident: str, name: str, figures: dict[str, Any], own: Predictions) -> dict[str, Any]:
    tables = [
        baselines(figures),
        other_model(figures),
        ranking(figures),
        subsets(figures),
        *(buckets(figures, key) for key in BUCKETS),
        length(figures),
        consistency(figures),
        excluded(figures),
    ]
    return {
        "id": ident,
        "name": name,
        "accuracy": decimal(figures.get("accuracy")),
        "n": whole(figures.get("n_scored")),
        "readings": readings(figures),
        "pictures": pictures(figures, own, ident),
        "tables": [table for table in tables if table],
        "mistakes": examples(own.shown["mistake"], "mistake"),
        "close": examples(own.shown["close"], "close"),
    }


# --- an evaluation's headline on the terminal --------------------------------------------------


def print_evaluation(content: dict[str, Any], names: Sequence[str], console: Console | None = None) -> None:
    """The figures that matter of some data sets, what to think of them, and the gate where it read one.

    Args:
        content: of `evaluation.json`.
    """
    table = TerminalTable(title="Preference accuracy", title_justify="left")
    table.add_column("data set", overflow="fold")
    for heading in ("accuracy", "95 % interval", "n", "excluded", "ties", "best rule"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        figures = content["datasets"][name]
        (low, high), best = figures["accuracy_ci95"], best_baseline(figures)
        table.add_row(
            Text(visible(name)),
            f"{figures['accuracy']:.3f}",
            f"{low:.3f} to {high:.3f}",
            str(figures["n_scored"]),
            str(sum(figures["excluded"].values())),
            str(figures["ties"]),
            decimal(best[1] if best else None),
        )
    console = console or Console()
    console.print(table)
    for name in names:
        for _, sentence in readings(content["datasets"][name]):
            console.print(Text(visible(f"{name}: {sentence}" if len(names) > 1 else sentence)))
    words = gate_words(content["gate"])
    if HELD_OUT in names and words:
        console.print(f"{words['verdict']}: {words['why']}.")
