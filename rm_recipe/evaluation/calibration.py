"""Whether sigmoid(margin) is the probability that the chosen response is better, and what would make it so.

Under the Bradley-Terry model it is (InstructGPT, arXiv 2203.02155, section 3.5). A model that is sure and
wrong has margins that are too large; dividing all rewards by one temperature leaves every order as it is
and mends that.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from rm_recipe.evaluation.metrics import Indices, agreement, bradley_terry_loss, pair_weights

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
    index = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    bins, error = [], 0.0
    for number in np.unique(index):
        own = index == number
        confident = float(np.average(confidence[own], weights=weights[own]))
        accurate = float(np.average(right[own], weights=weights[own]))
        bins.append({"confidence": confident, "accuracy": accurate, "n": int(own.sum())})
        error += float(weights[own].sum() / weights.sum()) * abs(confident - accurate)
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
    ece, bins = expected_calibration_error(margins, comparison)
    result: dict[str, Any] = {
        "ece": ece,
        "bins": bins,
        "temperature": None,
        "ece_after": None,
        "loss_after": None,
    }
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
