"""A run leaves what the contract says, moves what it should, and can be gone on with."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, make_tokenizer, run_cli
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from rm_recipe import RewardModel
from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.export import export
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import load_data, load_model, train


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "adapter_model.safetensors")


@pytest.fixture
def run(write_recipe, tmp_path):
    train(read_recipe(write_recipe(save_strategy="steps", save_steps=4)))
    return tmp_path / "run"


def test_a_run_leaves_the_files_and_keys_of_the_contract(run):
    record = json.loads((run / "run.json").read_text())
    assert record.keys() >= {
        "seed", "versions", "git_commit", "data_fingerprints", "prefix_sharing", "steps",
        "comparisons_per_s", "tokens_per_s", "train_seconds", "peak_memory_bytes", "final_loss",
    }  # fmt: skip
    assert record["prefix_sharing"].keys() == {"used", "reason", "max_abs_diff"}
    assert record["prefix_sharing"]["used"]
    assert record["steps"] == 16
    assert (run / "recipe.yaml").is_file()
    assert (run / "checkpoint-16").is_dir()
    names = {path.name for path in (run / "model").iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert "training_args.bin" not in names


def test_the_head_and_every_adapter_moved_and_nothing_else_is_saved(run, write_recipe):
    saved = weights(run)
    recipe = read_recipe(write_recipe())
    start = load_model(recipe, load_data(recipe)[0])[0].score.weight
    assert not torch.equal(saved["base_model.model.score.weight"], start)
    assert all(value.abs().max() > 0 for key, value in saved.items() if "lora_B" in key)
    assert all("lora_" in key or "score" in key for key in saved)


def test_the_loss_went_down(run):
    log = [entry for entry in json.loads((run / "run.json").read_text())["log"] if "loss" in entry]
    assert log[-1]["loss"] < 0.5 * 0.69  # half of ln 2, where an untrained model starts


def test_a_resumed_run_equals_one_that_was_never_interrupted(write_recipe, run, tmp_path):
    whole = weights(run)
    again = tmp_path / "again"
    recipe = write_recipe(save_strategy="steps", save_steps=4, output_dir=str(again))
    train(read_recipe(recipe))
    (again / "run.json").unlink()
    for name in ("model", "checkpoint-16", "checkpoint-12"):
        for path in sorted((again / name).rglob("*"), reverse=True):
            path.unlink()
        (again / name).rmdir()
    train(read_recipe(recipe), resume=True)
    resumed = weights(again)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_base_without_a_token_to_pad_with_gets_one_and_is_read_back(write_recipe, tmp_path, tiny_llama):
    tokenizer = make_tokenizer()
    tokenizer.unk_token = None
    base = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(tiny_llama).save_pretrained(base)
    tokenizer.save_pretrained(base)
    train(read_recipe(write_recipe(model_name_or_path=str(base))))
    judge = RewardModel.from_pretrained(tmp_path / "run")
    assert judge.tokenizer.pad_token == "<|pad|>"
    scores = judge.score([{"prompt": "hello 3 cat", "response": r} for r in ("good good", "bad bad")])
    assert scores[0] > scores[1]


def test_gradient_checkpointing_gives_the_same_adapter(write_recipe, tmp_path):
    """Every TinyLlama recipe uses it; trl#694 lost the gradients."""
    for name in ("with", "without"):
        keys = {"gradient_checkpointing": name == "with", "output_dir": str(tmp_path / name)}
        train(read_recipe(write_recipe(num_train_epochs=1, **keys)))
    a, b = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


def test_the_base_of_an_adapter_is_read_at_its_revision(write_recipe, tmp_path):
    train(read_recipe(write_recipe(model_revision="v2", num_train_epochs=1)))
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert config["revision"] == "v2"


@pytest.mark.parametrize("quantised", [False, True])
def test_a_saved_adapter_gives_the_same_rewards_in_a_fresh_process(write_recipe, tmp_path, quantised):
    """Also with the base in 4 bits, where the trained parameters stay fp32."""
    keys = {"load_in_4bit": True} if quantised else {}
    train(read_recipe(write_recipe(**keys)))
    run = tmp_path / "run"
    assert all(value.dtype == torch.float32 for value in weights(run).values())
    scores = [
        run_cli("score", str(run), "--prompt", "hello", "--response", r).stdout for r in ("good", "bad")
    ]
    assert float(scores[0]) > float(scores[1])


def test_an_encoder_is_trained_in_full(write_recipe, tmp_path, tiny_distilbert):
    recipe = write_recipe(
        model_name_or_path=str(tiny_distilbert), use_peft=False, learning_rate=1e-3, max_length=64
    )
    before = AutoModelForSequenceClassification.from_pretrained(tiny_distilbert, num_labels=1)
    train(read_recipe(recipe))
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert not isinstance(after, PeftModel)
    moved = [
        not torch.equal(a, b)
        for (name, a), b in zip(after.named_parameters(), before.parameters(), strict=True)
        if "position_embeddings" not in name and "word_embeddings" not in name
    ]
    # A key's bias shifts all attention scores of a query alike, so it has no gradient.
    assert sum(moved) >= len(moved) - 2
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["prefix_sharing"]["used"]


def test_max_length_above_the_models_positions_is_refused(write_recipe, tiny_distilbert):
    recipe = read_recipe(write_recipe(model_name_or_path=str(tiny_distilbert), use_peft=False, max_length=65))
    with pytest.raises(RecipeError, match="'max_length: 65': .* has 64 positions"):
        train(recipe)


@pytest.mark.slow
def test_of_two_processes_one_tells_that_train_prompts_are_held_out(write_recipe, tmp_path, tiny_data):
    """The other would have ended it before it had finished its report."""
    (tmp_path / "two.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\n"
        "num_processes: 2\nnum_machines: 1\nmixed_precision: 'no'\n"
    )
    for name in ("train", "test"):
        shutil.copy(tiny_data / "train.jsonl", tmp_path / f"{name}.jsonl")
    recipe = write_recipe(dataset_name=str(tmp_path))
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "two.yaml")]
    command = [sys.executable, *launch, "-m", "rm_recipe", "train", str(recipe)]

    def fail() -> subprocess.CompletedProcess[str]:
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        assert result.returncode != 0
        return result

    leaky = fail()
    assert leaky.stderr.count("rm-recipe: 64 of 64 train comparisons") == 1
    assert leaky.stdout.count("Leakage: 64 train comparisons on 64 held-out prompts, not allowed") == 1
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    (tmp_path / "train.jsonl").write_text("{")
    broken = fail()
    assert broken.stderr.count("line 1: not JSON") == 1
    assert "Connection closed" not in broken.stderr


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_trains_evaluates_and_exports_on_a_tiny_model_of_its_kind(
    path, tiny_base, tiny_data, tmp_path
):
    """With its own keys, but for the model, the data and how long: what a recipe says works together."""
    encoder = "distilbert" if "distilbert" in path.stem else "bert" if "minilm" in path.stem else None
    overrides = {
        "model_name_or_path": tiny_base(encoder or "llama"), "dataset_name": tiny_data,
        "dataset_subsets": None, "max_length": 128, "max_train_samples": None,
        "max_eval_samples": None, "max_steps": 2,
        "output_dir": tmp_path / "run", "use_cpu": "true", "disable_tqdm": "true",
    }  # fmt: skip
    if path.stem == "smollm2_offline":
        overrides["lora_target_modules"] = r".*layers\.1\..*_proj"  # its upper half
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value or "null"))]
    recipe = read_recipe(path, words)
    train(recipe)
    run = recipe.output_dir
    assert json.loads((run / "run.json").read_text())["prefix_sharing"]["used"] is (encoder is None)
    assert (run / "model" / "adapter_config.json").is_file() is bool(recipe.model.use_peft)
    assert evaluate(str(run))["datasets"]["held_out"]["n_scored"] == 40
    assert export(run)["passed"]


def test_the_best_checkpoint_is_chosen_by_exact_held_out_accuracy(write_recipe, tmp_path):
    """40 held-out comparisons in batches of 7; a learning rate at which accuracy goes up and down again."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}
    recipe = write_recipe(
        num_train_epochs=1, learning_rate=0.3, per_device_eval_batch_size=7, **steps, **best
    )
    train(read_recipe(recipe))
    log = json.loads((tmp_path / "run" / "run.json").read_text())["log"]
    accuracies = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    assert len(accuracies) == 8
    assert accuracies[-1] < max(accuracies)
    assert evaluate(str(tmp_path / "run"))["datasets"]["held_out"]["accuracy"] == max(accuracies)
    chosen = tmp_path / "run" / f"checkpoint-{1 + accuracies.index(max(accuracies))}"
    kept = load_file(chosen / "adapter_model.safetensors")
    assert all(torch.equal(value, kept[key]) for key, value in weights(tmp_path / "run").items())
