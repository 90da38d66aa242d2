"""Liger's kernels (arXiv 2410.10989): a norm, or a feed-forward layer's activation, in one pass over memory.

PyTorch makes several for each, and keeps what they leave for the backward.
"""

import sys
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations import liger

from rm_recipe.errors import RecipeError

# The losses are a language model's: they would replace the classifier's forward. The kernel for rotary
# positions is compiled anew for every length of a row.
NOT_USED = dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy", "rope"), False)


def fuse(model: PreTrainedModel) -> None:
    """Give a model Liger's kernels, and no other: Liger also changes what later models are made of.

    Raises:
        RecipeError: Liger is not installed, or has none for a model of this kind.
    """
    architecture = vars(sys.modules[type(model).__module__])
    before = dict(architecture)
    own = _with_own_forward(model)
    try:
        liger.apply_liger_kernel(model, NOT_USED)
    except ImportError:
        raise RecipeError("'use_liger_kernel' needs a package: `pip install liger-kernel`") from None
    except TypeError:  # of some kinds it knows the language model alone
        pass
    finally:
        architecture.update(before)
    if _with_own_forward(model) == own:
        fault = f"Liger has no kernels for a classifier of the kind '{model.config.model_type}'"
        raise RecipeError(f"'use_liger_kernel': {fault}; leave it out")


def keep_as_fused(model: nn.Module) -> None:
    """Let a model keep for the backward what Liger's kernels do, by PyTorch: for where they cannot run.

    A norm keeps its input, and a feed-forward layer's activation its two; the rest is computed anew.
    """
    anew = partial(checkpoint, use_reentrant=False)

    def feed_forward(layer: Any, hidden: Tensor) -> Any:
        gated = anew(lambda gate, up: layer.act_fn(gate) * up, layer.gate_proj(hidden), layer.up_proj(hidden))
        return layer.down_proj(gated)

    for layer in model.modules():
        if type(layer).__name__.endswith("RMSNorm"):
            layer.forward = partial(anew, layer.forward)
        elif all(hasattr(layer, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            layer.forward = partial(feed_forward, layer)


def _with_own_forward(model: PreTrainedModel) -> list[str]:
    return [name for name, layer in model.named_modules() if "forward" in vars(layer)]
