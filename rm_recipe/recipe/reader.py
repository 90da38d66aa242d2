"""A recipe: YAML plus command-line overrides, checked strictly and resolved for this machine.

TRL's parser drops unknown keys under `accelerate launch`, skips type and choice checks for YAML
values and lets the last of two duplicate keys win. Here all three are refused, every fault is found
before the first is reported, and nothing is loaded before that.
"""

import copy
import dataclasses
import difflib
import enum
import typing
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rm_recipe.errors import RecipeError, one_line
from rm_recipe.files import expanded, pickle_fault, whole_file, with_tilde
from rm_recipe.recipe.schema import (
    CHECKPOINTING,
    DEVICE_KEYS,
    IDLE_KEYS,
    MODEL_FILES,
    OFFLINE_DATA,
    OFFLINE_ENCODER,
    OFFLINE_MODEL,
    REFUSED_KEYS,
    TEMPLATE_FORMATS,
    DataArguments,
    HubArguments,
    check_values,
    looks_local,
    shown,
)

if typing.TYPE_CHECKING:
    from trl import ModelConfig, RewardConfig

RUN_RECIPE = "recipe.yaml"
RUN_HEADER = ", every key with the value it had"  # what tells a run's recipe.yaml from a user's
BEST_EVERY = 0.1  # of all steps, after which the best checkpoint is looked for where the recipe says nothing


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
        """Write the resolved recipe as YAML that `read_recipe` takes back, the home folder as `~`."""
        save_values(path, self.resolved(), f"# {self.path.name}{RUN_HEADER}\n")


def save_values(path: Path, values: dict[str, Any], header: str = "") -> None:
    """Write a run's recipe; without a `header`, under the one that is there."""
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
    """Read, check and resolve a recipe.

    Args:
        path: the YAML file, or the name of a shipped one.
        overrides: `--key value` or `--key=value` strings; they win over the file.
        check_inputs: also require that local model and data paths exist.

    Raises:
        RecipeError: with every fault found, a line each.
    """
    path = find_recipe(Path(path))
    in_file, faults = _read_yaml(path)
    in_line, line_faults = _read_overrides(overrides)
    values, found = check_values(in_file)
    faults += [f"{path}: {fault}" for fault in found]
    over, found = check_values(in_line)
    faults += [f"command line: {fault}" for fault in [*line_faults, *found]]
    values = expanded(values | over)
    found = cross_faults(values, in_file | in_line)
    found += input_faults(values) if check_inputs else []
    faults += [f"{path}: {fault}" for fault in found]
    if faults:
        raise RecipeError("\n".join(faults))
    recipe = _build(path, {"output_dir": f"outputs/{path.stem}", **values})
    faults = [f"{path}: {fault}" for fault in build_faults(recipe.training, recipe.model)]
    if faults:
        raise RecipeError("\n".join(faults))
    return recipe


def is_run_folder(folder: Path) -> bool:
    """Whether a run was started in this folder: its recipe.yaml is one that `Recipe.save` wrote."""
    path = folder / RUN_RECIPE
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip().endswith(RUN_HEADER)


def saved_values(run: Path) -> dict[str, Any]:
    """Read the resolved recipe that a run folder was made with.

    Raises:
        RecipeError: `run` is not a run folder.
    """
    if not is_run_folder(run):
        raise RecipeError(f"{run} is not a run folder: it has no recipe.yaml of a run")
    values, faults = _read_yaml(run / RUN_RECIPE)
    if faults:
        raise RecipeError("\n".join(faults))
    return dict(expanded(values))


def read_run_recipe(run: Path) -> Recipe:
    """Read the recipe of a finished or interrupted run, its device keys resolved for this machine.

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
        loader = _Loader(text)
        loader.duplicates = []
        content = loader.get_single_data()
    except FileNotFoundError:
        there = {p.name: p for folder in (shipped("recipes"), path.parent) for p in folder.glob("*.yaml")}
        close = difflib.get_close_matches(path.name, there, n=1)
        hint = f". Did you mean {there[close[0]]}?" if close else ""
        raise RecipeError(f"{path}: no such recipe{hint}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # a date in month 13
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or one_line(error)
        raise RecipeError(f"{path}{where}: not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise RecipeError(f"{path}: {found}; a recipe is a mapping of `key: value` lines")
    faults = [f"{path}, {fault}" for fault in loader.duplicates]
    return {str(key): value for key, value in content.items()}, faults


def _read_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Values of `--key value`, which is text, or a list, mapping or null in YAML's notation; and faults."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            faults.append(f"'{word}' is not of the form --key value")
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            # A value may be a negative number; only `--` starts the next key.
            if not rest or rest[0].startswith("--"):
                faults.append(f"--{key} has no value")
                continue
            value = rest.pop(0)
        key = key.replace("-", "_")
        if key in values:
            faults.append(f"--{key} is given twice")
        values[key] = _from_text(value)
    return values, faults


def _from_text(text: str) -> Any:
    if text.strip().lower() in ("null", "none", "~"):
        return None
    if text.lstrip().startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):  # as text it is refused by its type
            return text
    return text


# --- resolving -------------------------------------------------------------------------------


def _build(path: Path, values: dict[str, Any]) -> Recipe:
    from trl import ModelConfig, RewardConfig

    asked = values.get("dtype", "float32")
    values = _best_values(values) | values | _device_values(values) | _true_values(values)
    of_hub = {item.name for item in dataclasses.fields(HubArguments)}
    parts: list[Any] = []
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
        often = values.get("save_steps") or values.get("eval_steps") or BEST_EVERY
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


# --- faults: what is missing, in contradiction or not there ------------------------------------

EXCLUSIVE = (
    ("load_in_4bit", "load_in_8bit"),
    ("use_dora", "load_in_8bit"),  # reads weights that bitsandbytes 0.50 does not give in 8 bits
    ("bf16", "fp16"),
    ("datasets", "dataset_name"),
    ("datasets", "dataset_subsets"),
    ("datasets", "dataset_revision"),
)
NEEDS = {
    "load_in_4bit": "use_peft",  # quantised weights cannot be trained themselves
    "load_in_8bit": "use_peft",
    "push_to_hub": "hub_model_id",
    "margin_map": "margin_column",
    "dataloader_persistent_workers": "dataloader_num_workers",
    "dataloader_prefetch_factor": "dataloader_num_workers",
    "dataloader_multiprocessing_context": "dataloader_num_workers",
}
BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that follow one
FUSED_INTO_BACKWARD = ("lomo", "adalomo", "layerwise")  # optimizers, by parts of their names


def cross_faults(values: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Find what is missing, in contradiction, or would do nothing.

    Args:
        values: the parsed ones.
        given: has the faulty keys too.
    """
    get, faults = values.get, []
    if not given.get("model_name_or_path"):
        faults.append("'model_name_or_path' is missing: the base model's folder or Hub id")
    if not given.get("dataset_name") and not given.get("datasets"):
        faults.append("'dataset_name' is missing: a file, a folder or a Hub id")
    faults += [
        f"'{key}' and '{other}' exclude each other" for key, other in EXCLUSIVE if get(key) and get(other)
    ]
    faults += [
        f"'{key}' needs '{other}': set that, too"
        for key, other in NEEDS.items()
        if get(key) and not get(other)
    ]
    for key, needed in IDLE_KEYS.items():
        if get(key) is not None and not any(name in values for name in needed):
            faults.append(f"'{key}' does nothing without '{needed[0]}': set that, or leave '{key}' out")
    if get("lora_dropout") and get("disable_dropout", True):
        faults.append("'lora_dropout' does nothing without 'disable_dropout: false', as TRL switches it off")
    if get("neftune_noise_alpha") and get("prefix_sharing") != "off":
        faults.append("'neftune_noise_alpha' needs 'prefix_sharing: off': it scales noise by a row's length")
    old, new = (get(key) for key in CHECKPOINTING)
    if None not in (old, new) and old != new:
        faults.append(f"'{CHECKPOINTING[0]}' and '{CHECKPOINTING[1]}' are one thing, by two names")
    schedule = get("lr_scheduler_type")
    if get("warmup_steps") and schedule in ("constant", *BY_METRIC):
        faults.append(f"'warmup_steps' does nothing with 'lr_scheduler_type: {schedule}'")
    if get("lr_scheduler_kwargs") and schedule in ("constant", "constant_with_warmup"):
        faults.append(f"'lr_scheduler_kwargs' do nothing with 'lr_scheduler_type: {schedule}'")
    return faults + split_faults(values) + best_faults(values)


def split_faults(values: dict[str, Any]) -> list[str]:
    """Find splits that are not apart, and mixtures that are not whole."""
    get, faults = values.get, []
    entries, file = get("datasets") or [], get("dataset_name") or ""
    for number, entry in enumerate(entries, 1):
        if not entry.get("path"):
            faults.append(f"'datasets', entry {number} has no 'path': a file, a folder or a Hub id")
    fractions = [entry.get("fraction") for entry in entries]
    if any(fractions) and not all(fractions):
        faults.append("'datasets': give a 'fraction' to every entry, or to none")
    train = get("dataset_train_split", DataArguments.dataset_train_split)
    test = get("dataset_test_split", DataArguments.dataset_test_split)
    if get("test_split_size") is None and test in {entry.get("split", "train") for entry in entries}:
        faults.append(f"'datasets': 'split: {test}' is what is held out ('dataset_test_split')")
    if train == test:
        faults.append(f"'dataset_test_split: {test}' must differ from 'dataset_train_split'")
    if get("dataset_subsets") and Path(file).is_file():
        faults.append(f"'dataset_subsets' are folders, and '{file}' is a file")
    return faults


def best_faults(values: dict[str, Any]) -> list[str]:
    """Find what keeps the best checkpoint from being known, or from being there."""
    get, faults = values.get, []
    patience, by_best = get("early_stopping_patience"), get("save_strategy") == "best"
    keeper = "early_stopping_patience" if patience else "load_best_model_at_end"
    saving = ("no", "best") if patience else ("no",)
    never = {"eval_strategy": ("no",), "save_strategy": saving, "load_best_model_at_end": (False,)}
    for key, forbidding in never.items():
        if get(keeper) and get(key) in forbidding:
            faults.append(f"'{keeper}' needs what '{key}: {shown(get(key))}' forbids; leave that out")
    if not (get(keeper) or by_best or get("lr_scheduler_type") in BY_METRIC):
        for key in ("metric_for_best_model", "greater_is_better"):
            if get(key) is not None:
                faults.append(f"'{key}' does nothing without 'load_best_model_at_end: true'")
    evaluates = get("eval_strategy", "steps" if get(keeper) else "no") != "no"
    if by_best and not patience and not (get("metric_for_best_model") and evaluates):
        faults.append(
            "'save_strategy: best' needs a 'metric_for_best_model' and an 'eval_strategy' to know it"
        )
    saves, looks = get("save_steps"), get("eval_steps")
    by_steps = {get("save_strategy", "steps"), get("eval_strategy", "steps")} == {"steps"}
    if get(keeper) and by_steps and None not in (saves, looks) and saves != looks:
        faults.append(
            f"the best checkpoint is known where it is evaluated and saved at once: 'eval_steps: {looks}' "
            f"must equal 'save_steps: {saves}', or leave it out"
        )
    return faults


def input_faults(values: dict[str, Any]) -> list[str]:
    """Find local models, data sets and templates that are named and not there, or not to be used."""
    base, template = values.get("model_name_or_path"), values.get("chat_template_path")
    named = [("model_name_or_path", base), ("dataset_name", values.get("dataset_name"))]
    named += [("path", entry.get("path")) for entry in values.get("datasets") or []]
    faults = []
    for key, name in [*named, ("chat_template_path", template)]:
        if not name or Path(name).exists():
            continue
        if name in (OFFLINE_MODEL, OFFLINE_ENCODER, OFFLINE_DATA):
            faults.append(f"'{key}: {name}' does not exist yet; run `rm-recipe prepare offline`")
        elif looks_local(name) or name.endswith(TEMPLATE_FORMATS):
            faults.append(f"'{key}: {name}' does not exist")
    if base and Path(base).exists():
        adapter = (Path(base) / "adapter_config.json").is_file()
        if not any((Path(base) / file).is_file() for file in MODEL_FILES):
            faults.append(
                f"'model_name_or_path: {base}' holds no model: there is no {' or '.join(MODEL_FILES)}"
            )
        elif fault := pickle_fault(base, adapter=adapter):
            faults.append(fault)
    if template and Path(template).is_file() and not template.endswith(TEMPLATE_FORMATS):
        faults.append(
            f"'chat_template_path: {template}': a template's file ends in {' or '.join(TEMPLATE_FORMATS)}; "
            "a folder or a Hub id means that tokenizer's"
        )
    return faults


def build_faults(training: "RewardConfig", model: "ModelConfig") -> list[str]:
    """Find what cannot be made here of a recipe whose every key is right, by making it."""
    import torch
    from transformers import get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks

    faults = []
    if training.use_cpu and (model.attn_implementation or "").endswith("flex_attention"):
        faults.append("'attn_implementation: flex_attention' cannot train on a CPU: leave it out")
    if training.use_cpu and training.activation_offloading:
        faults.append("'activation_offloading: true': on a CPU activations are where it would move them")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(training.lr_scheduler_type, optimizer, 0, 10, training.lr_scheduler_kwargs or None)
    except (TypeError, ValueError) as error:
        faults.append(f"'lr_scheduler_type: {training.lr_scheduler_type.value}': {one_line(error)}")
    try:
        for tracker in get_reporting_integration_callbacks(training.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        faults.append(f"'report_to': {one_line(error)}")
    return faults + optimizer_faults(training)


def optimizer_faults(training: "RewardConfig") -> list[str]:
    """Find what keeps an optimizer from being made, or what it would ignore."""
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
        if training.optim_args and kwargs == Trainer.get_optimizer_cls_and_kwargs(plain)[1]:
            return [f"'optim_args: {training.optim_args}' changes nothing of 'optim: {name}'"]
        if not projected:
            kind([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        return [f"'optim: {name}': {one_line(error)}"]
    return []
