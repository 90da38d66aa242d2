"""Best-of-n: what choosing the best of n replies by one reward does to another; pure functions.

Gao, Schulman and Hilton (arXiv 2210.10760) optimise against a proxy reward model and measure with a gold one.
Best-of-n is the optimisation that needs no training: n replies are drawn from a policy and the one that the
proxy likes best is kept. How far that goes from the policy is known, `kl(n)`, so the curve foretells what a
policy that is trained against the proxy will meet.

Rewards are arrays `(prompts, N)`, N replies to each prompt.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln
from scipy.stats import bootstrap, rankdata

Array = NDArray[np.float64]

RESAMPLES = 2000
LATE = 4  # what becomes of a curve from N / 4 to N says whether it still rises
FITTED_POINTS = 24  # sizes n that the fit sees, evenly spaced in log n
FEWEST_POINTS = 3  # beside n = 1, that a curve with two parameters is fitted to
LEAST_SPREAD = 1e-6  # of rewards beside their size: below it they are all the same


def kl(n: ArrayLike) -> Array:
    """KL divergence of best-of-n from the policy, log n - (n - 1) / n, in nats (Gao et al., section 2).

    Where replies tie, as equal ones do, the divergence is smaller (arXiv 2401.01879): this is its bound.
    """
    n = np.asarray(n, float)
    return np.asarray(np.log(n) - (n - 1) / n)


def weights(replies: int) -> Array:
    """How often each of N replies, worst first, is the best one of a subset; `(N, N)`.

    Row n - 1 is for subsets of n replies: of the C(N, n) there are, C(i - 1, n - 1) have the i-th reply as
    their best. Each row sums to 1.
    """
    i, n = np.arange(1, replies + 1.0), np.arange(1, replies + 1.0)[:, None]

    def log_choose(of: Array, chosen: Array) -> Array:
        return np.asarray(gammaln(of + 1) - gammaln(chosen + 1) - gammaln(of - chosen + 1))

    possible = i >= n
    of = np.where(possible, i - 1, n - 1)
    chances = np.exp(log_choose(of, n - 1 + 0 * i) - log_choose(replies + 0 * n, n))
    return np.asarray(np.where(possible, chances, 0.0))


def best_of_n(proxy: ArrayLike, values: ArrayLike) -> Array:
    """The mean of `values` over the replies that the proxy likes best, for n = 1 ... N; `(prompts, N)`.

    The unbiased estimator over all subsets that Gao et al. use (Nakano et al., arXiv 2112.09332,
    appendix I): for each n the exact mean over all C(N, n) subsets of a prompt's replies of the value of the
    subset's best reply. Among replies that tie for the proxy each is as likely to be kept.

    Args:
        proxy: decides, `(prompts, N)`.
        values: of the same replies: the gold reward, or anything else, such as their length.
    """
    proxy, values = np.asarray(proxy, float), np.asarray(values, float)
    curve = weights(proxy.shape[1])
    return np.stack([curve @ _in_order(*pair) for pair in zip(proxy, values, strict=True)])


def _in_order(proxy: Array, values: Array) -> Array:
    """A prompt's values, those of the worst reply first; of replies that tie each has their mean."""
    place = rankdata(proxy, method="dense") - 1
    mean = np.bincount(place, values) / np.bincount(place)
    return np.asarray(mean[np.sort(place)])


def spread(rewards: ArrayLike) -> float:
    """Standard deviation of rewards within a prompt, over all prompts.

    Only differences between replies to the same prompt mean something, so this is the unit that makes
    two reward models comparable. 0 where each prompt's replies are rewarded alike.
    """
    rewards = np.asarray(rewards, float)
    within = float(np.sqrt(rewards.var(axis=1, ddof=1).mean()))
    return within if within > LEAST_SPREAD * max(float(np.abs(rewards).max()), 1e-30) else 0.0


def standardised(rewards: ArrayLike) -> Array:
    """Rewards in units of `spread`, each prompt's with mean 0; all 0 where there is no spread."""
    rewards = np.asarray(rewards, float)
    return np.asarray((rewards - rewards.mean(axis=1, keepdims=True)) / (spread(rewards) or np.inf))


def fit(n: ArrayLike, gains: ArrayLike) -> tuple[float, float]:
    """alpha and beta of R(d) = d (alpha - beta d), d = sqrt(KL), by least squares (Gao et al., section 1).

    Args:
        n: sizes, `(sizes,)`.
        gains: over n = 1, `(sizes,)`.
    """
    d = np.sqrt(kl(n))
    found = np.linalg.lstsq(np.stack([d, -(d**2)], axis=1), np.asarray(gains, float), rcond=None)[0]
    return float(found[0]), float(found[1])


@dataclass(frozen=True)
class Curve:
    """How a reward changes with n, in standard deviations within a prompt, and how surely.

    Attributes:
        gain: over the policy's mean, for n = 1 ... N.
        low, high: the 95 % interval of each gain; None for a single prompt.
        prompts: how many there are.
        late: gain at N minus gain at `late_from`, a quarter of N, fixed beforehand; `late_ci95` its interval.
            Above 0 the reward still rises, below 0 it falls. (The peak's gain minus that at N is above 0 by
            chance alone, and the fit falls wherever a curve only levels off.)
        peak: the n with the largest gain; of a curve that levels off, any late one by chance.
        peak_ci95: the interval of that n.
        alpha, beta: of the fit; None where there are too few sizes.
    """

    gain: Array
    low: Array | None
    high: Array | None
    prompts: int
    late_from: int
    late: float
    late_ci95: list[float] | None
    peak: int
    peak_ci95: list[int] | None
    alpha: float | None
    beta: float | None

    @property
    def fitted_peak(self) -> float | None:
        """sqrt(KL) at the top of the fitted curve, alpha / (2 beta); None where it has none."""
        if self.alpha is None or self.beta is None or self.alpha <= 0 or self.beta <= 0:
            return None
        return self.alpha / (2 * self.beta)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        ends = None
        if self.low is not None and self.high is not None:
            ends = np.stack([self.low, self.high], axis=1).tolist()
        return {
            "gain": self.gain.tolist(),
            "gain_ci95": ends,
            "late_change": {"from_n": self.late_from, "mean": self.late, "ci95": self.late_ci95},
            "peak_n": self.peak,
            "peak_n_ci95": self.peak_ci95,
            "fit": {"alpha": self.alpha, "beta": self.beta, "peak_sqrt_kl": self.fitted_peak},
        }


def curve(proxy: ArrayLike, values: ArrayLike) -> Curve:
    """What best-of-n by the proxy does to another reward (or to itself).

    Intervals are from a bootstrap over prompts (percentile, 2,000, seeded): other prompts might have been
    asked. Of fewer than about twenty they are too narrow. The unit, `spread`, is not drawn anew.

    Args:
        proxy, values: `(prompts, N)`, N at least 2.
    """
    each = best_of_n(proxy, standardised(values))
    each = each - each[:, :1]
    gain, replies = each.mean(axis=0), each.shape[1]
    start = max(replies // LATE, 1)
    late = mean_interval(each[:, -1] - each[:, start - 1])
    low = high = peaks = None
    if len(each) > 1:
        drawn = bootstrap(
            (each,), np.mean, n_resamples=RESAMPLES, batch=100, axis=0, method="percentile", rng=0
        )
        low, high = drawn.confidence_interval
        best = drawn.bootstrap_distribution.argmax(axis=0) + 1.0
        peaks = np.percentile(best, [2.5, 97.5]).round().astype(int).tolist()
    alpha = beta = None
    points = np.unique(np.geomspace(1, replies, FITTED_POINTS).round().astype(int))
    if len(points) > FEWEST_POINTS:
        alpha, beta = fit(points, gain[points - 1])
    return Curve(
        gain=gain, low=low, high=high, prompts=len(each),
        late_from=start, late=late["mean"], late_ci95=late["ci95"],
        peak=int(gain.argmax()) + 1, peak_ci95=peaks, alpha=alpha, beta=beta,
    )  # fmt: skip


def mean_interval(of_prompts: ArrayLike) -> dict[str, Any]:
    """`mean` over prompts of one number of each, and `ci95` from the same bootstrap; NaN counts for nothing.

    Returns:
        None for both where there is no number, None for the interval where there is one.
    """
    known = np.asarray(of_prompts, float)
    known = known[np.isfinite(known)]
    if not len(known):
        return {"mean": None, "ci95": None}
    ends = None
    if len(known) > 1:
        drawn = bootstrap((known,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=0)
        ends = [float(end) for end in drawn.confidence_interval]
    return {"mean": float(known.mean()), "ci95": ends}
