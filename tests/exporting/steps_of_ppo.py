"""Two steps of TRL's PPOTrainer with an export; run by `.venv-ppo`, which has nothing of ours.

`python steps_of_ppo.py EXPORT POLICY SCRATCH < PROMPTS` prints as JSON what the reward model was asked, ids
without the padding, and the scores that the trainer got.
"""

import json
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

LENGTH = 12  # tokens of a reply


def sampler(folder: str, tokenizer: object, words: list[str]) -> object:
    """The policy, which samples these words and its end token alone: random bytes would be no text."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    bias = torch.full((policy.config.vocab_size,), -100.0)
    bias[[token for word in words for token in tokenizer(f" {word}")["input_ids"]]] = 0.0
    bias[tokenizer.eos_token_id] = 1.0
    policy.lm_head.bias = torch.nn.Parameter(bias)
    return policy


def main(export: str, policy_folder: str, scratch: str) -> None:
    asked = json.load(sys.stdin)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(export, padding_side="left")
    reward_model = AutoModelForSequenceClassification.from_pretrained(export)
    value_model = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=1)
    prompts = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in asked["prompts"]
    ]
    seen = []
    get_reward = ppo_trainer.get_reward

    def watch(model, query_responses, pad_token_id, context_length):
        answer = get_reward(model, query_responses, pad_token_id, context_length)
        if model is reward_model:
            rows = [[token for token in row if token != pad_token_id] for row in query_responses.tolist()]
            seen.extend(zip(rows, answer[1].tolist(), strict=True))
        return answer

    ppo_trainer.get_reward = watch
    settings = PPOConfig(
        scratch,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=8,
        response_length=LENGTH,
        stop_token="eos",
        missing_eos_penalty=1.0,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        settings,
        tokenizer,
        sampler(policy_folder, tokenizer, asked["words"]),
        sampler(policy_folder, tokenizer, asked["words"]),
        reward_model,
        Dataset.from_dict({"input_ids": prompts}),
        value_model,
    )
    trainer.train()
    print(json.dumps({"steps": trainer.state.global_step, "seen": seen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
