"""What `push` uploads: the files that a proof vouches for, read once, and refused unless all is in order."""

import hashlib
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from rm_recipe.errors import RecipeError
from rm_recipe.exporting.card import CARD, FIGURE, adapter_card, for_repository
from rm_recipe.files import read_json, sha256
from rm_recipe.recipe.reader import is_run_folder, saved_values

WEIGHTS = ".safetensors"
PROOF, EVALUATION = "proof.json", "evaluation.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# What `AutoTokenizer` reads beside a model, by whichever tokenizer.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
PICKLES = (".bin", ".pt", ".pth", ".pkl")  # training_args.bin among them, which may hold a token


class File(NamedTuple):
    """A file to upload: weights stay on the disk; the rest is sent as it was when it was checked."""

    content: bytes | Path
    sha256: str


def export_files(export: Path, repo_id: str, *, allow_failed_gate: bool) -> dict[str, File]:
    """The files of an export, by their names in the repository.

    Raises:
        RecipeError: `export` is no export, unproven, changed since, not evaluated, or failed its gate.
    """
    files = _proven(export)
    _check_evaluation(export, allow_failed_gate)
    _check_card(export)
    _check_data(export)
    card = for_repository(_text(export / CARD), repo_id)
    more = [name for name in (PROOF, EVALUATION, FIGURE) if (export / name).is_file()]
    return files | _read(export, more) | {CARD: _file(card.encode())}


def adapter_files(export: Path, repo_id: str, *, allow_failed_gate: bool) -> dict[str, File]:
    """The files of the adapter that an export was merged from, by their names in the repository.

    Raises:
        RecipeError: what holds for `export_files`; or there is no adapter, or one of a local model.
    """
    _proven(export)
    _check_evaluation(export, allow_failed_gate)
    _check_card(export)
    run = export.resolve().parent
    model = run / "model"
    if not is_run_folder(run) or not all((model / name).is_file() for name in ADAPTER):
        raise RecipeError(f"{export} is no RUN/export of a run with an adapter; push it without --adapter")
    merged = read_json(export / PROOF).get("trained")
    if not isinstance(merged, dict) or merged.get(ADAPTER[1]) != sha256(model / ADAPTER[1]):
        raise RecipeError(f"{model} is not the adapter that {export} was proven against; {_anew(export)}")
    base = base_model(model / ADAPTER[0])
    if Path(base).is_dir() or not is_repo_id(base):
        raise RecipeError(
            f"the adapter's base is the local folder {base}, so nobody else could load it; push the merged "
            "model, without --adapter"
        )
    _check_data(export)
    card = adapter_card(export, run, repo_id)
    more = [name for name in ("config.json", *TOKENIZER) if (model / name).is_file()]
    shown = [FIGURE] if FIGURE in card and (export / FIGURE).is_file() else []
    return (
        _read(model, [*ADAPTER, *more]) | _read(export, [EVALUATION, *shown]) | {CARD: _file(card.encode())}
    )


def base_model(adapter_config: Path) -> str:
    """What an adapter was trained on: a repository or a folder."""
    return str(read_json(adapter_config).get("base_model_name_or_path") or "")


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def _proven(export: Path) -> dict[str, File]:
    """The files that the export's proof names, each as it was when it was proven."""
    if not export.is_dir():
        raise RecipeError(f"{export} is not a folder; give an export, RUN/export")
    config = export / "config.json"
    if not config.is_file() or "rm_recipe" not in read_json(config):
        hint = f"; its export is {export / 'export'}" if (export / "export").is_dir() else ""
        raise RecipeError(f"{export} is not an export of `rm-recipe export`{hint}")
    if not (export / PROOF).is_file():
        raise RecipeError(f"{export} was never proven, as it has no {PROOF}; {_anew(export)}")
    proof = read_json(export / PROOF)
    if proof.get("passed") is not True:
        raise RecipeError(f"{export / PROOF} says that the export did not pass; {_anew(export)}")
    hashes = proof.get("files")
    if not isinstance(hashes, dict) or not any(name.endswith(WEIGHTS) for name in hashes):
        raise RecipeError(f"{export / PROOF} names no weights that were proven; {_anew(export)}")
    for name in hashes:
        if Path(name).name != name or name.startswith(".") or name.endswith(PICKLES):
            raise RecipeError(f"{export / PROOF} names {name!r}, which is no file of an export")
        if not (export / name).is_file():
            raise RecipeError(f"{export / name} is gone since it was proven; {_anew(export)}")
    files = _read(export, hashes)
    for name, file in files.items():
        if file.sha256 != hashes[name]:
            raise RecipeError(f"{export / name} has changed since it was proven; {_anew(export)}")
    return files


def _check_evaluation(export: Path, allow_failed_gate: bool) -> None:
    found = read_json(export / EVALUATION) if (export / EVALUATION).is_file() else {}
    if not _mapping(found.get("datasets")).get("held_out"):
        raise RecipeError(
            f"{export} was exported without an evaluation on held-out comparisons; run `rm-recipe evaluate "
            f"{_run(export)}`, then `rm-recipe export {_run(export)} --overwrite`"
        )
    gate = _mapping(found.get("gate"))
    if gate.get("passed") is not True and not allow_failed_gate:
        what = "accuracy" if gate.get("statistic") == "accuracy" else "lower end of the accuracy's interval"
        why = (
            f"the {what} is {_decimal(gate.get('value'))}, the recipe's target {_decimal(gate.get('target'))}"
            if gate
            else f"{export / EVALUATION} has no gate"
        )
        raise RecipeError(f"{export} has not passed its gate: {why}; --allow-failed-gate uploads it as it is")


def _check_data(export: Path) -> None:
    """Compares the data with what the export's run was trained with, where run and data are here.

    Raises:
        RecipeError: what is held out changed since.
    """
    run = export.resolve().parent
    if not is_run_folder(run) or not (run / "run.json").is_file():
        return
    values = saved_values(run)
    paths = [entry.get("path") for entry in values.get("datasets") or []] or [values.get("dataset_name")]
    if not all(Path(str(path)).exists() for path in paths):
        return
    # With torch and much else, which an upload needs not.
    from rm_recipe.recipe.reader import read_run_recipe
    from rm_recipe.training.run_folder import check_data

    with redirect_stdout(sys.stderr):  # the URL is all that stdout gets
        try:
            recipe = read_run_recipe(run)
        except RecipeError as error:  # of a machine that has other hardware or packages
            print(f"warning: whether the data of {run} changed since training cannot be told: {error}")
            return
        check_data(run, recipe)


def _check_card(export: Path) -> None:
    if not (export / CARD).is_file():
        raise RecipeError(f"{export} has no {CARD}, the model's card; {_anew(export)}")


def _read(folder: Path, names: Iterable[str]) -> dict[str, File]:
    return {name: _file(folder / name) for name in names}


def _file(content: bytes | Path) -> File:
    if isinstance(content, bytes):
        return File(content, hashlib.sha256(content).hexdigest())
    if content.suffix != WEIGHTS:
        return _file(content.read_bytes())
    return File(content, sha256(content))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None


def _run(export: Path) -> str:
    """The export's run, as a command would name it."""
    return str(export.parent) if is_run_folder(export.parent) else "RUN"


def _anew(export: Path) -> str:
    return f"export anew with `rm-recipe export {_run(export)} --overwrite`"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _decimal(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else str(value)
