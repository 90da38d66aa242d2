"""The same losses as stock TRL, metrics that count comparisons, and a loss that may not be NaN."""

import random

import numpy as np
import pytest
import torch
from conftest import WORDS, make_rows, make_tokenizer, ready_trainer
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, GPT2Config, LlamaConfig
from trl import RewardConfig, RewardTrainer

from rm_recipe.data.comparison import conversation, split_at_common_prefix, untied_pairs
from rm_recipe.data.dataset import Split
from rm_recipe.model.reward_model import add_reward_positions
from rm_recipe.model.row_attention import NAME as ROW_ATTENTION
from rm_recipe.model.shared_prefix import Sharing, decide_sharing
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.trainer import GroupedByLength, RowCollator, SharedPrefixRewardTrainer

STEPS = 30
TOKENIZER = make_tokenizer()
TOKENIZER.pad_token = "<unk>"


def make_model(name: str):
    sizes = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "num_labels": 1}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    config = LlamaConfig(**sizes, **small) if name == "llama" else GPT2Config(**sizes, **gpt2)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float64).double()


def encoded(prompt, replies, **rest) -> dict:
    """One row of tokenised replies to a prompt."""
    whole = [TOKENIZER.apply_chat_template(conversation(prompt, r), return_dict=False) for r in replies]
    prefix, suffixes = split_at_common_prefix(whole)
    return {"prefix": prefix, "suffixes": suffixes, "margins": [], "subset": "", **rest}


def pairs(n: int = 24, margin: float | None = None) -> Dataset:
    """Comparisons with the columns of both trainers."""
    rows = []
    for number, row in enumerate(make_rows(n, seed=1)):
        found = encoded(row["prompt"], [row["chosen"], row["rejected"]], ranks=[0, 1], row=number)
        chosen, rejected = (found["prefix"] + rest for rest in found["suffixes"])
        found |= {"chosen_ids": chosen, "rejected_ids": rejected}
        if margin is not None:
            found |= {"margin": margin * number, "margins": [margin * number]}
        rows.append(found)
    return Dataset.from_list(rows)


def ranked(shapes) -> Dataset:
    """One tokenised ranking for each (ranks, margin)."""
    rng, rows = random.Random(0), []
    for number, (ranks, margin) in enumerate(shapes):
        prompt = [{"role": "user", "content": f"hello {number}"}]
        replies = [" ".join(rng.choice(WORDS) for _ in range(4)) + f" {k}" for k in range(len(ranks))]
        margins = [margin] * len(untied_pairs(ranks)) if margin else []
        rows.append(encoded(prompt, replies, ranks=ranks, margins=margins, row=number))
    return Dataset.from_list(rows)


def trained(
    folder, name="llama", data=None, trainer_class=SharedPrefixRewardTrainer, share=True, budget=None, **keys
):
    """A trained trainer and the losses that `compute_loss` gave, in order."""
    losses = []

    class Capturing(trainer_class):
        def compute_loss(self, *args, **kw):
            result = super().compute_loss(*args, **kw)
            losses.append((result[0] if isinstance(result, tuple) else result).item())
            return result

    model = make_model(name)
    add_reward_positions(model)
    ours = issubclass(trainer_class, SharedPrefixRewardTrainer)
    if ours and share:  # it chooses the attention, too
        assert decide_sharing(model, "auto", max_length=None).used
        assert model.config._attn_implementation == ROW_ATTENTION
    values = {
        **{"max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        **{"learning_rate": 1e-4, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "seed": 7},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": None},
        **{"dataloader_pin_memory": False, **keys},
    }
    config = RewardConfig(output_dir=str(folder), **values)
    data = pairs() if data is None else data
    if ours:
        splits = [Split(data, len(data))] * 2
        trainer = Capturing(model, config, TOKENIZER, splits, Sharing(share, "asked for"), ["score"])
        trainer.data_collator.budget = budget
    else:
        trainer = Capturing(model=model, args=config, train_dataset=data, processing_class=TOKENIZER)
    trainer.train()
    return trainer, losses


def assert_same(ours, theirs, tolerance: float) -> None:
    """Two trained trainers have had the same losses and have the same weights."""
    (one, losses), (other, expected) = ours, theirs
    assert losses == pytest.approx(expected, rel=0, abs=tolerance)
    for (key, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert (a - b).abs().max() <= tolerance, key


def rewards_alone(model, row) -> list[torch.Tensor]:
    """The rewards of a row's replies, each conversation by itself."""
    return [model(input_ids=torch.tensor([row["prefix"] + rest])).logits[0, 0] for rest in row["suffixes"]]


@pytest.mark.parametrize(("name", "share"), [("llama", True), ("gpt2", True), ("gpt2", False)])
def test_every_loss_and_the_final_weights_equal_stock_trl(tmp_path, name, share):
    """With margins (Llama 2, equation 2) and centred rewards."""
    keys = {"data": pairs(margin=0.1), "center_rewards_coefficient": 0.01}
    stock = trained(tmp_path, name, trainer_class=RewardTrainer, **keys)
    ours = trained(tmp_path, name, share=share, **keys)
    assert len(stock[1]) == 2 * STEPS
    assert_same(ours, stock, 1e-7 if name == "llama" else 1e-12)
    assert (ours[0].model.score.weight - make_model(name).score.weight).abs().max() > 1e-3  # it did move


def test_a_ranking_is_the_mean_over_its_pairs_one_at_a_time(tmp_path):
    """InstructGPT, equation 1: K choose 2 pairs less the ties, each comparison weighing 1."""
    shapes = [([0, 1, 2, 3], 0.5), ([0, 0, 1], 0.0), ([0, 1], 1.0), ([0, 1, 1, 1, 2], 0.2)]
    rows = ranked(shapes * 2)
    trainer, _ = trained(tmp_path, data=rows, max_steps=3, center_rewards_coefficient=0.01)
    loss = trainer.compute_loss(trainer.model, dict(trainer.data_collator(list(rows))))
    of_comparisons, right = [], []
    for row, (ranks, margin) in zip(rows, shapes * 2, strict=True):
        rewards = rewards_alone(trainer.model, row)
        both = [(rewards[i], rewards[j]) for i, j in untied_pairs(ranks)]
        losses = [-logsigmoid(a - b - margin) + 0.01 * (a + b) ** 2 for a, b in both]
        of_comparisons.append(torch.stack(losses).mean())
        right.append(np.mean([float(a > b) for a, b in both]))
    expected = torch.stack(of_comparisons).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    loss.backward()
    gradient = trainer.model.score.weight.grad.clone()
    trainer.model.zero_grad()
    expected.backward()
    assert torch.allclose(gradient, trainer.model.score.weight.grad, atol=1e-6)
    assert trainer.evaluate(rows)["eval_accuracy"] == pytest.approx(np.mean(right))


def test_evaluation_counts_comparisons_whatever_the_batches(tmp_path):
    """Five comparisons in batches of four: the mean of batch means would weigh the last one 4 times."""
    trainer, _ = trained(tmp_path, max_steps=3, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(pairs(5))
    both = [rewards_alone(trainer.model, row) for row in pairs(5)]
    margins = torch.stack([chosen - rejected for chosen, rejected in both])
    assert metrics["eval_accuracy"] == pytest.approx((margins > 0).double().mean().item())
    assert metrics["eval_margin"] == pytest.approx(margins.mean().item())
    assert metrics["eval_loss"] == pytest.approx(-logsigmoid(margins).mean().item())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_rounds_a_loss_and_its_gradients_and_leaves_the_rewards_in_fp32(write_recipe, half):
    trainer = ready_trainer(read_recipe(write_recipe(max_steps=20)))
    trainer.train()
    batch = trainer.data_collator(list(trainer.train_dataset.select(range(8))))
    found = []
    for enabled in (False, True):
        trainer.model.zero_grad()
        with torch.autocast("cpu", half, enabled=enabled):
            loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        loss.backward()
        gradients = [p.grad.clone().flatten() for p in trainer.model.parameters() if p.requires_grad]
        found.append((loss, outputs["rewards"], torch.cat(gradients)))
    (loss, rewards, gradient), (half_loss, half_rewards, half_gradient) = found
    assert half_loss.dtype == half_rewards.dtype == half_gradient.dtype == torch.float32
    assert not torch.equal(half_rewards, half_rewards.to(half).float())  # more digits than half precision has
    rounding = 8 * torch.finfo(half).eps
    assert 0 < (half_rewards - rewards).abs().max() <= rounding * rewards.abs().max()
    assert half_loss.item() == pytest.approx(loss.item(), rel=rounding)
    assert (half_gradient - gradient).norm() <= rounding * gradient.norm()


@pytest.mark.parametrize(("name", "share"), [("llama", True), ("gpt2", False)])
def test_a_token_budget_divides_a_batch_and_changes_no_step(tmp_path, name, share):
    """Micro-batches of one, of a few and of all comparisons: each comparison weighs the same."""
    runs = []
    for budget in (1, 400 - 250 * share, None):
        keys = {"max_steps": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        runs.append(trained(tmp_path, name, share=share, budget=budget, learning_rate=1e-3, **keys))
    (ones, of_ones), (few, of_few), whole = runs
    assert len(of_ones) == 8 * 8
    assert 8 < len(of_few) < 8 * 8
    assert_same((ones, np.reshape(of_ones, (8, 8)).sum(1).tolist()), whole, 1e-9)
    logs = [[log for log in run.state.log_history if "loss" in log] for run in (ones, few, whole[0])]
    for own in logs[:2]:
        for name in ("loss", "accuracy", "margin", "num_tokens"):
            expected = [log[name] for log in logs[2]]
            assert [log[name] for log in own] == pytest.approx(expected, abs=1e-6)


def test_no_micro_batch_exceeds_its_budget_unless_a_comparison_does():
    sizes = np.array([30, 5, 120, 40, 8, 33])
    for share, expected in ((True, [[2], [3, 5, 0], [4, 1]]), (False, [[2], [3, 5], [0, 4, 1]])):
        collator = RowCollator(0, share, budget=103)
        parts = collator.split(sizes)
        assert parts == expected
        assert all(collator.cost(sizes[part]) <= 103 for part in parts[1:])


def test_batches_grouped_by_length_hold_each_comparison_once_in_an_order_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(10, 500, 1003)
    sampler = GroupedByLength(lengths, 16, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(1003))
    assert first == list(GroupedByLength(lengths, 16, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != first
    batches = lengths[first[:992]].reshape(-1, 16)
    padded = batches.max(1).sum() * 16
    assert batches.sum() > 0.95 * padded  # in random order half of what is computed is padding
    trend = np.corrcoef(np.arange(len(batches)), batches.mean(1))[0, 1]
    assert abs(trend) < 0.5  # long ones come at any time
