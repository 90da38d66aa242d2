"""What fits a device: a recipe's batch, the largest one, and the recipe to take where neither does.

All of it by the memory plan (`memory.plan`), from the model's configuration alone: no weights are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rm_recipe.data.dataset import Split
from rm_recipe.errors import RecipeError, one_line
from rm_recipe.model import memory, reward_model, tokenizer
from rm_recipe.model.head import head_names
from rm_recipe.model.memory import MemoryPlan
from rm_recipe.model.shared_prefix import Encoded
from rm_recipe.model.sharing import decide_sharing
from rm_recipe.recipe.reader import Recipe, read_recipe, shipped

# TRL's name and transformers' new one, of which its Trainer reads only the second.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
LARGEST = 128  # comparisons per device; nobody needs more
SHIPPED = shipped("recipes")
# The precision of a GPU, on a machine that has none.
AS_ON_GPU = {"use_cpu": "true", "fp16": "false", "bf16": "true"}
BatchOf = Callable[[int], Sequence[Encoded]]


class UnplannableError(RecipeError):
    """What a step of a model needs cannot be planned."""


@dataclass(frozen=True)
class Fit:
    """Whether a recipe's training step fits, and what would.

    Attributes:
        plan: of the recipe's batch, with gradient checkpointing if the recipe says so or, where it says
            nothing, if that is needed.
        without: the plan without it, where it is needed.
        largest: per-device batch that fits so; 0 if not even one comparison does.
    """

    memory: float
    batch: int
    checkpointing: bool
    plan: MemoryPlan
    without: MemoryPlan | None
    largest: int

    @property
    def fits(self) -> bool:
        """Whether the recipe can be trained as it stands."""
        return self.plan.fits(self.memory)


def fit(
    config: Any,
    recipe: Recipe,
    new_modules: Sequence[str],
    batch_of: BatchOf,
    *,
    shared: bool,
    device: torch.device,
    memory_bytes: float,
    larger: bool = True,
) -> Fit:
    """Plans a recipe's training step on a device.

    Args:
        config: of the one-label classifier.
        batch_of: the largest batch of so many comparisons.
        larger: look for the largest batch that fits where the recipe's does, which takes long.

    Raises:
        UnplannableError: for whatever reason.
    """
    training = recipe.training

    def plan(n: int, checkpointing: bool) -> MemoryPlan:
        try:
            return memory.plan(
                config, recipe.model, training, new_modules, batch_of(n),
                shared=shared, checkpointing=checkpointing, device=device,
            )  # fmt: skip
        except Exception as error:  # whatever a foreign architecture raises
            raise UnplannableError(
                f"what a step of this {config.model_type} needs could not be planned: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error

    n = training.per_device_train_batch_size
    decided = any(key in recipe.values for key in CHECKPOINTING)
    said = any(getattr(training, key) for key in CHECKPOINTING) if decided else None
    without = plan(n, False) if not said else None
    checkpointing = bool(said) or (said is None and without is not None and not without.fits(memory_bytes))
    planned = without if without is not None and not checkpointing else plan(n, True)
    fitting, too_many = (n, LARGEST + 1 if larger else n + 1) if planned.fits(memory_bytes) else (0, n)
    while too_many - fitting > 1:
        middle = min(
            (fitting + too_many) // 2, max(2 * fitting, 1)
        )  # doubling: plans of large batches are slow
        if plan(middle, checkpointing).fits(memory_bytes):
            fitting = middle
        else:
            too_many = middle
    return Fit(
        memory_bytes, n, checkpointing, planned, without if checkpointing and said is None else None, fitting
    )


def fit_by_config(recipe: Recipe, device: torch.device, memory_bytes: float, larger: bool = True) -> Fit:
    """`fit` by the base's configuration, for conversations of `max_length` tokens that share none.

    Raises:
        RecipeError: the configuration cannot be had.
    """
    training = recipe.training
    name, revision = str(recipe.model.model_name_or_path), recipe.model.model_revision
    config = tokenizer.load_config(name, revision)
    text = config.get_text_config()
    if text.pad_token_id is None:  # which the tokenizer would name
        text.pad_token_id = 0
    outline = reward_model.outline(config, name)
    tokenizer.check_lengths(config, training.max_length, name)
    sharing = decide_sharing(outline, recipe.data.prefix_sharing, training.max_length, device)
    longest = Encoded([5], [[6] * ((training.max_length or 1024) - 1)] * 2)
    return fit(
        outline.config, recipe, head_names(outline), lambda n: [longest] * n,
        shared=sharing.used, device=device, memory_bytes=memory_bytes, larger=larger,
    )  # fmt: skip


def read_for(path: Path, overrides: Sequence[str], device: torch.device) -> Recipe:
    """A recipe with the precision that it would have on a device, which this machine need not have.

    Raises:
        RecipeError: it is faulty.
    """
    recipe = read_recipe(path, overrides, check_inputs=False)
    if device.type == recipe.training.device.type:
        return recipe
    given = [word.partition("=")[0] for word in overrides]
    more = [
        word for key, value in AS_ON_GPU.items() if f"--{key}" not in given for word in (f"--{key}", value)
    ]
    return read_recipe(path, [*overrides, *more], check_inputs=False)


def too_little(recipe: Recipe, trainer: Any, new_modules: Sequence[str], split: Split) -> str:
    """What to say where a step has found no memory: what it takes by the plan, and what to lower."""
    device, shared = recipe.training.device, trainer.data_collator.share
    there = memory.device_memory(device)
    n, what = recipe.training.per_device_train_batch_size, f"{device.type.upper()} out of memory"
    smaller = with_batch_of(recipe, n - 1) if n > 1 else "gradient_checkpointing: true and a lower max_length"
    try:
        found = fit(
            trainer.model.config, recipe, new_modules, lambda n: split.longest(n, shared),
            shared=shared, device=device, memory_bytes=there, larger=False,
        )  # fmt: skip
    except UnplannableError:
        return f"{what}, of {there / 1e9:.1f} GB; take {smaller}"
    what += f": the largest batch takes about {found.plan.peak / 1e9:.1f} of {there / 1e9:.1f} GB by the plan"
    if found.fits:  # something else is on the device, or the plan is too low
        return f"{what}; see what else uses it, or take {smaller}"
    return f"{what}; {what_to_lower(found, recipe)}"


def with_batch_of(recipe: Recipe, most: int) -> str:
    """The keys for a batch of at most so many comparisons, and as many in a step as the recipe has.

    So a run that has run out of memory can be resumed with them.
    """
    training = recipe.training
    of_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    batch = next(size for size in range(min(most, of_step), 0, -1) if of_step % size == 0)
    return f"per_device_train_batch_size: {batch} with gradient_accumulation_steps: {of_step // batch}"


def what_to_lower(found: Fit, recipe: Recipe) -> str:
    """The keys to change where a recipe does not fit."""
    if found.largest:
        return f"{with_batch_of(recipe, found.largest)} fits"
    if not found.checkpointing:
        return "gradient_checkpointing: true keeps less for the backward"
    ways = ["a lower max_length"]
    if not recipe.model.load_in_4bit:
        ways.append("load_in_4bit: true" if recipe.model.use_peft else "use_peft: true")
    return f"not one comparison fits; try {' or '.join(ways)}"


def shipped_that_fit(device: torch.device, memory_bytes: float) -> tuple[list[str], list[str]]:
    """The names of this project's recipes that fit, and of those whose base's configuration is not here."""
    fitting, unknown = [], []
    reachable = True  # the Hub, which is not asked again for each
    for path in sorted(SHIPPED.glob("*.yaml")):
        recipe = read_for(path, [], device)
        is_here = Path(str(recipe.model.model_name_or_path)).is_dir()
        try:
            if not (is_here or reachable):
                unknown.append(path.stem)
            elif fit_by_config(recipe, device, memory_bytes, larger=False).fits:
                fitting.append(path.stem)
        except UnplannableError:
            unknown.append(path.stem)
        except RecipeError:
            unknown.append(path.stem)
            reachable = reachable and is_here
    return fitting, unknown
