"""Rounded inputs tell what rounded weights will do."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rm_recipe.exporting.verify import (
    layers_that_multiply,
    moved_weights,
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
    with rounded_inputs(model, layers_that_multiply(model), to_bfloat16):
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


def test_weights_move_by_up_to_half_their_last_place_and_come_back(model):
    before = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    with moved_weights(model, torch.bfloat16, torch.float32, seed=0):
        for name, parameter in model.named_parameters():
            moved = (parameter - before[name]).abs()
            gaps = torch.ldexp(torch.tensor(2.0**-8), torch.frexp(before[name])[1])  # between bf16 numbers
            assert (moved <= gaps / 2).all(), name
            if name.endswith("weight"):
                assert moved.mean() > gaps.mean() / 10, name
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_weight_that_two_modules_share_moves_once_and_comes_back():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

    shared = Shared()
    before = shared.one.weight.detach().clone()
    with moved_weights(shared, torch.bfloat16, torch.bfloat16, seed=0):
        share = (shared.one.weight - before).abs() / before.abs()
        assert 0 < share.max() <= torch.finfo(torch.bfloat16).eps
    assert torch.equal(shared.one.weight, before)
    assert shared.two.weight is shared.one.weight


def test_gaps_are_bf16s_own():
    one = torch.tensor([1.0, 1.5, 0.75, -3.0])
    gaps = torch.ldexp(torch.tensor(2.0**-8), torch.frexp(one)[1])
    assert torch.equal((one + gaps).bfloat16().float(), one + gaps)
    assert not torch.equal((one + gaps / 2).bfloat16().float(), one + gaps / 2)


def test_weights_that_the_precision_holds_stay_where_they_are(model):
    model.up.weight.data = to_bfloat16(model.up.weight.data)
    before = model.up.weight.data.clone()
    with moved_weights(model, torch.bfloat16, torch.float32, seed=0):
        assert torch.equal(model.up.weight, before)
        assert not torch.equal(model.words.weight, to_bfloat16(model.words.weight))


@pytest.mark.parametrize("seed", range(3))
def test_moved_at_random_they_do_what_rounding_will_do(model, seed):
    before = model(IDS)
    with moved_weights(model, torch.bfloat16, torch.float32, seed):
        foretold = (model(IDS) - before).std()
    for parameter in model.parameters():
        parameter.data = to_bfloat16(parameter.data)
    assert 1 / 3 < (model(IDS) - before).std() / foretold < 3
