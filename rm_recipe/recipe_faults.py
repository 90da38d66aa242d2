"""What in a recipe is missing, out of range or in contradiction, and what it names that is not there.

Every check returns its faults as text; `recipe.read_recipe` collects them all.
"""

import difflib
import math
import typing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rm_recipe.recipe_keys import (
    MODEL_FILES,
    OFFLINE_DATA,
    OFFLINE_ENCODER,
    OFFLINE_MODEL,
    DataArguments,
    describe,
    did_you_mean,
    fits,
    looks_local,
)
from rm_recipe.weights import pickle_fault

POSITIVE = (
    "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "max_length", "lora_r", "lora_alpha", "num_train_epochs",
    "max_train_samples", "max_eval_samples", "dataset_num_proc", "early_stopping_patience",
)  # fmt: skip

EARLY_STOPPING_FORBIDS = {
    "eval_strategy": ("no",), "save_strategy": ("no", "best"), "load_best_model_at_end": (False,),
}  # fmt: skip


def cross_faults(values: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What is missing, out of range or in contradiction; `given` has the faulty keys too."""
    faults = [
        f"'{key}: {values[key]}' must be above 0"
        for key in POSITIVE
        if values.get(key) is not None and not values[key] > 0
    ]
    if not given.get("model_name_or_path"):
        faults.append("'model_name_or_path' is missing: the base model's folder or Hub id")
    if not given.get("dataset_name") and not given.get("datasets"):
        faults.append("'dataset_name' is missing: a file, a folder or a Hub id")
    faults += mixture_faults(values)
    if any(margin < 0 for margin in (values.get("margin_map") or {}).values()):
        faults.append("'margin_map': a margin below 0 would reward being wrong")
    if values.get("margin_map") and not values.get("margin_column"):
        faults.append("'margin_map' needs a 'margin_column' that holds its categories")
    size = values.get("test_split_size")
    if size is not None and not 0.0 < size < 1.0:
        faults.append(f"'test_split_size: {size}' must lie between 0 and 1")
    defaults = DataArguments()
    train = values.get("dataset_train_split", defaults.dataset_train_split)
    if train == values.get("dataset_test_split", defaults.dataset_test_split):
        faults.append(f"'dataset_test_split: {train}' must differ from 'dataset_train_split'")
    if values.get("load_in_4bit") and values.get("load_in_8bit"):
        faults.append("'load_in_4bit' and 'load_in_8bit' cannot both be true")
    quantised = values.get("load_in_4bit") or values.get("load_in_8bit")
    if quantised and not values.get("use_peft"):
        faults.append("a quantised base cannot be trained in full: set 'use_peft: true'")
    if values.get("push_to_hub") and not values.get("hub_model_id"):
        faults.append("'push_to_hub: true' needs a 'hub_model_id: USER/NAME' to push to")
    if values.get("trust_remote_code"):
        faults.append(
            "'trust_remote_code: true': the export has to load with plain transformers, so a model with code "
            "of its own cannot be a base"
        )
    if values.get("load_in_8bit") and values.get("use_dora"):
        faults.append(
            "'use_dora' reads weights that bitsandbytes 0.50 does not give in 8 bits: 'load_in_4bit'"
        )
    if values.get("early_stopping_patience"):
        faults += [
            f"'early_stopping_patience' needs what '{key}: {values[key]}' forbids; leave that out"
            for key, forbidding in EARLY_STOPPING_FORBIDS.items()
            if values.get(key) in forbidding
        ]
    limit = values.get("save_total_limit")
    if limit is not None and limit < 2:
        faults.append(
            f"'save_total_limit: {limit}' must be 2 or more: the older checkpoint is what is left where the "
            "newer one is cut off"
        )
    if values.get("bf16") and values.get("fp16"):
        faults.append("'bf16' and 'fp16' cannot both be true; leave both out to let the device choose")
    if not 0.0 <= values.get("target_accuracy", 0.5) <= 1.0:
        faults.append(f"'target_accuracy: {values['target_accuracy']}' must lie between 0 and 1")
    trackers = values.get("report_to") or []
    for tracker in [trackers] if isinstance(trackers, str) else trackers:
        if tracker not in ("none", "all") and not (tracker.isidentifier() and find_spec(tracker)):
            faults.append(f"'report_to: {tracker}' needs a package: `pip install {tracker}`")
    return faults


def mixture_faults(values: dict[str, Any]) -> list[str]:
    """What is wrong with the entries of `datasets`."""
    entries = values.get("datasets") or []
    if not entries:
        return []
    from trl.scripts.utils import DatasetConfig

    faults = [
        f"'datasets' and '{key}' exclude each other"
        for key in ("dataset_name", "dataset_subsets", "dataset_revision")
        if values.get(key)
    ]
    hints = typing.get_type_hints(DatasetConfig)
    for number, entry in enumerate(entries, 1):
        where = f"'datasets', entry {number}"
        if not entry.get("path"):
            faults.append(f"{where} has no 'path': a file, a folder or a Hub id")
        for key, value in entry.items():
            if key not in hints:
                close = difflib.get_close_matches(str(key), hints, n=1)
                faults.append(f"{where}: unknown key '{key}'.{did_you_mean(close)}")
            elif not fits(value, hints[key]):
                faults.append(f"{where}: '{key}: {value}' should be {describe(hints[key])}")
    fractions = [entry.get("fraction") for entry in entries]
    if any(fractions) and not all(isinstance(f, int | float) and 0 < f < math.inf for f in fractions):
        faults.append("'datasets': 'fraction' must be a number above 0 in every entry, or in none")
    test = values.get("dataset_test_split", DataArguments().dataset_test_split)
    held_out = values.get("test_split_size") is None and test in {e.get("split", "train") for e in entries}
    if held_out:
        faults.append(f"'datasets': 'split: {test}' is what is held out ('dataset_test_split')")
    return faults


def input_faults(values: dict[str, Any]) -> list[str]:
    """Local models and data sets that are named and not there."""
    faults = []
    names = [(key, values.get(key)) for key in ("model_name_or_path", "dataset_name")]
    names += [("path", entry.get("path")) for entry in values.get("datasets") or []]
    for key, name in names:
        if not name:
            continue
        if Path(name).exists():
            if key == "model_name_or_path" and not any((Path(name) / file).is_file() for file in MODEL_FILES):
                faults.append(f"'{key}: {name}' holds no model: there is no {' or '.join(MODEL_FILES)} in it")
            elif key == "model_name_or_path":
                adapter = (Path(name) / "adapter_config.json").is_file()
                faults += filter(None, [pickle_fault(name, adapter=adapter)])
            continue
        if name in (OFFLINE_MODEL, OFFLINE_ENCODER, OFFLINE_DATA):
            faults.append(f"'{key}: {name}' does not exist yet; run `rm-recipe prepare offline`")
        elif looks_local(name):
            faults.append(f"'{key}: {name}' does not exist")
    file = values.get("dataset_name")
    if file and values.get("dataset_subsets") and Path(file).is_file():
        faults.append(f"'dataset_subsets' are folders, and '{file}' is a file")
    return faults
