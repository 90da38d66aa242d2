"""Adapters: those that there are, what they are on, and LoRA by TRL's keys, at less cost than PEFT's own."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from rm_recipe.errors import RecipeError, RmRecipeError, TrainingError, one_line
from rm_recipe.files import LFS_POINTER, holds, is_lfs_pointer
from rm_recipe.model.head import Float32Linear, outermost, read_own_precision, saved_tensors
from rm_recipe.processes import is_out_of_memory

ALL_LINEAR = "all-linear"
HALF = (torch.bfloat16, torch.float16)


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Within it, what cannot be read is told in one sentence.

    Raises:
        RecipeError: with `what` and the reason.
    """
    try:
        yield
    except Exception as error:  # whatever half a file, or the Hub, makes the libraries raise
        machine = is_out_of_memory(error) or getattr(error, "errno", None) == errno.ENOSPC
        if machine or isinstance(error, RmRecipeError):
            raise  # no fault of what the user has named, or told already
        hint = "; without the Hub name a folder, such as `rm-recipe prepare offline` makes"
        raise RecipeError(f"{what}: {one_line(error)}{hint * ('connect' in str(error))}") from None


def load_config(name: str, revision: str = "main") -> Any:
    """Load a model's configuration, of an adapter without one its base's.

    Raises:
        RecipeError: nothing can be loaded under that name.
    """
    adapter = adapter_config(name, revision)
    with readable(f"'model_name_or_path: {name}' cannot be loaded"):
        if adapter is not None and not holds(name, "config.json", revision):
            name, revision = adapter.base_model_name_or_path, adapter.revision or "main"
        # Left unsaid, transformers asks at the terminal whether to run a model's own code.
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def adapter_config(name: str, revision: str = "main") -> PeftConfig | None:
    """What PEFT knows of an adapter, in a folder or on the Hub; None where `name` is no adapter.

    Raises:
        RecipeError: it cannot be read, the Hub has nothing under that name, or a file of the folder is not
            there but a Git LFS pointer to it.
    """
    with readable(f"'model_name_or_path: {name}' cannot be loaded"):
        for path in filter(Path.is_file, sorted(Path(name).glob("*"))):
            if is_lfs_pointer(path):
                raise RecipeError(f"'{path}' {LFS_POINTER}")
        found = holds(name, "adapter_config.json", revision)
        return PeftConfig.from_pretrained(name, revision=revision) if found else None


def sft_adapter(name: str, revision: str = "main") -> PeftConfig | None:
    """`adapter_config` of a language model's adapter.

    Raises:
        RecipeError: it is a classifier's.
    """
    adapter = adapter_config(name, revision)
    if adapter is not None and adapter.task_type == "SEQ_CLS":
        fault = f"'model_name_or_path: {name}' is the adapter of a classifier, perhaps of a reward model"
        raise RecipeError(f"{fault}; to train that further, start from its export")
    return adapter


def add_lora(
    model: PreTrainedModel, config: ModelConfig, modules_to_save: list[str], autocast: bool
) -> PeftModel:
    """Wrap the model for LoRA by TRL's keys; `modules_to_save` are trained in full.

    Args:
        autocast: whether training computes in half precision (`bf16` or `fp16`).

    Raises:
        RecipeError: PEFT refuses it.
    """
    settings = lora_config(config, modules_to_save)
    settings.exclude_modules = _beside_text(model)
    linear_layers = _linear_layers(model)  # before PEFT puts others in their places
    try:
        wrapped = get_peft_model(model, settings, revision=config.model_revision)
    except (ValueError, re.error) as error:
        advice = "set 'lora_dropout: 0'" if "lora_dropout" in str(error) else linear_layers
        pattern = f" by 'lora_target_modules: {config.lora_target_modules}'" * isinstance(error, re.error)
        raise RecipeError(f"LoRA cannot be added{pattern}: {one_line(error)}; {advice}") from None
    train_in_float32(wrapped)
    if autocast:
        keep_activations_in_half(wrapped)
    return wrapped


def _linear_layers(model: PreTrainedModel) -> str:
    body = model.base_model.named_modules()
    names = {name.rpartition(".")[2] for name, layer in body if isinstance(layer, (nn.Linear, Conv1D))}
    return f"its linear layers are {', '.join(sorted(names))}"


def _beside_text(model: PreTrainedModel) -> str | None:
    """A regular expression of the modules that read no text, as Gemma 3's vision tower; None if all do.

    No gradient would reach their adapters.
    """
    config = model.config
    if config.get_text_config() is config:
        return None
    text = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is text)
    return rf"(?!{re.escape(name)}\.).*"


def check_target_modules(model: PreTrainedModel, config: ModelConfig) -> None:
    """Refuse names of LoRA's modules that match nothing; PEFT minds only if all `lora_target_modules` do.

    Args:
        model: with or without weights.

    Raises:
        RecipeError: naming one, and those that there are.
    """
    targets, modules = target_modules(config), [name for name, _ in model.named_modules()]
    for key, wanted, known in (
        ("lora_target_modules", targets if isinstance(targets, list) else [], modules),
        ("lora_modules_to_save", config.lora_modules_to_save or [], modules),
        ("lora_target_parameters", config.lora_target_parameters or [], dict(model.named_parameters())),
    ):
        for part in wanted:
            if not any(f".{name}".endswith(f".{part}") for name in known):
                raise RecipeError(f"'{key}': the model has no {part}; {_linear_layers(model)}")


def target_modules(config: ModelConfig) -> str | list[str]:
    """The layers that get adapters: all linear ones by default, else names, or a regular expression.

    TRL makes a text of a list with one name, which PEFT takes for a regular expression of the whole path.
    """
    wanted = config.lora_target_modules or ALL_LINEAR
    if str(wanted).lower() == ALL_LINEAR:
        return ALL_LINEAR
    return [wanted] if isinstance(wanted, str) and re.fullmatch(r"[\w.]+", wanted) else wanted


def selects_layers(config: ModelConfig) -> bool:
    """Whether a regular expression says which of the layers get adapters."""
    wanted = target_modules(config)
    return bool(config.use_peft) and isinstance(wanted, str) and wanted != ALL_LINEAR


def lora_config(config: ModelConfig, modules_to_save: list[str]) -> LoraConfig:
    """PEFT's settings by TRL's keys."""
    settings = cast(LoraConfig, get_peft_config(config))
    settings.task_type = TaskType.SEQ_CLS
    targets = target_modules(config)
    settings.target_modules = set(targets) if isinstance(targets, list) else targets
    settings.modules_to_save = outermost([*modules_to_save, *(config.lora_modules_to_save or [])])
    return settings


def untrained_layers(folder: Path) -> list[str]:
    """The layers whose saved adapters add nothing: B is still 0, where LoRA starts, or empty.

    No gradient reaches some layers of some models, such as an expert that no token was sent to.

    Raises:
        TrainingError: there are adapters, and all are like that; sharded training saved such (trl#939).
    """
    saved = saved_tensors(folder, r"\.lora_B\.")
    untrained = [name for name, up in saved.items() if not up.any()]
    if untrained and len(untrained) == len(saved):
        raise TrainingError(f"every LoRA adapter saved in {folder} is zero or empty: nothing was learnt")
    return [name.partition(".lora_B.")[0].removeprefix("base_model.model.") for name in untrained]


def train_in_float32(model: nn.Module) -> None:
    """Make what is trained in full beside LoRA (`lora_modules_to_save`) fp32.

    PEFT does so for adapters alone. The layers around are in half precision, and are given that.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copy in wrapper.modules_to_save.values():
                for layer, original in zip(copy.modules(), wrapper.original_module.modules(), strict=True):
                    if any(weight.dtype in HALF for weight in original.parameters(recurse=False)):
                        layer.float()
                        layer.register_forward_pre_hook(read_own_precision)
                        layer.register_forward_hook(partial(_give_precision_of, original))


def _give_precision_of(original: nn.Module, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output.to(next(original.parameters(recurse=False)).dtype)


def keep_activations_in_half(model: nn.Module) -> None:
    """Stop PEFT from casting every activation to the adapters' fp32.

    The adapters (and the optimizer's state) stay fp32; autocast casts the small weights instead of
    the large activations, which makes a step about a sixth faster on CPU.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010 - Module types it a tensor


@contextmanager
def in_one_product(model: nn.Module) -> Iterator[None]:
    """Within it, plain LoRA layers add B(A(x)) to their output as part of the product with B.

    PEFT computes the product, scales it and adds it: three passes over the whole output, two of which
    return in backward. Here the scale goes to A(x), which is `lora_r` wide.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        and not layer.lora_variant  # DoRA and the like compute something else
        and all(isinstance(up, nn.Linear) and up.bias is None for up in layer.lora_B.values())
    ]
    for layer in layers:
        layer.lora_variant.update(dict.fromkeys(layer.lora_B, _OneProduct))
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_variant.clear()


class _OneProduct:
    """In the place of a `peft.tuners.lora.layer.LoraVariant`."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """`result` (..., out) plus what the adapter makes of `x` (..., in)."""
        up = module.lora_B[active_adapter]
        hidden = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        hidden = hidden * module.scaling[active_adapter]
        if hidden.dtype != result.dtype:
            return result + up(hidden)
        # In place where nothing goes back through it: a view that is changed costs a copy in backward.
        add = torch.addmm if torch.is_grad_enabled() else torch.Tensor.addmm_
        weight = up.weight.to(hidden.dtype).T
        return add(result.flatten(0, -2), hidden.flatten(0, -2), weight).view_as(result)


# --- a base in 4 or 8 bits (QLoRA, arXiv 2305.14314), its head left whole ----------------------


def keep_layout(model: nn.Module) -> None:
    """Stop bitsandbytes 0.50 from repacking 4-bit weights on a CPU with AVX512-BF16.

    Its first forward without gradients repacks them in place; what follows (gradients through the
    adapters, `dequantize()`) is then wrong without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def dequantize(model: PreTrainedModel, device: torch.device | None = None) -> None:
    """`model.dequantize()` to fp32, with GPT-2's layers as `Conv1D` again: it leaves linear ones.

    Args:
        device: where to do it, and to leave the model, if not where it is.
    """
    if device is not None:
        nn.Module.to(model, device)  # transformers' own refuses to move a quantised model
    for module in model.modules():
        if isinstance(module, Linear4bit):  # else it rounds to half precision, and so does the merge, again
            cast(Any, module.weight).quant_state.dtype = torch.float32
    model.dequantize(dtype=torch.float32)
    with torch.device("meta"):
        outline = type(model)(model.config)
    for name, module in outline.named_modules():
        if isinstance(module, Conv1D):
            linear = model.get_submodule(name)
            layer = Conv1D(linear.out_features, linear.in_features)
            layer.weight = nn.Parameter(linear.weight.data.T.contiguous(), requires_grad=False)
            layer.bias = linear.bias
            model.set_submodule(name, layer)


def check_head_is_whole(model: nn.Module, modules_to_save: list[str], name: str) -> None:
    """Refuse a base that comes quantised, parts of its future head too.

    Raises:
        RecipeError: naming one.
    """
    for new in modules_to_save:
        for layer in model.get_submodule(new).modules():
            if "Linear" in type(layer).__name__ and type(layer) not in (nn.Linear, Float32Linear):
                fault = f"'model_name_or_path: {name}' comes with a quantised head ({new})"
                raise RecipeError(f"{fault}: take the original model, with load_in_4bit or load_in_8bit")
