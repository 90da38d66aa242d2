"""What a token of a shared-prefix row attends to, and how that is computed without the rest of the square.

A row's mask is block-diagonal, one block for each comparison, and a dense kernel computes the empty
part too: for three comparisons of a length two thirds of it. That was a quarter of a training step on a
CPU and a third on an H200. So a CPU computes each block by itself, and a GPU all of them at once by flash
attention, which takes sequences of any length (a response's keys are its prefix's and its own).
Registered with transformers under `NAME`; for every other mask it is transformers' `sdpa`.
"""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rm_recipe.model.lora import HALF

NAME = "rm_recipe_rows"
# Queries whose scores are computed at once: with more, keys are looked at that come after a query; with less,
# the products are small. In bf16 on two cores without AMX this was the fastest or nearly so of 32 to 256, for
# comparisons of 244 to 1,900 tokens, forwards and backwards.
QUERIES = 128
MANY = 1024  # on a GPU, and in a plan of memory, where each operation costs time
WIDEST = 192  # head that flash attention differentiates on every card
# torch 2.11 takes grouped heads as they come, 2.13 if it is told.
GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def row_mask(labels: Tensor) -> Tensor:
    """(rows, 1, length, length) bool from the labels (rows, 1, 2, length) of `shared_rows`, on their device.

    A token attends to earlier tokens and itself within its comparison: to the prefix and to its
    own response. Padding attends to padding, so that no row of the softmax is empty (NaN).
    """
    comparison_of, response_of = labels.unbind(2)
    causal = torch.ones(labels.shape[-1], labels.shape[-1], dtype=torch.bool, device=labels.device).tril()
    same = comparison_of[..., :, None] == comparison_of[..., None, :]
    own = (response_of[..., None, :] == 0) | (response_of[..., :, None] == response_of[..., None, :])
    return causal & same & own


def by_block(model: Any) -> bool:
    """Whether a model computes rows block by block, so that a batch is one long row."""
    return bool(model.config._attn_implementation == NAME)


def has_flash(device: torch.device, config: Any) -> bool:
    """Whether flash attention computes a model's text on a device: NVIDIA's GPUs since Ampere.

    Where there is no GPU to be asked, the one that a plan is for has it.
    """
    if device.type != "cuda" or head_size(config) > WIDEST:
        return False
    if not torch.cuda.is_available():
        return True
    built = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


def head_size(config: Any) -> int:
    """The width of a head of a model's text, by its configuration."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class Row:
    """One row of comparisons in the forms in which attention is computed.

    Args:
        labels: of `shared_rows`, which can be read.
    """

    def __init__(self, labels: Tensor, on_gpu: bool) -> None:
        self.labels, readable = labels, labels.cpu()  # read once: that waits for a GPU
        _, sizes = torch.unique_consecutive(readable[0, 0, 0], return_counts=True)
        self.sizes: list[int] = sizes.tolist()
        self.sequences = sequences_of(readable, labels.device) if on_gpu else None

    @cached_property
    def blocks(self) -> list[Tensor]:
        """For each comparison a mask (length, length) to add to scores, 0 or -inf."""
        seen = [row_mask(own)[0, 0] for own in torch.split(self.labels, self.sizes, dim=3)]
        return [
            torch.zeros_like(each, dtype=torch.float32).masked_fill_(~each, float("-inf")) for each in seen
        ]


_rows: MutableMapping[Tensor, Row] = WeakTensorKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def announce_rows(mask: Tensor, row: Row | None = None) -> None:
    """Register what each comparison's tokens attend to, by the labels of `shared_rows`.

    Args:
        row: of a mask that cannot be read, as it has no content.
    """
    if row or (not mask.dtype.is_floating_point and mask.dtype != torch.bool and mask not in _rows):
        _rows[mask] = row or Row(mask.clone(), mask.is_cuda)


@dataclass(frozen=True)
class Sequences:
    """A row's comparisons as flash attention takes them: one sequence for each response.

    The prefix's tokens are queries of the first response's sequence, and keys of all.

    Attributes:
        longest: the most queries, and the most keys, of a sequence.
        queries: (sequences + 1,) int32, where each one's queries begin, in the row.
        keys: likewise its keys, among those of all sequences.
        key_tokens: (keys,) int64, the token of the row that each key is.
    """

    longest: tuple[int, int]
    queries: Tensor
    keys: Tensor
    key_tokens: Tensor


def sequences_of(labels: Tensor, device: torch.device) -> Sequences:
    """The sequences of one row, by its labels, for a device."""
    owners, lengths = torch.unique_consecutive(labels[0, 0], dim=1, return_counts=True)
    prefixes: dict[int, NDArray[np.int64]] = {}  # of those comparisons that have one
    ends, keys = [0], []
    parts = np.split(np.arange(labels.shape[-1]), lengths.cumsum(0)[:-1])
    for (comparison, response), own in zip(owners.T.tolist(), parts, strict=True):
        if response == 0:
            prefixes[comparison] = own
        else:
            keys.append(np.concatenate([prefixes.get(comparison, own[:0]), own]))
            ends.append(int(own[-1]) + 1)
    sizes = [len(each) for each in keys]
    begin = np.array([ends, np.cumsum([0, *sizes])], np.int32)
    made = (torch.from_numpy(each).to(device) for each in (*begin, np.concatenate(keys)))
    return Sequences((int(np.diff(ends).max()), max(sizes)), *made)


def attend_by_comparison(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Args:
        query: (rows, heads, length, head size), one row where the mask was announced; `key` and `value` may
            have fewer heads.
        attention_mask: a tensor or None; block by block if it was announced.
        kwargs: among others `dropout` and `scaling`.

    Returns:
        (rows, length, heads, head size), and no attention weights.
    """
    if attention_mask is not None:
        announce_rows(attention_mask)  # a reentrant checkpoint hands its backward another tensor
    if attention_mask is None or attention_mask not in _rows:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    row, dropout, scale = _rows[attention_mask], kwargs.get("dropout"), kwargs.get("scaling")
    # (heads, tokens of the one row, head size), in the precision in which autocast left the values.
    query, key, value = (each[0].to(value.dtype) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    width = query.shape[-1]
    fits_flash = value.dtype in HALF and width == value.shape[-1] and width <= WIDEST and width % 8 == 0
    with torch.autocast(query.device.type, enabled=False):  # the precision is chosen already
        if row.sequences and fits_flash and not dropout:
            output = _flash(query, key, value, row.sequences, scale)
        else:
            # With dropout torch's own backward, which knows what was dropped.
            by_block: Any = partial(_fused, dropout=dropout) if dropout else _BlockAttention.apply
            output = by_block(query * scale, key, value, row.blocks)
    return output.transpose(0, 1)[None], None


def _flash(query: Tensor, key: Tensor, value: Tensor, row: Sequences, scale: float) -> Tensor:
    """Flash attention: a sequence's last query sees all of its keys, the one before all but the last, ...

    Tensors as above, but the queries are not scaled. A prefix's keys and values are copied for each response,
    and kept for the backward.
    """
    kernel: Any = partial(varlen_attn, scale=scale, window_size=(-1, 0), **GROUPED)
    query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    key, value = (each.index_select(0, row.key_tokens) for each in (key, value))
    output: Tensor = kernel(query, key, value, row.queries, row.keys, *row.longest)
    return output.transpose(0, 1)


def _by_block(blocks: list[Tensor], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    sizes = [len(block) for block in blocks]
    split = (torch.split(each, sizes, dim=1) for each in tensors)
    return zip(*split, blocks, strict=True)


def _fused(query: Tensor, key: Tensor, value: Tensor, blocks: list[Tensor], dropout: float) -> Tensor:
    """Torch's kernel for each block; all tensors (heads, tokens, head size), the queries scaled."""
    grouped = len(query) != len(key)
    kernel = partial(scaled_dot_product_attention, dropout_p=dropout, scale=1.0, enable_gqa=grouped)
    each = _by_block(blocks, query, key, value)
    parts = [kernel(q[None], k[None], v[None], block.to(q.dtype))[0] for q, k, v, block in each]
    return torch.cat(parts, dim=1)


class _BlockAttention(torch.autograd.Function):
    """Plain products, some queries at a time, whose scores are computed again in the backward.

    On a CPU torch's fused kernel takes 2 to 3.5 times as long in bf16, and more backwards; scores kept from
    the forward would be a sixth of all activations. In bf16 scores are rounded to bf16, as in transformers'
    `eager` attention: outputs are about twice as far from exact ones as the fused kernel's, and a model's
    rewards as far as with it, as other layers round more (of SmolLM2's replies 0.020 on average, both).
    """

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Tensor]) -> Tensor:
        """All tensors (heads, tokens, head size), the queries scaled; `blocks` their masks, 0 or -inf."""
        context.save_for_backward(query, key, value)
        context.blocks = blocks
        output = query.new_empty(*query.shape[:2], value.shape[2])
        for q, k, v, into, block in _by_block(blocks, query, key, value, output):
            for some, seen, p in _probabilities(q, k, block):
                into[:, some] = torch.bmm(p, v[:, seen]).view(len(q), -1, v.shape[2])
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of query, key and value."""
        query, key, value = context.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(each) for each in (query, key, value))
        whole = (query, key, value, gradient, of_query, of_key, of_value)
        exact = torch.promote_types(key.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):  # as forwards
            for q, k, v, g, dq, into_k, into_v, block in _by_block(context.blocks, *whole):
                dk, dv = (torch.zeros_like(each, dtype=exact) for each in (k, v))  # sums of many parts
                for some, seen, p in _probabilities(q, k, block):
                    some_q, some_g = (x[:, some].reshape(len(k), -1, x.shape[2]) for x in (q, g))
                    of_p = torch.bmm(some_g, v[:, seen].transpose(1, 2))
                    of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype)
                    dq[:, some] = torch.bmm(of_scores, k[:, seen]).view(len(q), -1, q.shape[2])
                    dk[:, seen] += torch.bmm(of_scores.transpose(1, 2), some_q)
                    dv[:, seen] += torch.bmm(p.transpose(1, 2), some_g)
                into_k.copy_(dk)
                into_v.copy_(dv)
        return of_query, of_key, of_value, None


def _probabilities(query: Tensor, key: Tensor, mask: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Go through a block by `QUERIES`: which queries, which keys they may see, and the shares of these keys.

    Shares are (key heads, queries of all query heads of a key head, keys), as those are one product.
    """
    step = QUERIES if type(query) is Tensor and not query.is_cuda else MANY
    for first in range(0, query.shape[1], step):
        end = min(first + step, query.shape[1])
        some, seen = slice(first, end), slice(0, end)  # what comes after a query, it does not see
        some_q = query[:, some].reshape(len(key), -1, query.shape[2])
        scores = torch.bmm(some_q, key[:, seen].transpose(1, 2)).view(len(query), -1, end)
        scores.add_(mask[some, seen].to(scores.dtype))
        yield some, seen, scores.softmax(-1).view(len(key), -1, end)


AttentionInterface.register(NAME, attend_by_comparison)
AttentionMaskInterface.register(NAME, sdpa_mask)
