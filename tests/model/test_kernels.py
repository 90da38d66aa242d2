"""Liger's kernels come into one model, and what cannot have them is told.

Liger itself needs a GPU: here something that changes a model as it does stands in for it.
"""

import types

import pytest
import torch
from conftest import TINY
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.models.llama import modeling_llama

from rm_recipe.errors import RecipeError
from rm_recipe.model import kernels


def classifier(kind="llama"):
    config = AutoConfig.for_model(kind, vocab_size=50, pad_token_id=0, num_labels=1, **TINY)
    return AutoModelForSequenceClassification.from_config(config)


def test_one_model_is_changed_and_no_later_one(monkeypatch):
    asked = {}

    def apply(model, config):
        asked.update(config)
        modeling_llama.LlamaRMSNorm = modeling_llama.LlamaMLP = modeling_llama.apply_rotary_pos_emb = None
        norm = model.model.norm
        norm.forward = types.MethodType(lambda self, hidden: 0 * hidden, norm)

    monkeypatch.setattr(kernels.liger, "apply_liger_kernel", apply)
    model = classifier()
    kernels.fuse(model)
    assert not any(asked[key] for key in ("fused_linear_cross_entropy", "cross_entropy", "rope"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert model(input_ids=ids).logits == 0
        assert classifier()(input_ids=ids).logits != 0


def test_a_missing_package_and_a_model_that_liger_does_not_know_are_told(monkeypatch):
    model = classifier("bert")
    model.bert.forward = model.bert.forward  # as other libraries leave some

    def missing(*_):
        raise ImportError

    def only_language_models(*_):
        modeling_llama.LlamaMLP = None
        raise TypeError

    mlp = modeling_llama.LlamaMLP
    for apply, kind, said in (
        (missing, "bert", "pip install liger-kernel"),
        (lambda *_: None, "bert", "kind 'bert'"),
        (only_language_models, "llama", "kind 'llama'"),
    ):
        monkeypatch.setattr(kernels.liger, "apply_liger_kernel", apply)
        with pytest.raises(RecipeError, match=said):
            kernels.fuse(model if kind == "bert" else classifier(kind))
    assert modeling_llama.LlamaMLP is mlp


def test_what_keeps_as_ligers_kernels_do_computes_the_same():
    model, ids = classifier().double(), torch.tensor([[5, 6, 7]])

    def step():
        model.zero_grad()
        reward = model(input_ids=ids).logits.sum()
        reward.backward()
        return [reward.detach(), *(parameter.grad for parameter in model.parameters())]

    before = step()
    kernels.keep_as_fused(model)
    for one, other in zip(before, step(), strict=True):
        torch.testing.assert_close(one, other)
