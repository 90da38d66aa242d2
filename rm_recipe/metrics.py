"""How well rewards agree with preferences: pure functions, and `PreferenceAccuracy` on top.

Everywhere `chosen` and `rejected` are the rewards of the two responses of each pair, arrays of
shape `(pairs,)`, and the margin is `chosen - rejected`. A comparison of two responses is one pair,
one of K gives up to K choose 2 (`pair_indices`).
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray
from statsmodels.stats.proportion import proportion_confint

from rm_recipe.preferences import untied_pairs

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def agreement(chosen: ArrayLike, rejected: ArrayLike) -> Array:
    """1 where the chosen response got the higher reward, 1/2 at a tie, 0 otherwise; `(n,)`.

    A tie says nothing about the preference, so counting it as a win (trl PR 1012) or as a loss
    (trl's `eval_accuracy`) would both be wrong.
    """
    margin = np.asarray(chosen, float) - np.asarray(rejected, float)
    return np.asarray((np.sign(margin) + 1) / 2)


def pair_indices(ranks: Sequence[Sequence[int]]) -> tuple[Indices, Indices, Indices]:
    """The untied pairs of comparisons whose responses are laid end to end, best first.

    Args:
        ranks: for each comparison the ranks of its K responses.

    Returns:
        better, worse, comparison: `(pairs,)` each; the first two count responses, the last
        comparisons.
    """
    better, worse, comparison = [], [], []
    start = 0
    for number, own in enumerate(ranks):
        for i, j in untied_pairs(own):
            better.append(start + i)
            worse.append(start + j)
            comparison.append(number)
        start += len(own)
    return np.array(better, np.int64), np.array(worse, np.int64), np.array(comparison, np.int64)


def mean_by_comparison(values: ArrayLike, comparison: Indices) -> Array:
    """The mean over each comparison's pairs, so that each comparison weighs 1; `(comparisons,)`.

    InstructGPT (arXiv 2203.02155, equation 1) divides by K choose 2 for the same reason.
    """
    return np.asarray(np.bincount(comparison, np.asarray(values, float)) / np.bincount(comparison))


def pairwise_agreement(values: ArrayLike, ranks: Sequence[Sequence[int]]) -> Array:
    """For each comparison the share of its untied pairs that `values` order as its ranks do.

    Args:
        values: of all responses end to end, `(responses,)`: rewards, or lengths for a baseline.
            Equal ones count 1/2.

    Returns:
        `(comparisons,)`
    """
    values = np.asarray(values, float)
    better, worse, comparison = pair_indices(ranks)
    return mean_by_comparison(agreement(values[better], values[worse]), comparison)


def accuracy_interval(accuracy: float, n: int) -> list[float]:
    """The 95 % Wilson interval of an accuracy over `n` comparisons; `[low, high]`.

    Ties enter as half a success. Source: Wilson 1927; statsmodels' `proportion_confint`.
    """
    low, high = proportion_confint(accuracy * n, n, alpha=0.05, method="wilson")
    return [float(low), float(high)]


def bradley_terry_loss(chosen: ArrayLike, rejected: ArrayLike, comparison: Indices | None = None) -> float:
    """Mean of -log sigmoid(margin) (InstructGPT, arXiv 2203.02155, equation 1).

    Args:
        comparison: for rankings the comparison that each pair belongs to, `(pairs,)`.
    """
    losses = np.logaddexp(0.0, np.asarray(rejected, float) - np.asarray(chosen, float))
    return float(np.mean(losses if comparison is None else mean_by_comparison(losses, comparison)))


def length_baselines(lengths: ArrayLike, ranks: Sequence[Sequence[int]]) -> dict[str, float]:
    """The accuracy of two rules that do not read: the longer response wins, the shorter one wins.

    Args:
        lengths: of all responses end to end, `(responses,)`.
    """
    longer = float(pairwise_agreement(lengths, ranks).mean())
    return {"longer_wins": longer, "shorter_wins": 1 - longer}


def expected_calibration_error(
    chosen: ArrayLike, rejected: ArrayLike, n_bins: int = 10
) -> tuple[float, list[dict[str, float]]]:
    """How far sigmoid(|margin|), the model's confidence, is from how often it is right.

    Pairs are put into `n_bins` equal bins of confidence between 0.5 and 1; the error is the
    mean over pairs of |mean confidence - accuracy| of their bin (Guo et al. 2017,
    arXiv 1706.04599, equation 3).

    Returns:
        the error, and for each bin that is not empty its `confidence`, `accuracy` and `n`.
    """
    margin = np.asarray(chosen, float) - np.asarray(rejected, float)
    right = agreement(chosen, rejected)
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    index = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    bins = [
        {
            "confidence": float(confidence[index == b].mean()),
            "accuracy": float(right[index == b].mean()),
            "n": int((index == b).sum()),
        }
        for b in np.unique(index)
    ]
    error = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(margin)
    return float(error), bins


class PreferenceAccuracy(evaluate.Metric):
    """Share of comparisons whose chosen response has the higher reward.

    Each comparison weighs 1, of a ranking each untied pair the same part of it, and a tie counts
    1/2. Nothing is excluded: a reward that is not finite raises. Use it like any `evaluate` metric,
    offline, since it comes from this package and not from the Hub::

        PreferenceAccuracy().compute(chosen=[1.0, 0.5], rejected=[0.0, 0.5])
        # accuracy 0.75, accuracy_ci95, ties 1, n 2
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Held-out preference accuracy, ties one half, with a Wilson interval.",
            citation="",
            inputs_description="chosen, rejected: rewards, one each for every pair; comparison: its number",
            features=datasets.Features({"chosen": number, "rejected": number}),
        )

    def _compute(
        self, chosen: ArrayLike, rejected: ArrayLike, comparison: Indices | None = None
    ) -> dict[str, Any]:
        """`{"accuracy", "accuracy_ci95", "ties", "n"}`.

        Args:
            comparison: for rankings the comparison that each pair belongs to, `(pairs,)`.

        Raises:
            ValueError: no comparison, unequal lengths, or a reward that is not finite.
        """
        chosen, rejected = np.asarray(chosen, float), np.asarray(rejected, float)
        if chosen.shape != rejected.shape or chosen.ndim != 1 or not chosen.size:
            raise ValueError(
                f"expected two equal, non-empty rows of rewards, got {chosen.shape} and {rejected.shape}"
            )
        if not np.isfinite([chosen, rejected]).all():
            raise ValueError("a reward is not finite")
        right = agreement(chosen, rejected)
        if comparison is not None:
            right = mean_by_comparison(right, comparison)
        accuracy = float(right.mean())
        return {
            "accuracy": accuracy,
            "accuracy_ci95": accuracy_interval(accuracy, right.size),
            "ties": int((chosen == rejected).sum()),
            "n": int(right.size),
        }
