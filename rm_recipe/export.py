"""`rm-recipe export RUN`: adapter and head merged into a plain one-label classifier.

What comes out needs nothing but transformers: `AutoModelForSequenceClassification`, a tokenizer
that adds no special tokens to the chat template's text, and a config that names the pad token and
turns the pipeline's sigmoid off. The body keeps its precision, the head is fp32, and config.json
says float32 so that a plain `from_pretrained` computes exactly what was checked here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rm_recipe.artifacts import whole_folder, write_json
from rm_recipe.datasets import load_held_out_split
from rm_recipe.encoding import tokenize
from rm_recipe.errors import ExportError, RecipeError
from rm_recipe.evaluate import read_evaluation
from rm_recipe.heads import Float32Linear
from rm_recipe.metrics import pairwise_agreement
from rm_recipe.modeling import load_trained
from rm_recipe.recipe import is_run_folder, read_run_recipe
from rm_recipe.scoring import RewardModel, find_model
from rm_recipe.verdict import HELD_OUT

N_COMPARISONS = 32  # scored at every stage: 64 sequences
TOLERANCE = 1e-4  # between two fp32 computations of rewards of the order of 10
# What half precision, in the evaluation and in the merged weights, may move rewards by: root mean square, in
# standard deviations of the rewards. Seen: 0.1 to 0.3 after a few steps of bf16, 4 or 8 bits, less later; of
# rewards that have nothing to do with each other it is 1.4.
DRIFT = 0.5


def export(run: Path, output: Path | None = None, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes the merged model of a run and checks what was written against what was evaluated.

    Args:
        output: the new folder, by default `export/` in the run.
        overwrite: replace an export that is there, once the new one is whole.

    Returns:
        the content of the export's `proof.json`, measured on the first held-out comparisons: the largest
            reward differences between what was evaluated and what the files give (`merged`), of which the
            evaluation's own precision (`evaluated`: against the adapter model in fp32), the merge in fp32
            (`merge`) and the rounding of the merged body (`rounding`); between the merged model and the files
            read back with plain transformers (`files`); and the accuracy before and after.

    Raises:
        RecipeError: `run` is no finished run, the export is there already, or what is there and
            would be overwritten is no export.
        ExportError: the merged model, or the one read back, gives other rewards.
    """
    recipe = read_run_recipe(run)
    output = output or run / "export"
    check_replaceable(output, overwrite)
    judge = RewardModel.from_pretrained(run)
    split = tokenize(load_held_out_split(recipe), judge.tokenizer, judge.max_length, judge.truncation)
    comparisons = split.encoded()[:N_COMPARISONS]
    names = [
        f"comparison {n}, response {k}"
        for n, comparison in enumerate(comparisons, 1)
        for k in range(1, len(comparison.rests) + 1)
    ]

    def rewards() -> NDArray[np.float32]:
        """Of the judge as it is now."""
        return np.concatenate(judge.score_encoded(comparisons))

    with whole_folder(output) as folder:
        evaluated = rewards()
        judge.model, precision = exact_model(judge, find_model(str(run)))
        exact = rewards()
        judge.model = merge(judge.model)
        merged = rewards()
        _compare("merging changed the rewards", names, exact, merged, TOLERANCE)
        save(judge, precision, folder, reward_scale(run, evaluated))
        rounded = rewards()
        allowed = max(TOLERANCE, DRIFT * float(evaluated.std()))
        _compare("the model in fp32 is not what was evaluated", names, evaluated, exact, allowed, rms)
        _compare("rounding the merged weights changed the rewards", names, evaluated, rounded, allowed, rms)
        conversations = [ids for comparison in comparisons for ids in comparison.conversations()]
        read_back = plain_rewards(folder, conversations)
        _compare("the files do not give the merged model's rewards", names, rounded, read_back, TOLERANCE)
        ranks = split.comparisons["ranks"][:N_COMPARISONS]
        differences = {
            "merged": evaluated - read_back,
            "evaluated": evaluated - exact,
            "merge": exact - merged,
            "rounding": merged - rounded,
            "files": rounded - read_back,
        }
        proof = {
            "n_sequences": len(conversations),
            "tolerance": {"merge": TOLERANCE, "merged_rms": allowed, "files": TOLERANCE},
            "max_abs_diff": {stage: float(np.abs(moved).max()) for stage, moved in differences.items()},
            "accuracy": {
                "adapter": float(pairwise_agreement(evaluated, ranks).mean()),
                "merged": float(pairwise_agreement(rounded, ranks).mean()),
            },
            "passed": True,
        }
        write_json(folder / "proof.json", proof)
        if (run / "evaluation.json").is_file():
            (folder / "evaluation.json").write_bytes((run / "evaluation.json").read_bytes())
    return proof


def check_replaceable(output: Path, overwrite: bool) -> None:
    """Refuses a folder that is there, unless it is to be overwritten and is an export of ours."""
    if not output.exists():
        return
    config = output / "config.json"
    ours = config.is_file() and "rm_recipe" in json.loads(config.read_text(encoding="utf-8"))
    if not ours or is_run_folder(output):
        raise RecipeError(f"{output} is there and is not an export; choose another --output")
    if not overwrite:
        raise RecipeError(f"{output} is there already; add --overwrite to replace it")


def rms(differences: NDArray[np.float32]) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(differences, dtype=float))))


def _compare(
    claim: str,
    names: list[str],
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    allowed: float,
    measure: Callable[[NDArray[np.float32]], float] = lambda differences: float(differences.max()),
) -> None:
    difference = np.abs(before - after)
    worst = int(difference.argmax())
    if not measure(difference) <= allowed:
        raise ExportError(
            f"{claim}: held-out {names[worst]} (best first), went from {before[worst]:.4f} to "
            f"{after[worst]:.4f}, and {allowed:.1g} is allowed{' on average' if measure is rms else ''}; "
            "nothing was exported"
        )


def exact_model(judge: RewardModel, trained: str) -> tuple[nn.Module, torch.dtype]:
    """The trained model computing in fp32, and the precision that its body was in.

    A 4-bit base is de-quantised, so that the adapter is merged into what it was trained on.
    """
    model = judge.model
    if getattr(model.config, "quantization_config", None):
        model = load_trained(trained, judge.tokenizer, dequantize=True)
    precision = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return model.float(), precision


def merge(model: nn.Module) -> PreTrainedModel:
    """The plain classifier: with the adapter and the trained head in their places, if there is one."""
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(progressbar=False)
    assert isinstance(model, PreTrainedModel)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def reward_scale(run: Path, rewards: NDArray[np.float32]) -> dict[str, float]:
    """Mean and standard deviation of held-out rewards: of the evaluation's if there is one, else of these."""
    figures = read_evaluation(run).get("datasets", {}).get(HELD_OUT, {})
    mean, std = (
        figures.get("mean_reward", float(rewards.mean())),
        figures.get("std_reward", float(rewards.std())),
    )
    return {"reward_mean": mean, "reward_std": std}


def save(judge: RewardModel, precision: torch.dtype, folder: Path, scale: dict[str, float]) -> None:
    """Writes model and tokenizer, the body in `precision`; the model stays as it will be loaded, in fp32.

    Args:
        scale: what config.json says of the rewards.
    """
    for module in judge.model.modules():
        if not isinstance(module, Float32Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(precision)
    judge.model.save_pretrained(folder)
    judge.model.float()
    judge.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": "float32", **scale}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def plain_rewards(folder: Path, conversations: list[list[int]]) -> NDArray[np.float32]:
    """Rewards by plain transformers, one conversation at a time; `(n,)`."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        rewards = [
            model(input_ids=torch.tensor([ids])).logits.item()
            for ids in tqdm(conversations, desc="Checking the export", unit="sequence")
        ]
    return np.array(rewards, np.float32)
