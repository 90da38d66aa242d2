"""Two judges of the same comparisons: which one is right more often, and is that more than chance."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar

RESAMPLES = 2000
EXACT_BELOW = 100  # comparisons on which the two differ; above, the binomial's normal form is as good


def paired_difference(this: ArrayLike, other: ArrayLike) -> dict[str, Any]:
    """How much more often one judge is right than another one, on the same comparisons.

    Both saw the same comparisons, hard ones and easy ones alike, so the difference is known better than
    either accuracy: two intervals that overlap may hide a difference that is certain.

    Args:
        this, other: how right each is on each comparison, 0 to 1, a tie 1/2; `(comparisons,)`.

    Returns:
        `difference` of the accuracies; `ci95`, its 95 % interval from a bootstrap over comparisons
        (percentile, seeded; `scipy.stats.bootstrap`; None for fewer than two); `only_this` and `only_other`,
        on how many comparisons one is more right than the other; `p_value` of McNemar's test that both are
        equally likely (McNemar 1947; `statsmodels`).
    """
    differences = np.asarray(this, float) - np.asarray(other, float)
    only_this, only_other = int((differences > 0).sum()), int((differences < 0).sum())
    interval = None
    if len(differences) > 1:
        drawn = bootstrap(
            (differences,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=0
        )
        interval = [float(end) for end in drawn.confidence_interval]
    exact = only_this + only_other < EXACT_BELOW
    # Only the cells in which the two differ enter.
    test = mcnemar([[0, only_this], [only_other, 0]], exact=exact)
    return {
        "difference": float(differences.mean()),
        "ci95": interval,
        "only_this": only_this,
        "only_other": only_other,
        "p_value": float(test.pvalue) if only_this + only_other else 1.0,
    }
