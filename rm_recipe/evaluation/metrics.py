"""How well rewards agree with preferences: pure functions, and `PreferenceAccuracy` on top.

Everywhere `chosen` and `rejected` are the rewards of the two responses of each pair, arrays of
shape `(pairs,)`, and the margin is `chosen - rejected`. A comparison of two responses is one pair,
one of K gives up to K choose 2 (`pair_indices`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau
from statsmodels.stats.proportion import proportion_confint

from rm_recipe.data.formats import untied_pairs

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


def pair_weights(comparison: Indices) -> Array:
    """1 over the number of pairs of the comparison that each pair belongs to; `(pairs,)`."""
    return np.asarray(1 / np.bincount(comparison)[comparison])


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


def best_of_k(rewards: ArrayLike, ranks: Sequence[Sequence[int]]) -> Array:
    """For each comparison whether its highest reward is that of a best response; `(comparisons,)`.

    What best-of-K sampling does with the reward model. Where several responses share the highest reward it
    is the share of best ones among them: the chance of a draw.

    Args:
        rewards: of all responses end to end, `(responses,)`.
    """
    return np.array(
        [(own[values == values.max()] == own.min()).mean() for values, own in _each(rewards, ranks)]
    )


def kendall_tau(rewards: ArrayLike, ranks: Sequence[Sequence[int]]) -> Array:
    """Kendall's tau-b of rewards and ranks in each comparison, between -1 and 1; `(comparisons,)`.

    Pairs in agreement minus pairs in disagreement, over the geometric mean of the pairs that are untied on
    either side (Kendall 1945; `scipy.stats.kendalltau`). 0 where all rewards are equal.
    """
    taus = [kendalltau(values, -own).statistic for values, own in _each(rewards, ranks)]
    return np.nan_to_num(taus)


def _each(values: ArrayLike, ranks: Sequence[Sequence[int]]) -> Iterator[tuple[Array, Indices]]:
    """The values and the ranks of each comparison, from values that are laid end to end."""
    ends = np.cumsum([len(own) for own in ranks])[:-1]
    for own_values, own_ranks in zip(np.split(np.asarray(values, float), ends), ranks, strict=True):
        yield own_values, np.asarray(own_ranks)


class PreferenceAccuracy(evaluate.Metric):
    """Share of comparisons whose chosen response has the higher reward.

    Each comparison weighs 1, of a ranking each untied pair the same part of it, and a tie counts
    1/2. Nothing is excluded: a reward that is not finite raises. Use it like any `evaluate` metric,
    offline, since it comes from this package and not from the Hub::

        PreferenceAccuracy().compute(chosen=[1.0, 0.5], rejected=[0.0, 0.5])
        # accuracy 0.75, accuracy_ci95, ties 1, n 2, loss 0.503, mean_margin 0.5
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
        """`{"accuracy", "accuracy_ci95", "ties", "n", "loss", "mean_margin"}`; only ties count pairs.

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
        if comparison is None:
            comparison = np.arange(chosen.size)
        right = mean_by_comparison(agreement(chosen, rejected), comparison)
        accuracy = float(right.mean())
        return {
            "accuracy": accuracy,
            "accuracy_ci95": accuracy_interval(accuracy, right.size),
            "ties": int((chosen == rejected).sum()),
            "n": int(right.size),
            "loss": bradley_terry_loss(chosen, rejected, comparison),
            "mean_margin": float(mean_by_comparison(chosen - rejected, comparison).mean()),
        }


class RankingAgreement(evaluate.Metric):
    """How well rewards order the K responses of each comparison.

    Nothing is excluded; a reward that is not finite raises::

        RankingAgreement().compute(rewards=[[3.0, 1.0, 2.0]], ranks=[[0, 1, 2]])
        # pairs 3, pairwise_accuracy 0.667, best_of_k 1, kendall_tau 0.333, n 1
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Pairwise accuracy, best-of-K accuracy and Kendall's tau of rankings.",
            citation="",
            inputs_description="rewards: K for each comparison; ranks: of the same responses, 0 for the best",
            features=datasets.Features(
                {
                    "rewards": datasets.Sequence(datasets.Value("float64")),
                    "ranks": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, rewards: Sequence[ArrayLike], ranks: Sequence[Sequence[int]]) -> dict[str, Any]:
        """`{"pairs", "pairwise_accuracy", "best_of_k", "kendall_tau", "n"}`.

        In pairwise accuracy each untied pair weighs the same, so that long rankings weigh more (as in
        InstructGPT's figures); in the others each comparison does.

        Raises:
            ValueError: no comparison, as many ranks as rewards are not there, or a reward is not finite.
        """
        if not len(ranks) or [np.size(values) for values in rewards] != [len(own) for own in ranks]:
            raise ValueError("expected at least one comparison, and a rank for every reward")
        flat = np.concatenate([np.asarray(values, float) for values in rewards])
        if not np.isfinite(flat).all():
            raise ValueError("a reward is not finite")
        better, worse, _ = pair_indices(ranks)
        return {
            "pairs": len(better),
            "pairwise_accuracy": float(agreement(flat[better], flat[worse]).mean()),
            "best_of_k": float(best_of_k(flat, ranks).mean()),
            "kendall_tau": float(kendall_tau(flat, ranks).mean()),
            "n": len(ranks),
        }
