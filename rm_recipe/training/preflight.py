"""A real training step before training: it must not start if it cannot finish, or cannot learn.

The step is made on the largest batch of the data, by the trainer that will train, and undone: parameters,
random numbers and counts are as they were, so a run is the same with it and without.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers.trainer_utils import IntervalStrategy

from rm_recipe.data.dataset import Split
from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.model.memory import ADAMW_STATE, device_memory, peak_memory, too_little
from rm_recipe.processes import is_out_of_memory, say
from rm_recipe.recipe.reader import Recipe
from rm_recipe.training.checkpoints import checkpoints
from rm_recipe.training.distributed import autocast_of, without_random_numbers
from rm_recipe.training.trainer import COLUMNS, SharedPrefixRewardTrainer

TIMED = 3  # batches, as they come, whose time is measured
FAR_FROM_START = 0.5  # of the loss of an untrained model, beyond which something is odd
SMALL_FILES = 30e6  # bytes of tokenizer, reports and predictions
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
    new_modules: list[str],
    train_split: Split,
    test: Split,
) -> Preflight | None:
    """Makes a training step on the largest batch and undoes it.

    Args:
        new_modules: the head, and whatever else is trained in full beside LoRA.

    Returns:
        what it has shown; None where the model will be sharded over processes, which happens in training.

    Raises:
        RecipeError: the disk is too small, or the step does not fit the device's memory.
        TrainingError: the loss is not finite, or no gradient reaches the head or an adapter.
    """
    check_disk(recipe, trainer)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        say("preflight: disk only; the model is sharded when training begins")
        return None
    training, device = recipe.training, trainer.args.device
    sizes = train_split.sizes(trainer.data_collator.share)
    with as_before(trainer):
        loss, peak, of_a_token = measure(recipe, trainer, new_modules, train_split, sizes)
    steps, epochs = length(trainer)
    tokens = sizes.sum() * epochs
    # An evaluation is a forward, about a third of a step.
    evaluations = times(training.eval_strategy, training.eval_steps, steps, epochs)
    tokens += test.sizes(trainer.data_collator.share).sum() / 3 * evaluations
    seconds = of_a_token * tokens / training.world_size
    result = Preflight(loss, steps, float(seconds), peak, device_memory(device))
    warn(result, recipe, device)
    return result


def measure(
    recipe: Recipe,
    trainer: SharedPrefixRewardTrainer,
    new_modules: list[str],
    split: Split,
    sizes: NDArray[np.int64],
) -> tuple[float, int, float]:
    """`steps_of` the recipe's batch.

    Raises:
        RecipeError: they do not fit the device's memory.
    """
    n, seed = recipe.training.per_device_train_batch_size, recipe.training.seed
    try:
        return steps_of(trainer, new_modules, split, sizes, n, np.random.default_rng(seed))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    trainer.model.zero_grad()
    trainer.optimizer = None
    clear_device_cache(garbage_collection=True)
    raise RecipeError(f"preflight: {too_little(recipe, trainer, new_modules, split)}")


def steps_of(
    trainer: SharedPrefixRewardTrainer,
    new_modules: list[str],
    split: Split,
    sizes: NDArray[np.int64],
    n: int,
    rng: np.random.Generator,
) -> tuple[float, int, float]:
    """Steps of n comparisons: the largest, as they take most memory, and some that come as they come.

    The largest is made twice, with the optimizer's step between, as the second one meets what a training
    keeps: gradients of the micro-batch before, and the optimizer's state.

    Args:
        sizes: tokens of each comparison.

    Returns:
        the first loss, the peak of memory in bytes, and the seconds that a token takes.
    """
    largest = split.largest(n, trainer.data_collator.share)
    loss = step(trainer, split, largest)
    check_gradients(trainer.model, new_modules)
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


# --- will it learn ---------------------------------------------------------------------------


def check_gradients(model: torch.nn.Module, new_modules: list[str]) -> None:
    """That every adapter and the head have a gradient, and what is frozen has none.

    Of an adapter that is B's: at the start B is 0, and A's gradient with it. An expert that no token was
    sent to has none, so where there are experts they are left out.

    Raises:
        TrainingError: naming them.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model

    def moved(parameter: torch.nn.Parameter) -> bool:
        return parameter.grad is not None and bool(parameter.grad.any())

    without = [
        name
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer) and "experts" not in name
        for up in (*layer.lora_B.values(), *layer.lora_embedding_B.values())
        if not any(
            moved(parameter)
            for parameter in ([up] if isinstance(up, torch.nn.Parameter) else up.parameters())
        )
    ]
    for name in new_modules:
        trained = [p for p in base.get_submodule(name).parameters() if p.requires_grad]
        # A bias of the reward itself cancels in every comparison.
        if not trained or not all(moved(weight) for weight in trained if weight.ndim > 1):
            without.append(name)
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        raise TrainingError(
            f"preflight: no gradient reaches {', '.join(without[:5])}{more}: training would leave them as "
            f"they are; {_remedy(base, without, new_modules)}"
        )
    frozen = [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
    if frozen:
        raise TrainingError(f"preflight: {frozen[0]} is frozen and has a gradient")


def _remedy(base: torch.nn.Module, without: list[str], new_modules: list[str]) -> str:
    """What to do about modules that no gradient reaches."""
    adapted = [name for name, layer in base.named_modules() if isinstance(layer, LoraLayer)]
    reached = [name for name in adapted if name not in without]
    if not reached and getattr(base, "is_gradient_checkpointing", False):
        return "set 'gradient_checkpointing: false' (or activation_checkpointing), which may cut them off"
    if not reached or set(without) & set(new_modules):
        return "this base computes its rewards without them, so take another one"
    # Adapters on what the forward passes over: the shortest names that leave these out.
    names = list(dict.fromkeys(_ending(name, without) for name in reached))
    if len(names) > 12:
        return f"name 'lora_target_modules' that leave out {without[0]}"
    return f"set 'lora_target_modules: [{', '.join(names)}]', which leaves them out"


def _ending(name: str, others: list[str]) -> str:
    """The shortest ending of a module's name that none of the others has, as LoRA's targets are matched."""
    parts = name.split(".")
    endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
    return next(end for end in endings if not any(f".{other}".endswith(f".{end}") for other in others))


def warn(result: Preflight, recipe: Recipe, device: torch.device) -> None:
    """Says what is odd about a step, though it can be made."""
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


# --- will it finish --------------------------------------------------------------------------


def length(trainer: SharedPrefixRewardTrainer) -> tuple[int, float]:
    """Optimizer steps of a training, as Trainer counts them, and its epochs."""
    _, of_epoch, *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return steps, steps / of_epoch


def times(strategy: str, every: float, steps: int, epochs: float) -> float:
    """How often something happens in a training: `every` so many steps, or a share of them."""
    if strategy == IntervalStrategy.STEPS:
        return steps / every if every >= 1 else 1 / every
    return 0 if strategy == IntervalStrategy.NO else epochs


def check_disk(recipe: Recipe, trainer: SharedPrefixRewardTrainer) -> None:
    """That checkpoints, the trained model and its export find room where the run goes.

    Raises:
        RecipeError: naming what takes how much, and what there is.
    """
    training, folder = recipe.training, recipe.output_dir
    parameters = list(trainer.model.named_parameters())
    trained = sum(p.numel() * p.element_size() for _, p in parameters if p.requires_grad)
    state = ADAMW_STATE * sum(p.numel() for _, p in parameters if p.requires_grad)
    checkpoint = trained + state + SMALL_FILES
    saves = times(training.save_strategy, training.save_steps, *length(trainer))
    # One at least, where a signal asks for it; the oldest goes after the newest has come; the best stays.
    limit = (training.save_total_limit or math.inf) + bool(training.load_best_model_at_end)
    kept = min(max(math.ceil(saves), 1), limit + 1)
    export = sum(
        p.numel() * (2 if training.bf16 or training.fp16 else 4) for p in whole_weights(trainer.model)
    )
    needed = kept * checkpoint + trained + export + 2 * SMALL_FILES
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    there = sum(
        file.stat().st_size for path in checkpoints(folder) for file in path.rglob("*") if file.is_file()
    )
    free = shutil.disk_usage(place).free + there
    if needed > free:
        raise RecipeError(
            f"{folder}: the run needs about {needed / 1e9:.1f} GB there ({kept:.0f} checkpoint(s) of "
            f"{checkpoint / 1e9:.2f}, its export of {export / 1e9:.2f}), and {free / 1e9:.1f} are free; "
            "'save_total_limit: 2' keeps fewer checkpoints, --output_dir takes another disk"
        )


def whole_weights(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The weights that an export has: of a quantised layer as many as it stands for."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "original_module" in name:
            continue
        state = getattr(parameter, "quant_state", None)
        yield torch.empty(state.shape, device="meta") if state is not None else parameter
