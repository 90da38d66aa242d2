"""`rm-recipe export RUN`: merge adapter and head into a plain one-label classifier, and verify it.

What comes out needs nothing but transformers: `AutoModelForSequenceClassification`, a tokenizer
that adds no special tokens to the chat template's text, and a config that names the pad token and
turns the pipeline's sigmoid off. The body keeps its precision, the head is fp32, and config.json
says float32 so that a plain `from_pretrained` computes exactly what was checked here.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from rm_recipe.data.splits import load_held_out_split
from rm_recipe.data.tokenization import tokenize
from rm_recipe.errors import ExportError, RecipeError, one_line
from rm_recipe.evaluation.evaluate import weights_of
from rm_recipe.evaluation.findings import HELD_OUT
from rm_recipe.evaluation.plots import save_reliability
from rm_recipe.evaluation.summary import read_evaluation, read_predictions
from rm_recipe.exporting.card import FIGURE, write_card
from rm_recipe.exporting.compatibility import for_transformers_4, rewrite_json
from rm_recipe.exporting.verify import EIGHT_BITS, ORIGINAL, ROUNDING, HeldOut, Verification
from rm_recipe.files import locked, read_json, sha256, whole_folder, write_json
from rm_recipe.model.head import is_head_layer
from rm_recipe.model.memory import device_memory, fits_in_float32, float32_bytes
from rm_recipe.model.reward_model import Base, load_trained
from rm_recipe.processes import say
from rm_recipe.recipe.reader import Recipe, is_run_folder, read_run_recipe
from rm_recipe.scoring import RewardModel, find_model
from rm_recipe.training.run_folder import check_data

MergeBase = Literal["dequantized", "original"]
NO_SIGMOID = {
    "activation_fn": "torch.nn.modules.linear.Identity"
}  # what sentence-transformers' CrossEncoder reads


def export(
    run: Path,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    merge_base: MergeBase = "dequantized",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write the merged model of a run, verified to score as what was evaluated.

    Args:
        output: the new folder, by default `export/` in the run.
        overwrite: replace an export that is there, once the new one is whole.
        merge_base: what the adapter of a base in 4 or 8 bits is merged into: that base de-quantised, which it
            was trained on, or the 16-bit base before quantising, which moves the rewards (peft#2321).
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
    check_data(run, recipe)
    trained = Path(find_model(str(run)))
    with locked(run), whole_folder(output) as folder:  # nothing trains the run anew meanwhile
        reward_model = RewardModel.from_pretrained(run)
        evaluation = evaluation_of(run)
        verification = Verification(reward_model, held_out_of(run, recipe, reward_model))
        body = getattr(torch, dtype) if dtype else body_precision(reward_model.model)
        head = body if dtype else torch.float32
        quantised = compute_in_float32(verification, trained, merge_base)
        verification.check_recorded()
        reward_model.model = merge(reward_model.model)
        verification.check_step("merge", "merging changed the rewards")
        # which rounds the model in memory, too
        save(reward_model, folder, body, head, reward_scale(evaluation, verification))
        share = 0.0 if body == head == torch.float32 else ROUNDING
        verification.check_step("rounding", "rounding changed the rewards; try --dtype float32", share)
        content = verification.read_back(folder) | hashes(folder, trained)
        content |= {"merge_base": merge_base if quantised else None, "dtype": dtype}
        describe(folder, run, output, evaluation, content)
    return content


def check_replaceable(output: Path, overwrite: bool) -> None:
    """Refuse a folder that is there, unless it is to be overwritten and is an export of ours."""
    if not output.exists():
        return
    config = output / "config.json"
    ours = config.is_file() and "rm_recipe" in read_json(config)
    if not ours or is_run_folder(output):
        raise RecipeError(f"{output} is there and is not an export; choose another --output")
    if not overwrite:
        raise RecipeError(f"{output} is there already; add --overwrite to replace it")


def evaluation_of(run: Path) -> dict[str, Any]:
    """The run's evaluation, which the export takes along; empty if there is none.

    Raises:
        RecipeError: it is another model's.
    """
    evaluation = read_evaluation(run)
    if evaluation and evaluation.get("weights") != weights_of(str(run)):
        raise RecipeError(
            f"{run / 'evaluation.json'} is not of this run's model as it is now; first "
            f"`rm-recipe evaluate {run}`"
        )
    return evaluation


def held_out_of(run: Path, recipe: Recipe, reward_model: RewardModel) -> HeldOut:
    """The held-out conversations to verify by, with the rewards that the run's evaluation gave them."""
    split = tokenize(
        load_held_out_split(recipe), reward_model.tokenizer, reward_model.max_length, reward_model.truncation
    )
    return HeldOut.of(split, [line for line in read_predictions(run) if line["dataset"] == HELD_OUT])


def body_precision(model: torch.nn.Module) -> torch.dtype:
    """The precision of the weights before the head, of a quantised base that of what is not quantised."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def compute_in_float32(verification: Verification, trained: Path, merge_base: MergeBase) -> bool:
    """Go on to the same weights in fp32, de-quantised for the merge; whether they were quantised.

    Raises:
        ExportError: they give other rewards; the original base may give somewhat other ones.
    """
    model = verification.reward_model.model
    if not getattr(model.config, "quantization_config", None):
        model.to(float32_device(model)).float()
        verification.check_step("precision", "computing in fp32 changed the rewards", ROUNDING)
        return False
    share = EIGHT_BITS if getattr(model.config.quantization_config, "load_in_8bit", False) else ROUNDING
    del model
    load_base(verification, trained, "dequantized")
    verification.check_step("precision", "the de-quantised model is not what was evaluated", share)
    if merge_base == "original":
        load_base(verification, trained, merge_base)
        verification.check_step(
            "base", "the original base (--merge-base dequantized would not) changed the rewards", ORIGINAL
        )
    return True


def load_base(verification: Verification, trained: Path, base: Base) -> None:
    """Put the adapter on another base in fp32; the model that was there makes room for it first."""
    reward_model = verification.reward_model
    device = float32_device(reward_model.model)
    verification.free_model()
    reward_model.model = load_trained(str(trained), reward_model.tokenizer, base=base, device=device).float()


def float32_device(model: torch.nn.Module) -> torch.device:
    """Where a model is verified in fp32: where it is, or, said, on the CPU if it does not fit there."""
    device, weights = next(model.parameters()).device, float32_bytes(model)
    memory = device_memory(device)
    if device.type == "cpu" or fits_in_float32(weights, memory):
        return device
    say(
        f"the model takes {weights / 1e9:.1f} GB in fp32, and the {device.type.upper()} has "
        f"{memory / 1e9:.1f} GB free: it is verified on the CPU, which takes longer"
    )
    return torch.device("cpu")


def merge(model: torch.nn.Module) -> PreTrainedModel:
    """The plain classifier: with the adapter and the trained head in their places, if there is one."""
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(progressbar=False)
    assert isinstance(model, PreTrainedModel)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def reward_scale(evaluation: dict[str, Any], verification: Verification) -> dict[str, float]:
    """Mean and standard deviation of held-out rewards: of the evaluation's if there is one, else of these."""
    metrics = evaluation.get("datasets", {}).get(HELD_OUT, {})
    rewards = verification.evaluated
    return {
        "reward_mean": metrics.get("mean_reward", float(rewards.mean())),
        "reward_std": metrics.get("std_reward", float(rewards.std())),
    }


def save(
    reward_model: RewardModel, folder: Path, body: torch.dtype, head: torch.dtype, scale: dict[str, float]
) -> None:
    """Write model and tokenizer in these precisions; the model stays as it will be loaded, but in fp32.

    Args:
        head: also what config.json names: what plain transformers computes in.
        scale: what config.json says of the rewards.
    """
    for module in reward_model.model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(head if is_head_layer(module) else body)
    try:
        reward_model.model.save_pretrained(folder)
    except SafetensorError as error:  # how it names a full disk, among others
        raise ExportError(f"the export cannot be written: {one_line(error)}; nothing was exported") from None
    reward_model.model.float()
    reward_model.tokenizer.save_pretrained(folder)
    said = {"dtype": str(head).removeprefix("torch."), "sentence_transformers": NO_SIGMOID, **scale}
    rewrite_json(folder / "config.json", lambda config: config | said)
    for_transformers_4(folder)
    leave_out_bos(folder, reward_model.tokenizer.chat_template)


def leave_out_bos(folder: Path, template: str) -> None:
    """Take the name of a BOS from the tokenizer, which adds none, if the template does not need it.

    What was trained here has BOS as a text in its template (`chat_template.served`). Verl cuts it from the
    start of texts, since tokenizers add it again: Llama's do.
    """
    if "bos_token" not in template or "set bos_token" in template:
        path = folder / "tokenizer_config.json"
        rewrite_json(path, lambda config: {key: config[key] for key in config if key != "bos_token"})


def hashes(folder: Path, trained: Path) -> dict[str, Any]:
    """SHA-256 of what was verified, and of what it was made from; `push` compares them."""
    return {
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
        "trained": {path.name: sha256(path) for path in sorted(trained.glob("*.safetensors"))},
    }


def describe(
    folder: Path, run: Path, output: Path, evaluation: dict[str, Any], content: dict[str, Any]
) -> None:
    """Write what goes with the model: `proof.json`, the evaluation, the card and its picture."""
    write_json(folder / "proof.json", content)
    if evaluation:
        write_json(folder / "evaluation.json", evaluation)
    calibration = evaluation.get("datasets", {}).get(HELD_OUT, {}).get("calibration", {})
    if bins := calibration.get("bins"):
        save_reliability(bins, folder / FIGURE)
    # As it is called from here, so that the card need not name the user's own folders.
    called = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    write_card(folder, run, str(called))
