"""What transformers 4 makes of model folders; run by `.venv-transformers4`, which has nothing of ours.

`python read_by_transformers4.py FOLDER ... < TEXTS` prints as JSON, by folder, the ids of each text and its
reward, of a language model the logits of its last token.
"""

import json
import sys

import torch
from sentence_transformers import CrossEncoder
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def read(folder: str, texts: list[str]) -> dict[str, object]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    classifies = "SequenceClassification" in AutoConfig.from_pretrained(folder).architectures[0]
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        outputs = [model(torch.tensor([row])).logits for row in ids]
    if not classifies:
        return {"ids": ids, "outputs": [logits[0, -1].tolist() for logits in outputs]}
    activation = type(CrossEncoder(folder, device="cpu").activation_fn).__name__
    return {"ids": ids, "outputs": [logits.item() for logits in outputs], "activation": activation}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps({folder: read(folder, asked) for folder in sys.argv[1:]}))
