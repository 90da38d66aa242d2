"""A recipe: YAML plus command-line overrides, checked strictly and resolved for this machine.

TRL's parser drops unknown keys under `accelerate launch`, skips type and choice checks for YAML
values and lets the last of two duplicate keys win. Here all three are refused, every fault is found
before the first is reported, and nothing is loaded before that.
"""

import dataclasses
import filecmp
import typing
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rm_recipe.errors import RecipeError, one_line
from rm_recipe.files import expanded, redacted, whole_file
from rm_recipe.recipe import relations, schema
from rm_recipe.recipe.schema import DataArguments, HubArguments

if typing.TYPE_CHECKING:
    from trl import ModelConfig, RewardConfig

RUN_RECIPE = "recipe.yaml"
SHIPPED = ("recipes", "accelerate_configs")
RUN_HEADER = "every key with the value it had"  # so a run's recipe.yaml is told from a user's


@dataclass
class Recipe:
    """A parsed recipe; `values` holds every key that it or the device resolution gave a value."""

    path: Path
    values: dict[str, Any]
    training: "RewardConfig" = field(repr=False)
    model: "ModelConfig" = field(repr=False)
    data: DataArguments = field(repr=False)
    hub: HubArguments = field(repr=False, default_factory=HubArguments)

    @property
    def output_dir(self) -> Path:
        """The run folder: `output_dir`, or `outputs/` and the recipe's file name."""
        return Path(self.training.output_dir)

    def resolved(self) -> dict[str, Any]:
        """Every accepted key with its value."""
        merged = dataclasses.asdict(self.model) | dataclasses.asdict(self.data) | self.training.to_dict()
        merged |= dataclasses.asdict(self.hub)  # for what Trainer is not told
        return {key: value for key, value in merged.items() if key not in schema.REFUSED_KEYS}

    def save(self, path: Path) -> None:
        """Write the resolved recipe as YAML that `read_recipe` takes back, the home folder as `~`."""
        save_values(path, self.resolved())


def read_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_inputs: bool = True) -> Recipe:
    """Read, check and resolve a recipe.

    Args:
        path: the YAML file, or the name of one in `recipes/` or of a shipped one.
        overrides: `--key value` or `--key=value` strings; they win over the file. `--key null` leaves out
            a key of the file, if null is not one of its values.
        check_inputs: also require that local model and data paths exist.

    Raises:
        RecipeError: with every fault found, a line each.
    """
    path = find_recipe(Path(path))
    in_file, faults = _read_yaml(path)
    in_line, line_faults = _read_overrides(overrides)
    for key in schema.never_null(key for key in in_file if in_line.get(key, key) is None):
        del in_file[key], in_line[key]
    values, found = schema.check_values(in_file)
    faults += [f"{path}: {fault}" for fault in found]
    over, found = schema.check_values(in_line)
    faults += [f"command line: {fault}" for fault in [*line_faults, *found]]
    values = expanded(values | over)
    found = [*relations.relation_faults(values, in_file | in_line)]
    found += relations.input_faults(values) if check_inputs else []
    _refuse([*faults, *(f"{path}: {fault}" for fault in found)])
    recipe = _build(path, {"output_dir": f"outputs/{path.stem}", **values})
    _refuse([f"{path}: {fault}" for fault in relations.making_faults(recipe.training)])
    return recipe


def read_columns(text: str) -> dict[str, str]:
    """Read the value of the recipe key `columns` from a command line; raises RecipeError."""
    values, faults = schema.check_values({"columns": _from_text(text)})
    _refuse([f"command line: {fault}" for fault in faults])
    return dict(values["columns"])


def _refuse(faults: list[str]) -> None:
    if faults:
        raise RecipeError("\n".join(faults))


def _build(path: Path, values: dict[str, Any]) -> Recipe:
    from trl import ModelConfig, RewardConfig

    values = relations.resolve(values)
    parts: list[Any] = []
    left = dict(values)
    for part in (HubArguments, DataArguments, ModelConfig, RewardConfig):  # Trainer does not see the Hub's
        names = {item.name for item in dataclasses.fields(part) if item.init}
        try:
            parts.append(part(**{key: left.pop(key) for key in names & left.keys()}))
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise RecipeError(f"{path}: {' '.join(str(error).split())}") from None
    hub, data, model, training = parts
    # Several visible GPUs without a launcher would mean nn.DataParallel, which TRL refuses;
    # one process trains on one GPU, `accelerate launch` on more.
    if training.n_gpu > 1:
        training._n_gpu = 1
    return Recipe(path, values, training, model, data, hub)


# --- recipes that are shipped, and those of runs ---------------------------------------------


def shipped(folder: str) -> Path:
    """The project's folder of `SHIPPED`: in the installed package, else beside its source."""
    package = Path(__file__).parent.parent
    return package / folder if (package / folder).is_dir() else package.parent / folder


def find_recipe(path: Path) -> Path:
    """The path; where that is no file, the recipe of that name in `recipes/` here, else the shipped one."""
    if path.is_file() or path.parent not in (Path(), Path("recipes")):
        return path
    own = Path("recipes", f"{path.name.removesuffix('.yaml')}.yaml")  # comes first: it may have been changed
    return next(filter(Path.is_file, (own, shipped("recipes") / own.name)), path)


def copy_shipped(folder: Path) -> Iterator[str]:
    """Copy what is shipped into a folder, to be changed there; a file that is there stays as it is.

    Yields:
        a line for each file, which says what became of it.

    Raises:
        RecipeError: the folder cannot be written to, or has files where folders should be.
    """
    for name in SHIPPED:
        try:
            (folder / name).mkdir(exist_ok=True)
        except OSError as error:
            fault = f"{folder / name} cannot be made: {error.strerror}"
            raise RecipeError(f"{fault}; run this in another folder") from None
    for source in (path for name in SHIPPED for path in sorted(shipped(name).glob("*.yaml"))):
        target, said = folder / source.parent.name / source.name, "there already"
        if not target.exists():
            with whole_file(target) as partial:
                partial.write_bytes(source.read_bytes())
            said = "written"
        elif not filecmp.cmp(source, target, shallow=False):
            said = "kept, as it differs from what is shipped"
        yield f"{target}: {said}"


def is_run_folder(folder: Path) -> bool:
    """Whether a run was started in this folder: its recipe.yaml is one that `Recipe.save` wrote."""
    path = folder / RUN_RECIPE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return text.partition("\n")[0].endswith(RUN_HEADER)


def read_run_recipe(run: Path) -> Recipe:
    """Read the recipe of a finished or interrupted run, its device keys resolved for this machine.

    Raises:
        RecipeError: `run` is not a run folder.
    """
    values = {key: value for key, value in saved_values(run).items() if key not in schema.DEVICE_KEYS}
    return _build(run / RUN_RECIPE, values | {"output_dir": str(run)})


def saved_values(run: Path) -> dict[str, Any]:
    """Read the resolved recipe that a run folder was made with.

    Raises:
        RecipeError: `run` is not a run folder.
    """
    if not is_run_folder(run):
        raise RecipeError(f"{run} is not a run folder: it has no recipe.yaml of a run")
    values, faults = _read_yaml(run / RUN_RECIPE)
    _refuse(faults)
    return dict(expanded(values))


def save_values(path: Path, values: dict[str, Any]) -> None:
    """Write a run's recipe, the home folder as `~`."""
    text = yaml.safe_dump(redacted(values), sort_keys=False, allow_unicode=True)
    with whole_file(path) as partial:
        partial.write_text(f"# The recipe of a run, {RUN_HEADER}\n{text}", encoding="utf-8")


# --- from text to values -----------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; a key given twice is remembered as a fault instead of overwritten.

    `no` and `off` are texts, as in YAML 1.2, so that `save_strategy: no` and `prefix_sharing: off` are.
    """

    duplicates: list[str]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """PyYAML's own, after a look at the keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                self.duplicates.append(f"line {key.start_mark.line + 1}: key '{key.value}' is given twice")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, kind) for tag, kind in found if not tag.endswith(":bool") or first in "tTfF"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The file's mapping and its faults; a file that is no recipe at all raises RecipeError."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        loader.duplicates = []
        content = loader.get_single_data()
    except FileNotFoundError:
        there = [file.name for folder in (shipped("recipes"), path.parent) for file in folder.glob("*.yaml")]
        hint = schema.did_you_mean(path.name, there)
        raise RecipeError(f"{path}: no such recipe{'.' if hint else ''}{hint}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # a date in month 13
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or one_line(error)
        raise RecipeError(f"{path}{where}: not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise RecipeError(f"{path}: {found}; a recipe is a mapping of `key: value` lines")
    return {str(key): value for key, value in content.items()}, [f"{path}, {x}" for x in loader.duplicates]


def _read_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Values of `--key value`, which is text, or a list, mapping or null in YAML's notation; and faults."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    words = list(overrides)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if not key or not name.startswith("--"):
            faults.append(f"'{word}' is not of the form --key value")
        elif not equals and (not words or words[0].startswith("--")):  # one `-` begins a negative number
            faults.append(f"--{key} has no value")
        else:
            if key in values:
                faults.append(f"--{key} is given twice")
            values[key] = _from_text(value if equals else words.pop(0))
    return values, faults


def _from_text(text: str) -> Any:
    if text.strip().lower() in ("null", "none", "~"):
        return None
    if text.lstrip().startswith(("[", "{")):
        with suppress(yaml.YAMLError, ValueError, RecursionError):  # as text it is refused by its type
            return yaml.safe_load(text)
    return text
