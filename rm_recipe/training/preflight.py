"""A real training step before training: it must not start if it cannot fit, or cannot learn.

The step is made on the largest batch of the data, by the trainer that will train, and undone: parameters,
random numbers and counts are as they were, so a run is the same with it and without.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from rm_recipe.data.dataset import Split
from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.model.memory import device_memory, peak_memory, too_little
from rm_recipe.processes import is_out_of_memory, say
from rm_recipe.recipe.reader import Recipe
from rm_recipe.training.distributed import autocast_of, without_random_numbers
from rm_recipe.training.trainer import COLUMNS, SharedPrefixRewardTrainer

TIMED = 3  # batches, as they come, whose time is measured
FAR_FROM_START = 0.5  # of the loss of an untrained model, beyond which something is odd
IN_PLACE = 0.9  # of a device's memory: what is above leaves no room for a batch of another shape


@dataclass(frozen=True)
class Preflight:
    """What the step has shown.

    Attributes:
        loss: of the largest batch, before training.
        steps: of the whole training.
        seconds: that training will take, by the time of batches as they come; without start-up.
        peak_memory: bytes, of this process with everything that is loaded.
        memory: bytes that the device has.
    """

    loss: float
    steps: int
    seconds: float
    peak_memory: int
    memory: int

    def __str__(self) -> str:
        minutes = self.seconds / 60
        time_needed = f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{max(self.seconds, 1):.0f} s"
        return (
            f"preflight: loss {self.loss:.3f} at the start; {self.steps} steps, about {time_needed}; the "
            f"largest batch takes {self.peak_memory / 1e9:.1f} of {self.memory / 1e9:.1f} GB"
        )


def preflight(
    recipe: Recipe,
    trainer: SharedPrefixRewardTrainer,
    modules_to_save: list[str],
    train_split: Split,
    test: Split,
) -> Preflight | None:
    """Make a training step on the largest batch and undo it.

    Args:
        modules_to_save: the head, and whatever else is trained in full beside LoRA.

    Returns:
        what it has shown; None where the model will be sharded over processes, which happens in training.

    Raises:
        RecipeError: the step does not fit the device's memory.
        TrainingError: the loss is not finite, or no gradient reaches the head or an adapter.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        say("preflight: left out; the model is sharded when training begins")
        return None
    training, shared = recipe.training, trainer.data_collator.share
    sizes = train_split.sizes(shared)
    try:
        with as_before(trainer):
            loss, peak, of_a_token = measure(trainer, modules_to_save, train_split, sizes)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RecipeError(f"preflight: {too_little(recipe)}") from None
    # Optimizer steps, as Trainer counts them.
    _, of_epoch, *_, steps = trainer.set_initial_training_values(training, trainer.get_train_dataloader())
    epochs = steps / of_epoch
    evaluations = epochs if training.eval_strategy == "epoch" else 0.0
    if training.eval_strategy == "steps":  # every so many, or at each such share of all
        evaluations = steps / training.eval_steps if training.eval_steps >= 1 else 1 / training.eval_steps
    # An evaluation is a forward, about a third of a step.
    tokens = sizes.sum() * epochs + test.sizes(shared).sum() / 3 * evaluations
    seconds = float(of_a_token * tokens / training.world_size)
    result = Preflight(loss, steps, seconds, peak, device_memory(training.device))
    warn(result, recipe)
    return result


def measure(
    trainer: SharedPrefixRewardTrainer, modules_to_save: list[str], split: Split, sizes: NDArray[np.int64]
) -> tuple[float, int, float]:
    """Make steps on the largest batch, as it takes most memory, and on some that come as they come.

    The largest is made twice, with the optimizer's step between, as the second one meets what a training
    keeps: gradients of the micro-batch before, and the optimizer's state.

    Args:
        sizes: tokens of each comparison.

    Returns:
        the first loss, the peak of memory in bytes, and the seconds that a token takes.
    """
    n, rng = trainer.args.per_device_train_batch_size, np.random.default_rng(trainer.args.seed)
    largest = split.largest(n, trainer.data_collator.share)
    loss = step(trainer, split, largest)
    check_gradients(trainer.model, modules_to_save)
    trainer.create_optimizer().step()
    step(trainer, split, largest)
    peak = peak_memory()
    trainer.model.zero_grad()
    seconds_of_a_token = []
    for _ in range(TIMED):
        rows = rng.choice(len(sizes), min(n, len(sizes)), replace=False)
        began = time.monotonic()
        step(trainer, split, rows)
        seconds_of_a_token.append((time.monotonic() - began) / sizes[rows].sum())
    return loss, peak, min(seconds_of_a_token)  # what disturbs a measurement only ever adds to it


def step(trainer: SharedPrefixRewardTrainer, split: Split, rows: Any) -> float:
    """Forward and backward of the comparisons with these numbers; their loss."""
    examples = list(split.comparisons.select_columns(COLUMNS).select(rows))
    inputs = trainer._prepare_inputs(trainer.data_collator(examples))
    scale = 2.0**10 if trainer.args.fp16 else 1.0  # for gradients too small for fp16, as training has one
    with autocast_of(trainer.args):
        loss = trainer.compute_loss(trainer.model, inputs)
    (loss * scale).backward()
    return float(loss.detach())


@contextlib.contextmanager
def as_before(trainer: SharedPrefixRewardTrainer) -> Iterator[None]:
    """What happens within leaves model, counts and random numbers of a trainer as they were."""
    model, arguments = trainer.model, trainer.args
    kept = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    model.train()
    if arguments.activation_checkpointing:  # which Trainer turns on when it begins
        kwargs = dict(arguments.activation_checkpointing_kwargs or {})
        own = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs or None, **own)
    try:
        with without_random_numbers(arguments.device):
            yield
    finally:
        model.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
        trainer.optimizer = None
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0


def check_gradients(model: torch.nn.Module, modules_to_save: list[str]) -> None:
    """Refuse a step in which an adapter or the head has no gradient, or something frozen has one.

    Of an adapter B counts: at the start B is 0, and A's gradient with it. An expert that no token was
    sent to has none, so where there are experts they are left out.

    Raises:
        TrainingError: naming them.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model

    def moved(parameter: torch.nn.Parameter) -> bool:
        return parameter.grad is not None and bool(parameter.grad.any())

    without = []
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer) and "experts" not in name:
            ups = (
                p for part, p in layer.named_parameters() if part.startswith(("lora_B", "lora_embedding_B"))
            )
            if not any(moved(parameter) for parameter in ups):
                without.append(name)
    for name in modules_to_save:
        trained = [p for p in base.get_submodule(name).parameters() if p.requires_grad]
        # A bias of the reward itself cancels in every comparison.
        if not trained or not all(moved(weight) for weight in trained if weight.ndim > 1):
            without.append(name)
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        raise TrainingError(
            f"preflight: no gradient reaches {', '.join(without[:5])}{more}: training would leave them as "
            "they are. Name 'lora_target_modules' that leave them out, or set 'gradient_checkpointing: "
            "false', which may have cut them off; if neither helps, take another base"
        )
    frozen = [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
    if frozen:
        raise TrainingError(f"preflight: {frozen[0]} is frozen and has a gradient")


def warn(result: Preflight, recipe: Recipe) -> None:
    """Say what is odd about a step, though it can be made."""
    plain = recipe.training.center_rewards_coefficient is None and recipe.data.margin_column is None
    if plain and abs(result.loss - math.log(2)) > FAR_FROM_START:
        say(
            f"warning: the loss starts at {result.loss:.2f}, and a head that knows nothing has 0.69 (ln 2): "
            "rewards start large. A base that is a reward model already may; else look at the base"
        )
    if result.peak_memory > IN_PLACE * result.memory:
        say(
            "warning: the largest batch leaves less than a tenth of the memory; other shapes may not fit. "
            "Lower per_device_train_batch_size, and raise gradient_accumulation_steps as much"
        )
