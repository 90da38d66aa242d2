"""A reward model may start from an SFT model: a folder, or a LoRA adapter that is merged first."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_tokenizer, run_cli
from huggingface_hub.utils import httpx
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from trl import ModelConfig

from rm_recipe import RewardModel
from rm_recipe.errors import RecipeError
from rm_recipe.exporting.export import export
from rm_recipe.model import lora, source
from rm_recipe.model.reward_model import as_one_model, load_base
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe import weights
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import load_data, train


def save_adapter(folder, base, **keys) -> PeftModel:
    """An adapter that does something, without a tokenizer."""
    torch.manual_seed(1)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **keys})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def sft(tiny_llama, tmp_path):
    """The folder of an SFT adapter on the tiny Llama."""
    save_adapter(tmp_path / "sft", tiny_llama)
    return tmp_path / "sft"


def load(folder, **keys):
    config = ModelConfig(model_name_or_path=str(folder), **keys)
    return load_base(config, load_tokenizer(str(folder)), seed=0)[0]


def test_an_sft_adapter_is_merged_into_its_base_before_the_head_is_added(sft, tiny_llama):
    merged, plain = load(sft), load(tiny_llama)
    torch.manual_seed(1)
    causal = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), sft).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = causal(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(merged.model(ids).last_hidden_state, expected, atol=1e-6)
        assert not torch.allclose(plain.model(ids).last_hidden_state, expected, atol=1e-2)
    assert torch.equal(merged.score.weight, plain.score.weight)  # the seed's, whatever the body
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert merged.name_or_path == str(sft)


def test_an_adapter_whose_embeddings_grew_with_its_tokenizer_keeps_both(tiny_llama, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|tool|>"])
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "sft", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "sft")
    loaded = load(tmp_path / "sft")
    assert torch.equal(loaded.get_input_embeddings().weight, base.get_input_embeddings().weight)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_run_from_an_sft_adapter_is_read_back_and_exported_with_it(write_recipe, tmp_path, sft, quantised):
    keys = {"bf16": True, "load_in_4bit": True} if quantised else {}
    train(read_recipe(write_recipe(model_name_or_path=str(sft), num_train_epochs=1, **keys)))
    run = tmp_path / "run"
    assert json.loads((run / "model" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        sft
    )
    items = [{"prompt": "hello", "response": reply} for reply in ("good good", "bad far")]
    rewards = RewardModel.from_pretrained(run).score(items)
    checked = export(run)
    assert checked["max_abs_diff"]["merged"] <= (0.1 if quantised else 1e-5)
    exported = RewardModel.from_pretrained(run / "export").score(items)
    assert abs(rewards - exported).max() <= (0.1 if quantised else 1e-5)
    merged = AutoModelForSequenceClassification.from_pretrained(run / "export")
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_an_adapter_without_a_tokenizer_takes_its_bases_and_with_one_its_own(sft, tiny_llama):
    assert load_tokenizer(str(sft)).chat_template == CHAT_TEMPLATE
    own = make_tokenizer()
    own.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    own.save_pretrained(sft)
    assert load_tokenizer(str(sft)).chat_template == own.chat_template


def test_nothing_is_left_of_the_merged_model(sft):
    with as_one_model(str(sft)) as folder:
        assert (Path(folder) / "model.safetensors").is_file()
    assert not Path(folder).exists()
    assert (sft / "adapter_model.safetensors").is_file()


def test_a_reward_models_adapter_is_no_start_and_an_sft_adapter_no_judge(write_recipe, tmp_path, sft):
    train(read_recipe(write_recipe(max_steps=2)))
    again = read_recipe(write_recipe(model_name_or_path=str(tmp_path / "run" / "model")))
    with pytest.raises(RecipeError, match="adapter of a classifier, .* start from its export"):
        load_data(again)
    with pytest.raises(RecipeError, match="is the adapter of a language model, not of a reward model"):
        RewardModel.from_pretrained(sft)


def test_an_adapter_that_cannot_be_merged_or_has_lost_its_base_is_refused(sft, tiny_llama, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    model.save_pretrained(tmp_path / "prefix")
    with pytest.raises(RecipeError, match="of type PREFIX_TUNING, which cannot be merged into its base"):
        load(tmp_path / "prefix")
    settings = json.loads((sft / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (sft / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load(sft)
    (sft / "adapter_config.json").write_text("{")
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load_tokenizer(str(sft))


def test_an_sft_model_folder_is_a_base_like_any_other(tiny_llama, sft, write_recipe, tmp_path):
    with as_one_model(str(sft)) as folder:
        shutil.copytree(folder, tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    assert torch.equal(load(tmp_path / "whole").model.layers[0].mlp.up_proj.weight,
                       load(sft).model.layers[0].mlp.up_proj.weight)  # fmt: skip


def test_the_command_line_trains_from_an_sft_adapter(write_recipe, sft, tmp_path):
    result = run_cli("train", str(write_recipe(model_name_or_path=str(sft), max_steps=2)))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()


def test_the_hub_is_asked_once_and_a_proxy_that_fails_is_named(monkeypatch):
    asked = []

    def answer(name, file, revision):
        asked.append((name, file, revision))
        if name == "user/behind-a-proxy":
            raise httpx.ProxyError("407 Proxy Authentication Required")
        return False

    monkeypatch.setattr(weights, "_on_hub", cache(answer))
    for _ in range(3):
        assert source.adapter_config("user/model", "v1") is None
    assert asked == [("user/model", "adapter_config.json", "v1")]
    with pytest.raises(RecipeError, match="'model_name_or_path: user/behind-a-proxy' cannot be loaded: 407"):
        source.adapter_config("user/behind-a-proxy")


def test_an_adapter_on_a_base_that_comes_quantised_is_merged_into_what_it_was_trained_on(
    tiny_llama, tmp_path
):
    """QLoRA on a 4-bit repository is how most train on one small GPU."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=settings)
    quantised.save_pretrained(tmp_path / "base")
    load_tokenizer(str(tiny_llama)).save_pretrained(tmp_path / "base")
    causal = save_adapter(tmp_path / "sft", tmp_path / "base").eval()
    lora.keep_layout(causal)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = causal(ids, output_hidden_states=True).hidden_states[-1]
        found = load(tmp_path / "sft", dtype="float32").model(ids).last_hidden_state
    assert torch.allclose(found, expected.float(), atol=0.02 * float(expected.abs().max()))
