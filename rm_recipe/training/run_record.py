"""What `run.json` says of a run: enough to repeat it and to judge its cost."""

import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rm_recipe.data.dataset import Split
from rm_recipe.model.sharing import Sharing
from rm_recipe.recipe.reader import Recipe
from rm_recipe.training.run_folder import data_identity
from rm_recipe.training.trainer import SharedPrefixRewardTrainer

PACKAGES = ("torch", "trl", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "rm-recipe")


def run_record(
    recipe: Recipe,
    trainer: SharedPrefixRewardTrainer,
    sharing: Sharing,
    train_split: Split,
    test_split: Split,
    cost: Mapping[str, Any],
    resumed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `run.json`.

    Args:
        cost: `Checkpoints.cost` of the whole training.
        resumed: the manifest of the checkpoint that it was resumed from.
    """
    state, training = trainer.state, recipe.training
    seconds = cost["train_seconds"]
    # A gradient norm may overflow in fp16's first steps; JSON has no number for that.
    log = [
        {key: value if math.isfinite(value) else None for key, value in entry.items()}
        for entry in state.log_history
    ]
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    seen = min(state.global_step * batch, round(len(train_split.comparisons) * (state.epoch or 0)))
    return {
        "seed": training.seed,
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        **data_identity(train_split, test_split),
        "comparisons": {
            "train": len(train_split.comparisons),
            "train_excluded": dict(train_split.excluded),
            "held_out": len(test_split.comparisons),
        },
        "prefix_sharing": sharing.as_dict(),
        "device": str(training.device),
        "processes": training.world_size,
        "steps": state.global_step,
        "resumed_from_step": resumed["step"] if resumed else 0,
        "comparisons_per_s": seen / seconds,
        "tokens_per_s": trainer._total_train_tokens / seconds,
        **cost,
        "final_loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
        "log": log,
    }


def package_version(package: str) -> str | None:
    """The installed version, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def git_commit() -> str | None:
    """The commit of the source that runs, None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
