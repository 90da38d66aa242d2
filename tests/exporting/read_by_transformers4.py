"""What transformers 4 makes of an export; run by `.venv-transformers4`, which has nothing of ours.

`python read_by_transformers4.py FOLDER < TEXTS` prints as JSON the ids and rewards of the texts.
"""

import json
import sys

import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

if __name__ == "__main__":
    folder = sys.argv[1]
    ids = AutoTokenizer.from_pretrained(folder)(json.load(sys.stdin))["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        rewards = [model(torch.tensor([row])).logits.item() for row in ids]
    activation = type(CrossEncoder(folder, device="cpu").activation_fn).__name__
    print(json.dumps({"ids": ids, "rewards": rewards, "activation": activation}))
