"""What an evaluation says of a data set: a line for each comparison, and the figures that follow from them.

Files: `predictions.jsonl` has the lines, `evaluation.json` the figures.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rm_recipe.data.comparison import (
    Array,
    Indices,
    agreement,
    mean_by_comparison,
    pair_indices,
    pairwise_agreement,
    untied_pairs,
)
from rm_recipe.data.dataset import Split
from rm_recipe.evaluation.metrics import (
    accuracy_by_bucket,
    accuracy_by_subset,
    calibrate,
    paired_difference,
    preference_accuracy,
    rank_correlation,
    ranking_agreement,
)
from rm_recipe.files import read_json, read_json_lines, redacted, whole_file

PREDICTIONS = "predictions.jsonl"
SHOWN = 10  # of each kind

Line = dict[str, Any]


def predictions(name: str, split: Split, rewards: Sequence[NDArray[np.float32]]) -> list[Line]:
    """The lines of a tokenised data set's comparisons, as JSON has them.

    `row` is the comparison's place in its source, `margin` and `correct` are means over its untied pairs.
    `shown` stands on the `SHOWN` most confident mistakes (`mistake`) and on the closest of the others
    (`close`); these alone carry their `text`.

    Args:
        rewards: `(K,)` for each comparison.
    """
    lines: list[Line] = []
    rows = split.comparisons.select_columns(["row", "subset", "ranks", "prompt"])
    for index, (row, encoded, own) in enumerate(zip(rows, split.encoded(), rewards, strict=True)):
        values = own.astype(float)
        margins = [values[better] - values[worse] for better, worse in untied_pairs(row["ranks"])]
        lines.append(
            {
                "dataset": name,
                "index": index,
                "row": row["row"],
                "subset": row["subset"],
                "rewards": values.tolist(),
                "ranks": row["ranks"],
                "margin": float(np.mean(margins)),
                "correct": float(agreement(margins, np.zeros(len(margins))).mean()),
                "tokens": [len(ids) for ids in encoded.conversations()],
                "response_tokens": [len(rest) for rest in encoded.suffixes],
                "turns": sum(message["role"] == "user" for message in row["prompt"]),
            }
        )
    for kind, indices in examples(lines).items():
        for index in indices:
            comparison = split[index]
            text = {"prompt": comparison.prompt, "responses": comparison.responses}
            lines[index] |= {"shown": kind, "text": text}
    return lines


def examples(lines: Sequence[Line]) -> dict[str, list[int]]:
    """Numbers of the most confident mistakes, worst first, and of the closest of the other comparisons."""
    order = sorted(range(len(lines)), key=lambda i: lines[i]["margin"])
    mistakes = [i for i in order if lines[i]["correct"] < 0.5][:SHOWN]
    nearest = sorted(range(len(lines)), key=lambda i: abs(lines[i]["margin"]))
    return {"mistake": mistakes, "close": [i for i in nearest if i not in mistakes][:SHOWN]}


def summarise(lines: Sequence[Line], bag_of_words: ArrayLike | None = None) -> dict[str, Any]:
    """The figures of comparisons that were scored, at least one.

    In accuracy, loss, margin, calibration and baselines each comparison weighs 1; ties, buckets of margin or
    length difference, and the length figures count pairs.

    Args:
        lines: of `predictions`.
        bag_of_words: scores of all responses end to end by that baseline, `(responses,)`.
    """
    ranks = [line["ranks"] for line in lines]
    rewards = np.concatenate([line["rewards"] for line in lines])
    tokens = np.concatenate([line["response_tokens"] for line in lines])
    better, worse, comparison = pair_indices(ranks)
    margins, longer = rewards[better] - rewards[worse], tokens[better] - tokens[worse]
    right_pairs = agreement(rewards[better], rewards[worse])
    right = mean_by_comparison(right_pairs, comparison)
    prompt_tokens = [line["tokens"][0] - line["response_tokens"][0] for line in lines]
    accuracy = preference_accuracy(rewards[better], rewards[worse], comparison)
    del accuracy["n"]
    return {
        **accuracy,
        "mean_reward": float(rewards.mean()),
        "std_reward": float(rewards.std()),
        # Of two responses, all of it is the accuracy.
        "ranking": ranking_agreement([line["rewards"] for line in lines], ranks)
        if max(map(len, ranks)) > 2
        else None,
        **_baselines(right, tokens, ranks, bag_of_words),
        "calibration": calibrate(margins, comparison),
        "length": {
            "spearman": rank_correlation(rewards, tokens),
            "spearman_margin": rank_correlation(margins, longer),
            "accuracy_chosen_longer": _mean(right_pairs[longer > 0]),
            "accuracy_chosen_shorter": _mean(right_pairs[longer < 0]),
        },
        "by": {
            "turns": accuracy_by_bucket([line["turns"] for line in lines], right),
            "length_difference": accuracy_by_bucket(longer, right_pairs),
            "prompt_tokens": accuracy_by_bucket(prompt_tokens, right),
            "margin": accuracy_by_bucket(np.abs(margins), right_pairs),
        },
        "subsets": accuracy_by_subset([line["subset"] for line in lines], right),
    }


def _baselines(
    right: Array, tokens: Indices, ranks: list[list[int]], bag_of_words: ArrayLike | None
) -> dict[str, Any]:
    """How often simple rules are right, and how far the model is ahead of each."""
    rules: dict[str, ArrayLike] = {"longer_wins": tokens, "shorter_wins": -tokens}
    if bag_of_words is not None:
        rules["bag_of_words"] = bag_of_words
    right_by = {name: pairwise_agreement(values, ranks) for name, values in rules.items()}
    against = {name: paired_difference(right, by_rule) for name, by_rule in right_by.items()}
    best = against[max(right_by, key=lambda name: float(right_by[name].mean()))]
    return {
        "baselines": {name: float(by_rule.mean()) for name, by_rule in right_by.items()},
        "against_baselines": against,
        "beats_baselines": bool(best["ci95"] and best["ci95"][0] > 0),
    }


def _mean(values: Array) -> float | None:
    return float(values.mean()) if len(values) else None


# --- the files ---------------------------------------------------------------------------------


def read_predictions(folder: Path) -> list[Line]:
    """The lines of a folder's `predictions.jsonl`; empty if there is none."""
    path = folder / PREDICTIONS
    return read_json_lines(path) if path.is_file() else []


def write_predictions(folder: Path, lines: Sequence[Line]) -> None:
    """Replace the lines of the data sets that `lines` are of, redacted, and keep the others'."""
    lines = redacted(lines)
    replaced = {line["dataset"] for line in lines}
    kept = [line for line in read_predictions(folder) if line["dataset"] not in replaced]
    with whole_file(folder / PREDICTIONS) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in [*kept, *lines])


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The content of a folder's `evaluation.json`; empty if there is none."""
    path = folder / "evaluation.json"
    return read_json(path) if path.is_file() else {}
