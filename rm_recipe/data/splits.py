"""Which comparisons a recipe trains on and which it holds out.

What is held out by prompt depends on the prompt alone, what is sampled on the seed alone.
Everything is memory-mapped; `loading` and `tokenization` have the two passes over the rows.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import datasets as hf_datasets
import numpy as np
from numpy.typing import NDArray
from trl.scripts.utils import DatasetConfig

from rm_recipe.data import formats, loading
from rm_recipe.data.dataset import FIRST_ROWS, Split, fingerprint, set_aside
from rm_recipe.errors import DataError, RecipeError
from rm_recipe.files import read_json
from rm_recipe.recipe.reader import Recipe
from rm_recipe.recipe.schema import DataArguments

HELD_OUT_SHARE = 0.1  # of the prompts, where a set has a train split only


@dataclass(frozen=True)
class Leakage:
    """Train comparisons whose prompt is also held out.

    Attributes:
        prompts: how many different prompts.
        comparisons: how many comparisons, of `of_comparisons` before sampling.
        first_rows: the first of them, `SUBSET:ROW`.
    """

    prompts: int
    comparisons: int
    of_comparisons: int
    first_rows: list[str]


# --- splits ----------------------------------------------------------------------------------


def load_splits(recipe: Recipe) -> tuple[Split, Split, Leakage]:
    """Load the recipe's train and held-out comparisons, sampled, and what the two have in common.

    With `leakage: drop` it is left out of train. With `error` it is not: the caller has the
    counts to show, and raises by `refuse_leakage`.

    Raises:
        DataError: a source cannot be read, or a split is missing or holds no comparison.
    """
    data, seed = recipe.data, recipe.training.seed
    share = hold_out_share(data)
    train = load_split(data, None, margins=True)
    test = load_held_out(data)
    if share is not None:
        kept = np.flatnonzero(~held_out(train, share))
        if not len(kept):
            raise DataError(f"all comparisons are held out; {_how_to_hold_out(train)}")
        train = train.select(kept, "held_out")
    train = set_aside(train, "margin_fault")
    # Against all that is held out, so that no other sample of it meets what was trained on.
    keys = train.column("prompt_key")
    leaked = np.isin(keys, test.column("prompt_key"))
    first_rows = train.names(np.flatnonzero(leaked)[:FIRST_ROWS])
    leakage = Leakage(len(np.unique(keys[leaked])), int(leaked.sum()), len(keys), first_rows)
    if data.leakage == "drop":
        train = train.select(np.flatnonzero(~leaked), "leaked_prompt")
    if not len(train.comparisons):
        raise DataError(f"no comparison is left to train on: {train.why_excluded()}")
    train = _identified(sample(train, data.max_train_samples, seed))
    return train, sample(_identified(test), data.max_eval_samples, seed), leakage


def refuse_leakage(recipe: Recipe, leakage: Leakage) -> None:
    """Raise DataError where train prompts are also held out and `leakage` is `error`."""
    if leakage.comparisons and recipe.data.leakage == "error":
        raise DataError(
            f"{leakage.comparisons} of {leakage.of_comparisons} train comparisons (row "
            f"{', '.join(leakage.first_rows)}{' ...' if leakage.comparisons > FIRST_ROWS else ''}) have a "
            "prompt that is also held out, so held-out accuracy would be too high; set 'leakage: drop' to "
            "leave them out of training, or 'leakage: allow'"
        )


def load_held_out_split(recipe: Recipe) -> Split:
    """Load the recipe's held-out comparisons, sampled."""
    split = _identified(load_held_out(recipe.data))
    return sample(split, recipe.data.max_eval_samples, recipe.training.seed)


def load_held_out(data: DataArguments) -> Split:
    """Load all held-out comparisons: the test split, or a share of the train split's prompts."""
    share = hold_out_share(data)
    if share is None:
        return load_split(data, data.dataset_test_split)
    split = load_split(data, None)
    comparisons = split.comparisons.select(np.flatnonzero(held_out(split, share)))
    if not len(comparisons):
        raise DataError(f"no comparison is held out; {_how_to_hold_out(split)}")
    return Split(comparisons, len(comparisons))  # the train side counts what cannot be parsed


def hold_out_share(data: DataArguments) -> float | None:
    """Return the share of train prompts that is held out; None where there is a test split.

    Raises:
        DataError: some sources have a test split and others have not.
    """
    if data.test_split_size is not None:
        return data.test_split_size
    found = loading.sources_of(data)
    there = [loading.has_split(source, data.dataset_test_split, data.dataset_revision) for source in found]
    if all(there):
        return None
    if any(there):
        without = found[there.index(False)]
        name = "/".join(filter(None, [without.path, without.data_dir]))
        raise DataError(
            f"'{name}' has no split '{data.dataset_test_split}' and others have; set 'test_split_size' "
            "to hold out that share of all prompts"
        )
    return HELD_OUT_SHARE


def held_out(split: Split, share: float) -> NDArray[np.bool_]:
    """Mark the comparisons that are held out: those whose prompt's hash is in the lowest `share`.

    A prompt stays on its side whatever the seed, the order and the other prompts are.
    """
    return split.column("prompt_key").view(np.uint64) < np.uint64(share * 2**64)


def _identified(split: Split) -> Split:
    return replace(split, fingerprint=fingerprint(split.comparisons))


def _how_to_hold_out(split: Split) -> str:
    """What to do where a share leaves nothing on one side: prompts fall on either by their hashes."""
    hashes = np.unique(split.column("prompt_key").view(np.uint64)) / 2.0**64
    if len(hashes) == 1:
        return (
            "all have the same prompt, so give a test split of your own (a folder with train.jsonl and "
            "test.jsonl) and set 'leakage: allow'"
        )
    between = (hashes[len(hashes) // 2 - 1] + hashes[len(hashes) // 2]) / 2
    return f"set 'test_split_size: {between:.6g}', which holds out about half of the {len(hashes)} prompts"


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
    parts = []
    for source in found:
        name = loading.label(source, of_mixture=bool(data.datasets))
        parts.append(loading.load_comparisons(source, split or source.split, name, data, column))
    if split is None:
        parts = _by_fraction(parts, found)
    result = Split(
        # Their own infos are other ones once they come from the cache, and would change the fingerprint.
        hf_datasets.concatenate_datasets(
            [part.comparisons for part in parts], info=hf_datasets.DatasetInfo()
        ),
        sum(part.rows for part in parts),
        differing_prompts=sum(part.differing_prompts for part in parts),
        unread=list(dict.fromkeys(name for part in parts for name in part.unread)),
    )
    for part in parts:
        result.excluded.update(part.excluded)
        result.details = part.details | result.details
        for reason, names in part.first_rows.items():
            result.first_rows[reason] = [*result.first_rows.get(reason, []), *names][:FIRST_ROWS]
    if not len(result.comparisons):
        name = " and ".join(dict.fromkeys(source.path for source in found))
        where = f", split '{split}'" if split else ""
        raise DataError(
            f"{name}{where}: no comparison in it ({result.why_excluded()}); a row has "
            f"{formats.SHAPES_IN_WORDS}, and texts without a prompt are hh-rlhf transcripts"
            + (f"; columns not read: {', '.join(result.unread)}" if result.unread else "")
        )
    return result


def _by_fraction(parts: list[Split], found: list[DatasetConfig]) -> list[Split]:
    """Parts of a mixture in their fractions: the largest one that repeats nothing, as in TRL."""
    shares = [source.fraction for source in found]
    if not any(shares):
        return parts
    total = min(
        len(part.comparisons) * sum(shares) / share for part, share in zip(parts, shares, strict=True)
    )
    sizes = [round(total * share / sum(shares)) for share in shares]
    return [
        part.select(np.arange(min(size, len(part.comparisons))), "not_in_fraction")
        for part, size in zip(parts, sizes, strict=True)
    ]


def changed_data(run: Path, **now: str) -> list[str]:
    """Name the splits whose fingerprints are not those that a finished run was trained with."""
    record = run / "run.json"
    then = read_json(record).get("data_fingerprints", {}) if record.is_file() else {}
    return [name for name in now if then.get(name, now[name]) != now[name]]


def check_held_out(run: Path, split: Split) -> None:
    """Raise RecipeError where the held-out comparisons are not those that were held out from training."""
    if changed_data(run, held_out=split.fingerprint):
        raise RecipeError(
            f"the held-out comparisons are not those that {run} was trained with: the data changed since, "
            "and what is held out now may have been trained on; restore the data, or train anew with "
            "--overwrite"
        )
