"""Keys, their types and their choices are TRL's own and ours; each does what it says, or is refused."""

import dataclasses
import enum
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_recipe, ready_trainer
from trl import ModelConfig, RewardConfig, get_quantization_config

from rm_recipe.model import lora as lora_module
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.recipe.schema import (
    FIXED_KEYS,
    FOREIGN_KEYS,
    REFUSED_KEYS,
    check_values,
    looks_local,
    recipe_keys,
)

# --- what each of TRL's fields does --------------------------------------------------------------

# What Trainer reads of its arguments, with a value that is not the default.
GIVEN_TO_TRAINER = yaml.safe_load("""
{learning_rate: 0.0123, weight_decay: 0.07, optim: adamw_torch, adam_beta1: 0.8, adam_beta2: 0.7,
adam_epsilon: 1.0e-5, lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.25},
warmup_steps: 10, max_grad_norm: 0.3, logging_strategy: epoch, logging_steps: 5, logging_first_step: true,
eval_strategy: steps, eval_steps: 4, eval_delay: 6, eval_on_start: true, save_strategy: epoch, save_steps: 6,
dataloader_num_workers: 2, dataloader_pin_memory: false, dataloader_persistent_workers: true,
dataloader_prefetch_factor: 3, dataloader_multiprocessing_context: forkserver, dataloader_in_order: false,
ddp_find_unused_parameters: true, ddp_bucket_cap_mb: 11, ddp_broadcast_buffers: false, ddp_static_graph: true,
ddp_timeout: 77, skip_memory_metrics: false, log_level: error, log_on_each_node: false, disable_tqdm: true,
torch_empty_cache_steps: 9, full_determinism: false, train_sampling_strategy: sequential}
""")
REENTRANT = {"use_reentrant": False}


def train_loader(trainer):
    return trainer.get_train_dataloader()


def lengths(trainer):
    return trainer.set_initial_training_values(trainer.args, train_loader(trainer))


def peft_config(trainer):
    return trainer.model.peft_config["default"]


def lora_layer(trainer):
    return trainer.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")


# What has its effect in something of ours: a value, how a trainer shows it, and what it shows then.
SHOWN_BY_A_TRAINER = {
    "output_dir": ("{folder}/elsewhere", lambda t: Path(t.args.output_dir).name, "elsewhere"),
    "per_device_train_batch_size": (5, lambda t: train_loader(t).total_batch_size, 5),
    "per_device_eval_batch_size": (4, lambda t: t.get_eval_dataloader().total_batch_size, 4),
    "gradient_accumulation_steps": (3, lambda t: lengths(t)[1], 5),
    "num_train_epochs": (4, lambda t: lengths(t)[-1], 20),
    "data_seed": (7, lambda t: t.args.data_seed, 7),
    "gradient_checkpointing_kwargs": (REENTRANT, lambda t: t.args.activation_checkpointing_kwargs, REENTRANT),
    "neftune_noise_alpha": (5.0, lambda t: t.neftune_noise_alpha, 5.0),
    "use_cpu": (True, lambda t: t.args.device.type, "cpu"),
    "disable_dropout": (False, lambda t: lora_layer(t).lora_dropout["default"].p, 0.25),
    "lora_dropout": (0.25, lambda t: lora_layer(t).lora_dropout["default"].p, 0.25),
    "use_peft": (True, lambda t: type(t.model).__name__, "PeftModelForSequenceClassification"),
    "lora_r": (3, lambda t: lora_layer(t).r["default"], 3),
    "lora_alpha": (12, lambda t: lora_layer(t).lora_alpha["default"], 12),
    "use_rslora": (True, lambda t: round(lora_layer(t).scaling["default"], 4), 6.9282),
    "use_dora": (True, lambda t: len(lora_layer(t).lora_magnitude_vector), 1),
    "lora_target_modules": (["q_proj"], lambda t: [*peft_config(t).target_modules], ["q_proj"]),
    "lora_modules_to_save": (["norm"], lambda t: "norm" in peft_config(t).modules_to_save, True),
    "model_revision": ("v2", lambda t: peft_config(t).revision, "v2"),
}
# What other tests show, and what needs a GPU, several processes, a tracker or a long run to show.
ELSEWHERE = """
model_name_or_path dtype attn_implementation load_in_4bit load_in_8bit bf16 fp16 seed max_steps max_length
dataset_num_proc chat_template_path center_rewards_coefficient gradient_checkpointing activation_checkpointing
activation_checkpointing_kwargs optim_args load_best_model_at_end metric_for_best_model save_total_limit
report_to fsdp push_to_hub hub_model_id hub_private_repo lora_target_parameters bnb_4bit_quant_type
bnb_4bit_quant_storage use_bnb_nested_quant torch_compile debug torch_compile_backend torch_compile_mode
greater_is_better restore_callback_states_from_checkpoint tf32 log_level_replica ddp_backend fsdp_config
deepspeed optim_target_modules activation_offloading run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id use_liger_kernel
""".split()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tiny_llama, tiny_data):
    """Made by a recipe in which every key of the first two tables has another value than by default."""
    folder = tmp_path_factory.mktemp("keys")
    keys: dict[str, Any] = {key: value for key, (value, *_) in SHOWN_BY_A_TRAINER.items()}
    keys |= GIVEN_TO_TRAINER | {"output_dir": keys["output_dir"].format(folder=folder)}
    recipe = read_recipe(make_recipe(folder, tiny_llama, tiny_data, **keys, prefix_sharing="off"))
    made = ready_trainer(recipe)
    made.create_optimizer_and_scheduler(100)
    return made


def test_a_key_is_what_the_trainer_is_told_or_does(trainer):
    for key, value in GIVEN_TO_TRAINER.items():
        told = getattr(trainer.args, key)
        assert (told.value if isinstance(told, enum.Enum) else told) == value, key
    for key, (_, show, expected) in SHOWN_BY_A_TRAINER.items():
        assert show(trainer) == expected, key


def test_every_field_of_trl_is_refused_or_shown_to_do_what_it_says():
    """A field that a release adds fails here until somebody has decided."""
    tables = (REFUSED_KEYS, FIXED_KEYS, GIVEN_TO_TRAINER, SHOWN_BY_A_TRAINER, ELSEWHERE)
    fields = {f.name for part in (RewardConfig, ModelConfig) for f in dataclasses.fields(part) if f.init}
    assert sorted(key for table in tables for key in table) == sorted({*fields, "streaming"})


def test_what_no_trainer_of_the_tests_shows_is_handed_on_to_peft_and_bitsandbytes():
    config = ModelConfig(use_peft=True, lora_target_parameters=["k_proj.weight"])
    assert lora_module.lora_config(config, ["score"]).target_parameters == ["k_proj.weight"]
    config = ModelConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16")
    assert get_quantization_config(config).bnb_4bit_quant_storage == torch.bfloat16


# --- what is refused ------------------------------------------------------------------------------


OTHER_VALUES = {
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "pad_to_multiple_of": 8,
    "length_column_name": "n",
    "eval_accumulation_steps": 2,
    "include_num_input_tokens_seen": "all",
    "include_for_metrics": ["loss"],
}


def fault_of(key: str, value: Any) -> str:
    return " ".join(check_values({key: value})[1])


def test_a_key_that_would_do_nothing_takes_the_value_that_says_so_alone():
    """So a run's recipe.yaml, which holds every key, can be trained with again."""
    defaults = RewardConfig(use_cpu=True, bf16=False)
    for key, reason in FIXED_KEYS.items():
        default = getattr(defaults, key)
        assert fault_of(key, default) == ""
        assert fault_of(key, OTHER_VALUES.get(key, not default)).endswith(f"': {reason}")


def test_another_tools_name_leads_to_keys_that_there_are():
    known = recipe_keys().model_fields.keys()
    for key, hint in FOREIGN_KEYS.items():
        assert fault_of(key, 1) == f"unknown key '{key}'. Here it is {hint}"
        named = re.findall(r"'([a-z_0-9]+)(?:: [\w-]+)?'", hint)
        assert {*named} <= {*known, "name"}
        assert key not in known


def test_a_hint_leads_to_no_key_that_is_refused_too():
    for key in (*REFUSED_KEYS, *FIXED_KEYS, "include_inputs_for_metrics", "fp16_full_evals"):
        suggested = re.findall(r"Did you mean '(\w+)'", fault_of(f"{key}s", 1))
        assert not {*suggested} & {*REFUSED_KEYS, *FIXED_KEYS}


# --- types and choices ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "parsed"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1.0),
        ("lora_target_modules", "all-linear", ["all-linear"]),
        ("lora_target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("optim", "adamw_torch", "adamw_torch"),
        ("fsdp", "true", True),
        ("max_length", None, None),
    ],
)
def test_a_value_is_read_in_its_keys_type(key, value, parsed):
    assert check_values({key: value}) == ({key: parsed}, [])


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("lora_r", 1.5, "'lora_r: 1.5' should be a valid integer"),
        ("lora_r", True, "should be a number, not true or false"),
        ("use_peft", "perhaps", "'use_peft: perhaps' should be a valid boolean"),
        ("seed", None, "'seed: null' should be a valid integer"),
        ("learning_rate", float("nan"), "should be a finite number"),
        ("dtype", "float64", "'dtype: float64' should be 'auto', 'bfloat16', 'float16' or 'float32'"),
        ("save_strategy", "hourly", "should be 'no', 'steps', 'epoch' or 'best'"),
        ("margin_map", {"better": "much"}, "should be a valid number"),
    ],
)
def test_a_value_of_another_type_or_choice_is_refused(key, value, fault):
    assert fault in fault_of(key, value)


def test_a_hub_id_is_told_from_a_path():
    assert not any(map(looks_local, ("Anthropic/hh-rlhf", "gpt2", "TinyLlama/TinyLlama-1.1B-Chat-v1.0")))
    assert all(map(looks_local, ("./x", "/x", "a/b/c", "data.jsonl.gz", "d/x.parquet")))
