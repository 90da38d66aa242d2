"""The same losses as stock TRL, metrics that count comparisons, and a loss that may not be NaN."""

import random

import numpy as np
import pytest
import torch
from conftest import WORDS, make_rows, make_tokenizer
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, GPT2Config, LlamaConfig
from trl import RewardConfig, RewardTrainer

from rm_recipe.batching import split_at_common_prefix
from rm_recipe.errors import TrainingError
from rm_recipe.messages import conversation
from rm_recipe.modeling import add_reward_positions
from rm_recipe.preferences import untied_pairs
from rm_recipe.reward_trainer import SharedPrefixRewardTrainer

STEPS = 50
VOCABULARY = len(make_tokenizer())


def make_model(name: str):
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 0, "num_labels": 1}
    configs = {
        "llama": LlamaConfig(
            **sizes, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        ),
        "gpt2": GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2),
    }
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(configs[name], dtype=torch.float64)
    return model.double()


def tokenised(n: int = 24) -> Dataset:
    tokenizer = make_tokenizer()
    rows = []
    for row in make_rows(n, seed=1):
        both = [
            tokenizer.apply_chat_template(conversation(row["prompt"], row[side]), return_dict=False)
            for side in ("chosen", "rejected")
        ]
        encoded = split_at_common_prefix(both)
        rows.append(
            {
                "chosen_ids": both[0], "rejected_ids": both[1], "prefix": encoded.prefix,
                "rests": encoded.rests, "ranks": [0, 1], "margins": [],
            }
        )  # fmt: skip
    return Dataset.from_list(rows)


def config(folder, **keys) -> RewardConfig:
    values = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-4, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "seed": 7,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": None,
        "dataloader_pin_memory": False, **keys,
    }  # fmt: skip
    return RewardConfig(output_dir=str(folder), **values)


def trained(trainer_class, name, folder, data=None, keys=None, **kwargs):
    """A trained trainer and the losses that `compute_loss` gave, in order."""
    losses = []

    class Capturing(trainer_class):
        def compute_loss(self, *args, **kw):
            result = super().compute_loss(*args, **kw)
            losses.append((result[0] if isinstance(result, tuple) else result).item())
            return result

    model = make_model(name)
    add_reward_positions(model)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<unk>"
    trainer = Capturing(
        model=model, args=config(folder, **(keys or {})), train_dataset=data or tokenised(),
        processing_class=tokenizer, **kwargs,
    )  # fmt: skip
    trainer.train()
    return trainer, losses


@pytest.mark.parametrize(("name", "tolerance"), [("llama", 1e-7), ("gpt2", 1e-12)])
@pytest.mark.parametrize("share", [True, False])
def test_every_loss_and_the_final_weights_equal_stock_trl(tmp_path, name, tolerance, share):
    keys = {"center_rewards_coefficient": 0.01}
    stock, expected = trained(RewardTrainer, name, tmp_path, keys=keys)
    ours, losses = trained(SharedPrefixRewardTrainer, name, tmp_path, keys=keys, share_prefixes=share)
    assert len(losses) == len(expected) == 2 * STEPS
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= tolerance
    assert expected[-1] < 0.98 * expected[0]  # it did learn
    for (key, a), b in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        assert (a - b).abs().max() <= tolerance, key


def test_margins_are_subtracted_as_in_stock_trl(tmp_path):
    """Llama 2, equation 2."""
    margins = [0.1 * number for number in range(24)]
    data = tokenised().add_column("margin", margins)
    data = data.remove_columns("margins").add_column("margins", [[margin] for margin in margins])
    _, expected = trained(RewardTrainer, "llama", tmp_path, data)
    ours, losses = trained(SharedPrefixRewardTrainer, "llama", tmp_path, data, share_prefixes=True)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 1e-7
    _, without = trained(SharedPrefixRewardTrainer, "llama", tmp_path, share_prefixes=True)
    assert losses[0] > without[0] + 0.1
    assert not ours.is_in_train


def test_a_ranking_is_the_mean_over_its_pairs_one_at_a_time(tmp_path):
    """InstructGPT, equation 1: K choose 2 pairs less the ties, each comparison weighing 1."""
    tokenizer = make_tokenizer()
    rng = random.Random(0)
    shapes = [([0, 1, 2, 3], 0.5), ([0, 0, 1], 0.0), ([0, 1], 1.0), ([0, 1, 1, 1, 2], 0.2)]
    rows = []
    for number, (ranks, margin) in enumerate(shapes * 2):
        prompt = [{"role": "user", "content": f"hello {number}"}]
        replies = [" ".join(rng.choice(WORDS) for _ in range(4)) + f" {k}" for k in range(len(ranks))]
        conversations = [
            tokenizer.apply_chat_template(conversation(prompt, reply), return_dict=False) for reply in replies
        ]
        encoded = split_at_common_prefix(conversations)
        margins = [margin] * len(untied_pairs(ranks)) if margin else []
        rows.append({"prefix": encoded.prefix, "rests": encoded.rests, "ranks": ranks, "margins": margins})
    trainer, _ = trained(
        SharedPrefixRewardTrainer, "llama", tmp_path, Dataset.from_list(rows), share_prefixes=True,
        keys={"max_steps": 3, "center_rewards_coefficient": 0.01},
    )  # fmt: skip
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    of_comparisons, right = [], []
    for row, (ranks, margin) in zip(rows, shapes * 2, strict=True):
        rewards = [
            trainer.model(input_ids=torch.tensor([row["prefix"] + rest])).logits[0, 0]
            for rest in row["rests"]
        ]
        losses = [
            -torch.nn.functional.logsigmoid(rewards[i] - rewards[j] - margin)
            + 0.01 * (rewards[i] + rewards[j]) ** 2
            for i, j in untied_pairs(ranks)
        ]
        of_comparisons.append(torch.stack(losses).mean())
        right.append(np.mean([float(rewards[i] > rewards[j]) for i, j in untied_pairs(ranks)]))
    expected = torch.stack(of_comparisons).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    loss.backward()
    gradient = trainer.model.score.weight.grad.clone()
    trainer.model.zero_grad()
    expected.backward()
    assert torch.allclose(gradient, trainer.model.score.weight.grad, atol=1e-6)
    metrics = trainer.evaluate(Dataset.from_list(rows))
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(right))


def test_evaluation_counts_comparisons_whatever_the_batches(tmp_path):
    """Five comparisons in batches of four: the mean of batch means would weigh the last one 4 times."""
    trainer, _ = trained(
        SharedPrefixRewardTrainer, "llama", tmp_path, share_prefixes=True,
        keys={"max_steps": 3, "per_device_eval_batch_size": 4},
    )  # fmt: skip
    data = tokenised(5)
    metrics = trainer.evaluate(data)
    rewards = [
        [
            trainer.model(input_ids=torch.tensor([row[side]])).logits.item()
            for side in ("chosen_ids", "rejected_ids")
        ]
        for row in data
    ]
    margins = torch.tensor([chosen - rejected for chosen, rejected in rewards])
    assert metrics["eval_accuracy"] == pytest.approx((margins > 0).double().mean().item())
    assert metrics["eval_margin"] == pytest.approx(margins.mean().item())
    assert metrics["eval_loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    def break_head(trainer_class):
        class Breaking(trainer_class):
            def compute_loss(self, model, inputs, *args, **kwargs):
                if self.state.global_step == 2:
                    with torch.no_grad():
                        model.score.weight.fill_(float("nan"))
                return super().compute_loss(model, inputs, *args, **kwargs)

        return Breaking

    with pytest.raises(TrainingError, match="the loss is nan in step 3"):
        trained(break_head(SharedPrefixRewardTrainer), "llama", tmp_path, share_prefixes=True)
