"""Plan the peak memory of a training step before it runs, and decide on gradient checkpointing by it.

Weights and the optimizer's state follow from the model's configuration. What the forward keeps for
the backward depends on too much to be a formula, so it is measured: the step runs on a copy of the
model with a few of its layers, on tensors that have shapes and no content (torch's fake tensors), and
every storage that comes alive is counted. All layers cost the same, so two sizes give any other.
"""

import gc
import os
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, RewardConfig
from trl.trainer import disable_dropout_in_model

from rm_recipe.data.comparison import Encoded
from rm_recipe.errors import RecipeError, one_line
from rm_recipe.model import head, kernels, lora, reward_model, row_attention, shared_prefix
from rm_recipe.recipe.reader import Recipe
from rm_recipe.recipe.schema import CHECKPOINTING

LAYERS = (2, 4)  # of the copies that are measured
ADAMW_STATE = 8  # bytes for each trained parameter: two moments in fp32
FOUR_BITS = 0.5 + 4 / 64  # bytes of a weight: in bitsandbytes' 4 bits 64 share a scale in fp32, or in less
# What a process has before and beside its tensors: Python and the libraries, a CUDA context.
PROCESS = 0.7e9
# Without and with checkpointing: measured as resident memory on SmolLM2-135M and MiniLM, glibc's heap.
HEAP_ON_CPU = (1.25, 4.5)
# Of a device's memory, for what an allocator cannot use: torch's was seen to hold 1.18 times what was in use.
SPARE = 0.15
OWN_ATTENTION = ("eager", row_attention.NAME)  # what is planned otherwise than by transformers' default
LARGEST = 128  # comparisons per device; nobody needs more
# Where Linux says which cgroup (of version 2) a process is in, and where they are.
MEMBERSHIP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """The peak of a training step, in bytes, by what it consists of.

    Attributes:
        weights: of the base and what is trained, as stored on the device.
        trained: what of these is trained: adapters and head, or all.
        optimizer: AdamW's two moments.
        step: gradients, what the forward keeps for the backward, and what both need on the way, for the
            largest batch.
        heap: by how much an allocator multiplies what a step asks of it.
    """

    weights: int
    optimizer: int
    step: int
    heap: float = 1.0
    trained: int = 0

    @property
    def peak(self) -> int:
        """All of it, with what a process takes besides."""
        return round(self.weights + self.optimizer + self.heap * self.step + PROCESS)

    def fits(self, memory: float) -> bool:
        """Whether a device with so many bytes will do."""
        return self.peak <= (1 - SPARE) * memory


@dataclass(frozen=True)
class Fit:
    """Whether a recipe's training step fits, and what would.

    Attributes:
        plan: of the recipe's batch, or of the largest micro-batch that fits; with gradient checkpointing if
            the recipe says so or, where it says nothing, if one comparison does not fit without.
        largest: comparisons of the largest micro-batch that fits so; 0 if not even one does.
        lower: the keys to change where the recipe does not fit.
    """

    memory: float
    checkpointing: bool
    plan: MemoryPlan
    largest: int
    lower: str

    @property
    def fits(self) -> bool:
        """Whether the recipe can be trained as it stands."""
        return self.largest > 0

    def __str__(self) -> str:
        needed = f"{self.plan.peak / 1e9:.1f} of {self.memory / 1e9:.1f} GB"
        said = f"the largest micro-batch needs about {needed} by the plan"
        return said if self.fits else f"{said}; take {self.lower}"


# --- one step -----------------------------------------------------------------------------------


def plan(
    config: Any,
    model: ModelConfig,
    training: RewardConfig,
    modules_to_save: Sequence[str],
    batch: Sequence[Encoded],
    *,
    shared: bool,
    checkpointing: bool,
    device: torch.device | None = None,
) -> MemoryPlan:
    """Plan the memory of one training step.

    Args:
        config: of the one-label classifier, a transformers configuration.
        modules_to_save: trained in full beside LoRA, as `reward_model.load_base` finds them.
        batch: the comparisons of the largest batch.
        shared: whether they share prefixes.
        device: that it will run on, by default this machine's.
    """
    outline = partial(_outline, config, model, training, modules_to_save)
    device = device or training.device
    step = partial(_measure_step, training, batch, shared, checkpointing, device)
    whole = outline()
    weights, dequantised = _weights(whole, config, model)
    trained = [p for p in whole.parameters() if p.requires_grad]
    if lora.selects_layers(model):
        bytes_of_step: float = step(outline())
    else:
        few, more = (step(outline(layers)) for layers in LAYERS)
        of_each = (more - few) / (LAYERS[1] - LAYERS[0])
        bytes_of_step = few + (config.get_text_config().num_hidden_layers - LAYERS[0]) * of_each
    return MemoryPlan(
        weights=round(weights),
        optimizer=ADAMW_STATE * sum(p.numel() for p in trained),
        step=round(bytes_of_step + dequantised),
        heap=HEAP_ON_CPU[checkpointing] if device.type == "cpu" else 1.0,
        trained=sum(p.nbytes for p in trained),
    )


def _outline(
    config: Any, model: ModelConfig, training: RewardConfig, new: Sequence[str], layers: int | None = None
) -> nn.Module:
    """Build the model as it will be trained, with so many layers (by default all), without weights."""
    chosen = config._attn_implementation
    config = type(config).from_dict(config.to_dict())
    config.use_cache = False  # which checkpointing would warn about
    vars(config).pop("quantization_config", None)
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = (text.layer_types * layers)[:layers]
    with torch.device("meta"):
        dtype = getattr(torch, str(model.dtype), config.dtype) if model.use_peft else torch.float32
        outline = AutoModelForSequenceClassification.from_config(
            config, dtype=dtype, attn_implementation=chosen if chosen in OWN_ATTENTION else None
        )
        if training.disable_dropout:  # as the trainer does: attention with dropout keeps all its scores
            disable_dropout_in_model(outline)
        for name in new:
            head.to_float32(outline, name)
        reward_model.add_reward_positions(outline)
        if model.use_peft:
            half = training.bf16 or training.fp16
            outline = lora.add_lora(outline, model, list(new), autocast=half)
        return outline.train()


def _weights(whole: Any, config: Any, model: ModelConfig) -> tuple[float, float]:
    """Bytes of all parameters as stored, and of the largest one that is de-quantised on the way."""
    stored = sum(p.nbytes for p in whole.parameters())
    comes = config.to_dict().get("quantization_config", {})
    bits = next((n for n in (4, 8) if getattr(model, f"load_in_{n}bit") or comes.get(f"load_in_{n}bit")), 0)
    if not bits:
        return stored, 0
    each = FOUR_BITS if bits == 4 else 1.0
    layers = [layer for layer in whole.base_model.modules() if isinstance(layer, (nn.Linear, Conv1D))]
    body = [layer.weight for layer in layers if not head.is_head_layer(layer)]
    quantised = [weight for weight in body if not weight.requires_grad]
    saved = sum(weight.nbytes - weight.numel() * each for weight in quantised)
    return stored - saved, max(weight.nbytes for weight in quantised)


def _measure_step(
    training: RewardConfig,
    batch: Sequence[Encoded],
    shared: bool,
    checkpointing: bool,
    device: torch.device,
    outline: Any,
) -> int:
    """Peak bytes of two micro-batches' forward and backward beside the weights."""
    by_block = row_attention.by_block(outline)
    rows = shared_prefix.shared_rows(batch, 0, by_block) if shared else shared_prefix.padded_rows(batch, 0)
    on_gpu, labels = device.type == "cuda", rows["attention_mask"]
    row = row_attention.Row(labels, on_gpu) if shared and by_block else None
    if training.use_liger_kernel:
        kernels.keep_as_fused(outline)
    if checkpointing:
        outline.gradient_checkpointing_enable({"use_reentrant": False})
    half = torch.bfloat16 if training.bf16 else torch.float16
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, lora.in_one_product(outline):
        outline.to_empty(device="cpu").tie_weights()
        inputs = {name: mode.from_tensor(tensor) for name, tensor in rows.items()}
        if row:
            row_attention.announce_rows(inputs["attention_mask"], row)
        live = _LiveBytes()
        for parameter in outline.parameters():
            live.count(parameter)
        weights = live.now
        with live:
            for _ in range(2):  # in the second, the gradients of the first are there
                with torch.autocast("cpu", half, enabled=training.bf16 or training.fp16):
                    outline(**inputs).logits.float().sum().backward()
        return live.peak - weights


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of the storages that are alive, `now` and at their `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._sizes: dict[int, int] = {}

    @property
    def now(self) -> int:
        return sum(self._sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Add a tensor's storage, until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._sizes.pop, storage._cdata)


# --- what fits a device -------------------------------------------------------------------------


def fit(
    config: Any,
    recipe: Recipe,
    modules_to_save: Sequence[str],
    batch_of: Callable[[int], Sequence[Encoded]],
    *,
    shared: bool,
    device: torch.device,
    memory_bytes: float,
    larger: bool = True,
    divide: bool = True,
) -> Fit:
    """Plan a recipe's training step on a device.

    Args:
        config: of the one-label classifier.
        batch_of: the largest batch of so many comparisons.
        larger: look for the largest batch that fits where the recipe's does, which takes long.
        divide: take micro-batches where whole batches do not fit; stock TRL cannot.

    Raises:
        RecipeError: the step cannot be planned.
    """
    n = recipe.training.per_device_train_batch_size

    @cache
    def planned(size: int, checkpointing: bool) -> MemoryPlan:
        parts = (config, recipe.model, recipe.training, modules_to_save, batch_of(size))
        try:
            return plan(*parts, shared=shared, checkpointing=checkpointing, device=device)
        except Exception as error:  # whatever a foreign architecture raises
            what = f"what a step of this {config.model_type} needs could not be planned"
            raise RecipeError(f"{what}: {type(error).__name__}: {one_line(error)}") from error

    def largest(checkpointing: bool) -> int:
        found = _largest(lambda size: planned(size, checkpointing).fits(memory_bytes), n, larger)
        return found if divide or found >= n else 0

    checkpointing = any(getattr(recipe.training, key) for key in CHECKPOINTING)
    settled = any(key in recipe.values for key in CHECKPOINTING)
    found = largest(checkpointing and settled)
    if not settled:
        checkpointing = not found
        found = found or largest(True)
    lower = _what_to_lower(recipe, checkpointing)
    return Fit(memory_bytes, checkpointing, planned(min(found or 1, n), checkpointing), found, lower)


def _largest(fits: Callable[[int], bool], n: int, larger: bool) -> int:
    """The most comparisons that fit, of n, or of `LARGEST` if larger ones than n are looked for."""
    fitting, too_many = (n, LARGEST + 1 if larger else n + 1) if fits(n) else (0, n)
    while too_many - fitting > 1:
        # At most doubled, as plans of large batches are slow.
        middle = min((fitting + too_many) // 2, max(2 * fitting, 1))
        if fits(middle):
            fitting = middle
        else:
            too_many = middle
    return fitting


def _what_to_lower(recipe: Recipe, checkpointing: bool) -> str:
    """What to take where not one comparison fits."""
    if not checkpointing:
        return "gradient_checkpointing: true or a lower max_length"
    model = recipe.model
    if model.load_in_4bit or model.load_in_8bit:
        return "a lower max_length"
    return f"a lower max_length or {'load_in_4bit' if model.use_peft else 'use_peft'}: true"


def too_little(recipe: Recipe, alone: bool = False) -> str:
    """Say, where a step has found no memory, what to lower.

    Args:
        alone: the step was of one comparison.
    """
    training, data = recipe.training, recipe.data
    n, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if data.micro_batch_tokens and not alone:  # a smaller batch would have micro-batches as large
        smaller = f"micro_batch_tokens: {max(data.micro_batch_tokens // 2, 1)}"
    elif n > 1 and not alone:
        batch = next(size for size in range(n - 1, 0, -1) if n * accumulation % size == 0)
        smaller = f"per_device_train_batch_size: {batch}"
        if not data.comparisons_per_step:  # from which the accumulation follows
            smaller += f" with gradient_accumulation_steps: {n * accumulation // batch}"
    elif any(getattr(training, key) for key in CHECKPOINTING):
        smaller = "a lower max_length"
    else:
        smaller = "gradient_checkpointing: true or a lower max_length"
    said = f"{training.device.type.upper()} out of memory: take {smaller}"
    return f"{said}; `rm-recipe check --plan` says what fits"


# --- what a device has, and what was taken of it -------------------------------------------------


def device_memory(device: torch.device) -> int:
    """Bytes of a device that this process may have: what is free, and what it has of it already.

    On a CPU that is its part of what the machine and its container (a cgroup with a limit) leave.
    """
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    if device.type != "cpu":
        free, _ = torch.accelerator.get_memory_info(device)
        return int(free + torch.accelerator.memory_reserved(device))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = min([int(psutil.virtual_memory().available), *_free_in_containers()])
    return max(free, 0) // processes + int(psutil.Process().memory_info().rss)


def _free_in_containers() -> list[int]:
    """What is left of each cgroup around this process that has a limit; cached files can go."""
    found: list[int] = []
    with suppress(OSError):  # no Linux
        own = CGROUPS / MEMBERSHIP.read_text().rpartition("0::/")[2].strip()
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):  # hidden from the container, or "max"
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free = int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
                found.append(free + int(counts["inactive_file"]))
    return found


def peak_memory() -> int:
    """Peak memory of this process in bytes: the accelerator's where it counts and has any, else resident."""
    if _counts_memory() and (peak := torch.accelerator.max_memory_allocated()):
        return int(peak)
    with suppress(OSError):  # other than `getrusage`, it can be reset, and knows nothing of who started us
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))  # Windows


def reset_peak_memory() -> None:
    """Make what is taken now the peak from here on, where the system can do that."""
    if _counts_memory():
        torch.accelerator.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def free_unused() -> None:
    """Give back what nothing uses any more: a dropped model is a circle, its own forward bound to it."""
    gc.collect()
    if _counts_memory():
        torch.accelerator.empty_cache()


def _counts_memory() -> bool:
    """Whether there is an accelerator with memory of its own; Apple's is the machine's."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type != "mps"
