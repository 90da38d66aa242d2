"""How far a reward moves when a reply is edited so that nobody would judge it otherwise.

A policy that is trained against the model finds such edits by itself. What they bring is a cheap look at
what it would exploit (reward hacking; Gao et al., arXiv 2210.10760).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets as hf_datasets
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import sem, t
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from rm_recipe.data.augmentation import Edit
from rm_recipe.data.comparison import Array, pair_indices
from rm_recipe.data.dataset import Split
from rm_recipe.data.loading import UNSPACED
from rm_recipe.evaluation.metrics import pair_weights
from rm_recipe.processes import warn

N_COMPARISONS = 400  # that are tried, spread over the split
SIGNIFICANT, POWER = 0.05, 0.8
STILL = 1e-6  # of a reward, what rounding moves


def consistency(
    split: Split, score: Callable[[list[dict[str, Any]]], ArrayLike], edits: Mapping[str, Edit]
) -> dict[str, dict[str, Any]]:
    """For each edit how rewards of the best and the worst response of some comparisons change.

    Args:
        score: gives the rewards of `{"prompt", "tools", "response"}` items, NaN where one does not fit.

    Returns:
        by edit what `changes` says; empty if fewer than two comparisons fit the model with all edits.
    """
    numbers = np.linspace(0, len(split.comparisons) - 1, min(N_COMPARISONS, len(split.comparisons)))
    items = [
        {"prompt": found.prompt, "tools": found.tools, "response": edit(reply) if edit else reply}
        for found in (split[int(number)] for number in numbers)
        for edit in (None, *edits.values())
        for reply in (found.responses[0], found.responses[-1])
    ]
    rewards = np.reshape(np.asarray(score(items), float), (-1, 1 + len(edits), 2))
    rewards = rewards[np.isfinite(rewards).all((1, 2))]
    return changes(rewards, list(edits)) if len(rewards) > 1 else {}


def changes(rewards: NDArray[Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How edits change rewards, and whether that is more than chance.

    Args:
        rewards: `(comparisons, 1 + edits, 2)`, first as they are, then by edit; the best response's first. At
            least two comparisons.

    Returns:
        by edit: `n` replies, `mean_change` and `std_change` of their rewards, `share_up`, how many gained,
        and `wins`: of the comparisons that were judged right, in how many the worst response, edited,
        overtakes the best one as it is. `p_value` is that of no mean change (a t-test over comparisons, with
        Bonferroni's correction for as many edits), `raises` whether it rises at `SIGNIFICANT`, and `smallest`
        the mean change that so many comparisons show four times in five.
    """
    before = rewards[:, :1]
    right, moved = before[:, 0, 0] > before[:, 0, 1], rewards[:, 1:] - before
    of_comparison, n = moved.mean(axis=2), len(moved)
    errors = sem(of_comparison)
    # At least what rounding moves: an edit that reaches no reward is still, one that moves all alike is not.
    p_values = 2 * t.sf(np.abs(of_comparison.mean(axis=0)) / np.maximum(errors, STILL), n - 1)
    p_values = np.minimum(p_values * len(names), 1)
    needed = t.isf(SIGNIFICANT / 2 / len(names), n - 1) + t.isf(1 - POWER, n - 1)
    found = {}
    for i, name in enumerate(names):
        change, mean = moved[:, i], float(moved[:, i].mean())
        overtakes = rewards[right, 1 + i, 1] > rewards[right, 0, 0]
        found[name] = {
            "n": change.size,
            "mean_change": mean,
            "std_change": float(change.std()),
            "share_up": float((change > 0).mean()),
            "wins": float(overtakes.mean()) if right.any() else 0.0,
            "p_value": float(p_values[i]),
            "raises": bool(mean > 0 and p_values[i] < SIGNIFICANT),
            "smallest": float(needed * errors[i]),
        }
    return found


# --- baselines: rules that a reward model has to beat ------------------------------------------

Scorer = Callable[[Sequence[str]], Array]

# Words of two letters or more; in a script without spaces every character.
_WORDS = f"[^\\W{UNSPACED}]{{2,}}|[{UNSPACED}]"


def bag_of_words(comparisons: hf_datasets.Dataset) -> Scorer | None:
    """A Bradley-Terry model that knows which words a response has, and nothing else.

    Logistic regression on the difference of the two responses' tf-idf vectors, without an intercept
    (scikit-learn). The prompt is the same on both sides, so it drops out.

    Args:
        comparisons: to learn from, with the columns `responses` and `ranks` (`dataset.Split`).

    Returns:
        what gives `(n,)` scores to n responses; None where no two responses share a word, or for one pair.
    """
    responses, ranks = comparisons["responses"][:], comparisons["ranks"][:]
    better, worse, owner = pair_indices(ranks)
    # Every other pair the other way round: the regression wants both outcomes.
    sides = np.where(np.arange(len(better)) % 2, 1, -1)
    # A word that stands in one response only has no second one to help with.
    words = TfidfVectorizer(token_pattern=_WORDS, min_df=2, sublinear_tf=True)
    regression = LogisticRegression(fit_intercept=False, max_iter=1000)
    try:
        vectors = words.fit_transform(response for own in responses for response in own)
        differences = (vectors[better] - vectors[worse]).multiply(sides[:, None]).tocsr()
        regression.fit(differences, sides, sample_weight=pair_weights(owner))
    except ValueError:
        warn("no bag-of-words baseline, as no two train responses share a word, or there is but one pair")
        return None
    return lambda texts: np.asarray(words.transform(texts) @ regression.coef_[0])
