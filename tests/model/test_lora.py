"""LoRA trains what it should; its layers compute what PEFT's do, and cost less."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from trl import ModelConfig

from rm_recipe.errors import TrainingError
from rm_recipe.model.lora import add_lora, in_one_product, untrained_layers
from rm_recipe.model.reward_model import autocast, load_base
from rm_recipe.model.tokenizer import load_tokenizer

IDS = torch.tensor([[5, 6, 7, 8], [9, 6, 4, 3]])


def adapted(folder, half: bool = False, **keys) -> PeftModel:
    """With adapters that do something: PEFT starts them at zero."""
    dtype = "bfloat16" if half else "float32"
    config = ModelConfig(model_name_or_path=str(folder), use_peft=True, dtype=dtype, **keys)
    model, new = load_base(config, load_tokenizer(str(folder)), 0)
    torch.manual_seed(0)
    wrapped = add_lora(model, config, new, autocast=half)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


def test_adapters_stay_fp32_and_activations_bf16(tiny_llama):
    wrapped = adapted(tiny_llama, half=True)
    seen = []
    layer = wrapped.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"]
    layer.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with autocast(wrapped):
        wrapped(input_ids=IDS)
    assert layer.weight.dtype == torch.float32
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["q_proj"], {"q_proj"}),  # which TRL makes a text of, and PEFT would take for a whole path
        ([r".*\.0\.self_attn\.[qk]_proj"], {"q_proj", "k_proj"}),
    ],
)
def test_target_modules_are_names_or_one_regular_expression(tiny_llama, wanted, expected):
    modules = adapted(tiny_llama, lora_target_modules=wanted).named_modules()
    assert {name.rpartition(".")[2] for name, m in modules if hasattr(m, "lora_A")} == expected


def test_saved_adapters_that_add_nothing_are_named_and_refused_if_all_are_like_that(tmp_path):
    """ZeRO-3 saved empty ones (trl#939)."""
    names = [f"base_model.model.model.layers.{n}.q_proj.lora_B.weight" for n in range(2)]
    head, zeros = {"score.weight": torch.zeros(1)}, torch.zeros(4, 2)
    save_file({names[0]: torch.ones(4, 2), names[1]: zeros} | head, tmp_path / "adapter_model.safetensors")
    assert untrained_layers(tmp_path) == ["model.layers.1.q_proj"]
    save_file({names[0]: zeros, names[1]: torch.empty(0)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TrainingError, match="every LoRA adapter saved in .* is zero or empty"):
        untrained_layers(tmp_path)
    save_file(head, tmp_path / "adapter_model.safetensors")
    assert untrained_layers(tmp_path) == []


def rewards_and_gradients(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    with autocast(model):
        rewards = model(input_ids=IDS).logits
    rewards.sum().backward()
    return rewards, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("half", "keys", "tolerance"),
    [
        (False, {}, 1e-6),
        (True, {}, 0.05),
        (False, {"use_dora": True}, 0),  # which keeps what it computes
        (True, {"load_in_4bit": True}, 0.05),
    ],
    ids=["fp32", "bf16", "dora", "4-bit"],
)
def test_in_one_product_the_rewards_and_gradients_are_those_of_peft(tiny_llama, half, keys, tolerance):
    model = adapted(tiny_llama, half, **keys)
    expected, expected_gradients = rewards_and_gradients(model)
    with in_one_product(model):
        rewards, gradients = rewards_and_gradients(model)
        with torch.inference_mode(), autocast(model):  # in place
            scored = [model(input_ids=IDS).logits for _ in range(2)]
    assert torch.equal(*scored)
    assert (scored[0] - expected).abs().max() <= tolerance * expected.abs().max()
    assert (rewards - expected).abs().max() <= tolerance * expected.abs().max()
    assert (gradients - expected_gradients).norm() <= tolerance * expected_gradients.norm()
    assert expected_gradients.norm() > 0


def test_in_one_product_ends_with_its_block_so_that_merging_is_pefts_own(tiny_llama):
    """PEFT takes over the merge from what computes a layer, and ours has none."""
    model = adapted(tiny_llama)
    expected, _ = rewards_and_gradients(model)
    with pytest.raises(KeyError, match="anything"), in_one_product(model):
        raise KeyError("anything")
    with torch.no_grad():
        rewards = copy.deepcopy(model).merge_and_unload()(input_ids=IDS).logits
    assert (rewards - expected).abs().max() <= 1e-5
