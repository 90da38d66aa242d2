"""What an export promises to the programs that use it next, tried with those programs themselves."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rm_recipe.data.messages import Message
from rm_recipe.model.reward_model import quietly


def trl_rewards(
    folder: Path, conversations: Sequence[list[Message]], device: torch.device | None = None
) -> list[float]:
    """The rewards that TRL's `RLOOTrainer(reward_funcs="folder")` sees, by its own code.

    The trainer is made with a policy of one tiny layer, and asked for the rewards of these conversations in
    place of its own samples. TRL 1.16's GRPOTrainer scores by the same lines.

    Args:
        device: where it scores, by default on a GPU if there is one.
    """
    from trl import RLOOConfig, RLOOTrainer

    prompts = [messages[:-1] for messages in conversations]
    rows = [{"prompt": prompt} for prompt in prompts]
    with tempfile.TemporaryDirectory() as policy, quietly():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(policy)
        tokenizer.save_pretrained(policy)
        settings = RLOOConfig(
            policy,
            per_device_train_batch_size=2,
            num_generations=2,
            use_cpu=device.type == "cpu" if device else not torch.accelerator.is_available(),
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        )
        if settings.n_gpu > 1:  # several visible GPUs would mean nn.DataParallel, which TRL refuses
            settings._n_gpu = 1
        trainer = RLOOTrainer(
            policy, str(folder), settings, Dataset.from_list(rows), processing_class=tokenizer
        )
        replies = [messages[-1:] for messages in conversations]
        rewards = trainer._calculate_rewards(rows, prompts, replies, [[0]] * len(rows))
    return [float(reward) for reward in rewards[:, 0]]
