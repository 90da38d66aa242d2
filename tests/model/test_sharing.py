"""Prefixes are shared where a small copy of the model proves it exact, and only there."""

import copy

import pytest
import torch
from conftest import REPOSITORY
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PerceiverConfig,
    Qwen2Config,
    T5Config,
)
from trl import ModelConfig

from rm_recipe.data.comparison import split_at_common_prefix
from rm_recipe.data.messages import conversation
from rm_recipe.model import shared_prefix as module
from rm_recipe.model.reward_model import add_reward_positions, load_base
from rm_recipe.model.shared_prefix import (
    check_padding,
    decide_sharing,
    measure_sharing,
    padded_rows,
    shared_rows,
)
from rm_recipe.model.tokenizer import load_tokenizer

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "mistral": MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=4096),
    "gemma3": Gemma3TextConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
}


def classifier(name: str, attention: str = "sdpa", **keys):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config.num_labels = 1
    config.update(keys)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()
    add_reward_positions(model)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_shared_rows_give_the_rewards_of_one_sequence_at_a_time(name, attention):
    model = classifier(name, attention)
    batch = [
        split_at_common_prefix([[5, 6, 7, 8, 9], [5, 6, 7, 10]]),
        split_at_common_prefix([[11, 12], [13, 14, 15], [13, 16]]),
        split_at_common_prefix([[20, 21, 22, 23], [20, 21, 22, 24]]),
    ]
    conversations = [ids for comparison in batch for ids in comparison.conversations()]
    with torch.no_grad():
        shared = model(**shared_rows(batch, 0)).logits[:, 0]
        padded = model(**padded_rows(batch, 0)).logits[:, 0]
        alone = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in conversations])
    assert (shared - alone).abs().max() <= 1e-5
    assert (padded - alone).abs().max() <= 1e-5
    assert alone.std() > 1e-3  # the rewards do differ


@pytest.mark.parametrize("name", CONFIGS)
def test_the_proof_holds_for_decoders_and_is_recorded(name):
    sharing = decide_sharing(classifier(name), "auto", max_length=16)
    assert sharing.used
    assert sharing.max_abs_diff <= 1e-5


def test_a_forward_that_ignores_positions_fails_the_proof(monkeypatch):
    def without_positions(batch, *args, **kwargs):
        rows = shared_rows(batch, *args, **kwargs)
        rows["position_ids"] = torch.arange(rows["input_ids"].shape[1]).expand_as(rows["input_ids"])
        return rows

    monkeypatch.setattr("rm_recipe.model.shared_prefix.shared_rows", without_positions)
    assert measure_sharing(CONFIGS["llama"], "sdpa") > 1e-4
    assert not decide_sharing(classifier("llama"), "auto", 64).used


def test_a_conversation_that_may_exceed_the_sliding_window_is_not_shared():
    model = classifier("mistral")
    assert decide_sharing(model, "auto", 4096).used
    sharing = decide_sharing(model, "auto", 4097)
    assert not sharing.used
    assert "4096" in sharing.reason


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_row_may_exceed_the_sliding_window_where_no_conversation_does(name, attention):
    model = classifier(name, attention, sliding_window=8)
    batch = [
        split_at_common_prefix([[t, 6, 7, 8, 9, 10, 11, 12], [t, 6, 7, 8, 13, 14, 15, 16]])
        for t in range(4, 9)
    ]
    rows = shared_rows(batch, 0)
    assert rows["input_ids"].shape[1] > model.config.sliding_window
    conversations = [ids for comparison in batch for ids in comparison.conversations()]
    with torch.no_grad():
        shared = model(**rows).logits[:, 0]
        alone = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in conversations])
    assert (shared - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_past_the_sliding_window_rows_hold_one_conversation_because_shared_ones_would_be_wrong(
    name, attention
):
    model = classifier(name, attention, sliding_window=8)
    batch = [
        split_at_common_prefix([[t, *range(6, 18)], [t, *range(6, 11), *range(18, 24)]])
        for t in range(24, 29)
    ]
    conversations = [ids for comparison in batch for ids in comparison.conversations()]
    assert {len(ids) for ids in conversations} == {12, 13}
    sharing = decide_sharing(model, "auto", max_length=13)
    assert not sharing.used
    assert sharing.reason == "conversations may be longer than the sliding window of 8 tokens"
    with torch.no_grad():
        shared = model(**shared_rows(batch, 0)).logits[:, 0]
        padded = model(**padded_rows(batch, 0)).logits[:, 0]
        alone = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in conversations])
    assert (padded - alone).abs().max() <= 1e-5
    assert (shared - alone).abs().max() > 1e-4


def test_an_encoder_never_shares(tiny_distilbert):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_distilbert, num_labels=1)
    assert decide_sharing(model, "auto", 64).reason == "distilbert has no causal classifier"


@pytest.fixture
def made(monkeypatch):
    """The numbers of parameters of the copies that are made with weights."""
    sizes = []
    from_config = AutoModelForSequenceClassification.from_config

    def watched(*args, **keys):
        model = from_config(*args, **keys)
        sizes.append(sum(p.numel() for p in model.parameters() if p.device.type != "meta"))
        assert sizes[-1] <= 1e8, "the copy is no small one"
        return model

    monkeypatch.setattr(module.AutoModelForSequenceClassification, "from_config", watched)
    return sizes


def test_padding_is_checked_on_a_copy_that_costs_less_than_a_second_or_not_at_all(made, monkeypatch):
    """ALBERT took 5 s of every command, Perceiver 33, and T5-11B 7.5 GB."""
    monkeypatch.setattr(torch.nn.Module, "double", lambda model: model)  # half the time of this test
    check_padding(PerceiverConfig(), "m")
    assert made[0] == 0 < made[1] <= module.LARGEST_COPY
    made.clear()
    check_padding(AlbertConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12), "m")
    assert 0 < made[1] < 1e7
    for config in (AlbertConfig(), T5Config(d_model=1024, d_ff=65536, num_heads=128, d_kv=128)):
        made.clear()
        check_padding(config, "m")
        assert made == [0]


def test_sharing_is_proven_on_a_copy_without_the_width_of_feed_forward_layers(made):
    """Of a Llama of 7B, a copy took 3 GB, most of it these."""
    wide = {**SMALL, "intermediate_size": 10**5, "num_key_value_heads": 2}
    for config in (LlamaConfig(**wide), GPT2Config(vocab_size=50, n_embd=32, n_head=4, n_inner=10**5)):
        assert measure_sharing(config, "sdpa") <= 1e-5
    assert max(made) < 1e6


def test_sharing_is_proven_for_a_mixture_of_experts():
    """Their grouped kernels raise in float64, so that none shared."""
    config = MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=4)
    assert measure_sharing(config, "sdpa") <= 1e-5


def test_off_means_off():
    assert decide_sharing(classifier("llama"), "off", 64).reason == "prefix_sharing is off"


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pretrained_model_gives_the_rewards_of_one_sequence_at_a_time(attention):
    """SmolLM2-135M-Instruct, as `rm-recipe prepare offline` makes it."""
    folder = REPOSITORY / "models" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip("rm-recipe prepare offline has not been run")
    tokenizer = load_tokenizer(str(folder))
    config = ModelConfig(model_name_or_path=str(folder), dtype="float32", attn_implementation=attention)
    model = load_base(config, tokenizer, seed=0)[0].eval()
    prompt = [{"role": "user", "content": "What do I do about the mice in my kitchen? " * 4}]
    replies = ["Set a trap near the wall.", "No idea, sorry.", "A cat would help. " * 8]
    batch = [
        split_at_common_prefix(
            [
                tokenizer.apply_chat_template(conversation(prompt[:], reply + end), return_dict=False)
                for reply in replies
            ]
        )
        for end in ("", " Good luck!")
    ]
    conversations = [ids for comparison in batch for ids in comparison.conversations()]
    with torch.no_grad():
        shared = model(**shared_rows(batch, tokenizer.pad_token_id)).logits[:, 0]
        alone = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in conversations])
    assert (shared - alone).abs().max() <= 1e-5
    assert alone.std() > 1e-2
