"""What a token of a shared-prefix row attends to, and how a CPU computes it: one comparison after the other.

A row's mask is block-diagonal, one block for each comparison, and a dense kernel computes the empty
part too: for three comparisons of a length two thirds of it. On a GPU that costs less than many small
kernels would; on a CPU it was a quarter of a training step, so there each block is computed by itself.
Registered with transformers under `NAME`; for every other mask it is transformers' `sdpa`.
"""

from collections.abc import Iterator, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rm_recipe_rows"
# Queries whose scores are computed at once in the backward, times the length of their comparison: the scores
# of a long comparison (heads x length x length) would outgrow all that a layer keeps.
SCORES = 1024 * 1024

_blocks: MutableMapping[Tensor, list[Tensor]] = WeakTensorKeyDictionary()


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


def announce_rows(mask: Tensor, blocks: list[Tensor] | None = None) -> None:
    """Register what each comparison's tokens attend to, by the labels of `shared_rows`.

    Args:
        blocks: of a mask that cannot be read, as it has no content.
    """
    if blocks or (not mask.dtype.is_floating_point and mask.dtype != torch.bool and mask not in _blocks):
        _blocks[mask] = blocks or blocks_of(mask)


def blocks_of(labels: Tensor) -> list[Tensor]:
    """For each comparison of one row a mask (length, length) to add to scores, 0 or -inf."""
    _, sizes = torch.unique_consecutive(labels[0, 0, 0], return_counts=True)
    blocks = []
    for own in torch.split(labels, sizes.tolist(), dim=3):
        seen = row_mask(own)[0, 0]
        blocks.append(torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")))
    return blocks


def attend_by_comparison(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Args:
        query: (rows, heads, length, head size); `key` and `value` may have fewer heads.
        attention_mask: a tensor or None; block by block if it was announced.
        kwargs: among others `dropout` and `scaling`.

    Returns:
        (rows, length, heads, head size), and no attention weights.
    """
    if attention_mask is not None:
        announce_rows(attention_mask)  # a reentrant checkpoint hands its backward another tensor
    if attention_mask is None or attention_mask not in _blocks:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    blocks, dropout, scale = _blocks[attention_mask], kwargs.get("dropout"), kwargs.get("scaling")
    rows, heads, length, size = query.shape
    # (heads, tokens of all rows, head size), in the precision in which autocast left the values.
    query, key, value = (
        each.transpose(0, 1).reshape(each.shape[1], rows * length, -1).to(value.dtype)
        for each in (query, key, value)
    )
    # With dropout torch's own backward, which knows what was dropped.
    kernel = partial(_fused, dropout=dropout) if dropout else _BlockAttention.apply
    output = kernel(query, key, value, blocks, size**-0.5 if scale is None else scale)
    return output.transpose(0, 1).reshape(rows, length, heads, -1), None


def _by_block(blocks: list[Tensor], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    sizes = [len(block) for block in blocks]
    split = (torch.split(each, sizes, dim=1) for each in tensors)
    return zip(*split, blocks, strict=True)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, blocks: list[Tensor], scale: float, dropout: float = 0.0
) -> Tensor:
    """Torch's kernel for each block; all tensors (heads, tokens, head size)."""
    grouped = len(query) != len(key)
    kernel = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scale, enable_gqa=grouped)
    with torch.autocast("cpu", enabled=False):  # the precision is chosen already
        each = _by_block(blocks, query, key, value)
        parts = [kernel(q[None], k[None], v[None], block.to(q.dtype))[0] for q, k, v, block in each]
    return torch.cat(parts, dim=1)


class _BlockAttention(torch.autograd.Function):
    """Forwards torch's fused kernel; backwards plain products of scores that are computed again.

    On a CPU the fused kernel's own backward takes four times as long in bf16, and scores kept from the
    forward would be a sixth of all activations. In bf16 the scores of the backward are rounded to bf16,
    as transformers' `eager` attention does in both directions.
    """

    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Tensor], scale: float
    ) -> Tensor:
        """All tensors (heads, tokens, head size); `blocks` their masks in order, 0 or -inf."""
        context.save_for_backward(query, key, value)
        context.blocks, context.scale = blocks, scale
        return _fused(query, key, value, blocks, scale)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of query, key and value."""
        query, key, value = context.saved_tensors
        of_query, of_key, of_value = (torch.zeros_like(each) for each in (query, key, value))
        whole = (query * context.scale, key, value, gradient, of_query, of_key, of_value)
        for q, k, v, g, dq, dk, dv, block in _by_block(context.blocks, *whole):
            heads, length, size = k.shape
            step = max(SCORES // length, 1)
            for first in range(0, length, step):
                end = min(first + step, length)  # what comes after a query, it does not see
                seen_k, seen_v = k[:, :end], v[:, :end]
                # The query heads of one key head are one product: (key heads, queries of them, head size).
                some_q, some_g = (x[:, first:end].reshape(heads, -1, x.shape[-1]) for x in (q, g))
                scores = torch.bmm(some_q, seen_k.transpose(1, 2)).view(-1, end - first, end)
                p = scores.add_(block[first:end, :end].to(q.dtype)).softmax(-1).view(heads, -1, end)
                of_p = torch.bmm(some_g, seen_v.transpose(1, 2))
                of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype)
                dq[:, first:end] = torch.bmm(of_scores, seen_k).view(-1, end - first, size)
                dk[:, :end] += torch.bmm(of_scores.transpose(1, 2), some_q)
                dv[:, :end] += torch.bmm(p.transpose(1, 2), some_g)
        return of_query.mul_(context.scale), of_key, of_value, None, None


AttentionInterface.register(NAME, attend_by_comparison)
AttentionMaskInterface.register(NAME, sdpa_mask)
