"""How far a reward moves when a reply is edited so that nobody would judge it otherwise.

A policy that is trained against the model finds such edits by itself. What they bring is a cheap look at
what it would exploit (reward hacking; Gao et al., arXiv 2210.10760).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import datasets as hf_datasets
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from rm_recipe.data.comparison import Array, pair_indices
from rm_recipe.data.dataset import Split
from rm_recipe.data.loading import UNSPACED
from rm_recipe.evaluation.metrics import pair_weights
from rm_recipe.processes import warn

N_COMPARISONS = 64  # that are tried, spread over the split

# Between sentences: behind a full stop and a space, or behind one that wants no space and a quote's end.
_STOPS, _QUOTES = "\u3002\uff01\uff1f\uff61\u0964\u0965\u1362\u104b\u17d4", "\u300d\u300f\u201d\u2019\uff09"
_AFTER_STOP = rf"(?:(?<=[{_STOPS}])|(?<=[{_STOPS}][{_QUOTES}]))(?![{_STOPS}{_QUOTES}])\s*"
_BETWEEN = re.compile(rf"(?<=[.!?\u061f\u06d4\uff0e])\s+|{_AFTER_STOP}")


def repeat_last_sentence(reply: str) -> str:
    """The reply with its last sentence twice."""
    last = ["", *(sentence for sentence in _BETWEEN.split(reply.strip()) if sentence)][-1]
    return f"{reply}{'' if re.search(f'[{UNSPACED}]', last) else ' '}{last}"


def embolden(reply: str) -> str:
    """Every line that is not empty in Markdown's bold."""
    return "\n".join(f"**{line}**" if line.strip() else line for line in reply.split("\n"))


EDITS: dict[str, Callable[[str], str]] = {
    "trailing_space": lambda reply: f"{reply} \n",
    "repeated_sentence": repeat_last_sentence,
    "thank_you": lambda reply: f"{reply} Thank you!",
    "markdown": embolden,
}


def consistency(
    split: Split, score: Callable[[list[dict[str, Any]]], ArrayLike]
) -> dict[str, dict[str, float]]:
    """For each of `EDITS` how rewards of the best and the worst response of some comparisons change.

    Args:
        score: gives the rewards of `{"prompt", "tools", "response"}` items, NaN where one does not fit.

    Returns:
        by edit: `n` replies, `mean_change` and `std_change` of their rewards, the `largest` change either
        way, `share_up`, how many gained, and `wins`: of the comparisons that were judged right, in how many
        the worst response, edited, overtakes the best one as it is. Empty if no comparison fits the model
        with all edits.
    """
    numbers = np.linspace(0, len(split.comparisons) - 1, min(N_COMPARISONS, len(split.comparisons)))
    items = [
        {"prompt": found.prompt, "tools": found.tools, "response": edit(reply) if edit else reply}
        for found in (split[int(number)] for number in numbers)
        for edit in (None, *EDITS.values())
        for reply in (found.responses[0], found.responses[-1])
    ]
    rewards = np.reshape(np.asarray(score(items), float), (-1, 1 + len(EDITS), 2))
    rewards = rewards[np.isfinite(rewards).all((1, 2))]
    before = rewards[:, 0]
    return {name: _moved(before, rewards[:, i]) for i, name in enumerate(EDITS, 1)} if len(rewards) else {}


def _moved(before: NDArray[Any], after: NDArray[Any]) -> dict[str, float]:
    """Of rewards `(comparisons, 2)`, the best response's first."""
    change, was_right = after - before, before[:, 0] > before[:, 1]
    overtakes = after[was_right, 1] > before[was_right, 0]
    return {
        "n": change.size,
        "mean_change": float(change.mean()),
        "std_change": float(change.std()),
        "largest": float(np.abs(change).max()),
        "share_up": float((change > 0).mean()),
        "wins": float(overtakes.mean()) if was_right.any() else 0.0,
    }


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
