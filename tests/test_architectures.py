"""Of every architecture: the new parameters are trained and saved, and what is read back is what was trained.

Every base is random and comes without a classification head, as a language model or a bare encoder.
"""

import json
from functools import cache

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import (
    TINY,
    TINY_BASES,
    TINY_DECODER,
    TINY_ENCODER,
    TINY_ENCODERS,
    Trained,
    make_recipe,
    make_tokenizer,
    train_watched,
    write_jsonl,
)
from transformers import AutoConfig, AutoModel

from rm_recipe import RewardModel
from rm_recipe.errors import RecipeError
from rm_recipe.exporting.export import export
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import load_data

DECODERS = ("llama", "qwen2", "mistral", "gpt2")
ARCHITECTURES = (*DECODERS, *TINY_ENCODERS)
ITEMS = [{"prompt": "hello 3 cat", "response": r} for r in ("good good", "bad bad", "the dog sat far away")]
LEARNING_RATE = 1e-2

# What a classifier has and the base has not, by name.
NEW = {
    **{name: {"score.weight"} for name in (*DECODERS, "mistral-short")},
    "bert": {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"},
    "distilbert": {"pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"},
    "deberta": {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"},
}
# Of the body's two layers.
LINEAR_LAYERS = dict.fromkeys(ARCHITECTURES, 12) | dict.fromkeys(DECODERS, 14) | {"gpt2": 8}

IN_FULL, RSLORA, DORA, GPT2_IN_4_BITS = "deberta in full", "rslora", "dora of gpt2", "gpt2 in 4 bits"
QUANTISED = {
    "nf4": {"load_in_4bit": True, "bf16": True},
    "fp4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True},
    "8-bit": {"load_in_8bit": True},
}
SET_UPS = {
    **{name: (name, {}) for name in TINY_BASES},
    **{name: ("llama", keys) for name, keys in QUANTISED.items()},
    IN_FULL: ("deberta", {"use_peft": False, "lora_target_modules": "omit"}),
    RSLORA: ("llama", {"use_rslora": True, "lora_alpha": 16}),
    DORA: ("gpt2", {"use_dora": True}),
    GPT2_IN_4_BITS: ("gpt2", {"load_in_4bit": True}),
}


@pytest.fixture(scope="module")
def trained(tiny_base, tiny_data, tmp_path_factory):
    """A function: two steps by one of `SET_UPS`, trained once for all tests."""

    @cache
    def get(name: str) -> Trained:
        base, keys = SET_UPS[name]
        keys = {"max_steps": 2, "learning_rate": LEARNING_RATE, "lora_target_modules": "all-linear"} | keys
        folder = tmp_path_factory.mktemp("trained")
        return train_watched(make_recipe(folder, tiny_base(base), tiny_data, **keys))

    return get


@pytest.mark.parametrize("name", [*ARCHITECTURES, *QUANTISED, IN_FULL])
def test_every_new_parameter_and_adapter_moves_and_is_saved_in_fp32_and_nothing_else(trained, name):
    result, base = trained(name), SET_UPS[name][0]
    saved = result.saved()
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert name == IN_FULL or {key for key in saved if "lora_" not in key} == NEW[base]
    moved = {key: (value - result.started(key)).abs() for key, value in saved.items()}
    # A bias may cancel in every comparison.
    assert all(moved[key].mean() > LEARNING_RATE / 10 for key in NEW[base] if key.endswith("weight"))
    layers = [key for key in moved if key.endswith("lora_B.weight")]
    if name == IN_FULL:
        layers = [key for key in moved if "layer." in key and key.endswith(("dense.weight", "proj.weight"))]
    assert len(layers) == LINEAR_LAYERS[base]
    assert all(moved[key].max() > LEARNING_RATE / 10 for key in layers)


@pytest.mark.parametrize("name", QUANTISED)
def test_the_bits_are_those_that_the_recipe_names(trained, name):
    layers = [m for m in trained(name).model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
    assert len(layers) == LINEAR_LAYERS["llama"]
    if name == "8-bit":
        assert {layer.weight.dtype for layer in layers} == {torch.int8}
        return
    states = [(layer.weight.quant_state, layer.compute_dtype) for layer in layers]
    expected = ("nf4", False, torch.bfloat16) if name == "nf4" else ("fp4", True, torch.float32)
    assert {(state.quant_type, state.nested, computes) for state, computes in states} == {expected}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *QUANTISED, IN_FULL, RSLORA, DORA, "mistral-short"])
def test_a_fresh_process_gives_the_rewards_that_were_trained_and_decoders_share_prefixes(
    trained, rewards_elsewhere, name
):
    result = trained(name)
    rewards = result.rewards(ITEMS)
    assert len(set(rewards)) == len(ITEMS)
    assert rewards_elsewhere(result.run, ITEMS) == pytest.approx(rewards, abs=1e-6)
    sharing = json.loads((result.run / "run.json").read_text())["prefix_sharing"]
    assert sharing["used"] == (SET_UPS[name][0] in DECODERS), sharing["reason"]


# Each takes a fresh process: of every kind of head and position one is enough for `make test`.
OTHERS = [pytest.param(n, marks=pytest.mark.slow) for n in (*ARCHITECTURES, "8-bit", RSLORA, DORA)]


@pytest.mark.parametrize("name", ["gpt2", "deberta", GPT2_IN_4_BITS, *OTHERS])
def test_the_export_gives_the_rewards_that_were_trained(trained, name, tmp_path):
    result = trained(name)
    export(result.run, tmp_path / "export")
    rewards = RewardModel.from_pretrained(tmp_path / "export").score(ITEMS)
    rounded = name == "8-bit"  # its activations too
    assert rewards == pytest.approx(result.rewards(ITEMS), abs=0.02 if rounded else 1e-5)


# --- the ones that need care: random bodies, with a tokenizer of the shape that each has ------------


def odd_config(name: str, size: int, pad: int):
    text = {"vocab_size": size, **TINY_DECODER}
    keys = text | {"num_local_experts": 4}
    if name == "modernbert":
        keys = {"pad_token_id": pad, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}
        keys |= {"vocab_size": size, "local_attention": 16, **TINY_ENCODER}
    if name == "gemma3":
        keys = {"mm_tokens_per_image": 4, "boi_token_id": 8, "eoi_token_id": 9, "image_token_id": 10}
        tower = {**TINY, "image_size": 28, "patch_size": 14}
        keys |= {"text_config": {**text, "head_dim": 8}, "vision_config": tower}
    return AutoConfig.for_model(name, **keys)


def turns(n: int, start: int) -> list[dict]:
    """Comparisons whose conversations have one, two or three questions."""
    rows = []
    for number in range(start, start + n):
        roles = (["user", "assistant"] * 3)[: 2 * (number % 3) + 1]
        prompt = [{"role": role, "content": f"hello {number} cat"} for role in roles]
        rows.append({"prompt": prompt, "chosen": "good good", "rejected": "bad bad"})
    return rows


@pytest.fixture
def odd_recipe(tmp_path, write_recipe):
    """A function: the recipe, in bf16, of one of `odd_config` on conversations of several turns."""

    def make(name: str, **keys):
        tokenizer = make_tokenizer()
        if name == "modernbert":
            tokenizer.chat_template = None
            tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<unk>"})
        torch.manual_seed(0)
        config = odd_config(name, len(tokenizer), tokenizer.pad_token_id)
        AutoModel.from_config(config).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        write_jsonl(tmp_path / "turns" / "train.jsonl", turns(16, 0))
        write_jsonl(tmp_path / "turns" / "test.jsonl", turns(9, 100))
        keys = {"dtype": "bfloat16", "bf16": True, "max_steps": 1, "lora_target_modules": "all-linear"} | keys
        keys |= {"model_name_or_path": str(tmp_path / "base"), "dataset_name": str(tmp_path / "turns")}
        return write_recipe(**keys)

    return make


# ModernBERT's rewards lie closer together than bf16 rounds until it has trained for some steps.
ODD = {"modernbert": {"max_steps": 6}, "gemma3": {}, "mixtral": {"lora_dropout": 0}}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_architecture_trains_and_is_scored_as_it_is_merged(odd_recipe, name):
    """A norm in ModernBERT's head, Gemma 3's vision tower, Mixtral's experts."""
    result = train_watched(odd_recipe(name, **ODD[name]))
    reward_model = RewardModel.from_pretrained(result.run)
    items = [{"prompt": row["prompt"], "response": row["chosen"]} for row in turns(4, 7)]
    rewards = reward_model.score(items)
    reward_model.model = reward_model.model.float().merge_and_unload()
    assert reward_model.score(items) == pytest.approx(rewards, abs=0.05)
    assert not any("vision" in key for key in result.saved())


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_an_odd_architecture_is_exported(odd_recipe, name):
    assert export(train_watched(odd_recipe(name, **ODD[name])).run)["passed"]


@pytest.mark.parametrize("kind", ["xlnet", "fnet", "bart"])
def test_a_base_whose_rewards_depend_on_their_batch_is_refused_before_data_is_read(
    write_recipe, tmp_path, monkeypatch, kind
):
    """XLNet reads its last token, padding or not, FNet has no mask: their exports failed after training."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    monkeypatch.setattr("rm_recipe.training.train.load_splits", None)
    with pytest.raises(RecipeError, match=f"the rewards of this {kind} would depend on the batch"):
        load_data(read_recipe(write_recipe(model_name_or_path=str(tmp_path))))


def test_dropout_on_experts_is_refused_with_what_to_set(odd_recipe):
    recipe = read_recipe(odd_recipe("mixtral", lora_dropout=0.1, disable_dropout=False))
    with pytest.raises(RecipeError, match="does not work with lora_dropout != 0; set 'lora_dropout: 0'"):
        load_data(recipe)
