"""`rm-recipe train RECIPE`: a base model and comparisons in, a trained reward model out."""

import math
import shutil
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, set_seed

from rm_recipe import adapters, memory, modeling, sft, tokenization
from rm_recipe.artifacts import is_scratch, read_json, tidy, whole_folder, write_json
from rm_recipe.checkpoints import MANIFEST, Checkpoints, newest_whole
from rm_recipe.datasets import Leakage, load_splits, refuse_leakage
from rm_recipe.distribution import (
    check_sharding,
    end,
    main_process_first,
    say,
    wait_for_main_process,
    whole_weights,
)
from rm_recipe.doctor import examine, print_report
from rm_recipe.early_signs import EarlySigns
from rm_recipe.encoding import tokenize
from rm_recipe.errors import Interrupted, RecipeError, TrainingError
from rm_recipe.fitting import too_little
from rm_recipe.heads import check_saved_head, head_of
from rm_recipe.interrupts import INTERRUPTS
from rm_recipe.memory import is_out_of_memory
from rm_recipe.preflight import preflight
from rm_recipe.recipe import RUN_RECIPE, Recipe, is_run_folder, saved_values
from rm_recipe.reward_trainer import COLUMNS, SharedPrefixRewardTrainer
from rm_recipe.run_record import run_record
from rm_recipe.sharing import Sharing, decide_sharing
from rm_recipe.split import Split

DATA_REPORT = "data_report.json"
PROMISE = "rm-recipe: finishing this step and saving it; Ctrl-C again stops at once"
BENCHMARK = "benchmark.json"  # of the machine, not of a run: it may come first and it stays


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
    """Trains a reward model by a recipe: `model/`, `run.json`, `data_report.json` in its run folder.

    Args:
        resume: go on from the newest checkpoint in the run folder.
        overwrite: remove the run that is there and start anew.

    Raises:
        RecipeError: the run folder is used and neither flag is given, the model does not fit, or FSDP was
            asked for and cannot be given.
        DataError: the data cannot be used.
        TrainingError: the loss is not finite, or the saved head is not the trained one.
    """
    with INTERRUPTS.listening():
        try:
            _train(recipe, resume, overwrite)
        except KeyboardInterrupt:
            kept, _ = newest_whole(recipe.output_dir)
            what = f"{kept} is the newest checkpoint" if kept else "there is no checkpoint yet"
            raise Interrupted(f"interrupted; {what}", INTERRUPTS.received) from None


def _train(recipe: Recipe, resume: bool, overwrite: bool) -> None:
    check_sharding(recipe.training, bool(recipe.model.load_in_4bit or recipe.model.load_in_8bit))
    checkpoint, faulty = check_run_folder(recipe, resume=resume, overwrite=overwrite)
    if recipe.hub.push_to_hub:
        say("push_to_hub: training uploads nothing; `rm-recipe run` uploads the proven export at its end")
    ready = make_ready(recipe)
    trainer, new_modules = ready.trainer, ready.new_modules
    start = head_of(trainer.model, new_modules)
    identity = identity_of(ready.train_split, ready.test_split)
    manifest = read_json(checkpoint / MANIFEST) if checkpoint else None
    if manifest:
        check_identity(recipe.output_dir, manifest, identity)
    claim_run_folder(recipe, faulty, overwrite=overwrite)  # not before: what fails above leaves nothing
    if ready.report is not None:
        write_json(recipe.output_dir / DATA_REPORT, ready.report)
    trainer.add_callback(early_signs_of(recipe, ready))
    trainer.add_callback(Checkpoints(trainer, identity, manifest))
    began = time.monotonic()
    try:
        with cheaper_adapters(trainer), INTERRUPTS.deferred(PROMISE):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = too_little(recipe, trainer, new_modules, ready.train_split)
        raise TrainingError(f"step {trainer.state.global_step + 1}: {message}") from None
    seconds = time.monotonic() - began
    trainer.accelerator.wait_for_everyone()
    save_model(trainer, recipe, ready.tokenizer, start)
    if trainer.is_world_process_zero():
        splits = (ready.train_split, ready.test_split)
        record = run_record(recipe, trainer, ready.sharing, *splits, seconds, manifest)
        write_json(recipe.output_dir / "run.json", record)
    end(trainer)


# --- before ----------------------------------------------------------------------------------


def check_run_folder(recipe: Recipe, *, resume: bool, overwrite: bool) -> tuple[Path | None, dict[Path, str]]:
    """Whether this run may use its folder; the checkpoint to go on from, and those that do not count.

    Raises:
        RecipeError: it is used and neither flag is given, it is no run folder, it belongs to
            another recipe, or there is nothing to resume.
    """
    folder = recipe.output_dir
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    if folder.is_file():
        raise RecipeError(f"'output_dir: {folder}' is a file")
    used = is_run_folder(folder)
    there = [path for path in folder.iterdir() if not is_scratch(path)] if folder.is_dir() else []
    if not used and {path.name for path in there} - {DATA_REPORT, BENCHMARK}:
        raise RecipeError(f"'output_dir: {folder}' is not empty and is not a run folder; choose another one")
    if used and not (resume or overwrite):
        raise RecipeError(
            f"{folder} holds a run already; add --resume to go on with it, --overwrite to start "
            "anew, or give another --output_dir"
        )
    if resume:
        if not used:
            raise RecipeError(f"{folder} holds no run to resume")
        if (folder / "run.json").is_file():
            raise RecipeError(f"{folder} is finished; there is nothing to resume")
        changed = changed_keys(recipe, folder)
        if changed == list(ACCUMULATION) and same_step(recipe, saved_values(folder)):
            say("other batches than before, with as many comparisons a step: the same but for rounding")
        elif changed:
            raise RecipeError(
                f"{folder} was started with another recipe; resuming needs the same values of: "
                f"{', '.join(changed)}"
            )
        checkpoint, faulty = newest_whole(folder)
        for path, fault in faulty.items():
            say(f"warning: {path} does not count: {fault}")
        say(f"resuming from {checkpoint}" if checkpoint else "no checkpoint to resume from: starting anew")
        return checkpoint, faulty
    return None, {}


def identity_of(train_split: Split, test_split: Split) -> dict[str, Any]:
    """What has to be the same for a resumed run to equal one that was never interrupted."""
    return {
        "data_fingerprints": {
            "train": train_split.comparisons._fingerprint,
            "held_out": test_split.comparisons._fingerprint,
        },
        "processes": PartialState().num_processes,
    }


def check_identity(run: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with other data, or with another number of processes.

    Args:
        then: a checkpoint's manifest.

    Raises:
        RecipeError: saying which.
    """
    if then["processes"] != now["processes"]:
        raise RecipeError(
            f"{run} was started with {then['processes']} process(es), and here are {now['processes']}: they "
            "would meet the comparisons in another order"
        )
    for name, fingerprint in now["data_fingerprints"].items():
        if then["data_fingerprints"][name] != fingerprint:
            raise RecipeError(
                f"the {name.replace('_', '-')} comparisons are not those that {run} was started with; "
                "resuming needs the same data, --overwrite starts anew"
            )


def claim_run_folder(recipe: Recipe, faulty: Iterable[Path], *, overwrite: bool) -> None:
    """Makes the run folder and writes the recipe.

    Before that it removes the checkpoints that do not count, which rotation would keep instead of whole
    ones, and with `overwrite` everything.
    """
    folder, state = recipe.output_dir, PartialState()
    if state.is_main_process:
        if overwrite and folder.is_dir():
            empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        for checkpoint in faulty:
            shutil.rmtree(checkpoint)
        recipe.save(folder / RUN_RECIPE)
    state.wait_for_everyone()


def empty(folder: Path) -> None:
    """Removes a run from its folder; last the recipe, by which it is known as one."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RUN_RECIPE):
        if path.name == BENCHMARK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@dataclass
class Ready:
    """Everything that a training is made of; `report` is the doctor's, None but on the main process."""

    tokenizer: PreTrainedTokenizerBase
    train_split: Split
    test_split: Split
    report: dict[str, Any] | None
    new_modules: list[str]
    sharing: Sharing
    trainer: SharedPrefixRewardTrainer


def make_ready(recipe: Recipe) -> Ready:
    """Loads data and model, makes the trainer, and lets it make one step that is undone.

    Nothing is left behind, whatever fails.

    Raises:
        RecipeError, DataError, TrainingError: as `train` does.
    """
    tokenizer, train_split, test_split, leakage = load_data(recipe)
    report = report_data(recipe, train_split, test_split, leakage)
    wait_for_main_process()  # or another would end it before it has said what is wrong
    refuse_leakage(recipe, leakage)
    model, new_modules = load_model(recipe, tokenizer)
    sharing = settle_step(recipe, model, new_modules, train_split)
    trainer = make_trainer(recipe, tokenizer, model, new_modules, train_split, test_split, sharing)
    with cheaper_adapters(trainer):
        shown = preflight(recipe, trainer, new_modules, train_split, test_split)
    if shown:
        say(str(shown))
    return Ready(tokenizer, train_split, test_split, report, new_modules, sharing, trainer)


# TRL's name and transformers' new one, of which its Trainer reads only the second.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")

# Keys that change what is printed or kept, never what is learnt.
WITHOUT_EFFECT = {
    "output_dir", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "logging_strategy",
    "logging_first_step", "report_to", "run_name", "project", "disable_tqdm", "eval_strategy", "eval_steps",
    "per_device_eval_batch_size", *CHECKPOINTING,
    "dataset_num_proc", "log_level", "log_level_replica", "dataloader_pin_memory",
    "push_to_hub", "hub_model_id", "hub_private_repo",
}  # fmt: skip


# How the comparisons of a step are divided: their product is what is learnt from.
ACCUMULATION = ("per_device_train_batch_size", "gradient_accumulation_steps")


def same_step(recipe: Recipe, then: dict[str, Any]) -> bool:
    """Whether an optimizer step has as many comparisons as it had: after running out of memory, say."""
    now = recipe.resolved()
    return math.prod(now[key] for key in ACCUMULATION) == math.prod(then[key] for key in ACCUMULATION)


# Which checkpoints there are to choose the best from.
CHOOSING = {"eval_strategy", "eval_steps", "save_strategy", "save_steps"}


def changed_keys(recipe: Recipe, run: Path) -> list[str]:
    """The keys in which a recipe differs from a run's, where that changes what is learnt."""
    now, then = recipe.resolved(), saved_values(run)
    without_effect = WITHOUT_EFFECT - (CHOOSING if recipe.training.load_best_model_at_end else set())
    return [key for key in now if key not in without_effect and now[key] != then.get(key)]


def load_data(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Split, Split, Leakage]:
    """The tokenizer, train and held-out comparisons with their token ids, cached, and the leakage.

    Raises:
        RecipeError: the base is unknown, or has fewer positions than `max_length`.
        DataError: the data cannot be used, or nothing is left of it.
    """
    training, data = recipe.training, recipe.data
    name, revision = str(recipe.model.model_name_or_path), recipe.model.model_revision
    config = tokenization.load_config(name, revision, training.trust_remote_code)
    tokenization.check_lengths(config, training.max_length, name)
    tokenizer = tokenization.load_tokenizer(
        name, revision, training.trust_remote_code, training.chat_template_path
    )
    if sft.sft_adapter(name, revision) is None:  # merging one makes embeddings for its tokens
        tokenization.check_vocabulary(config, tokenizer, name)
    settings = (tokenizer, training.max_length, data.truncation, training.dataset_num_proc)
    with main_process_first():
        train_split, test_split, leakage = load_splits(recipe)
        return tokenizer, tokenize(train_split, *settings), tokenize(test_split, *settings), leakage


def report_data(recipe: Recipe, train: Split, test: Split, leakage: Leakage) -> dict[str, Any] | None:
    """Prints the doctor's table and returns its report; None but on the main process."""
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
        model, new_modules = modeling.load_base(
            recipe.model, tokenizer, training.seed, training.trust_remote_code
        )
    model.config.rm_recipe = {
        "max_length": training.max_length,
        "truncation": recipe.data.truncation,
        "prefix_sharing": recipe.data.prefix_sharing,
    }
    return model, new_modules


def settle_step(recipe: Recipe, model: Any, new_modules: list[str], train_split: Split) -> Sharing:
    """What model and data decide of a step, and says so: whether prefixes are shared and, where the recipe
    leaves it open, `gradient_checkpointing`.
    """
    with whole_weights():  # of the small copy
        sharing = decide_sharing(
            model, recipe.data.prefix_sharing, recipe.training.max_length, recipe.training.device
        )
    say(f"prefix sharing: {'on' if sharing.used else 'off'} ({sharing.reason})")
    decide_checkpointing(recipe, model, new_modules, train_split, sharing.used)
    return sharing


def decide_checkpointing(
    recipe: Recipe, model: Any, new_modules: list[str], train_split: Split, shared: bool
) -> None:
    """Settles `gradient_checkpointing` by the memory plan, unless the recipe does."""
    if any(key in recipe.values for key in CHECKPOINTING):
        return
    training = recipe.training
    batch = train_split.longest(training.per_device_train_batch_size, shared)
    decision = memory.needs_checkpointing(
        model.config, recipe.model, training, new_modules, batch, shared=shared
    )
    needed, reason = broadcast_object_list([decision])[0]  # unequal devices must not decide differently
    for key in CHECKPOINTING:
        setattr(training, key, needed)
        recipe.values[key] = needed
    say(f"gradient checkpointing: {'on' if needed else 'off'} ({reason})")


def make_trainer(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    new_modules: list[str],
    train_split: Split,
    test_split: Split,
    sharing: Sharing,
) -> SharedPrefixRewardTrainer:
    """The trainer of what `load_model` gave, with LoRA if the recipe says so."""
    training = recipe.training
    if recipe.model.use_peft:
        half = training.bf16 or training.fp16
        model = adapters.add_lora(model, recipe.model, new_modules, autocast=half)
    was_there = recipe.output_dir.exists()
    trainer = SharedPrefixRewardTrainer(
        model=model,
        args=training,
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
    """`adapters.in_one_product`, except where the adapters' weights are sharded: it reads them whole."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return nullcontext()
    return adapters.in_one_product(trainer.model)


def early_signs_of(recipe: Recipe, ready: Ready) -> EarlySigns:
    """What watches a training."""
    training = recipe.training
    each = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    plain = training.center_rewards_coefficient is None and recipe.data.margin_column is None
    return EarlySigns(each, len(ready.test_split.comparisons), plain)


# --- after -----------------------------------------------------------------------------------


def save_model(
    trainer: SharedPrefixRewardTrainer,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    start: dict[str, torch.Tensor],
) -> None:
    """Writes `model/` (adapter or model, head, config, tokenizer) and reads it back.

    Raises:
        TrainingError: the head is missing from what was saved, or has not moved from `start`; or no adapter
            has learnt anything.
    """
    target = recipe.output_dir / "model"
    if not trainer.is_world_process_zero():
        trainer.save_model(str(target))  # takes part in gathering what is sharded
        return
    with whole_folder(target) as folder:
        trainer.save_model(str(folder))
        trainer.accelerator.unwrap_model(trainer.model).config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # It pickles the training arguments, a Hub token among them if there is one.
        (folder / "training_args.bin").unlink(missing_ok=True)
        check_saved_head(folder, start)
        untrained = adapters.untrained_layers(folder)
    if untrained:
        say(f"no gradient has reached the adapters of {', '.join(untrained)}")
