"""Best-of-n: what choosing the best of n replies by one reward does to another; pure functions.

Gao, Schulman and Hilton (arXiv 2210.10760) optimise against a proxy reward model and measure with a gold one.
Best-of-n is the optimisation that needs no training: n replies are drawn from a policy and the one that the
proxy likes best is kept. How far that goes from the policy is known, `kl(n)`, so the curve foretells what a
policy that is trained against the proxy will meet.

Rewards are arrays `(prompts, N)`, N replies to each prompt.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from rm_recipe.data.comparison import Array
from rm_recipe.evaluation.metrics import interval_of_mean

LATE = 4  # what becomes of a curve from N / 4 to N says whether it still rises
LEAST_SPREAD = 1e-6  # of rewards beside their size: below it they are all the same


def kl(n: NDArray[Any] | int) -> Array:
    """KL divergence of best-of-n from the policy, log n - (n - 1) / n, in nats (Gao et al., section 2).

    Where replies tie, as equal ones do, the divergence is smaller (arXiv 2401.01879): this is its bound.
    """
    return np.asarray(np.log(n) - (n - 1) / n)


def chances_of_best(replies: int) -> Array:
    """How often each of N replies, worst first, is the best one of a subset; `(N, N)`.

    Row n - 1 is for subsets of n replies: of the C(N, n) there are, C(i, n) hold none but the worst i, so
    C(i, n) - C(i - 1, n) have the i-th reply as their best. Each row sums to 1.
    """
    worst, drawn = np.arange(replies + 1.0), np.arange(float(replies))[:, None]
    # C(i, n) / C(N, n) is i / N (i - 1) / (N - 1) ...: the numbers of subsets themselves are huge.
    within_worst = np.cumprod(np.maximum(worst - drawn, 0) / (replies - drawn), axis=0)
    return np.diff(within_worst)


def best_of_n(proxy: Array, values: Array) -> Array:
    """The mean of `values` over the replies that the proxy likes best, for n = 1 ... N; `(prompts, N)`.

    The unbiased estimator over all subsets that Gao et al. use (Nakano et al., arXiv 2112.09332,
    appendix I): for each n the exact mean over all C(N, n) subsets of a prompt's replies of the value of the
    subset's best reply. Among replies that tie for the proxy each is as likely to be kept.

    Args:
        proxy: decides, `(prompts, N)`.
        values: of the same replies: the gold reward, or anything else, such as their length.
    """
    ordered = np.stack([_in_order(*pair) for pair in zip(proxy, values, strict=True)])
    return np.asarray(ordered @ chances_of_best(proxy.shape[1]).T)


def _in_order(proxy: Array, values: Array) -> Array:
    """A prompt's values, those of the worst reply first; of replies that tie each has their mean."""
    place = rankdata(proxy, method="dense") - 1
    return np.asarray((np.bincount(place, values) / np.bincount(place))[np.sort(place)])


def spread(rewards: Array) -> float:
    """Standard deviation of rewards within a prompt, over all prompts.

    Only differences between replies to the same prompt mean something, so this is the unit that makes
    two reward models comparable. 0 where each prompt's replies are rewarded alike.
    """
    within = float(np.sqrt(rewards.var(axis=1, ddof=1).mean()))
    return within if within > LEAST_SPREAD * max(float(np.abs(rewards).max()), 1e-30) else 0.0


def standardised(rewards: Array) -> Array:
    """Rewards in units of `spread`, each prompt's with mean 0; all 0 where there is no spread."""
    return np.asarray((rewards - rewards.mean(axis=1, keepdims=True)) / (spread(rewards) or np.inf))


def gain_curve(proxy: Array, values: Array) -> dict[str, Any]:
    """What best-of-n by the proxy does to another reward (or to itself), as JSON has it.

    Intervals are 95 %, from a bootstrap over prompts (percentile, 2,000, seeded): other prompts might have
    been asked. Of fewer than about twenty they are too narrow. The unit, `spread`, is not drawn anew.

    Args:
        proxy, values: `(prompts, N)`, both at least 2.

    Returns:
        `gain` over the policy's mean, for n = 1 ... N, in standard deviations within a prompt, and
        `gain_ci95`; `late_change`: the gain at N minus that at `from_n`, a quarter of N, fixed beforehand, as
        `mean` and `ci95`. Above 0 the reward still rises, below 0 it falls. (The peak's gain minus that at N
        is above 0 by chance alone.) `peak_n`: the n with the largest gain, of a curve that levels off any
        late one by chance.
    """
    each = best_of_n(proxy, standardised(values))
    each = each - each[:, :1]
    gain, start = each.mean(axis=0), max(each.shape[1] // LATE, 1)
    return {
        "gain": gain.tolist(),
        "gain_ci95": interval_of_mean(each),
        "late_change": {"from_n": start, **mean_interval(each[:, -1] - each[:, start - 1])},
        "peak_n": int(gain.argmax()) + 1,
    }


def mean_interval(values: Array) -> dict[str, Any]:
    """`mean` over prompts of one number of each, and `ci95` from the same bootstrap; None where too few."""
    return {"mean": float(values.mean()) if len(values) else None, "ci95": interval_of_mean(values)}
