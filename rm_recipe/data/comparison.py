"""What a comparison is, as texts and as tokens, and the pairs that its ranks make."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rm_recipe.data.messages import Message, conversation


@dataclass(frozen=True)
class Encoded:
    """One tokenised comparison: K whole conversations, split at their common prefix.

    Attributes:
        prefix: the tokens that all K conversations start with.
        rests: for each response the tokens after the prefix, at least one each.
    """

    prefix: list[int]
    rests: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens that the comparison takes in a row."""
        return len(self.prefix) + sum(map(len, self.rests))

    def conversations(self) -> list[list[int]]:
        """Return the K whole conversations, as they are served."""
        return [self.prefix + rest for rest in self.rests]


def split_at_common_prefix(conversations: Sequence[Sequence[int]]) -> Encoded:
    """Split K tokenised conversations at their longest common token prefix.

    The prefix is shortened where a conversation would be left without a token of its own, which
    is where its reward is read.
    """
    shortest = min(conversations, key=len)
    longest_prefix = len(shortest) - 1
    end = 0
    while end < longest_prefix and all(ids[end] == shortest[end] for ids in conversations):
        end += 1
    return Encoded(list(shortest[:end]), [list(ids[end:]) for ids in conversations])


@dataclass(frozen=True)
class Comparison:
    """One prompt and its responses, best first (InstructGPT, arXiv 2203.02155, section 3.5).

    Attributes:
        prompt: the messages before the response.
        responses: texts of the assistant's reply, K >= 2, best first.
        ranks: K ranks, 0 for the best, not decreasing; equal ones are ties. Strictly increasing
            unless given.
        margins: how much better the first of each of `untied_pairs(ranks)` is (Llama 2, arXiv 2307.09288,
            section 3.2.2); empty where nothing is known.
        subset: the part of the data set that the row comes from.
    """

    prompt: list[Message]
    responses: list[str]
    ranks: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    subset: str = ""

    def __post_init__(self) -> None:
        if not self.ranks:
            self.ranks.extend(range(len(self.responses)))

    def conversations(self) -> list[list[Message]]:
        """Return the K whole conversations, each ending in its response."""
        return [conversation(self.prompt, response) for response in self.responses]


def untied_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """List the pairs (better, worse) of K ranks, best first: K choose 2 of them without ties."""
    k = len(ranks)
    return [(i, j) for i in range(k) for j in range(i + 1, k) if ranks[i] < ranks[j]]


Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def agreement(chosen: ArrayLike, rejected: ArrayLike) -> Array:
    """Score each pair: 1 where chosen got the higher reward, 1/2 at a tie, 0 otherwise; `(n,)`.

    A tie says nothing about the preference, so counting it as a win (trl PR 1012) or as a loss
    (trl's `eval_accuracy`) would both be wrong.
    """
    margin = np.asarray(chosen, float) - np.asarray(rejected, float)
    return np.asarray((np.sign(margin) + 1) / 2)


def pair_indices(ranks: Sequence[Sequence[int]]) -> tuple[Indices, Indices, Indices]:
    """Number the untied pairs of comparisons whose responses are laid end to end, best first.

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
    """Average over each comparison's pairs, so that each comparison weighs 1; `(comparisons,)`.

    InstructGPT (arXiv 2203.02155, equation 1) divides by K choose 2 for the same reason.
    """
    return np.asarray(np.bincount(comparison, np.asarray(values, float)) / np.bincount(comparison))


def pairwise_agreement(values: ArrayLike, ranks: Sequence[Sequence[int]]) -> Array:
    """Compute for each comparison the share of its untied pairs that `values` order as its ranks do.

    Args:
        values: of all responses end to end, `(responses,)`: rewards, or lengths for a baseline.
            Equal ones count 1/2.

    Returns:
        `(comparisons,)`
    """
    values = np.asarray(values, float)
    better, worse, comparison = pair_indices(ranks)
    return mean_by_comparison(agreement(values[better], values[worse]), comparison)
