"""Keys, their types and their choices are TRL's own and ours."""

import dataclasses

import pytest
from trl import DatasetMixtureConfig, ModelConfig, RewardConfig

from rm_recipe.recipe_keys import REFUSED_KEYS, check_value, key_types, looks_local


def test_every_key_of_trl_is_accepted_or_refused_with_a_reason():
    known = key_types().keys() | REFUSED_KEYS.keys()
    for part in (RewardConfig, ModelConfig, DatasetMixtureConfig):
        assert {item.name for item in dataclasses.fields(part) if item.init} <= known


@pytest.mark.parametrize(
    ("key", "value", "parsed"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1.0),
        ("lora_target_modules", "all-linear", ["all-linear"]),
        ("lora_target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("optim", "adamw_torch", "adamw_torch"),
        ("max_length", None, None),
        ("debug", "underflow_overflow", "underflow_overflow"),
    ],
)
def test_a_value_is_read_in_its_keys_type(key, value, parsed):
    fault, found = check_value(key, value, from_text=False)
    assert fault is None
    assert found == parsed


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("lora_r", 1.5, "should be a whole number"),
        ("lora_r", True, "should be a whole number"),
        ("use_peft", "perhaps", "should be true or false"),
        ("seed", None, "'seed' has no value"),
        ("optim", "adamw_torsh", "Did you mean 'adamw_torch'?"),
        ("dtype", "float64", "is not one of auto, bfloat16, float16, float32"),
        ("prefix_sharing", "on", "is not one of auto, off"),
        ("model_name_or_path", 3, "should be text"),
        ("hub_always_push", True, "is not for a recipe"),
    ],
)
def test_a_value_of_another_type_or_choice_is_refused(key, value, fault):
    found, _ = check_value(key, value, from_text=False)
    assert fault in found


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("Anthropic/hh-rlhf", False), ("gpt2", False), ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", False),
        ("./x", True), ("/x", True), ("a/b/c", True), ("data.jsonl.gz", True), ("d/x.parquet", True),
    ],
)  # fmt: skip
def test_a_hub_id_is_told_from_a_path(name, local):
    assert looks_local(name) is local
