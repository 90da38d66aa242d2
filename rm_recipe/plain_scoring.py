"""Rewards by plain transformers: what somebody gets from an export who has never heard of rm_recipe.

A script: `proof.py` runs it in a process of its own, `python -P plain_scoring.py REQUEST ANSWER`, and it must
not import rm_recipe. (-P keeps this folder off the path, where `datasets` would be ours.)
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging

BATCH = 8


def score(folder: str, sequences: list[list[int]], texts: list[str], left: bool) -> dict[str, Any]:
    """The rewards that an export gives.

    Args:
        sequences: token ids of conversations.
        texts: rendered conversations, for the tokenizer and the pipeline.
        left: whether the sequences are also to be padded on the left.

    Returns:
        of the sequences their rewards `alone`, one at a time; `batched`, padded on the right; `left`, padded
        on the left, or None; and `float32`, alone, the same weights computing in fp32. Of the texts `ids`,
        without and with `add_special_tokens`, and `pipeline`, its answers. And `modules`, what is imported.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval().to(device)
    half = model.dtype != torch.float32
    with tqdm(total=(2 + left + half) * len(sequences), desc="Scoring anew", unit="sequence") as bar:
        alone = rewards(model, tokenizer, sequences, 1, "right", bar)
        batched = rewards(model, tokenizer, sequences, BATCH, "right", bar)
        padded_left = rewards(model, tokenizer, sequences, BATCH, "left", bar) if left else None
        float32 = rewards(model.float(), tokenizer, sequences, 1, "right", bar) if half else alone
    del model
    judge = pipeline("text-classification", model=folder, device=device)
    return {
        "alone": alone,
        "batched": batched,
        "left": padded_left,
        "float32": float32,
        "ids": [tokenizer(texts, add_special_tokens=added)["input_ids"] for added in (False, True)],
        "pipeline": [judge(text)[0] for text in texts],
        "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    }


def rewards(
    model: Any, tokenizer: Any, sequences: list[list[int]], batch_size: int, side: str, bar: Any
) -> list[float]:
    """One for each sequence, in batches padded on that side."""
    found: list[float] = []
    for start in range(0, len(sequences), batch_size):
        ids = sequences[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
        with torch.inference_mode():
            found += model(**batch.to(model.device)).logits[:, 0].float().tolist()
        bar.update(len(ids))
    return found


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
