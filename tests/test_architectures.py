"""Of every architecture: the new parameters are trained and saved, and what is read back is what was trained.

Every base is random and comes without a classification head, as a language model or a bare encoder.
"""

import json

import pytest
import torch
from conftest import (
    TINY,
    TINY_BASES,
    TINY_DECODER,
    TINY_ENCODER,
    TINY_ENCODERS,
    Trained,
    make_tokenizer,
    train_watched,
    write_jsonl,
)
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    FNetConfig,
    Gemma3Config,
    MixtralConfig,
    ModernBertConfig,
    XLNetConfig,
)

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

IN_FULL, RSLORA, DORA = "deberta in full", "rslora", "dora of gpt2"
SET_UPS = {
    **{name: (name, {}) for name in TINY_BASES},
    IN_FULL: ("deberta", {"use_peft": False, "lora_target_modules": "omit"}),
    RSLORA: ("llama", {"use_rslora": True, "lora_alpha": 16}),
    DORA: ("gpt2", {"use_dora": True}),
}


FINISHED: dict[str, Trained] = {}


@pytest.fixture
def trained(write_recipe, tiny_base, tmp_path_factory):
    """Trains by one of `SET_UPS`, in fp32, once for all tests."""

    def get(name: str) -> Trained:
        if name not in FINISHED:
            base, keys = SET_UPS[name]
            common = {"max_steps": 2, "learning_rate": LEARNING_RATE, "lora_target_modules": "all-linear"}
            common["output_dir"] = str(tmp_path_factory.mktemp("trained") / "run")
            recipe = write_recipe(model_name_or_path=str(tiny_base(base)), **common | keys)
            FINISHED[name] = train_watched(recipe)
        return FINISHED[name]

    return get


@pytest.mark.parametrize("name", [*ARCHITECTURES, IN_FULL])
def test_every_new_parameter_is_saved_and_moved(trained, name):
    result, new = trained(name), NEW[SET_UPS[name][0]]
    saved = result.saved()
    assert saved.keys() >= new
    body = [key for key in saved if "layer.0." in key and key.endswith("weight")]
    assert name != IN_FULL or not any(torch.equal(saved[key], result.started(key)) for key in body)
    for key in new:
        if key.endswith("weight"):  # a bias may cancel in every comparison
            moved = (saved[key] - result.started(key)).abs()
            assert moved.mean() > LEARNING_RATE / 10, key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_of_the_body_has_learnt_an_adapter_and_the_rest_is_not_saved(trained, name):
    saved = trained(name).saved()
    up = [value for key, value in saved.items() if key.endswith("lora_B.weight")]
    assert len(up) == LINEAR_LAYERS[name]
    assert all(value.abs().max() > LEARNING_RATE / 10 for value in up)
    assert {key for key in saved if "lora_" not in key} == NEW[name]


@pytest.mark.parametrize("name", [*ARCHITECTURES, IN_FULL, RSLORA, DORA, "mistral-short"])
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
OTHERS = [pytest.param(n, marks=pytest.mark.slow) for n in (*ARCHITECTURES, RSLORA, DORA)]


@pytest.mark.parametrize("name", ["gpt2", "deberta", *OTHERS])
def test_the_export_gives_the_rewards_that_were_trained(trained, name, tmp_path):
    result = trained(name)
    export(result.run, tmp_path / "export")
    rewards = RewardModel.from_pretrained(tmp_path / "export").score(ITEMS)
    assert rewards == pytest.approx(result.rewards(ITEMS), abs=1e-5)


@pytest.mark.parametrize(("architecture", "labels"), [("llama", 1), ("llama", 2), ("bert", 2)])
def test_a_classifier_is_a_base_too(tiny_base, write_recipe, tmp_path, architecture, labels):
    """Of one label it is a reward model to go on with, of more its head is drawn anew."""
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base(architecture), num_labels=labels)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_base(architecture)).save_pretrained(tmp_path / "base")
    result = train_watched(write_recipe(model_name_or_path=str(tmp_path / "base"), max_steps=2))
    head = "score.weight" if architecture == "llama" else "classifier.weight"
    assert torch.equal(result.started(head), base.state_dict()[head]) == (labels == 1)
    assert (result.saved()[head] - result.started(head)).abs().mean() > LEARNING_RATE / 10
    assert RewardModel.from_pretrained(result.run).score(ITEMS) == pytest.approx(
        result.rewards(ITEMS), abs=1e-6
    )


# --- the ones that need care: random bodies, with a tokenizer of the shape that each has ------------


def odd_config(name: str, size: int, pad: int):
    text = {"vocab_size": size, **TINY_DECODER}
    if name == "modernbert":
        keys = {"pad_token_id": pad, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}
        return ModernBertConfig(vocab_size=size, **TINY_ENCODER, local_attention=16, **keys)
    if name == "bart":
        return BartConfig(vocab_size=size, d_model=32, encoder_layers=1, decoder_layers=1)
    if name == "xlnet":
        return XLNetConfig(vocab_size=size, d_model=32, n_layer=2, n_head=4, d_inner=64)
    if name == "fnet":
        return FNetConfig(vocab_size=size, **{key: TINY[key] for key in TINY if "heads" not in key})
    if name == "gemma3":
        images = {"mm_tokens_per_image": 4, "boi_token_id": 8, "eoi_token_id": 9, "image_token_id": 10}
        tower = {**TINY, "image_size": 28, "patch_size": 14}
        return Gemma3Config(text_config={**text, "head_dim": 8}, vision_config=tower, **images)
    return MixtralConfig(**text, num_local_experts=4)


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
        if name not in ("gemma3", "mixtral"):
            tokenizer.chat_template = None
        if name in ("modernbert", "bart", "xlnet", "fnet"):
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


ODD = {"modernbert": {}, "gemma3": {}, "mixtral": {"lora_dropout": 0}}


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
    recipe = odd_recipe(name, **ODD[name])
    run = train_watched(recipe).run
    assert export(run)["passed"]


@pytest.mark.parametrize("name", ["xlnet", "fnet", "bart"])
def test_a_base_whose_rewards_depend_on_their_batch_is_refused_before_data_is_read(
    odd_recipe, name, monkeypatch
):
    """XLNet reads its last token, padding or not, FNet has no mask: their exports failed after training."""
    monkeypatch.setattr("rm_recipe.training.train.load_splits", None)
    with pytest.raises(RecipeError, match=f"the rewards of this {name} would depend on the batch"):
        load_data(read_recipe(odd_recipe(name)))


def test_dropout_on_experts_is_refused_with_what_to_set(odd_recipe):
    recipe = read_recipe(odd_recipe("mixtral", lora_dropout=0.1, disable_dropout=False))
    with pytest.raises(RecipeError, match="does not work with lora_dropout != 0; set 'lora_dropout: 0'"):
        load_data(recipe)
