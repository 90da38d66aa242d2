"""Row attention gives what `sdpa` gives, forwards and backwards, and takes over nothing else."""

import json

import pytest
import torch
from conftest import TINY_BASES, make_recipe, make_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaConfig

import rm_recipe.model.cpu_attention as module
from rm_recipe.data.comparison import Encoded
from rm_recipe.model.cpu_attention import NAME, announce_rows, row_attention, visible
from rm_recipe.model.reward_model import add_reward_positions
from rm_recipe.model.shared_prefix import decide_sharing, padded_rows, shared_rows
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools import check
from rm_recipe.training.train import train

BATCH = [
    Encoded([5, 6, 7], [[8, 9], [4]]),
    Encoded([], [[11, 12], [13, 14, 15], [13]]),
    Encoded([20, 21, 22], [[23], [24, 25, 3, 3, 4, 5, 6, 7, 8, 9]]),
] * 3


class Layer(torch.nn.Module):
    num_key_value_groups = 2


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    """Of the batch in one row: the labels that blocks are made of, and the whole square."""
    labels = shared_rows(BATCH, 0, one_row=True)["attention_mask"]
    comparison_of, response_of = labels[:, 0, 0], labels[:, 0, 1]
    return labels, visible(comparison_of, response_of)[:, None]


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


@pytest.mark.parametrize("scores", [1024 * 1024, 30])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_block_by_block_the_output_and_the_gradients_are_those_of_the_whole_mask(
    scaling, scores, monkeypatch
):
    """A few queries at a time too, as of long comparisons."""
    monkeypatch.setattr(module, "SCORES", scores)
    labels, square = masks()
    expected, expected_gradients = attention(square, scaling=scaling)
    announce_rows(labels)
    output, gradients = attention(labels, scaling=scaling)
    assert (output - expected).abs().max() <= 1e-12
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12
    with torch.no_grad():
        torch.manual_seed(0)
        tensors = [torch.randn(1, 2, square.shape[-1], 8, dtype=torch.float64) for _ in range(3)]
        tensors = [each[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2) for each in tensors]
        layer = torch.nn.Module()
        scored, _ = row_attention(layer, *tensors, labels, scaling=scaling)
        plain, _ = row_attention(layer, *tensors, square, scaling=scaling)
    assert (scored - plain).abs().max() <= 1e-12


def test_gradients_in_bf16_are_as_close_to_exact_as_those_of_sdpa():
    labels, square = masks()
    torch.manual_seed(0)
    exact = [torch.randn(1, 4, square.shape[-1], 64, dtype=torch.float64) for _ in range(3)]

    def gradients(dtype: torch.dtype, mask: torch.Tensor) -> torch.Tensor:
        tensors = [each.detach().to(dtype, copy=True).requires_grad_() for each in exact]
        output, _ = row_attention(torch.nn.Module(), *tensors, mask)
        output.double().square().sum().backward()
        return torch.cat([tensor.grad.double().flatten() for tensor in tensors])

    expected = gradients(torch.float64, square)
    sdpa = (gradients(torch.bfloat16, square) - expected).norm()
    announce_rows(labels)
    ours = (gradients(torch.bfloat16, labels) - expected).norm()
    assert 0 < ours <= 2 * sdpa


def test_under_autocast_full_precision_values_keep_theirs_backwards_too():
    """A 4-bit layer gives back its input's precision, whatever autocast says."""
    mask, square = masks()
    expected, expected_gradients = attention(square)
    announce_rows(mask)
    with torch.autocast("cpu", torch.bfloat16):
        output, gradients = attention(mask)
    assert (output - expected).abs().max() <= 1e-12
    assert max((a - b).abs().max() for a, b in zip(gradients, expected_gradients, strict=True)) <= 1e-12


LONG = [Encoded(list(range(2, 1092)), [[1] * 4, [2] * 6]), *[Encoded([5] * 40, [[6] * 10, [7] * 12])] * 15]


@pytest.mark.parametrize("batch", [BATCH, LONG], ids=["short", "one long"])
def test_nothing_is_computed_across_comparisons(monkeypatch, batch):
    """A row's dense attention is what this is there to avoid; one long comparison made a whole batch so."""
    mask = shared_rows(batch, 0, one_row=True)["attention_mask"]
    sizes = []
    bmm, fused = torch.bmm, module.scaled_dot_product_attention

    def recording(a, b):
        sizes.append(max(a.shape[-1], b.shape[-1]))
        return bmm(a, b)

    def recording_fused(query, *args, **kwargs):
        sizes.append(query.shape[-2])
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(module.torch, "bmm", recording)
    monkeypatch.setattr(module, "scaled_dot_product_attention", recording_fused)
    monkeypatch.setattr(module, "sdpa_attention_forward", None)
    announce_rows(mask)
    attention(mask)
    lengths = sorted({comparison.length for comparison in batch})
    assert sum(size in lengths for size in sizes) >= 2 * len(batch)
    assert max(sizes) <= 2 * lengths[-1] < 2 * mask.shape[-1]  # two query heads of each key head at once


def test_what_a_collator_makes_grows_with_its_tokens_and_not_with_their_square():
    """A batch of 50,000 tokens had a mask of 2.5 GB."""
    rows = shared_rows([Encoded([5] * 40, [[6] * 10, [7] * 12])] * 800, 0, one_row=True)
    assert sum(tensor.nbytes for tensor in rows.values()) < 40 * rows["input_ids"].numel()


def test_a_mask_made_again_is_computed_by_the_same_blocks(monkeypatch):
    """As a reentrant checkpoint does, which detaches what it is given."""
    labels, square = masks()
    expected, expected_gradients = attention(square)
    monkeypatch.setattr(module, "sdpa_attention_forward", None)
    output, gradients = attention(labels.detach())
    assert (output - expected).abs().max() <= 1e-12
    assert max((a - b).abs().max() for a, b in zip(gradients, expected_gradients, strict=True)) <= 1e-12


def test_dropout_drops_weights_of_a_comparison_and_scales_up_the_others(monkeypatch):
    monkeypatch.setattr(module, "sdpa_attention_forward", None)  # it would compute the whole square
    labels, square = masks()
    rows, length = 1, labels.shape[-1]
    torch.manual_seed(0)
    query, key = torch.randn(2, rows, 4, length, 8, dtype=torch.float64)
    value = torch.eye(length, dtype=torch.float64).expand(rows, 4, -1, -1)  # the output is the weights

    def weights(**keys):
        output, _ = row_attention(torch.nn.Module(), query, key, value, labels, **keys)
        return output.transpose(1, 2)

    whole, dropped = weights(), weights(dropout=0.5)
    kept = dropped != 0
    assert not kept[~square.expand_as(kept)].any()
    assert 0.4 < kept[square.expand_as(kept)].double().mean() < 0.6
    assert (dropped - 2 * whole)[kept].abs().max() <= 1e-12


@pytest.fixture
def base_with_dropout(tmp_path):
    """A folder of a kind of `TINY_BASES` by its name, whose attention drops one weight of ten."""

    def make(name: str):
        tokenizer = make_tokenizer()
        kind, config = TINY_BASES[name](len(tokenizer))
        config.attention_dropout = 0.1  # a number of the layers, no module: `disable_dropout` misses it
        torch.manual_seed(0)
        kind.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def losses(folder, base, data, **keys) -> list[float]:
    folder.mkdir()
    train(read_recipe(make_recipe(folder, base, data, max_steps=3, logging_steps=1, **keys)))
    log = json.loads((folder / "run" / "run.json").read_text())
    assert log["prefix_sharing"]["used"] == (keys.get("prefix_sharing") != "off")
    return [entry["loss"] for entry in log["log"] if "loss" in entry]


@pytest.mark.parametrize(("name", "keys"), [("gpt2", {"disable_dropout": False}), ("llama", {})])
def test_a_base_with_dropout_in_its_attention_trains_on_shared_rows(
    base_with_dropout, tiny_data, tmp_path, name, keys
):
    found = losses(tmp_path / "shared", base_with_dropout(name), tiny_data, **keys)
    assert len(found) == 3
    assert all(0 < loss < 2 for loss in found)


def test_a_reentrant_checkpoint_changes_no_loss(tiny_base, tiny_data, tmp_path):
    keys = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    found = losses(tmp_path / "shared", tiny_base("gpt2"), tiny_data, **keys)
    expected = losses(tmp_path / "padded", tiny_base("gpt2"), tiny_data, prefix_sharing="off")
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_base_with_dropout_in_its_attention_is_planned(
    base_with_dropout, tiny_data, tmp_path, name, capsys, monkeypatch
):
    monkeypatch.setattr("rm_recipe.model.memory.LARGEST", 8)  # no search for the largest batch
    assert check.check_memory(make_recipe(tmp_path, base_with_dropout(name), tiny_data), [])
    assert "GB" in capsys.readouterr().out


def test_a_mask_that_nobody_announced_goes_to_sdpa(monkeypatch):
    monkeypatch.setattr(module._BlockAttention, "apply", None)
    attention(torch.ones(1, 1, 6, 6, dtype=torch.bool).tril())
    square = shared_rows(BATCH, 0)["attention_mask"]
    announce_rows(square)
    assert square not in module._blocks


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
        shared = model(**shared_rows(BATCH, 0, one_row=True)).logits
    assert (shared - expected).abs().max() <= 1e-5
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
