"""On a base in 4 or 8 bits, trained on a CPU: the head is whole and learns, the base stays as it is."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import Trained, train_watched
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig

from rm_recipe import RewardModel
from rm_recipe.exporting.export import export
from rm_recipe.model.head import Float32Linear
from rm_recipe.model.reward_model import load_base
from rm_recipe.model.tokenizer import load_tokenizer

ITEMS = [{"prompt": "hello 3 cat", "response": r} for r in ("good good", "bad bad", "the dog sat far away")]
LEARNING_RATE = 1e-2
FOUR_BITS = {
    f"{kind}{' nested' if nested else ''}": {
        "load_in_4bit": True, "bnb_4bit_quant_type": kind, "use_bnb_nested_quant": nested
    }
    for kind in ("nf4", "fp4")
    for nested in (False, True)
}  # fmt: skip
QUANTISED = {**FOUR_BITS, "8-bit": {"load_in_8bit": True}}
# The modules that a base lacks, and how many linear layers its body has.
NEW = {
    "llama": {"score"},
    "qwen2": {"score"},
    "gpt2": {"score"},
    "bert": {"bert.pooler.dense", "classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "deberta": {"pooler.dense", "classifier"},
}
LINEAR_LAYERS = {"llama": 14, "qwen2": 14, "gpt2": 8, "bert": 12, "distilbert": 12, "deberta": 12}
of_each = pytest.mark.parametrize("name", QUANTISED)
in_each_precision = pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])


@pytest.fixture
def train_on(write_recipe, tiny_base, tmp_path_factory):
    """Trains two steps on a base of `conftest.TINY_BASES`."""

    def run(base: str, **keys) -> Trained:
        folder = tmp_path_factory.mktemp("trained") / "run"
        common = {"max_steps": 2, "learning_rate": LEARNING_RATE, "output_dir": str(folder)}
        return train_watched(write_recipe(model_name_or_path=str(tiny_base(base)), **common | keys))

    return run


@pytest.fixture(scope="module")
def finished() -> dict[tuple[str, bool], Trained]:
    return {}


@pytest.fixture
def trained(finished, train_on):
    """Trains the tiny Llama by one of `QUANTISED`, once for all tests."""

    def get(name: str, bf16: bool) -> Trained:
        if (name, bf16) not in finished:
            finished[name, bf16] = train_on("llama", bf16=bf16, **QUANTISED[name])
        return finished[name, bf16]

    return get


def quantised_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    kinds = (Linear4bit, Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@in_each_precision
@of_each
def test_the_head_and_every_adapter_move_and_are_saved_in_fp32(trained, name, bf16):
    result = trained(name, bf16)
    saved = result.saved()
    assert {value.dtype for value in saved.values()} == {torch.float32}
    up = [key for key in saved if key.endswith("lora_B.weight")]
    assert len(up) == 14
    for key in ["score.weight", *up]:
        assert (saved[key] - result.started(key)).abs().mean() > LEARNING_RATE / 10, key
    assert all("lora_" in key or key == "score.weight" for key in saved)


@in_each_precision
@of_each
def test_training_and_scoring_leave_the_base_as_it_was(trained, name, bf16):
    result = trained(name, bf16)
    result.rewards(ITEMS)
    trainable = {key for key, parameter in result.model.named_parameters() if parameter.requires_grad}
    after = result.model.state_dict()
    assert after.keys() == result.start.keys()
    frozen = after.keys() - trainable
    assert (
        sum(after[key].dtype in (torch.uint8, torch.int8) and after[key].numel() > 1 for key in frozen) >= 14
    )
    for key in frozen:
        assert torch.equal(after[key], result.start[key]), key


@in_each_precision
@pytest.mark.parametrize("name", FOUR_BITS)
def test_the_4_bits_are_those_that_the_recipe_names(trained, name, bf16):
    model, keys = trained(name, bf16).model, FOUR_BITS[name]
    compute = torch.bfloat16 if bf16 else torch.float32
    saved = json.loads((trained(name, bf16).run / "model" / "config.json").read_text())["quantization_config"]
    for config in (saved, model.config.quantization_config.to_dict()):
        assert config["load_in_4bit"]
        assert config["bnb_4bit_quant_type"] == keys["bnb_4bit_quant_type"]
        assert config["bnb_4bit_use_double_quant"] == keys["use_bnb_nested_quant"]
        assert config["bnb_4bit_compute_dtype"] == str(compute).removeprefix("torch.")
    layers = quantised_layers(model)
    assert len(layers) == 14
    for layer in layers.values():
        assert layer.weight.numel() * 2 == layer.in_features * layer.out_features
        assert layer.weight.quant_state.quant_type == keys["bnb_4bit_quant_type"]
        assert layer.weight.quant_state.nested == keys["use_bnb_nested_quant"]
        assert layer.compute_dtype == compute


@in_each_precision
def test_8_bits_are_8_bits(trained, bf16):
    model = trained("8-bit", bf16).model
    assert model.config.quantization_config.load_in_8bit
    layers = quantised_layers(model)
    assert len(layers) == 14
    assert {(type(layer), layer.weight.dtype) for layer in layers.values()} == {(Linear8bitLt, torch.int8)}


@in_each_precision
@of_each
def test_a_fresh_process_gives_the_rewards_that_were_trained(trained, rewards_elsewhere, name, bf16):
    result = trained(name, bf16)
    rewards = result.rewards(ITEMS)
    assert len(set(rewards)) == len(ITEMS)
    assert rewards_elsewhere(result.run, ITEMS) == pytest.approx(rewards, abs=1e-6)


@pytest.mark.parametrize("name", ["nf4", "8-bit"])
@pytest.mark.parametrize("base", ["qwen2", "gpt2", "bert", "distilbert", "deberta"])
def test_a_fresh_process_gives_the_rewards_of_every_architecture(train_on, rewards_elsewhere, base, name):
    result = train_on(base, bf16=True, **QUANTISED[name])
    rewards = result.rewards(ITEMS)
    assert len(set(rewards)) == len(ITEMS)
    assert rewards_elsewhere(result.run, ITEMS) == pytest.approx(rewards, abs=1e-6)


@pytest.mark.parametrize("name", ["nf4", "fp4 nested", "8-bit"])
def test_an_evaluation_in_the_middle_changes_nothing_that_is_trained(train_on, name):
    """A forward without gradients repacked 4-bit weights, and later gradients were wrong."""
    keys = {"bf16": True, "max_steps": 4, **QUANTISED[name]}
    without = train_on("llama", **keys)
    evaluated = train_on("llama", eval_strategy="steps", eval_steps=1, **keys)
    log = json.loads((evaluated.run / "run.json").read_text())["log"]
    assert sum("eval_loss" in entry for entry in log) >= 3
    a, b = without.saved(), evaluated.saved()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_tiny_adamw_step_moves_the_head_of_a_4_bit_base(train_on):
    """In bf16, where TRL keeps it, it would stay where it is."""
    step = 1e-5
    result = train_on(
        "llama", bf16=True, load_in_4bit=True, max_steps=1, learning_rate=step, weight_decay=0.0
    )
    start, end = result.started("score.weight"), result.saved()["score.weight"]
    assert start.std() == pytest.approx(0.02, rel=0.4)
    moved = end - start
    assert moved.abs().min() > step / 2
    assert moved.abs().max() < step * 2
    in_half = torch.nn.Parameter(start.bfloat16())
    in_half.grad = -moved.sign().bfloat16()
    torch.optim.AdamW([in_half], lr=step, weight_decay=0.0).step()
    large = start.abs() > 0.01
    assert large.sum() > 10
    assert torch.equal(in_half.detach()[large], start.bfloat16()[large])


@pytest.mark.parametrize("base", NEW)
@pytest.mark.parametrize("name", ["nf4", "8-bit"])
def test_what_the_base_lacks_is_not_quantised_but_fp32(tiny_base, base, name):
    """The heads of encoders were."""
    folder = str(tiny_base(base))
    config = ModelConfig(model_name_or_path=folder, dtype="bfloat16", use_peft=True, **QUANTISED[name])
    model, new = load_base(config, load_tokenizer(folder), seed=0)
    assert len(quantised_layers(model)) == LINEAR_LAYERS[base]
    for module in NEW[base]:
        assert any(module == name or module.startswith(f"{name}.") for name in new)
        head = model.get_submodule(module)
        assert type(head) in (torch.nn.Linear, Float32Linear)
        assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}, module


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("base", ["llama", "distilbert", "deberta"])
def test_the_head_of_a_classifier_is_not_quantised_either(
    tiny_base, write_recipe, tmp_path, rewards_elsewhere, base, labels
):
    """Of one label, as of a reward model to go on with, nothing is missing from the checkpoint."""
    torch.manual_seed(1)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_base(base), num_labels=labels)
    classifier.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_base(base)).save_pretrained(tmp_path / "base")
    keys = {"max_steps": 2, "bf16": True, "load_in_4bit": True}
    result = train_watched(write_recipe(model_name_or_path=str(tmp_path / "base"), **keys))
    saved = {key: value for key, value in result.saved().items() if "lora_" not in key}
    assert {key.rpartition(".")[0] for key in saved} == NEW[base]
    assert {value.dtype for value in saved.values()} == {torch.float32}
    for module in NEW[base]:
        moved = saved[f"{module}.weight"] - result.started(f"{module}.weight")
        assert moved.abs().mean() > LEARNING_RATE / 10, module
    assert rewards_elsewhere(result.run, ITEMS) == pytest.approx(result.rewards(ITEMS), abs=1e-6)


def test_gpt2s_layers_are_quantised_the_right_way_round(tiny_base):
    """They are `Conv1D`, whose weights are (in, out)."""
    folder = str(tiny_base("gpt2"))
    models = [
        load_base(
            ModelConfig(model_name_or_path=folder, dtype="float32", use_peft=True, load_in_4bit=quantised),
            load_tokenizer(folder),
            seed=0,
        )[0]
        for quantised in (False, True)
    ]
    whole, small = (model.transformer.h[0].attn.c_proj.weight for model in models)
    back = dequantize_4bit(small.data, small.quant_state)
    assert (back - whole.T).norm() < 0.2 * whole.norm()
    assert (back - whole).norm() > whole.norm()


@pytest.mark.parametrize("name", ["nf4", "8-bit"])
@pytest.mark.parametrize("base", ["llama", "qwen2", "gpt2"])
def test_the_export_of_a_quantised_base_gives_nearly_its_rewards(train_on, tmp_path, base, name):
    result = train_on(base, bf16=False, **QUANTISED[name])
    export(result.run, tmp_path / "export")
    rewards = RewardModel.from_pretrained(tmp_path / "export").score(ITEMS)
    drift = 1e-5 if name == "nf4" else 0.02  # 8 bits round the activations too
    assert rewards == pytest.approx(result.rewards(ITEMS), abs=drift)
