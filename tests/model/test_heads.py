"""A head that did not reach the disk, or did not move, is noticed."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, BertConfig, DebertaV2Config, RobertaConfig
from trl import ModelConfig

from rm_recipe.errors import TrainingError
from rm_recipe.model.head import check_saved_head, outermost
from rm_recipe.model.lora import add_lora
from rm_recipe.model.reward_model import load_base
from rm_recipe.model.tokenizer import load_tokenizer


def test_a_saved_head_that_is_missing_or_did_not_move_is_noticed(tmp_path):
    start = {"score.weight": torch.ones(1, 2)}
    save_file({"base_model.model.other": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TrainingError, match="score.weight is missing"):
        check_saved_head(tmp_path, start)
    save_file({"base_model.model.score.weight": torch.ones(1, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TrainingError, match="score.weight did not move"):
        check_saved_head(tmp_path, start)


def test_a_head_whose_name_another_one_ends_with_is_not_mistaken_for_it(tmp_path):
    start = {"classifier.weight": torch.ones(1, 2)}
    save_file({"pre_classifier.weight": torch.zeros(1, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(TrainingError, match="classifier.weight is missing"):
        check_saved_head(tmp_path, start)


def test_names_inside_others_are_left_to_those():
    assert outermost(["pooler.dense", "classifier", "pooler", "pool"]) == ["classifier", "pool", "pooler"]


ENCODERS = {
    "roberta": RobertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=32, pad_token_id=1),
    "deberta": DebertaV2Config(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=32, pooler_hidden_size=16),
    "bert": BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=32),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_under_lora_every_new_parameter_of_an_encoder_gets_a_gradient(name, tiny_distilbert, tmp_path):
    """DeBERTa's new `pooler.dense` was neither trained nor saved."""
    AutoModel.from_config(ENCODERS[name]).save_pretrained(tmp_path)
    config = ModelConfig(model_name_or_path=str(tmp_path), use_peft=True)
    model, new = load_base(config, load_tokenizer(str(tiny_distilbert)), seed=0)
    wrapped = add_lora(model, config, new, autocast=False)
    wrapped(input_ids=torch.tensor([[5, 6, 7, 3]])).logits.sum().backward()
    trained = {key: p for key, p in wrapped.named_parameters() if "modules_to_save" in key}
    assert {key.split("modules_to_save.default")[0].split(".")[-2] for key in trained} == set(new)
    assert all(p.requires_grad and p.grad is not None for p in trained.values())
