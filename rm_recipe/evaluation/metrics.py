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
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from rm_recipe.data.comparison import Array, Indices, agreement, mean_by_comparison, pair_indices


def pair_weights(comparison: Indices) -> Array:
    """1 over the number of pairs of the comparison that each pair belongs to; `(pairs,)`."""
    return np.asarray(1 / np.bincount(comparison)[comparison])


def accuracy_of(right: Array) -> dict[str, Any]:
    """`n`, `accuracy` and `accuracy_ci95` of how right each comparison is, 0 to 1, a tie 1/2; not empty.

    The interval is the 95 % one of Wilson 1927 (`statsmodels`). Of a ranking's pairs, which are not
    independent, it is too narrow.
    """
    low, high = proportion_confint(right.sum(), len(right), alpha=0.05, method="wilson")
    return {"n": len(right), "accuracy": float(right.mean()), "accuracy_ci95": [float(low), float(high)]}


def bradley_terry_loss(chosen: ArrayLike, rejected: ArrayLike, comparison: Indices | None = None) -> float:
    """Mean of -log sigmoid(margin) (InstructGPT, arXiv 2203.02155, equation 1).

    Args:
        comparison: for rankings the comparison that each pair belongs to, `(pairs,)`.
    """
    losses = np.logaddexp(0.0, np.asarray(rejected, float) - np.asarray(chosen, float))
    return float(np.mean(losses if comparison is None else mean_by_comparison(losses, comparison)))


def preference_accuracy(
    chosen: ArrayLike, rejected: ArrayLike, comparison: Indices | None = None
) -> dict[str, Any]:
    """Share of comparisons whose chosen response has the higher reward, with what belongs to it.

    Each comparison weighs 1, of a ranking each untied pair the same part of it, and a tie counts 1/2. Nothing
    is excluded.

    Args:
        comparison: for rankings the comparison that each pair belongs to, `(pairs,)`.

    Returns:
        `accuracy`, `accuracy_ci95` (Wilson), `ties` (pairs), `n` (comparisons), `loss`, `mean_margin`.

    Raises:
        ValueError: no comparison, unequal lengths, or a reward that is not finite.
    """
    chosen, rejected = np.asarray(chosen, float), np.asarray(rejected, float)
    if not chosen.size or chosen.shape != rejected.shape or not np.isfinite([chosen, rejected]).all():
        raise ValueError("expected two equal, non-empty rows of finite rewards")
    if comparison is None:
        comparison = np.arange(chosen.size)
    return {
        **accuracy_of(mean_by_comparison(agreement(chosen, rejected), comparison)),
        "ties": int((chosen == rejected).sum()),
        "loss": bradley_terry_loss(chosen, rejected, comparison),
        "mean_margin": float(mean_by_comparison(chosen - rejected, comparison).mean()),
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


def ranking_agreement(rewards: Sequence[ArrayLike], ranks: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How well rewards order the K responses of each comparison.

    Args:
        rewards: `(K,)` for each comparison.
        ranks: of the same responses, 0 for the best.

    Returns:
        `pairs`; `pairwise_accuracy`, in which each untied pair weighs the same, so that long rankings weigh
        more (as in InstructGPT's figures); the means over comparisons of `best_of_k`, whether the highest
        reward is a best response's (of several that share it, the share of best ones: the chance of a draw),
        and of `kendall_tau`, tau-b (Kendall 1945; `scipy.stats.kendalltau`), 0 where all rewards are equal.
    """
    best, taus = [], []
    for values, own in zip(map(np.asarray, rewards), map(np.asarray, ranks), strict=True):
        best.append((own[values == values.max()] == own.min()).mean())
        taus.append(kendalltau(values, -own).statistic)
    flat = np.concatenate(rewards)
    better, worse, _ = pair_indices(ranks)
    return {
        "pairs": len(better),
        "pairwise_accuracy": float(agreement(flat[better], flat[worse]).mean()),
        "best_of_k": float(np.mean(best)),
        "kendall_tau": float(np.nan_to_num(taus).mean()),
    }


# --- accuracy by length, turns and subset ------------------------------------------------------

BUCKETS = 5
MOST_VALUES = 6  # that get a bucket each


def accuracy_by_subset(names: Sequence[str], right: Array) -> dict[str, dict[str, Any]]:
    """`accuracy_of` each subset, by name; comparisons without one are left out."""
    found, number = np.unique(np.array(names, object).astype(str), return_inverse=True)
    return {name: accuracy_of(right[number == own]) for own, name in enumerate(found.tolist()) if name}


def accuracy_by_bucket(values: ArrayLike, right: Array) -> list[dict[str, Any]]:
    """`accuracy_of` the comparisons or pairs with similar values, each part with its `label`, in order.

    A few different whole numbers get a bucket each; otherwise there are `BUCKETS` with about as many each.
    """
    values = np.asarray(values)
    whole, limits = np.issubdtype(values.dtype, np.integer), np.unique(values)
    if not whole or len(limits) > MOST_VALUES:
        limits = np.unique(np.quantile(values, np.arange(1, BUCKETS) / BUCKETS))
    number, rows = np.searchsorted(limits, values), []
    for bucket in np.unique(number):
        own = number == bucket
        ends = [f"{end}" if whole else f"{end:.2f}" for end in (values[own].min(), values[own].max())]
        rows.append({"label": " to ".join(dict.fromkeys(ends)), **accuracy_of(right[own])})
    return rows


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float | None:
    """Spearman's correlation; None where one of the two does not vary, so that there is none."""
    if np.ptp(np.asarray(one)) == 0 or np.ptp(np.asarray(other)) == 0:
        return None
    return float(spearmanr(one, other).statistic)


# --- two models on the same comparisons --------------------------------------------------------

RESAMPLES = 2000


def interval_of_mean(values: Array) -> list[float] | None:
    """The 95 % interval of a mean from a bootstrap (percentile, seeded); None for fewer than two values."""
    if len(values) < 2:
        return None
    drawn = bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=0)
    return [float(end) for end in drawn.confidence_interval]


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
# Under the Bradley-Terry model it is (InstructGPT, arXiv 2203.02155, section 3.5). A model that is sure and
# wrong has margins that are too large; dividing all rewards by one temperature leaves every order as it is
# and mends that.

FOLDS = 5
FEWEST = 50  # comparisons that a temperature is fitted to


def expected_calibration_error(
    margins: ArrayLike, comparison: Indices | None = None, n_bins: int = 10
) -> tuple[float, list[dict[str, float]]]:
    """How far sigmoid(|margin|), the model's confidence, is from how often it is right.

    Pairs are put into `n_bins` equal bins of confidence between 0.5 and 1; the error is the mean over pairs
    of |mean confidence - accuracy| of their bin (Guo et al. 2017, arXiv 1706.04599, equation 3). A tie is
    half right.

    Args:
        margins: reward of the better response minus that of the worse one, `(pairs,)`.
        comparison: for rankings the comparison that each pair belongs to, so that each comparison weighs 1.

    Returns:
        the error, and for each bin that is not empty its `confidence`, `accuracy` and `n` (pairs).
    """
    margins = np.asarray(margins, float)
    right, confidence = agreement(margins, np.zeros_like(margins)), 1 / (1 + np.exp(-np.abs(margins)))
    weights = pair_weights(np.arange(len(margins)) if comparison is None else comparison)
    number = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    bins, error = [], 0.0
    for own in (number == bin_number for bin_number in np.unique(number)):
        sure, accurate = (float(np.average(of[own], weights=weights[own])) for of in (confidence, right))
        bins.append({"confidence": sure, "accuracy": accurate, "n": int(own.sum())})
        error += float(weights[own].sum() / weights.sum()) * abs(sure - accurate)
    return error, bins


def fit_temperature(margins: ArrayLike, comparison: Indices) -> float | None:
    """The temperature that rewards have to be divided by for the least Bradley-Terry loss.

    A logistic regression of who won on the margin, without an intercept as neither response comes first;
    the temperature is 1 over its slope (Platt scaling; Guo et al. 2017, section 4.2).

    Returns:
        None where there is none: every pair is ordered as it should be, so that the loss falls for ever, or
        the rewards order no better than chance.
    """
    margins = np.asarray(margins, float)
    if (margins >= 0).all():
        return None
    both_ways, won = np.concatenate([margins, -margins])[:, None], np.repeat([1, 0], len(margins))
    regression = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8, max_iter=1000)
    regression.fit(both_ways, won, sample_weight=np.tile(pair_weights(comparison), 2))
    slope = float(regression.coef_[0, 0])
    return 1 / slope if slope > 0 else None


def calibrate(margins: ArrayLike, comparison: Indices) -> dict[str, Any]:
    """`calibration` of `evaluation.json`.

    Args:
        margins: `(pairs,)`.
        comparison: the comparison that each pair belongs to, `(pairs,)`.

    Returns:
        `ece` and its `bins`; the `temperature` that fits all pairs; `ece_after` and `loss_after`, of margins
        each divided by the temperature that fits the other folds' comparisons, so that none is judged by a
        temperature that has seen it. The last three are None where no temperature can be had.
    """
    margins = np.asarray(margins, float)
    result: dict[str, Any] = dict.fromkeys(("ece", "bins", "temperature", "ece_after", "loss_after"))
    result["ece"], result["bins"] = expected_calibration_error(margins, comparison)
    if len(np.unique(comparison)) < FEWEST:
        return result
    result["temperature"] = fit_temperature(margins, comparison)
    scaled = np.empty_like(margins)
    for fitted, judged in GroupKFold(FOLDS).split(margins, groups=comparison):
        temperature = fit_temperature(margins[fitted], comparison[fitted])
        if temperature is None:
            return result
        scaled[judged] = margins[judged] / temperature
    result["ece_after"] = expected_calibration_error(scaled, comparison)[0]
    result["loss_after"] = bradley_terry_loss(scaled, np.zeros_like(scaled), comparison)
    return result
