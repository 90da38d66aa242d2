"""A real training step before training: it must not start if it cannot fit, or cannot learn.

The step is made on the largest batch of the data, by the trainer that will train, and undone: parameters,
random numbers and counts are as they were, so a run is the same with it and without.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.model.memory import device_memory, free_unused, peak_memory, reset_peak_memory, too_little
from rm_recipe.processes import is_out_of_memory, say
from rm_recipe.recipe.reader import Recipe
from rm_recipe.training.trainer import SharedPrefixRewardTrainer, autocast_of, without_random_numbers

TIMED = 3  # batches, as they come, whose time is measured


def preflight(recipe: Recipe, trainer: SharedPrefixRewardTrainer) -> dict[str, Any]:
    """Make a training step on the largest batch, undo it, and say what it has shown.

    Where there is no memory for it, micro-batches are halved, which changes no result, until there is.

    Returns:
        `loss` of the largest batch before training; `steps` of the training and the `seconds` that they will
        take, by batches as they come, without evaluations; `peak_memory` of this process in bytes. Nothing
        where the model will be sharded over processes, which happens in training.

    Raises:
        RecipeError: a comparison alone does not fit the device's memory.
        TrainingError: the loss is not finite, or no gradient reaches the head or an adapter.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        say("preflight: left out; the model is sharded when training begins")
        return {}
    found = None
    while found is None:
        try:
            with as_before(trainer), trainer.cheaper_adapters():
                found = measure(trainer)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        free_unused()  # NCCL takes memory beside torch's
        if not all(gather_object([found is not None])):  # all processes halve, or none
            found = None
            halve_micro_batches(recipe, trainer)
            reset_peak_memory()
    seconds, there = found["seconds"], device_memory(recipe.training.device)
    time_needed = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
    say(
        f"preflight: loss {found['loss']:.3f} at the start; {found['steps']} steps, about {time_needed} and "
        f"the evaluations; the largest batch takes {found['peak_memory'] / 1e9:.1f} of {there / 1e9:.1f} GB"
    )
    return found


def measure(trainer: SharedPrefixRewardTrainer) -> dict[str, Any]:
    """Make steps on the largest batch, as it takes most memory, and on some that come as they come.

    The largest is made twice, with the optimizer's step between, as the second one meets what a training
    keeps: gradients of the micro-batch before, and the optimizer's state.
    """
    args, comparisons = trainer.args, len(trainer.train_dataset)
    batch = min(args.per_device_train_batch_size, comparisons)
    largest, _ = largest_micro_batch(trainer)
    loss = step(trainer, largest)
    check_gradients(trainer.model, trainer.modules_to_save)
    trainer.create_optimizer().step()
    step(trainer, largest)
    peak = peak_memory()
    trainer.model.zero_grad()
    rng, began = np.random.default_rng(args.seed), time.monotonic()
    for _ in range(TIMED):
        step(trainer, rng.choice(comparisons, batch, replace=False))
    seconds = (time.monotonic() - began) / TIMED * args.gradient_accumulation_steps
    steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    if steps == 1:  # a share of one step is rounded up to it, and its rate is 0
        args.warmup_steps = 0
    return {"loss": loss, "steps": steps, "seconds": seconds * steps, "peak_memory": peak}


def largest_micro_batch(trainer: SharedPrefixRewardTrainer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers of its train comparisons, and their sizes in tokens."""
    shared, split, collator = trainer.sharing.used, trainer.train_split, trainer.data_collator
    of_batch = split.largest(min(trainer.args.per_device_train_batch_size, len(split.comparisons)), shared)
    sizes = split.sizes(shared, padded=not shared)[of_batch]
    largest = max(collator.split(sizes), key=lambda part: collator.cost(sizes[part]))
    return of_batch[largest], sizes[largest]


def halve_micro_batches(recipe: Recipe, trainer: SharedPrefixRewardTrainer) -> None:
    """Let a micro-batch have half as many tokens as the largest has.

    Raises:
        RecipeError: that is one comparison.
    """
    _, sizes = largest_micro_batch(trainer)
    if len(sizes) == 1:
        raise RecipeError(f"preflight: {too_little(recipe, alone=True)}")
    tokens = trainer.data_collator.cost(sizes) // 2
    trainer.data_collator.budget = tokens
    recipe.data.micro_batch_tokens = recipe.values["micro_batch_tokens"] = tokens
    say(f"preflight: out of memory; micro-batches of up to {tokens} tokens instead")


def step(trainer: SharedPrefixRewardTrainer, rows: NDArray[np.int64]) -> float:
    """Forward and backward of the train comparisons with these numbers; their loss."""
    inputs = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset.select(rows))))
    scale = 2.0**10 if trainer.args.fp16 else 1.0  # for gradients too small for fp16, as training has one
    total = 0.0
    for part in inputs["micro_batches"]:
        with autocast_of(trainer.args):
            loss = trainer.compute_loss(trainer.model, part)
        (loss * scale).backward()
        total += float(loss.detach())
    if not math.isfinite(total):  # of all processes, which take the same comparisons
        trainer.count_comparisons()  # which names the rows
    trainer._uncounted.clear()
    return total


@contextlib.contextmanager
def as_before(trainer: SharedPrefixRewardTrainer) -> Iterator[None]:
    """What happens within leaves model, counts and random numbers of a trainer as they were."""
    model, arguments = trainer.model, trainer.args
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.detach().to("cpu", copy=True) for parameter in trained]
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
            for parameter, before in zip(trained, kept, strict=True):
                parameter.copy_(before)
        trainer.optimizer = None
        trainer._uncounted.clear()  # of a step that found no memory
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0


def check_gradients(model: torch.nn.Module, modules_to_save: list[str]) -> None:
    """Refuse a step in which an adapter or the head has no gradient.

    Of an adapter that factor counts that is 0 at the start, where it leaves the other without a gradient: B,
    and of embeddings A. An expert that no token was sent to has none, so experts are left out.

    Raises:
        TrainingError: naming them.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    without = []
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer) and "experts" not in name:
            zero_at_start = [*layer.lora_B.parameters(), *layer.lora_embedding_A.parameters()]
            if not any(has_gradient(parameter) for parameter in zero_at_start):
                without.append(name)
    for name in modules_to_save:
        trained = [p for p in base.get_submodule(name).parameters() if p.requires_grad]
        # A bias of the reward itself cancels in every comparison.
        if not trained or not all(has_gradient(weight) for weight in trained if weight.ndim > 1):
            without.append(name)
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        raise TrainingError(
            f"preflight: no gradient reaches {', '.join(without[:5])}{more}: training would leave them as "
            "they are. Name 'lora_target_modules' that leave them out, or set 'gradient_checkpointing: "
            "false', which may have cut them off; if neither helps, take another base"
        )


def has_gradient(parameter: torch.nn.Parameter) -> bool:
    """Whether a gradient has reached it that is not 0 everywhere."""
    return parameter.grad is not None and bool(parameter.grad.any())
