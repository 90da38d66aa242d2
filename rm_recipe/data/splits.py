"""Which comparisons a recipe trains on and which it holds out.

What is held out by prompt depends on the prompt alone, what is sampled on the seed alone.
Everything is memory-mapped; `loading` and `tokenization` have the two passes over the rows.
"""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from rm_recipe.data import formats, loading
from rm_recipe.data.dataset import FIRST_ROWS, Split, arrow_column, fingerprint, first_of, set_aside
from rm_recipe.errors import DataError, RecipeError
from rm_recipe.files import read_json
from rm_recipe.recipe.reader import Recipe
from rm_recipe.recipe.schema import DataArguments

HELD_OUT_SHARE = 0.1  # of the prompts, where a set has a train split only


def load_splits(recipe: Recipe) -> tuple[Split, Split, dict[str, Any]]:
    """Load the recipe's train and held-out comparisons, sampled, and what the two have in common.

    With `leakage: drop` it is left out of train. With `error` it is not: the caller has the
    counts to show, and raises by `refuse_leakage`.

    Returns:
        train, test, and `leakage` of `data_report.json`: how many different `prompts` and first questions
        (`first_turns`: hh-rlhf's dialogues recur at several depths) are also held out, how many `comparisons`
        `policy` acts on, going by `by`, of how many before sampling, and the `first_rows` of them.

    Raises:
        DataError: a source cannot be read, or a split is missing or holds no comparison.
    """
    data, seed = recipe.data, recipe.training.seed
    share = hold_out_share(data)
    train = load_split(data, None, margins=True)
    test = load_held_out(data)
    if share is not None:
        key = f"{data.leakage_by}_key"
        train = train.select(np.flatnonzero(~np.isin(train.column(key), test.column(key))), "held_out")
    # Against all that is held out, so that no other sample of it meets what was trained on.
    keys = {by: train.column(f"{by}_key") for by in ("prompt", "first_turn")}
    common = {by: np.isin(own, test.column(f"{by}_key")) for by, own in keys.items()}
    leaked = common[data.leakage_by]
    leakage = {
        "prompts": len(np.unique(keys["prompt"][common["prompt"]])),
        "first_turns": len(np.unique(keys["first_turn"][common["first_turn"]])),
        "comparisons": int(leaked.sum()),
        "of_comparisons": len(leaked),
        "first_rows": train.names(np.flatnonzero(leaked)[:FIRST_ROWS]),
        "policy": data.leakage,
        "by": data.leakage_by,
    }
    if data.leakage == "drop":
        train = train.select(np.flatnonzero(~leaked), f"leaked_{data.leakage_by}")
    if not len(train.comparisons):
        raise DataError(f"no comparison is left to train on: {train.why_excluded()}")
    train = sample(train, data.max_train_samples, seed)
    train = replace(train, fingerprint=fingerprint(train.comparisons))
    return train, sample(test, data.max_eval_samples, seed), leakage


def refuse_leakage(leakage: dict[str, Any]) -> None:
    """Raise DataError where train prompts are also held out and the policy is `error`."""
    n, rows, by = leakage["comparisons"], leakage["first_rows"], leakage["by"].replace("_", " ")
    if n and leakage["policy"] == "error":
        fault = f"{n} of {leakage['of_comparisons']} train comparisons (row {first_of(rows, n)}) have a {by}"
        raise DataError(
            f"{fault} that is also held out, so held-out accuracy would be too high; "
            "set 'leakage: drop' to leave them out of training, or 'leakage: allow'"
        )


def load_held_out_split(recipe: Recipe) -> Split:
    """Load the recipe's held-out comparisons, sampled."""
    return sample(load_held_out(recipe.data), recipe.data.max_eval_samples, recipe.training.seed)


def load_held_out(data: DataArguments) -> Split:
    """Load all held-out comparisons: the test split, or a share of the train split's prompts."""
    share = hold_out_share(data)
    split = load_split(data, data.dataset_test_split if share is None else None)
    if share is not None:  # the train side counts what cannot be parsed
        comparisons = split.comparisons.select(np.flatnonzero(held_out(split, share, data.leakage_by)))
        split = Split(comparisons, len(comparisons))
    if not len(split.comparisons):
        fault = "all comparisons have the same prompt, so none can be held out"
        raise DataError(f"{fault}: give a test split of your own (test.jsonl), and set 'leakage: allow'")
    return replace(split, fingerprint=fingerprint(split.comparisons))


def hold_out_share(data: DataArguments) -> float | None:
    """Return the share of train prompts that is held out; None where there is a test split.

    Raises:
        DataError: some sources have a test split and others have not.
    """
    if data.test_split_size is not None or "[" in data.dataset_test_split:  # a slice, of a file too
        return data.test_split_size
    found = loading.sources_of(data)
    splits = [loading.splits_of(source, data.dataset_revision) for source in found]
    test = {data.dataset_test_split, f"{data.dataset_test_split}_prefs"}
    without = [n for n, names in enumerate(splits) if not test & {*names}]
    if without and any(len(names) > 1 for names in splits):  # nobody can say which was meant
        raise loading.no_split(splits[without[0]], data.dataset_test_split, found[without[0]])
    return HELD_OUT_SHARE if without else None


def held_out(split: Split, share: float, by: str = "prompt") -> NDArray[np.bool_]:
    """Mark the comparisons that are held out: those whose hash of `leakage_by` is among the lowest `share`.

    So which prompts these are depends neither on the seed nor on the order. Of two prompts or more at least
    one is on either side.
    """
    keys = split.column(f"{by}_key").view(np.uint64)
    different = np.unique(keys)  # and sorted
    n = min(max(round(share * len(different)), 1), len(different) - 1)
    return np.isin(keys, different[:n])


def sample(split: Split, size: int | None, seed: int) -> Split:
    """Take the first `size` of a shuffle seeded with `seed`; the rest count as `not_sampled`."""
    n = len(split.comparisons)
    if size is None or size >= n:
        return split
    return split.select(np.random.default_rng(seed).permutation(n)[:size], "not_sampled")


def load_split(data: DataArguments, split: str | None, *, margins: bool = False) -> Split:
    """Load one split of all sources: every row a comparison or counted.

    Args:
        split: its name; None for the train split, which in a mixture each source names.
        margins: read `margin_column`. Held-out comparisons need none.

    Raises:
        DataError: a source cannot be read, or no row in it is a comparison.
    """
    found = loading.sources_of(data)
    column = data.margin_column if margins else None
    loaded = [loading.load_rows(source, split or source.split, data, column) for source in found]
    parts, unread, shapes = map(list, zip(*loaded, strict=True))
    # Their own infos are other ones once they come from the cache, and would change the fingerprint.
    rows = hf_datasets.concatenate_datasets(parts, info=hf_datasets.DatasetInfo())
    differing = int(pc.sum(arrow_column(rows, "prompts_differ")).as_py())
    unread, shapes = (list(dict.fromkeys(names)) for names in (chain(*unread), shapes))
    result = set_aside(Split(rows, len(rows), differing_prompts=differing, unread=unread, shapes=shapes))
    if not len(result.comparisons):
        name = " and ".join(dict.fromkeys(source.path for source in found))
        named = formats.suggested([*result.unread, "chosen", "rejected"])
        hint = f"; texts without a prompt are hh-rlhf transcripts; 'columns: {named}' names it"
        unasked = {"not_a_transcript", "empty_prompt"} & {*result.excluded}
        of_transcripts = bool(unasked) and any("(hh-rlhf)" in shape for shape in result.shapes)
        raise DataError(
            f"{name}{f', split {split!r}' if split else ''}: no comparison in it ({result.why_excluded()}); "
            f"read as {', '.join(result.shapes)}{hint * of_transcripts}"
            + (f"; columns not read: {', '.join(result.unread)}" if result.unread else "")
        )
    shares = [source.fraction for source in found]
    if split is None and any(shares):
        result = result.select(_by_fraction(parts, shares), "not_in_fraction")
    return result


def _by_fraction(parts: list[hf_datasets.Dataset], shares: list[float]) -> NDArray[np.int64]:
    """The comparisons of a mixture in its fractions: the largest one that repeats nothing, as in TRL."""
    found = [int(pc.sum(pc.equal(arrow_column(part, "excluded"), "")).as_py()) for part in parts]
    total = min(n * sum(shares) / share for n, share in zip(found, shares, strict=True))
    sizes = [min(n, round(total * share / sum(shares))) for n, share in zip(found, shares, strict=True)]
    starts = np.cumsum(found) - found
    return np.concatenate([start + np.arange(size) for start, size in zip(starts, sizes, strict=True)])


def refuse_other_data(run: Path, **fingerprints: str) -> None:
    """Raise RecipeError where `train` or `held_out` is not what a finished run was trained with."""
    then = read_json(run / "run.json", missing_ok=True).get("data_fingerprints", fingerprints)
    for name, now in fingerprints.items():
        if then[name] != now:
            fault = f"the {name.replace('_', '-')} comparisons are not those that {run} was trained with"
            raise RecipeError(f"{fault}; restore the data, or train anew with --overwrite")
