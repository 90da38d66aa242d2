"""Recipes are parsed strictly, resolved for the device, and every fault is reported at once."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from trl import ModelConfig, get_quantization_config

from rm_recipe.errors import RecipeError
from rm_recipe.recipe import relations
from rm_recipe.recipe.reader import read_recipe, read_run_recipe, saved_values
from rm_recipe.recipe.relations import batch_values, relation_faults
from rm_recipe.recipe.schema import DataArguments
from rm_recipe.training.train import train

SHIPPED = sorted((REPOSITORY / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_is_accepted_and_says_what_it_is_for(path):
    recipe = read_recipe(path, check_inputs=False)
    assert recipe.output_dir == Path("outputs") / path.stem
    assert ("_hh" in path.stem) == (recipe.data.dataset_name == "Anthropic/hh-rlhf")
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    for part in ("# Purpose:", "# Needs:", f"rm_recipe train recipes/{path.name}"):
        assert part in header


def test_the_command_line_wins_over_the_file(write_recipe):
    """And `3e-4` is a number, although YAML 1.1 takes it for text."""
    recipe = read_recipe(write_recipe(), ["--learning-rate", "3e-4", "--lora_target_modules=q_proj,v_proj"])
    assert recipe.training.learning_rate == 3e-4
    assert recipe.model.lora_target_modules == ["q_proj", "v_proj"]


def test_null_on_the_command_line_leaves_out_a_key_of_the_file_that_holds_no_null(write_recipe):
    path = write_recipe(gradient_accumulation_steps=2, per_device_train_batch_size=4)
    with pytest.raises(RecipeError, match="the second follows; on the command line null leaves it out"):
        read_recipe(path, ["--comparisons_per_step", "16"])
    recipe = read_recipe(path, ["--comparisons_per_step", "16", "--gradient_accumulation_steps", "null"])
    assert recipe.training.gradient_accumulation_steps == 4
    assert read_recipe(path, ["--max_length", "null"]).training.max_length is None  # its null is a value
    for key in ("lr", "truncation"):  # unknown, and not in the file
        with pytest.raises(RecipeError, match=f"command line: .*'{key}"):
            read_recipe(path, [f"--{key}", "null"])


def test_no_and_off_are_the_choices_of_that_name_and_yes_is_true(write_recipe):
    """YAML 1.1 takes them for false."""
    path = write_recipe(save_strategy="omit", use_peft="omit")
    path.write_text(
        path.read_text() + "save_strategy: no\nprefix_sharing: off\nuse_peft: yes\n"
        "activation_checkpointing_kwargs: {use_reentrant: no}\n"
    )
    recipe = read_recipe(path)
    assert recipe.training.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert (recipe.training.save_strategy, recipe.data.prefix_sharing) == ("no", "off")
    assert recipe.model.use_peft is True


def test_a_run_is_read_back_with_the_device_chosen_anew(write_recipe, tmp_path, monkeypatch):
    run = tmp_path / "moved"
    run.mkdir()
    read_recipe(write_recipe(bf16=True)).save(run / "recipe.yaml")
    monkeypatch.setattr(relations, "has_bf16", lambda _: False)
    again = read_run_recipe(run)
    assert not again.training.bf16
    assert again.output_dir == run


def on_machine(monkeypatch, kind: str, has_bf16: bool) -> None:
    """A machine with such an accelerator, or the CPU alone, and native bf16 or none; torch emulates it."""
    device = None if kind == "cpu" else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    emulated = "including_emulation"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: has_bf16 or how.get(emulated, True))
    monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda: has_bf16)


@pytest.mark.parametrize(
    ("kind", "has_bf16", "dtype"),
    [
        ("cpu", True, "bfloat16"),
        ("cpu", False, "float32"),
        ("cuda", True, "bfloat16"),
        ("cuda", False, "float16"),
        ("mps", False, "float32"),  # fp16 would need a gradient scaler, which is CUDA's
    ],
)
def test_precision_follows_what_the_device_can_do(monkeypatch, kind, has_bf16, dtype):
    on_machine(monkeypatch, kind, has_bf16)
    values = relations.resolve({"use_peft": True})
    assert values["dtype"] == dtype
    assert values["use_cpu"] is (kind == "cpu")
    assert (values["bf16"], values["fp16"]) == (dtype == "bfloat16", dtype == "float16")
    assert relations.resolve({})["dtype"] == "float32"  # trained in full
    quantised = relations.resolve({"use_peft": True, "load_in_4bit": True, "dtype": "auto"})
    config = ModelConfig(load_in_4bit=True, dtype=quantised["dtype"])
    assert get_quantization_config(config).bnb_4bit_compute_dtype == getattr(torch, dtype)


def test_a_configuration_of_accelerates_for_the_cpu_counts_where_there_is_a_gpu(monkeypatch):
    """Trainer would take the GPU, whose fp16 and pinned batches a CPU has not, and Accelerate the CPU."""
    on_machine(monkeypatch, "cuda", has_bf16=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    values = relations.resolve({})
    assert (values["use_cpu"], values["fp16"], values["dataloader_pin_memory"]) == (True, False, False)


def test_a_precision_that_the_device_has_not_is_refused(monkeypatch, write_recipe):
    on_machine(monkeypatch, "cuda", has_bf16=False)
    with pytest.raises(RecipeError, match="this GPU has no bfloat16"):
        read_recipe(write_recipe(bf16=True, use_cpu=False))


def test_a_missing_recipe_names_the_nearest_one():
    with pytest.raises(RecipeError, match=r"no such recipe. Did you mean .*smollm2_offline\.yaml"):
        read_recipe(REPOSITORY / "recipes" / "smollm_offline.yaml")


@pytest.mark.parametrize("name", ["smollm2_offline", "minilm_offline"])
def test_the_offline_recipes_say_how_their_inputs_are_made(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        read_recipe(REPOSITORY / "recipes" / f"{name}.yaml")
    assert str(caught.value).count("run `rm-recipe prepare offline`") == 2  # the base and the comparisons


def test_the_adapters_dropout_is_recorded_as_it_is(write_recipe):
    """TRL's `disable_dropout`, on by default, leaves none, whatever `lora_dropout` says."""
    assert read_recipe(write_recipe()).resolved()["lora_dropout"] == 0.0
    with_it = read_recipe(write_recipe(disable_dropout=False))
    assert with_it.resolved()["lora_dropout"] == with_it.model.lora_dropout == 0.05


@pytest.mark.parametrize(
    "keys",
    [
        {"use_peft": False},
        {"warmup_steps": 3},
        {"early_stopping_patience": 2, "save_strategy": "omit"},
        {"fsdp": True},
        {"save_strategy": "best", "metric_for_best_model": "margin", "eval_strategy": "epoch"},
        {"load_in_4bit": True},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        {"max_steps": 2},
    ],
    ids=str,
)
def test_every_runs_recipe_can_be_trained_with_again(write_recipe, tmp_path, keys):
    recipe = read_recipe(write_recipe(**keys))
    recipe.save(tmp_path / "saved.yaml")
    assert read_recipe(tmp_path / "saved.yaml").resolved() == recipe.resolved()
    assert {field.name for field in dataclasses.fields(DataArguments)} <= recipe.resolved().keys()


def test_a_recipe_trained_in_full_is_recorded_as_fp32_and_that_is_said_once(write_recipe, tmp_path, capsys):
    recipe = read_recipe(write_recipe(use_peft=False, dtype="bfloat16", max_steps=1))
    assert recipe.model.dtype == "float32"
    train(recipe)
    assert capsys.readouterr().out.count("in fp32 whatever 'dtype' says") == 1
    assert saved_values(tmp_path / "run")["dtype"] == "float32"


def test_a_shipped_recipe_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2_offline.yaml", "recipes/smollm2_offline.yaml"):
        assert read_recipe(name, check_inputs=False).path == REPOSITORY / "recipes" / "smollm2_offline.yaml"
    with pytest.raises(RecipeError, match="elsewhere/smollm2_offline.yaml: no such recipe"):
        read_recipe("elsewhere/smollm2_offline.yaml")
    own = tmp_path / "smollm2_offline.yaml"
    own.write_text("model_name_or_path: a/b\ndataset_name: c/d\n")
    assert read_recipe(own.name).model.model_name_or_path == "a/b"


def test_a_step_has_the_comparisons_asked_for_whatever_the_batch_and_the_processes(write_recipe, monkeypatch):
    keys = {"comparisons_per_step": 64, "gradient_accumulation_steps": "omit"}
    for batch, expected in (("auto", (64, 1)), (16, (16, 4))):
        training = read_recipe(write_recipe(**keys, per_device_train_batch_size=batch)).training
        assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == expected
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [*batch_values({"comparisons_per_step": 64}).values()] == [16, 1]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    asked = {"comparisons_per_step": 64, "per_device_train_batch_size": "auto", "load_in_4bit": True}
    faults = " ".join(relation_faults(asked, asked))
    assert "'fsdp' and 'per_device_train_batch_size: auto' exclude each other" in faults
    assert "'fsdp' and 'load_in_4bit' exclude each other" in faults
