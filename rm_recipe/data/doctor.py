"""What is wrong with the data, counted before anything is trained: the report and its table.

`rm-recipe check RECIPE --data` and every training run write it as `data_report.json`. It speaks of
the comparisons that the recipe would use: after sampling, with the model's own tokenizer.
"""

import re
import sys
from collections import Counter, defaultdict
from functools import partial
from typing import Any
from zlib import crc32

import datasets as hf_datasets
import datasketch
import numpy as np
import pyarrow.compute as pc
from datasketch import MinHash
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from rm_recipe.data import comparison, loading
from rm_recipe.data.dataset import Split, arrow_column, run_pass
from rm_recipe.data.loading import normalise, normalised_prompt, text_key
from rm_recipe.data.splits import Leakage, hold_out_share
from rm_recipe.data.tokenization import CUT_END, FATES, SHORTENED, TRUNCATED, count_unshown
from rm_recipe.recipe.reader import Recipe


def examine(recipe: Recipe, train: Split, test: Split, leakage: Leakage) -> dict[str, Any]:
    """The content of `data_report.json` for a recipe's tokenised splits."""
    data, num_proc = recipe.data, recipe.training.dataset_num_proc
    return {
        "model": recipe.model.model_name_or_path,
        "max_length": recipe.training.max_length,
        "truncation": data.truncation,
        "splits": {
            data.dataset_train_split: examine_split(train, data.truncation, num_proc),
            data.dataset_test_split: examine_split(test, data.truncation, num_proc),
        },
        "held_out_by_prompt": hold_out_share(data),
        "leakage": {
            "prompts": leakage.prompts,
            "comparisons": leakage.comparisons,
            "first_rows": leakage.first_rows,
            "policy": data.leakage,
        },
    }


def examine_split(split: Split, truncation: str, num_proc: int | None = None) -> dict[str, Any]:
    """The figures of one split.

    Returns:
        `rows` is `comparisons` plus the sum of `excluded`; `details` says more of a reason's first row.
        `columns_not_read` hold something that is part of no comparison.
        `tokens` are those of whole conversations, before truncation; `truncation` says what each choice would
        do (`cut_end`, which rm_recipe does not offer: how many comparisons it would make identical).
        `shortened_for_reply` counts comparisons that lose more of their prompt because a reply exceeds its
        share of `max_length`; `unshown`, by whose text it is, those of which the chat template leaves out a
        part. `shared_prefix_share` is the part of all tokens that encoding prompts once saves.
    """
    fates = _count_fates(split)
    tokens = _count_tokens(split)
    return {
        "rows": split.rows,
        "comparisons": len(split.comparisons),
        "pairs": int(tokens["pairs"]),
        "excluded": dict(split.excluded),
        "first_rows": split.first_rows,
        "details": split.details,
        "columns_not_read": split.unread,
        "differing_prompts": split.differing_prompts,
        "duplicates": count_duplicates(split, num_proc),
        "truncated": _kept(fates[truncation]),
        "shortened_for_reply": fates[truncation][SHORTENED],
        "truncation": {
            choice: {"truncated": _kept(counts), "excluded": counts.total() - _kept(counts)}
            for choice, counts in fates.items()
            if choice != CUT_END
        }
        | {CUT_END: {"truncated": fates[CUT_END].total(), "identical": fates[CUT_END]["identical"]}},
        "unshown": count_unshown(split),
        "identical_after_truncation": split.excluded["identical_after_tokenization"],
        "baselines": {
            "longer_wins": tokens["longer_wins"] / len(split.comparisons),
            "shorter_wins": 1 - tokens["longer_wins"] / len(split.comparisons),
        },
        "shared_prefix_share": 1 - tokens["shared"] / tokens["plain"],
        "tokens": _percentiles(split),
    }


def _count_fates(split: Split) -> dict[str, Counter[str]]:
    """For each way to truncate, what becomes of the comparisons that may not fit `max_length`."""
    fates = arrow_column(split.tokenized, "fates").combine_chunks()
    counted = {choice: pc.value_counts(fates.field(choice)).to_pylist() for choice in FATES}
    return {
        choice: Counter({item["values"]: item["counts"] for item in items if item["values"]})
        for choice, items in counted.items()
    }


def _kept(fates: Counter[str]) -> int:
    """Comparisons that are truncated, not left out."""
    return fates[TRUNCATED] + fates[SHORTENED]


def _count_tokens(split: Split) -> dict[str, float]:
    """Tokens with prompts encoded once and for each response; pairs; comparisons that the longer wins."""
    counts: dict[str, float] = defaultdict(float)
    columns = split.comparisons.select_columns(["prefix", "rests", "ranks"]).with_format("arrow")
    for rows in columns.iter(10_000):  # as many at a time, so that memory stays flat
        prefixes, each = (pc.list_value_length(rows[name]).to_numpy() for name in ("prefix", "rests"))
        lengths = pc.list_value_length(pc.list_flatten(rows["rests"])).to_numpy()
        ranks = rows["ranks"].to_pylist()
        counts["shared"] += int(prefixes.sum() + lengths.sum())
        counts["plain"] += int((prefixes.astype(np.int64) * each).sum() + lengths.sum())
        counts["pairs"] += len(comparison.pair_indices(ranks)[0])
        counts["longer_wins"] += float(comparison.pairwise_agreement(lengths, ranks).sum())
    return counts


def _percentiles(split: Split) -> dict[str, int]:
    lengths = pc.list_flatten(arrow_column(split.tokenized, "lengths")).to_numpy()
    values = np.percentile(lengths, [50, 90, 99, 100], method="higher")
    return dict(zip(("p50", "p90", "p99", "max"), map(int, values), strict=True))


# --- the table -------------------------------------------------------------------------------


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """The report as a table of 80 columns at most, and what it says of leakage, in words."""
    console = console or Console()
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    splits = report["splits"]
    table = Table(title="Data", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in splits:
        table.add_column(name, justify="right", no_wrap=True)
    for title, cells in _lines(report, list(splits.values())):
        table.add_row(title, *cells)
    console.print(table)
    for name, figures in splits.items():
        for reason, rows in figures["first_rows"].items():
            more = " ..." if figures["excluded"][reason] > len(rows) else ""
            detail = f" ({figures['details'][reason]})" if reason in figures["details"] else ""
            say(f"{name}, {reason}: row {', '.join(rows)}{more}{detail}")
    unread = dict.fromkeys(name for figures in splits.values() for name in figures["columns_not_read"])
    if unread:
        say(f"Columns not read: {', '.join(unread)}.")
    if report["held_out_by_prompt"] is not None:
        share = report["held_out_by_prompt"]
        say(f"Held out: {share:.0%} of the prompts, with all their comparisons.")
    leakage = report["leakage"]
    if leakage["comparisons"]:
        what = {"drop": "left out of train", "allow": "trained on all the same", "error": "not allowed"}
        more = " ..." if leakage["comparisons"] > len(leakage["first_rows"]) else ""
        say(
            f"Leakage: {leakage['comparisons']} train comparisons on {leakage['prompts']} held-out prompts, "
            f"{what[leakage['policy']]} (row {', '.join(leakage['first_rows'])}{more})."
        )


def _lines(report: dict[str, Any], splits: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    def row(title: str, key: str) -> tuple[str, list[str]]:
        return title, [str(split[key]) for split in splits]

    reasons = dict.fromkeys(reason for split in splits for reason in split["excluded"])
    lines = [row("rows", "rows")]
    for reason in reasons:
        title = f"  left out: {reason.replace('_', ' ')}"
        lines.append((title, [str(split["excluded"].get(reason, 0)) for split in splits]))
    lines.append(row("comparisons", "comparisons"))
    if any(split["pairs"] != split["comparisons"] for split in splits):
        lines.append(row("  pairs in them", "pairs"))
    lines.append(row("prompts that differ before the last reply", "differing_prompts"))
    for key, title in (
        ("exact", "exact duplicates"),
        ("contradictory", "  of these with the opposite verdict"),
        ("near", "near duplicates"),
        ("repeated_prompts", "comparisons of a prompt seen before"),
    ):
        lines.append((title, [str(split["duplicates"][key]) for split in splits]))
    lines.append(("tokens of a conversation", [""] * len(splits)))
    for key, title in (("p50", "median"), ("p90", "90 % have at most"), ("p99", "99 %"), ("max", "longest")):
        lines.append((f"  {title}", [str(split["tokens"][key]) for split in splits]))
    if report["max_length"] is not None:
        lines.append((f"max_length {report['max_length']}: truncated / left out", [""] * len(splits)))
        for choice in (choice for choice in FATES if choice != CUT_END):
            mine = " (this recipe)" if choice == report["truncation"] else ""
            counts = [split["truncation"][choice] for split in splits]
            lines.append((f"  {choice}{mine}", [f"{c['truncated']} / {c['excluded']}" for c in counts]))
        cut = [split["truncation"][CUT_END]["identical"] for split in splits]
        lines.append(("  made identical, if the end were cut", [str(n) for n in cut]))
        lines.append(row("  for a reply over its share of it", "shortened_for_reply"))
    for whose in dict.fromkeys(whose for split in splits for whose in split["unshown"]):
        counts = [str(split["unshown"].get(whose, 0)) for split in splits]
        lines.append((f"text that the chat template leaves out: {whose}", counts))
    lines.append(row("identical after tokenising", "identical_after_truncation"))
    wins = [f"{s['baselines']['longer_wins']:.3f} / {s['baselines']['shorter_wins']:.3f}" for s in splits]
    lines.append(("accuracy of: longer wins / shorter wins", wins))
    lines.append(("tokens that shared prefixes save", [f"{s['shared_prefix_share']:.0%}" for s in splits]))
    return lines


# --- comparisons that come again: exactly, nearly, or with the opposite verdict ----------------
# Near duplicates are found by MinHash (Broder 1997; the sketches are datasketch's): two texts whose
# sets of three-word sequences overlap by `SIMILAR` or more (Jaccard). Sketches lie in a cached column
# and are compared band by band, so memory stays flat where a hash table of a million would not.

SIMILAR = 0.8
SKETCH = 64  # numbers a sketch: Jaccard to within 0.05 (one standard error) at 0.8
BAND = 4  # numbers that have to agree before two sketches are compared: misses 2 in 10,000 at 0.8
CHUNK = 100_000

# Copied for each text: making one draws its random numbers anew. CRC-32 takes a tenth of the time of
# datasketch's own SHA-1 and spreads short texts as well.
_EMPTY = MinHash(num_perm=SKETCH, scheme="affine32", hashfunc=crc32)

# Chinese, Japanese and Korean write no spaces: there each character counts as a word.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+")


def count_duplicates(split: Split, num_proc: int | None = None) -> dict[str, int]:
    """How many comparisons repeat an earlier one of the split.

    Returns:
        `exact`: same prompt and same responses, case and white space apart; `near`: other than
        those, a text like an earlier one's; `contradictory`: exact ones that prefer another
        response; `repeated_prompts`: any that has an earlier one's prompt.
    """
    columns = split.comparisons.select_columns(["prompt", "responses", "ranks"])
    features = {
        "key": hf_datasets.Value("int64"),
        "verdict": hf_datasets.Value("int64"),
        "sketch": hf_datasets.List(hf_datasets.Value("uint32"), length=SKETCH),
    }
    depends_on = [sys.modules[__name__], loading, datasketch.__version__]
    marked = run_pass(
        columns,
        _mark,
        "Looking for duplicates",
        features,
        depends_on,
        num_proc,
        remove_columns=columns.column_names,
    )
    exact, same_verdict = (_repeats(arrow_column(marked, name).to_numpy()) for name in ("key", "verdict"))
    near = _near(marked) & ~exact
    return {
        "exact": int(exact.sum()),
        "near": int(near.sum()),
        "contradictory": int((exact & ~same_verdict).sum()),
        "repeated_prompts": int(_repeats(split.column("prompt_key")).sum()),
    }


def _mark(row: dict[str, Any]) -> dict[str, Any]:
    prompt = normalised_prompt(row["prompt"])
    responses = [normalise(response) for response in row["responses"]]
    minhash = _EMPTY.copy()
    minhash.update_batch(list(shingles(" ".join([*prompt, *sorted(responses)]))))
    ranked = [f"{rank} {response}" for rank, response in zip(row["ranks"], responses, strict=True)]
    return {
        "key": text_key([*prompt, *sorted(responses)]),
        "verdict": text_key([*prompt, *sorted(ranked)]),
        "sketch": minhash.hashvalues,
    }


def shingles(text: str) -> set[bytes]:
    """The three-word sequences of a text; the whole of a shorter one."""
    words = _WORD.findall(text)
    if len(words) < 3:
        return {text.encode("utf-8", "surrogatepass")}
    threes = zip(words, words[1:], words[2:], strict=False)
    return {" ".join(three).encode("utf-8", "surrogatepass") for three in threes}


def _repeats(keys: NDArray[Any]) -> NDArray[np.bool_]:
    """Which keys have been there before."""
    repeats = np.ones(len(keys), bool)
    repeats[np.unique(keys, return_index=True)[1]] = False
    return repeats


def _near(sketches: hf_datasets.Dataset) -> NDArray[np.bool_]:
    """Which sketches are like an earlier one.

    Each is compared with the first and with the last before it of those that share a band with it.
    """
    n = len(sketches)
    near = np.zeros(n, bool)
    for start in range(0, SKETCH, BAND):
        parts = sketches.with_format("arrow").iter(CHUNK)
        keys = np.concatenate([_band_keys(_matrix(part)[:, start : start + BAND]) for part in parts])
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        later = order[1:][same]  # has another of its band before it
        group_start = np.maximum.accumulate(np.where(np.r_[True, ~same], np.arange(n), 0))
        for earlier in (order[:-1][same], order[group_start][1:][same]):
            for chunk in np.array_split(np.flatnonzero(~near[later]), 1 + len(later) // CHUNK):
                a, b = (sketches.with_format("arrow")[rows[chunk]] for rows in (later, earlier))
                near[later[chunk]] |= np.mean(_matrix(a) == _matrix(b), axis=1) >= SIMILAR
    return near


def _matrix(rows: Any) -> NDArray[np.uint32]:
    """The sketches of an arrow table; `(n, SKETCH)`."""
    return np.asarray(rows["sketch"].combine_chunks().flatten().to_numpy()).reshape(-1, SKETCH)


def _band_keys(bands: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """A number for each row of a band; `(n, BAND)` to `(n,)`."""
    odd = np.random.default_rng(0).integers(1, 2**63, bands.shape[1], np.uint64) * 2 + 1
    return np.asarray((bands.astype(np.uint64) * odd).sum(axis=1), np.uint64)
