"""A recipe: YAML plus command-line overrides, checked strictly and resolved for this machine.

TRL's parser drops unknown keys under `accelerate launch`, skips type and choice checks for YAML
values and lets the last of two duplicate keys win. Here all three are refused, every fault is found
before the first is reported, and nothing is loaded before that.
"""

import dataclasses
import difflib
import enum
import math
import typing
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rm_recipe.errors import RecipeError, one_line
from rm_recipe.files import expanded, hide_secrets, whole_file, with_tilde
from rm_recipe.recipe.schema import (
    DEVICE_KEYS,
    FIXED_KEYS,
    IDLE_KEYS,
    MODEL_FILES,
    OFFLINE_DATA,
    OFFLINE_ENCODER,
    OFFLINE_MODEL,
    REFUSED_KEYS,
    TEMPLATE_FORMATS,
    DataArguments,
    HubArguments,
    check_value,
    describe,
    did_you_mean,
    fits,
    looks_local,
    shown,
)
from rm_recipe.recipe.weights import pickle_fault

if typing.TYPE_CHECKING:
    from trl import ModelConfig, RewardConfig


RUN_RECIPE = "recipe.yaml"
LOOKS = 0.1  # of all steps, after which the best checkpoint is looked for where the recipe says nothing
RUN_HEADER = ", every key with the value it had"  # what tells a run's recipe.yaml from a user's


@dataclass
class Recipe:
    """A parsed recipe; `values` holds every key that it or the device resolution gave a value.

    `notes` are for whoever trains by it: what it says and training does not do.
    """

    path: Path
    values: dict[str, Any]
    training: "RewardConfig" = field(repr=False)
    model: "ModelConfig" = field(repr=False)
    data: DataArguments = field(repr=False)
    hub: HubArguments = field(repr=False, default_factory=HubArguments)
    notes: list[str] = field(repr=False, default_factory=list)

    @property
    def output_dir(self) -> Path:
        """The run folder: `output_dir`, or `outputs/` and the recipe's file name."""
        return Path(self.training.output_dir)

    def resolved(self) -> dict[str, Any]:
        """Every accepted key with its value, in the order in which they are declared."""
        merged: dict[str, Any] = {}
        for part in (self.model, self.data, self.hub, self.training):
            for item in dataclasses.fields(part):
                if item.init and item.name not in (REFUSED_KEYS.keys() | merged.keys()):
                    merged[item.name] = _plain(getattr(part, item.name))
        return merged

    def save(self, path: Path) -> None:
        """Writes the resolved recipe as YAML that `read_recipe` takes back, the home folder as `~`."""
        save_values(path, self.resolved(), f"# {self.path.name}{RUN_HEADER}\n")


def save_values(path: Path, values: dict[str, Any], header: str = "") -> None:
    """Writes a run's recipe; without a `header`, under the one that is there."""
    if not header:
        with path.open(encoding="utf-8") as file:
            header = file.readline()
    text = yaml.safe_dump(with_tilde(values), sort_keys=False, allow_unicode=True)
    with whole_file(path) as partial:
        partial.write_text(header + text, encoding="utf-8")


def shipped(folder: str) -> Path:
    """The project's `recipes` or `accelerate_configs`: in the installed package, else beside its source."""
    package = Path(__file__).parent.parent
    return package / folder if (package / folder).is_dir() else package.parent / folder


def find_recipe(path: Path) -> Path:
    """The path; where there is nothing, the shipped recipe that `NAME.yaml` or `recipes/NAME.yaml` names."""
    ours = shipped("recipes") / path.name
    named = path.parent in (Path(), Path("recipes"))
    return ours if named and not path.exists() and ours.is_file() else path


def read_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_inputs: bool = True) -> Recipe:
    """Reads, checks and resolves a recipe.

    Args:
        path: the YAML file, or the name of a shipped one.
        overrides: `--key value` or `--key=value` strings; they win over the file.
        check_inputs: also require that local model and data paths exist.

    Raises:
        RecipeError: with every fault found, a line each.
    """
    path = find_recipe(Path(path))
    given, faults = _read_yaml(path)
    notes: list[str] = []
    if is_resolved(path):
        given, notes = _of_today(given)
    line_values, line_faults = _read_overrides(overrides)
    faults += line_faults
    values: dict[str, Any] = {}
    for source, items in ((str(path), given), ("command line", line_values)):
        for key, value in items.items():
            fault, parsed = check_value(key, value, from_text=items is line_values)
            if not fault and hide_secrets(parsed) != parsed:  # a run would keep and show it
                fault = f"'{key}' holds a token or a password; log in with `hf auth login` or set HF_TOKEN"
            if fault:
                faults.append(f"{source}: {fault}")
                values.pop(key, None)
            else:
                values[key] = expanded(parsed)
    faults += [f"{path}: {fault}" for fault in cross_faults(values, given | line_values)]
    if check_inputs:
        faults += [f"{path}: {fault}" for fault in input_faults(values)]
    if faults:
        raise RecipeError("\n".join(faults))
    values.setdefault("output_dir", f"outputs/{path.stem}")
    recipe = _build(path, values)
    recipe.notes += notes
    faults = [f"{path}: {fault}" for fault in build_faults(recipe.training, recipe.model)]
    if faults:
        raise RecipeError("\n".join(faults))
    return recipe


def is_run_folder(folder: Path) -> bool:
    """Whether a run was started in this folder: its recipe.yaml is one that `Recipe.save` wrote."""
    path = folder / RUN_RECIPE
    return path.is_file() and is_resolved(path)


def is_resolved(path: Path) -> bool:
    """Whether a recipe is one that `Recipe.save` wrote, wherever it was copied since."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip().endswith(RUN_HEADER)


def saved_values(run: Path) -> dict[str, Any]:
    """The resolved recipe that a run folder was made with.

    Raises:
        RecipeError: `run` is not a run folder.
    """
    if not is_run_folder(run):
        raise RecipeError(f"{run} is not a run folder: it has no recipe.yaml of a run")
    values, faults = _read_yaml(run / RUN_RECIPE)
    if faults:
        raise RecipeError("\n".join(faults))
    return expanded(values) | _true_values(values)  # older code recorded what was asked for


def read_run_recipe(run: Path) -> Recipe:
    """The recipe of a finished or interrupted run, its device keys resolved for this machine.

    Raises:
        RecipeError: `run` is not a run folder.
    """
    values = {key: value for key, value in saved_values(run).items() if key not in DEVICE_KEYS}
    return _build(run / RUN_RECIPE, values | {"output_dir": str(run)})


# --- reading ---------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; a key given twice is remembered as a fault instead of overwritten."""

    duplicates: list[str]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """PyYAML's own, after a look at the keys."""
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
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        OverflowError,
    ) as error:  # a date in month 13, `!!int x`
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
    there = {p.name: p for folder in (shipped("recipes"), path.parent) for p in folder.glob("*.yaml")}
    close = difflib.get_close_matches(path.name, there, n=1)
    return f". Did you mean {there[close[0]]}?" if close else ""


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


# --- resolving -------------------------------------------------------------------------------


def _build(path: Path, values: dict[str, Any]) -> Recipe:
    from trl import ModelConfig, RewardConfig

    asked = values.get("dtype", "float32")
    values = _best_values(values) | values | _device_values(values) | _true_values(values)
    parts: list[Any] = []
    of_hub = {item.name for item in dataclasses.fields(HubArguments)}
    for part in (RewardConfig, ModelConfig, DataArguments, HubArguments):
        names = {item.name for item in dataclasses.fields(part) if item.init}
        names -= of_hub if part is not HubArguments else set()
        try:
            parts.append(part(**{key: value for key, value in values.items() if key in names}))
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise RecipeError(f"{path}: {' '.join(str(error).split())}") from None
    training, model, data, hub = parts
    # Several visible GPUs without a launcher would mean nn.DataParallel, which TRL refuses;
    # one process trains on one GPU, `accelerate launch` on more.
    if training.n_gpu > 1:
        training._n_gpu = 1
    notes = []
    if asked != "float32" and not values.get("use_peft"):
        notes.append(f"dtype: float32, not {asked}: weights that are trained in full are kept in fp32")
    return Recipe(path, values, training, model, data, hub, notes)


def _device_values(values: dict[str, Any]) -> dict[str, Any]:
    """The keys that depend on the device, where the recipe leaves them open.

    They have to be settled before RewardConfig is made: it defaults to bf16 and raises on a
    machine without a bf16 GPU. A frozen base is loaded in the precision that it is computed in; a
    base that is trained in full keeps its weights in fp32.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    use_cpu = values.get("use_cpu", accelerator is None)
    bf16, fp16 = values.get("bf16"), values.get("fp16", False)
    if bf16 is None and not fp16:
        bf16 = _cpu_has_bf16() if use_cpu else _gpu_has_bf16()
        fp16 = not (bf16 or use_cpu or accelerator is None or accelerator.type == "mps")
    elif fp16 and use_cpu:
        raise RecipeError("'fp16: true': a CPU computes in bf16 or fp32; leave 'fp16' out")
    elif bf16 and not use_cpu and not _gpu_has_bf16():
        raise RecipeError("'bf16: true': this GPU has no bfloat16; leave 'bf16' out and fp16 is used")
    resolved = {"use_cpu": use_cpu, "bf16": bool(bf16), "fp16": bool(fp16)}
    quantised = values.get("load_in_4bit") or values.get("load_in_8bit")
    if "dtype" not in values or (quantised and values["dtype"] == "auto"):  # it computes in this one
        half = "bfloat16" if bf16 else "float16" if fp16 else "float32"
        resolved["dtype"] = half if values.get("use_peft") else "float32"
    if use_cpu and "dataloader_pin_memory" not in values:
        resolved["dataloader_pin_memory"] = False
    if values.get("report_to") is None:
        resolved["report_to"] = "none"  # trackers are asked for, never found by chance
    if "disable_tqdm" not in values:
        resolved["disable_tqdm"] = False
    return resolved


def _best_values(values: dict[str, Any]) -> dict[str, Any]:
    """What keeping the best checkpoint needs of Trainer: to look where it saves, and nowhere else."""
    patience = values.get("early_stopping_patience")
    if not (patience or values.get("load_best_model_at_end")):
        return {}
    saved = values.get("save_strategy")
    strategy = values.get("eval_strategy") or ("steps" if saved in (None, "best") else saved)
    resolved = {"eval_strategy": strategy, "save_strategy": strategy}
    if strategy == "steps":
        # Trainer would look at every `logging_steps`, save at every 500, and know no best checkpoint.
        often = values.get("save_steps") or values.get("eval_steps") or LOOKS
        resolved |= {"eval_steps": often, "save_steps": often}
    if patience:
        resolved |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_accuracy",
            "restore_callback_states_from_checkpoint": True,  # how many evaluations were no better
        }
    return resolved


def _true_values(values: dict[str, Any]) -> dict[str, Any]:
    """What is so whatever a recipe says of it.

    TRL's `disable_dropout` leaves the adapters no dropout, and what is trained in full is fp32.
    """
    found: dict[str, Any] = {"lora_dropout": 0.0} if values.get("disable_dropout", True) else {}
    return found if values.get("use_peft") else found | {"dtype": "float32"}


def _of_today(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A resolved recipe without what older code let into it, and notes of what it said that does nothing."""
    dropped = {
        key: reason for key, (only, reason) in FIXED_KEYS.items() if key in values and values[key] not in only
    }
    kept = {key: value for key, value in values.items() if key not in REFUSED_KEYS.keys() | dropped.keys()}
    notes = [f"'{key}: {shown(values[key])}' is left out: {reason}" for key, reason in dropped.items()]
    return kept | _true_values(kept), notes


def _gpu_has_bf16() -> bool:
    """Whether bf16 is native on the GPU; torch also says yes where it is emulated, as on a T4."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(is_torch_bf16_gpu_available())


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


# --- faults: what is missing, out of range, in contradiction or not there ----------------------
# Every check returns its faults as text; `recipe.read_recipe` collects them all.


POSITIVE = (
    "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "max_length", "lora_r", "lora_alpha", "num_train_epochs",
    "max_train_samples", "max_eval_samples", "dataset_num_proc", "early_stopping_patience",
    "save_steps", "eval_steps", "logging_steps",
)  # fmt: skip

# What the best checkpoint cannot be known with, and what early stopping cannot.
BEST_FORBIDS = {"eval_strategy": ("no",), "save_strategy": ("no",)}
EARLY_STOPPING_FORBIDS = BEST_FORBIDS | {"save_strategy": ("no", "best"), "load_best_model_at_end": (False,)}


LARGEST_SEED = 2**32 - 1  # NumPy takes no larger one
METRICS = ("accuracy", "loss", "margin", "mean_reward", "ties")  # of a comparison, which training measures
BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that follow one
WITHOUT_WARMUP = ("constant", *BY_METRIC)
WITHOUT_KWARGS = ("constant", "constant_with_warmup")
# Their packages, where these are called otherwise.
TRACKER_PACKAGES = {"azure_ml": "azureml-core", "flyte": "flytekit", "kubeflow": "kubeflow"}
# What torch's and transformers' checkpointing take.
CHECKPOINTING_KWARGS = {
    "use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "every_n_layers",
    "offload",
}  # fmt: skip
FUSED_INTO_BACKWARD = ("lomo", "adalomo", "layerwise")  # optimizers, by parts of their names


def cross_faults(values: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What is missing, out of range or in contradiction.

    Args:
        given: has the faulty keys too.
    """
    faults = [
        f"'{key}: {values[key]}' must be above 0"
        for key in POSITIVE
        if values.get(key) is not None and not values[key] > 0
    ]
    if not given.get("model_name_or_path"):
        faults.append("'model_name_or_path' is missing: the base model's folder or Hub id")
    if not given.get("dataset_name") and not given.get("datasets"):
        faults.append("'dataset_name' is missing: a file, a folder or a Hub id")
    faults += mixture_faults(values)
    if any(margin < 0 for margin in (values.get("margin_map") or {}).values()):
        faults.append("'margin_map': a margin below 0 would reward being wrong")
    if values.get("margin_map") and not values.get("margin_column"):
        faults.append("'margin_map' needs a 'margin_column' that holds its categories")
    size = values.get("test_split_size")
    if size is not None and not 0.0 < size < 1.0:
        faults.append(f"'test_split_size: {size}' must lie between 0 and 1")
    defaults = DataArguments()
    train = values.get("dataset_train_split", defaults.dataset_train_split)
    if train == values.get("dataset_test_split", defaults.dataset_test_split):
        faults.append(f"'dataset_test_split: {train}' must differ from 'dataset_train_split'")
    if values.get("load_in_4bit") and values.get("load_in_8bit"):
        faults.append("'load_in_4bit' and 'load_in_8bit' cannot both be true")
    quantised = values.get("load_in_4bit") or values.get("load_in_8bit")
    if quantised and not values.get("use_peft"):
        faults.append("a quantised base cannot be trained in full: set 'use_peft: true'")
    if values.get("push_to_hub") and not values.get("hub_model_id"):
        faults.append("'push_to_hub: true' needs a 'hub_model_id: USER/NAME' to push to")
    if values.get("load_in_8bit") and values.get("use_dora"):
        faults.append(
            "'use_dora' reads weights that bitsandbytes 0.50 does not give in 8 bits: 'load_in_4bit'"
        )
    limit = values.get("save_total_limit")
    if limit is not None and limit < 2:
        faults.append(
            f"'save_total_limit: {limit}' must be 2 or more: the older checkpoint is what is left where the "
            "newer one is cut off"
        )
    if values.get("bf16") and values.get("fp16"):
        faults.append("'bf16' and 'fp16' cannot both be true; leave both out to let the device choose")
    if not 0.0 <= values.get("target_accuracy", 0.5) <= 1.0:
        faults.append(f"'target_accuracy: {values['target_accuracy']}' must lie between 0 and 1")
    return [
        *faults,
        *idle_faults(values),
        *number_faults(values),
        *best_faults(values),
        *schedule_faults(values),
        *tracker_faults(values),
    ]


def idle_faults(values: dict[str, Any]) -> list[str]:
    """Keys that would do nothing, as what they belong to is not asked for."""
    faults = [
        f"'{key}' does nothing without '{needed[0]}': set that, or leave '{key}' out"
        for key, needed in IDLE_KEYS.items()
        if values.get(key) is not None and not any(name in values for name in needed)
    ]
    dropout = values.get("lora_dropout")
    if dropout and values.get("disable_dropout", True):
        faults.append(
            f"'lora_dropout: {dropout}' would be switched off by 'disable_dropout', which TRL has on: set "
            "'disable_dropout: false', or leave 'lora_dropout' out"
        )
    if values.get("neftune_noise_alpha") and values.get("prefix_sharing") != "off":
        faults.append(
            "'neftune_noise_alpha' scales its noise by the length of a row, and where prefixes are shared a "
            "row holds several replies: set 'prefix_sharing: off'"
        )
    old, new = (values.get(f"{kind}_checkpointing") for kind in ("gradient", "activation"))
    if None not in (old, new) and old != new:
        faults.append("'gradient_checkpointing' and 'activation_checkpointing' are one thing, by two names")
    for kind in ("gradient", "activation"):
        kwargs = values.get(f"{kind}_checkpointing_kwargs")
        unknown = kwargs.keys() - CHECKPOINTING_KWARGS if isinstance(kwargs, dict) else ()
        faults += [f"'{kind}_checkpointing_kwargs': unknown key '{key}'" for key in sorted(map(str, unknown))]
    dealing = values.get("accelerator_config")
    for key in ("split_batches", "dispatch_batches"):
        if isinstance(dealing, dict) and dealing.get(key):
            faults.append(
                f"'accelerator_config': '{key}: true' would change how many comparisons make a step; set "
                "'per_device_train_batch_size'"
            )
    return faults


def number_faults(values: dict[str, Any]) -> list[str]:
    """Numbers out of range, other than those that have to be above 0."""
    faults = [
        f"'{key}: {values[key]}' must lie between 0 and {LARGEST_SEED}"
        for key in ("seed", "data_seed")
        if values.get(key) is not None and not 0 <= values[key] <= LARGEST_SEED
    ]
    steps = values.get("max_steps", -1)
    if steps != -1 and not steps > 0:
        faults.append(f"'max_steps: {steps}' must be above 0; leave it out to train 'num_train_epochs'")
    centering = values.get("center_rewards_coefficient")
    if centering is not None and not centering >= 0:
        faults.append(f"'center_rewards_coefficient: {centering}' must not be below 0")
    return faults


def best_faults(values: dict[str, Any]) -> list[str]:
    """What keeps the best checkpoint from being known, or from being there."""
    by_best = values.get("save_strategy") == "best"
    keeps = values.get("early_stopping_patience") or values.get("load_best_model_at_end")
    metric = values.get("metric_for_best_model")
    faults = []
    if keeps:
        patience = values.get("early_stopping_patience")
        keeper = "early_stopping_patience" if patience else "load_best_model_at_end"
        forbids = EARLY_STOPPING_FORBIDS if patience else BEST_FORBIDS
        faults += [
            f"'{keeper}' needs what '{key}: {values[key]}' forbids; leave that out"
            for key, forbidding in forbids.items()
            if values.get(key) in forbidding
        ]
    if not (keeps or by_best or values.get("lr_scheduler_type") in BY_METRIC):
        faults += [
            f"'{key}' does nothing without 'load_best_model_at_end: true' or 'early_stopping_patience'"
            for key in ("metric_for_best_model", "greater_is_better")
            if values.get(key) is not None
        ]
    if metric is not None and metric.removeprefix("eval_") not in METRICS:
        close = difflib.get_close_matches(metric.removeprefix("eval_"), METRICS, n=1)
        faults.append(
            f"'metric_for_best_model: {metric}' is not measured in training; {', '.join(METRICS)} are."
            + did_you_mean(close)
        )
    if by_best and not values.get("early_stopping_patience"):
        if metric is None:
            faults.append("'save_strategy: best' needs a 'metric_for_best_model', accuracy for one")
        if values.get("eval_strategy", "no" if not keeps else "steps") == "no":
            faults.append("'save_strategy: best' needs evaluations to choose by: 'eval_strategy: steps'")
    saves, looks = values.get("save_steps"), values.get("eval_steps")
    strategies = {values.get(f"{kind}_strategy", "steps") for kind in ("save", "eval")}
    if keeps and strategies == {"steps"} and None not in (saves, looks) and saves != looks:
        faults.append(
            f"the best checkpoint is known where it is evaluated and saved at once: 'eval_steps: {looks}' "
            f"must equal 'save_steps: {saves}', or leave it out"
        )
    return faults


def schedule_faults(values: dict[str, Any]) -> list[str]:
    """What a schedule of the learning rate would ignore."""
    name = values.get("lr_scheduler_type")
    faults = []
    if values.get("warmup_steps") and name in WITHOUT_WARMUP:
        faults.append(
            f"'warmup_steps' does nothing with 'lr_scheduler_type: {name}'; 'constant_with_warmup' warms up"
        )
    if values.get("lr_scheduler_kwargs") and name in WITHOUT_KWARGS:
        faults.append(f"'lr_scheduler_kwargs' do nothing with 'lr_scheduler_type: {name}'; leave them out")
    return faults


def tracker_faults(values: dict[str, Any]) -> list[str]:
    """Trackers that transformers does not know, or whose package is not installed."""
    named = values.get("report_to") or []
    named = [named] if isinstance(named, str) else named
    if set(named) <= {"none", "all"}:
        return []
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as KNOWN

    faults, there = [], get_available_reporting_integrations()
    for name in named:
        if name not in KNOWN:
            close = difflib.get_close_matches(name, KNOWN, n=1)
            faults.append(
                f"'report_to: {name}' is not one of none, all, {', '.join(KNOWN)}.{did_you_mean(close)}"
            )
        elif name not in there:
            package = TRACKER_PACKAGES.get(name, name)
            faults.append(f"'report_to: {name}' needs a package: `pip install {package}`")
    return faults


def build_faults(training: "RewardConfig", model: "ModelConfig") -> list[str]:
    """What cannot be made here of a recipe whose every key is right: schedule, optimizer, data loader."""
    import torch
    from transformers import get_scheduler

    faults = []
    if training.use_cpu and (model.attn_implementation or "").endswith("flex_attention"):
        faults.append("'attn_implementation: flex_attention' cannot train on a CPU: leave it out")
    if training.use_cpu and training.activation_offloading:
        faults.append("'activation_offloading: true': on a CPU activations are where it would move them")
    faults += optimizer_faults(training)
    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        get_scheduler(
            training.lr_scheduler_type, torch.optim.SGD([parameter], lr=1.0), 0, 10,
            training.lr_scheduler_kwargs or None,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        faults.append(f"'lr_scheduler_type: {training.lr_scheduler_type.value}': {one_line(error)}")
    try:
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(parameter.data),
            num_workers=training.dataloader_num_workers,
            persistent_workers=training.dataloader_persistent_workers,
            prefetch_factor=training.dataloader_prefetch_factor,
            multiprocessing_context=training.dataloader_multiprocessing_context,
        )
    except (TypeError, ValueError) as error:
        faults.append(f"the 'dataloader_...' keys: {one_line(error)}")
    return faults


def optimizer_faults(training: "RewardConfig") -> list[str]:
    """What keeps an optimizer from being made, and what it would ignore."""
    import copy

    import torch
    from transformers import Trainer

    name, of_layers = str(training.optim.value), training.optim_target_modules
    if any(part in name for part in FUSED_INTO_BACKWARD):
        return [f"'optim: {name}' makes its steps within backward, where they are not checked; take another"]
    projected = name.startswith(("galore", "apollo"))  # made of a model's layers, so not here
    if of_layers and not projected:
        return [f"'optim_target_modules' does nothing with 'optim: {name}': GaLore and APOLLO read it"]
    plain = copy.copy(training)
    plain.optim_args = None
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(training)
        ignored = training.optim_args and kwargs == Trainer.get_optimizer_cls_and_kwargs(plain)[1]
        kind([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        if projected and of_layers and not isinstance(error, ImportError):
            return []
        return [f"'optim: {name}': {one_line(error)}"]
    return [f"'optim_args: {training.optim_args}' changes nothing of 'optim: {name}'"] if ignored else []


def mixture_faults(values: dict[str, Any]) -> list[str]:
    """What is wrong with the entries of `datasets`."""
    entries = values.get("datasets") or []
    if not entries:
        return []
    from trl.scripts.utils import DatasetConfig

    faults = [
        f"'datasets' and '{key}' exclude each other"
        for key in ("dataset_name", "dataset_subsets", "dataset_revision")
        if values.get(key)
    ]
    hints = typing.get_type_hints(DatasetConfig)
    for number, entry in enumerate(entries, 1):
        where = f"'datasets', entry {number}"
        if not entry.get("path"):
            faults.append(f"{where} has no 'path': a file, a folder or a Hub id")
        for key, value in entry.items():
            if key not in hints:
                close = difflib.get_close_matches(str(key), hints, n=1)
                faults.append(f"{where}: unknown key '{key}'.{did_you_mean(close)}")
            elif not fits(value, hints[key]):
                faults.append(f"{where}: '{key}: {value}' should be {describe(hints[key])}")
    fractions = [entry.get("fraction") for entry in entries]
    if any(fractions) and not all(isinstance(f, int | float) and 0 < f < math.inf for f in fractions):
        faults.append("'datasets': 'fraction' must be a number above 0 in every entry, or in none")
    test = values.get("dataset_test_split", DataArguments().dataset_test_split)
    held_out = values.get("test_split_size") is None and test in {e.get("split", "train") for e in entries}
    if held_out:
        faults.append(f"'datasets': 'split: {test}' is what is held out ('dataset_test_split')")
    return faults


def input_faults(values: dict[str, Any]) -> list[str]:
    """Local models and data sets that are named and not there."""
    faults = []
    names = [(key, values.get(key)) for key in ("model_name_or_path", "dataset_name")]
    names += [("path", entry.get("path")) for entry in values.get("datasets") or []]
    for key, name in names:
        if not name:
            continue
        if Path(name).exists():
            if key == "model_name_or_path" and not any((Path(name) / file).is_file() for file in MODEL_FILES):
                faults.append(f"'{key}: {name}' holds no model: there is no {' or '.join(MODEL_FILES)} in it")
            elif key == "model_name_or_path":
                adapter = (Path(name) / "adapter_config.json").is_file()
                faults += filter(None, [pickle_fault(name, adapter=adapter)])
            continue
        if name in (OFFLINE_MODEL, OFFLINE_ENCODER, OFFLINE_DATA):
            faults.append(f"'{key}: {name}' does not exist yet; run `rm-recipe prepare offline`")
        elif looks_local(name):
            faults.append(f"'{key}: {name}' does not exist")
    template = values.get("chat_template_path")
    if template and Path(template).is_file() and not template.endswith(TEMPLATE_FORMATS):
        faults.append(
            f"'chat_template_path: {template}': a template's file ends in {' or '.join(TEMPLATE_FORMATS)}; "
            "a folder or a Hub id means that tokenizer's"
        )
    elif (
        template
        and not Path(template).exists()
        and (looks_local(template) or template.endswith(TEMPLATE_FORMATS))
    ):
        faults.append(f"'chat_template_path: {template}' does not exist")
    file = values.get("dataset_name")
    if file and values.get("dataset_subsets") and Path(file).is_file():
        faults.append(f"'dataset_subsets' are folders, and '{file}' is a file")
    return faults
