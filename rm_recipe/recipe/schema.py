"""The keys of a recipe: what they are called and what values they take.

Names and types are TRL's own (`RewardConfig`, `ModelConfig`) plus `DataArguments` and `HubArguments`; one
pydantic model made of the four tells unknown keys, wrong types and wrong choices, all at once.
"""

import dataclasses
import difflib
import enum
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, create_model, field_validator

from rm_recipe.files import hide_secrets

# TRL's name and transformers' new one, of which its Trainer reads only the second.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")

# What `rm-recipe prepare offline` makes (tools/offline.py): base model, encoder, comparisons.
OFFLINE = ("models/smollm2-135m-instruct", "models/all-minilm-l6-v2", "data/offline")

MODEL_FILES = ("config.json", "adapter_config.json")  # of which a model folder has one
DATA_FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow")  # each also with .gz
TEMPLATE_FORMATS = (".jinja", ".j2")  # of files with a chat template, as TRL has it

# Chosen anew on every machine unless the recipe says.
DEVICE_KEYS = ("use_cpu", "bf16", "fp16", "dtype", "dataloader_pin_memory")


def table(text: str) -> dict[str, str]:
    """Read lines of `key key: what is said of them`."""
    rows = (line.split(": ", 1) for line in text.strip().splitlines())
    return {key: said for keys, said in rows for key in keys.split()}


# Every field of TRL's RewardConfig and ModelConfig does what it says or stands in one of the next two tables;
# tests/recipe/test_keys.py goes through them all.
REFUSED_KEYS = table("""
hub_token: a token does not belong in a recipe; log in with `hf auth login` or set HF_TOKEN
hub_strategy hub_always_push hub_revision: `rm-recipe run` uploads the proven export once, to the main branch
lora_task_type: always SEQ_CLS here, which trains and saves the head
resume_from_checkpoint: use `rm-recipe train RECIPE --resume`
model_init_kwargs: use the recipe keys dtype, attn_implementation and model_revision
remove_unused_columns: the collator needs its columns
pad_token eos_token: the tokenizer is the base model's, with another pad token where that would be EOS
save_only_model: training could not be resumed from a checkpoint without the optimizer's state
ignore_data_skip: a resumed run sees the comparisons that are left, in the same order
label_names: a comparison has no label column
streaming: data sets are memory-mapped, which takes no memory either and can be shuffled
parallelism_config: set it in the file for `accelerate launch --config_file`
accelerator_config: it changes what comparisons make a step; set 'per_device_train_batch_size'
do_train do_eval do_predict: the verb says it: `rm-recipe train`, `evaluate` or `score`
local_rank: `accelerate launch` sets it for each of its processes
""")
# Why a key takes TRL's default alone, which a run's recipe.yaml holds.
FIXED_KEYS = table("""
label_smoothing_factor: a comparison has no labels to smooth; 'margin_column' is for doubt
liger_kernel_config: `use_liger_kernel: true` takes those kernels that a classifier has a use for
pad_to_multiple_of: rows are not padded where prefixes are shared; leave it out
length_column_name: a comparison has no single length; leave it out
dataloader_drop_last: it would leave comparisons out, held-out ones too
auto_find_batch_size: it would change a step; `rm-recipe check RECIPE --plan` finds a batch size
bf16_full_eval fp16_full_eval: evaluation computes as training does: 'bf16' or 'fp16'
include_num_input_tokens_seen: the training log counts tokens as 'num_tokens'; leave it out
average_tokens_across_devices: the loss is a mean over comparisons, not over tokens
logging_nan_inf_filter: a loss that is not finite stops the training; leave it out
use_cache: a reward model reads a text once and generates nothing; leave it out
prediction_loss_only eval_accumulation_steps eval_do_concat_batches: metrics are counted as it goes
eval_use_gather_object include_for_metrics batch_eval_metrics: metrics are counted as it goes
enable_jit_checkpoint: SIGTERM saves a checkpoint already, and `--resume` goes on from it
save_on_each_node: a run folder is one, on a disk that all nodes see: 'output_dir'
trust_remote_code: the export has to load with plain transformers, without a model's code
""")
# Names of older releases and of other tools: what to write here.
FOREIGN_KEYS = table("""
torch_dtype: 'dtype'
use_lora adapter finetuning_type: 'use_peft: true', and 'load_in_4bit: true' for QLoRA
base_model model model_name: 'model_name_or_path'
dataset dataset_dir: 'dataset_name'
dataset_config: 'dataset_subsets', or 'datasets' with a 'name' for each
cutoff_len sequence_len max_seq_length: 'max_length'
packing sample_packing group_by_length: nothing: rows are not padded where prefixes are shared
batch_size train_batch_size micro_batch_size: 'per_device_train_batch_size' and 'gradient_accumulation_steps'
epochs: 'num_train_epochs'
lr: 'learning_rate'
warmup_ratio: 'warmup_steps'; below 1 it is a share of all steps
overwrite_output_dir: `rm-recipe train RECIPE --overwrite`
""")

GROUPED = "group_by_length"  # a value of `train_sampling_strategy`

# What `columns` can give a name to.
COLUMNS = "prompt history chosen rejected responses ranks scores verdict system tools subset"
_POSITIVE = """
learning_rate per_device_eval_batch_size gradient_accumulation_steps max_length comparisons_per_step lora_r
lora_alpha num_train_epochs max_train_samples max_eval_samples dataset_num_proc micro_batch_tokens
early_stopping_patience save_steps eval_steps logging_steps fraction
"""
# What torch's and transformers' checkpointing take.
_CHECKPOINTING = "use_reentrant preserve_rng_state determinism_check debug early_stop every_n_layers offload"
METRICS = "accuracy loss margin mean_reward ties"  # of a comparison, measured in training
# Which values of its type a key takes: keys, a test, and what a value that fails it is told.
_LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (_POSITIVE, lambda x: x > 0, "must be above 0"),
    ("per_device_train_batch_size", lambda x: x == "auto" or x > 0, "must be above 0, or auto"),
    ("seed data_seed", lambda x: 0 <= x < 2**32, f"must lie between 0 and {2**32 - 1}"),  # as NumPy's
    ("center_rewards_coefficient dataloader_num_workers weight_decay", lambda x: x >= 0, "must be 0 or more"),
    ("max_steps", lambda x: x > 0 or x == -1, "must be above 0; leave it out to train 'num_train_epochs'"),
    ("augmentation target_accuracy", lambda x: 0 <= x <= 1, "must lie between 0 and 1"),
    ("test_split_size", lambda x: 0 < x < 1, "must lie between 0 and 1"),
    ("save_total_limit", lambda x: x >= 2, "must be 2 or more: one is left where the newest is cut off"),
    ("margin_map", lambda x: min(x.values(), default=0) >= 0, "a margin below 0 would reward being wrong"),
    ("train_sampling_strategy", lambda x: x != "batch_rebalance", f"sorts rows of one text; take {GROUPED}"),
    (
        "columns",
        # A list is TRL's, of an entry of `datasets`.
        lambda x: isinstance(x, list) or (x.keys() <= {*COLUMNS.split()} and len({*x.values()}) == len(x)),
        f"should say which column is ours, as in 'prompt: question'; ours are {', '.join(COLUMNS.split())}",
    ),
    ("metric_for_best_model", lambda x: x.removeprefix("eval_") in METRICS.split(), f"is none of {METRICS}"),
    ("optim", lambda x: "lomo" not in x and "layerwise" not in x, "makes its steps in backward, unchecked"),
    (
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
        lambda x: isinstance(x, str) or x.keys() <= {*_CHECKPOINTING.split()},
        f"has a key that is none of {_CHECKPOINTING}",
    ),
)
LIMITS = {key: (within, limit) for keys, within, limit in _LIMITS for key in keys.split()}


@dataclass
class DataArguments:
    """The keys that TRL has no name for, and TRL's own for the data set."""

    # A Hub id such as `Anthropic/hh-rlhf`, or a local folder or file of `DATA_FORMATS` (.gz too).
    dataset_name: str | None = None
    # Folders of the data set (its `data_dir`), e.g. `[helpful-base, harmless-base]`.
    dataset_subsets: list[str] | None = None
    # Branch, tag or commit of a Hub data set.
    dataset_revision: str | None = None
    # The held-out split must differ from the train split.
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    # A mixture instead of `dataset_name`, as TRL's `DatasetMixtureConfig` has it: a list of `path`, `name`,
    # `data_dir`, `data_files`, `split`, `columns`, `fraction`.
    datasets: list[dict[str, Any]] | None = None
    # Comparisons of an optimizer step, over all processes; `gradient_accumulation_steps` follows. With
    # `per_device_train_batch_size: auto` micro-batches are as large as the device holds.
    comparisons_per_step: int | None = None
    # Tokens of a micro-batch, into which a batch is divided: it changes memory and speed, and no result. Left
    # out, a batch is divided where the device is too small for the largest one, and on a CPU by 2,048 tokens.
    micro_batch_tokens: int | None = None
    # Share of the prompts to hold out of the train split, all comparisons of a prompt together; 0.1 where a
    # set has a train split only.
    test_split_size: float | None = None
    # Names that the data set has for ours, e.g. `{prompt: question, chosen: best, rejected: worst}`; also
    # `history`, `responses`, `ranks`, `scores`, `system`, `tools`, `subset`. `verdict` names the one that
    # counts of several, `{verdict: safer_response_id}`, or that of any two replies, and after `=` what its
    # values mean: `{prompt: q, chosen: reply_a, rejected: reply_b, verdict: preferred=0/1}`. (In an entry of
    # `datasets`, `columns` is TRL's list.)
    columns: dict[str, str] | None = None
    # How much better the chosen response is: a number to subtract from the reward difference in the loss
    # (Llama 2, arXiv 2307.09288, section 3.2.2), or a category of `margin_map`. Rankings may have a number
    # for each response: `scores`, say.
    margin_column: str | None = None
    # Categories and their margins, e.g. `{significantly better: 1, better: 0.67, slightly better: 0.33}`.
    margin_map: dict[str | int, float] | None = None
    # Comparisons to use: the first so many of a shuffle seeded with `seed`; all of them if empty.
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    # What happens to a conversation of more than `max_length` tokens, or whose prompt has more than three
    # quarters of them. The reply is never cut.
    truncation: Literal["drop_oldest_turns", "keep_end", "exclude"] = "drop_oldest_turns"
    # Train prompts that are also held out: stop, remove them from train, or let them pass.
    leakage: Literal["error", "drop", "allow"] = "error"
    # What it goes by: the whole prompt, or its first question, which dialogues of several depths share.
    leakage_by: Literal["prompt", "first_turn"] = "prompt"
    # Share of the train comparisons that get copies of their replies, edited so that no reader would like
    # them better (`data/augmentation.py`): it makes such edits move rewards less, and a step longer.
    augmentation: float | None = None
    # Encode the prompt of a comparison once for all its responses, where that is exact.
    prefix_sharing: Literal["auto", "off"] = "auto"
    # Evaluations without a better held-out accuracy after which training stops; the best checkpoint is
    # kept. Sets what that needs: `load_best_model_at_end`, and an evaluation wherever a checkpoint is saved:
    # every `save_steps`, ten times a run if it says nothing.
    early_stopping_patience: int | None = None
    # The gate: what held-out accuracy, or its interval's lower end, has to reach.
    target_accuracy: float = 0.65
    gate_statistic: Literal["ci_low", "accuracy"] = "ci_low"


@dataclass
class HubArguments:
    """TRL's names for where a model goes, which `rm-recipe run` reads and Trainer never sees.

    Trainer would upload checkpoints that nothing has proven.
    """

    # Upload the export at the end of `rm-recipe run`, if it is proven and has passed its gate.
    push_to_hub: bool = False
    # Where to: USER/NAME.
    hub_model_id: str | None = None
    # Make the repository private.
    hub_private_repo: bool | None = None


class _Keys(BaseModel):
    """What every key is checked by, beyond its type."""

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Take a list from `a, b` and `fsdp: true` from the command line; `true` is no number."""
        hint = cls.model_fields[str(info.field_name)].annotation
        kinds = typing.get_args(hint) or (hint,)
        if isinstance(value, str) and list[str] in kinds and str not in kinds:
            return [part.strip() for part in value.split(",")]  # `all-linear`, or `q_proj,v_proj`
        if isinstance(value, str) and {bool, str} <= {*kinds} and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, dict):  # whose values are read as YAML 1.1 does
            return {k: v if v not in ("no", "off") else False for k, v in value.items()}
        if isinstance(value, bool) and bool not in kinds and {int, float} & {*kinds}:
            raise ValueError(" should be a number, not true or false")
        return value

    @field_validator("*")
    @classmethod
    def _allowed(cls, value: Any, info: ValidationInfo) -> Any:
        key = str(info.field_name)
        within, limit = LIMITS.get(key, (None, ""))
        if key in FIXED_KEYS and value not in (cls.model_fields[key].default, None):
            raise ValueError(f": {FIXED_KEYS[key]}")
        if within is not None and value is not None and not within(value):
            raise ValueError(f" {limit}")
        if hide_secrets(str(value)) != str(value):  # a run would keep and show it
            raise ValueError(" holds a token or a password; log in with `hf auth login` or set HF_TOKEN")
        return value


@cache
def recipe_keys() -> type[BaseModel]:
    """Make the pydantic model of every key that a recipe may have."""
    from trl import ModelConfig, RewardConfig

    parts = (RewardConfig, ModelConfig, DataArguments, HubArguments)
    # `fsdp: true` as transformers takes it, and as a run's recipe has it.
    hints = {"fsdp": bool | str | None, "per_device_train_batch_size": int | Literal["auto"]}
    return _model_of(*parts, **hints, datasets=list[entry_keys()] | None)  # type: ignore[misc]


@cache
def entry_keys() -> type[BaseModel]:
    """Make the pydantic model of an entry of `datasets`."""
    from trl.scripts.utils import DatasetConfig

    return _model_of(DatasetConfig)


def _model_of(*parts: Any, **hints: Any) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for part in parts:
        of_part = typing.get_type_hints(part)
        for item in dataclasses.fields(part):
            if item.init and item.name not in REFUSED_KEYS:
                hint = _with_choices(of_part[item.name], item.metadata.get("choices"))
                default = [] if item.default is dataclasses.MISSING else item.default
                fields[item.name] = (hints.get(item.name, hint), default)
    return create_model("Keys", __base__=_Keys, **fields)


def _with_choices(hint: Any, choices: Iterable[str] | None) -> Any:
    """The type with the values that the key takes, of an enumeration or from TRL's `choices`."""
    kinds = typing.get_args(hint)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            choices = [member.value for member in kind]
    if not choices:
        return hint
    literal = Literal[tuple(choices)]  # type: ignore[valid-type]
    return literal | None if type(None) in kinds else literal


def check_values(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Check keys and values as YAML has them.

    Returns:
        the values in their keys' types, without those at fault, and a line for each fault.
    """
    try:
        return recipe_keys().model_validate(given).model_dump(exclude_unset=True), []
    except ValidationError as error:
        found: dict[tuple[int | str, ...], list[Any]] = {}
        for item in error.errors(include_url=False):
            place = item["loc"][: 3 if item["loc"][0] == "datasets" else 1]
            found.setdefault(place, []).append(item)
        wrong = {place[0] for place in found}
        good, _ = check_values({key: value for key, value in given.items() if key not in wrong})
        return good, [_fault(place, items) for place, items in found.items()]


def never_null(keys: Iterable[str]) -> list[str]:
    """Those of the keys that a recipe may have, but not with null as their value."""
    known = recipe_keys().model_fields.keys()
    return [key for key in keys if key in known and check_values({key: None})[1]]


def _fault(place: tuple[int | str, ...], items: list[Any]) -> str:
    """A line on what is wrong at a place: a key, or (`datasets`, number, key)."""
    where, key, model = "", str(place[-1]), recipe_keys()
    if len(place) > 1:
        where, key, model = f"'datasets', entry {int(place[1]) + 1}: ", str(place[-1]), entry_keys()
    if items[0]["type"] == "extra_forbidden":
        return where + _unknown(key, model)
    reasons = [str(item.get("ctx", {}).get("error") or item["msg"].replace("Input", "")) for item in items]
    value = str(shown(items[0]["input"]))
    choices = re.findall(r"'([^']+)'", str(items[0].get("ctx", {}).get("expected", "")))
    close = did_you_mean(value, choices)
    reason = " or ".join(dict.fromkeys(reasons)) + (f".{close}" if close else "")
    return f"{where}'{key}: {hide_secrets(value)}'{reason}"


def _unknown(key: str, model: type[BaseModel]) -> str:
    if key in REFUSED_KEYS:
        return f"key '{key}' is not for a recipe: {REFUSED_KEYS[key]}"
    if key in FOREIGN_KEYS:
        return f"unknown key '{key}'. Here it is {FOREIGN_KEYS[key]}"
    return f"unknown key '{key}'.{did_you_mean(key, model.model_fields.keys() - FIXED_KEYS.keys())}"


def shown(value: Any) -> Any:
    """A value as a recipe has it."""
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), value)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The nearest of the names as a question, nothing if none is near."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def looks_local(name: str) -> bool:
    """Whether a name that does not exist was meant as a path: a Hub id is NAME or USER/NAME."""
    data_file = name.lower().removesuffix(".gz").endswith((*DATA_FORMATS, *TEMPLATE_FORMATS))
    return data_file or name.startswith((".", "~", "/")) or name.count("/") > 1
