"""What is missing, out of range or in contradiction is found before anything is loaded."""

import pytest

from rm_recipe.errors import RecipeError
from rm_recipe.recipe.reader import read_recipe


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"test_split_size": 1.0}, "'test_split_size: 1.0' must lie between 0 and 1"),
        ({"test_split_size": 0}, "'test_split_size: 0.0' must lie between 0 and 1"),
        ({"margin_map": {"better": 1}}, "'margin_map' needs a 'margin_column'"),
        ({"margin_column": "m", "margin_map": {"better": "much"}}, "should be a mapping"),
        ({"margin_column": "m", "margin_map": {"worse": -1}}, "a margin below 0 would reward being wrong"),
        ({"dataset_num_proc": 0}, "'dataset_num_proc: 0' must be above 0"),
        ({"streaming": True}, "key 'streaming' is not for a recipe: data sets are memory-mapped"),
        ({"datasets": [{"path": "x"}]}, "'datasets' and 'dataset_name' exclude each other"),
        ({"datasets": "x"}, "should be a list"),
        ({"save_total_limit": 1}, "'save_total_limit: 1' must be 2 or more: the older checkpoint is what is"),
        ({"save_steps": 0}, "'save_steps: 0.0' must be above 0"),
        ({"max_steps": 0}, "'max_steps: 0' must be above 0; leave it out to train 'num_train_epochs'"),
        ({"seed": -1}, "'seed: -1' must lie between 0 and 4294967295"),
        ({"data_seed": 2**32}, "'data_seed: 4294967296' must lie between 0 and 4294967295"),
        ({"center_rewards_coefficient": -0.1}, "'center_rewards_coefficient: -0.1' must not be below 0"),
        ({"lora_dropout": 0.1}, "'lora_dropout: 0.1' would be switched off by 'disable_dropout'"),
        ({"neftune_noise_alpha": 5}, "'neftune_noise_alpha' scales its noise by the length of a row"),
        (
            {"activation_checkpointing": True},
            "'gradient_checkpointing' and 'activation_checkpointing' are one thing",
        ),
        (
            {"activation_checkpointing_kwargs": {"layers": 2}},
            "'activation_checkpointing_kwargs': unknown key 'layers'",
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "'accelerator_config': 'dispatch_batches: true' would change how many comparisons make a step",
        ),
        ({"metric_for_best_model": "loss"}, "'metric_for_best_model' does nothing without 'load_best_model"),
        (
            {"metric_for_best_model": "eval_f1", "load_best_model_at_end": True},
            "'metric_for_best_model: eval_f1' is not measured in training; accuracy, loss, margin,",
        ),
        (
            {"metric_for_best_model": "acuracy", "lr_scheduler_type": "greedy", "eval_strategy": "steps"},
            "Did you mean 'accuracy'?",
        ),
        ({"save_strategy": "best"}, "'save_strategy: best' needs a 'metric_for_best_model'"),
        ({"save_strategy": "best"}, "needs evaluations to choose by: 'eval_strategy: steps'"),
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 4, "eval_steps": 2},
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
        ({"report_to": "azure_ml"}, "'report_to: azure_ml' needs a package: `pip install azureml-core`"),
        ({"report_to": ["weights"]}, "'report_to: weights' is not one of none, all, azure_ml"),
        ({"report_to": "wand"}, "Did you mean 'wandb'?"),
        ({"chat_template_path": "t.jinja"}, "'chat_template_path: t.jinja' does not exist"),
        ({"chat_template_path": __file__}, "a template's file ends in .jinja or .j2"),
        ({"save_only_model": True}, "key 'save_only_model' is not for a recipe: a checkpoint without"),
    ],
)
def test_a_fault_is_named_with_its_key(write_recipe, keys, fault):
    with pytest.raises(RecipeError, match="recipe.yaml") as caught:
        read_recipe(write_recipe(**keys))
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "'lr_scheduler_type: warmup_stable_decay': "),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "'lr_scheduler_type: linear': "),
        ({"optim": "galore_adamw"}, "'optim: galore_adamw': You need to install `galore_torch`"),
        ({"optim": "adamw_torch_xla"}, "'optim: adamw_torch_xla': Trainer failed to import"),
        ({"optim": "lomo"}, "'optim: lomo' makes its steps within backward"),
        ({"optim_target_modules": "all-linear"}, "'optim_target_modules' does nothing with 'optim: adamw_t"),
        ({"optim_args": "alpha=3"}, "'optim_args: alpha=3' changes nothing of 'optim: adamw_torch_fused'"),
        ({"weight_decay": 0.1, "adam_beta1": 1.5}, "'optim: adamw_torch_fused': Invalid beta parameter"),
        ({"dataloader_persistent_workers": True}, "persistent_workers option needs num_workers > 0"),
        ({"dataloader_num_workers": -1}, "the 'dataloader_...' keys: num_workers option should be non-negat"),
        ({"attn_implementation": "flex_attention"}, "'attn_implementation: flex_attention' cannot train on"),
        ({"activation_offloading": True}, "on a CPU activations are where it would move them"),
    ],
)
def test_what_cannot_be_made_of_a_recipe_is_named_before_anything_is_loaded(write_recipe, keys, fault):
    with pytest.raises(RecipeError, match="recipe.yaml") as caught:
        read_recipe(write_recipe(**keys))
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"use_peft": False, "lora_r": 8},
        {"push_to_hub": False, "hub_model_id": "a/b"},
        {"eval_strategy": "no", "eval_steps": 5},
        {"save_strategy": "no", "save_steps": 5, "save_total_limit": 2},
        {"max_steps": 3, "num_train_epochs": 1},
    ],
    ids=str,
)
def test_what_a_key_switches_off_in_so_many_words_may_stay_beside_it(write_recipe, keys):
    """As somebody leaves `lora_r` where it is and tries `use_peft: false`."""
    recipe = read_recipe(write_recipe(**keys))
    assert all(recipe.values[key] == value for key, value in keys.items())


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"save_strategy": "no"}, "'load_best_model_at_end' needs what 'save_strategy: no' forbids; leave"),
        (
            {"save_strategy": "epoch", "eval_strategy": "no"},
            "'load_best_model_at_end' needs what 'eval_strategy: no'",
        ),
    ],
)
def test_the_best_checkpoint_is_not_kept_where_none_is_saved_or_evaluated(write_recipe, keys, fault):
    """Trainer would keep the last, unsaid."""
    with pytest.raises(RecipeError, match=fault):
        read_recipe(write_recipe(load_best_model_at_end=True, **keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"optim": "ademamix", "optim_args": "alpha=3"},
        {"optim": "adafactor"},
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
def test_what_does_what_it_says_is_accepted(write_recipe, keys):
    recipe = read_recipe(write_recipe(**keys))
    assert keys.items() <= recipe.values.items()


ABOVE_0 = "'fraction' must be a number above 0 in every entry"


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([{"path": "a/b", "sprit": "x"}], "entry 1: unknown key 'sprit'. Did you mean 'split'?"),
        ([{"path": "a/b"}, {"name": "x"}], "entry 2 has no 'path'"),
        ([{"path": "a/b", "fraction": "half"}], "entry 1: 'fraction: half' should be a number"),
        ([{"path": "a/b", "fraction": True}], "entry 1: 'fraction: True' should be a number"),
        (
            [{"path": "a/b", "fraction": 1}, {"path": "c/d"}],
            ABOVE_0,
        ),
        (
            [{"path": "a/b", "fraction": 1}, {"path": "c/d", "fraction": 0}],
            ABOVE_0,
        ),
        ([{"path": "a/b", "fraction": float("inf")}], ABOVE_0),
        ([{"path": "a/b", "split": "test"}], "'split: test' is what is held out"),
        ([{"path": "./none"}], "'path: ./none' does not exist"),
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
    with pytest.raises(RecipeError, match="is what is held out"):
        read_recipe(write_recipe(**keys))
    assert read_recipe(write_recipe(**keys, test_split_size=0.2)).data.test_split_size == 0.2
