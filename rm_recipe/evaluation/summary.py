"""The figures that `evaluation.json` has for a data set, from the rewards of its comparisons."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rm_recipe.data.comparison import (
    Array,
    Indices,
    agreement,
    mean_by_comparison,
    pair_indices,
    pairwise_agreement,
)
from rm_recipe.data.dataset import Split
from rm_recipe.evaluation import metrics
from rm_recipe.evaluation.metrics import (
    accuracy_by_bucket,
    accuracy_by_subset,
    calibrate,
    paired_difference,
    rank_correlation,
)
from rm_recipe.files import read_json, read_json_lines, redacted, whole_file


@dataclass(frozen=True)
class Scored:
    """Comparisons with the rewards of their responses, which are laid end to end, best first.

    Attributes:
        rewards: `(responses,)`
        response_tokens: `(responses,)`, without those that all responses of the comparison begin with.
        ranks: K for each comparison, 0 for the best.
        prompt_tokens: `(comparisons,)`, as scored.
        turns: questions in the prompt, `(comparisons,)`.
        subsets: their names, `(comparisons,)`.
    """

    rewards: Array
    response_tokens: Indices
    ranks: Sequence[Sequence[int]]
    prompt_tokens: Indices
    turns: Indices
    subsets: list[str]

    @classmethod
    def of(cls, split: Split, rewards: Sequence[NDArray[np.float32]]) -> "Scored":
        """A tokenised split with the rewards `(K,)` of each of its comparisons."""
        encoded, rows = split.encoded(), split.comparisons
        return cls(
            np.concatenate(rewards).astype(float),
            np.array([len(rest) for comparison in encoded for rest in comparison.rests]),
            rows["ranks"][:],
            np.array([len(comparison.prefix) for comparison in encoded]),
            np.array([sum(m["role"] == "user" for m in prompt) for prompt in rows["prompt"][:]]),
            rows["subset"][:],
        )

    @cached_property
    def pairs(self) -> tuple[Indices, Indices, Indices]:
        """`metrics.pair_indices`: better, worse, comparison."""
        return pair_indices(self.ranks)

    @cached_property
    def margins(self) -> Array:
        """Reward of the better response minus that of the worse one; `(pairs,)`."""
        return self.rewards[self.pairs[0]] - self.rewards[self.pairs[1]]

    @cached_property
    def length_differences(self) -> Indices:
        """Tokens of the better response minus those of the worse one; `(pairs,)`."""
        return self.response_tokens[self.pairs[0]] - self.response_tokens[self.pairs[1]]

    @cached_property
    def right_pairs(self) -> Array:
        """1, 0, or 1/2 for equal rewards; `(pairs,)`."""
        return agreement(self.margins, np.zeros_like(self.margins))

    @cached_property
    def right(self) -> Array:
        """The mean of `right_pairs` over each comparison; `(comparisons,)`."""
        return mean_by_comparison(self.right_pairs, self.pairs[2])

    def by_comparison(self, flat: NDArray[Any]) -> list[NDArray[Any]]:
        """Values `(responses,)` as one array `(K,)` for each comparison."""
        return np.split(flat, np.cumsum([len(own) for own in self.ranks])[:-1])


def summarise(scored: Scored, rules: Mapping[str, Array]) -> dict[str, Any]:
    """The figures of comparisons that were scored, at least one.

    In accuracy, loss, margin, calibration and baselines each comparison weighs 1; ties, buckets of margin or
    length difference, and the length figures count pairs.

    Args:
        rules: for each baseline the value that it gives to each response, `(responses,)`.
    """
    better, worse, comparison = scored.pairs
    result = metrics.PreferenceAccuracy().compute(
        chosen=scored.rewards[better], rejected=scored.rewards[worse], comparison=comparison
    )
    right_by = {name: pairwise_agreement(values, scored.ranks) for name, values in rules.items()}
    differences = {name: paired_difference(scored.right, right) for name, right in right_by.items()}
    best = max(right_by, key=lambda name: float(right_by[name].mean()))
    return {
        **{key: result[key] for key in ("accuracy", "accuracy_ci95", "ties", "loss", "mean_margin")},
        "mean_reward": float(scored.rewards.mean()),
        "std_reward": float(scored.rewards.std()),
        "ranking": _ranking(scored),
        "baselines": {name: float(right.mean()) for name, right in right_by.items()},
        "against_baselines": differences,
        "beats_baselines": bool(differences[best]["ci95"] and differences[best]["ci95"][0] > 0),
        "calibration": calibrate(scored.margins, comparison),
        "length": _length(scored),
        "by": {
            "turns": accuracy_by_bucket(scored.turns, scored.right),
            "length_difference": accuracy_by_bucket(scored.length_differences, scored.right_pairs),
            "prompt_tokens": accuracy_by_bucket(scored.prompt_tokens, scored.right),
            "margin": accuracy_by_bucket(np.abs(scored.margins), scored.right_pairs),
        },
        "subsets": accuracy_by_subset(scored.subsets, scored.right),
    }


def _ranking(scored: Scored) -> dict[str, Any] | None:
    """Only where a comparison has more than two responses: of two, all of it is the accuracy."""
    if max(map(len, scored.ranks)) == 2:
        return None
    found = metrics.RankingAgreement().compute(
        rewards=scored.by_comparison(scored.rewards), ranks=scored.ranks
    )
    return {key: found[key] for key in ("pairs", "pairwise_accuracy", "best_of_k", "kendall_tau")}


def _length(scored: Scored) -> dict[str, float | None]:
    longer, shorter = scored.length_differences > 0, scored.length_differences < 0
    return {
        "spearman": rank_correlation(scored.rewards, scored.response_tokens),
        "spearman_margin": rank_correlation(scored.margins, scored.length_differences),
        "accuracy_chosen_longer": float(scored.right_pairs[longer].mean()) if longer.any() else None,
        "accuracy_chosen_shorter": float(scored.right_pairs[shorter].mean()) if shorter.any() else None,
    }


# --- `predictions.jsonl`: one line a comparison ------------------------------------------------

PREDICTIONS = "predictions.jsonl"
SHOWN = 10  # of each kind


def predictions(name: str, split: Split, scored: Scored) -> list[dict[str, Any]]:
    """The lines of a data set's scored comparisons, as JSON has them.

    `row` is the comparison's place in its source, `margin` and `correct` are means over its untied pairs.
    `shown` stands on the `SHOWN` most confident mistakes (`mistake`) and on the closest of the others
    (`close`); these alone carry their `text`.
    """
    margins = mean_by_comparison(scored.margins, scored.pairs[2])
    rewards = scored.by_comparison(scored.rewards)
    lengths = scored.by_comparison(scored.response_tokens)
    rows, subsets = split.column("row"), scored.subsets
    lines: list[dict[str, Any]] = [
        {
            "dataset": name,
            "index": index,
            "row": int(rows[index]),
            "subset": subsets[index],
            "rewards": rewards[index].tolist(),
            "ranks": list(scored.ranks[index]),
            "margin": float(margins[index]),
            "correct": float(scored.right[index]),
            "tokens": [int(scored.prompt_tokens[index] + length) for length in lengths[index]],
            "response_tokens": lengths[index].tolist(),
            "turns": int(scored.turns[index]),
        }
        for index in range(len(rewards))
    ]
    for kind, indices in examples(margins, scored.right).items():
        for index in indices:
            comparison = split[index]
            text = {"prompt": comparison.prompt, "responses": comparison.responses}
            lines[index] |= {"shown": kind, "text": text}
    return lines


def examples(margins: Array, right: Array) -> dict[str, list[int]]:
    """Numbers of the most confident mistakes, worst first, and of the closest of the other comparisons."""
    mistakes = [int(i) for i in np.argsort(margins, kind="stable") if right[i] < 0.5][:SHOWN]
    nearest = (int(i) for i in np.argsort(np.abs(margins), kind="stable"))
    close = [i for i in nearest if i not in mistakes][:SHOWN]
    return {"mistake": mistakes, "close": close}


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's `predictions.jsonl`; empty if there is none."""
    path = folder / PREDICTIONS
    return read_json_lines(path) if path.is_file() else []


def write_predictions(folder: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Replaces the lines of the data sets that `lines` are of, redacted, and keeps the others'."""
    lines = redacted(lines)
    replaced = {line["dataset"] for line in lines}
    kept = [line for line in read_predictions(folder) if line["dataset"] not in replaced]
    with whole_file(folder / PREDICTIONS) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in [*kept, *lines])


# --- evaluation.json -------------------------------------------------------------------------


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The content of a folder's `evaluation.json`; empty if there is none."""
    path = folder / "evaluation.json"
    return read_json(path) if path.is_file() else {}
