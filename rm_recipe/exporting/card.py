"""The model card: what an export's files say of it, for people and for the Hub.

Everything comes from `proof.json`, `evaluation.json`, `config.json` and the run's own records; what is not
known is not said. The words are in `model_card.md.jinja`. Nothing here needs torch.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # not marked as exported

from rm_recipe.evaluation.findings import HELD_OUT, best_baseline, gate_words, readings, rule
from rm_recipe.evaluation.format import decimal, interval
from rm_recipe.exporting.compatibility import needs_transformers_5
from rm_recipe.files import read_json, redact, visible
from rm_recipe.recipe.reader import saved_values
from rm_recipe.recipe.schema import looks_local

TEMPLATE = "model_card.md.jinja"
CARD = "README.md"
FIGURE = "reliability.png"
TAGS = ["reward-model", "rlhf", "trl", "rm_recipe"]
_SPECIAL = re.compile(r"[\\`*\[\]<>|#]")


def make_card(export: Path, run: Path, model: str) -> str:
    """Write what an export's `README.md` says; everything else that it is about has to be there.

    Args:
        model: what the snippets load.
    """
    paths = [export / f"{name}.json" for name in ("proof", "config", "evaluation", "tokenizer_config")]
    paths += [run / "run.json", run / "data_report.json"]
    files = {path.stem: read_json(path, missing_ok=True) for path in paths}
    recipe, datasets = saved_values(run), files["evaluation"].get("datasets", {})
    # No split of the data set has what was held out by prompt.
    by_prompt = files["data_report"].get("held_out_by_prompt") is not None
    split = None if by_prompt else recipe.get("dataset_test_split")
    measured = [_eval_result(data, metrics, recipe, split) for data, metrics in datasets.items()]
    base, name = _base(str(recipe["model_name_or_path"])), run.resolve().name
    metadata = ModelCardData(
        base_model=base["id"],
        license=base.get("license"),
        language=base.get("language"),
        datasets=[data for data in _data(recipe) if not _is_local(data)] or None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=TAGS,
        model_name=name,
        eval_results=measured or None,
    )
    known = {"base": base, "data": _data(recipe), "datasets": datasets, "recipe": recipe, "name": name}
    known |= {"model": redact(model), "picture": (export / FIGURE).is_file()}
    text = _environment().get_template(TEMPLATE).render(files | known)
    return redact(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def for_repository(text: str, repo_id: str) -> str:
    """Have a card's snippets load from the Hub what they loaded from a folder; edits by hand are kept."""
    found = re.search(r'^model = ("(?:[^"\\\n]|\\.)+")$', text, re.MULTILINE)
    return text.replace(found[1], json.dumps(repo_id)) if found else text


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(  # noqa: S701 - Markdown: `plain` escapes that, HTML too
        loader=jinja2.PackageLoader("rm_recipe.exporting", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    functions: list[Callable[..., Any]] = [best_baseline, code, decimal, gate_words, interval]
    functions += [literal, needs_transformers_5, readings, rule, shown]
    environment.globals |= {function.__name__: function for function in functions}
    return environment


def _eval_result(
    name: str, metrics: dict[str, Any], recipe: dict[str, Any], held_out_split: str | None
) -> EvalResult:
    sources = [shown(source) for source in (_data(recipe) if name == HELD_OUT else [name])]
    return EvalResult(
        task_type="text-classification",
        dataset_type=sources[0],
        dataset_name=" and ".join(sources),
        dataset_split=held_out_split if name == HELD_OUT else None,
        metric_type="accuracy",
        metric_value=round(metrics["accuracy"], 4),
        metric_args={
            "ci95": [round(end, 4) for end in metrics["accuracy_ci95"]],
            "comparisons": metrics["n_scored"],
        },
    )


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_local(name: str) -> bool:
    return looks_local(name) or Path(name).exists()


def shown(name: str) -> str:
    """A data set's name without the folders of whoever evaluated on it."""
    return Path(name).name if _is_local(name) else name


def _data(recipe: dict[str, Any]) -> list[str]:
    """The data sets that the recipe trains on."""
    mixture = [part["path"] for part in recipe.get("datasets") or []]
    return mixture or [str(recipe["dataset_name"])]


def _base(name: str) -> dict[str, Any]:
    """What the base model's own card says, with its `id` on the Hub, if it has one, and what to call it."""
    card: dict[str, Any] = {}
    with suppress(Exception):  # without a card, without a network: then nothing is known
        path = Path(name, CARD) if _is_local(name) else name
        card = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    known = card.get("base_model") if _is_local(name) else name
    on_hub = isinstance(known, str) and is_repo_id(known) and not _is_local(known)
    return card | {"id": known if on_hub else None, "folder": Path(name).name}


# --- text that means nothing in Markdown, or is a literal of Python ---------------------------------


class Verbatim(str):
    """Text that is Markdown already, or stands in a block of code: the template leaves it alone."""


def plain(text: str) -> str:
    """The text as it is read, on one line: no markup, no HTML, no end of a table's cell."""
    return _SPECIAL.sub(r"\\\g<0>", _one_line(text))


def code(text: str) -> Verbatim:
    """The text as a span of code, whatever backticks there are in it."""
    text = _one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return Verbatim(f"{fence}{space}{text}{space}{fence}")


def literal(text: str) -> Verbatim:
    """The text in double quotes, as Python and JSON read it, and a shell if it holds no `$` or the like."""
    return Verbatim(json.dumps(text, ensure_ascii=False))


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))
