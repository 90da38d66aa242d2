"""Rewards by plain transformers: what somebody gets from an export who has never heard of rm_recipe.

A script: `verify.py` runs it in a process of its own, `python -P plain_scoring.py < REQUEST`, and it must
not import rm_recipe. (-P keeps this folder off the path.)
"""

import gc
import inspect
import json
import sys
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging

BATCH = 8
PADDED = 3  # on either side of what a PPO trainer scores


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Score with an export in every way that is compared.

    Args:
        request: the export's `folder`; `sequences`, token ids of conversations; `left`, whether these are
            also to be padded on the left; `texts`, rendered conversations; `sampled`, conversations whose
            last message is scored as one that a PPO trainer's policy sampled; and `device`, where to score.

    Returns:
        of the sequences their rewards `alone`, one at a time; `batched`, padded on the right; `left`, padded
        on the left, or None; and `float32`, alone, the same weights computing in fp32. Of the texts `ids`,
        without and with `add_special_tokens`, and `pipeline`, its answers. `ppo`, of what was sampled.
    """
    folder, sequences, texts = request["folder"], request["sequences"], request["texts"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval().to(request["device"])
    alone = rewards(model, tokenizer, sequences, 1, "right")
    answer = {
        "alone": alone,
        "batched": rewards(model, tokenizer, sequences, BATCH, "right"),
        "left": rewards(model, tokenizer, sequences, BATCH, "left") if request["left"] else None,
        "ids": [tokenizer(texts, add_special_tokens=added)["input_ids"] for added in (False, True)],
    }
    half = model.dtype != torch.float32
    answer["float32"] = rewards(model.float(), tokenizer, sequences, 1, "right") if half else alone
    answer["ppo"] = [ppo_reward(model, tokenizer, messages) for messages in request["sampled"]]
    del model
    gc.collect()  # it may not fit a GPU twice
    classify = pipeline("text-classification", model=folder, device=request["device"])
    return answer | {"pipeline": [classify(text)[0] for text in texts]}


@torch.inference_mode()
def rewards(model: Any, tokenizer: Any, sequences: list[list[int]], size: int, side: str) -> list[float]:
    """One for each sequence, in batches of that size, padded on that side."""
    found: list[float] = []
    for start in range(0, len(sequences), size):
        ids = {"input_ids": sequences[start : start + size]}
        batch = tokenizer.pad(ids, padding_side=side, return_tensors="pt").to(model.device)
        found += model(**batch).logits[:, 0].float().tolist()
    return found


@torch.inference_mode()
def ppo_reward(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> float | None:
    """The reward of a conversation as TRL's PPOTrainer (to 1.12) and OpenRLHF get it.

    The prompt is padded on the left, as in a batch with a longer one, what the policy sampled on the right;
    the backbone runs on that, and the head reads the last token that was sampled. None where no policy
    samples the reply so: its first characters are in one token with the prompt's last, or it holds the pad
    token.
    """
    rendered = [
        tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template(messages, tokenize=False),
    ]
    prompt, whole = tokenizer(rendered)["input_ids"]
    padding = [tokenizer.pad_token_id] * PADDED
    if whole[: len(prompt)] != prompt or tokenizer.pad_token_id in whole:
        return None
    ids = torch.tensor([padding + whole + padding], device=model.device)
    mask = ids != tokenizer.pad_token_id
    backbone = getattr(model, model.base_model_prefix)
    inputs = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask}
    if "position_ids" in inspect.signature(backbone.forward).parameters:  # ALiBi's models have none
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = backbone(**inputs)[0]
    return float(model.score(hidden[0, -PADDED - 1]))


def main() -> None:
    """Reads the request from stdin; the last line of stdout is the answer, or an `error` in words."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        answer = score(json.load(sys.stdin))
    except Exception as error:  # whatever it is, the export is not what plain transformers can use
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
