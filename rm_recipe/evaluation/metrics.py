"""How well rewards agree with preferences: pure functions, and `PreferenceAccuracy` around one of them.

Everywhere `chosen` and `rejected` are the rewards of the two responses of each pair, arrays of
shape `(pairs,)`, and the margin is `chosen - rejected`. A comparison of two responses is one pair,
one of K gives up to K choose 2 (`pair_indices`).
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, kendalltau, spearmanr
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from rm_recipe.data.comparison import Array, Indices, agreement, mean_by_comparison


def pair_weights(comparison: Indices) -> Array:
    """1 over the number of pairs of the comparison that each pair belongs to; `(pairs,)`."""
    return np.asarray(1 / np.bincount(comparison)[comparison])


def accuracy_of(right: Array) -> dict[str, Any]:
    """`n`, `accuracy` and `accuracy_ci95` of how right each comparison is, 0 to 1, a tie 1/2; not empty.

    The interval is the 95 % one of Wilson 1927 (`statsmodels`), for answers that are right or wrong. Of
    rankings, which are right in parts, it is too wide; of a ranking's pairs, which are not independent, too
    narrow.
    """
    low, high = proportion_confint(right.sum(), len(right), alpha=0.05, method="wilson")
    return {"n": len(right), "accuracy": float(right.mean()), "accuracy_ci95": [float(low), float(high)]}


def preference_accuracy(
    chosen: ArrayLike, rejected: ArrayLike, comparison: Indices | None = None
) -> dict[str, Any]:
    """Share of comparisons whose chosen response has the higher reward, with what belongs to it.

    Each comparison weighs 1, of a ranking each untied pair the same part of it, and a tie counts 1/2. Nothing
    is excluded.

    Args:
        comparison: for rankings the comparison that each pair belongs to, `(pairs,)`.

    Returns:
        `accuracy`, `accuracy_ci95` (Wilson), `ties` (pairs), `n` (comparisons), `mean_margin`, and `loss`,
        the mean of -log sigmoid(margin) (InstructGPT, arXiv 2203.02155, equation 1).

    Raises:
        ValueError: no comparison, unequal lengths, or a reward that is not finite.
    """
    chosen, rejected = np.asarray(chosen, float), np.asarray(rejected, float)
    if not chosen.size or chosen.shape != rejected.shape or not np.isfinite([chosen, rejected]).all():
        raise ValueError("expected two equal, non-empty rows of finite rewards")
    if comparison is None:
        comparison = np.arange(chosen.size)
    margins = chosen - rejected
    return {
        **accuracy_of(mean_by_comparison(agreement(chosen, rejected), comparison)),
        "ties": int((chosen == rejected).sum()),
        "loss": float(mean_by_comparison(np.logaddexp(0.0, -margins), comparison).mean()),
        "mean_margin": float(mean_by_comparison(margins, comparison).mean()),
    }


class PreferenceAccuracy(evaluate.Metric):
    """`preference_accuracy` as an `evaluate` metric.

    Use it like any other, offline, since it comes from this package and not from the Hub::

        PreferenceAccuracy().compute(chosen=[1.0, 0.5], rejected=[0.0, 0.5])
        # accuracy 0.75, accuracy_ci95, ties 1, n 2, loss 0.503, mean_margin 0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Held-out preference accuracy, ties one half, with a Wilson interval.",
            citation="",
            features=datasets.Features({"chosen": number, "rejected": number}),
        )

    def _compute(self, **columns: Any) -> dict[str, Any]:
        return preference_accuracy(**columns)


def ranking_agreement(rewards: Sequence[ArrayLike], ranks: Sequence[Sequence[int]]) -> dict[str, float]:
    """How well rewards order the K responses of each comparison.

    Args:
        rewards: `(K,)` for each comparison.
        ranks: of the same responses, 0 for the best.

    Returns:
        the means over comparisons of `best_of_k`, whether the highest reward is a best response's (of several
        that share it, the share of best ones: the chance of a draw), and of `kendall_tau`, tau-b
        (Kendall 1945; `scipy.stats.kendalltau`), 0 where all rewards are equal.
    """
    best, taus = [], []
    for values, own in zip(map(np.asarray, rewards), map(np.asarray, ranks), strict=True):
        best.append((own[values == values.max()] == own.min()).mean())
        taus.append(kendalltau(values, -own).statistic)
    return {"best_of_k": float(np.mean(best)), "kendall_tau": float(np.nan_to_num(taus).mean())}


# --- accuracy by length, turns and subset ------------------------------------------------------

BUCKETS = 5
MOST_VALUES = 6  # that get a bucket each


def accuracy_by_subset(names: Sequence[str], right: Array) -> dict[str, dict[str, Any]]:
    """`accuracy_of` each subset, by name; comparisons without one are left out."""
    found, number = np.unique(np.array(names, object).astype(str), return_inverse=True)
    return {name: accuracy_of(right[number == own]) for own, name in enumerate(found.tolist()) if name}


def accuracy_by_bucket(values: ArrayLike, right: Array) -> list[dict[str, Any]]:
    """`accuracy_of` the comparisons or pairs with similar values, each part with its `label`, in order.

    A few different values get a bucket each; otherwise there are `BUCKETS` with about as many each.

    Args:
        values: whole numbers.
    """
    values, rows = np.asarray(values), []
    limits = np.unique(values)
    if len(limits) > MOST_VALUES:
        limits = np.unique(np.quantile(values, np.arange(1, BUCKETS) / BUCKETS))
    number = np.searchsorted(limits, values)
    for bucket in np.unique(number):
        own = number == bucket
        ends = dict.fromkeys((values[own].min(), values[own].max()))
        rows.append({"label": " to ".join(map(str, ends)), **accuracy_of(right[own])})
    return rows


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float | None:
    """Spearman's correlation; None where one of the two does not vary, so that there is none."""
    if np.ptp(np.asarray(one)) == 0 or np.ptp(np.asarray(other)) == 0:
        return None
    return float(spearmanr(one, other).statistic)


# --- two models on the same comparisons --------------------------------------------------------


def interval_of_mean(values: Array) -> Any:
    """The 95 % interval of the mean over the first axis from a bootstrap (percentile, 2,000, seeded).

    Returns:
        `[low, high]`, of a table such a pair for each column; None for fewer than two values.
    """
    if len(values) < 2:
        return None
    drawn = bootstrap((values,), np.mean, n_resamples=2000, batch=100, method="percentile", rng=0)
    return np.stack(drawn.confidence_interval, axis=-1).tolist()


def paired_difference(this: ArrayLike, other: ArrayLike) -> dict[str, Any]:
    """How much more often one model is right than another one, on the same comparisons.

    Both saw the same comparisons, hard ones and easy ones alike, so the difference is known better than
    either accuracy: two intervals that overlap may hide a difference that is certain.

    Args:
        this, other: how right each is on each comparison, 0 to 1, a tie 1/2; `(comparisons,)`.

    Returns:
        `difference` of the accuracies; `ci95`, its 95 % interval from a bootstrap over comparisons
        (percentile, seeded; `scipy.stats.bootstrap`; None for fewer than two); `only_this` and `only_other`,
        on how many comparisons one is more right than the other; `p_value` of McNemar's exact test that both
        are equally likely (McNemar 1947; `statsmodels`).
    """
    differences = np.asarray(this, float) - np.asarray(other, float)
    only_this, only_other = int((differences > 0).sum()), int((differences < 0).sum())
    return {
        "difference": float(differences.mean()),
        "ci95": interval_of_mean(differences),
        "only_this": only_this,
        "only_other": only_other,
        "p_value": float(mcnemar([[0, only_this], [only_other, 0]]).pvalue),
    }


# --- calibration: is sigmoid(margin) the probability that the chosen response is better? -------
# Under the Bradley-Terry model it is (InstructGPT, arXiv 2203.02155, section 3.5).

BINS = 10  # of equal width, between confidence 0.5 and 1


def calibrate(margins: ArrayLike, comparison: Indices) -> dict[str, Any]:
    """How far sigmoid(|margin|), the model's confidence, is from how often it is right.

    The error is the mean over pairs of |mean confidence - accuracy| of their bin (Guo et al. 2017,
    arXiv 1706.04599, equation 3). Each comparison weighs 1, a tie is half right.

    Args:
        margins: reward of the better response minus that of the worse one, `(pairs,)`.
        comparison: the comparison that each pair belongs to, `(pairs,)`.

    Returns:
        `ece`, the error; `ece_by_chance`, about what so many pairs give a model that is calibrated, as no
        bin is right exactly as often as is probable; and `bins`: of each that is not empty its `confidence`,
        `accuracy` and `n` (pairs).
    """
    margins = np.asarray(margins, float)
    right, confidence = agreement(margins, np.zeros_like(margins)), 1 / (1 + np.exp(-np.abs(margins)))
    weights = pair_weights(comparison)
    number = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins, error, by_chance = [], 0.0, 0.0
    for own in (number == bin_number for bin_number in np.unique(number)):
        sure, accurate = (float(np.average(of[own], weights=weights[own])) for of in (confidence, right))
        bins.append({"confidence": sure, "accuracy": accurate, "n": int(own.sum())})
        share = float(weights[own].sum() / weights.sum())
        error += share * abs(sure - accurate)
        by_chance += share * float(np.sqrt(2 / np.pi * sure * (1 - sure) / own.sum()))  # a normal's mean size
    return {"ece": error, "ece_by_chance": by_chance, "bins": bins}
