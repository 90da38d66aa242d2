"""`rm-recipe export RUN`: adapter and head merged into a plain one-label classifier.

What comes out needs nothing but transformers: `AutoModelForSequenceClassification`, a tokenizer
that adds no special tokens to the chat template's text, and a config that names the pad token and
turns the pipeline's sigmoid off. The body keeps its precision, the head is fp32, and config.json
says float32 so that a plain `from_pretrained` computes exactly what was checked here.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
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
from rm_recipe.exporting.compatibility import for_transformers_4
from rm_recipe.exporting.verify import (
    ROUNDINGS,
    HeldOut,
    Proof,
    largest,
    layers_that_multiply,
    precisions,
    rounded_inputs,
    to_bfloat16,
    to_eight_bits,
)
from rm_recipe.files import FolderLock, read_json, sha256, whole_folder, write_json
from rm_recipe.model import lora
from rm_recipe.model.memory import device_memory, fits_in_float32, float32_bytes
from rm_recipe.model.reward_model import Base, load_trained
from rm_recipe.processes import say
from rm_recipe.recipe.reader import is_run_folder, read_run_recipe
from rm_recipe.scoring import RewardModel, find_model
from rm_recipe.training.run_folder import check_data

MergeBase = Literal["dequantized", "original"]
NO_SIGMOID = {"activation_fn": "torch.nn.modules.linear.Identity"}  # what its CrossEncoder reads
# An original base may move rewards by so many of their standard deviations, root mean square. Rewards that
# have nothing to do with each other are 1.4 apart.
DRIFT = 0.5


def export(
    run: Path,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    merge_base: MergeBase = "dequantized",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Writes the merged model of a run and proves that it scores as what was evaluated.

    Args:
        output: the new folder, by default `export/` in the run.
        overwrite: replace an export that is there, once the new one is whole.
        merge_base: what the adapter of a base in 4 or 8 bits is merged into: that base de-quantised, which it
            was trained on, or the 16-bit base before quantising, which moves the rewards (peft#2321).
        dtype: `float32` or `bfloat16` for all weights; by default the body keeps its precision, and the head,
            in which rewards would tie otherwise, is fp32.

    Returns:
        the content of the export's `proof.json`.

    Raises:
        RecipeError: `run` is no finished run, the export is there already, or what is there and
            would be overwritten is no export.
        ExportError: some step gives other rewards, or the files cannot be written. What was there is kept.
    """
    recipe = read_run_recipe(run)
    output = output or run / "export"
    check_replaceable(output, overwrite)
    trained = find_model(str(run))
    check_data(run, recipe)
    judge = RewardModel.from_pretrained(run)
    evaluation = evaluation_of(run)
    split = tokenize(load_held_out_split(recipe), judge.tokenizer, judge.max_length, judge.truncation)
    lines = [line for line in read_predictions(run) if line["dataset"] == HELD_OUT]
    proof = Proof(judge, HeldOut.of(split, lines))
    with FolderLock(run) as lock, whole_folder(output) as folder:
        lock.take()
        body = body_precision(judge.model)
        base = compute_in_float32(proof, trained)
        proof.check_recorded()
        quantised = base is not None
        if quantised and base != merge_base:
            put_on_base(proof, trained, merge_base)
        judge.model = merge(judge.model)
        proof.step("merge", "merging changed the rewards", proof.rewards())
        body, head = [getattr(torch, dtype)] * 2 if dtype else (body, torch.float32)
        allowed = proof.rounding_to(body, head)
        save(judge, folder, body, head, reward_scale(evaluation, proof.evaluated))
        claim = "rounding the merged weights (--dtype float32 would not) changed the rewards"
        proof.step("rounding", claim, proof.rewards(), allowed)
        content = proof.read_back(folder) | {
            "merge_base": merge_base if quantised else None,
            "dtype": dtype,
            "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
            "trained": {path.name: sha256(path) for path in sorted(Path(trained).glob("*.safetensors"))},
        }
        write_json(folder / "proof.json", content)
        if evaluation:
            write_json(folder / "evaluation.json", evaluation)
        draw_reliability(evaluation, folder)
        write_card(folder, run, _as_typed(output))
    return content


def evaluation_of(run: Path) -> dict[str, Any]:
    """The run's evaluation, which the export takes along; empty if there is none.

    Raises:
        RecipeError: it is another model's, or of an older version of rm_recipe.
    """
    evaluation = read_evaluation(run)
    if evaluation and evaluation.get("weights") != weights_of(str(run)):
        raise RecipeError(
            f"{run / 'evaluation.json'} is not of this run's model as it is now; first "
            f"`rm-recipe evaluate {run}`"
        )
    return evaluation


def _as_typed(output: Path) -> str:
    """The folder as it is called from here, so that the card need not name the user's own."""
    return str(output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output)


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


def body_precision(model: torch.nn.Module) -> torch.dtype:
    """The precision of the weights before the head, of a quantised base that of what is not quantised."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


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


def compute_in_float32(proof: Proof, trained: str) -> Base | None:
    """Goes on to the evaluated model in fp32; returns the base that it is on, None if that is not quantised.

    Layers in 4 bits can multiply in fp32. Those in 8 bits cannot, so their base is de-quantised at once, and
    what rounding does, to 8 bits there and to half precision everywhere, is measured on that.
    """
    judge = proof.judge
    quantised = bool(getattr(judge.model.config, "quantization_config", None))
    layers = lora.eight_bit_layers(judge.model)
    if layers:
        half = body_precision(judge.model) != torch.float32
        load_base(proof, trained, "dequantized")
        exact = proof.rewards()
        others = layers_that_multiply(judge.model) if half else []
        with (
            rounded_inputs(judge.model, others, to_bfloat16),
            rounded_inputs(judge.model, layers, to_eight_bits),
        ):
            noise = ROUNDINGS * largest(exact, proof.rewards())
        proof.step("precision", "the de-quantised model is not what was evaluated", exact, noise)
        proof.measure_float32()
        return "dequantized"
    lora.compute_in_float32(judge.model)
    if not quantised:
        judge.model.to(float32_device(judge.model))
    judge.model.float()
    proof.measure_precision()
    return "trained" if quantised else None


def load_base(proof: Proof, trained: str, base: Base) -> None:
    """Puts the adapter on another base in fp32; the judge's model makes room for it first."""
    device = float32_device(proof.judge.model)
    proof.let_go()
    proof.judge.model = load_trained(trained, proof.judge.tokenizer, base=base, device=device).float()


def put_on_base(proof: Proof, trained: str, merge_base: MergeBase) -> None:
    """Goes on to the adapter on weights that it can be merged into.

    Raises:
        ExportError: they give other rewards; the original base may give somewhat other ones.
    """
    allowed = 0.0
    load_base(proof, trained, merge_base)
    rewards = proof.rewards()
    if merge_base == "original":
        moved = np.sqrt(np.mean(np.square(rewards - proof.now, dtype=float)))
        most = DRIFT * float(proof.now.std())
        if not moved <= most:
            raise ExportError(
                f"on the original base rewards move by {moved:.2g} on average, where half their standard "
                f"deviation, {most:.2g}, is allowed; nothing was exported; --merge-base dequantized keeps "
                "them"
            )
        allowed = largest(rewards, proof.now)
    proof.step("base", "de-quantising the base changed the rewards", rewards, allowed)


def merge(model: torch.nn.Module) -> PreTrainedModel:
    """The plain classifier: with the adapter and the trained head in their places, if there is one."""
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(progressbar=False)
    assert isinstance(model, PreTrainedModel)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def reward_scale(evaluation: dict[str, Any], rewards: NDArray[np.float32]) -> dict[str, float]:
    """Mean and standard deviation of held-out rewards: of the evaluation's if there is one, else of these."""
    figures = evaluation.get("datasets", {}).get(HELD_OUT, {})
    mean, std = float(rewards.mean()), float(rewards.std())
    return {
        "reward_mean": figures.get("mean_reward", mean),
        "reward_std": figures.get("std_reward", std),
    }


def save(
    judge: RewardModel, folder: Path, body: torch.dtype, head: torch.dtype, scale: dict[str, float]
) -> None:
    """Writes model and tokenizer in these precisions; the model stays as it will be loaded, but in fp32.

    Args:
        head: also what config.json names: what plain transformers computes in.
        scale: what config.json says of the rewards.
    """
    for parameter, precision in precisions(judge.model, body, head):
        parameter.data = parameter.data.to(precision)
    try:
        judge.model.save_pretrained(folder)
    except SafetensorError as error:  # how it names a full disk, among others
        raise ExportError(f"the export cannot be written: {one_line(error)}; nothing was exported") from None
    judge.model.float()
    judge.tokenizer.save_pretrained(folder)
    config = read_json(folder / "config.json")
    config |= {"dtype": str(head).removeprefix("torch."), "sentence_transformers": NO_SIGMOID, **scale}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    leave_out_bos(folder, judge.tokenizer.chat_template)
    for_transformers_4(folder)


def leave_out_bos(folder: Path, template: str) -> None:
    """Takes the name of a BOS from the tokenizer, which adds none, if the template does not need it.

    What was trained here has BOS as a text in its template (`chat_template.served`). Verl cuts it from the
    start of texts, since tokenizers add it again: Llama's do.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    needed = "bos_token" in template and "set bos_token" not in template
    if not needed and config.pop("bos_token", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw_reliability(evaluation: dict[str, Any], folder: Path) -> None:
    """The card's picture, where there is something to draw."""
    figures = evaluation.get("datasets", {}).get(HELD_OUT, {})
    bins = [
        (part["confidence"], part["accuracy"], part["n"])
        for part in figures.get("calibration", {}).get("bins", [])
    ]
    if bins:
        save_reliability(bins, folder / FIGURE)
