"""Held-out preference accuracy that can be believed.

    rm-recipe evaluate outputs/smollm2_offline [--dataset NAME_OR_PATH ...] [--against OTHER_MODEL]

scores the comparisons that the run's recipe holds out (or other data sets) and writes `evaluation.json`,
`predictions.jsonl` and `report.html`.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from transformers.utils import cached_file

from rm_recipe.data.comparison import Encoded
from rm_recipe.data.dataset import Split, arrow_column
from rm_recipe.data.loading import read_name
from rm_recipe.data.splits import changed_data, check_held_out, load_held_out_split, load_split, load_splits
from rm_recipe.data.tokenization import tokenize
from rm_recipe.errors import DataError, RecipeError, TrainingError, one_line
from rm_recipe.evaluation.findings import HELD_OUT, gate
from rm_recipe.evaluation.metrics import paired_difference
from rm_recipe.evaluation.probes import Scorer, bag_of_words, consistency
from rm_recipe.evaluation.report import write_report
from rm_recipe.evaluation.summary import (
    PREDICTIONS,
    Line,
    predictions,
    read_evaluation,
    summarise,
    write_predictions,
)
from rm_recipe.files import sha256, write_json
from rm_recipe.model.source import adapter_config
from rm_recipe.processes import each_once, main_process_first, processes, say
from rm_recipe.recipe.reader import Recipe, is_run_folder, read_run_recipe
from rm_recipe.recipe.schema import DataArguments
from rm_recipe.scoring import RewardModel, find_model

FAULTY_NAMED = 5  # comparisons without a finite reward, in the message


def evaluate(
    target: str,
    datasets: list[str] | None = None,
    output: Path | None = None,
    against: str | None = None,
) -> dict[str, Any]:
    """Score a model's held-out comparisons, or those of other data sets, and write the result.

    Several processes share the comparisons, each scored exactly once; the main one computes the figures and
    writes `evaluation.json`, `predictions.jsonl` and `report.html`.

    Args:
        target: a run folder, an export or a one-label model.
        datasets: names or paths; by default the held-out split of the run's recipe.
        output: where the result goes; by default into the run or model.
        against: another such model, to be compared on the same comparisons.

    Returns:
        the content of `evaluation.json`: what was there before, with the new data sets in it.

    Raises:
        RecipeError: a model cannot be evaluated.
        DataError: a data set cannot be read.
        TrainingError: a reward is not a finite number; nothing is written.
    """
    recipe = recipe_of(Path(target))
    names = list(dict.fromkeys(datasets or [HELD_OUT]))
    output = _output_folder(target, recipe, names, output)
    weights = weights_of(target)
    before = _earlier_evaluation(output, target, weights, names)
    splits = {name: _load(name, recipe) for name in names}
    scored = _score(target, splits, with_edits=True)
    other = _score(against, splits) if against else {}
    content = None
    if processes().is_main_process:
        train = _train_split(recipe)
        words = bag_of_words(train.comparisons) if train else None
        results = {name: _figures(splits[name], *scored[name], train, words) for name in names}
        for name, (_, lines, _) in other.items():
            results[name]["against"] = {"model": against, **_compare(scored[name][1], lines)}
        content = _merge(before, target, recipe, results, weights)
        if not before:
            (output / PREDICTIONS).unlink(missing_ok=True)
        write_predictions(output, [line for name in names for line in scored[name][1].values()])
        write_json(output / "evaluation.json", content)
        write_report(output)
    return broadcast_object_list([content])[0]


# --- what is evaluated, and where the result goes ----------------------------------------------


def _output_folder(target: str, recipe: Recipe | None, names: list[str], output: Path | None) -> Path:
    """The folder that the result goes into; raises RecipeError where the arguments do not fit."""
    if recipe is None and HELD_OUT in names:
        raise RecipeError(f"{target} has no recipe, so it has no held-out split; name one with --dataset")
    folder, reason = output or Path(target), None
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if output is None and not folder.is_dir():
        reason = "is not a local folder"
    elif (folder / "proof.json").is_file():
        reason = "is an export, which stays as it was verified"
    elif not there.is_dir():
        reason = "is a file or lies in one"
    elif not os.access(there, os.W_OK):  # known before an hour of scoring
        reason = "cannot be written to"
    if reason:
        raise RecipeError(f"{folder} {reason}; say with --output where the result goes")
    return folder


def check_gate(target: str, names: Sequence[str]) -> None:
    """Raises RecipeError where an evaluation of these data sets cannot pass or fail the gate."""
    if recipe_of(Path(target)) is None or HELD_OUT not in names:
        raise RecipeError("--gate judges the held-out split of a run's recipe, which is not evaluated here")


def recipe_of(folder: Path) -> Recipe | None:
    """The recipe of a run folder or of the run that an export lies in, else None."""
    for place in (folder, folder.parent):
        if is_run_folder(place):
            return read_run_recipe(place)
    return None


def weights_of(target: str) -> dict[str, str]:
    """What tells a model from another one of the same name: its weights' SHA-256, of the Hub its commit.

    Raises:
        RecipeError: there is no such model.
    """
    folder = Path(find_model(target))
    if not folder.is_dir():
        name = "config.json" if adapter_config(target, "main") is None else "adapter_config.json"
        try:
            return {"commit": Path(cached_file(target, name)).parent.name}
        except OSError as error:
            raise RecipeError(f"{target} cannot be loaded: {one_line(error)}") from None
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {path.name: sha256(path) for path in files}


def _earlier_evaluation(
    output: Path, target: str, weights: dict[str, str], names: Sequence[str]
) -> dict[str, Any]:
    """The evaluation that a folder holds, which the new one is to be merged with.

    If the folder is the model's own and its evaluation belongs to earlier weights, the new one replaces it.

    Raises:
        RecipeError: it is another model's, or its held-out figures would be lost.
    """
    before = read_evaluation(output)
    if not before or before.get("weights") == weights:
        return before
    path, own = output / "evaluation.json", output.resolve() == Path(target).resolve()
    if own and (HELD_OUT in names or HELD_OUT not in before.get("datasets", {})):
        say(f"{path} is of this model before it changed: it is written anew")
        return {}
    first = f"first `rm-recipe evaluate {target}`, or " if own else ""
    raise RecipeError(
        f"{path} is of {'this model before it changed' if own else 'another model'} "
        f"({before.get('model')}), and two do not mix; {first}give another --output"
    )


def _load(name: str, recipe: Recipe | None) -> Split:
    with main_process_first():
        if name == HELD_OUT:
            assert recipe is not None
            split = load_held_out_split(recipe)
            check_held_out(recipe.output_dir, split)
        else:
            given = read_name(name)
            data = DataArguments(**given)
            if recipe is not None and "dataset_test_split" not in given:
                data = replace(data, dataset_test_split=recipe.data.dataset_test_split.partition("[")[0])
            split = load_split(data, data.dataset_test_split)
    if name != HELD_OUT:
        say(f"{name}: read as {', '.join(split.shapes)}")
    if split.unread:
        say(f"{name}: columns not read: {', '.join(split.unread)}")
    return split


# --- rewards -----------------------------------------------------------------------------------

# A data set as one model sees it: tokenised; the lines of those of its comparisons that fit the model, by
# number; and what edits did to the rewards.
Scored = tuple[Split, dict[int, Line], dict[str, Any]]


def _score(path: str, splits: dict[str, Split], *, with_edits: bool = False) -> dict[str, Scored]:
    """Load a model and score every data set with it."""
    model = RewardModel.from_pretrained(path, device=str(processes().device))
    result = {}
    for name, whole in splits.items():
        with main_process_first():
            split = tokenize(whole, model.tokenizer, model.max_length, model.truncation)
        for reason, rows in split.first_rows.items():
            say(f"{name}: {split.excluded[reason]} left out, {reason}: first in row {rows[0]}")
        row_names = split.names(np.arange(len(split.comparisons)))
        lines = predictions(name, split, _rewards(model, split.encoded(), "Scoring", row_names))
        score = partial(_rewards, model, bar="Scoring edited replies")
        edits = consistency(model, split, score) if with_edits else {}
        assert split.tokenized is not None
        fits = np.array([reason == "" for reason in arrow_column(split.tokenized, "excluded").to_pylist()])
        result[name] = split, dict(zip(np.flatnonzero(fits).tolist(), lines, strict=True)), edits
    return result


def _rewards(
    model: RewardModel, encoded: list[Encoded], bar: str, names: Sequence[str] = ()
) -> list[NDArray[np.float32]]:
    """The rewards of comparisons, shared between the processes.

    Raises:
        TrainingError: some are not finite numbers; with how many, and the `names` of the first.
    """
    bar = bar if processes().is_main_process else ""
    rewards = each_once(encoded, partial(model.score_encoded, progress=bar, check=False))
    faulty = [number for number, values in enumerate(rewards) if not np.isfinite(values).all()]
    if faulty:
        rows = ", ".join(names[number] for number in faulty[:FAULTY_NAMED] if names)
        raise TrainingError(
            f"the rewards of {len(faulty)} of {len(rewards)} comparisons are not finite numbers"
            f"{f' (row {rows})' if rows else ''}, so this model cannot be evaluated: its run has failed"
        )
    return rewards


# --- figures -----------------------------------------------------------------------------------


def _figures(
    source: Split,
    split: Split,
    lines: dict[int, Line],
    edits: dict[str, Any],
    train: Split | None,
    words: Scorer | None,
) -> dict[str, Any]:
    """What `evaluation.json` says of a data set."""
    trained = scores = None
    if train is not None:
        trained = int(np.isin(split.column("prompt_key"), train.column("prompt_key")).sum())
    if words is not None:
        scores = words([response for own in split.comparisons["responses"][:] for response in own])
    return {
        "n_comparisons": source.rows,
        "n_scored": len(lines),
        "excluded": dict(split.excluded),
        "trained_prompts": trained,
        **summarise(list(lines.values()), scores),
        "consistency": edits,
    }


def _train_split(recipe: Recipe | None) -> Split | None:
    """What the recipe trains on; None where that is not to be had."""
    if recipe is None:
        return None
    try:
        train = load_splits(recipe)[0]
    except DataError as error:
        say(f"no bag-of-words baseline, as what the recipe trains on cannot be read: {error}")
        return None
    if changed_data(recipe.output_dir, train=train.fingerprint):
        say(
            f"warning: the train comparisons are not those that {recipe.output_dir} was trained with: the "
            "data changed; so prompts that were trained on are not counted, and no bag of words is trained"
        )
        return None
    return train


def _compare(one: dict[int, Line], other: dict[int, Line]) -> dict[str, Any]:
    """Two models on the comparisons that fit both."""
    both = [number for number in one if number in other]
    if not both:
        raise DataError("no comparison fits both models")
    right, other_right = (np.array([lines[number]["correct"] for number in both]) for lines in (one, other))
    return {
        "n": len(both),
        "accuracy": float(right.mean()),
        "other_accuracy": float(other_right.mean()),
        **paired_difference(right, other_right),
    }


# --- evaluation.json ---------------------------------------------------------------------------


def judge_anew(run: Path) -> dict[str, Any]:
    """Apply the gate of a run's recipe as it is now to figures that are there; returns the new evaluation."""
    recipe = read_run_recipe(run)
    before = read_evaluation(run)
    held_out = {HELD_OUT: before.get("datasets", {})[HELD_OUT]}
    content = _merge(before, str(run), recipe, held_out, weights_of(str(run)))
    write_json(run / "evaluation.json", content)
    write_report(run)
    return content


def _merge(
    before: dict[str, Any],
    target: str,
    recipe: Recipe | None,
    results: dict[str, Any],
    weights: dict[str, str],
) -> dict[str, Any]:
    """The earlier evaluation with the new data sets in it; `held_out` is never lost."""
    datasets = {**before.get("datasets", {}), **results}
    passed = gate(datasets[HELD_OUT], recipe) if recipe and HELD_OUT in datasets else before.get("gate")
    # The recipe that stands is the one that `held_out` was evaluated by.
    of_held_out = recipe is not None and (HELD_OUT in results or not before)
    return {
        "model": target,
        "base": recipe.model.model_name_or_path if recipe else None,
        "weights": weights,
        "recipe": recipe.resolved() if recipe and of_held_out else before.get("recipe"),
        "datasets": datasets,
        "gate": passed,
    }
