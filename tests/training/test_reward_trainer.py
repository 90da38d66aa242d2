"""The same losses as stock TRL, metrics that count comparisons, and a loss that may not be NaN."""

import random

import numpy as np
import pytest
import torch
from conftest import WORDS, make_rows, make_tokenizer, write_jsonl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, GPT2Config, LlamaConfig
from trl import ModelConfig, RewardConfig, RewardTrainer

from rm_recipe.data.comparison import split_at_common_prefix, untied_pairs
from rm_recipe.data.messages import conversation
from rm_recipe.data.splits import load_split
from rm_recipe.data.tokenization import tokenize
from rm_recipe.errors import TrainingError
from rm_recipe.model.cpu_attention import NAME as ROW_ATTENTION
from rm_recipe.model.lora import add_lora
from rm_recipe.model.reward_model import add_reward_positions, prepare_for_rewards
from rm_recipe.model.shared_prefix import decide_sharing
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.schema import DataArguments
from rm_recipe.training.trainer import COLUMNS, SharedPrefixRewardTrainer

STEPS = 30
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


def make_lora(dtype: torch.dtype, autocast: bool = False):
    """A tiny Llama with an fp32 head and adapters that do something from the start."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<unk>"
    model = make_model("llama").to(dtype)
    prepare_for_rewards(model, tokenizer)
    wrapped = add_lora(model, ModelConfig(use_peft=True, lora_r=4, lora_dropout=0.0), ["score"], autocast)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zeros, with which no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


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
                "chosen_ids": both[0],
                "rejected_ids": both[1],
                "prefix": encoded.prefix,
                "rests": encoded.rests,
                "ranks": [0, 1],
                "margins": [],
                "subset": "made-up",
                "row": len(rows) + 1,
            }
        )
    return Dataset.from_list(rows)


def ranked(shapes) -> list[dict]:
    """One tokenised ranking for each (ranks, margin)."""
    tokenizer = make_tokenizer()
    rng = random.Random(0)
    rows = []
    for number, (ranks, margin) in enumerate(shapes):
        prompt = [{"role": "user", "content": f"hello {number}"}]
        replies = [" ".join(rng.choice(WORDS) for _ in range(4)) + f" {k}" for k in range(len(ranks))]
        conversations = [
            tokenizer.apply_chat_template(conversation(prompt, reply), return_dict=False) for reply in replies
        ]
        encoded = split_at_common_prefix(conversations)
        margins = [margin] * len(untied_pairs(ranks)) if margin else []
        row = {"prefix": encoded.prefix, "rests": encoded.rests, "ranks": ranks, "margins": margins}
        rows.append(row | {"subset": "", "row": number})
    return rows


def config(folder, **keys) -> RewardConfig:
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-4,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 7,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
        "dataloader_pin_memory": False,
        **keys,
    }
    return RewardConfig(output_dir=str(folder), **values)


def trained(trainer_class, name, folder, data=None, keys=None, model=None, **kwargs):
    """A trained trainer and the losses that `compute_loss` gave, in order; `model` is in place of `name`."""
    losses = []

    class Capturing(trainer_class):
        def compute_loss(self, *args, **kw):
            result = super().compute_loss(*args, **kw)
            losses.append((result[0] if isinstance(result, tuple) else result).item())
            return result

    if model is None:
        model = make_model(name)
        add_reward_positions(model)
    if kwargs.get("share_prefixes"):  # it chooses the attention, too
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        assert decide_sharing(base, "auto", max_length=None).used
        assert base.config._attn_implementation == ROW_ATTENTION
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<unk>"
    trainer = Capturing(
        model=model,
        args=config(folder, **(keys or {})),
        train_dataset=data or tokenised(),
        processing_class=tokenizer,
        **kwargs,
    )
    trainer.train()
    return trainer, losses


@pytest.mark.parametrize(
    ("name", "tolerance", "share"), [("llama", 1e-7, True), ("gpt2", 1e-12, True), ("gpt2", 1e-12, False)]
)
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
    shapes = [([0, 1, 2, 3], 0.5), ([0, 0, 1], 0.0), ([0, 1], 1.0), ([0, 1, 1, 1, 2], 0.2)]
    rows = ranked(shapes * 2)
    trainer, _ = trained(
        SharedPrefixRewardTrainer,
        "llama",
        tmp_path,
        Dataset.from_list(rows),
        share_prefixes=True,
        keys={"max_steps": 3, "center_rewards_coefficient": 0.01},
    )
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
        SharedPrefixRewardTrainer,
        "llama",
        tmp_path,
        share_prefixes=True,
        keys={"max_steps": 3, "per_device_eval_batch_size": 4},
    )
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


def test_where_every_loss_is_nan_a_few_comparisons_are_named(tmp_path):
    class Breaking(SharedPrefixRewardTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                model.score.weight.fill_(float("nan"))
            return super().compute_loss(model, inputs, *args, **kwargs)

    keys = {"per_device_train_batch_size": 8}
    with pytest.raises(TrainingError, match=r"in step 1, of row (made-up:\d+, ){4}made-up:\d+ and 3 more;"):
        trained(Breaking, "llama", tmp_path, share_prefixes=True, keys=keys)


def test_four_batches_of_one_are_one_batch_of_four(tmp_path):
    """Whatever number of pairs a comparison has, it weighs 1."""
    shapes = [([0, 1, 2, 3], 0.5), ([0, 0, 1], 0.0), ([0, 1], 0.0), ([0, 1, 1, 1, 2], 0.2), ([0, 1, 2], 0.0)]
    data = Dataset.from_list(ranked(shapes * 4))
    runs = [
        trained(
            SharedPrefixRewardTrainer,
            "gpt2",
            tmp_path,
            data,
            share_prefixes=True,
            keys={
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": 4 // size,
                "max_steps": 10,
            },
        )
        for size in (1, 4)
    ]
    (ones, losses_of_ones), (four, losses) = runs
    assert np.reshape(losses_of_ones, (10, 4)).mean(1) == pytest.approx(losses, abs=1e-10)
    for (key, a), b in zip(ones.model.named_parameters(), four.model.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-10, key
    assert (four.model.score.weight - make_model("gpt2").score.weight).abs().max() > 1e-4  # it did move


@pytest.mark.parametrize(("name", "tolerance", "share"), [("llama", 1e-7, True), ("gpt2", 1e-12, False)])
def test_gradient_checkpointing_changes_no_loss_and_no_weight(tmp_path, name, tolerance, share):
    runs = [
        trained(
            SharedPrefixRewardTrainer,
            name,
            tmp_path,
            share_prefixes=share,
            keys={"max_steps": 8, "learning_rate": 1e-3, "gradient_checkpointing": checkpointing},
        )
        for checkpointing in (True, False)
    ]
    (with_it, losses), (without, expected) = runs
    assert with_it.model.is_gradient_checkpointing
    assert not without.model.is_gradient_checkpointing
    assert len(set(expected)) == 16
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= tolerance
    for (key, a), b in zip(with_it.model.named_parameters(), without.model.parameters(), strict=True):
        assert (a - b).abs().max() <= tolerance, key


@pytest.mark.parametrize(("half", "share"), [(torch.bfloat16, True), (torch.float16, False)])
def test_autocast_rounds_a_loss_and_its_gradients_and_leaves_the_rewards_in_fp32(tmp_path, half, share):
    trainer, _ = trained(
        SharedPrefixRewardTrainer,
        "",
        tmp_path,
        model=make_lora(torch.float32, autocast=True),
        share_prefixes=share,
        keys={"max_steps": 20, "learning_rate": 1e-2},
    )
    batch = trainer.data_collator(list(tokenised(8)))
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


def test_bf16_learns_as_fp32_does_and_trains_fp32_weights(tmp_path):
    def run(**keys):
        model = make_lora(torch.float32, autocast=bool(keys))
        dtypes = set()
        layer = model.get_base_model().model.layers[0].mlp.gate_proj.base_layer
        layer.register_forward_hook(lambda _, inputs, output: dtypes.add(output.dtype))
        keys |= {"learning_rate": 1e-2}
        trainer, losses = trained(
            SharedPrefixRewardTrainer, "", tmp_path, model=model, keys=keys, share_prefixes=True
        )
        return trainer, losses, dtypes

    _, expected, full = run()
    trainer, losses, half = run(bf16=True)
    assert (full, half) == ({torch.float32}, {torch.bfloat16})
    assert losses[0] == pytest.approx(expected[0], rel=1e-2)
    for curve in (expected, losses):
        assert np.mean(curve[-6:]) < 0.5 * np.mean(curve[:6])
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)


# --- what it is given ------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", ["drop_oldest_turns", "exclude"])
def test_no_batch_holds_a_comparison_without_a_pair_or_a_response_without_a_token(
    tmp_path, tiny_llama, truncation
):
    """From the file to the batches: what gives no gradient, or would divide by 0 pairs, is counted."""
    far = "far " * 40
    bad = {
        "single_response": {"prompt": "p", "responses": ["a"], "ranks": [1]},
        "all_tied": {"prompt": "p", "responses": ["a", "b", "c"], "scores": [2, 2, 2]},
        "empty_response": {"prompt": "p", "responses": ["a", " \n"], "ranks": [1, 2]},
        "response_too_long": {"prompt": "p", "responses": ["good", far], "ranks": [1, 2]},
    }
    old = [{"role": "user", "content": far}, {"role": "assistant", "content": "yes"}]
    question = {"role": "user", "content": "hello"}
    good = [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 1, 2]},
        {"prompt": "p", "responses": ["good cat", "good"], "ranks": [1, 2]},
        {"prompt": [*old, question], "responses": ["good", "bad", "no"], "ranks": [2, 1, 3]},  # truncated
    ]
    path = write_jsonl(tmp_path / "train.jsonl", [*good, *bad.values(), good[0]])
    tokenizer = load_tokenizer(str(tiny_llama))
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>\n", "")  # `good cat` begins with `good`
    split = tokenize(load_split(DataArguments(dataset_name=str(path)), "train"), tokenizer, 40, truncation)
    cut = {"too_long": 1} if truncation == "exclude" else {}
    assert split.excluded == {**dict.fromkeys(bad, 1), **cut}
    kept = len(split.comparisons)
    assert kept == 4 - len(cut)
    keys = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    trainer, _ = trained(
        SharedPrefixRewardTrainer,
        "llama",
        tmp_path,
        split.comparisons.select_columns(COLUMNS),
        keys,
        share_prefixes=True,
    )
    batches = list(trainer.get_train_dataloader())
    assert sum(len(batch["pairs_each"]) for batch in batches) == kept
    for batch in batches:
        assert batch["pairs_each"].min() >= 1
        assert len(batch["ends"].unique(dim=0)) == len(batch["ends"])  # none reads another's reward
        assert (batch["input_ids"][tuple(batch["ends"].T)] != tokenizer.pad_token_id).all()
