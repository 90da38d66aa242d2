"""Train a reward model: a base model and comparisons in, an adapter (or a model) with its head out.

    rm-recipe train recipes/smollm2_offline.yaml
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m rm_recipe train RECIPE

`train` reads in the order in which things happen; what it calls stands below it in the same order.
"""

import importlib.metadata
import math
import platform
import subprocess
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, set_seed

from rm_recipe.data.dataset import Split
from rm_recipe.data.doctor import examine, print_report
from rm_recipe.data.splits import Leakage, load_splits, refuse_leakage
from rm_recipe.data.tokenization import tokenize
from rm_recipe.errors import INTERRUPTS, RecipeError
from rm_recipe.files import whole_folder, write_json
from rm_recipe.model import lora, memory, reward_model
from rm_recipe.model.head import check_saved_head, head_of
from rm_recipe.model.memory import too_little
from rm_recipe.model.shared_prefix import Sharing, decide_sharing
from rm_recipe.model.tokenizer import check_one_end, check_vocabulary, load_tokenizer
from rm_recipe.processes import main_process_first, say, wait_for_main_process
from rm_recipe.recipe.reader import Recipe
from rm_recipe.recipe.schema import CHECKPOINTING
from rm_recipe.training.checkpoints import Checkpoints, not_written, remove_unread, told_in_one_message
from rm_recipe.training.distributed import check_sharding, end, whole_weights
from rm_recipe.training.monitoring import EarlySigns
from rm_recipe.training.preflight import preflight
from rm_recipe.training.run_folder import DATA_REPORT, Run, open_run
from rm_recipe.training.trainer import COLUMNS, SharedPrefixRewardTrainer

PROMISE = "rm-recipe: finishing this step and saving it"


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
    """Train a reward model by a recipe: `model/`, `run.json`, `data_report.json` in its run folder.

    Args:
        resume: go on from the newest checkpoint in the run folder.
        overwrite: remove the run that is there and start anew.

    Raises:
        RecipeError: the run folder is used and neither flag is given, the model does not fit, or FSDP was
            asked for and cannot be given.
        DataError: the data cannot be used.
        TrainingError: the loss is not finite, or the saved head is not the trained one.
        Interrupted: by a signal, with what is saved.
    """
    check_sharding(recipe.training, bool(recipe.model.load_in_4bit or recipe.model.load_in_8bit))
    with open_run(recipe, resume=resume, overwrite=overwrite) as run:
        ready = make_ready(recipe)  # data, model, trainer, and one step, undone; leaves nothing behind
        run.begin(ready.train_split, ready.test_split)  # from here on the folder is this run's
        if ready.report is not None:
            write_json(recipe.output_dir / DATA_REPORT, ready.report)
        for note in recipe.notes:
            say(note)
        if recipe.hub.push_to_hub:
            say("push_to_hub: training uploads nothing; `rm-recipe run` uploads the proven export at its end")
        trainer, checkpoints = ready.trainer, add_callbacks(recipe, ready, run)
        initial_head = head_of(trainer.model, ready.modules_to_save)
        with (
            told_in_one_message(trainer, lambda: too_little(recipe)),
            cheaper_adapters(trainer),
            INTERRUPTS.deferred(PROMISE),
        ):
            trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
        cost = checkpoints.cost()
        trainer.accelerator.wait_for_everyone()
        save_model(trainer, recipe, initial_head)
        if trainer.is_world_process_zero():
            write_json(recipe.output_dir / "run.json", run_record(recipe, ready, run, cost))
        end(trainer)


# --- before: data, model, trainer ------------------------------------------------------------


@dataclass
class Ready:
    """Everything that a training is made of; `report` is the doctor's, None but on the main process."""

    train_split: Split
    test_split: Split
    report: dict[str, Any] | None
    modules_to_save: list[str]
    sharing: Sharing
    trainer: SharedPrefixRewardTrainer


def make_ready(recipe: Recipe) -> Ready:
    """Load data and model, make the trainer, and let it make one step that is undone.

    Nothing is left behind, whatever fails.

    Raises:
        RecipeError, DataError, TrainingError: as `train` does.
    """
    tokenizer, train_split, test_split, leakage = load_data(recipe)
    report = report_data(recipe, train_split, test_split, leakage)
    wait_for_main_process()  # or another would end it before it has said what is wrong
    refuse_leakage(recipe, leakage)
    model, modules_to_save = load_model(recipe, tokenizer)
    sharing = settle_step(recipe, model, modules_to_save, train_split)
    trainer = make_trainer(recipe, tokenizer, model, modules_to_save, train_split, test_split, sharing)
    with cheaper_adapters(trainer):
        shown = preflight(recipe, trainer, modules_to_save, train_split, test_split)
    if shown:
        say(str(shown))
    return Ready(train_split, test_split, report, modules_to_save, sharing, trainer)


def load_data(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Split, Split, Leakage]:
    """The tokenizer, train and held-out comparisons with their token ids, cached, and the leakage.

    Raises:
        RecipeError: the base is unknown or `reward_model.check_base` refuses it, or all comparisons are fewer
            than the one batch that `dataloader_drop_last` asks for.
        DataError: the data cannot be used, or nothing is left of it.
    """
    training, data = recipe.training, recipe.data
    name, revision = str(recipe.model.model_name_or_path), recipe.model.model_revision
    config = lora.load_config(name, revision)
    reward_model.check_base(config, recipe.model, training.max_length)
    tokenizer = load_tokenizer(name, revision, training.chat_template_path, of_base=True)
    if lora.sft_adapter(name, revision) is None:  # merging one makes embeddings for its tokens
        check_vocabulary(config, tokenizer, name)
    check_one_end(config, tokenizer, name)
    settings = (tokenizer, training.max_length, data.truncation, training.dataset_num_proc)
    with main_process_first():
        train_split, test_split, leakage = load_splits(recipe)
        train_split = tokenize(train_split, *settings, alike=True)
        test_split = tokenize(test_split, *settings)
    if training.dataloader_drop_last:
        refuse_dropping(recipe, train_split, test_split)
    return tokenizer, train_split, test_split, leakage


def refuse_dropping(recipe: Recipe, train_split: Split, test_split: Split) -> None:
    """Refuse `dataloader_drop_last` where it would drop everything, or comparisons that are held out.

    Raises:
        RecipeError: with what there is.
    """
    training, there, held_out = recipe.training, len(train_split.comparisons), len(test_split.comparisons)
    batch = training.per_device_train_batch_size * training.world_size
    of_eval = training.per_device_eval_batch_size * training.world_size
    fault = f"all of the {there} comparisons: a batch has {batch}" if there < batch else ""
    if training.eval_strategy != "no" and held_out % of_eval:
        fault = fault or f"{held_out % of_eval} of the {held_out} held-out comparisons at each evaluation"
    if fault:
        raise RecipeError(f"'dataloader_drop_last: true' would drop {fault}; leave it out")


def report_data(recipe: Recipe, train: Split, test: Split, leakage: Leakage) -> dict[str, Any] | None:
    """Print the doctor's table and return its report; None but on the main process."""
    if not PartialState().is_main_process:
        return None
    report = examine(recipe, train, test, leakage)
    print_report(report)
    return report


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, list[str]]:
    """The base as a one-label classifier, and the modules that are new in it."""
    training = recipe.training
    set_seed(training.seed)
    with whole_weights():
        model, modules_to_save = reward_model.load_base(recipe.model, tokenizer, training.seed)
    model.config.rm_recipe = {
        "max_length": training.max_length,
        "truncation": recipe.data.truncation,
        "prefix_sharing": recipe.data.prefix_sharing,
    }
    return model, modules_to_save


def settle_step(recipe: Recipe, model: Any, modules_to_save: list[str], train_split: Split) -> Sharing:
    """What model and data decide of a step, and says so: whether prefixes are shared and, where the recipe
    leaves it open, `gradient_checkpointing`.
    """
    with whole_weights():  # of the small copy
        sharing = decide_sharing(
            model, recipe.data.prefix_sharing, recipe.training.max_length, recipe.training.device
        )
    say(f"prefix sharing: {'on' if sharing.used else 'off'} ({sharing.reason})")
    decide_checkpointing(recipe, model, modules_to_save, train_split, sharing.used)
    return sharing


def decide_checkpointing(
    recipe: Recipe, model: Any, modules_to_save: list[str], train_split: Split, shared: bool
) -> None:
    """Settle `gradient_checkpointing` by the memory plan, unless the recipe does."""
    if any(key in recipe.values for key in CHECKPOINTING):
        return
    decision = memory.needs_checkpointing(model.config, recipe, modules_to_save, train_split, shared)
    needed, reason = broadcast_object_list([decision])[0]  # unequal devices must not decide differently
    for key in CHECKPOINTING:
        setattr(recipe.training, key, needed)
        recipe.values[key] = needed
    say(f"gradient checkpointing: {'on' if needed else 'off'} ({reason})")


def make_trainer(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    modules_to_save: list[str],
    train_split: Split,
    test_split: Split,
    sharing: Sharing,
) -> SharedPrefixRewardTrainer:
    """The trainer of what `load_model` gave, with LoRA if the recipe says so."""
    training = recipe.training
    if recipe.model.use_peft:
        half = training.bf16 or training.fp16
        model = lora.add_lora(model, recipe.model, modules_to_save, autocast=half)
    was_there = recipe.output_dir.exists()
    args = copy(training)
    args.chat_template_path = None  # the tokenizer has it; TRL would put the file's own text in its place
    args.save_total_limit = None  # `Checkpoints` removes older ones, once the newest is whole
    trainer = SharedPrefixRewardTrainer(
        model=model,
        args=args,
        train_dataset=train_split.comparisons.select_columns(COLUMNS),
        eval_dataset=test_split.comparisons.select_columns(COLUMNS),
        processing_class=tokenizer,
        share_prefixes=sharing.used,
    )
    if recipe.data.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(recipe.data.early_stopping_patience))
    if not was_there and trainer.args.should_save:  # Trainer has made it, and nothing is trained yet
        recipe.output_dir.rmdir()
    return trainer


def cheaper_adapters(trainer: SharedPrefixRewardTrainer) -> AbstractContextManager[None]:
    """`lora.in_one_product`, except where the adapters' weights are sharded: it reads them whole."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return nullcontext()
    return lora.in_one_product(trainer.model)


def add_callbacks(recipe: Recipe, ready: Ready, run: Run) -> Checkpoints:
    """Add what watches a training, and what finishes its checkpoints, which is returned."""
    training = recipe.training
    each = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    plain = training.center_rewards_coefficient is None and recipe.data.margin_column is None
    ready.trainer.add_callback(EarlySigns(each, len(ready.test_split.comparisons), plain))
    checkpoints = Checkpoints(ready.trainer, run.identity, run.manifest, training.save_total_limit)
    ready.trainer.add_callback(checkpoints)
    return checkpoints


# --- after -----------------------------------------------------------------------------------


def save_model(trainer: SharedPrefixRewardTrainer, recipe: Recipe, start: dict[str, torch.Tensor]) -> None:
    """Write `model/` (adapter or model, head, config, tokenizer) and read it back.

    Raises:
        TrainingError: it cannot be written; the head is missing from what was saved, or has not moved from
            `start`; or no adapter has learnt anything.
    """
    target = recipe.output_dir / "model"
    if not trainer.is_world_process_zero():
        trainer.save_model(str(target))  # takes part in gathering what is sharded
        return
    try:
        with whole_folder(target) as folder:
            trainer.save_model(str(folder))
            trainer.accelerator.unwrap_model(trainer.model).config.save_pretrained(folder)
            remove_unread(folder)
            check_saved_head(folder, start)
            untrained = lora.untrained_layers(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # each names a full disk in its own way
        raise not_written(target, error) from error
    if untrained:
        say(f"no gradient has reached the adapters of {', '.join(untrained)}")


# --- `run.json`: enough to repeat a run and to judge its cost ----------------------------------

PACKAGES = ("torch", "trl", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "rm-recipe")


def run_record(recipe: Recipe, ready: Ready, run: Run, cost: dict[str, Any]) -> dict[str, Any]:
    """The content of `run.json`.

    Args:
        cost: `Checkpoints.cost` of the whole training.
    """
    training, trainer, train_split = recipe.training, ready.trainer, ready.train_split
    state, seconds = trainer.state, cost["train_seconds"]
    # A gradient norm may overflow in fp16's first steps; JSON has no number for that.
    log = [
        {key: value if math.isfinite(value) else None for key, value in entry.items()}
        for entry in state.log_history
    ]
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    seen = min(state.global_step * batch, round(len(train_split.comparisons) * (state.epoch or 0)))
    return {
        "seed": training.seed,
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "data_fingerprints": run.identity["data_fingerprints"],
        "comparisons": {
            "train": len(train_split.comparisons),
            "train_excluded": dict(train_split.excluded),
            "held_out": len(ready.test_split.comparisons),
        },
        "prefix_sharing": ready.sharing.as_dict(),
        "device": str(training.device),
        "processes": training.world_size,
        "steps": state.global_step,
        "resumed_from_step": run.manifest["step"] if run.manifest else 0,
        "comparisons_per_s": seen / seconds,
        "tokens_per_s": trainer._total_train_tokens / seconds,
        **cost,
        "final_loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
        "log": log,
    }


def package_version(package: str) -> str | None:
    """The installed version, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def git_commit() -> str | None:
    """The commit of the source that runs, None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
