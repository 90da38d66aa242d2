"""Two steps of TRL's PPOTrainer with an export; run by `.venv-ppo`, which has nothing of ours.

`python steps_of_ppo.py EXPORT POLICY SCRATCH < PROMPTS` prints as JSON the ids, without the padding, that the
reward model was given, and the rewards that the trainer got.
"""

import json
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


def policy_of(folder: str, pad: int) -> AutoModelForCausalLM:
    """A policy that never samples the pad token."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy.lm_head.bias = torch.nn.Parameter(torch.zeros(policy.config.vocab_size))
    policy.lm_head.bias.data[pad] = -100.0
    return policy


def main(export: str, policy: str, scratch: str) -> None:
    prompts = json.load(sys.stdin)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(export, padding_side="left")
    reward_model = AutoModelForSequenceClassification.from_pretrained(export)
    ids = [tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in prompts]
    seen = {"ids": [], "rewards": []}
    get_reward = ppo_trainer.get_reward

    def watch(model, query_responses, pad_token_id, context_length):
        answer = get_reward(model, query_responses, pad_token_id, context_length)
        if model is reward_model:
            seen["ids"] += [[x for x in row if x != pad_token_id] for row in query_responses.tolist()]
            seen["rewards"] += answer[1].tolist()
        return answer

    ppo_trainer.get_reward = watch
    two_steps = {"total_episodes": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    two_steps |= {"num_mini_batches": 1, "num_ppo_epochs": 1, "num_sample_generations": 0}
    sampled = {"response_length": 12, "stop_token": "eos", "missing_eos_penalty": 1.0}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    trainer = PPOTrainer(
        PPOConfig(scratch, use_cpu=True, bf16=False, **two_steps, **sampled, **quiet),
        tokenizer,
        policy_of(policy, tokenizer.pad_token_id),
        policy_of(policy, tokenizer.pad_token_id),
        reward_model,
        Dataset.from_dict({"input_ids": ids}),
        AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1),
    )
    trainer.train()
    print(json.dumps({"steps": trainer.state.global_step, **seen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
