"""A base in 4 or 8 bits (QLoRA, arXiv 2305.14314), its head left whole."""

from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rm_recipe.errors import RecipeError
from rm_recipe.model.head import Float32Linear

if TYPE_CHECKING:
    from trl import ModelConfig

ADVICE = "comes quantised: take the original model, with load_in_4bit or load_in_8bit"


def settings(config: "ModelConfig", skip: list[str]) -> BitsAndBytesConfig:
    """bitsandbytes' settings by TRL's keys, the modules in `skip` left as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=getattr(torch, str(config.dtype), torch.float32),
        bnb_4bit_quant_storage=config.bnb_4bit_quant_storage,
        llm_int8_skip_modules=skip,
    )


def keep_layout(model: nn.Module) -> None:
    """Stops bitsandbytes 0.50 from repacking 4-bit weights on a CPU with AVX512-BF16.

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


def compute_in_float32(model: nn.Module) -> None:
    """Lets 4-bit layers multiply in fp32 what they hold; layers in 8 bits cannot."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32


def eight_bit_layers(model: nn.Module) -> list[str]:
    """The names of the layers that multiply in 8 bits."""
    return [name for name, module in model.named_modules() if isinstance(module, Linear8bitLt)]


def check_head_is_whole(model: nn.Module, new_modules: list[str], name: str) -> None:
    """Refuses a base that comes quantised, parts of its future head too.

    Raises:
        RecipeError: naming them.
    """
    quantised = [
        f"{new}.{inner}".rstrip(".")
        for new in new_modules
        for inner, module in model.get_submodule(new).named_modules()
        if "Linear" in type(module).__name__ and type(module) not in (nn.Linear, Float32Linear)
    ]
    if quantised:
        raise RecipeError(
            f"'model_name_or_path: {name}' has a quantised head ({', '.join(quantised)}); it {ADVICE}"
        )


def on_this_device() -> dict[str, str | int]:
    """A `device_map` for the whole model: what is quantised is so where it is to stay."""
    device = PartialState().device
    return {"": (device.index or 0) if device.type == "cuda" else str(device)}
