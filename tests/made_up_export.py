"""An export in its run, as `export` leaves it, with tiny files and nothing trained."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from rm_recipe.recipe.reader import RUN_HEADER

MODEL_FILES = {"config.json", "model.safetensors", "chat_template.jinja"}
MODEL_FILES |= {"tokenizer.json", "tokenizer_config.json"}
PROOF = {
    "passed": True,
    "n_sequences": 64,
    "tolerance": 0.5,
    "tolerance_float32": 1e-3,
    "max_abs_diff": {"merged": 0.25, "fresh_process": 1e-5, "batch_size": 1e-5, "padding_side": None},
    "reward_at": "last token",
    "steps": {"precision": 0.05, "merge": 1e-6, "rounding": 0.1},
    "samples": [{"prompt": "hello", "response": "good", "text": "<|user|>hello", "reward": 1.25}],
    "contracts": {"ppo": True},
    "ppo_reason": None,
    "end_token": "</s>",
}
RECIPE = {"model_name_or_path": "bob/base", "dataset_name": "ann/pairs", "dataset_test_split": "test"}
RECIPE |= {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "load_in_4bit": False, "load_in_8bit": False}
RECIPE |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
RECIPE |= {"learning_rate": 1e-4, "max_length": 512}
RECORD = {"seed": 0, "comparisons": {"train": 100}, "steps": 7, "processes": 1, "train_seconds": 60.0}
RECORD |= {"device": "cpu", "peak_memory_bytes": 10**9, "versions": {"torch": "2.13.0"}}


def write(path: Path, content: str | dict[str, Any]) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def prove(export: Path, **keys: Any) -> None:
    """A proof of the model's files as they are."""
    paths = sorted({path for pattern in (*MODEL_FILES, "model*") for path in export.glob(pattern)})
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    write(export / "proof.json", PROOF | {"files": files} | keys)


def evaluation(passed: bool = True) -> dict[str, Any]:
    gate = {"target": 0.65, "statistic": "ci_low", "value": 0.7 if passed else 0.6123, "passed": passed}
    metrics = {"accuracy": 0.75, "accuracy_ci95": [0.7, 0.8], "n_scored": 40, "excluded": {"too_long": 2}}
    metrics |= {"baselines": {"longer_wins": 0.6}}
    metrics |= {"against_baselines": {"longer_wins": {"difference": 0.15, "ci95": [0.05, 0.25]}}}
    return {"datasets": {"held_out": metrics}, "gate": gate}


def make_export(parent: Path) -> Path:
    """The export's folder, in its run, with files that are not to be uploaded."""
    folder = parent / "run" / "export"
    folder.mkdir(parents=True)
    save_file({"score.weight": np.arange(3000, dtype=np.float32)}, folder / "model.safetensors")
    config = {"rm_recipe": {"version": 1}, "num_labels": 1, "reward_mean": 0.5, "reward_std": 2.0}
    write(folder / "config.json", config)
    write(folder / "tokenizer.json", {"version": "1.0"})
    write(folder / "tokenizer_config.json", {"eos_token": "</s>", "pad_token": "<unk>"})
    write(folder / "chat_template.jinja", "{{ messages }}")
    for name in ("training_args.bin", "predictions.jsonl", "report.html", ".DS_Store"):
        write(folder / name, "not to be uploaded")
    write(folder.parent / "recipe.yaml", f"# a run{RUN_HEADER}\n{json.dumps(RECIPE)}\n")
    write(folder.parent / "run.json", RECORD)
    write(folder / "README.md", f'---\ntags: [rm]\n---\n```python\nmodel = "{folder}"\n```\n')
    (folder / "reliability.png").write_bytes(b"\x89PNG\r\n\0\1\2")
    write(folder / "evaluation.json", evaluation())
    prove(folder)
    return folder


def blocks(card: str, kind: str) -> list[str]:
    """What stands in a card's blocks of code of this kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
