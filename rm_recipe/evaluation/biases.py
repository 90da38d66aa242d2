"""What a reward model's accuracy and its rewards depend on besides the preference."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import spearmanr

from rm_recipe.evaluation.metrics import Array, Indices, accuracy_interval

BUCKETS = 5
MOST_VALUES = 6  # that get a bucket each


def accuracy_of(right: Array) -> dict[str, Any]:
    """`n`, `accuracy` and `accuracy_ci95` (Wilson) of a part, not empty, of the comparisons or pairs.

    Of a ranking's pairs, which are not independent, the interval is too narrow.
    """
    accuracy = float(right.mean())
    return {"n": len(right), "accuracy": accuracy, "accuracy_ci95": accuracy_interval(accuracy, len(right))}


def accuracy_by_subset(names: list[str], right: Array) -> dict[str, dict[str, Any]]:
    """`accuracy_of` each subset, by name; comparisons without one are left out."""
    found, number = np.unique(np.array(names, object).astype(str), return_inverse=True)
    order = np.argsort(number, kind="stable")
    parts = np.split(right[order], np.cumsum(np.bincount(number))[:-1])
    return {str(name): accuracy_of(part) for name, part in zip(found, parts, strict=True) if name}


def accuracy_by_bucket(values: ArrayLike, right: Array) -> list[dict[str, Any]]:
    """`accuracy_of` the comparisons or pairs with similar values, each part with its `label`, in order.

    A few different whole numbers get a bucket each; otherwise there are `BUCKETS` with about as many each.
    """
    values = np.asarray(values)
    number, whole = _bucket_numbers(values), np.issubdtype(values.dtype, np.integer)
    rows = []
    for bucket in np.unique(number):
        own = number == bucket
        low, high = values[own].min(), values[own].max()
        ends = [f"{end}" if whole else f"{end:.2f}" for end in dict.fromkeys([low, high])]
        rows.append({"label": " to ".join(dict.fromkeys(ends)), **accuracy_of(right[own])})
    return rows


def _bucket_numbers(values: Array) -> Indices:
    distinct = np.unique(values)
    if len(distinct) <= MOST_VALUES and np.issubdtype(values.dtype, np.integer):
        return np.searchsorted(distinct, values)
    edges = np.quantile(values, np.arange(1, BUCKETS) / BUCKETS)
    return np.searchsorted(np.unique(edges), values)


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float | None:
    """Spearman's correlation; None where one of the two does not vary, so that there is none."""
    if np.ptp(np.asarray(one)) == 0 or np.ptp(np.asarray(other)) == 0:
        return None
    return float(spearmanr(one, other).statistic)
