"""What an evaluation says of a data set: a line for each comparison, and the figures that follow from them.

Files: `predictions.jsonl` has the lines, `evaluation.json` the figures.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rm_recipe.data.comparison import Array, agreement, mean_by_comparison, pair_indices, pairwise_agreement
from rm_recipe.data.dataset import Split
from rm_recipe.evaluation import metrics
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
    rows = split.comparisons.select_columns(["row", "subset", "ranks", "prompt", "reply_lengths"])
    flat, (better, worse, comparison) = np.concatenate(rewards).astype(float), pair_indices(rows["ranks"][:])
    margins = mean_by_comparison(flat[better] - flat[worse], comparison)
    right = mean_by_comparison(agreement(flat[better], flat[worse]), comparison)
    lines: list[Line] = [
        {
            "dataset": name,
            "index": index,
            "row": row["row"],
            "subset": row["subset"],
            "rewards": rewards[index].tolist(),
            "ranks": row["ranks"],
            "margin": float(margins[index]),
            "correct": float(right[index]),
            "tokens": [len(ids) for ids in encoded.conversations()],
            "response_tokens": row["reply_lengths"],
            "turns": sum(message["role"] == "user" for message in row["prompt"]),
        }
        for index, (row, encoded) in enumerate(zip(rows, split.encoded(), strict=True))
    ]
    order, nearest = (np.argsort(of, kind="stable").tolist() for of in (margins, np.abs(margins)))
    mistakes = [number for number in order if right[number] < 0.5][:SHOWN]
    close = [number for number in nearest if number not in mistakes][:SHOWN]
    for number in mistakes + close:
        shown, kind = split[number], "mistake" if number in mistakes else "close"
        lines[number] |= {"shown": kind, "text": {"prompt": shown.prompt, "responses": shown.responses}}
    return lines


def summarise(lines: Sequence[Line], **baselines: Array) -> dict[str, Any]:
    """The figures of comparisons that were scored, at least one.

    In accuracy, loss, margin, calibration and baselines each comparison weighs 1; ties, buckets of length
    difference, and the length figures count pairs.

    Args:
        lines: of `predictions`.
        baselines: beside the two of length, each one's scores of all responses end to end, `(responses,)`.
    """
    ranks = [line["ranks"] for line in lines]
    rewards = np.concatenate([line["rewards"] for line in lines])
    tokens = np.concatenate([line["response_tokens"] for line in lines])
    better, worse, comparison = pair_indices(ranks)
    margins, longer = rewards[better] - rewards[worse], tokens[better] - tokens[worse]
    right_pairs = agreement(rewards[better], rewards[worse])
    right = mean_by_comparison(right_pairs, comparison)
    rules = {"longer_wins": tokens, "shorter_wins": -tokens, **baselines}
    right_by = {name: pairwise_agreement(values, ranks) for name, values in rules.items()}
    prompt_tokens = [line["tokens"][0] - line["response_tokens"][0] for line in lines]
    ranking = None
    if max(map(len, ranks)) > 2:  # of two responses, all of it is the accuracy
        # Each pair weighs the same, so that long rankings weigh more, as in InstructGPT's figures.
        ranking = {"pairs": len(right_pairs), "pairwise_accuracy": float(right_pairs.mean())}
        ranking |= metrics.ranking_agreement([line["rewards"] for line in lines], ranks)
    accuracy = metrics.preference_accuracy(rewards[better], rewards[worse], comparison)
    return {
        "n_scored": accuracy.pop("n"),
        **accuracy,
        "mean_reward": float(rewards.mean()),
        "std_reward": float(rewards.std()),
        "ranking": ranking,
        "baselines": {name: float(by_rule.mean()) for name, by_rule in right_by.items()},
        "against_baselines": {
            name: metrics.paired_difference(right, by_rule) for name, by_rule in right_by.items()
        },
        "calibration": metrics.calibrate(margins, comparison),
        "length": {
            "spearman": metrics.rank_correlation(rewards, tokens),
            "spearman_margin": metrics.rank_correlation(margins, longer),
            "accuracy_chosen_longer": _mean(right_pairs[longer > 0]),
            "accuracy_chosen_shorter": _mean(right_pairs[longer < 0]),
        },
        "by": {
            "turns": metrics.accuracy_by_bucket([line["turns"] for line in lines], right),
            "length_difference": metrics.accuracy_by_bucket(longer, right_pairs),
            "prompt_tokens": metrics.accuracy_by_bucket(prompt_tokens, right),
        },
        "subsets": metrics.accuracy_by_subset([line["subset"] for line in lines], right),
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
    return read_json(folder / "evaluation.json", missing_ok=True)
