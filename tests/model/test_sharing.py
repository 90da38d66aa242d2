"""Prefixes are shared where a small copy of the model proves it exact, and only there.

On a CPU rows are computed comparison by comparison, on a GPU as sequences: as `sdpa` would, forwards and
backwards.
"""

import pytest
import torch
from conftest import TINY
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForSequenceClassification

from rm_recipe.data.comparison import Encoded, split_at_common_prefix
from rm_recipe.model import row_attention, shared_prefix
from rm_recipe.model.reward_model import add_reward_positions
from rm_recipe.model.row_attention import NAME, attend_by_comparison, row_mask
from rm_recipe.model.shared_prefix import decide_sharing, measure_sharing, padded_rows, shared_rows

SMALL = {"vocab_size": 50, "pad_token_id": 0, "num_labels": 1}
GROUPED = {**SMALL, **TINY, "num_key_value_heads": 2}
# What shares a prefix, with what its small copy is made by.
SHARING = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 4096},
    "gemma3_text": {**GROUPED, "head_dim": 8},
    "gpt2": {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {**SMALL, **TINY},
}
BATCH = [
    Encoded([5, 6, 7], [[8, 9], [4]]),
    Encoded([], [[11, 12], [13, 14, 15], [13]]),
    Encoded([20, 21, 22], [[23], [24, 25, 3, 3, 4, 5, 6, 7, 8, 9]]),
] * 3


def classifier(kind: str, attention: str = "sdpa", **keys):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHARING.get(kind, SMALL), **keys})
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()
    add_reward_positions(model)
    return model


def rewards(model, batch):
    """By shared rows, by padded ones, and of each conversation alone."""
    conversations = [ids for comparison in batch for ids in comparison.conversations()]
    with torch.no_grad():
        shared, padded = (model(**rows(batch, 0)).logits[:, 0] for rows in (shared_rows, padded_rows))
        alone = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in conversations])
    return shared, padded, alone


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHARING)
def test_shared_rows_give_the_rewards_of_one_sequence_at_a_time(name, attention):
    model = classifier(name, attention)
    shared, padded, alone = rewards(model, BATCH)
    assert (shared - alone).abs().max() <= 1e-5
    assert (padded - alone).abs().max() <= 1e-5
    assert alone.std() > 1e-3  # the rewards do differ
    sharing = decide_sharing(model, "auto", max_length=16)
    assert sharing.used
    assert sharing.max_abs_diff <= 1e-5


def test_a_forward_that_ignores_positions_fails_the_proof(monkeypatch):
    def without_positions(batch, *args, **kwargs):
        rows = shared_rows(batch, *args, **kwargs)
        rows["position_ids"] = torch.arange(rows["input_ids"].shape[1]).expand_as(rows["input_ids"])
        return rows

    monkeypatch.setattr(shared_prefix, "shared_rows", without_positions)
    assert measure_sharing(AutoConfig.for_model("llama", **GROUPED), "sdpa") > 1e-4
    assert not decide_sharing(classifier("llama"), "auto", 64).used


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_a_row_may_exceed_the_sliding_window_and_a_conversation_may_not(name, attention):
    model = classifier(name, attention, sliding_window=8)
    ends = ([*range(6, 13)], [6, 7, 8, 13, 14, 15, 16])
    short = [Encoded(*split_at_common_prefix([[t, *end] for end in ends])) for t in range(5)]
    assert shared_rows(short, 0)["input_ids"].shape[1] > 8
    shared, _, alone = rewards(model, short)
    assert (shared - alone).abs().max() <= 1e-5
    assert decide_sharing(model, "auto", max_length=8).used
    long = [Encoded([t, *range(6, 11)], [[*range(11, 18)], [*range(18, 24)]]) for t in range(24, 29)]
    model = classifier(name, attention, sliding_window=8)
    shared, padded, alone = rewards(model, long)
    assert (padded - alone).abs().max() <= 1e-5
    assert (shared - alone).abs().max() > 1e-4  # so that it has to be refused
    sharing = decide_sharing(model, "auto", max_length=13)
    assert not sharing.used
    assert "longer than the sliding window of 8 tokens" in sharing.reason


def test_a_window_that_cuts_the_mask_of_a_row_is_not_shared():
    """GPT-Neo's own, of 256 tokens, shortened what replies saw of their prompt, without a word."""
    keys = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    model = classifier("gpt_neo", "eager", **keys, window_size=8)
    shared, padded, alone = rewards(model, [Encoded([5, 6, 7], [[8, 9], [4, 3], [6, 9, 4]])])
    assert (padded - alone).abs().max() <= 1e-5
    assert (shared - alone).abs().max() > 1e-4
    model.config.window_size = 256
    assert not decide_sharing(model, "auto", max_length=64).used


def test_sharing_is_proven_for_a_mixture_of_experts():
    """Their grouped kernels raise in float64, so that none shared."""
    config = AutoConfig.for_model("mixtral", **GROUPED, num_local_experts=4)
    assert measure_sharing(config, "sdpa") <= 1e-5


def test_an_encoder_never_shares_and_off_means_off(tiny_distilbert):
    encoder = AutoModelForSequenceClassification.from_pretrained(tiny_distilbert, num_labels=1)
    assert decide_sharing(encoder, "auto", 64).reason == "distilbert has no causal classifier"
    assert decide_sharing(classifier("llama"), "off", 64).reason == "prefix_sharing is off"


def test_the_copy_that_proves_it_is_small():
    """Of a Llama of 7B, a copy took 3 GB."""
    with torch.device("meta"):
        large = AutoConfig.for_model("llama", **GROUPED | {"intermediate_size": 10**5})
        small = shared_prefix._small(large, 20)
        assert AutoModelForSequenceClassification.from_config(small).num_parameters() < 1e6


# --- attention, one comparison after the other ------------------------------------------------------


class Layer(torch.nn.Module):
    num_key_value_groups = 2


def masks(batch=BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch in one row: the labels that blocks are made of, and the whole square."""
    labels = shared_rows(batch, 0, one_row=True)["attention_mask"]
    return labels, row_mask(labels)


def attention(mask: torch.Tensor, dtype=torch.float64, *, autocast=False, width=8, **keys):
    """Output and gradients, by this precision, of random tensors; two query heads for each key head."""
    torch.manual_seed(0)
    exact = [torch.randn(1, heads, mask.shape[-1], width, dtype=torch.float64) for heads in (4, 2, 2)]
    tensors = [each.to(dtype).requires_grad_() for each in exact]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, _ = attend_by_comparison(Layer(), *tensors, mask, **keys)
        output.double().square().sum().backward()
    return [each.double() for each in (output.detach(), *(tensor.grad for tensor in tensors))]


@pytest.mark.parametrize("queries", [128, 3])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_block_by_block_output_and_gradients_are_those_of_the_whole_mask(scaling, queries, monkeypatch):
    """A few queries at a time too, as of long comparisons."""
    monkeypatch.setattr(row_attention, "QUERIES", queries)
    labels, square = masks()
    expected = attention(square, scaling=scaling)
    found = attention(labels, scaling=scaling)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12


def each_sequence(
    query, key, value, queries, keys, most_queries, most_keys, *, scale, window_size, **grouped
):
    """What torch says that `varlen_attn` computes, which runs on GPUs alone."""
    assert queries.dtype == keys.dtype == torch.int32
    assert grouped == row_attention.GROUPED
    outputs = []
    for q, k, v in zip(
        query.split(queries.diff().tolist()),
        *(x.split(keys.diff().tolist()) for x in (key, value)),
        strict=True,
    ):
        assert len(q) <= most_queries
        assert len(k) <= most_keys
        assert window_size == (-1, 0)
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        heads = (x.transpose(0, 1) for x in (q, k, v))
        outputs.append(scaled_dot_product_attention(*heads, seen, scale=scale).transpose(0, 1))
    return torch.cat(outputs)


def test_sequences_for_flash_attention_see_what_the_whole_mask_shows(monkeypatch):
    monkeypatch.setattr(row_attention, "varlen_attn", each_sequence)
    monkeypatch.setattr(row_attention, "HALF", (torch.float64,))
    labels, square = masks()
    row_attention.announce_rows(labels, row_attention.Row(labels.clone(), on_gpu=True))
    for ours, theirs in zip(attention(labels), attention(square), strict=True):
        assert (ours - theirs).abs().max() <= 1e-12


def test_autocast_changes_no_precision_that_it_has_left():
    """Neither forwards nor backwards: in fp32 a product that it rounds to bf16 is wrong by 1e-3."""
    labels, square = masks()
    found = attention(labels, torch.float32, autocast=True)
    for ours, theirs in zip(found, attention(square), strict=True):
        assert (ours - theirs).abs().max() <= 1e-4


def test_in_bf16_outputs_and_gradients_are_nearly_as_close_to_exact_as_those_of_sdpa():
    """Of a comparison of several tiles, whose parts are summed in fp32."""
    labels, square = masks([Encoded([1] * 500, [[2] * 60, [3] * 40])])
    ours, sdpa = (attention(mask, torch.bfloat16, width=64) for mask in (labels, square))
    for own, theirs, exact in zip(ours, sdpa, attention(square, width=64), strict=True):
        assert 0 < (own - exact).norm() <= 2 * (theirs - exact).norm()


def test_dropout_drops_weights_of_a_comparison_and_scales_up_the_others():
    labels, square = masks()
    length = labels.shape[-1]
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 4, length, 8, dtype=torch.float64)
    value = torch.eye(length, dtype=torch.float64).expand(1, 4, -1, -1)  # the output is the weights

    def weights(**keys):
        return attend_by_comparison(torch.nn.Module(), query, key, value, labels, **keys)[0].transpose(1, 2)

    whole, dropped = weights(), weights(dropout=0.5)
    kept = dropped != 0
    assert not kept[~square.expand_as(kept)].any()
    assert 0.4 < kept[square.expand_as(kept)].double().mean() < 0.6
    assert (dropped - 2 * whole)[kept].abs().max() <= 1e-12


def test_a_reentrant_checkpoint_changes_no_gradient():
    """It detaches what it is given, the mask too."""
    model = classifier("llama").train()
    assert decide_sharing(model, "auto", 64).used
    rows = shared_rows(BATCH, 0, one_row=True)

    def gradients() -> torch.Tensor:
        model.zero_grad()
        model(**rows).logits.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert torch.allclose(gradients(), expected, atol=1e-6)
    assert expected.norm() > 0


def test_heads_too_wide_for_flash_attention_keep_the_mask_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a newer one than is here is meant
    for width, attention in ((256, "sdpa"), (128, NAME)):
        model = classifier("llama", head_dim=width)
        assert decide_sharing(model, "auto", 64, torch.device("cuda")).used
        assert model.config._attn_implementation == attention


def test_a_model_with_row_attention_still_scores_plain_batches(tmp_path):
    model = classifier("llama")
    padded = padded_rows(BATCH, 0)
    with torch.no_grad():
        expected = model(**padded).logits
        assert decide_sharing(model, "auto", 64, torch.device("mps")).used
        assert model.config._attn_implementation == "sdpa"  # which computes the whole mask
        assert decide_sharing(model, "auto", 64).used
        assert model.config._attn_implementation == NAME
        assert torch.equal(model(**padded).logits, expected)
        shared = model(**shared_rows(BATCH, 0, one_row=True)).logits
    assert (shared - expected).abs().max() <= 1e-5
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
