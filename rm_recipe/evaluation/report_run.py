"""The report's part on how the model came about: training curves, the data report, versions and cost."""

import math
from typing import Any

from markupsafe import Markup

from rm_recipe.evaluation import plots
from rm_recipe.evaluation.findings import rule
from rm_recipe.evaluation.format import (
    MISSING,
    Row,
    Table,
    as_text,
    decimal,
    duration,
    is_number,
    mapping,
    objects,
    share,
    table,
    values,
    whole,
    words,
)
from rm_recipe.evaluation.report_predictions import Picture

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
