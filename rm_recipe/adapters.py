"""LoRA by TRL's keys, and two ways in which its layers cost less than PEFT's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from rm_recipe.errors import RecipeError
from rm_recipe.heads import outermost

if TYPE_CHECKING:
    from trl import ModelConfig


def add_lora(
    model: PreTrainedModel, config: "ModelConfig", new_modules: list[str], autocast: bool
) -> PeftModel:
    """Wraps the model for LoRA by TRL's keys; `new_modules` are trained in full.

    Args:
        autocast: whether training computes in half precision (`bf16` or `fp16`).

    Raises:
        RecipeError: the target modules match nothing.
    """
    try:
        wrapped = get_peft_model(model, lora_config(config, new_modules), revision=config.model_revision)
    except ValueError as error:
        raise RecipeError(f"LoRA cannot be added: {' '.join(str(error).split())[:300]}") from None
    if autocast:
        keep_activations_in_half(wrapped)
    return wrapped


def lora_config(config: "ModelConfig", new_modules: list[str]) -> LoraConfig:
    """PEFT's settings by TRL's keys."""
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or "all-linear",
        target_parameters=config.lora_target_parameters,
        modules_to_save=outermost([*new_modules, *(config.lora_modules_to_save or [])]),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def keep_activations_in_half(model: nn.Module) -> None:
    """Stops PEFT from casting every activation to the adapters' fp32.

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
        weight = up.weight.to(hidden.dtype).T
        return torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), weight).view_as(result)
