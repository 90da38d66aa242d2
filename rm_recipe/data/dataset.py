"""A split: its comparisons, memory-mapped, and the count of everything that is not among them."""

import hashlib
import inspect
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import Any

import datasets as hf_datasets
import numpy as np
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from multiprocess import TimeoutError as PoolTimeoutError
from numpy.typing import NDArray

from rm_recipe.data.comparison import Comparison, Encoded
from rm_recipe.errors import TrainingError

FIRST_ROWS = 5  # that a report names for each reason


def row_name(row: dict[str, Any]) -> str:
    """Name a comparison `SUBSET:ROW`, or by its row alone where the source has no subsets."""
    return f"{row['subset']}:{row['row']}" if row["subset"] else str(row["row"])


def first_of(rows: list[str], n: int) -> str:
    """Name the first rows of `n`."""
    return ", ".join(rows) + (" ..." if n > len(rows) else "")


def as_comparisons(rows: Mapping[str, Any]) -> list[Comparison]:
    """Read comparisons from the columns that `loading` wrote, where every message has all keys."""
    columns = {field.name: rows[field.name] for field in fields(Comparison)}
    columns["prompt"] = [[{k: v for k, v in m.items() if v is not None} for m in p] for p in rows["prompt"]]
    return [Comparison(*values) for values in zip(*columns.values(), strict=True)]


@dataclass
class Split:
    """Comparisons of one split, and what became of the rows that are not among them.

    Attributes:
        comparisons: columns `prompt`, `responses`, `ranks`, `margins`, `subset`,
            `row` (counted from 1 in its source; of a .jsonl the line), `prompt_key`, `first_turn_key` (of the
            first question), `key` (of texts, ranks and margins), `scored_lower` (columns say that the
            chosen reply has the lower score); after tokenising `prefix`, `suffixes`, `lengths`,
            `reply_lengths`, `truncated` (`tokenization.encode_all`).
        rows: rows of the source; `rows == len(comparisons) + sum(excluded.values())`.
        excluded: number of rows by reason.
        first_rows: for each reason the first rows that it was found in, `SUBSET:ROW`, in brackets what it
            was there, where there is more to say.
        differing_prompts: rows of the source whose transcripts or messages differ before the last
            reply, whatever became of them.
        unread: columns of the source that are part of no comparison.
        shapes: those that its sources have, and the columns that they are known by, in words.
        tokenized: after tokenising, all that went into it, also what was left out.
        fingerprint: of a recipe's split, `fingerprint`: of train as it is trained on, of what is held out
            before sampling.
    """

    comparisons: hf_datasets.Dataset
    rows: int
    excluded: Counter[str] = field(default_factory=Counter)
    first_rows: dict[str, list[str]] = field(default_factory=dict)
    differing_prompts: int = 0
    unread: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    tokenized: hf_datasets.Dataset | None = None
    fingerprint: str = ""

    def __getitem__(self, index: int) -> Comparison:
        return as_comparisons(self.comparisons[index : index + 1])[0]

    def encoded(self) -> list[Encoded]:
        """Return the tokenised comparisons, in order."""
        return [*map(Encoded, self.comparisons["prefix"][:], self.comparisons["suffixes"][:])]

    def sizes(self, shared: bool, padded: bool = False) -> NDArray[np.int64]:
        """Count the tokens of each comparison, `(comparisons,)`.

        Args:
            shared: its prefix is counted once, otherwise for each response.
            padded: each response counts as its longest one, as in rows of one sequence.
        """
        sizes = []
        columns = self.comparisons.select_columns(["prefix", "suffixes"]).with_format("arrow")
        for rows in columns.iter(10_000):  # as many at a time, so that memory stays flat
            prefix, responses = (pc.list_value_length(rows[name]).to_numpy() for name in rows.column_names)
            suffixes = pc.list_value_length(pc.list_flatten(rows["suffixes"])).to_numpy()
            starts = np.cumsum(responses) - responses
            own = (np.maximum if padded else np.add).reduceat(suffixes, starts)
            sizes.append(prefix * (1 if shared else responses) + own * (responses if padded else 1))
        return np.concatenate(sizes)

    def largest(self, n: int, shared: bool) -> NDArray[np.int64]:
        """Find the numbers of the n comparisons that make the largest batch.

        One sequence a row, each row is as long as the longest sequence of the batch.
        """
        return np.argsort(-self.sizes(shared, padded=not shared), kind="stable")[:n]

    def longest(self, n: int, shared: bool) -> list[Encoded]:
        """Return the comparisons of the largest batch of n."""
        return replace(self, comparisons=self.comparisons.select(self.largest(n, shared))).encoded()

    def why_excluded(self) -> str:
        """Write the reasons with their numbers and the first row of each on one line."""
        rows = {reason: f", first in row {names[0]}" for reason, names in self.first_rows.items()}
        found = [f"{n} {reason}{rows.get(reason, '')}" for reason, n in self.excluded.items()]
        return "; ".join(found) or "no rows"

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of numbers as an array."""
        return np.asarray(arrow_column(self.comparisons, name).to_numpy())

    def names(self, indices: NDArray[np.int64]) -> list[str]:
        """Name the comparisons with these numbers, `SUBSET:ROW`."""
        rows = self.comparisons.select_columns(["subset", "row"]).select(indices)
        return [row_name(row) for row in rows]

    def select(self, indices: NDArray[np.int64], reason: str) -> "Split":
        """Keep the comparisons with these numbers; the others count under `reason`."""
        excluded = self.excluded + Counter({reason: len(self.comparisons) - len(indices)})
        return replace(self, comparisons=self.comparisons.select(indices), excluded=excluded)


def set_aside(split: Split) -> Split:
    """Leave out the rows that have a reason in the column `excluded`, counted and the first of them named."""
    reasons = arrow_column(split.comparisons, "excluded")
    excluded, first_rows = split.excluded.copy(), dict(split.first_rows)
    for reason in pc.unique(reasons).to_pylist():
        if reason:
            numbers = np.flatnonzero(pc.equal(reasons, reason).to_numpy())
            excluded[reason] += len(numbers)
            first = numbers[:FIRST_ROWS]
            details = (f" ({detail})" if detail else "" for detail in split.comparisons[first]["detail"])
            first_rows[reason] = [*map(str.__add__, split.names(first), details)]
    comparisons = split.comparisons.select(np.flatnonzero(pc.equal(reasons, "").to_numpy()))
    return replace(split, comparisons=comparisons, excluded=excluded, first_rows=first_rows)


def arrow_column(rows: hf_datasets.Dataset, name: str) -> Any:
    """Return a column as pyarrow has it, without a Python object for each row."""
    # A format's own `columns` would select after reading: rows out of order are copied as a whole.
    return rows.select_columns(name).with_format("arrow")[:][name]


# --- fingerprints ----------------------------------------------------------------------------


def fingerprint(comparisons: hf_datasets.Dataset) -> str:
    """Hash texts, ranks and margins, in order: the data, not their place or the code that reads them."""
    return hashlib.sha256(arrow_column(comparisons, "key").to_numpy().tobytes()).hexdigest()


def fingerprint_of_tokens(comparisons: hf_datasets.Dataset) -> str:
    """Hash the token ids, in order."""
    digest = hashlib.sha256()
    for rows in comparisons.select_columns(["prefix", "suffixes"]).with_format("arrow").iter(10_000):
        suffixes = pc.list_flatten(rows["suffixes"])
        for lists in (rows["prefix"], rows["suffixes"], suffixes):
            digest.update(pc.list_value_length(lists).to_numpy().tobytes())
        for ids in (rows["prefix"], suffixes):
            digest.update(pc.list_flatten(ids).to_numpy().tobytes())
    return digest.hexdigest()


# --- `datasets.map`, cached by content, in several processes where that pays -------------------

LARGE = 20_000  # rows from which starting more processes takes less time than they save


def cache_key(*depends_on: Any) -> str:
    """Hash what a cached result depends on: values, and modules for the source of their code."""
    parts = [inspect.getsource(part) if isinstance(part, ModuleType) else part for part in depends_on]
    return str(Hasher.hash(parts))


def run_pass(
    rows: hf_datasets.Dataset,
    function: Callable[..., dict[str, Any]],
    description: str,
    features: dict[str, Any],
    depends_on: Sequence[Any],
    num_proc: int | None = None,
    **options: Any,
) -> hf_datasets.Dataset:
    """Map `function` over the rows, once; the result is cached and memory-mapped.

    Args:
        depends_on: besides the rows, what the result depends on, for `cache_key`.
        num_proc: `dataset_num_proc`; by default one process, and for a large set one for each core.
        options: more of `datasets.Dataset.map`'s.

    Raises:
        TrainingError: a process was killed.
    """
    if num_proc is None and len(rows) >= LARGE:
        num_proc = min(8, os.cpu_count() or 1)
    try:
        return rows.map(
            function,
            desc=description,
            features=hf_datasets.Features(features),
            new_fingerprint=cache_key(rows._fingerprint, options, *depends_on),
            num_proc=num_proc,
            **options,
        )
    except PoolTimeoutError as error:
        # datasets 5.2 waits for its processes on the way out of Ctrl-C, and fails at that.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        fault = f"{description.lower()}: a process was killed, perhaps for want of memory"
        raise TrainingError(f"{fault}; set 'dataset_num_proc: 1'") from None
