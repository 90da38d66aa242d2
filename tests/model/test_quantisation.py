"""On a base in 4 or 8 bits, trained on a CPU: the head is whole and learns, an evaluation changes nothing.

What else has to hold of such a base is among the set-ups of `test_architectures`.
"""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import logged, train_watched, weights
from trl import ModelConfig

from rm_recipe.model.head import Float32Linear
from rm_recipe.model.reward_model import load_base
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import train

NF4 = {"load_in_4bit": True, "bf16": True}
# The modules that a base lacks, and how many linear layers its body has.
NEW = {"llama": (["score"], 14), "gpt2": (["score"], 8), "deberta": (["pooler.dense", "classifier"], 12)}


def test_an_evaluation_in_the_middle_changes_nothing_that_is_trained(write_recipe, tmp_path):
    """A forward without gradients repacked 4-bit weights, and later gradients were wrong."""
    evaluating = {"eval_strategy": "steps", "eval_steps": 1}
    for name, keys in {"without": {}, "evaluated": evaluating}.items():
        train(read_recipe(write_recipe(**NF4, max_steps=3, output_dir=str(tmp_path / name), **keys)))
    assert len(logged(tmp_path / "evaluated", "eval_loss")) >= 2
    without, evaluated = weights(tmp_path / "without"), weights(tmp_path / "evaluated")
    assert without.keys() == evaluated.keys()
    assert all(torch.equal(without[key], evaluated[key]) for key in without)


def test_a_tiny_adamw_step_moves_the_head_of_a_4_bit_base(write_recipe):
    """In bf16, where TRL keeps it, it would stay where it is."""
    step = 1e-5
    result = train_watched(write_recipe(**NF4, max_steps=1, learning_rate=step, weight_decay=0.0))
    moved = result.saved()["score.weight"] - result.started("score.weight")
    assert moved.abs().min() > step / 2
    assert moved.abs().max() < step * 2


@pytest.mark.parametrize("base", NEW)
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_what_the_base_lacks_is_not_quantised_but_fp32(tiny_base, base, bits):
    """The heads of encoders were."""
    folder, (lacking, linear_layers) = str(tiny_base(base)), NEW[base]
    config = ModelConfig(model_name_or_path=folder, dtype="bfloat16", use_peft=True, **{bits: True})
    model, new = load_base(config, load_tokenizer(folder), seed=0)
    assert sum(isinstance(module, (Linear4bit, Linear8bitLt)) for module in model.modules()) == linear_layers
    for module in lacking:
        assert any(module == name or module.startswith(f"{name}.") for name in new)
        head = model.get_submodule(module)
        assert type(head) in (torch.nn.Linear, Float32Linear)
        assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}, module
