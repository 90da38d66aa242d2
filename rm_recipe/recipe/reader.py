"""A recipe: YAML plus command-line overrides, checked strictly and resolved for this machine.

TRL's parser drops unknown keys under `accelerate launch`, skips type and choice checks for YAML
values and lets the last of two duplicate keys win. Here all three are refused, every fault is found
before the first is reported, and nothing is loaded before that.
"""

import dataclasses
import difflib
import enum
import typing
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rm_recipe.errors import RecipeError
from rm_recipe.files import whole_file
from rm_recipe.recipe.faults import build_faults, cross_faults, input_faults
from rm_recipe.recipe.schema import (
    DEVICE_KEYS,
    FIXED_KEYS,
    REFUSED_KEYS,
    DataArguments,
    HubArguments,
    check_value,
    shown,
)
from rm_recipe.redaction import expanded, hide_secrets, with_tilde

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
