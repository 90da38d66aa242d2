"""What a rule that does not read reaches on the same comparisons; a reward model has to beat it."""

from collections.abc import Callable, Sequence

import datasets as hf_datasets
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from rm_recipe.evaluation.metrics import Array, pair_indices, pair_weights

Scorer = Callable[[Sequence[str]], Array]


def bag_of_words(comparisons: hf_datasets.Dataset) -> Scorer | None:
    """A Bradley-Terry model that knows which words a response has, and nothing else.

    Logistic regression on the difference of the two responses' tf-idf vectors, without an intercept
    (scikit-learn). The prompt is the same on both sides, so it drops out.

    Args:
        comparisons: to learn from, with the columns `responses` and `ranks` (`split.Split`).

    Returns:
        what gives `(n,)` scores to n responses; None where no two responses share a word.
    """
    responses, ranks = comparisons["responses"][:], comparisons["ranks"][:]
    # A word that stands in one response only has no second one to help with.
    words = TfidfVectorizer(min_df=2, sublinear_tf=True)
    try:
        vectors = words.fit_transform(response for own in responses for response in own)
    except ValueError:  # no word is left
        return None
    better, worse, owner = pair_indices(ranks)
    # Every other pair the other way round: the regression wants both outcomes.
    sides = np.where(np.arange(len(better)) % 2, 1, -1)
    differences = (vectors[better] - vectors[worse]).multiply(sides[:, None]).tocsr()
    regression = LogisticRegression(fit_intercept=False, max_iter=1000)
    if len(sides) < 2:
        return None
    regression.fit(differences, sides, sample_weight=pair_weights(owner))
    return lambda texts: np.asarray(words.transform(texts) @ regression.coef_[0])
