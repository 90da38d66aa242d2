"""What is missing, out of range or in contradiction is found before anything is loaded."""

import pytest
import yaml

from rm_recipe.errors import RecipeError
from rm_recipe.recipe.reader import read_recipe

# What is added to a sound recipe (`omit` takes a key out), and a part of what is said of it.
FAULTS = """
lr_scheduler_type: cosin                            -> Did you mean 'cosine'?
truncation: cut                                     -> should be 'drop_oldest_turns', 'keep_end' or 'exclude'
lerning_rate: 1                                     -> key 'lerning_rate'. Did you mean 'learning_rate'?
trust_remote_code: true                             -> the export has to load with plain transformers
hub_token: secret                                   -> key 'hub_token' is not for a recipe
load_in_4bit: true, load_in_8bit: true              -> 'load_in_4bit' and 'load_in_8bit' exclude each other
dataset_test_split: train                           -> 'dataset_test_split: train' must differ from
learning_rate: 0                                    -> 'learning_rate: 0' must be above 0
test_split_size: 1.0                                -> 'test_split_size: 1.0' must lie between 0 and 1
max_steps: 0                                        -> leave it out to train 'num_train_epochs'
seed: -1                                            -> 'seed: -1' must lie between 0 and 4294967295
save_total_limit: 1                                 -> 'save_total_limit: 1' must be 2 or more
activation_checkpointing_kwargs: {layers: 2}        -> has a key that is none of use_reentrant
dataloader_drop_last: true                          -> it would leave comparisons out
metric_for_best_model: eval_f1                      -> is none of accuracy loss margin
train_sampling_strategy: batch_rebalance            -> take group_by_length
fp16: true, bf16: omit                              -> leave 'fp16' out
optim: lomo                                         -> 'optim: lomo' makes its steps in backward
model_name_or_path: omit                            -> 'model_name_or_path' is missing
dataset_name: omit                                  -> 'dataset_name' is missing
test_split_size: 0.1, dataset_test_split: other     -> 'dataset_test_split: other' does nothing beside 'test_s
load_in_4bit: true, use_peft: false                 -> 'load_in_4bit' needs 'use_peft'
push_to_hub: true                                   -> 'push_to_hub' needs 'hub_model_id': set that, too
margin_column: m, margin_map: {worse: -1}           -> a margin below 0 would reward being wrong
datasets: [{path: x}]                               -> 'datasets' and 'dataset_name' exclude each other
lora_dropout: 0.1                                   -> set 'disable_dropout: false'
neftune_noise_alpha: 5                              -> set 'prefix_sharing: off'
activation_checkpointing: true                      -> they are one thing, by two names
metric_for_best_model: loss                         -> does nothing without 'load_best_model_at_end'
save_strategy: best                                 -> 'save_strategy: best' needs 'metric_for_best_model'
save_strategy: best, metric_for_best_model: loss    -> 'save_strategy: best' and 'eval_strategy: no'
save_strategy: 'no', load_best_model_at_end: true   -> 'load_best_model_at_end' and 'save_strategy: no'
save_strategy: steps, save_steps: 4, eval_steps: 2, early_stopping_patience: 1 -> must equal 'save_steps: 4.0'
early_stopping_patience: 2, eval_strategy: 'no'     -> 'early_stopping_patience' and 'eval_strategy: no'
warmup_steps: 3, lr_scheduler_type: constant        -> that schedule has no warm-up
dataloader_persistent_workers: true                 -> needs 'dataloader_num_workers'
attn_implementation: flex_attention                 -> flex_attention' and 'use_cpu: true' exclude
optim_target_modules: all-linear                    -> does nothing without 'optim: galore_adamw or galore_
per_device_train_batch_size: auto                   -> needs 'comparisons_per_step'
comparisons_per_step: 64, gradient_accumulation_steps: 2   -> the second follows
comparisons_per_step: 64, per_device_train_batch_size: 24  -> 'comparisons_per_step: 64' is no multiple
use_peft: omit, lora_r: 2                           -> 'lora_r' does nothing without 'use_peft': set that, or
use_bnb_nested_quant: true                          -> does nothing without 'load_in_4bit'
eval_steps: 2                                       -> 'eval_steps' does nothing without 'eval_strategy'
run_name: x                                         -> 'run_name' does nothing without 'report_to'
hub_model_id: a/b                                   -> 'hub_model_id' does nothing without 'push_to_hub'
dataset_name: omit, datasets: [{path: a/b, sprit: x}]      -> entry 1: unknown key 'sprit'. Did you mean
dataset_name: omit, datasets: [{path: a/b}, {name: x}]     -> entry 2 has no 'path'
dataset_name: omit, datasets: [{path: a, fraction: 0}]     -> entry 1: 'fraction: 0' must be above 0
dataset_name: omit, datasets: [{path: a, fraction: 1}, {path: b}] -> give a 'fraction' to every entry
dataset_name: omit, datasets: [{path: a/b, split: test}]   -> 'split: test' is what is held out
dataset_name: omit, datasets: [{path: ./none}]             -> 'path: ./none' does not exist
dataset_name: omit, datasets: [1]                          -> 'datasets', entry 1
chat_template_path: t.jinja                         -> 'chat_template_path: t.jinja' does not exist
report_to: azure_ml                                 -> 'report_to': AzureMLCallback requires azureml
report_to: [weights]                                -> 'report_to': weights is not supported, only azure_ml
lr_scheduler_type: cosine_with_min_lr               -> One of min_lr or min_lr_rate should be set
optim: galore_adamw                                 -> 'optim: galore_adamw': You need to install
optim_args: alpha=3                                 -> 'optim_args: alpha=3' changes nothing of it
optim: adagrad, optim_args: momentum=0.9            -> 'optim_args: momentum=0.9' changes nothing of it
adam_epsilon: -1                                    -> 'optim: adamw_torch_fused': Invalid epsilon value
adam_beta1: 1.5                                     -> 'optim: adamw_torch_fused': Invalid beta parameter
"""
CONTRADICTS_NOTHING = """
use_peft: false, lora_r: 8
push_to_hub: false, hub_model_id: a/b
eval_strategy: 'no', eval_steps: 5
save_strategy: 'no', save_steps: 5, save_total_limit: 2
optim: ademamix, optim_args: alpha=3
lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.1}
lr_scheduler_type: reduce_lr_on_plateau, eval_strategy: epoch, metric_for_best_model: loss
save_strategy: best, metric_for_best_model: margin, eval_strategy: epoch
disable_dropout: false, lora_dropout: 0.1
neftune_noise_alpha: 5, prefix_sharing: 'off'
dataset_name: omit, datasets: [{path: a/b, split: test, columns: [chosen, rejected]}], test_split_size: 0.2
"""


def keys_of(text):
    return yaml.safe_load(f"{{{text}}}")


@pytest.mark.parametrize("row", FAULTS.strip().splitlines())
def test_a_fault_is_named_with_its_key(write_recipe, row):
    keys, fault = row.split("-> ")
    with pytest.raises(RecipeError, match="recipe.yaml") as caught:
        read_recipe(write_recipe(**keys_of(keys)))
    assert fault in str(caught.value)


def test_all_faults_come_in_one_message_each_with_its_place(write_recipe):
    rows = [row.split("-> ") for row in FAULTS.strip().splitlines()[:12]]
    path = write_recipe(**keys_of(", ".join(keys for keys, _ in rows)))
    with path.open("a") as file:
        file.write("max_length: 1\n")
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, ["--num_train_epochs", "many", "--foo"])
    faults = [f"{path}, line", "key 'max_length' is given twice", "command line: --foo has no value"]
    faults += ["command line: 'num_train_epochs: many' should be a valid number"]
    for fault in [*faults, *(fault for _, fault in rows)]:
        assert fault in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("row", CONTRADICTS_NOTHING.strip().splitlines())
def test_what_a_key_switches_off_may_stay_and_what_does_what_it_says_is_accepted(write_recipe, row):
    given = {key for key, value in keys_of(row).items() if value != "omit"}
    assert given <= read_recipe(write_recipe(**keys_of(row))).values.keys()


def test_a_mixture_and_a_margins_words_and_numbers_are_read_from_the_command_line_and_saved_with_the_run(
    write_recipe, tiny_data, tmp_path
):
    words = ["--datasets", f"[{{path: {tiny_data}}}]", "--margin_map", "{much better: 1, 2: 0.5}"]
    recipe = read_recipe(write_recipe(dataset_name="omit", margin_column="m"), words)
    assert recipe.data.datasets == [{"path": str(tiny_data)}]
    assert recipe.data.margin_map == {"much better": 1.0, 2: 0.5}
    recipe.save(tmp_path / "saved.yaml")
    assert read_recipe(tmp_path / "saved.yaml").data == recipe.data


def test_a_files_subsets_are_refused(write_recipe, tiny_data):
    keys = {"dataset_name": str(tiny_data / "train.jsonl"), "dataset_subsets": ["a", "b"]}
    with pytest.raises(RecipeError, match="'dataset_subsets' are folders, and .* is a file"):
        read_recipe(write_recipe(**keys))
