"""Row attention gives what `sdpa` gives, forwards and backwards, and takes over nothing else."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rm_recipe.attention import LONGEST_BLOCK, NAME, announce_rows, row_attention
from rm_recipe.batching import Encoded, padded_rows, shared_rows
from rm_recipe.modeling import add_reward_positions
from rm_recipe.sharing import decide_sharing

BATCH = [
    Encoded([5, 6, 7], [[8, 9], [4]]),
    Encoded([], [[11, 12], [13, 14, 15], [13]]),
    Encoded([20, 21, 22], [[23], [24, 25, 3, 3, 4, 5, 6, 7, 8, 9]]),
] * 3


class Layer(torch.nn.Module):
    num_key_value_groups = 2


def attention(mask: torch.Tensor, **keys):
    """Output and gradients of random queries, keys and values; two query heads for each key head."""
    torch.manual_seed(0)
    rows, length = mask.shape[0], mask.shape[-1]
    tensors = [
        torch.randn(rows, heads, length, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    ]
    output, _ = row_attention(Layer(), *tensors, mask, **keys)
    output.square().sum().backward()
    return output, [tensor.grad for tensor in tensors]


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_block_by_block_the_output_and_the_gradients_are_those_of_the_whole_mask(scaling, one_row):
    mask = shared_rows(BATCH, 0, one_row)["attention_mask"]
    assert (mask.shape[0] == 1) == one_row
    expected, expected_gradients = attention(mask.clone(), scaling=scaling)
    announce_rows(mask)
    output, gradients = attention(mask, scaling=scaling)
    assert (output - expected).abs().max() <= 1e-12
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12
    with torch.no_grad():
        torch.manual_seed(0)
        tensors = [torch.randn(*mask.shape[::3], 8, dtype=torch.float64) for _ in range(3)]
        tensors = [each[:, None].expand(-1, 4, -1, -1) for each in tensors]
        module = torch.nn.Module()
        scored, _ = row_attention(module, *tensors, mask, scaling=scaling)
        plain, _ = row_attention(module, *tensors, mask.clone(), scaling=scaling)
    assert (scored - plain).abs().max() <= 1e-12


def test_gradients_in_bf16_are_as_close_to_exact_as_those_of_sdpa():
    mask = shared_rows(BATCH, 0)["attention_mask"]
    torch.manual_seed(0)
    exact = [torch.randn(mask.shape[0], 4, mask.shape[-1], 64, dtype=torch.float64) for _ in range(3)]

    def gradients(dtype: torch.dtype, mask: torch.Tensor) -> torch.Tensor:
        tensors = [each.detach().to(dtype, copy=True).requires_grad_() for each in exact]
        output, _ = row_attention(torch.nn.Module(), *tensors, mask)
        output.double().square().sum().backward()
        return torch.cat([tensor.grad.double().flatten() for tensor in tensors])

    expected = gradients(torch.float64, mask.clone())
    sdpa = (gradients(torch.bfloat16, mask.clone()) - expected).norm()
    announce_rows(mask)
    ours = (gradients(torch.bfloat16, mask) - expected).norm()
    assert 0 < ours <= 2 * sdpa


def test_under_autocast_full_precision_values_keep_theirs_backwards_too():
    """A 4-bit layer gives back its input's precision, whatever autocast says."""
    mask = shared_rows(BATCH, 0)["attention_mask"]
    expected, expected_gradients = attention(mask.clone())
    announce_rows(mask)
    with torch.autocast("cpu", torch.bfloat16):
        output, gradients = attention(mask)
    assert (output - expected).abs().max() <= 1e-12
    assert max((a - b).abs().max() for a, b in zip(gradients, expected_gradients, strict=True)) <= 1e-12


def test_nothing_is_computed_across_comparisons(monkeypatch):
    """A row's dense attention is what this is there to avoid."""
    import rm_recipe.attention as module

    mask = shared_rows(BATCH, 0)["attention_mask"]
    sizes = []
    bmm, fused = torch.bmm, module.scaled_dot_product_attention

    def recording(a, b):
        sizes.append(b.shape[-1])
        return bmm(a, b)

    def recording_fused(query, *args, **kwargs):
        sizes.append(query.shape[-2])
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(module.torch, "bmm", recording)
    monkeypatch.setattr(module, "scaled_dot_product_attention", recording_fused)
    announce_rows(mask)
    attention(mask)
    assert sizes
    assert max(sizes) <= max(comparison.length for comparison in BATCH) < mask.shape[-1]


def test_a_mask_that_nobody_announced_or_that_is_too_long_goes_to_sdpa(monkeypatch):
    import rm_recipe.attention as module

    monkeypatch.setattr(module._BlockAttention, "apply", None)
    attention(torch.ones(1, 1, 6, 6, dtype=torch.bool).tril())
    long = shared_rows([Encoded(list(range(LONGEST_BLOCK)), [[1], [2]])], 0)["attention_mask"]
    announce_rows(long)
    assert long not in module._blocks


def test_a_model_with_row_attention_still_scores_plain_batches(tmp_path):
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
    padded = padded_rows(BATCH, 0)
    with torch.no_grad():
        expected = model(**padded).logits
        add_reward_positions(model)
        assert decide_sharing(model, "auto", 64, torch.device("cuda")).used
        assert model.config._attn_implementation == "sdpa"  # a GPU computes the whole mask
        assert decide_sharing(model, "auto", 64).used
        assert model.config._attn_implementation == NAME
        assert torch.equal(model(**padded).logits, expected)
        shared = model(**shared_rows(BATCH, 0)).logits
    assert (shared - expected).abs().max() <= 1e-5
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
