"""`predictions.jsonl`: one line a comparison, and the text of those that a report shows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rm_recipe.data.dataset import Split
from rm_recipe.evaluation.metrics import Array, mean_by_comparison
from rm_recipe.evaluation.summary import Scored
from rm_recipe.files import read_json_lines, whole_file
from rm_recipe.redaction import redacted

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
