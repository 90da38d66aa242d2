"""The reward head: found on any architecture, kept in fp32, drawn from the seed, proven saved."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from rm_recipe.errors import TrainingError


class Float32Linear(nn.Linear):
    """A linear layer that computes in its own precision, whatever the body's or autocast's is.

    bf16 has 8 bits of mantissa: around a reward of 10 neighbouring values are 0.06 apart and pairs
    tie. A plain fp32 layer would raise on bf16 input and give bf16 under autocast.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def head_names(model: PreTrainedModel) -> list[str]:
    """The modules beside the backbone that hold parameters: `score`, or an encoder's `classifier`."""
    beside = {name: child for name, child in model.named_children() if name != model.base_model_prefix}
    return [name for name, child in beside.items() if [*child.parameters()]]


def outermost(names: list[str]) -> list[str]:
    """The names that are not inside another one: `pooler` of `pooler` and `pooler.dense`.

    PEFT wraps every name that it is given, and an inner wrapper would hang beside the copy that the
    outer one trains.
    """
    return sorted(n for n in set(names) if not any(n.startswith(f"{other}.") for other in names))


def to_float32(model: PreTrainedModel, name: str) -> None:
    """Make everything of a head fp32, with the same weights: what it holds, and what its layers read.

    Its linear layers become `Float32Linear`. Another layer, such as ModernBERT's norm between two of them,
    would meet fp32 with weights in the body's precision.
    """
    module = model.get_submodule(name)
    module.to(torch.promote_types(next(module.parameters()).dtype, torch.float32))
    for inner, part in list(module.named_modules()):
        if type(part) is nn.Linear:
            with torch.device(part.weight.device):
                head = Float32Linear(part.in_features, part.out_features, part.bias is not None)
            model.set_submodule(f"{name}.{inner}".rstrip("."), head.to(part.weight.dtype))
            head.load_state_dict(part.state_dict())
        elif not isinstance(part, Float32Linear) and any(True for _ in part.parameters(recurse=False)):
            part.register_forward_pre_hook(read_own_precision)


def read_own_precision(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A layer's forward pre-hook: its inputs in the precision of its weights."""
    dtype = next(layer.parameters(recurse=False)).dtype
    return tuple(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def is_head_layer(layer: nn.Module) -> bool:
    """Whether a layer is one of a head that `to_float32` has made."""
    return isinstance(layer, Float32Linear) or read_own_precision in layer._forward_pre_hooks.values()


def initialise(model: PreTrainedModel, name: str) -> None:
    """Draw a fresh head's weights anew: in fp32, from the generator that the seed has set."""
    for module in model.get_submodule(name).modules():
        if isinstance(module, nn.Linear):
            std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def head_of(model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """A copy of the parameters of the modules that make up the head."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        key: value.detach().cpu().clone()
        for name in names
        for key, value in base.get_submodule(name).named_parameters(prefix=name)
        if value.requires_grad
    }


def saved_tensors(folder: Path, pattern: str = "") -> dict[str, torch.Tensor]:
    """Read the tensors of a model's or adapter's folder in whose names a regular expression is found.

    The others stay on disk: a model that was trained in full may be as large as the memory.
    """
    saved: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = (name for name in file.keys() if re.search(pattern, name))  # noqa: SIM118 - no mapping
            saved |= {name: file.get_tensor(name) for name in names}
    return saved


def check_saved_head(folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Read the head's tensors back from disk: they are there and differ from `start`.

    Raises:
        TrainingError: naming one that is not, or does not.
    """
    for name, before in start.items():
        plain = name.replace("modules_to_save.default.", "")
        saved = saved_tensors(folder, rf"(^|\.){re.escape(plain)}$")
        if not saved:
            raise TrainingError(f"the head's {plain} is missing from what was saved in {folder}")
        # A bias of the reward itself cancels in every comparison, so only weights have to move.
        unmoved = any(torch.equal(after.float(), before.float()) for after in saved.values())
        if unmoved and name.endswith("weight"):
            raise TrainingError(
                f"the head's {plain} did not move in training: is the learning_rate 0, or all of it warm-up? "
                "Start anew with --overwrite"
            )
