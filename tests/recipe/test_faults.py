"""What is missing, out of range or in contradiction is found before anything is loaded."""

import pytest

from rm_recipe.errors import RecipeError
from rm_recipe.recipe.reader import read_recipe

NEVER = "forbids; leave that out"
KEEPS = {"load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"learning_rate": 0}, "'learning_rate: 0' must be above 0"),
        ({"dataset_num_proc": 0}, "'dataset_num_proc: 0' must be above 0"),
        ({"test_split_size": 1.0}, "'test_split_size: 1.0' must lie between 0 and 1"),
        ({"target_accuracy": 65}, "'target_accuracy: 65' must lie between 0 and 1"),
        ({"max_steps": 0}, "'max_steps: 0' must be above 0; leave it out to train 'num_train_epochs'"),
        ({"seed": -1}, "'seed: -1' must lie between 0 and 4294967295"),
        ({"center_rewards_coefficient": -0.1}, "'center_rewards_coefficient: -0.1' must not be below 0"),
        ({"save_total_limit": 1}, "'save_total_limit: 1' must be 2 or more"),
        ({"activation_checkpointing_kwargs": {"layers": 2}}, "has a key that is none of use_reentrant"),
        ({"accelerator_config": {"dispatch_batches": True}}, "would change how many comparisons make a step"),
        (
            {"metric_for_best_model": "eval_f1", **KEEPS},
            "is not measured in training; accuracy, loss, margin,",
        ),
        ({"model_name_or_path": "omit"}, "'model_name_or_path' is missing"),
        ({"dataset_name": "omit"}, "'dataset_name' is missing"),
        (
            {"load_in_4bit": True, "load_in_8bit": True},
            "'load_in_4bit' and 'load_in_8bit' exclude each other",
        ),
        ({"load_in_4bit": True, "use_peft": False}, "'load_in_4bit' needs 'use_peft'"),
        ({"use_dora": True, "load_in_8bit": True}, "'use_dora' and 'load_in_8bit' exclude each other"),
        ({"bf16": True, "fp16": True}, "'bf16' and 'fp16' exclude each other"),
        ({"push_to_hub": True}, "'push_to_hub' needs 'hub_model_id'"),
        ({"margin_map": {"better": 1}}, "'margin_map' needs 'margin_column'"),
        ({"margin_column": "m", "margin_map": {"worse": -1}}, "a margin below 0 would reward being wrong"),
        ({"datasets": [{"path": "x"}]}, "'datasets' and 'dataset_name' exclude each other"),
        ({"dataset_test_split": "train"}, "'dataset_test_split: train' must differ from"),
        ({"lora_dropout": 0.1}, "'lora_dropout' does nothing without 'disable_dropout: false'"),
        ({"neftune_noise_alpha": 5}, "'neftune_noise_alpha' needs 'prefix_sharing: off'"),
        (
            {"activation_checkpointing": True},
            "'gradient_checkpointing' and 'activation_checkpointing' are one",
        ),
        ({"metric_for_best_model": "loss"}, "'metric_for_best_model' does nothing without 'load_best_model"),
        ({"save_strategy": "best"}, "'save_strategy: best' needs a 'metric_for_best_model' and an 'eval_str"),
        (
            {"save_strategy": "no", **KEEPS},
            f"'load_best_model_at_end' needs what 'save_strategy: no' {NEVER}",
        ),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, f"what 'eval_strategy: no' {NEVER}"),
        (
            {"save_strategy": "steps", "save_steps": 4, "eval_steps": 2, **KEEPS},
            "'eval_steps: 2.0' must equal 'save_steps: 4.0', or leave it out",
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 3},
            "'warmup_steps' does nothing with 'lr_scheduler_type: constant'",
        ),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}},
            "'lr_scheduler_kwargs' do nothing with 'lr_scheduler_type: constant'",
        ),
        ({"chat_template_path": "t.jinja"}, "'chat_template_path: t.jinja' does not exist"),
        ({"chat_template_path": __file__}, "a template's file ends in .jinja or .j2"),
        # What cannot be made:
        ({"report_to": "azure_ml"}, "'report_to': AzureMLCallback requires azureml to be installed"),
        ({"report_to": ["weights"]}, "'report_to': weights is not supported, only azure_ml"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "'lr_scheduler_type: linear': "),
        ({"optim": "galore_adamw"}, "'optim: galore_adamw': You need to install `galore_torch`"),
        ({"optim": "lomo"}, "'optim: lomo' makes its steps within backward"),
        ({"optim_target_modules": "all-linear"}, "'optim_target_modules' does nothing with 'optim: adamw_t"),
        ({"optim_args": "alpha=3"}, "'optim_args: alpha=3' changes nothing of 'optim: adamw_torch_fused'"),
        ({"weight_decay": 0.1, "adam_beta1": 1.5}, "'optim: adamw_torch_fused': Invalid beta parameter"),
        ({"dataloader_persistent_workers": True}, "'dataloader_persistent_workers' needs 'dataloader_num"),
        ({"attn_implementation": "flex_attention"}, "'attn_implementation: flex_attention' cannot train on"),
        ({"activation_offloading": True}, "on a CPU activations are where it would move them"),
    ],
)
def test_a_fault_is_named_with_its_key(write_recipe, keys, fault):
    with pytest.raises(RecipeError, match="recipe.yaml") as caught:
        read_recipe(write_recipe(**keys))
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        # What a key switches off in so many words may stay beside it.
        {"use_peft": False, "lora_r": 8},
        {"push_to_hub": False, "hub_model_id": "a/b"},
        {"eval_strategy": "no", "eval_steps": 5},
        {"save_strategy": "no", "save_steps": 5, "save_total_limit": 2},
        {"max_steps": 3, "num_train_epochs": 1},
        # What does what it says.
        {"optim": "ademamix", "optim_args": "alpha=3"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        {"save_strategy": "best", "metric_for_best_model": "margin", "eval_strategy": "epoch"},
        {"disable_dropout": False, "lora_dropout": 0.1},
        {"neftune_noise_alpha": 5, "prefix_sharing": "off"},
        {"report_to": "none"},
        {"seed": 2**32 - 1, "data_seed": 0},
    ],
    ids=str,
)
def test_what_contradicts_nothing_is_accepted(write_recipe, keys):
    recipe = read_recipe(write_recipe(**keys))
    assert keys.items() <= recipe.values.items()


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([{"path": "a/b", "sprit": "x"}], "entry 1: unknown key 'sprit'. Did you mean 'split'?"),
        ([{"path": "a/b"}, {"name": "x"}], "entry 2 has no 'path'"),
        ([{"path": "a/b", "fraction": True}], "entry 1: 'fraction: true' should be a number"),
        ([{"path": "a/b", "fraction": 0}], "entry 1: 'fraction: 0' must be above 0"),
        ([{"path": "a/b", "fraction": 1}, {"path": "c/d"}], "give a 'fraction' to every entry, or to none"),
        ([{"path": "a/b", "split": "test"}], "'split: test' is what is held out"),
        ([{"path": "./none"}], "'path: ./none' does not exist"),
        ([1], "entry 1: "),
    ],
)
def test_a_mixtures_faults_are_named_with_their_entry(write_recipe, entries, fault):
    with pytest.raises(RecipeError) as caught:
        read_recipe(write_recipe(dataset_name="omit", datasets=entries))
    assert fault in str(caught.value)


def test_a_mixture_is_read_from_the_command_line_and_saved_with_the_run(write_recipe, tiny_data, tmp_path):
    recipe = read_recipe(write_recipe(dataset_name="omit"), ["--datasets", f"[{{path: {tiny_data}}}]"])
    assert recipe.data.datasets == [{"path": str(tiny_data)}]
    recipe.save(tmp_path / "saved.yaml")
    assert read_recipe(tmp_path / "saved.yaml").data == recipe.data


def test_margins_are_read_with_words_or_numbers_as_categories(write_recipe):
    keys = {"margin_column": "m", "margin_map": {"significantly better": 1, "better": 0.5}}
    assert read_recipe(write_recipe(**keys)).data.margin_map == keys["margin_map"]
    recipe = read_recipe(write_recipe(margin_column="m"), ["--margin_map", "{3: 1, 2: 0.5}"])
    assert recipe.data.margin_map == {3: 1.0, 2: 0.5}


def test_a_files_subsets_are_refused(write_recipe, tiny_data):
    keys = {"dataset_name": str(tiny_data / "train.jsonl"), "dataset_subsets": ["a", "b"]}
    with pytest.raises(RecipeError, match="'dataset_subsets' are folders, and .* is a file"):
        read_recipe(write_recipe(**keys))


def test_a_mixture_may_train_on_a_split_called_test_where_another_share_is_held_out(write_recipe, tiny_data):
    keys = {"dataset_name": "omit", "datasets": [{"path": str(tiny_data), "split": "test"}]}
    assert read_recipe(write_recipe(**keys, test_split_size=0.2)).data.test_split_size == 0.2
