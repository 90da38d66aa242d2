"""What rounding does to a model's rewards, measured on the model itself before anything is rounded.

Weights that will be rounded are moved at random by as much as rounding may move them; inputs of layers are
rounded as layers that multiply in fewer bits round them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rm_recipe.model.head import is_float32

Round = Callable[[torch.Tensor], torch.Tensor]


def to_eight_bits(values: torch.Tensor) -> torch.Tensor:
    """The nearest of 255 even steps up to the largest of each row, as LLM.int8 (arXiv 2208.07339)."""
    step = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (values / step).round() * step


def to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """The nearest numbers that bf16 has, in the precision that they came in."""
    return values.bfloat16().to(values.dtype)


def layers_that_multiply(model: nn.Module) -> list[str]:
    """The names of the layers with a weight matrix to multiply by."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


@contextmanager
def rounded_inputs(model: nn.Module, layers: Sequence[str], rounded: Round) -> Iterator[None]:
    """Within it, the layers of these names read `rounded(input)`."""

    def before(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounded(inputs[0]), *inputs[1:])

    hooks = [model.get_submodule(name).register_forward_pre_hook(before) for name in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def precisions(
    model: nn.Module, body: torch.dtype, head: torch.dtype
) -> Iterator[tuple[nn.Parameter, torch.dtype]]:
    """Every parameter with the precision that it is to be written in."""
    for module in model.modules():
        precision = head if is_float32(module) else body
        for parameter in module.parameters(recurse=False):
            yield parameter, precision


@contextmanager
def moved_weights(model: nn.Module, body: torch.dtype, head: torch.dtype, seed: int) -> Iterator[None]:
    """Within it, the weights that these precisions cannot hold are off by up to half their last place."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}  # once, where several modules share it
    for parameter, precision in precisions(model, body, head):
        weights = parameter.data
        if id(parameter) in kept or torch.equal(weights, weights.to(precision).to(weights.dtype)):
            continue
        kept[id(parameter)] = parameter, weights.to("cpu")  # a GPU may not hold them twice
        _, exponents = torch.frexp(weights)
        half = torch.ldexp(torch.full_like(weights, torch.finfo(precision).eps / 4), exponents)
        share = torch.rand(weights.shape, generator=generator).to(weights.device) * 2 - 1
        parameter.data = weights + share * half * (weights != 0)
    try:
        yield
    finally:
        for parameter, weights in kept.values():
            parameter.data = weights.to(parameter.device)
