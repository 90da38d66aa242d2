"""What is trained is fp32, whatever it was loaded in; a head that the base brings keeps its numbers."""

import pytest
import torch
from conftest import train_watched
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe import RewardModel

ITEMS = [{"prompt": "hello 3 cat", "response": r} for r in ("good good", "bad bad", "the dog sat far away")]
HALF = {"dtype": "bfloat16", "bf16": True}


@pytest.fixture
def reward_base(tiny_base, tmp_path):
    """A function: a reward model to go on with, its body in bf16 and its head in fp32."""

    def make(name):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_base(name), num_labels=1)
        model.base_model.bfloat16()
        model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
        AutoTokenizer.from_pretrained(tiny_base(name)).save_pretrained(tmp_path / "base")
        return tmp_path / "base", model

    return make


def trained_dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad}


def test_a_small_step_moves_nearly_every_weight_of_a_bf16_base_trained_in_full(reward_base, write_recipe):
    """Held in bf16, a sixth of them moved."""
    keys = {"max_steps": 1, "learning_rate": 1e-5, "weight_decay": 0.0, "use_peft": False}
    result = train_watched(write_recipe(model_name_or_path=str(reward_base("llama")[0]), **keys, **HALF))
    assert trained_dtypes(result.model) == {torch.float32}
    saved = {name: value for name, value in result.saved().items() if "layers" in name}
    moved = torch.cat([(value != result.started(name)).flatten() for name, value in saved.items()])
    assert moved.float().mean() > 0.9
    reward_model = RewardModel.from_pretrained(result.run)
    assert {p.dtype for p in reward_model.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "bits"), [("llama", 4), ("deberta", 8)])
def test_a_head_that_the_base_has_starts_with_its_checkpoints_numbers(reward_base, write_recipe, name, bits):
    """It was rounded to bf16 where it was loaded, and by TRL on a quantised base."""
    folder, base = reward_base(name)
    keys = {"model_name_or_path": str(folder), "max_steps": 1, "learning_rate": 1e-5}
    result = train_watched(write_recipe(**keys, **HALF, **{f"load_in_{bits}bit": True}))
    heads = [key for key in base.state_dict() if not key.startswith(base.base_model_prefix + ".")]
    assert heads
    for key in heads:
        assert torch.equal(result.started(key), base.state_dict()[key]), key
        assert result.started(key).dtype == torch.float32
    assert trained_dtypes(result.model) == {torch.float32}


def test_layers_trained_in_full_with_lora_are_fp32_and_read_back_as_trained(write_recipe, rewards_elsewhere):
    keys = {"lora_modules_to_save": ["embed_tokens"], "lora_target_modules": ["up_proj"]}
    result = train_watched(write_recipe(max_steps=2, learning_rate=1e-5, **keys, **HALF))
    assert trained_dtypes(result.model) == {torch.float32}
    saved = {key: value for key, value in result.saved().items() if "embed_tokens" in key}
    assert saved
    for key, value in saved.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float()), key
    rewards = result.rewards(ITEMS)
    assert rewards_elsewhere(result.run, ITEMS) == pytest.approx(rewards, abs=1e-6)
