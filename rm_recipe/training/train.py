"""Train a reward model: a base model and comparisons in, an adapter (or a model) with its head out.

    rm-recipe train recipes/smollm2_offline.yaml
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m rm_recipe train RECIPE

`train` reads in the order in which things happen; what it calls stands below it in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, set_seed

from rm_recipe.data import doctor, tokenization
from rm_recipe.data.augmentation import augment
from rm_recipe.data.dataset import Split
from rm_recipe.data.splits import load_splits, refuse_leakage
from rm_recipe.errors import RecipeError
from rm_recipe.files import whole_folder
from rm_recipe.model import head, kernels, lora, memory, reward_model
from rm_recipe.model.shared_prefix import TOKENS_ON_CPU, decide_sharing
from rm_recipe.model.tokenizer import check_vocabulary, load_tokenizer
from rm_recipe.processes import follow_log_level, main_process_first, say, wait_for_main_process, warn
from rm_recipe.recipe.reader import Recipe
from rm_recipe.recipe.relations import is_asked_for
from rm_recipe.recipe.schema import CHECKPOINTING, GROUPED
from rm_recipe.training.checkpoints import ended_well, not_written, open_run, remove_unread
from rm_recipe.training.preflight import preflight
from rm_recipe.training.trainer import SharedPrefixRewardTrainer


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
    follow_log_level(recipe.training)
    check_sharding(recipe)
    with open_run(recipe, resume=resume, overwrite=overwrite) as run:  # locked; which checkpoint
        tokenizer, train_split, test_split, leakage = load_data(recipe)  # parsed, tokenised, counted
        report = report_data(recipe, train_split, test_split, leakage)
        refuse_leakage(leakage)
        train_split = augment(recipe, tokenizer, train_split)  # edited replies, if the recipe says so
        model, modules_to_save = load_model(recipe, tokenizer)  # one label, fp32 head, 4 bits
        # LoRA, shared prefixes, gradient checkpointing
        trainer = make_trainer(recipe, tokenizer, model, modules_to_save, train_split, test_split)
        preflight(recipe, trainer)  # one step, undone; until here nothing is left behind
        run.begin(trainer, report)  # from here on the folder is this run's
        with ended_well(recipe, trainer), trainer.cheaper_adapters():
            trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
        save_model(recipe, trainer)  # and read the head back
        run.finish()
        end(trainer)


# --- before: data, model, trainer ------------------------------------------------------------


def check_sharding(recipe: Recipe) -> None:
    """Refuse FSDP or DeepSpeed that was asked for and would not be given.

    On a CPU, Accelerate (1.15) turns both into DDP without a word, and every process holds the whole model.

    Raises:
        RecipeError: naming what there is instead.
    """
    training, state = recipe.training, PartialState()
    on_gpus = state.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)
    engines = {
        "FSDP": (training.fsdp, on_gpus and state.num_processes > 1),
        "DeepSpeed": (training.deepspeed, state.distributed_type == DistributedType.DEEPSPEED),
    }
    for name, (key, given) in engines.items():
        if is_asked_for(name, key) and not given:
            here = f"here are {state.num_processes} process(es) on {state.device.type}"
            raise RecipeError(f"{name} was asked for and would not be given: it shards over GPUs, and {here}")


def load_data(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Split, Split, dict[str, Any]]:
    """The tokenizer, train and held-out comparisons with their token ids, cached, and the leakage.

    Raises:
        RecipeError: the base is unknown or `reward_model.check_base` refuses it.
        DataError: the data cannot be used, or nothing is left of it.
    """
    training, data = recipe.training, recipe.data
    name, revision = str(recipe.model.model_name_or_path), recipe.model.model_revision
    config = lora.load_config(name, revision)
    reward_model.check_base(config, recipe.model, training.max_length)
    tokenizer = load_tokenizer(name, revision, training.chat_template_path, of_base=True)
    if lora.sft_adapter(name, revision) is None:  # merging one makes embeddings for its tokens
        check_vocabulary(config, tokenizer, name)
    settings = (tokenizer, training.max_length, data.truncation, training.dataset_num_proc)
    with main_process_first():
        train_split, test_split, leakage = load_splits(recipe)
        train_split = tokenization.tokenize(train_split, *settings, alike=True)
        test_split = tokenization.tokenize(test_split, *settings)
    return tokenizer, train_split, test_split, leakage


def report_data(recipe: Recipe, train: Split, test: Split, leakage: dict[str, Any]) -> dict[str, Any] | None:
    """Print the doctor's table and return its report; None but on the main process, which speaks first."""
    report = None
    if PartialState().is_main_process:
        report = doctor.examine(recipe, train, test, leakage)
        doctor.print_report(report)
    wait_for_main_process()  # or another would end it before it has said what is wrong
    return report


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, list[str]]:
    """The base as a one-label classifier, and the modules that are new in it."""
    training = recipe.training
    set_seed(training.seed)
    if not recipe.model.use_peft:
        say("all weights are trained, so they are in fp32 whatever 'dtype' says")
    with whole_weights():
        model, modules_to_save = reward_model.load_base(recipe.model, tokenizer, training.seed)
    if training.use_liger_kernel:
        kernels.fuse(model)
    model.config.rm_recipe = {
        "max_length": training.max_length,
        "truncation": recipe.data.truncation,
        "prefix_sharing": recipe.data.prefix_sharing,
    }
    return model, modules_to_save


def make_trainer(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, model: Any, modules_to_save: list[str], *splits: Split
) -> SharedPrefixRewardTrainer:
    """The trainer of what `load_model` gave, with LoRA if the recipe says so.

    What model and data decide of a step is settled and said: whether prefixes are shared and, where the
    recipe leaves it open, `gradient_checkpointing`.

    Args:
        splits: tokenised, what is trained on and what is held out.
    """
    training = recipe.training
    with whole_weights():  # of the small copy
        sharing = decide_sharing(model, recipe.data.prefix_sharing, training.max_length, training.device)
    say(f"prefix sharing: {'on' if sharing.used else 'off'} ({sharing.reason})")
    decide_step(recipe, model, modules_to_save, splits[0], sharing.used)
    if sharing.used and training.train_sampling_strategy == GROUPED:
        raise RecipeError(f"'train_sampling_strategy: {GROUPED}' does nothing: shared rows need no padding")
    if not sharing.used and "train_sampling_strategy" not in recipe.values:  # rows are padded to the longest
        training.train_sampling_strategy = recipe.values["train_sampling_strategy"] = GROUPED
    if recipe.model.use_peft:
        half = training.bf16 or training.fp16
        model = lora.add_lora(model, recipe.model, modules_to_save, autocast=half)
    was_there = recipe.output_dir.exists()
    args = copy(training)
    args.chat_template_path = None  # the tokenizer has it; TRL would put the file's own text in its place
    args.use_liger_kernel = False  # `load_model` has done it; Trainer would put a language model's forward in
    args.save_total_limit = None  # `Run` removes older ones, once the newest is whole
    trainer = SharedPrefixRewardTrainer(model, args, tokenizer, splits, sharing, modules_to_save)
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # whose processes meet in each forward
        default = TOKENS_ON_CPU if training.device.type == "cpu" else None
        trainer.data_collator.budget = recipe.data.micro_batch_tokens or default
    if recipe.data.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(recipe.data.early_stopping_patience))
    if not was_there and args.should_save:  # Trainer has made it, and nothing is trained yet
        recipe.output_dir.rmdir()
    return trainer


def decide_step(
    recipe: Recipe, model: Any, modules_to_save: list[str], split: Split, shared: bool, divide: bool = True
) -> None:
    """Settle `gradient_checkpointing` and `micro_batch_tokens` by the memory plan, unless the recipe does.

    Checkpointing makes a step about a third slower, dividing a batch hardly; so it is used where not even the
    longest comparison fits without, and where nothing is known.

    Args:
        divide: take micro-batches where whole batches do not fit; stock TRL cannot.
    """
    if any(key in recipe.values for key in CHECKPOINTING):
        return
    training, on_cpu = recipe.training, recipe.training.device.type == "cpu"
    parts = (model.config, recipe, modules_to_save, lambda n: split.longest(n, shared))
    where = {"device": training.device, "memory_bytes": memory.device_memory(training.device)}
    checkpointing, tokens = True, None
    try:
        found = memory.fit(*parts, shared=shared, **where, larger=False, divide=divide)
        checkpointing, reason = found.checkpointing, str(found)
        if divide and found.largest < min(training.per_device_train_batch_size, len(split.comparisons)):
            sizes = np.sort(split.sizes(shared, padded=not shared))[-max(found.largest, 1) :]
            tokens = int(sizes.sum() if shared else len(sizes) * sizes[-1])
            tokens = min(tokens, TOKENS_ON_CPU) if on_cpu else tokens
    except RecipeError as error:
        reason = str(error)
    # Unequal devices must not decide differently.
    checkpointing, tokens, reason = broadcast_object_list([checkpointing, tokens, reason])
    for key in CHECKPOINTING:
        setattr(training, key, checkpointing)
        recipe.values[key] = checkpointing
    tokens = recipe.data.micro_batch_tokens = recipe.values.setdefault("micro_batch_tokens", tokens)
    divided = f", micro-batches of up to {tokens} tokens" if tokens else ""
    say(f"gradient checkpointing: {'on' if checkpointing else 'off'}{divided} ({reason})")


@contextmanager
def whole_weights() -> Iterator[None]:
    """Within it, each process loads a model whole, also under DeepSpeed's ZeRO-3, which shards it later.

    transformers would shard it while loading: then it takes no `device_map`, and a head that is put in
    or drawn would be an empty tensor.
    """
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


# --- after -----------------------------------------------------------------------------------


def save_model(recipe: Recipe, trainer: SharedPrefixRewardTrainer) -> None:
    """Write `model/` (adapter or model, head, config, tokenizer) and read it back.

    Raises:
        TrainingError: it cannot be written; the head is missing from what was saved, or has not moved; or
            no adapter has learnt anything.
    """
    target = recipe.output_dir / "model"
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        trainer.save_model(str(target))  # takes part in gathering what is sharded
        return
    try:
        with whole_folder(target) as folder:
            trainer.save_model(str(folder))
            trainer.accelerator.unwrap_model(trainer.model).config.save_pretrained(folder)
            remove_unread(folder)
            head.check_saved_head(folder, trainer.initial_head)
            untrained = lora.untrained_layers(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # each names a full disk in its own way
        raise not_written(target, error) from error
    if untrained:
        warn(f"no gradient has reached the adapters of {', '.join(untrained)}")


def end(trainer: Any) -> None:
    """End the process group, and before it all else that holds it.

    DDP does. Freed as the last of its owners, it joins gloo's thread (torch 2.13) without giving up Python's
    lock, which that thread may need to let go of its last tensor: a process that has done everything would
    never end. `destroy_process_group` gives the lock up.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    memory.free_unused()
    trainer.end()
