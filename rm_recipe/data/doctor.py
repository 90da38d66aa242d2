"""What is wrong with the data, counted before anything is trained: the report and its table.

`rm-recipe check RECIPE --data` and every training run write it as `data_report.json`. It speaks of
the comparisons that the recipe would use: after sampling, with the model's own tokenizer.
"""

import re
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any
from zlib import crc32

import datasets as hf_datasets
import datasketch
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from rm_recipe.data import comparison, loading
from rm_recipe.data.dataset import FIRST_ROWS, Split, arrow_column, first_of, run_pass
from rm_recipe.data.splits import hold_out_share
from rm_recipe.recipe.reader import Recipe


def examine(recipe: Recipe, train: Split, test: Split, leakage: dict[str, Any]) -> dict[str, Any]:
    """Count the content of `data_report.json` for a recipe's tokenised splits."""
    data, num_proc = recipe.data, recipe.training.dataset_num_proc
    splits = {data.dataset_train_split: train, data.dataset_test_split: test}
    return {
        "model": recipe.model.model_name_or_path,
        "max_length": recipe.training.max_length,
        "truncation": data.truncation,
        "splits": {name: _examine_split(split, num_proc) for name, split in splits.items()},
        "held_out_by_prompt": hold_out_share(data),
        "leakage": leakage | {"same_replies": count_same_replies(train, test, num_proc)},
    }


def _examine_split(split: Split, num_proc: int | None) -> dict[str, Any]:
    """The counts of one split.

    Returns:
        `rows` is `comparisons` plus the sum of `excluded`; `scored_lower`: whose chosen reply has a lower
        score than the rejected one.
        `tokens` are those of whole conversations, before truncation. `shared_prefix_share` is the part of all
        tokens that encoding prompts once saves.
    """
    n, lower = len(split.comparisons), np.flatnonzero(split.column("scored_lower"))
    ranks = split.comparisons["ranks"][:]
    lengths = pc.list_flatten(arrow_column(split.comparisons, "reply_lengths")).to_numpy()
    longer_wins = float(comparison.pairwise_agreement(lengths, ranks).sum()) / n
    tokens = pc.list_flatten(arrow_column(split.tokenized, "lengths")).to_numpy()
    percentiles = np.percentile(tokens, [50, 90, 99, 100], method="higher")
    return {
        "rows": split.rows,
        "comparisons": n,
        "pairs": len(comparison.pair_indices(ranks)[0]),
        "excluded": dict(split.excluded),
        "first_rows": split.first_rows,
        "shapes": split.shapes,
        "columns_not_read": split.unread,
        "differing_prompts": split.differing_prompts,
        "duplicates": count_duplicates(split, num_proc),
        "scored_lower": {"comparisons": len(lower), "first_rows": split.names(lower[:FIRST_ROWS])},
        "truncated": int(split.column("truncated").sum()),
        "identical_after_truncation": split.excluded["identical_after_tokenization"],
        "baselines": {"longer_wins": longer_wins, "shorter_wins": 1 - longer_wins},
        "shared_prefix_share": 1 - float(split.sizes(True).sum() / split.sizes(False).sum()),
        "tokens": dict(zip(("p50", "p90", "p99", "max"), map(int, percentiles), strict=True)),
    }


# --- the table -------------------------------------------------------------------------------


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report as a table of at most 80 columns, then rows, columns and leakage in words."""
    console = console or Console()
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    splits, leakage = report["splits"], report["leakage"]
    title = f"Data, max_length {report['max_length']}"
    table = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in splits:
        table.add_column(name, justify="right", no_wrap=True)
    columns = [dict(_figures(split)) for split in splits.values()]
    for name in dict.fromkeys(chain(*columns)):
        table.add_row(name, *(column.get(name, "0") for column in columns))
    console.print(table)
    for name, split in splits.items():
        for reason, rows in split["first_rows"].items():
            say(f"{name}, {reason}: row {first_of(rows, split['excluded'][reason])}")
    say(f"Read as {', '.join(dict.fromkeys(chain(*(split['shapes'] for split in splits.values()))))}.")
    if unread := dict.fromkeys(chain(*(split["columns_not_read"] for split in splits.values()))):
        say(f"Columns not read: {', '.join(unread)}.")
    if report["held_out_by_prompt"] is not None:
        by = leakage["by"].replace("_", " ")
        say(f"Held out: {report['held_out_by_prompt']:.0%} of the {by}s, with all their comparisons.")
    held_out = [*splits.values()][-1]["comparisons"]
    known = f"{0.98 / held_out**0.5:.2f}"  # 1.96 standard errors of a share of one half
    say(f"Accuracy on {held_out} held-out comparisons will be known to about {known} either way (95 %).")
    if leakage["first_turns"]:  # as many at least as prompts
        n, rows = leakage["comparisons"], first_of(leakage["first_rows"], leakage["comparisons"])
        say(
            f"Leakage: {leakage['prompts']} prompts and {leakage['first_turns']} first turns of train are "
            f"held out too; 'leakage: {leakage['policy']}' with 'leakage_by: {leakage['by']}' concerns {n} "
            f"comparisons{f' (row {rows})' if rows else ''}."
        )
    if same := leakage["same_replies"]:
        say(f"Leakage: {same} held-out comparisons have the very replies of one of train: these show memory.")


def _figures(report: dict[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """The figures of a split, by their names in the report."""
    for name, value in report.items():
        words = f"{within}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _figures(value, f"{words}: ")
        elif isinstance(value, int | float):
            yield words, f"{value:.3f}" if isinstance(value, float) else str(value)


# --- comparisons that come again: exactly, nearly, or with the opposite verdict ----------------
# Near duplicates are found by MinHash (Broder 1997; the sketches are datasketch's): two texts whose
# sets of three-word sequences overlap by `SIMILAR` or more (Jaccard). Sketches lie in a cached column
# and are compared band by band: for a million texts datasketch's own MinHashLSH takes gigabytes.

SIMILAR = 0.8
TELLING = 10  # words of a comparison's replies, below which others may well have the same
GREETING = 20  # characters: a reply may well begin as a shorter prompt does
SKETCH = 64  # numbers a sketch: Jaccard to within 0.05 (one standard error) at 0.8
BAND = 4  # numbers that have to agree before two sketches are compared: misses 2 in 10,000 at 0.8
_NUMBER = hf_datasets.Value("int64")
_SKETCH = hf_datasets.List(hf_datasets.Value("uint32"), length=SKETCH)
_MARKS = dict.fromkeys(("key", "verdict", "replies"), _NUMBER)
_MARKS |= {"sketch": _SKETCH, "again": hf_datasets.Value("bool")}

# Copied for each text: making one draws its random numbers anew. CRC-32 takes a tenth of the time of
# datasketch's own SHA-1 and spreads short texts as well.
_EMPTY = datasketch.MinHash(num_perm=SKETCH, scheme="affine32", hashfunc=crc32)

_WORD = re.compile(f"[{loading.UNSPACED}]|[^\\W{loading.UNSPACED}]+")


def count_duplicates(split: Split, num_proc: int | None = None) -> dict[str, int]:
    """Count the comparisons that repeat an earlier one of the split.

    Returns:
        `exact`: same prompt and same responses, case and white space apart; `near`: other than
        those, a text like an earlier one's; `contradictory`: exact ones that prefer another
        response; `repeated_prompts`: any that has an earlier one's prompt; `prompt_in_replies`: those whose
        responses all begin with the prompt's last message, and so perhaps hold the prompt a second time.
    """
    marked = _marked(split, num_proc)
    exact, same_verdict = (_repeats(arrow_column(marked, name).to_numpy()) for name in ("key", "verdict"))
    sketches = arrow_column(marked, "sketch").combine_chunks().flatten().to_numpy().reshape(-1, SKETCH)
    near = _near(sketches) & ~exact
    return {
        "exact": int(exact.sum()),
        "near": int(near.sum()),
        "contradictory": int((exact & ~same_verdict).sum()),
        "repeated_prompts": int(_repeats(split.column("prompt_key")).sum()),
        "prompt_in_replies": int(pc.sum(arrow_column(marked, "again")).as_py()),
    }


def count_same_replies(train: Split, test: Split, num_proc: int | None = None) -> int:
    """Count the held-out comparisons with the replies of one of train, of `TELLING` words, to any prompt."""
    known, asked = (arrow_column(_marked(split, num_proc), "replies").to_numpy() for split in (train, test))
    return int((np.isin(asked, known) & (asked != 0)).sum())


def _marked(split: Split, num_proc: int | None) -> hf_datasets.Dataset:
    """What comparisons are told apart by (`_MARKS`), in a cached pass."""
    columns = split.comparisons.select_columns(["prompt", "responses", "ranks"])
    code = [sys.modules[__name__], loading, datasketch.__version__]
    options = {"remove_columns": columns.column_names}
    return run_pass(columns, _mark, "Looking for duplicates", _MARKS, code, num_proc, **options)


def _mark(row: dict[str, Any]) -> dict[str, Any]:
    prompt = loading.normalised_prompt(row["prompt"])
    responses = [loading.normalise(response) for response in row["responses"]]
    minhash = _EMPTY.copy()
    minhash.update_batch(list(shingles(" ".join([*prompt, *sorted(responses)]))))
    ranked = [f"{rank} {response}" for rank, response in zip(row["ranks"], responses, strict=True)]
    asked = loading.normalise(row["prompt"][-1]["content"])
    told = len(_WORD.findall(" ".join(responses))) >= TELLING
    return {
        "key": loading.text_key([*prompt, *sorted(responses)]),
        "verdict": loading.text_key([*prompt, *sorted(ranked)]),
        "replies": loading.text_key(sorted(responses)) if told else 0,
        "sketch": minhash.hashvalues,
        "again": len(asked) >= GREETING and all(text.startswith(asked) for text in responses),
    }


def shingles(text: str) -> set[bytes]:
    """List the three-word sequences of a text; a shorter text is one of its own."""
    words = _WORD.findall(text)
    threes = [" ".join(three) for three in zip(words, words[1:], words[2:], strict=False)]
    return {three.encode() for three in threes or [text]}


def _repeats(keys: NDArray[Any]) -> NDArray[np.bool_]:
    """Which keys have been there before."""
    repeats = np.ones(len(keys), bool)
    repeats[np.unique(keys, return_index=True)[1]] = False
    return repeats


def _near(sketches: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which sketches `(n, SKETCH)` are like the last one before them that agrees with them in a band."""
    near = np.zeros(len(sketches), bool)
    odd = np.random.default_rng(0).integers(1, 2**63, BAND, np.uint64) * 2 + 1
    for start in range(0, SKETCH, BAND):
        keys = (sketches[:, start : start + BAND].astype(np.uint64) * odd).sum(axis=1)  # one for each band
        order = np.argsort(keys, kind="stable")
        pairs = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        earlier, later = order[pairs], order[pairs + 1]
        near[later] |= np.mean(sketches[earlier] == sketches[later], axis=1) >= SIMILAR
    return near
