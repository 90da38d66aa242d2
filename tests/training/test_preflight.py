"""A step that is undone shows what a run will cost, and stops one that cannot finish or cannot learn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import logged, ready_trainer, train_watched

import rm_recipe.training.train
from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.files import read_json
from rm_recipe.model import memory
from rm_recipe.model.shared_prefix import TOKENS_ON_CPU
from rm_recipe.recipe.reader import read_recipe, read_run_recipe
from rm_recipe.tools.check import check_step
from rm_recipe.training import preflight
from rm_recipe.training.train import train
from rm_recipe.training.trainer import SharedPrefixRewardTrainer


@pytest.mark.parametrize("keys", [{"gradient_checkpointing": True}, {"load_in_4bit": True}])
def test_a_run_is_the_same_with_it_and_without(write_recipe, tmp_path, monkeypatch, keys):
    """To the bit, with dropout: it takes no random number from training and leaves no trace."""
    keys |= {"lora_dropout": 0.1, "disable_dropout": False, "max_steps": 5, "logging_steps": 1}
    with_it = train_watched(write_recipe(**keys))
    monkeypatch.setattr(rm_recipe.training.train, "preflight", lambda *_: {})
    without = train_watched(write_recipe(**keys, output_dir=str(tmp_path / "without")))
    ours, theirs = with_it.saved(), without.saved()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for key in ("loss", "grad_norm", "accuracy", "num_tokens"):
        assert logged(with_it.run, key) == logged(without.run, key)


def test_it_makes_the_largest_step_twice_as_training_keeps_gradients_and_state(write_recipe, monkeypatch):
    made, kept, step = [], [], preflight.step

    def watch_step(trainer, rows):
        made.append(list(map(int, rows)))
        state = getattr(trainer.optimizer, "state", None)
        kept.append(bool(state) and any(p.grad is not None for p in trainer.model.parameters()))
        return step(trainer, rows)

    monkeypatch.setattr(preflight, "step", watch_step)
    recipe = read_recipe(write_recipe())
    preflight.preflight(recipe, trainer := ready_trainer(recipe))
    sizes = trainer.train_split.sizes(shared=True)
    assert made[1] == made[0]
    assert sizes[made[0]].sum() == sum(sorted(sizes)[-8:])
    assert kept[:2] == [False, True]


def test_it_checkpoints_as_training_does(write_recipe):
    """`every_n_layers` and `offload` are the model's, the rest goes to torch."""
    keys = {"activation_checkpointing": True, "gradient_checkpointing": "omit"}
    recipe = read_recipe(write_recipe(**keys, activation_checkpointing_kwargs={"every_n_layers": 2}))
    preflight.preflight(recipe, trainer := ready_trainer(recipe))
    layers = trainer.model.base_model.model.model.layers
    assert [layer.gradient_checkpointing for layer in layers].count(True) == 1


def test_it_says_steps_time_and_peak_memory_and_leaves_nothing(write_recipe, tmp_path, capsys):
    check_step(read_recipe(write_recipe()))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("preflight: loss 0.")
    assert "at the start; 16 steps, about " in line
    assert line.endswith("GB")
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_missing_stops_a_run(write_recipe):
    """trl#694: gradient checkpointing that cut the graph trained nothing."""
    trainer = ready_trainer(read_recipe(write_recipe()))
    base = trainer.model.get_base_model()
    for name in ("model.layers.1.mlp.up_proj", "score"):
        preflight.step(trainer, range(4))
        preflight.check_gradients(trainer.model, trainer.modules_to_save)
        for part, parameter in base.get_submodule(name).named_parameters():
            if parameter.requires_grad and "lora_A" not in part:
                parameter.grad = None if name == "score" else torch.zeros_like(parameter)
        with pytest.raises(TrainingError, match=f"preflight: no gradient reaches {name}: training would"):
            preflight.check_gradients(trainer.model, trainer.modules_to_save)


def test_adapters_of_embeddings_pass_and_learn(write_recipe):
    """There PEFT starts A at 0, so that B has no gradient in the first step."""
    result = train_watched(write_recipe(lora_target_modules=["q_proj", "embed_tokens"], max_steps=2))
    (learnt,) = (value for name, value in result.saved().items() if name.endswith("lora_embedding_A"))
    assert learnt.abs().max() > 1e-3


# --- out of memory -------------------------------------------------------------------------------


@pytest.fixture
def small_gpu(monkeypatch):
    """A function that makes a forward of more than so many comparisons run out of memory."""

    def make(n: int, from_call: int = 0) -> None:
        real, calls = SharedPrefixRewardTrainer.compute_loss, []

        def compute_loss(self, model, inputs, *args, **kwargs):
            calls.append(1)
            if len(inputs["names"]) > n and len(calls) > from_call:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(SharedPrefixRewardTrainer, "compute_loss", compute_loss)
        monkeypatch.setattr(memory, "device_memory", lambda _: 0.8e9)

    return make


@pytest.mark.parametrize("call", [0, 1, 3])
def test_out_of_memory_in_the_preflight_halves_micro_batches_and_no_loss_changes(
    write_recipe, tmp_path, small_gpu, monkeypatch, call
):
    small_gpu(4, from_call=call)
    halved = train_watched(write_recipe(logging_steps=1))
    monkeypatch.undo()
    whole = train_watched(write_recipe(logging_steps=1, output_dir=str(tmp_path / "whole")))
    tokens = [read_json(one.run / "run.json")["micro_batch_tokens"] for one in (halved, whole)]
    assert 0 < tokens[0] < tokens[1] == TOKENS_ON_CPU
    assert read_run_recipe(halved.run).values["micro_batch_tokens"] == tokens[0]  # for a resume
    assert logged(halved.run, "loss") == pytest.approx(logged(whole.run, "loss"), abs=1e-5)
    assert logged(halved.run, "accuracy") == logged(whole.run, "accuracy")


def test_what_is_halved_is_the_costliest_micro_batch_and_not_the_longest_comparisons(write_recipe):
    trainer = ready_trainer(recipe := read_recipe(write_recipe(per_device_train_batch_size=7)))
    sizes = np.array([155, 155, 152, 104, 104, 104, 104])
    trainer.train_split = SimpleNamespace(
        comparisons=sizes, sizes=lambda *_, **__: sizes, largest=lambda n, shared: np.arange(len(sizes))
    )
    budgets = []
    while len(preflight.largest_micro_batch(trainer)[1]) > 1:
        preflight.halve_micro_batches(recipe, trainer)
        budgets.append(trainer.data_collator.budget)
    assert budgets == sorted(budgets, reverse=True)
    assert preflight.largest_micro_batch(trainer)[1].tolist() == [155]  # what alone fits is not given up
    with pytest.raises(RecipeError, match="take gradient_checkpointing: true or a lower max_length"):
        preflight.halve_micro_batches(recipe, trainer)


def test_where_not_one_comparison_fits_the_message_names_what_to_lower(write_recipe, tmp_path, small_gpu):
    small_gpu(0)
    with pytest.raises(RecipeError, match="^preflight: CPU out of memory: take gradient_checkpointing: true"):
        train(read_recipe(write_recipe()))
    assert not (tmp_path / "run").exists()


def test_out_of_memory_in_training_keeps_the_checkpoint_and_goes_on_with_smaller_batches(
    write_recipe, tmp_path, small_gpu, monkeypatch
):
    keys = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    small_gpu(4, from_call=2 + preflight.TIMED + 5)
    with pytest.raises(TrainingError, match=r"^step 6: CPU out of memory: "):
        train(read_recipe(write_recipe(**keys)))
    smaller = write_recipe(**keys, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    train(read_recipe(smaller), resume=True)
    monkeypatch.undo()
    whole = train_watched(write_recipe(**keys, output_dir=str(tmp_path / "whole")))
    assert logged(tmp_path / "run", "loss") == pytest.approx(logged(whole.run, "loss"), abs=1e-4)
