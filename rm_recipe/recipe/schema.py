"""The keys of a recipe: what they are called and what values they take.

Names and types are TRL's own (`RewardConfig`, `ModelConfig`) plus `DataArguments` and `HubArguments`.
"""

import dataclasses
import difflib
import enum
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

# TRL's name and transformers' new one, of which its Trainer reads only the second.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


# What `rm-recipe prepare offline` makes (tools/offline.py); named here for the hint that says so.
OFFLINE_MODEL = "models/smollm2-135m-instruct"
OFFLINE_ENCODER = "models/all-minilm-l6-v2"
OFFLINE_DATA = "data/offline"

MODEL_FILES = ("config.json", "adapter_config.json")  # of which a model folder has one
DATA_FORMATS = (".jsonl", ".json", ".parquet")  # of data files that can be read; each also with .gz

TEMPLATE_FORMATS = (".jinja", ".j2")  # of files with a chat template, as TRL has it

# Chosen anew on every machine unless the recipe says.
DEVICE_KEYS = ("use_cpu", "bf16", "fp16", "dtype", "dataloader_pin_memory")

# Every field of TRL's RewardConfig and ModelConfig does what it says or stands in one of the next two tables;
# tests/recipe/test_recipe_keys.py goes through them all.
REFUSED_KEYS = {
    "hub_token": "a token does not belong in a recipe; log in with `hf auth login` or set HF_TOKEN",
    "hub_strategy": "the proven export is uploaded once, at the end of `rm-recipe run`",
    "hub_always_push": "the proven export is uploaded once, at the end of `rm-recipe run`",
    "hub_revision": "the proven export goes to the main branch",
    "lora_task_type": "always SEQ_CLS here, which trains and saves the head",
    "resume_from_checkpoint": "use `train RECIPE --resume`",
    "model_init_kwargs": "use the recipe keys dtype, attn_implementation and model_revision",
    "remove_unused_columns": "the collator needs its columns",
    "pad_token": "chosen by rm_recipe so that it is never EOS, and saved with the model",
    "eos_token": "taken from the base model's tokenizer",
    "save_only_model": "a checkpoint without the optimizer's state could not be gone on from",
    "ignore_data_skip": "a resumed run meets the comparisons that are left, in the same order",
    "label_names": "a comparison has no label column",
    "streaming": "data sets are memory-mapped, which takes no memory either and can be shuffled",
    "parallelism_config": "set it in the file for `accelerate launch --config_file`",
    "do_train": "the verb says what is done: `rm-recipe train RECIPE`",
    "do_eval": "'eval_strategy: steps' evaluates while it trains, `rm-recipe evaluate RUN` afterwards",
    "do_predict": "`rm-recipe score MODEL` gives rewards",
    "local_rank": "`accelerate launch` sets it for each of its processes",
}

_NO_LOGITS = "metrics count comparisons in the loss, and no outputs are gathered; leave it out"
# The values that say what happens anyway, and why there is no other.
FIXED_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": (
        (0.0,),
        "the loss of a comparison has no labels to smooth; 'margin_column' says how sure a verdict is",
    ),
    "use_liger_kernel": (
        (False,),
        "it replaces the classifier's forward by a language model's; prefixes are shared and rows are not "
        "padded without it",
    ),
    "liger_kernel_config": ((None,), "'use_liger_kernel' is not for a reward model"),
    "pad_to_multiple_of": (("auto", None), "rows are not padded where prefixes are shared; leave it out"),
    "train_sampling_strategy": (
        ("random", "sequential"),
        "a comparison has no single length; 'prefix_sharing: auto' leaves no padding to save",
    ),
    "length_column_name": (("length",), "a comparison has no single length; leave it out"),
    "auto_find_batch_size": (
        (False,),
        "it would change how many comparisons make a step; `rm-recipe check RECIPE --plan` names a "
        "'per_device_train_batch_size' that fits and 'gradient_accumulation_steps' with it",
    ),
    "bf16_full_eval": ((False,), "evaluation computes as training does: 'bf16: true'"),
    "fp16_full_eval": ((False,), "evaluation computes as training does: 'fp16: true'"),
    "include_num_input_tokens_seen": (
        (False, "no"),
        "a mask over shared prefixes is no count of tokens; 'num_tokens' of the training log is one",
    ),
    "average_tokens_across_devices": ((True,), "the loss is a mean over comparisons, not over tokens"),
    "logging_nan_inf_filter": ((True,), "a loss that is not finite stops the training; leave it out"),
    "use_cache": ((False,), "a reward model reads a text once and generates nothing; leave it out"),
    "prediction_loss_only": ((False,), _NO_LOGITS),
    "eval_accumulation_steps": ((None,), _NO_LOGITS),
    "eval_do_concat_batches": ((True,), _NO_LOGITS),
    "eval_use_gather_object": ((False,), _NO_LOGITS),
    "include_for_metrics": (([],), _NO_LOGITS),
    "batch_eval_metrics": ((False,), _NO_LOGITS),
    "enable_jit_checkpoint": ((False,), "SIGTERM saves a checkpoint already, and `--resume` goes on from it"),
    "save_on_each_node": ((False,), "a run folder is one, on a disk that all nodes see: 'output_dir'"),
    "trust_remote_code": (
        (False,),
        "the export has to load with plain transformers, so a model with code of its own cannot be a base",
    ),
}

_LORA, _BITS = ("use_peft",), ("load_in_4bit",)
_LOOKS = ("eval_strategy", "early_stopping_patience", "load_best_model_at_end")
# What does nothing unless one of other keys asks for it: refused where none of these is in the recipe.
IDLE_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), _LORA),
    **dict.fromkeys(("lora_target_parameters", "lora_modules_to_save", "use_rslora", "use_dora"), _LORA),
    **dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), _BITS),
    **dict.fromkeys(("eval_steps", "eval_delay"), _LOOKS),
    **dict.fromkeys(("run_name", "project", "trackio_space_id", "trackio_bucket_id"), ("report_to",)),
    "trackio_static_space_id": ("report_to",),
    **dict.fromkeys(("hub_model_id", "hub_private_repo"), ("push_to_hub",)),
}


_BATCH = "'per_device_train_batch_size', times 'gradient_accumulation_steps' for a step"
# Names of older releases and of other tools (LLaMA-Factory, axolotl): what to write here.
FOREIGN_KEYS = {
    "torch_dtype": "'dtype'",
    "use_lora": "'use_peft'",
    "adapter": "'use_peft: true', and 'load_in_4bit: true' for QLoRA",
    "finetuning_type": "'use_peft: true', or false for all weights",
    "base_model": "'model_name_or_path'",
    "model": "'model_name_or_path'",
    "model_name": "'model_name_or_path'",
    "adapter_name_or_path": "'model_name_or_path', which may be an SFT adapter's folder",
    "tokenizer": "nothing: the tokenizer is the base model's",
    "tokenizer_name_or_path": "nothing: the tokenizer is the base model's",
    "template": "'chat_template_path': a template's file, or another model; else it is the base model's",
    "chat_template": "'chat_template_path': a template's file, or another model; else it is the base model's",
    "dataset": "'dataset_name'",
    "dataset_dir": "'dataset_name'",
    "dataset_config": "'dataset_subsets', or 'datasets' with a 'name' for each",
    "dataset_text_field": "nothing: columns are prompt, chosen and rejected, or as README lists them",
    "val_set_size": "'test_split_size', a share",
    "val_size": "'test_split_size', a share",
    "max_samples": "'max_train_samples' and 'max_eval_samples'",
    "preprocessing_num_workers": "'dataset_num_proc'",
    "dataset_processes": "'dataset_num_proc'",
    "cutoff_len": "'max_length'",
    "sequence_len": "'max_length'",
    "max_seq_length": "'max_length'",
    "model_max_length": "'max_length'",
    "packing": "nothing: rows are not padded where prefixes are shared",
    "sample_packing": "nothing: rows are not padded where prefixes are shared",
    "group_by_length": "nothing: rows are not padded where prefixes are shared",
    "batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "micro_batch_size": "'per_device_train_batch_size'",
    "eval_batch_size": "'per_device_eval_batch_size'",
    "epochs": "'num_train_epochs'",
    "num_epochs": "'num_train_epochs'",
    "lr": "'learning_rate'",
    "optimizer": "'optim'",
    "lr_scheduler": "'lr_scheduler_type'",
    "gradient_clipping": "'max_grad_norm'",
    "warmup_ratio": "'warmup_steps'; below 1 it is a share of all steps",
    "evaluation_strategy": "'eval_strategy'",
    "evals_per_epoch": "'eval_strategy: steps' and 'eval_steps'; below 1 they are a share of all steps",
    "saves_per_epoch": "'save_steps'; below 1 they are a share of all steps",
    "lora_rank": "'lora_r'",
    "lora_target": "'lora_target_modules'",
    "lora_target_linear": "'lora_target_modules: all-linear'",
    "additional_target": "'lora_modules_to_save'",
    "quantization_bit": "'load_in_4bit: true' or 'load_in_8bit: true'",
    "double_quantization": "'use_bnb_nested_quant'",
    "bnb_4bit_use_double_quant": "'use_bnb_nested_quant'",
    "bnb_4bit_compute_dtype": "'bf16' or 'fp16', which a quantised base computes in",
    "flash_attn": "'attn_implementation'",
    "flash_attention": "'attn_implementation'",
    **dict.fromkeys(
        ("flash_attention_2", "use_flash_attention_2"), "'attn_implementation: flash_attention_2'"
    ),
    "fp16_opt_level": "'fp16'",
    "no_cuda": "'use_cpu'",
    "logging_dir": "nothing: a tracker's own variable says it, TENSORBOARD_LOGGING_DIR for one",
    "wandb_project": "'report_to: wandb' and the variable WANDB_PROJECT",
    "use_wandb": "'report_to: wandb'",
    "save_safetensors": "nothing: weights are always saved as safetensors",
    "overwrite_output_dir": "`rm-recipe train RECIPE --overwrite`",
    "num_labels": "nothing: a reward model has one",
    "reward_model": "nothing: it is always one",
    "stage": "nothing: it is always a reward model",
}


@dataclass
class DataArguments:
    """The keys that TRL has no name for, and TRL's own for the data set."""

    dataset_name: str | None = None
    """A Hub id such as `Anthropic/hh-rlhf`, or a local folder, .jsonl, .json or .parquet (.gz too)."""

    dataset_subsets: list[str] | None = None
    """Folders of the data set (its `data_dir`), e.g. `[helpful-base, harmless-base]`."""

    dataset_revision: str | None = None
    """Branch, tag or commit of a Hub data set."""

    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    """The held-out split; must differ from the train split."""

    datasets: list[dict[str, Any]] | None = None
    """A mixture instead of `dataset_name`, as TRL's `DatasetMixtureConfig` has it: a list of `path`,
    `name`, `data_dir`, `data_files`, `split`, `columns`, `fraction`."""

    test_split_size: float | None = None
    """Share of the prompts to hold out of the train split, all comparisons of a prompt together;
    0.1 where a set has a train split only."""

    margin_column: str | None = None
    """How much better the chosen response is: a number to subtract from the reward difference in
    the loss (Llama 2, arXiv 2307.09288, section 3.2.2), or a category of `margin_map`. Rankings may
    have a number for each response: `scores`, say."""

    margin_map: dict[str | int, float] | None = None
    """Categories and their margins, e.g. `{significantly better: 1, better: 0.67, slightly better: 0.33}`."""

    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    """Comparisons to use: the first so many of a shuffle seeded with `seed`; all of them if empty."""

    truncation: Literal["drop_oldest_turns", "keep_end", "exclude"] = "drop_oldest_turns"
    """What happens to a conversation of more than `max_length` tokens. The reply is never cut."""

    leakage: Literal["error", "drop", "allow"] = "error"
    """Train prompts that are also held out: stop, remove them from train, or let them pass."""

    prefix_sharing: Literal["auto", "off"] = "auto"
    """Encode the prompt of a comparison once for all its responses, where that is exact."""

    early_stopping_patience: int | None = None
    """Evaluations without a better held-out accuracy after which training stops; the best checkpoint is
    kept. Sets what that needs: `load_best_model_at_end`, and an evaluation wherever a checkpoint is saved:
    every `save_steps`, ten times a run if it says nothing."""

    target_accuracy: float = 0.65
    gate_statistic: Literal["ci_low", "accuracy"] = "ci_low"
    """The gate: what held-out accuracy, or its interval's lower end, has to reach."""


@dataclass
class HubArguments:
    """TRL's names for where a model goes, which `rm-recipe run` reads and Trainer never sees.

    Trainer would upload checkpoints that nothing has proven.
    """

    push_to_hub: bool = False
    """Upload the export at the end of `rm-recipe run`, if it is proven and has passed its gate."""

    hub_model_id: str | None = None
    """Where to: USER/NAME."""

    hub_private_repo: bool | None = None
    """Make the repository private."""


@cache
def key_types() -> dict[str, tuple[Any, Any]]:
    """Every accepted key: its type and its choices (None where any value of the type will do)."""
    from trl import ModelConfig, RewardConfig

    types: dict[str, tuple[Any, Any]] = {}
    for part in (RewardConfig, ModelConfig, DataArguments, HubArguments):
        hints = typing.get_type_hints(part)
        for item in dataclasses.fields(part):
            if item.init:
                hint = hints[item.name]
                choices = item.metadata.get("choices") or _choices(hint)
                types[item.name] = (hint, list(choices) if choices else None)
    types["fsdp"] = (bool | str | None, None)  # as transformers takes it, and as a run's recipe has it
    return types


def _choices(hint: Any) -> list[str] | None:
    parts = typing.get_args(hint) if typing.get_origin(hint) is not Literal else (hint,)
    for part in parts or (hint,):
        if isinstance(part, type) and issubclass(part, enum.Enum):
            return [str(member.value) for member in part]
        if typing.get_origin(part) is Literal and hint is part:
            return [str(choice) for choice in typing.get_args(part)]
    return None


def check_value(key: str, value: Any, from_text: bool) -> tuple[str | None, Any]:
    """A fault or None, and the value in the key's type."""
    types = key_types()
    if key in REFUSED_KEYS:
        return f"key '{key}' is not for a recipe: {REFUSED_KEYS[key]}", None
    if key in FOREIGN_KEYS:
        return f"unknown key '{key}'. Here it is {FOREIGN_KEYS[key]}", None
    if key not in types:
        close = difflib.get_close_matches(key, types.keys() - REFUSED_KEYS.keys() - FIXED_KEYS.keys(), n=1)
        return f"unknown key '{key}'.{did_you_mean(close)}", None
    hint, choices = types[key]
    if from_text:
        value = _from_text(value, hint)
    if value is None:
        if type(None) in typing.get_args(hint):
            return None, None
        return f"'{key}' has no value; leave the line out for the default", None
    if choices and str(value) not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        return f"'{key}: {value}' is not one of {', '.join(choices)}.{did_you_mean(close)}", None
    if isinstance(value, str) and _takes_only_lists(hint):
        value = [part.strip() for part in value.split(",")]  # `all-linear`, or `q_proj,v_proj`
    if not fits(value, hint):
        return f"'{key}: {value}' should be {describe(hint)}", None
    parsed = _adapter(hint).validate_python(value)
    only, reason = FIXED_KEYS.get(key, ((parsed,), ""))
    if parsed not in only:
        return f"'{key}: {shown(parsed)}': {reason}", None
    return None, parsed


def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type; `true` and `false` are no numbers."""
    try:
        _adapter(hint).validate_python(value)
    except ValidationError:
        return False
    return not isinstance(value, bool) or bool in (hint, *typing.get_args(hint))


def shown(value: Any) -> Any:
    """A value as a recipe has it."""
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), value)


def did_you_mean(close: list[str]) -> str:
    """The nearest name as a question, nothing if none is near."""
    return f" Did you mean '{close[0]}'?" if close else ""


def _from_text(text: str, hint: Any) -> Any:
    """A command-line value: lists, mappings and null in YAML's notation, the rest as written."""
    if text.strip().lower() in ("null", "none", "~"):
        return None
    if {bool, str} <= set(typing.get_args(hint)) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lstrip().startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


def _takes_only_lists(hint: Any) -> bool:
    parts = typing.get_args(hint)
    return hint == list[str] or (list[str] in parts and str not in parts)


def describe(hint: Any) -> str:
    """A type in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    parts = [p for p in (typing.get_args(hint) or (hint,)) if p is not type(None)]
    if typing.get_origin(hint) in (list, dict):
        parts = [hint]
    described = [
        names.get(part) or ("a list" if typing.get_origin(part) is list else "a mapping")
        for part in parts
        if not (isinstance(part, type) and issubclass(part, enum.Enum))
    ]
    return " or ".join(dict.fromkeys(described))


def looks_local(name: str) -> bool:
    """Whether a name that does not exist was meant as a path: a Hub id is NAME or USER/NAME."""
    data_file = name.removesuffix(".gz").endswith(DATA_FORMATS)
    return data_file or name.startswith((".", "~", "/")) or name.count("/") > 1
