"""On a base in 4 or 8 bits, trained on a CPU: the head is whole and learns, the base stays as it is."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import Trained, train_watched
from trl import ModelConfig

from rm_recipe import RewardModel
from rm_recipe.exporting.export import export
from rm_recipe.model.head import Float32Linear
from rm_recipe.model.reward_model import load_base
from rm_recipe.model.tokenizer import load_tokenizer

ITEMS = [{"prompt": "hello 3 cat", "response": r} for r in ("good good", "bad bad", "the dog sat far away")]
LEARNING_RATE = 1e-2
NF4, EIGHT = {"load_in_4bit": True}, {"load_in_8bit": True}
NESTED = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True}
SET_UPS = {
    "nf4": {"bf16": True, **NF4},
    "fp4 nested": {"bf16": False, **NESTED},
    "8-bit": {"bf16": True, **EIGHT},
}
# The modules that a base lacks, and how many linear layers its body has.
NEW = {
    "llama": ({"score"}, 14),
    "gpt2": ({"score"}, 8),
    "deberta": ({"pooler.dense", "classifier"}, 12),
}


@pytest.fixture
def train_on(write_recipe, tiny_base, tmp_path_factory):
    """Trains two steps on a base of `conftest.TINY_BASES`."""

    def run(base: str, **keys) -> Trained:
        folder = tmp_path_factory.mktemp("trained") / "run"
        common = {"max_steps": 2, "learning_rate": LEARNING_RATE, "output_dir": str(folder)}
        return train_watched(write_recipe(model_name_or_path=str(tiny_base(base)), **common | keys))

    return run


@pytest.fixture(scope="module")
def finished() -> dict[str, Trained]:
    return {}


@pytest.fixture(params=SET_UPS)
def trained(request, finished, train_on):
    """A tiny Llama trained by one of `SET_UPS`, once for all tests, with the set-up's name."""
    if request.param not in finished:
        finished[request.param] = train_on("llama", **SET_UPS[request.param])
    return request.param, finished[request.param]


def quantised_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt))]


def test_the_head_and_every_adapter_move_and_are_saved_in_fp32(trained):
    result = trained[1]
    saved = result.saved()
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all("lora_" in key or key == "score.weight" for key in saved)
    up = [key for key in saved if key.endswith("lora_B.weight")]
    assert len(up) == 14
    for key in ["score.weight", *up]:
        assert (saved[key] - result.started(key)).abs().mean() > LEARNING_RATE / 10, key


def test_the_bits_are_those_that_the_recipe_names(trained):
    name, result = trained
    layers = quantised_layers(result.model)
    assert len(layers) == 14
    if name == "8-bit":
        assert {(type(layer), layer.weight.dtype) for layer in layers} == {(Linear8bitLt, torch.int8)}
        return
    states = {(layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) for layer in layers}
    assert states == {("fp4", True) if name == "fp4 nested" else ("nf4", False)}
    assert {layer.compute_dtype for layer in layers} == {
        torch.bfloat16 if SET_UPS[name]["bf16"] else torch.float32
    }


def test_a_fresh_process_gives_the_rewards_that_were_trained(trained, rewards_elsewhere):
    rewards = trained[1].rewards(ITEMS)
    assert len(set(rewards)) == len(ITEMS)
    assert rewards_elsewhere(trained[1].run, ITEMS) == pytest.approx(rewards, abs=1e-6)


def test_an_evaluation_in_the_middle_changes_nothing_that_is_trained(train_on):
    """A forward without gradients repacked 4-bit weights, and later gradients were wrong."""
    without = train_on("llama", max_steps=3, **SET_UPS["nf4"])
    evaluated = train_on("llama", max_steps=3, eval_strategy="steps", eval_steps=1, **SET_UPS["nf4"])
    log = json.loads((evaluated.run / "run.json").read_text())["log"]
    assert sum("eval_loss" in entry for entry in log) >= 2
    a, b = without.saved(), evaluated.saved()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_tiny_adamw_step_moves_the_head_of_a_4_bit_base(train_on):
    """In bf16, where TRL keeps it, it would stay where it is."""
    step = 1e-5
    result = train_on("llama", bf16=True, **NF4, max_steps=1, learning_rate=step, weight_decay=0.0)
    moved = result.saved()["score.weight"] - result.started("score.weight")
    assert moved.abs().min() > step / 2
    assert moved.abs().max() < step * 2


@pytest.mark.parametrize("base", NEW)
@pytest.mark.parametrize("keys", [NF4, EIGHT], ids=["nf4", "8-bit"])
def test_what_the_base_lacks_is_not_quantised_but_fp32(tiny_base, base, keys):
    """The heads of encoders were."""
    folder, (lacking, linear_layers) = str(tiny_base(base)), NEW[base]
    config = ModelConfig(model_name_or_path=folder, dtype="bfloat16", use_peft=True, **keys)
    model, new = load_base(config, load_tokenizer(folder), seed=0)
    assert len(quantised_layers(model)) == linear_layers
    for module in lacking:
        assert any(module == name or module.startswith(f"{name}.") for name in new)
        head = model.get_submodule(module)
        assert type(head) in (torch.nn.Linear, Float32Linear)
        assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}, module


@pytest.mark.parametrize(
    ("base", "keys", "drift"),
    [("gpt2", NF4, 1e-5), pytest.param("llama", EIGHT, 0.02, marks=pytest.mark.slow)],
)
def test_the_export_of_a_quantised_base_gives_nearly_its_rewards(train_on, tmp_path, base, keys, drift):
    """8 bits round the activations too."""
    result = train_on(base, bf16=False, **keys)
    export(result.run, tmp_path / "export")
    rewards = RewardModel.from_pretrained(tmp_path / "export").score(ITEMS)
    assert rewards == pytest.approx(result.rewards(ITEMS), abs=drift)
