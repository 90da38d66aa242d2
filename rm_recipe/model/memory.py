"""What a training step will take of memory, known before it runs; and whether to checkpoint gradients.

Weights and the optimizer's state follow from the model's configuration. What the forward keeps for
the backward depends on too much to be a formula, so it is measured: the step runs on a copy of the
model with a few of its layers, on tensors that have shapes and no content (torch's fake tensors), and
every storage that comes alive is counted. All layers cost the same, so two sizes give any other.
"""

import os
import re
import resource
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification
from trl import ModelConfig, RewardConfig
from trl.trainer import disable_dropout_in_model

from rm_recipe.data.comparison import Encoded
from rm_recipe.data.dataset import Split
from rm_recipe.errors import RecipeError, one_line
from rm_recipe.model import cpu_attention, head, lora, reward_model, source, tokenizer
from rm_recipe.model.head import head_names
from rm_recipe.model.shared_prefix import decide_sharing, padded_rows, shared_rows
from rm_recipe.recipe.reader import Recipe, read_recipe, shipped
from rm_recipe.recipe.schema import CHECKPOINTING

LAYERS = (2, 4)  # of the copies that are measured
ADAMW_STATE = 8  # bytes for each trained parameter: two moments in fp32
QUANTISED_BYTES = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}
BLOCK, NESTED_BLOCK = 64, 256  # weights and scales that share a scale in bitsandbytes' 4 bits
# What a process has before and beside its tensors: Python and the libraries, a CUDA context.
PROCESS = 0.7e9
# Without and with checkpointing: measured as resident memory on SmolLM2-135M and MiniLM, glibc's heap.
HEAP_ON_CPU = (1.25, 4.5)
SCORING = 1e9  # for the activations of a batch without gradients, in fp32
SPARE = 0.1  # of a device's memory, for what an allocator cannot use
# Where Linux says which cgroups a process is in, and their limit, use and files in cache, by version.
MEMBERSHIP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
CGROUP_2 = ("memory.max", "memory.current", "inactive_file")


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
        float32: the weights of the merged model in fp32, in which an export is verified.
    """

    weights: int
    optimizer: int
    step: int
    heap: float = 1.0
    trained: int = 0
    float32: int = 0

    @property
    def evaluation(self) -> float:
        """What scoring takes, without gradients."""
        return self.weights + SCORING + PROCESS

    @property
    def export(self) -> float:
        """What an export takes where it is verified on the device."""
        return self.float32 * (1 + SPARE) + SCORING + PROCESS

    @property
    def peak(self) -> int:
        """All of it, with what a process takes besides."""
        return round(self.weights + self.optimizer + self.heap * self.step + PROCESS)

    def fits(self, memory: float) -> bool:
        """Whether a device with so many bytes will do."""
        return self.peak <= (1 - SPARE) * memory


def plan(
    config: Any,
    model: ModelConfig,
    training: RewardConfig,
    new_modules: Sequence[str],
    batch: Sequence[Encoded],
    *,
    shared: bool,
    checkpointing: bool,
    device: torch.device | None = None,
) -> MemoryPlan:
    """The memory of one training step.

    Args:
        config: of the one-label classifier, a transformers configuration.
        new_modules: trained in full beside LoRA, as `reward_model.load_base` finds them.
        batch: the comparisons of the largest batch.
        shared: whether they share prefixes.
        device: that it will run on, by default this machine's.
    """
    whole = _outline(config, model, training, new_modules)
    weights, dequantised = _weights(whole, model, new_modules)
    trained = [p for p in whole.parameters() if p.requires_grad]

    def step(layers: int | None) -> int:
        """Of so many layers, all by default."""
        outline = _outline(config, model, training, new_modules, layers)
        return _measure_step(outline, training, batch, shared, checkpointing)

    if lora.selects_layers(model):
        bytes_of_step: float = step(None)
    else:
        few, more = (step(layers) for layers in LAYERS)
        of_each = (more - few) / (LAYERS[1] - LAYERS[0])
        bytes_of_step = few + (config.get_text_config().num_hidden_layers - LAYERS[0]) * of_each
    return MemoryPlan(
        weights=round(weights),
        optimizer=ADAMW_STATE * sum(p.numel() for p in trained),
        step=round(bytes_of_step + dequantised),
        heap=HEAP_ON_CPU[checkpointing] if (device or training.device).type == "cpu" else 1.0,
        trained=sum(p.numel() * p.element_size() for p in trained),
        float32=4 * sum(p.numel() for p in whole.parameters()),
    )


def needs_checkpointing(
    config: Any,
    model: ModelConfig,
    training: RewardConfig,
    new_modules: Sequence[str],
    batch: Sequence[Encoded],
    *,
    shared: bool,
) -> tuple[bool, str]:
    """Whether a step fits the device only with gradient checkpointing, and why, in words.

    It makes a step about a third slower, so it is used where it is needed and where nothing is known.
    """
    memory = device_memory(training.device)
    needs = []
    for checkpointing in (False, True):
        try:
            planned = plan(
                config, model, training, new_modules, batch, shared=shared, checkpointing=checkpointing
            )
        except Exception as error:  # whatever a foreign architecture raises
            return True, f"what a step needs could not be planned: {type(error).__name__}: {one_line(error)}"
        needs.append(f"{planned.peak / 1e9:.1f}")
        if planned.fits(memory):
            break
    reason = f"the largest batch needs about {needs[-1]} of {memory / 1e9:.1f} GB"
    if not planned.fits(memory):
        reason += " even so: lower per_device_train_batch_size or max_length"
    elif checkpointing:
        reason += f", without it {needs[0]}"
    return checkpointing, reason


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


def _free_in_containers() -> Iterator[int]:
    """Of every cgroup around this process that has a limit, what is left of it; cached files can go."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, limit, used, cached = CGROUPS / "memory", *CGROUP_1
        elif not controllers:
            root, limit, used, cached = CGROUPS, *CGROUP_2
        else:
            continue
        inside = root / path.lstrip("/")  # which a container may not see: then its own is the root
        for folder in (inside, *(parent for parent in inside.parents if parent.is_relative_to(root))):
            try:
                most = (folder / limit).read_text().strip()
                counts = dict(each.split() for each in (folder / "memory.stat").read_text().splitlines())
                if most != "max":
                    yield int(most) - int((folder / used).read_text()) + int(counts.get(cached, 0))
            except OSError:
                continue


def float32_bytes(model: nn.Module) -> int:
    """What a model's weights take in fp32, those in 4 or 8 bits de-quantised."""
    return sum(4 * _numbers(parameter) for parameter in model.parameters())


def _numbers(parameter: nn.Parameter) -> int:
    packed = type(parameter).__name__ == "Params4bit"  # two in each byte
    return 2 * parameter.numel() * parameter.element_size() if packed else parameter.numel()


def fits_in_float32(weights: int, memory: float) -> bool:
    """Whether so many bytes of memory hold the weights and what scoring a batch by them takes besides."""
    return weights * (1 + SPARE) + SCORING <= memory


def _outline(
    config: Any,
    model: ModelConfig,
    training: RewardConfig,
    new_modules: Sequence[str],
    layers: int | None = None,
) -> nn.Module:
    """The model as it will be trained, with so many layers, without weights."""
    chosen = config._attn_implementation
    config = type(config).from_dict(config.to_dict())
    config.use_cache = False  # which checkpointing would warn about
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = (text.layer_types * layers)[:layers]
    with torch.device("meta"):
        dtype = getattr(torch, str(model.dtype), config.dtype) if model.use_peft else torch.float32
        outline = AutoModelForSequenceClassification.from_config(
            config, dtype=dtype, attn_implementation="eager" if chosen == "eager" else None
        )
        if chosen == cpu_attention.NAME:
            outline.set_attn_implementation(chosen)
        if training.disable_dropout:  # as the trainer does: attention with dropout keeps all its scores
            disable_dropout_in_model(outline)
        for name in new_modules:
            head.to_float32(outline, name)
        if not model.use_peft:
            return outline.train()
        half = training.bf16 or training.fp16
        return lora.add_lora(outline, model, list(new_modules), autocast=half).train()


def _weights(whole: Any, model: ModelConfig, new_modules: Sequence[str]) -> tuple[float, float]:
    """Bytes of all parameters as stored, and of the largest one that is de-quantised on the way."""
    kind = model.bnb_4bit_quant_type if model.load_in_4bit else "int8" if model.load_in_8bit else None
    if kind is None:
        return sum(p.numel() * p.element_size() for p in whole.parameters()), 0
    quantised = {
        id(module.weight): module.weight
        for name, module in whole.base_model.named_modules()
        if isinstance(module, nn.Linear)
        and not module.weight.requires_grad
        and not any(f".{name}.".find(f".{new}.") >= 0 for new in new_modules)
    }
    each = QUANTISED_BYTES[kind]
    if model.load_in_4bit:
        each += (1 + 4 / NESTED_BLOCK if model.use_bnb_nested_quant else 4) / BLOCK
    size = sum(p.numel() * (each if id(p) in quantised else p.element_size()) for p in whole.parameters())
    return size, max(p.numel() * p.element_size() for p in quantised.values())


def _measure_step(
    outline: Any, training: RewardConfig, batch: Sequence[Encoded], shared: bool, checkpointing: bool
) -> int:
    """Peak bytes of two micro-batches' forward and backward beside the weights."""
    by_block = cpu_attention.by_block(outline)
    rows = shared_rows(batch, 0, by_block) if shared else padded_rows(batch, 0)
    rows.pop("ends", None)  # the reward head weighs nothing
    blocks = cpu_attention.blocks_of(rows["attention_mask"]) if shared and by_block else []
    if checkpointing:
        outline.gradient_checkpointing_enable({"use_reentrant": False})
    half = torch.bfloat16 if training.bf16 else torch.float16
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, lora.in_one_product(outline):
        _to_fake(outline)
        inputs = {name: mode.from_tensor(tensor) for name, tensor in rows.items()}
        if blocks:
            cpu_attention.announce_blocks(
                inputs["attention_mask"], [mode.from_tensor(each) for each in blocks]
            )
        live = _LiveBytes()
        for parameter in outline.parameters():
            live.count(parameter)
        weights = live.now
        with live:
            for _ in range(2):  # in the second, the gradients of the first are there
                with torch.autocast("cpu", half, enabled=training.bf16 or training.fp16):
                    outline(**inputs).logits.float().sum().backward()
        return live.peak - weights


def _to_fake(module: nn.Module) -> None:
    """Puts fake tensors on the CPU in the place of a module's tensors, tied ones once."""
    fakes: dict[int, Any] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty_like(tensor, device="cpu")
                    fakes[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad) if tensors is part._parameters else fake
                    )
                tensors[name] = fakes[id(tensor)]


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that are alive, `now` and at their `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Adds a tensor's storage, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_memory() -> int:
    """Peak memory of this process in bytes: the accelerator's where it counts it, else resident memory."""
    if _counts_memory():
        return int(torch.accelerator.max_memory_allocated())
    with suppress(OSError):  # other than `getrusage`, it can be reset, and knows nothing of who started us
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _counts_memory() -> bool:
    """Whether there is an accelerator with memory of its own; Apple's is the machine's."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type != "mps"


def reset_peak_memory() -> None:
    """What is taken now is the peak from here on, where the system can do that."""
    if _counts_memory():
        torch.accelerator.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# --- what fits a device ------------------------------------------------------------------------
# All of it by the memory plan (`plan`), from the model's configuration alone: no weights are read.

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

    def step_of(n: int, checkpointing: bool) -> MemoryPlan:
        try:
            return plan(
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
    without = step_of(n, False) if not said else None
    checkpointing = bool(said) or (said is None and without is not None and not without.fits(memory_bytes))
    planned = without if without is not None and not checkpointing else step_of(n, True)
    fitting, too_many = (n, LARGEST + 1 if larger else n + 1) if planned.fits(memory_bytes) else (0, n)
    while too_many - fitting > 1:
        middle = min(
            (fitting + too_many) // 2, max(2 * fitting, 1)
        )  # doubling: plans of large batches are slow
        if step_of(middle, checkpointing).fits(memory_bytes):
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
    config = source.load_config(name, revision)
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
    there = device_memory(device)
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
