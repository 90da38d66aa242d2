"""What `run.json` says of a run: enough to repeat it and to judge its cost."""

import importlib.metadata
import math
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rm_recipe.recipe import Recipe
from rm_recipe.reward_trainer import SharedPrefixRewardTrainer
from rm_recipe.sharing import Sharing
from rm_recipe.split import Split

PACKAGES = ("torch", "trl", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "rm-recipe")


def run_record(
    recipe: Recipe,
    trainer: SharedPrefixRewardTrainer,
    sharing: Sharing,
    train_split: Split,
    test_split: Split,
    seconds: float,
    resumed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `run.json`.

    Args:
        seconds: that training took since it was started or resumed.
        resumed: the manifest of the checkpoint that it was resumed from; speeds count from there.
    """
    state, training = trainer.state, recipe.training
    first_step, first_tokens = (resumed["step"], resumed["since_last_log"]["tokens"]) if resumed else (0, 0)
    # A gradient norm may overflow in fp16's first steps; JSON has no number for that.
    log = [
        {key: value if math.isfinite(value) else None for key, value in entry.items()}
        for entry in state.log_history
    ]
    # Where the recipe has `auto_find_batch_size`, it may be smaller than the recipe's.
    batch = trainer._train_batch_size * training.gradient_accumulation_steps * training.world_size
    epochs = (state.epoch or 0) * (1 - first_step / max(state.global_step, 1))
    seen = min((state.global_step - first_step) * batch, round(len(train_split.comparisons) * epochs))
    return {
        "seed": training.seed,
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "data_fingerprints": {
            "train": train_split.comparisons._fingerprint,
            "held_out": test_split.comparisons._fingerprint,
        },
        "comparisons": {
            "train": len(train_split.comparisons),
            "train_excluded": dict(train_split.excluded),
            "held_out": len(test_split.comparisons),
        },
        "prefix_sharing": sharing.as_dict(),
        "device": str(training.device),
        "processes": training.world_size,
        "steps": state.global_step,
        "resumed_from_step": first_step,
        "comparisons_per_s": seen / seconds,
        "tokens_per_s": (trainer._total_train_tokens - first_tokens) / seconds,
        "train_seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "final_loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
        "log": log,
    }


def package_version(package: str) -> str | None:
    """The installed version, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def peak_memory() -> int:
    """Peak memory of this process in bytes: CUDA's where there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def git_commit() -> str | None:
    """The commit of the source that runs, None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
