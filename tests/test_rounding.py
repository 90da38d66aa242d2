"""Rounded inputs tell what rounded weights will do."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rm_recipe.rounding import (
    HOLD_MATRICES,
    MULTIPLY,
    layers_of,
    rounded_inputs,
    to_bfloat16,
    to_eight_bits,
)


class Small(nn.Module):
    def __init__(self, width=512):
        super().__init__()
        self.words = nn.Embedding(10, width)
        self.up, self.down = nn.Linear(width, width), Conv1D(1, width)

    def forward(self, ids):
        return self.down(torch.tanh(self.up(self.words(ids))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


IDS = torch.arange(10)


def test_eight_bits_are_127_steps_either_way_in_each_row():
    values = torch.tensor([[0.0, 0.004, -1.27], [0.0, 0.0, 0.0], [100.0, 0.3, 0.5]])
    expected = torch.tensor([[0.0, 0.0, -1.27], [0.0, 0.0, 0.0], [100.0, 0.0, 100 / 127]])
    assert torch.allclose(to_eight_bits(values), expected)


def test_inputs_are_rounded_within_the_block_and_not_after_it(model):
    before = model(IDS)
    with rounded_inputs(model, layers_of(model, MULTIPLY), to_bfloat16):
        rounded = model(IDS)
    by_hand = model.down(to_bfloat16(torch.tanh(model.up(to_bfloat16(model.words(IDS))))))
    assert torch.equal(rounded, by_hand)
    assert not torch.equal(rounded, before)
    assert torch.equal(model(IDS), before)


def test_the_block_is_left_clean_after_an_error(model):
    before = model(IDS)
    with pytest.raises(IndexError), rounded_inputs(model, ["up"], to_bfloat16):
        model(torch.tensor([99]))
    assert torch.equal(model(IDS), before)


def test_embeddings_give_rounded_rows(model):
    assert layers_of(model, HOLD_MATRICES) == ["words", "up", "down"]
    with rounded_inputs(model, ["words"], to_bfloat16):
        assert torch.equal(model.words(IDS), to_bfloat16(model.words.weight))


def test_what_it_does_is_what_rounding_the_weights_will_do(model):
    before = model(IDS)
    with rounded_inputs(model, layers_of(model, HOLD_MATRICES), to_bfloat16):
        foretold = (model(IDS) - before).std()
    for parameter in model.parameters():
        parameter.data = to_bfloat16(parameter.data)
    assert 1 / 3 < (model(IDS) - before).std() / foretold < 3
