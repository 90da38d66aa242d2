"""A step that is undone shows what a run will cost, and stops one that cannot finish or cannot learn."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import train_watched
from peft.tuners.lora import LoraLayer

import rm_recipe.training.train
from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.model import memory
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.check import check_step
from rm_recipe.training import preflight
from rm_recipe.training import trainer as trainer_module
from rm_recipe.training.train import make_ready, train

DROPOUT = {"lora_dropout": 0.1, "disable_dropout": False, "max_steps": 5, "logging_steps": 1}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"gradient_checkpointing": True},
        {"use_peft": False, "lora_dropout": "omit"},
        {"load_in_4bit": True},
    ],
)
def test_a_run_is_the_same_with_it_and_without(write_recipe, tmp_path, monkeypatch, keys):
    """To the bit, with dropout: it takes no random number from training and leaves no trace."""
    with_it = train_watched(write_recipe(**DROPOUT | keys))
    monkeypatch.setattr(rm_recipe.training.train, "preflight", lambda *_: None)
    without = train_watched(write_recipe(**DROPOUT | keys, output_dir=str(tmp_path / "without")))
    ours, theirs = with_it.saved(), without.saved()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    logs = [json.loads((t.run / "run.json").read_text())["log"] for t in (with_it, without)]
    for key in ("loss", "grad_norm", "accuracy", "num_tokens"):
        assert [entry[key] for entry in logs[0] if key in entry] == [
            entry[key] for entry in logs[1] if key in entry
        ]


def test_it_makes_the_step_on_the_largest_batch_and_moves_what_is_trained(write_recipe, monkeypatch):
    made, kept, optimizer_step = [], [], torch.optim.AdamW.step
    step = preflight.step

    def watch_step(trainer, split, rows):
        made.append(list(map(int, rows)))
        state = getattr(trainer.optimizer, "state", None)
        kept.append(bool(state) and any(p.grad is not None for p in trainer.model.parameters()))
        return step(trainer, split, rows)

    def watch_optimizer(self, *args):
        weights = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in weights]
        result = optimizer_step(self, *args)
        moved.extend(not torch.equal(a, b) for a, b in zip(before, weights, strict=True))
        return result

    moved: list[bool] = []
    monkeypatch.setattr(preflight, "step", watch_step)
    monkeypatch.setattr(torch.optim.AdamW, "step", watch_optimizer)
    ready = make_ready(read_recipe(write_recipe()))
    sizes = ready.train_split.sizes(shared=True)
    assert len(made) == 2 + preflight.TIMED
    assert made[1] == made[0]
    assert kept[:2] == [False, True]  # as in training: beside gradients and the optimizer's state
    assert sizes[made[0]].sum() == sum(sorted(sizes)[-8:])
    assert any(moved)  # A of every adapter has no gradient while B is 0


def test_it_checkpoints_as_training_does(write_recipe):
    """`every_n_layers` and `offload` are the model's, the rest goes to torch."""
    keys = {"activation_checkpointing": True, "gradient_checkpointing": "omit"}
    recipe = read_recipe(write_recipe(**keys, activation_checkpointing_kwargs={"every_n_layers": 2}))
    layers = make_ready(recipe).trainer.model.base_model.model.model.layers
    assert [layer.gradient_checkpointing for layer in layers].count(True) == 1


def test_it_says_steps_time_and_peak_memory(write_recipe, tmp_path, capsys):
    recipe = read_recipe(write_recipe())
    check_step(recipe)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("preflight: loss 0.")
    assert "at the start; 16 steps, about " in line
    assert line.endswith("GB")
    assert not (tmp_path / "run").exists()


def test_the_estimate_counts_evaluations_and_epochs(write_recipe, monkeypatch):
    """By a clock that advances one second for each token of a batch as it comes."""
    clock = SimpleNamespace(now=0.0)
    step = preflight.step

    def slow(trainer, split, rows):
        clock.now += float(split.sizes(True)[rows].sum())
        return step(trainer, split, rows)

    monkeypatch.setattr(preflight, "step", slow)
    monkeypatch.setattr(preflight, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(
        rm_recipe.training.train, "preflight", lambda *args: shown.append(preflight.preflight(*args))
    )
    shown: list[preflight.Preflight] = []
    ready = make_ready(read_recipe(write_recipe(num_train_epochs=3)))
    train_tokens, test_tokens = ready.train_split.sizes(True).sum(), ready.test_split.sizes(True).sum()
    assert shown[0].seconds == pytest.approx(3 * train_tokens)
    assert shown[0].steps == 24
    make_ready(read_recipe(write_recipe(eval_strategy="steps", eval_steps=4, max_steps=12)))
    assert shown[1].seconds == pytest.approx(12 / 8 * train_tokens + 3 * test_tokens / 3)


def test_no_gradient_for_an_adapter_or_the_head_stops_a_run(write_recipe, tmp_path):
    """trl#694: gradient checkpointing that cut the graph trained nothing."""
    for name, told in (("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"), ("score", "score")):
        ready = make_ready(read_recipe(write_recipe()))
        preflight.step(ready.trainer, ready.train_split, range(4))
        preflight.check_gradients(ready.trainer.model, ready.new_modules)
        module = ready.trainer.model.get_base_model().get_submodule(name)
        for part, parameter in module.named_parameters():
            if parameter.requires_grad and "lora_A" not in part:
                parameter.grad = None if name == "score" else torch.zeros_like(parameter)
        with pytest.raises(
            TrainingError, match=f"preflight: no gradient reaches {told}: training would leave"
        ):
            preflight.check_gradients(ready.trainer.model, ready.new_modules)


def test_the_targets_that_are_advised_leave_out_what_no_gradient_reaches(write_recipe, tmp_path):
    """As of a layer that all-linear finds and the forward passes over: ESM's contact head, a vision tower."""
    passed_over = [f"model.layers.{n}.{name}" for n in (0, 1) for name in ("mlp.up_proj", "self_attn.v_proj")]
    ready = make_ready(read_recipe(write_recipe(lora_target_modules="all-linear")))
    preflight.step(ready.trainer, ready.train_split, range(4))
    base = ready.trainer.model.get_base_model()
    for name in passed_over:
        for parameter in base.get_submodule(name).parameters():
            parameter.grad = None
    with pytest.raises(
        TrainingError, match="they are; set 'lora_target_modules: .*', which leaves"
    ) as caught:
        preflight.check_gradients(ready.trainer.model, ready.new_modules)
    advised = str(caught.value).split("'lora_target_modules: ")[1].split("'")[0]
    assert advised == "[q_proj, k_proj, o_proj, gate_proj, down_proj]"
    keys = {"lora_target_modules": yaml.safe_load(advised), "output_dir": str(tmp_path / "other")}
    again = make_ready(read_recipe(write_recipe(**keys))).trainer.model.get_base_model()
    adapted = {name for name, layer in again.named_modules() if isinstance(layer, LoraLayer)}
    assert adapted == {name for name, layer in base.named_modules() if isinstance(layer, LoraLayer)} - set(
        passed_over
    )


def test_without_any_gradient_it_is_checkpointing_or_the_base(write_recipe):
    ready = make_ready(read_recipe(write_recipe()))
    ready.trainer.model.zero_grad()
    base = ready.trainer.model.get_base_model()
    with pytest.raises(TrainingError, match="this base computes its rewards without them"):
        preflight.check_gradients(ready.trainer.model, ready.new_modules)
    base.gradient_checkpointing_enable()
    with pytest.raises(TrainingError, match="set 'gradient_checkpointing: false'"):
        preflight.check_gradients(ready.trainer.model, ready.new_modules)


def test_an_ending_leaves_out_another_layer_of_the_same_name():
    others = ["encoder.pooler.dense"]
    assert preflight._ending("encoder.layer.0.output.dense", others) == "output.dense"
    assert preflight._ending("encoder.layer.0.query", others) == "query"


def test_a_gradient_for_the_base_stops_a_run(write_recipe):
    ready = make_ready(read_recipe(write_recipe()))
    preflight.step(ready.trainer, ready.train_split, range(4))
    frozen = next(p for p in ready.trainer.model.parameters() if not p.requires_grad)
    frozen.grad = torch.ones_like(frozen)
    with pytest.raises(TrainingError, match="is frozen and has a gradient"):
        preflight.check_gradients(ready.trainer.model, ready.new_modules)


def test_a_head_that_starts_with_large_rewards_is_pointed_out(write_recipe, monkeypatch, capsys):
    initialise = rm_recipe.model.reward_model.initialise

    def large(model, name):
        initialise(model, name)
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(3e4)

    monkeypatch.setattr(rm_recipe.model.reward_model, "initialise", large)
    make_ready(read_recipe(write_recipe()))
    assert (
        f"and a head that knows nothing has {math.log(2):.2f} (ln 2): rewards start large"
        in capsys.readouterr().out
    )


def test_a_disk_without_room_stops_a_run_before_it_starts(write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100e6))
    keys = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(RecipeError) as caught:
        train(read_recipe(write_recipe(**keys)))
    assert str(caught.value).startswith(
        f"{tmp_path}/run: the run needs about 0.3 GB there (8 checkpoint(s) of 0.03"
    )
    assert "and 0.1 are free; 'save_total_limit: 2' keeps fewer checkpoints, --output_dir" in str(
        caught.value
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match=r"\(3 checkpoint\(s\) of 0.03"):
        train(read_recipe(write_recipe(**keys, save_total_limit=2)))


# --- out of memory -------------------------------------------------------------------------------


@pytest.fixture
def small_gpu(monkeypatch):
    """A function that makes a forward of more than so many comparisons run out of memory."""

    def make(n: int, from_call: int = 0) -> None:
        real, calls = trainer_module.SharedPrefixRewardTrainer.compute_loss, []

        def compute_loss(self, model, inputs, *args, **kwargs):
            calls.append(1)
            if len(inputs["names"]) > n and len(calls) > from_call:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(trainer_module.SharedPrefixRewardTrainer, "compute_loss", compute_loss)
        monkeypatch.setattr(memory, "device_memory", lambda _: room)

    room = 0.8e9
    return make


def test_out_of_memory_at_the_largest_batch_names_what_to_lower(
    write_recipe, tmp_path, small_gpu, monkeypatch
):
    small_gpu(4)
    with pytest.raises(RecipeError) as caught:
        train(read_recipe(write_recipe()))
    message = str(caught.value)
    assert message.startswith(
        "preflight: CPU out of memory: the largest batch takes about 0.7 of 0.8 GB by the"
    )
    assert "per_device_train_batch_size: 4" in message
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "device_memory", lambda _: memory.PROCESS / 0.9 + 2.5e6)
    with pytest.raises(
        RecipeError, match=r"per_device_train_batch_size: [124] with gradient_accumulation_steps: \d+ fits"
    ):
        train(read_recipe(write_recipe(per_device_train_batch_size=16)))


@pytest.mark.parametrize("call", [1, 3])
def test_out_of_memory_later_in_the_preflight_is_the_same_message(write_recipe, tmp_path, small_gpu, call):
    small_gpu(4, from_call=call)
    with pytest.raises(RecipeError, match="^preflight: CPU out of memory: the largest batch takes about"):
        train(read_recipe(write_recipe()))
    assert not (tmp_path / "run").exists()


def test_out_of_memory_in_training_keeps_the_checkpoint_and_goes_on_with_smaller_batches(
    write_recipe, tmp_path, small_gpu, monkeypatch, capsys
):
    keys = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    with monkeypatch.context():
        small_gpu(4, from_call=2 + preflight.TIMED + 5)
        with pytest.raises(TrainingError, match=r"^step 6: CPU out of memory: "):
            train(read_recipe(write_recipe(**keys)))
        smaller = write_recipe(**keys, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        train(read_recipe(smaller), resume=True)
        assert (
            "other batches than before, with as many comparisons a step: the same, but"
            in capsys.readouterr().out
        )
    monkeypatch.undo()
    whole = train_watched(write_recipe(**keys, output_dir=str(tmp_path / "whole")))
    ours = [e["loss"] for e in json.loads((tmp_path / "run" / "run.json").read_text())["log"] if "loss" in e]
    theirs = [e["loss"] for e in json.loads((whole.run / "run.json").read_text())["log"] if "loss" in e]
    assert ours == pytest.approx(theirs, abs=1e-4)
