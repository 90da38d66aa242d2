"""A recipe: YAML plus command-line overrides, checked strictly and resolved for this machine.

Keys are flat and TRL's own wherever TRL has one (`RewardConfig`, `ModelConfig`); `DataArguments`
adds ours. TRL's parser drops unknown keys under `accelerate launch`, skips type and choice checks
for YAML values and lets the last of two duplicate keys win; here all three are refused, every
fault is found before the first is reported, and nothing is loaded before that.
"""

import dataclasses
import difflib
import enum
import typing
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rm_recipe.errors import RecipeError

if typing.TYPE_CHECKING:
    from trl import ModelConfig, RewardConfig

# What `rm-recipe prepare offline` makes (offline.py); named here for the hint that says so.
OFFLINE_MODEL = "models/smollm2-135m-instruct"
OFFLINE_DATA = "data/offline"

# Chosen anew on every machine unless the recipe says.
DEVICE_KEYS = ("use_cpu", "bf16", "fp16", "dataloader_pin_memory")

REFUSED_KEYS = {
    "hub_token": "a token does not belong in a recipe; log in with `hf auth login` or set HF_TOKEN",
    "push_to_hub": "training uploads nothing; upload the finished export with "
    "`hf upload USER/NAME outputs/NAME/export`",
    "hub_model_id": "training uploads nothing; name the repository in `hf upload`",
    "lora_task_type": "always SEQ_CLS here, which trains and saves the head",
    "resume_from_checkpoint": "use `train RECIPE --resume`",
    "model_init_kwargs": "use the recipe keys dtype, attn_implementation and model_revision",
    "remove_unused_columns": "the collator needs its columns",
    "pad_token": "chosen by rm_recipe so that it is never EOS, and saved with the model",
    "eos_token": "taken from the base model's tokenizer",
    "label_names": "a comparison has no label column",
    "parallelism_config": "set it in the file for `accelerate launch --config_file`",
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

    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    """Comparisons to use: the first so many of a shuffle seeded with `seed`; all of them if empty."""

    truncation: Literal["drop_oldest_turns", "keep_end", "exclude"] = "drop_oldest_turns"
    """What happens to a conversation of more than `max_length` tokens. The reply is never cut."""

    leakage: Literal["error", "drop", "allow"] = "error"
    """Train prompts that are also held out: stop, remove them from train, or let them pass."""

    prefix_sharing: Literal["auto", "off"] = "auto"
    """Encode the prompt of a comparison once for all its responses, where that is exact."""

    target_accuracy: float = 0.65
    gate_statistic: Literal["ci_low", "accuracy"] = "ci_low"
    """The gate: what held-out accuracy, or its interval's lower end, has to reach."""


@dataclass
class Recipe:
    """A parsed recipe; `values` holds every key that it or the device resolution gave a value."""

    path: Path
    values: dict[str, Any]
    training: "RewardConfig" = field(repr=False)
    model: "ModelConfig" = field(repr=False)
    data: DataArguments = field(repr=False)

    @property
    def output_dir(self) -> Path:
        """The run folder: `output_dir`, or `outputs/` and the recipe's file name."""
        return Path(self.training.output_dir)

    def resolved(self) -> dict[str, Any]:
        """Every accepted key with its value, in the order in which they are declared."""
        merged: dict[str, Any] = {}
        for part in (self.model, self.data, self.training):
            for item in dataclasses.fields(part):
                if item.init and item.name not in REFUSED_KEYS:
                    merged[item.name] = _plain(getattr(part, item.name))
        return merged

    def save(self, path: Path) -> None:
        """Writes the resolved recipe as YAML that `read_recipe` takes back."""
        header = f"# {self.path.name}, every key with the value it had\n"
        text = yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)
        path.write_text(header + text, encoding="utf-8")


def read_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_inputs: bool = True) -> Recipe:
    """Reads, checks and resolves a recipe.

    Args:
        path: the YAML file.
        overrides: `--key value` or `--key=value` strings; they win over the file.
        check_inputs: also require that local model and data paths exist.

    Raises:
        RecipeError: with every fault found, a line each.
    """
    path = Path(path)
    given, faults = _read_yaml(path)
    line_values, line_faults = _read_overrides(overrides)
    faults += line_faults
    values: dict[str, Any] = {}
    for source, items in ((str(path), given), ("command line", line_values)):
        for key, value in items.items():
            fault, parsed = _check_value(key, value, from_text=items is line_values)
            if fault:
                faults.append(f"{source}: {fault}")
                values.pop(key, None)
            else:
                values[key] = parsed
    faults += [f"{path}: {fault}" for fault in _cross_faults(values, given | line_values)]
    if check_inputs:
        faults += [f"{path}: {fault}" for fault in _input_faults(values)]
    if faults:
        raise RecipeError("\n".join(faults))
    values.setdefault("output_dir", f"outputs/{path.stem}")
    return _build(path, values)


def saved_values(run: Path) -> dict[str, Any]:
    """The resolved recipe that a run folder was made with.

    Raises:
        RecipeError: `run` is not a run folder.
    """
    path = run / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(f"{run} is not a run folder: it has no recipe.yaml")
    values, faults = _read_yaml(path)
    if faults:
        raise RecipeError("\n".join(faults))
    return values


def read_run_recipe(run: Path) -> Recipe:
    """The recipe of a finished or interrupted run, its device keys resolved for this machine.

    Raises:
        RecipeError: `run` is not a run folder.
    """
    values = {key: value for key, value in saved_values(run).items() if key not in DEVICE_KEYS}
    return _build(run / "recipe.yaml", values | {"output_dir": str(run)})


# --- reading ---------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; a key given twice is remembered as a fault instead of overwritten."""

    duplicates: list[str]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                line = key_node.start_mark.line + 1
                self.duplicates.append(f"line {line}: key '{key}' is given twice")
            elif isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The file's mapping and its faults; a file that is no recipe at all raises RecipeError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe{_nearest_recipe(path)}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        loader = _Loader(text)
        loader.duplicates = []
        content = loader.get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}{where}: not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise RecipeError(f"{path}: {found}; a recipe is a mapping of `key: value` lines")
    faults = [f"{path}, {fault}" for fault in loader.duplicates]
    return {str(key): value for key, value in content.items()}, faults


def _nearest_recipe(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.glob("*.yaml")]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f". Did you mean {path.parent / close[0]}?" if close else ""


def _read_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    values: dict[str, str] = {}
    faults: list[str] = []
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            faults.append(f"command line: '{word}' is not of the form --key value")
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            # A value may be a negative number; only `--` starts the next key.
            if not rest or rest[0].startswith("--"):
                faults.append(f"command line: --{key} has no value")
                continue
            value = rest.pop(0)
        key = key.replace("-", "_")
        if key in values:
            faults.append(f"command line: --{key} is given twice")
        values[key] = value
    return values, faults


# --- checking --------------------------------------------------------------------------------


@cache
def _key_types() -> dict[str, tuple[Any, Any]]:
    """Every accepted key: its type and its choices (None where any value of the type will do)."""
    from trl import ModelConfig, RewardConfig

    types: dict[str, tuple[Any, Any]] = {}
    for part in (RewardConfig, ModelConfig, DataArguments):
        hints = typing.get_type_hints(part)
        for item in dataclasses.fields(part):
            if item.init:
                hint = hints[item.name]
                choices = item.metadata.get("choices") or _choices(hint)
                types[item.name] = (hint, list(choices) if choices else None)
    return types


def _choices(hint: Any) -> list[str] | None:
    parts = typing.get_args(hint) if typing.get_origin(hint) is not Literal else (hint,)
    for part in parts or (hint,):
        if isinstance(part, type) and issubclass(part, enum.Enum):
            return [str(member.value) for member in part]
        if typing.get_origin(part) is Literal and hint is part:
            return [str(choice) for choice in typing.get_args(part)]
    return None


def _check_value(key: str, value: Any, from_text: bool) -> tuple[str | None, Any]:
    """A fault or None, and the value in the key's type."""
    types = _key_types()
    if key in REFUSED_KEYS:
        return f"key '{key}' is not for a recipe: {REFUSED_KEYS[key]}", None
    if key not in types:
        close = difflib.get_close_matches(key, types.keys() - REFUSED_KEYS.keys(), n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"unknown key '{key}'.{hint}", None
    hint, choices = types[key]
    if from_text:
        value = _from_text(value, hint)
    if value is None:
        if type(None) in typing.get_args(hint):
            return None, None
        return f"'{key}' has no value; leave the line out for the default", None
    if choices and str(value) not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        nearest = f" Did you mean '{close[0]}'?" if close else ""
        return f"'{key}: {value}' is not one of {', '.join(choices)}.{nearest}", None
    if isinstance(value, str) and _takes_only_lists(hint):
        value = [part.strip() for part in value.split(",")]  # `all-linear`, or `q_proj,v_proj`
    if isinstance(value, bool) and bool not in (hint, *typing.get_args(hint)):
        return f"'{key}: {value}' should be {_describe(hint)}", None
    try:
        return None, TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError:
        return f"'{key}: {value}' should be {_describe(hint)}", None


def _from_text(text: str, hint: Any) -> Any:
    """A command-line value: lists, mappings and null in YAML's notation, the rest as written."""
    if text.strip().lower() in ("null", "none", "~"):
        return None
    if text.lstrip().startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


def _takes_only_lists(hint: Any) -> bool:
    parts = typing.get_args(hint)
    return hint == list[str] or (list[str] in parts and str not in parts)


def _describe(hint: Any) -> str:
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


POSITIVE = (
    "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "max_length", "lora_r", "lora_alpha", "num_train_epochs",
    "max_train_samples", "max_eval_samples", "max_grad_norm",
)  # fmt: skip


def _cross_faults(values: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What is wrong between keys. `given` also has the keys whose values were faulty."""
    faults = [
        f"'{key}: {values[key]}' must be above 0"
        for key in POSITIVE
        if values.get(key) is not None and not values[key] > 0
    ]
    if not given.get("model_name_or_path"):
        faults.append("'model_name_or_path' is missing: the base model's folder or Hub id")
    if not given.get("dataset_name"):
        faults.append("'dataset_name' is missing: a file, a folder or a Hub id")
    defaults = DataArguments()
    train = values.get("dataset_train_split", defaults.dataset_train_split)
    if train == values.get("dataset_test_split", defaults.dataset_test_split):
        faults.append(f"'dataset_test_split: {train}' must differ from 'dataset_train_split'")
    if values.get("load_in_4bit") and values.get("load_in_8bit"):
        faults.append("'load_in_4bit' and 'load_in_8bit' cannot both be true")
    quantised = values.get("load_in_4bit") or values.get("load_in_8bit")
    if quantised and not values.get("use_peft"):
        faults.append("a quantised base cannot be trained in full: set 'use_peft: true'")
    if values.get("bf16") and values.get("fp16"):
        faults.append("'bf16' and 'fp16' cannot both be true; leave both out to let the device choose")
    if not 0.0 <= values.get("target_accuracy", 0.5) <= 1.0:
        faults.append(f"'target_accuracy: {values['target_accuracy']}' must lie between 0 and 1")
    return faults


def _input_faults(values: dict[str, Any]) -> list[str]:
    faults = []
    for key in ("model_name_or_path", "dataset_name"):
        name = values.get(key)
        if not name or Path(name).exists():
            continue
        if name in (OFFLINE_MODEL, OFFLINE_DATA):
            faults.append(f"'{key}: {name}' does not exist yet; run `rm-recipe prepare offline`")
        elif looks_local(name):
            faults.append(f"'{key}: {name}' does not exist")
    return faults


def looks_local(name: str) -> bool:
    """Whether a name that does not exist was meant as a path: a Hub id is NAME or USER/NAME."""
    data_file = name.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet"))
    return data_file or name.startswith((".", "~", "/")) or name.count("/") > 1


# --- resolving -------------------------------------------------------------------------------


def _build(path: Path, values: dict[str, Any]) -> Recipe:
    from trl import ModelConfig, RewardConfig

    values = values | _device_values(values)
    parts: list[Any] = []
    for part in (RewardConfig, ModelConfig, DataArguments):
        names = {item.name for item in dataclasses.fields(part) if item.init}
        try:
            parts.append(part(**{key: value for key, value in values.items() if key in names}))
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(f"{path}: {' '.join(str(error).split())}") from None
    training, model, data = parts[0], parts[1], parts[2]
    # Several visible GPUs without a launcher would mean nn.DataParallel, which TRL refuses;
    # one process trains on one GPU, `accelerate launch` on more.
    if training.n_gpu > 1:
        training._n_gpu = 1
    return Recipe(path, values, training, model, data)


def _device_values(values: dict[str, Any]) -> dict[str, Any]:
    """The keys that depend on the device, where the recipe leaves them open.

    They have to be settled before RewardConfig is made: it defaults to bf16 and raises on a
    machine without a bf16 GPU. A frozen base is loaded in the precision that it is computed in; a
    base that is trained in full keeps its weights in fp32.
    """
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    use_cpu = values.get("use_cpu", not accelerator)
    bf16, fp16 = values.get("bf16"), values.get("fp16", False)
    if bf16 is None and not fp16:
        bf16 = _cpu_has_bf16() if use_cpu else is_torch_bf16_gpu_available()
        fp16 = not bf16 and not use_cpu and torch.cuda.is_available()
    elif bf16 and not use_cpu and not is_torch_bf16_gpu_available():
        raise RecipeError("'bf16: true': this GPU has no bfloat16; leave 'bf16' out and fp16 is used")
    resolved = {"use_cpu": use_cpu, "bf16": bool(bf16), "fp16": bool(fp16)}
    if "dtype" not in values:
        half = "bfloat16" if bf16 else "float16" if fp16 else "float32"
        resolved["dtype"] = half if values.get("use_peft") else "float32"
    if use_cpu and "dataloader_pin_memory" not in values:
        resolved["dataloader_pin_memory"] = False
    if "report_to" not in values:
        resolved["report_to"] = "none"  # trackers are asked for, never found by chance
    if "disable_tqdm" not in values:
        resolved["disable_tqdm"] = False
    return resolved


def _cpu_has_bf16() -> bool:
    """Whether bf16 is native here (AMX or AVX512-BF16); elsewhere it is slower than fp32."""
    import torch

    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def _plain(value: Any) -> Any:
    """A value as YAML writes it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {k: _plain(v) for k, v in dataclasses.asdict(value).items()}
    return value
