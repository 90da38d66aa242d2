"""The head is fp32, new, seeded, trained and saved; LoRA leaves the base alone."""

import shutil
import weakref
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BitsAndBytesConfig,
)
from trl import ModelConfig, RewardConfig, RewardTrainer

from rm_recipe import RewardModel
from rm_recipe.data.comparison import split_at_common_prefix
from rm_recipe.errors import RecipeError
from rm_recipe.model import reward_model
from rm_recipe.model.head import Float32Linear
from rm_recipe.model.lora import check_head_is_whole
from rm_recipe.model.reward_model import autocast, load_base, load_trained
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train

BATCH = [split_at_common_prefix([[5, 6, 7, 8], [5, 6, 9]])]


def base(folder: Path, seed: int = 0, **keys):
    config = ModelConfig(model_name_or_path=str(folder), **keys)
    model, new = load_base(config, load_tokenizer(str(folder)), seed)
    return model, new, config


@pytest.mark.parametrize(
    ("fixture", "expected"),
    [("tiny_llama", ["score"]), ("tiny_distilbert", ["classifier", "pre_classifier"])],
)
def test_what_the_base_lacks_is_found_and_is_fp32(fixture, expected, request):
    model, new, _ = base(request.getfixturevalue(fixture), dtype="bfloat16", use_peft=True)
    assert new == expected
    for name in new:
        assert isinstance(model.get_submodule(name), Float32Linear)
        assert model.get_submodule(name).weight.dtype == torch.float32
    assert next(model.base_model.parameters()).dtype == torch.bfloat16
    assert model.config.num_labels == 1


def test_the_heads_start_comes_from_the_seed(tiny_llama):
    first, again, other = (base(tiny_llama, seed)[0].score.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rewards_are_fp32_under_bf16_autocast(tiny_llama):
    model = base(tiny_llama, dtype="bfloat16", use_peft=True)[0]
    with torch.no_grad(), autocast(model):
        reward = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert reward.dtype == torch.float32
    assert reward.item() != reward.bfloat16().item()


def test_a_quantised_base_keeps_its_head_in_fp32_and_its_rewards_after_a_forward(tiny_llama):
    """bitsandbytes repacks 4-bit weights in place at the first forward without gradients."""
    model, _, _ = base(tiny_llama, dtype="bfloat16", load_in_4bit=True, use_peft=True)
    assert type(model.score) is Float32Linear
    projection = model.model.layers[0].self_attn.q_proj
    assert type(projection).__name__ == "Linear4bit"
    before = projection.weight.data.clone()
    with torch.no_grad(), autocast(model):
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    assert torch.equal(projection.weight.data, before)


def test_a_model_with_two_labels_is_no_reward_model(tiny_llama, tmp_path):
    model, _, _ = base(tiny_llama)
    model.config.num_labels = 2
    model.config.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="has 2 labels; a reward model is a sequence"):
        load_trained(str(tmp_path), load_tokenizer(str(tiny_llama)))


def test_a_base_without_a_head_is_no_reward_model(tiny_llama, tmp_path):
    model, _, _ = base(tiny_llama)
    model.base_model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="has no trained head .score missing"):
        load_trained(str(tmp_path), load_tokenizer(str(tiny_llama)))


def test_a_model_that_cannot_be_had_is_named():
    with pytest.raises(RecipeError, match="'model_name_or_path: nobody/nothing' cannot be loaded"):
        load_base(ModelConfig(model_name_or_path="nobody/nothing"), None, 0)


def test_a_base_that_comes_quantised_with_its_head_is_refused(tiny_distilbert, tmp_path):
    model, _, _ = base(tiny_distilbert)
    model.config.save_pretrained(tmp_path)
    quantised = AutoModelForMaskedLM.from_pretrained(
        tiny_distilbert, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    quantised.save_pretrained(tmp_path)
    load_tokenizer(str(tiny_distilbert)).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="it comes quantised: take the original"):
        base(tmp_path, use_peft=True)


def test_a_head_that_is_quantised_is_refused(tiny_distilbert):
    model, _, _ = base(tiny_distilbert)
    check_head_is_whole(model.base_model, [], "m")
    model.classifier = Linear4bit(32, 1)
    with pytest.raises(
        RecipeError, match=r"m' has a quantised head \(classifier\); it comes quantised: take"
    ):
        check_head_is_whole(model, ["classifier"], "m")


def test_a_base_that_comes_quantised_with_its_head_spared_is_trained(tiny_llama, tmp_path, write_recipe):
    quantised = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    quantised.save_pretrained(tmp_path / "base")
    load_tokenizer(str(tiny_llama)).save_pretrained(tmp_path / "base")
    train(read_recipe(write_recipe(model_name_or_path=str(tmp_path / "base"))))
    judge = RewardModel.from_pretrained(tmp_path / "run")
    scores = judge.score([{"prompt": "hello 3 cat", "response": r} for r in ("good good", "bad bad")])
    assert scores[0] > scores[1]


def test_a_base_that_comes_quantised_is_not_trained_in_full(tiny_llama, tmp_path):
    quantised = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    quantised.save_pretrained(tmp_path)
    load_tokenizer(str(tiny_llama)).save_pretrained(tmp_path)
    with pytest.raises(
        RecipeError, match="comes quantised and cannot be trained in full: set 'use_peft: true'"
    ):
        base(tmp_path, use_peft=False)


def test_a_classifier_of_two_labels_is_a_base_with_a_fresh_head(tiny_llama, tmp_path):
    torch.manual_seed(0)
    two = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=2)
    two.save_pretrained(tmp_path)
    load_tokenizer(str(tiny_llama)).save_pretrained(tmp_path)
    model, new, _ = base(tmp_path)
    assert new == ["score"]
    assert torch.equal(model.score.weight, base(tiny_llama)[0].score.weight)


def test_what_peft_refuses_is_refused_before_weights_are_read(tiny_llama, monkeypatch):
    read = []
    load = reward_model._load
    monkeypatch.setattr(
        reward_model, "_load", lambda *a, **k: read.append(k.get("device_map")) or load(*a, **k)
    )
    with pytest.raises(RecipeError, match="LoRA cannot be added: Target module LlamaAttention"):
        base(tiny_llama, use_peft=True, lora_target_modules=["self_attn"])
    assert read == ["meta"]


def test_a_weights_file_that_is_broken_is_named(tiny_llama, tmp_path):
    """As half a download is, or a Git LFS pointer."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(RecipeError, match="/base' cannot be loaded as a classifier: "):
        base(tmp_path / "base")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_model_that_there_is_no_memory_for_is_not_called_a_wrong_one(tiny_llama, monkeypatch, error):
    def raise_it(*_, **__):
        raise error

    tokenizer = load_tokenizer(str(tiny_llama))
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", raise_it)
    with pytest.raises(RuntimeError, match="memory"):
        load_base(ModelConfig(model_name_or_path=str(tiny_llama)), tokenizer, 0)


def test_a_model_that_was_dropped_is_gone_when_the_next_is_loaded(tiny_llama, tmp_path):
    """As between `evaluate` and `export` in one process: a GPU may not hold both."""
    tokenizer = load_tokenizer(str(tiny_llama))
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tiny_llama, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    classifier.save_pretrained(tmp_path)
    dropped = weakref.ref(load_trained(str(tmp_path), tokenizer))
    assert load_trained(str(tmp_path), tokenizer) is not dropped()
    assert dropped() is None


@pytest.mark.parametrize(
    "resized", [None, 1, 64], ids=["pads with EOS", "a pad token", "to a multiple of 64"]
)
def test_a_reward_adapter_of_trls_on_gpt2_gives_the_rewards_that_it_was_trained_to(
    tiny_base, tmp_path, resized
):
    """Its base has no token to pad with, so that one is added: by whoever trained, or here."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("gpt2"))
    tokenizer.unk_token = None
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base("gpt2"), num_labels=1)
    if resized:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=resized)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([{"chosen": "good cat", "rejected": "bad dog"}] * 4),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["c_attn"]),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    judge = RewardModel.from_pretrained(tmp_path / "adapter")
    assert (len(judge.tokenizer), judge.model.get_input_embeddings().num_embeddings) == (
        {None: (318, 318), 1: (318, 318), 64: (318, 320)}[resized]
    )
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.item()
    found = judge.score_encoded([split_at_common_prefix([[5, 6, 7, 8], [5, 6, 9]])])[0][0]
    assert found == pytest.approx(expected, abs=1e-6)


def test_an_adapter_whose_base_has_other_embeddings_now_is_refused(tiny_llama, write_recipe, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "base")
    train(read_recipe(write_recipe(model_name_or_path=str(tmp_path / "base"), max_steps=1)))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(330)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(RecipeError, match=r"with 317 embeddings, and '.*/base' has 330: it is"):
        RewardModel.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_no_keys_and_values_are_kept_for_a_generation_that_never_comes(tiny_base, name):
    model = base(tiny_base(name))[0].eval()
    seen = []
    model.base_model.register_forward_hook(lambda _, __, output: seen.append(output))
    model(input_ids=torch.tensor([[2, 5, 6, 7]]))
    assert seen[0].get("past_key_values") is None


def test_an_encoder_decoder_keeps_none_either():
    keys = {f"{part}_{key}": n for part in ("encoder", "decoder")
            for key, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    config = BartConfig(vocab_size=320, d_model=16, num_labels=1, **keys)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert model(input_ids=torch.tensor([[0, 5, 2]])).past_key_values is not None
    reward_model.prepare_for_rewards(model, make_tokenizer())
    assert model(input_ids=torch.tensor([[0, 5, 2]])).past_key_values is None
