"""`rm-recipe check RECIPE`: what is wrong with data, step or memory, before anything is trained."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from rm_recipe.data.augmentation import augment
from rm_recipe.data.comparison import Encoded
from rm_recipe.data.splits import refuse_leakage
from rm_recipe.errors import RecipeError
from rm_recipe.files import write_json
from rm_recipe.model import lora, reward_model
from rm_recipe.model.head import head_names
from rm_recipe.model.memory import PROCESS, SPARE, Fit, device_memory, fit
from rm_recipe.model.shared_prefix import decide_sharing
from rm_recipe.model.tokenizer import check_lengths, check_vocabulary, load_tokenizer
from rm_recipe.recipe.reader import Recipe, is_run_folder, read_recipe
from rm_recipe.training.preflight import preflight
from rm_recipe.training.run_folder import DATA_REPORT, check_run_folder
from rm_recipe.training.train import check_sharding, load_data, load_model, make_trainer, report_data

# The precision of a GPU, on a machine that has none.
AS_ON_GPU = {"use_cpu": "true", "fp16": "false", "bf16": "true"}


def at_hand(name: str, revision: str | None) -> Path | None:
    """The folder of a model that is there or in the Hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    with lora.readable(f"'model_name_or_path: {name}' does not exist, and is no Hub id"):
        file = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    return Path(file).parent if isinstance(file, str) else None


def check_base(recipe: Recipe) -> None:
    """Refuse a base that training would refuse, if its configuration is in a folder or the Hub's cache.

    Its tokenizer too, where that is at hand.

    Raises:
        RecipeError: as `reward_model.check_base` and `tokenizer.load_tokenizer` do, or no configuration can
            be read.
    """
    name, template = str(recipe.model.model_name_or_path), recipe.training.chat_template_path
    folder = at_hand(name, recipe.model.model_revision)
    adapter = lora.adapter_config(str(folder)) if folder and not (folder / "config.json").is_file() else None
    if folder is None or (adapter and not at_hand(str(adapter.base_model_name_or_path), adapter.revision)):
        return
    config = lora.load_config(str(folder))
    reward_model.check_base(config, recipe.model, recipe.training.max_length)
    if Path(name).is_dir() or (folder / "tokenizer_config.json").is_file():
        template = template if template and Path(template).exists() else None
        tokenizer = load_tokenizer(str(folder), template=template, of_base=True)
        # An SFT adapter may bring tokens that its base has no embeddings for.
        if lora.sft_adapter(str(folder)) is None:
            check_vocabulary(config, tokenizer, name)


def check_data(recipe: Recipe) -> None:
    """Print the doctor's report and write it under `output_dir`, unless that holds a run, which has its own.

    Raises:
        RecipeError, DataError: whatever would stop training, leakage among it; the report is
            written all the same where there is one.
    """
    folder = recipe.output_dir
    used = is_run_folder(folder)
    check_run_folder(recipe, resume=False, overwrite=used)
    _, train_split, test_split, leakage = load_data(recipe)
    report = report_data(recipe, train_split, test_split, leakage)
    if used:
        print(f"report: not written; {folder} holds a run and its report. --output_dir takes another folder")
    else:
        write_json(folder / DATA_REPORT, report)
        print(f"report: {folder / DATA_REPORT}")
    refuse_leakage(leakage)


def check_step(recipe: Recipe) -> None:
    """Do all that training does before its first step, and the step itself, which it undoes.

    Raises:
        RecipeError, DataError, TrainingError: whatever would stop training.
    """
    check_sharding(recipe)
    check_run_folder(recipe, resume=False, overwrite=is_run_folder(recipe.output_dir))
    tokenizer, train_split, test_split, leakage = load_data(recipe)
    report_data(recipe, train_split, test_split, leakage)
    refuse_leakage(leakage)
    train_split = augment(recipe, tokenizer, train_split)
    model, modules_to_save = load_model(recipe, tokenizer)
    preflight(recipe, make_trainer(recipe, tokenizer, model, modules_to_save, train_split, test_split))


def check_memory(path: Path, overrides: Sequence[str], gpu_memory: str | None = None) -> bool:
    """Print what a training step will take, and what to lower where that is too much; whether it fits.

    Args:
        gpu_memory: of a GPU, "8GB" or so; by default the plan is for this machine.

    Raises:
        RecipeError: the recipe is faulty, or the base's configuration cannot be had.
    """
    if gpu_memory is not None:
        recipe, device = read_as_on_gpu(path, overrides), torch.device("cuda")
        there = parse_bytes(gpu_memory)
    else:
        recipe = read_recipe(path, overrides, check_inputs=False)
        device = recipe.training.device
        there = device_memory(device)
    found = fit_by_config(recipe, device, there)
    print_fit(found, recipe, device)
    return found.fits


def read_as_on_gpu(path: Path, overrides: Sequence[str]) -> Recipe:
    """Read a recipe with the precision that it would have on a GPU, which this machine need not have.

    Raises:
        RecipeError: it is faulty.
    """
    recipe = read_recipe(path, overrides, check_inputs=False)
    if recipe.training.device.type == "cuda":
        return recipe
    given = {word.partition("=")[0] for word in overrides}
    more = [f"--{key}={value}" for key, value in AS_ON_GPU.items() if f"--{key}" not in given]
    return read_recipe(path, [*overrides, *more], check_inputs=False)


def fit_by_config(recipe: Recipe, device: torch.device, memory_bytes: float, larger: bool = True) -> Fit:
    """`fit` by the base's configuration, for conversations of `max_length` tokens that share none.

    Raises:
        RecipeError: the configuration cannot be had.
    """
    training = recipe.training
    name, revision = str(recipe.model.model_name_or_path), recipe.model.model_revision
    config = lora.load_config(name, revision)
    text = config.get_text_config()
    if text.pad_token_id is None:  # which the tokenizer would name
        text.pad_token_id = 0
    outline = reward_model.outline(config, name)
    check_lengths(outline, training.max_length, name)
    sharing = decide_sharing(outline, recipe.data.prefix_sharing, training.max_length, device)
    replies = 4 if recipe.data.augmentation else 2
    longest = Encoded([5], [[6] * ((training.max_length or 1024) - 1)] * replies)
    parts = (outline.config, recipe, head_names(outline), lambda n: [longest] * n)
    return fit(*parts, shared=sharing.used, device=device, memory_bytes=memory_bytes, larger=larger)


def parse_bytes(text: str) -> float:
    """Read `8GB`, `8 gb` or `8`.

    Raises:
        RecipeError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gb)?", text.strip().lower())
    if not match:
        raise RecipeError(f"'--gpu-memory {text}' is not a size such as 8GB")
    return float(match[1]) * 1e9


def print_fit(found: Fit, recipe: Recipe, device: torch.device) -> None:
    """Print the plan as a table, and whether it fits."""
    plan, batch = found.plan, recipe.training.per_device_train_batch_size
    planned = min(found.largest or 1, batch)
    length, on = recipe.training.max_length, device.type.upper()
    print(f"Memory of a training step on {on}, planned for conversations of {length} tokens:\n")
    for name, size in (
        ("base", plan.weights - plan.trained),
        ("adapters and head" if recipe.model.use_peft else "trained weights", plan.trained),
        ("optimizer", plan.optimizer),
        (f"step: activations and gradients of {planned} comparison(s)", plan.heap * plan.step),
        ("process and libraries", PROCESS),
        ("peak", plan.peak),
    ):
        print(f"  {name:<56} {size / 1e9:6.2f} GB")
    verdict = "fits" if found.fits else "does not fit"
    print(f"\n{verdict} {found.memory / 1e9:.1f} GB, of which the plan leaves {SPARE:.0%} free")
    if planned < batch and found.fits:
        print(f"batches of {batch} comparisons are divided into micro-batches, which changes no result")
    print(f"gradient checkpointing: {'on' if found.checkpointing else 'off'}")
    print(f"largest per_device_train_batch_size that fits: {found.largest}")
    if not found.fits:
        print(f"instead: {found.lower}")
