"""What rounding does to a model, measured on the model itself: its layers read rounded inputs.

Rounding a layer's input or its weights errs by the same part of each number, so this also says what writing
the weights in half precision may do to the rewards, without a look at those weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Round = Callable[[torch.Tensor], torch.Tensor]


def to_eight_bits(values: torch.Tensor) -> torch.Tensor:
    """The nearest of 255 even steps up to the largest of each row, as LLM.int8 (arXiv 2208.07339)."""
    step = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (values / step).round() * step


def to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """The nearest numbers that bf16 has, in the precision that they came in."""
    return values.bfloat16().to(values.dtype)


MULTIPLY: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)
HOLD_MATRICES = (*MULTIPLY, nn.Embedding)


def layers_of(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """The names of the layers of these kinds."""
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@contextmanager
def rounded_inputs(model: nn.Module, layers: Sequence[str], rounded: Round) -> Iterator[None]:
    """Within it, the layers of these names read `rounded(input)`; embeddings give rounded rows."""

    def before(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounded(inputs[0]), *inputs[1:])

    def after(_: nn.Module, __: tuple[torch.Tensor, ...], rows: torch.Tensor) -> torch.Tensor:
        return rounded(rows)

    modules = [model.get_submodule(name) for name in layers]
    hooks = [
        module.register_forward_hook(after)
        if isinstance(module, nn.Embedding)
        else module.register_forward_pre_hook(before)
        for module in modules
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
