"""Merge adapter and head of a run into a plain one-label classifier, verified to score as the run did:

    rm-recipe export outputs/smollm2_offline

What comes out needs nothing but transformers: `AutoModelForSequenceClassification`, a tokenizer
that adds no special tokens to the chat template's text, and a config that names the pad token and
turns the pipeline's sigmoid off. The body keeps its precision, the head is fp32, and config.json
says float32 so that a plain `from_pretrained` computes exactly what was checked here.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from rm_recipe.data.splits import load_held_out_split, refuse_other_data
from rm_recipe.data.tokenization import tokenize
from rm_recipe.errors import ExportError, RecipeError, one_line
from rm_recipe.evaluation import evaluate, findings, plots, summary
from rm_recipe.exporting.card import CARD, FIGURE, make_card
from rm_recipe.exporting.compatibility import for_transformers_4, rewrite_json
from rm_recipe.exporting.verify import EIGHT_BITS, ROUNDING, Verification
from rm_recipe.files import locked, sha256, whole_folder, write_json
from rm_recipe.model.head import is_head_layer
from rm_recipe.model.memory import SPARE, device_memory
from rm_recipe.model.reward_model import load_trained
from rm_recipe.processes import say
from rm_recipe.recipe.reader import read_run_recipe
from rm_recipe.scoring import RewardModel, find_model

SCORING = 1e9  # bytes for the activations of a batch without gradients, in fp32
# What sentence-transformers' CrossEncoder reads.
NO_SIGMOID = {"activation_fn": "torch.nn.modules.linear.Identity"}


def export(
    run: Path, output: Path | None = None, *, overwrite: bool = False, dtype: str | None = None
) -> dict[str, Any]:
    """Write the merged model of a run, verified to score as what was evaluated.

    Args:
        output: the new folder, by default `export/` in the run.
        overwrite: replace an export that is there, once the new one is whole.
        dtype: `float32` or `bfloat16` for all weights; by default the body keeps its precision, and the head,
            in which rewards would tie otherwise, is fp32.

    Returns:
        the content of `proof.json`.

    Raises:
        RecipeError: `run` is no finished run, or the export may not go there (`check_replaceable`).
        ExportError: some step gives other rewards, or the files cannot be written. What was there is kept.
    """
    recipe = read_run_recipe(run)
    output = output or run / "export"
    check_replaceable(output, overwrite)
    held_out = load_held_out_split(recipe)
    refuse_other_data(run, held_out=held_out.fingerprint)
    with locked(run), whole_folder(output) as folder:  # nothing trains the run anew meanwhile
        reward_model = RewardModel.from_pretrained(run)
        evaluation = evaluation_of(run)
        own = next(p.dtype for p in reward_model.model.parameters() if p.is_floating_point())  # not in 4 bits
        body, head = (getattr(torch, dtype),) * 2 if dtype else (own, torch.float32)
        truncation = reward_model.max_length, reward_model.truncation
        verification = Verification(reward_model, tokenize(held_out, reward_model.tokenizer, *truncation))
        n = len(verification.sequences)
        say(f"{n} held-out replies are scored at each step from the run to the exported files")
        compute_in_float32(verification, run)
        verification.check_recorded(summary.read_predictions(run))
        merge(verification)
        save(verification, folder, body, head, evaluation)
        proof = verification.read_back(folder) | {"dtype": dtype}
        describe(folder, run, output, evaluation, proof)
    return proof


def check_replaceable(output: Path, overwrite: bool) -> None:
    """Refuse a folder that is there, unless it is to be overwritten and is an export.

    A run's `model/` has all that an export has, but its proof.
    """
    if not output.exists():
        return
    if not (output / "proof.json").is_file():
        raise RecipeError(f"{output} is there and is not an export; choose another --output")
    if not overwrite:
        raise RecipeError(f"{output} is there already; add --overwrite to replace it")


def evaluation_of(run: Path) -> dict[str, Any]:
    """Read the run's evaluation, which the export takes along; empty if there is none.

    Raises:
        RecipeError: it is another model's.
    """
    evaluation = summary.read_evaluation(run)
    if evaluation and evaluation.get("weights") != evaluate.weights_of(str(run)):
        raise RecipeError(f"{run / 'evaluation.json'} is of another model; first `rm-recipe evaluate {run}`")
    return evaluation


def compute_in_float32(verification: Verification, run: Path) -> None:
    """Go on to the same weights in fp32; a base in 4 or 8 bits becomes one that can be merged into.

    That is the base as it was trained on, de-quantised: on the one before quantising the adapter would give
    other rewards (peft#2321).

    Raises:
        ExportError: they give other rewards.
    """
    reward_model = verification.reward_model
    model = reward_model.model
    device, quantised = float32_device(model), getattr(model.config, "quantization_config", None)
    share = EIGHT_BITS if getattr(quantised, "load_in_8bit", False) else ROUNDING
    if quantised:
        del model  # which makes room for the next
        verification.free_model()
        model = load_trained(find_model(str(run)), reward_model.tokenizer, dequantize_on=device)
    reward_model.model = model.to(device).float()
    how = "in fp32, de-quantised," if quantised else "in fp32"
    claim = f"{how} the rewards are not what was evaluated"
    why = "; half precision says little of rewards that lie so close: train longer, or with --bf16 false"
    verification.check_step("precision", claim, share, "" if quantised else why)


def float32_device(model: Any) -> torch.device:
    """Where a model is verified in fp32: where it is, or, said, on the CPU if it does not fit there."""
    device = next(model.parameters()).device
    weights = 4 * int(model.num_parameters())  # those in 4 or 8 bits de-quantised
    if device.type == "cpu" or weights * (1 + SPARE) + SCORING <= device_memory(device):
        return device
    kind = device.type.upper()
    say(f"{weights / 1e9:.1f} GB in fp32 do not fit the {kind}: verified on the CPU, which takes longer")
    return torch.device("cpu")


def merge(verification: Verification) -> None:
    """Go on to the plain classifier, with adapter, if there is one, and trained head in their places."""
    model = verification.reward_model.model
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(progressbar=False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    verification.reward_model.model = model
    verification.check_step("merge", "merging changed the rewards")


def save(
    verification: Verification, folder: Path, body: torch.dtype, head: torch.dtype, evaluation: dict[str, Any]
) -> None:
    """Write model and tokenizer in these precisions; the model stays as it will be loaded, but in fp32.

    config.json names the head's, for plain transformers to compute in, and how rewards spread.
    """
    model, tokenizer = verification.reward_model.model, verification.reward_model.tokenizer
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(head if is_head_layer(module) else body)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how it names a full disk, among others
        raise ExportError(f"the export cannot be written: {one_line(error)}; nothing was exported") from None
    tokenizer.save_pretrained(folder)
    metrics, rewards = evaluation.get("datasets", {}).get(findings.HELD_OUT, {}), verification.evaluated
    said = {
        "dtype": str(head).removeprefix("torch."),
        "sentence_transformers": NO_SIGMOID,
        "reward_mean": metrics.get("mean_reward", float(rewards.mean())),
        "reward_std": metrics.get("std_reward", float(rewards.std())),
    }
    rewrite_json(folder / "config.json", lambda config: config | said)
    for_transformers_4(folder)
    rewrite_json(folder / "tokenizer_config.json", without_bos)
    model.float()
    share = 0.0 if body == head == torch.float32 else ROUNDING
    verification.check_step("rounding", "rounding changed the rewards; try --dtype float32", share)


def without_bos(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's configuration without BOS, which it never adds: the template has it as a text.

    (`chat_template.served`.) Verl cuts it from the start of texts, since tokenizers add it again: Llama's do.
    """
    return {key: value for key, value in config.items() if key != "bos_token"}


def describe(
    folder: Path, run: Path, output: Path, evaluation: dict[str, Any], proof: dict[str, Any]
) -> None:
    """Write what goes with the model: proof, evaluation, card and its picture.

    The proof gets the SHA-256 of what was verified; `push` compares them.
    """
    proof["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    write_json(folder / "proof.json", proof)
    if evaluation:
        write_json(folder / "evaluation.json", evaluation)
    calibration = evaluation.get("datasets", {}).get(findings.HELD_OUT, {}).get("calibration", {})
    if bins := calibration.get("bins"):
        plots.save_reliability(bins, folder / FIGURE)
    # As it is called from here, so that the card need not name the user's own folders.
    called = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    (folder / CARD).write_text(make_card(folder, run, str(called)), encoding="utf-8")
