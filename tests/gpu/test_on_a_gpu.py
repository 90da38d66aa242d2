"""What a GPU computes is what a CPU and stock TRL compute, and running out of its memory is told.

Run by `make gpu`, or by `pytest -m gpu` with CUDA_VISIBLE_DEVICES set.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_rows, ready_trainer, write_splits

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.export import export
from rm_recipe.model.row_attention import NAME
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.scoring import RewardModel
from rm_recipe.tools.benchmark_worker import measure_training
from rm_recipe.training.preflight import preflight
from rm_recipe.training.train import train
from rm_recipe.training.trainer import autocast_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
ON_GPU = {"use_cpu": False}
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
IN_FULL = {"use_peft": False, "lora_r": "omit", "learning_rate": 1e-3}
FUSED = {"aten::_efficient_attention_forward", "aten::_flash_attention_forward"}
ITEMS = [{"prompt": row["prompt"], "response": row["chosen"]} for row in make_rows(16, seed=3)]
PRECISIONS = {
    "fp32": ({}, 1e-4),
    "bf16": ({"bf16": True}, 0.01),
    "fp16": ({"fp16": True}, 0.01),
    "4 bits": ({"bf16": True, **FOUR_BITS}, 0.01),
    "in full": (IN_FULL, 1e-4),
    "in full, bf16": ({"bf16": True, **IN_FULL}, 0.01),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_losses_equal_stock_trl(write_recipe, name):
    keys, tolerance = PRECISIONS[name]
    keys = {**ON_GPU, "max_steps": 6, **keys, "learning_rate": 1e-3}
    path = write_recipe(per_device_train_batch_size=4, gradient_accumulation_steps=2, **keys)
    stock, ours = (measure_training(read_recipe(path), what) for what in ("stock", "ours"))
    of_one = [result["tokens_per_s"] / result["comparisons_per_s"] for result in (ours, stock)]
    assert of_one[0] < of_one[1]  # prefixes are shared
    assert np.allclose(stock["losses"], ours["losses"], rtol=0, atol=tolerance)


def test_the_attention_of_rows_is_computed_by_a_fused_kernel(write_recipe):
    trainer = ready_trainer(read_recipe(write_recipe(**ON_GPU, bf16=True)))
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with autocast_of(trainer.args):
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))
        loss.backward()
    called = {event.key for event in profile.key_averages()}
    assert called & FUSED
    assert "aten::_scaled_dot_product_attention_math" not in called


def test_flash_attention_gives_the_rewards_and_gradients_of_the_whole_mask(write_recipe):
    """Of the same rows in bf16, to its rounding; in fp32, which flash attention does not know, exactly."""

    def step(attention, **keys):
        recipe = read_recipe(write_recipe(**ON_GPU, **keys, per_device_train_batch_size=16))
        trainer = ready_trainer(recipe)
        assert trainer.model.config._attn_implementation == NAME
        trainer.model.base_model.model.set_attn_implementation(attention)
        trainer.data_collator.one_row = attention == NAME
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with autocast_of(trainer.args):
            loss, found = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
        loss.backward()
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        return found["rewards"].detach().double(), torch.cat(gradients).double()

    for keys, tolerance in (({"bf16": True}, 0.05), ({}, 1e-4)):
        for ours, theirs in zip(step(NAME, **keys), step("sdpa", **keys), strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_ligers_kernels_change_no_loss_and_are_left_in_no_other_model(write_recipe):
    pytest.importorskip("liger_kernel")
    path = write_recipe(**ON_GPU, bf16=True, max_steps=6, learning_rate=1e-3)
    plain, fused, again = (
        measure_training(read_recipe(path, words), "ours")
        for words in ([], ["--use_liger_kernel", "true"], [])
    )
    assert np.allclose(plain["losses"], fused["losses"], rtol=0, atol=0.01)
    assert np.allclose(plain["losses"], again["losses"], rtol=0, atol=1e-6)


def test_one_worker_that_makes_the_batches_gives_the_same_losses(write_recipe):
    path = write_recipe(**ON_GPU, max_steps=4, per_device_train_batch_size=8)
    alone, fed = (
        measure_training(read_recipe(path, ["--dataloader_num_workers", n]), "ours") for n in ("0", "1")
    )
    assert np.allclose(alone["losses"], fed["losses"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["fp32", "fp16", "4 bits"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(write_recipe, tmp_path, name):
    keys = {**ON_GPU, **PRECISIONS[name][0], "save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    path, whole, resumed = write_recipe(**keys), tmp_path / "whole", tmp_path / "resumed"
    train(read_recipe(path, ["--output_dir", str(whole)]))
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("run.json", "model", "checkpoint-8"))
    train(read_recipe(path, ["--output_dir", str(resumed)]), resume=True)
    rewards = [RewardModel.from_pretrained(run).score(ITEMS) for run in (whole, resumed)]
    assert np.allclose(*rewards, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_run_is_evaluated_exported_and_verified(write_recipe, tmp_path, name):
    recipe = read_recipe(write_recipe(**ON_GPU, **PRECISIONS[name][0]))
    train(recipe)
    run = recipe.output_dir
    assert json.loads((run / "run.json").read_text())["peak_memory_bytes"] > 0
    evaluate(str(run))
    held_out = json.loads((run / "evaluation.json").read_text())["datasets"]["held_out"]
    assert held_out["accuracy"] > 0.9
    export(run)
    proof = json.loads((run / "export" / "proof.json").read_text())
    assert proof["passed"]
    assert proof["accuracy"]["merged"] == pytest.approx(held_out["accuracy"], abs=0.05)
    on_gpu, on_cpu = (
        RewardModel.from_pretrained(run / "export", device=device).score(ITEMS) for device in ("cuda", "cpu")
    )
    spread = np.abs(on_gpu).max()
    assert np.allclose(on_gpu, on_cpu, rtol=0, atol=0.02 * spread)


def test_running_out_of_memory_halves_micro_batches_and_then_says_what_to_lower(write_recipe, tmp_path):
    rows = make_rows(72, seed=1)
    for row in rows[:64]:
        row["chosen"], row["rejected"] = row["chosen"] + " good" * 300, row["rejected"] + " bad" * 300
    data = write_splits(tmp_path / "long", rows[:64], rows[64:])
    keys = {"dataset_name": str(data), "max_length": 512, "per_device_train_batch_size": 64}
    trainer = ready_trainer(recipe := read_recipe(write_recipe(**ON_GPU, **keys)))
    preflight(recipe, trainer)  # what cuBLAS keeps, on Hopper 32 MiB forwards and as much backwards, is taken
    total = torch.cuda.mem_get_info()[1]
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 160e6) / total)
        preflight(recipe, trainer)
        assert 0 < trainer.data_collator.budget < 64 * 512
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total / 2)
        with pytest.raises(RecipeError, match="out of memory.*max_length"):
            preflight(recipe, trainer)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
