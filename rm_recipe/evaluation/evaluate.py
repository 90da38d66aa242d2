"""Measure how often a reward model agrees with people, on comparisons that it was not trained on.

    rm-recipe evaluate outputs/smollm2_offline
    rm-recipe evaluate outputs/smollm2_offline --dataset NAME_OR_PATH --against OTHER_MODEL

scores the comparisons that the run's recipe holds out, or those of other data sets, and writes
`evaluation.json`, `predictions.jsonl` and `report.html`.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate.utils import broadcast_object_list
from huggingface_hub import snapshot_download
from numpy.typing import NDArray

from rm_recipe.data import loading
from rm_recipe.data.augmentation import EDITS, UNSEEN
from rm_recipe.data.dataset import Split, arrow_column
from rm_recipe.data.splits import load_held_out_split, load_split, load_splits, refuse_other_data
from rm_recipe.data.tokenization import tokenize
from rm_recipe.errors import DataError, RecipeError, TrainingError, one_line
from rm_recipe.evaluation import summary
from rm_recipe.evaluation.benchmarks import Benchmark, benchmark_result, find_benchmark, in_full
from rm_recipe.evaluation.findings import HELD_OUT, gate
from rm_recipe.evaluation.metrics import paired_difference
from rm_recipe.evaluation.probes import Scorer, bag_of_words, consistency
from rm_recipe.evaluation.report import write_report
from rm_recipe.files import sha256, write_json
from rm_recipe.processes import each_once, main_process_first, processes, say, warn
from rm_recipe.recipe.reader import Recipe, is_run_folder, read_run_recipe
from rm_recipe.recipe.schema import DataArguments
from rm_recipe.scoring import RewardModel, find_model

Content = dict[str, Any]  # of `evaluation.json`, or of a part of it


def evaluate(
    target: str,
    datasets: list[str] | None = None,
    output: Path | None = None,
    against: str | None = None,
    columns: dict[str, str] | None = None,
) -> Content:
    """Score a model's held-out comparisons, or those of other data sets, and write the result.

    Several processes share the comparisons, each scored exactly once; the main one computes the figures and
    writes `evaluation.json`, `predictions.jsonl` and `report.html`.

    Args:
        target: a run folder, an export or a one-label model.
        datasets: names or paths; by default the held-out split of the run's recipe.
        output: where the result goes; by default into the run or model.
        against: another such model, to be compared on the same comparisons.
        columns: names that the data sets have for ours, in place of the recipe's `columns`.

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
    loaded = {name: _load(name, recipe, columns) for name in names}
    scored = _score(target, loaded, with_edits=True)
    other = _score(against, loaded) if against else {}
    content = None
    if processes().is_main_process:
        train = _train_split(recipe)
        words = bag_of_words(train.comparisons) if train else None
        results = {name: _figures(scored[name], train, words) for name in names}
        for name, found in other.items():
            results[name]["against"] = {"model": against, **_compare(scored[name].lines, found.lines)}
        content = _merged(before, target, recipe, weights, results)
        if not before:
            (output / summary.PREDICTIONS).unlink(missing_ok=True)
        lines = [line for name in names for line in scored[name].lines.values()]
        summary.write_predictions(output, lines)
        write_json(output / "evaluation.json", content)
        write_report(output)
    return broadcast_object_list([content])[0]


# --- what is evaluated, and where the result goes ----------------------------------------------


def recipe_of(folder: Path) -> Recipe | None:
    """The recipe of a run folder or of the run that an export lies in, else None."""
    run = next(filter(is_run_folder, (folder, folder.parent)), None)
    return read_run_recipe(run) if run else None


def check_gate(target: str, names: list[str]) -> None:
    """Raises RecipeError where an evaluation of these data sets cannot pass or fail the gate."""
    if recipe_of(Path(target)) is None or HELD_OUT not in names:
        raise RecipeError("--gate judges the held-out split of a run's recipe, which is not evaluated here")


def _output_folder(target: str, recipe: Recipe | None, names: list[str], output: Path | None) -> Path:
    """The folder that the result goes into; raises RecipeError where the arguments do not fit."""
    if recipe is None and HELD_OUT in names:
        find_model(target)  # which says so where there is none
        raise RecipeError(f"{target} has no recipe, so it has no held-out split; name one with --dataset")
    folder = output or Path(target)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if output is None and not folder.is_dir():
        reason = "is not a local folder"
    elif (folder / "proof.json").is_file():
        reason = "is an export, which stays as it was verified"
    elif not there.is_dir() or not os.access(there, os.W_OK):  # known before an hour of scoring
        reason = "is no folder that can be written to"
    else:
        return folder
    raise RecipeError(f"{folder} {reason}; say with --output where the result goes")


def weights_of(target: str) -> dict[str, str]:
    """What tells a model from another one of the same name: its weights' SHA-256, of the Hub its commit.

    Raises:
        RecipeError: there is no such model.
    """
    folder = Path(find_model(target))
    if folder.is_dir():
        return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    try:
        return {"commit": Path(snapshot_download(target, allow_patterns="*config.json")).name}
    except (OSError, ValueError) as error:
        raise RecipeError(f"{target} cannot be loaded: {one_line(error)}") from None


def _earlier_evaluation(output: Path, target: str, weights: dict[str, str], names: list[str]) -> Content:
    """The evaluation that a folder holds, which the new one is to be merged with.

    If the folder is the model's own and its evaluation belongs to earlier weights, the new one replaces it.

    Raises:
        RecipeError: it is another model's, or its held-out figures would be lost.
    """
    before = summary.read_evaluation(output)
    if not before or before.get("weights") == weights:
        return before
    own, path = output.resolve() == Path(target).resolve(), output / "evaluation.json"
    if own and (HELD_OUT in names or HELD_OUT not in before["datasets"]):
        say(f"{path} is of this model before it changed: it is written anew")
        return {}
    whose = f"of another model ({before['model']}), or of this model before it changed"
    first = f"first `rm-recipe evaluate {target}`, or " if own else ""
    raise RecipeError(f"{path} is {whose}; {first}give another --output")


def _data_of(name: str, recipe: Recipe | None, columns: dict[str, str] | None = None) -> DataArguments:
    """What a name stands for; one without a split means the recipe's test split, unless that is a slice.

    The recipe's `columns` are meant too, where the set has all of them: the verdict of two, for one.
    """
    split = recipe.data.dataset_test_split if recipe else DataArguments.dataset_test_split
    usual = {} if "[" in split else {"dataset_test_split": split}
    data = DataArguments(**(usual | loading.read_name(name)), columns=columns)
    if recipe and recipe.data.columns and not columns:
        [source] = loading.sources_of(data)
        found = loading.find_split(source, data.dataset_test_split, data.dataset_revision)
        there = loading.columns_of(found)
        asked = {*loading.theirs(recipe.data.columns).values()}
        data.columns = recipe.data.columns if asked <= {*there} else None
    return data


def _load(name: str, recipe: Recipe | None, columns: dict[str, str] | None) -> tuple[Split, Benchmark | None]:
    """A data set, and the benchmark that it is."""
    benchmark = None
    with main_process_first():
        if name == HELD_OUT and recipe is not None:
            split = load_held_out_split(recipe)
            refuse_other_data(recipe.output_dir, held_out=split.fingerprint)
        else:
            data = _data_of(name, recipe, columns)
            split, benchmark = load_split(data, data.dataset_test_split), find_benchmark(data)
            say(f"{name}: read as {', '.join(split.shapes)}")
    if split.unread:
        say(f"{name}: columns not read: {', '.join(split.unread)}")
    return split, benchmark


# --- rewards -----------------------------------------------------------------------------------


class Scored(NamedTuple):
    """A data set as one model sees it.

    Attributes:
        split: tokenised.
        benchmark: that it is.
        lines: of those of its comparisons that fit the model, by number before tokenising.
        edits: what edits did to the rewards.
    """

    split: Split
    benchmark: Benchmark | None
    lines: dict[int, summary.Line]
    edits: dict[str, Any]


def _score(
    path: str, loaded: dict[str, tuple[Split, Benchmark | None]], *, with_edits: bool = False
) -> dict[str, Scored]:
    """Load a model and score every data set with it, the benchmarks last, in full."""
    model = RewardModel.from_pretrained(path, device=str(processes().device))
    scored = {}
    for name, (split, benchmark) in sorted(loaded.items(), key=lambda item: item[1][1] is not None):
        model = in_full(model) if benchmark else model
        with main_process_first():
            split = tokenize(split, model.tokenizer, model.max_length, model.truncation)
        for reason, rows in split.first_rows.items():
            say(f"{name}: {split.excluded[reason]} left out, {reason}: first in row {rows[0]}")
        lines = summary.predictions(name, split, _rewards(model, split))
        fits = np.flatnonzero(np.equal(arrow_column(split.tokenized, "excluded").to_pylist(), ""))
        edits = _edited(model, split) if with_edits else {}
        scored[name] = Scored(split, benchmark, dict(zip(fits.tolist(), lines, strict=True)), edits)
    return scored


def _edited(model: RewardModel, split: Split) -> Content:
    """What edits do to rewards: those that training may have seen, and others."""
    bar = "Trying edits" if processes().is_main_process else ""
    score = partial(model.score, progress=bar, unfit=np.nan)
    found = consistency(split, partial(each_once, function=lambda own: list(score(own))), EDITS | UNSEEN)
    lots = {"consistency": EDITS, "consistency_unseen": UNSEEN}
    return {key: {name: found[name] for name in found if name in lot} for key, lot in lots.items()}


def _rewards(model: RewardModel, split: Split) -> list[NDArray[np.float32]]:
    """The rewards of a data set's comparisons, shared between the processes.

    Raises:
        TrainingError: some are not finite numbers; with how many, and the first row.
    """
    bar = "Scoring" if processes().is_main_process else ""
    rewards = each_once(split.encoded(), partial(model.score_encoded, progress=bar, check=False))
    faulty = np.flatnonzero([not np.isfinite(values).all() for values in rewards])
    if len(faulty):
        fault = f"the rewards of {len(faulty)} of {len(rewards)} comparisons are not finite numbers"
        first = split.names(faulty[:1])[0]
        raise TrainingError(f"{fault} (first in row {first}): the training of this model has failed")
    return rewards


# --- figures -----------------------------------------------------------------------------------


def _train_split(recipe: Recipe | None) -> Split | None:
    """What the recipe trains on; None where that is not to be had."""
    reason = "no recipe says what the model was trained on"
    if recipe is not None:
        try:
            train = load_splits(recipe)[0]
            refuse_other_data(recipe.output_dir, train=train.fingerprint)
            return train
        except (DataError, RecipeError) as error:
            reason = f"what the recipe trains on is not to be had: {str(error).partition(';')[0]}"
    warn(f"no bag-of-words baseline, nor a count of prompts that were trained on, as {reason}")
    return None


def _figures(scored: Scored, train: Split | None, words: Scorer | None) -> Content:
    """What `evaluation.json` says of a data set."""
    split, baselines = scored.split, {}
    if words is not None:
        responses = [response for own in split.comparisons["responses"][:] for response in own]
        baselines["bag_of_words"] = words(responses)
    figures = {
        "n_comparisons": split.rows,
        "excluded": dict(split.excluded),
        "prompts": len(np.unique(split.column("prompt_key"))),
        "trained_prompts": None if train is None else _trained_prompts(split, train),
        "baselines_missing": [] if words else ["bag_of_words"],
        **summary.summarise(list(scored.lines.values()), **baselines),
        **scored.edits,
    }
    if scored.benchmark:
        figures["benchmark"] = benchmark_result(scored.benchmark, split, scored.lines)
    return figures


def _trained_prompts(split: Split, train: Split) -> int:
    """How many comparisons have a prompt that was trained on.

    Where every one asks the same question, that says nothing, and those whose replies were trained on count.
    """
    if len(np.unique(split.column("prompt_key"))) > 1:
        return int(np.isin(split.column("prompt_key"), train.column("prompt_key")).sum())
    seen = {tuple(replies) for replies in train.comparisons["responses"][:]}
    return sum(tuple(replies) in seen for replies in split.comparisons["responses"][:])


def _compare(one: dict[int, summary.Line], other: dict[int, summary.Line]) -> Content:
    """Two models on the comparisons that fit both."""
    both = [number for number in one if number in other]
    if not both:
        raise DataError("no comparison fits both models")
    right, other_right = (np.array([lines[number]["correct"] for number in both]) for lines in (one, other))
    means = {"n": len(both), "accuracy": float(right.mean()), "other_accuracy": float(other_right.mean())}
    return means | paired_difference(right, other_right)


# --- evaluation.json ---------------------------------------------------------------------------


def _merged(
    before: Content, target: str, recipe: Recipe | None, weights: dict[str, str], results: Content
) -> Content:
    """The earlier evaluation with the new data sets in it.

    `held_out` is never lost, and the recipe and the gate that stand are those that it was evaluated by.
    """
    content = {
        "model": target,
        "base": recipe.model.model_name_or_path if recipe else None,
        "weights": weights,
        "recipe": before.get("recipe") or (recipe and recipe.resolved()),
        "datasets": before.get("datasets", {}) | results,
        "gate": before.get("gate"),
    }
    if recipe and HELD_OUT in results:
        results[HELD_OUT]["chose_checkpoint"] = bool(recipe.training.load_best_model_at_end)
        content |= {"recipe": recipe.resolved(), "gate": gate(results[HELD_OUT], recipe)}
    return content
