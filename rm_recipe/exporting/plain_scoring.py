"""Rewards by plain transformers: what somebody gets from an export who has never heard of rm_recipe.

A script: `verify.py` runs it in a process of its own, `python -P plain_scoring.py REQUEST ANSWER`, and it
must not import rm_recipe. (-P keeps this folder off the path.)
"""

import gc
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging

BATCH = 8


def score(
    folder: str,
    sequences: list[list[int]],
    texts: list[str],
    left: bool,
    sampled: list[list[dict[str, str]]],
    device: str,
) -> dict[str, Any]:
    """Score with an export in every way that is compared.

    Args:
        sequences: token ids of conversations.
        texts: rendered conversations, for the tokenizer and the pipeline.
        left: whether the sequences are also to be padded on the left.
        sampled: conversations whose last message is scored as one that a PPO trainer's policy sampled.
        device: where to score.

    Returns:
        of the sequences their rewards `alone`, one at a time; `batched`, padded on the right; `left`, padded
        on the left, or None; and `float32`, alone, the same weights computing in fp32. Of the texts `ids`,
        without and with `add_special_tokens`, and `pipeline`, its answers. `ppo`, of what was sampled.
        And `modules`, what is imported.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval().to(device)
    alone = rewards(model, tokenizer, sequences, 1, "right")
    batched = rewards(model, tokenizer, sequences, BATCH, "right")
    padded_left = rewards(model, tokenizer, sequences, BATCH, "left") if left else None
    half = model.dtype != torch.float32
    float32 = rewards(model.float(), tokenizer, sequences, 1, "right") if half else alone
    ppo = ppo_rewards(model, tokenizer, sampled)
    del model
    gc.collect()  # it may not fit a GPU twice
    reward_model = pipeline("text-classification", model=folder, device=device)
    return {
        "alone": alone,
        "batched": batched,
        "left": padded_left,
        "float32": float32,
        "ids": [tokenizer(texts, add_special_tokens=added)["input_ids"] for added in (False, True)],
        "pipeline": [reward_model(text)[0] for text in texts],
        "ppo": ppo,
        "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    }


def rewards(
    model: Any, tokenizer: Any, sequences: list[list[int]], batch_size: int, side: str
) -> list[float]:
    """One for each sequence, in batches padded on that side."""
    found: list[float] = []
    for start in range(0, len(sequences), batch_size):
        ids = sequences[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
        with torch.inference_mode():
            found += model(**batch.to(model.device)).logits[:, 0].float().tolist()
    return found


def ppo_rewards(model: Any, tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[float | None]:
    """One for each conversation, as TRL's PPOTrainer (to 1.12) and OpenRLHF get it.

    Prompts are padded on the left, what the policy sampled on the right; the backbone runs on that, and the
    head reads the last token that was sampled. None where no policy samples the reply so: its first
    characters are in one token with the prompt's last, or it holds the pad token.
    """
    built = [as_sampled(tokenizer, messages) for messages in conversations]
    possible = [ids for ids in built if ids]
    if not possible:
        return [None] * len(built)
    prompts, replies = zip(*possible, strict=True)
    context, longest = max(map(len, prompts)), max(map(len, replies))
    pad = [tokenizer.pad_token_id]
    rows = [
        pad * (context - len(prompt)) + prompt + reply + pad * (longest - len(reply))
        for prompt, reply in possible
    ]
    ids = torch.tensor(rows, device=model.device)
    mask = ids != tokenizer.pad_token_id
    backbone = getattr(model, model.base_model_prefix)
    positions = {}
    if "position_ids" in inspect.signature(backbone.forward).parameters:  # not in ALiBi's models
        positions = {"position_ids": mask.cumsum(1) - mask.long()}
    with torch.inference_mode():
        hidden = backbone(ids.masked_fill(~mask, 0), attention_mask=mask, **positions)[0]
        rewards = model.score(hidden)[:, :, 0].float()
    last = (rewards[row, context + len(reply) - 1].item() for row, reply in enumerate(replies))
    return [next(last) if ids else None for ids in built]


def as_sampled(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]] | None:
    """The ids of the prompt, as it is put to a policy, and those that the policy would have to sample."""
    rendered = [
        tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template(messages, tokenize=False),
    ]
    prompt, whole = tokenizer(rendered)["input_ids"]
    possible = whole[: len(prompt)] == prompt and tokenizer.pad_token_id not in whole
    return (prompt, whole[len(prompt) :]) if possible else None


def main(request: str, answer: str) -> None:
    """Reads one JSON file and writes the other: the answer, or an `error` in words."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        result = score(**json.loads(Path(request).read_text(encoding="utf-8")))
    except Exception as error:  # whatever it is, the export is not what plain transformers can use
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
