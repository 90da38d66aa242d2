"""Keys, their types and their choices are TRL's own and ours; each does what it says, or is refused."""

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY, make_recipe
from transformers import DefaultFlowCallback, TrainerControl
from trl import DatasetMixtureConfig, ModelConfig, RewardConfig

from rm_recipe.errors import RecipeError
from rm_recipe.model import lora as lora_module
from rm_recipe.model.shared_prefix import Sharing
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.recipe.schema import (
    FIXED_KEYS,
    FOREIGN_KEYS,
    IDLE_KEYS,
    REFUSED_KEYS,
    check_value,
    key_types,
    looks_local,
)
from rm_recipe.tools.pipeline import push_export
from rm_recipe.training.train import load_data, load_model, make_trainer

OF_TRL = [item.name for part in (RewardConfig, ModelConfig) for item in dataclasses.fields(part) if item.init]


# --- what each of TRL's fields does --------------------------------------------------------------


def flow(trainer) -> dict[str, list[int]]:
    """The steps, of the first 12, after which Trainer would log, evaluate and save."""
    state = SimpleNamespace(global_step=0, max_steps=100, epoch=0.0)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        setattr(state, name, getattr(trainer.args, name))
    found: dict[str, list[int]] = {"log": [], "evaluate": [], "save": []}
    for step in range(1, 13):
        state.global_step, control = step, TrainerControl()
        DefaultFlowCallback().on_step_end(trainer.args, state, control)
        for name, steps in found.items():
            if getattr(control, f"should_{name}"):
                steps.append(step)
    return found


def schedule(trainer) -> list[float]:
    """The learning rate's share at the first, the eleventh and the last of 100 steps."""
    shares = trainer.lr_scheduler.lr_lambdas[0]
    return [round(shares(step), 3) for step in (0, 5, 10, 100)]


def train_loader(trainer):
    return trainer.get_train_dataloader()


def lengths(trainer):
    return trainer.set_initial_training_values(trainer.args, train_loader(trainer))


def group(trainer):
    return trainer.optimizer.param_groups[0]


# A value that is not the default, how a trainer shows it, and what it shows then.
SHOWN_BY_A_TRAINER = {
    "output_dir": ("{folder}/elsewhere", lambda t: Path(t.args.output_dir).name, "elsewhere"),
    "per_device_train_batch_size": (5, lambda t: train_loader(t).total_batch_size, 5),
    "per_device_eval_batch_size": (4, lambda t: t.get_eval_dataloader().total_batch_size, 4),
    "gradient_accumulation_steps": (
        3,
        lambda t: t.set_initial_training_values(t.args, train_loader(t))[1],
        4,
    ),
    "num_train_epochs": (4, lambda t: lengths(t)[-1], 16),
    "learning_rate": (0.0123, lambda t: group(t)["initial_lr"], 0.0123),
    "weight_decay": (0.07, lambda t: group(t)["weight_decay"], 0.07),
    "optim": ("adamw_torch", lambda t: (type(t.optimizer).__name__, group(t)["fused"]), ("AdamW", None)),
    "adam_beta1": (0.8, lambda t: group(t)["betas"][0], 0.8),
    "adam_beta2": (0.7, lambda t: group(t)["betas"][1], 0.7),
    "adam_epsilon": (1e-5, lambda t: group(t)["eps"], 1e-5),
    "lr_scheduler_type": ("cosine_with_min_lr", lambda t: schedule(t)[2], 1.0),
    "lr_scheduler_kwargs": ({"min_lr_rate": 0.25}, lambda t: schedule(t)[-1], 0.25),
    "warmup_steps": (10, lambda t: schedule(t)[:2], [0.0, 0.5]),
    "logging_strategy": ("steps", lambda t: flow(t)["log"][-1], 10),
    "logging_steps": (5, lambda t: flow(t)["log"][1:], [5, 10]),
    "logging_first_step": (True, lambda t: flow(t)["log"][0], 1),
    "eval_strategy": ("steps", lambda t: flow(t)["evaluate"][-1], 12),
    "eval_steps": (4, lambda t: flow(t)["evaluate"], [8, 12]),
    "eval_delay": (6, lambda t: flow(t)["evaluate"][0], 8),
    "save_strategy": ("steps", lambda t: flow(t)["save"][-1], 12),
    "save_steps": (6, lambda t: flow(t)["save"], [6, 12]),
    "data_seed": (7, lambda t: train_loader(t).batch_sampler.sampler.initial_seed, 7),
    "accelerator_config": ({"even_batches": False}, lambda t: t.accelerator.even_batches, False),
    "dataloader_drop_last": (True, lambda t: len(train_loader(t)), 12),
    "dataloader_num_workers": (2, lambda t: train_loader(t).num_workers, 2),
    "dataloader_pin_memory": (False, lambda t: train_loader(t).pin_memory, False),
    "dataloader_persistent_workers": (True, lambda t: train_loader(t).persistent_workers, True),
    "dataloader_prefetch_factor": (3, lambda t: train_loader(t).prefetch_factor, 3),
    "dataloader_multiprocessing_context": (
        "forkserver",
        lambda t: train_loader(t).multiprocessing_context.get_start_method(),
        "forkserver",
    ),
    "dataloader_in_order": (False, lambda t: train_loader(t).in_order, False),
    "ddp_find_unused_parameters": (True, lambda t: t.accelerator.ddp_handler.find_unused_parameters, True),
    "ddp_bucket_cap_mb": (11, lambda t: t.accelerator.ddp_handler.bucket_cap_mb, 11),
    "ddp_broadcast_buffers": (False, lambda t: t.accelerator.ddp_handler.broadcast_buffers, False),
    "ddp_static_graph": (True, lambda t: t.accelerator.ddp_handler.static_graph, True),
    "ddp_timeout": (77, lambda t: t.args.ddp_timeout_delta.seconds, 77),
    "gradient_checkpointing_kwargs": (
        {"use_reentrant": False},
        lambda t: t.args.activation_checkpointing_kwargs,
        {"use_reentrant": False},
    ),
    "neftune_noise_alpha": (5.0, lambda t: t.neftune_noise_alpha, 5.0),
    "skip_memory_metrics": (False, lambda t: t._memory_tracker.skip_memory_metrics, False),
    "use_cpu": (True, lambda t: t.args.device.type, "cpu"),
    "log_level": ("error", lambda t: t.args.get_process_log_level(), 40),
    "disable_dropout": (False, lambda t: lora_layer(t).lora_dropout["default"].p, 0.25),
    "lora_dropout": (0.25, lambda t: lora_layer(t).lora_dropout["default"].p, 0.25),
    "use_peft": (True, lambda t: type(t.model).__name__, "PeftModelForSequenceClassification"),
    "lora_r": (3, lambda t: lora_layer(t).r["default"], 3),
    "lora_alpha": (12, lambda t: lora_layer(t).lora_alpha["default"], 12),
    "use_rslora": (True, lambda t: round(lora_layer(t).scaling["default"], 4), 6.9282),
    "use_dora": (True, lambda t: len(lora_layer(t).lora_magnitude_vector), 1),
    "lora_target_modules": (["q_proj"], lambda t: t.model.peft_config["default"].target_modules, {"q_proj"}),
    "lora_modules_to_save": (
        ["norm"],
        lambda t: "norm" in t.model.peft_config["default"].modules_to_save,
        True,
    ),
    "model_revision": ("v2", lambda t: t.model.peft_config["default"].revision, "v2"),
}


def lora_layer(trainer):
    return trainer.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")


# Tests of what a field does: in a file that names it, or one of this file.
SHOWN_BY_TESTS = {
    "model_name_or_path": "test_modeling.py",
    "dtype": "test_recipe.py",
    "attn_implementation": "test_attention.py",
    "load_in_4bit": "test_quantisation.py",
    "load_in_8bit": "test_quantisation.py",
    "bf16": "test_recipe.py",
    "fp16": "test_recipe.py",
    "seed": "test_bad_input.py",
    "max_steps": "test_preflight.py",
    "max_length": "test_encoding.py",
    "dataset_num_proc": "test_recipe_faults.py",
    "chat_template_path": "test_tokenization.py",
    "center_rewards_coefficient": "test_reward_trainer.py",
    "gradient_checkpointing": "test_fitting.py",
    "activation_checkpointing": "test_preflight.py",
    "activation_checkpointing_kwargs": "test_preflight.py",
    "optim_args": "test_recipe_faults.py",
    "load_best_model_at_end": "test_checkpoints.py",
    "metric_for_best_model": "test_checkpoints.py",
    "save_total_limit": "test_checkpoints.py",
    "report_to": "test_recipe_faults.py",
    "fsdp": "test_distribution.py",
    "push_to_hub": "test_published.py",
    "hub_model_id": "test_published.py",
    "hub_private_repo": "test_the_repository_that_is_made_is_as_private_as_the_recipe_says",
    "lora_target_parameters": "test_lora_and_four_bits_are_as_the_keys_say",
    "bnb_4bit_quant_type": "test_lora_and_four_bits_are_as_the_keys_say",
    "bnb_4bit_quant_storage": "test_lora_and_four_bits_are_as_the_keys_say",
    "use_bnb_nested_quant": "test_lora_and_four_bits_are_as_the_keys_say",
}

_TRAINER, _TRACKERS = "transformers.trainer", "transformers.integrations.integration_utils"
# What needs a GPU, several processes, a tracker or a long run to show: where it is read.
READ_BY = {
    "max_grad_norm": _TRAINER,
    "full_determinism": _TRAINER,
    "torch_empty_cache_steps": _TRAINER,
    "torch_compile": _TRAINER,
    "torch_compile_backend": _TRAINER,
    "torch_compile_mode": _TRAINER,
    "tf32": "transformers.training_args",
    "debug": _TRAINER,
    "eval_on_start": _TRAINER,
    "disable_tqdm": _TRAINER,
    "greater_is_better": _TRAINER,
    "restore_callback_states_from_checkpoint": _TRAINER,
    "log_level_replica": "transformers.training_args",
    "log_on_each_node": "transformers.training_args",
    "optim_target_modules": "transformers.trainer_optimizer",
    "activation_offloading": "trl.trainer.reward_trainer",
    "ddp_backend": "transformers.training_args",
    "fsdp_config": "transformers.training_args",
    "deepspeed": "transformers.training_args",
    "run_name": _TRACKERS,
    "project": _TRACKERS,
    "trackio_space_id": _TRACKERS,
    "trackio_bucket_id": _TRACKERS,
    "trackio_static_space_id": _TRACKERS,
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tiny_llama, tiny_data):
    """Made by a recipe in which every key of `SHOWN_BY_A_TRAINER` has another value than by default."""
    folder = tmp_path_factory.mktemp("keys")
    keys: dict[str, Any] = {key: value for key, (value, *_) in SHOWN_BY_A_TRAINER.items()}
    keys["output_dir"] = keys["output_dir"].format(folder=folder)
    recipe = read_recipe(make_recipe(folder, tiny_llama, tiny_data, **keys, prefix_sharing="off"))
    tokenizer, train_split, test_split, _ = load_data(recipe)
    made = make_trainer(
        recipe,
        tokenizer,
        *load_model(recipe, tokenizer),
        train_split,
        test_split,
        Sharing(False, "off", None),
    )
    made.create_optimizer_and_scheduler(100)
    return made


@pytest.mark.parametrize("key", SHOWN_BY_A_TRAINER)
def test_a_key_of_trl_is_what_the_trainer_does(trainer, key):
    value, show, expected = SHOWN_BY_A_TRAINER[key]
    fields = {item.name: item for part in (RewardConfig, ModelConfig) for item in dataclasses.fields(part)}
    assert show(trainer) == expected
    if key not in ("logging_strategy", "save_strategy"):  # whose other values have no steps
        assert fields[key].default != value


@pytest.mark.parametrize("key", SHOWN_BY_TESTS)
def test_a_key_of_trl_has_a_test_that_names_it(key):
    where = SHOWN_BY_TESTS[key]
    (path,) = REPOSITORY.glob(f"tests/**/{where}") if where.endswith(".py") else [None]
    text = path.read_text() if path else inspect.getsource(globals()[where])
    assert path != Path(__file__)  # where this very table names it
    assert re.search(rf"\b{key}\b", text)


@pytest.mark.parametrize("key", READ_BY)
def test_a_key_of_trl_is_read_where_it_takes_effect(key):
    assert re.search(rf"\.{key}\b", inspect.getsource(import_module(READ_BY[key])))


def test_every_field_of_trl_is_refused_or_shown_to_do_what_it_says():
    """A field that a release adds fails here until somebody has decided."""
    tables = (REFUSED_KEYS, FIXED_KEYS, SHOWN_BY_A_TRAINER, SHOWN_BY_TESTS, READ_BY)
    decided = [key for table in tables for key in table]
    assert sorted(decided) == sorted({*OF_TRL, "streaming"})  # which is of DatasetMixtureConfig


def test_lora_and_four_bits_are_as_the_keys_say():
    lora = {"lora_r": 3, "lora_alpha": 12, "lora_target_parameters": ["k_proj.weight"]}
    bits = {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True, "bnb_4bit_quant_storage": "bfloat16"}
    config = ModelConfig(use_peft=True, load_in_4bit=True, **lora, **bits)
    assert lora_module.lora_config(config, ["score"]).target_parameters == ["k_proj.weight"]
    made = lora_module.settings(config, skip=["score"])
    assert made.bnb_4bit_quant_type == "fp4"
    assert made.bnb_4bit_use_double_quant
    assert str(made.bnb_4bit_quant_storage) == "torch.bfloat16"


def test_the_repository_that_is_made_is_as_private_as_the_recipe_says(write_recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "rm_recipe.exporting.push.push", lambda _, name, private: asked.append((name, private))
    )
    for private in (True, False):
        keys = {"push_to_hub": True, "hub_model_id": "ann/judge", "hub_private_repo": private}
        push_export(read_recipe(write_recipe(**keys)))
    assert asked == [("ann/judge", True), ("ann/judge", False)]


# --- what is refused ------------------------------------------------------------------------------


OTHER_VALUES = {
    "label_smoothing_factor": 0.1, "liger_kernel_config": {"rope": True}, "pad_to_multiple_of": 8,
    "train_sampling_strategy": "group_by_length", "length_column_name": "n", "eval_accumulation_steps": 2,
    "include_num_input_tokens_seen": "all", "include_for_metrics": ["loss"],
}  # fmt: skip


@pytest.mark.parametrize("key", FIXED_KEYS)
def test_a_key_that_would_do_nothing_takes_the_value_that_says_so_alone(key):
    """So a run's recipe.yaml, which holds every key, can be trained with again."""
    default = getattr(RewardConfig(use_cpu=True, bf16=False), key)
    assert check_value(key, default, from_text=False)[0] is None
    fault, _ = check_value(key, OTHER_VALUES.get(key, not default), from_text=False)
    assert fault.startswith(f"'{key}: ")
    assert fault.endswith(FIXED_KEYS[key][1])


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_another_tools_name_leads_to_the_key_that_there_is(key):
    fault, _ = check_value(key, 1, from_text=False)
    assert fault == f"unknown key '{key}'. Here it is {FOREIGN_KEYS[key]}"
    known = key_types().keys() - REFUSED_KEYS.keys()
    named = [word.partition(":")[0] for word in re.findall(r"'([a-z_0-9]+(?:: [\w-]+)?)'", fault)[1:]]
    assert set(named) - {"name"} <= known
    assert named or "nothing: " in fault or "`rm-recipe " in fault
    assert key not in known


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch_dtype", "auto"), ("use_lora", True), ("base_model", "x"), ("logging_dir", "x"),
        ("dataset_config", "x"), ("group_by_length", True), ("lora_rank", 8), ("save_safetensors", True),
        ("val_set_size", 0.1), ("micro_batch_size", 1), ("batch_size", 1), ("dataset_text_field", "x"),
        ("lr", 1e-4), ("epochs", 1), ("cutoff_len", 1), ("sequence_len", 1), ("quantization_bit", 4),
        ("flash_attn", True), ("no_cuda", True), ("flash_attention_2", True), ("use_flash_attention_2", True),
        ("tokenizer", "x"), ("gradient_clipping", 1.0), ("fp16_opt_level", "O1"),
    ],
)  # fmt: skip
def test_the_names_that_users_bring_are_known(write_recipe, key, value):
    with pytest.raises(RecipeError, match=f"unknown key '{key}'. Here it is "):
        read_recipe(write_recipe(**{key: value}))


def test_a_hint_leads_to_no_key_that_is_refused_too():
    for key in (*REFUSED_KEYS, *FIXED_KEYS, "include_inputs_for_metrics", "fp16_full_evals"):
        fault, _ = check_value(f"{key}s", 1, from_text=False)
        suggested = re.findall(r"Did you mean '(\w+)'", fault)
        assert not {*suggested} & {*REFUSED_KEYS, *FIXED_KEYS}


@pytest.mark.parametrize("key", IDLE_KEYS)
def test_a_key_whose_switch_is_not_in_the_recipe_is_refused(write_recipe, key):
    """`lora_r` without `use_peft` would train all weights, unsaid."""
    needed = IDLE_KEYS[key]
    values = {"eval_delay": 2, "eval_steps": 2, "lora_r": 2, "lora_alpha": 2, "use_dora": False}
    values |= {
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_bnb_nested_quant": False,
        "hub_private_repo": True,
    }
    values |= {name: ["x"] for name in IDLE_KEYS if name.startswith("lora_") and name not in values}
    keys = {"use_peft": "omit", "lora_r": "omit", key: values.get(key, "nf4")}
    with pytest.raises(RecipeError, match=f"'{key}' does nothing without '{needed[0]}': set that, or"):
        read_recipe(write_recipe(**keys))


def test_a_recipes_lora_keys_may_stay_where_the_command_line_switches_lora_off(write_recipe):
    assert not read_recipe(write_recipe(), ["--use_peft", "false"]).model.use_peft


# --- types and choices ----------------------------------------------------------------------------


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
