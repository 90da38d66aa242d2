"""The model card: what an export's files say of it, for people and for the Hub.

Everything comes from `proof.json`, `evaluation.json`, `config.json` and the run's own records; what is not
known is not said. The words are in `model_card.md.jinja`. Nothing here needs torch.
"""

import json
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rm_recipe.evaluation.findings import HELD_OUT, best_baseline, gate_words, readings, rule
from rm_recipe.evaluation.format import decimal, interval
from rm_recipe.exporting.compatibility import READ_ALIKE, needs_transformers_5
from rm_recipe.files import read_json, redact, visible
from rm_recipe.recipe.reader import saved_values
from rm_recipe.recipe.schema import looks_local

TEMPLATE = "model_card.md.jinja"
CARD = "README.md"
FIGURE = "reliability.png"
REPO_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
TAGS = ["reward-model", "rlhf", "trl", "rm_recipe"]
PACKAGES = ("torch", "transformers", "trl", "peft", "rm-recipe")
_SPECIAL = re.compile(r"[\\`*\[\]<>|#]")


def write_card(export: Path, run: Path, model: str) -> None:
    """Write an export's `README.md`; everything else that it is about has to be there.

    Args:
        model: what the snippets load.
    """
    (export / CARD).write_text(_card(export, run, model, adapter=False), encoding="utf-8")


def adapter_card(export: Path, run: Path, repo_id: str) -> str:
    """The card of the adapter that an export was merged from."""
    return _card(export, run, repo_id, adapter=True)


def for_repository(text: str, repo_id: str) -> str:
    """A card whose snippets load from the Hub what they loaded from a folder; edits by hand are kept."""
    found = re.search(r'^model = ("(?:[^"\\\n]|\\.)+")$', text, re.MULTILINE)
    for old in (in_shell(json.loads(found[1])), found[1]) if found else ():
        text = text.replace(old, json.dumps(repo_id))
    return text


def _card(export: Path, run: Path, model: str, *, adapter: bool) -> str:
    proof, config = read_json(export / "proof.json"), read_json(export / "config.json")
    evaluation = read_json(export / "evaluation.json") if (export / "evaluation.json").is_file() else {}
    recipe, datasets, model = saved_values(run), evaluation.get("datasets", {}), redact(model)
    base, gate = _base(str(recipe["model_name_or_path"])), gate_words(evaluation.get("gate"))
    sentences = [f"{gate['verdict']}: {gate['why']}."] if gate else []
    sentences += [sentence for _, sentence in readings(datasets.get(HELD_OUT, {}))]
    metadata = ModelCardData(
        base_model=base["id"],
        license=base["license"],
        language=base["languages"] or None,
        datasets=[name for name in _data(recipe) if not _is_local(name)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification",
        tags=TAGS,
        model_name=run.resolve().name,
        eval_results=[_eval_result(name, metrics, recipe) for name, metrics in datasets.items()] or None,
    )
    text = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            name=run.resolve().name,
            model=model,
            base=base,
            data=_data(recipe),
            datasets={_shown(name): metrics for name, metrics in datasets.items()},
            sentences=sentences,
            picture=(export / FIGURE).is_file(),
            adapter=adapter,
            proof=proof,
            config=config,
            tokenizer=read_json(export / "tokenizer_config.json"),
            needs_transformers_5=needs_transformers_5(config),
            read_alike=config.get("model_type") in READ_ALIKE.split(),
            recipe=recipe,
            run=read_json(run / "run.json"),
        )
    )
    return redact(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(  # noqa: S701 - Markdown: `plain` escapes that, HTML too
        loader=jinja2.PackageLoader("rm_recipe.exporting", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    functions = (code, in_python, in_shell, request, decimal, interval, best_baseline, rule)
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {"small": lambda value: f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"}
    environment.globals["PACKAGES"] = PACKAGES
    return environment


def _eval_result(name: str, metrics: dict[str, Any], recipe: dict[str, Any]) -> EvalResult:
    held_out = recipe if name == HELD_OUT else {}
    source = _shown(_data(recipe)[0] if held_out else name)
    return EvalResult(
        task_type="text-classification",
        task_name="Preference accuracy",
        dataset_type=source,
        dataset_name=source,
        dataset_config=", ".join(held_out.get("dataset_subsets") or []) or None,
        dataset_split=held_out.get("dataset_test_split"),
        dataset_revision=held_out.get("dataset_revision"),
        metric_type="accuracy",
        metric_name="Preference accuracy, a tie is one half",
        metric_value=round(metrics["accuracy"], 4),
        metric_args={
            "ci95": [round(end, 4) for end in metrics["accuracy_ci95"]],
            "comparisons": metrics["n_scored"],
        },
    )


def _is_local(name: str) -> bool:
    return looks_local(name) or Path(name).exists()


def _shown(name: str) -> str:
    """A data set's name without the folders of whoever evaluated on it."""
    return Path(name).name if _is_local(name) else name


def _data(recipe: dict[str, Any]) -> list[str]:
    """The data sets that the recipe trains on."""
    mixture = [part["path"] for part in recipe.get("datasets") or []]
    return mixture or [str(recipe["dataset_name"])]


def _base(name: str) -> dict[str, Any]:
    """The base model: its id on the Hub, if it has one, what its own card says, and what to call it."""
    card: dict[str, Any] = {}
    with suppress(Exception):  # without a card, without a network: then nothing is known
        path = Path(name, CARD) if _is_local(name) else name
        card = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    known = str(card.get("base_model")) if _is_local(name) else name
    known = known if REPO_ID.fullmatch(known) and known != "None" and not _is_local(known) else ""
    languages = card.get("language") or []
    return {
        "id": known or None,
        "license": card.get("license"),
        "languages": [languages] if isinstance(languages, str) else languages,
        "made": card.get("made"),
        "shown": Verbatim(f"[{known}](https://huggingface.co/{known})") if known else code(Path(name).name),
    }


# --- text that means nothing in Markdown, Python or a shell ----------------------------------------


class Verbatim(str):
    """Text that is Markdown already, or stands in a block of code: `plain` leaves it alone."""

    __slots__ = ()


def plain(text: str) -> str:
    """The text as it is read, on one line: no markup, no HTML, no end of a table's cell."""
    return text if isinstance(text, Verbatim) else _SPECIAL.sub(r"\\\g<0>", _one_line(text))


def code(text: str) -> Verbatim:
    """The text as a span of code, whatever backticks there are in it."""
    text = _one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return Verbatim(f"{fence}{space}{text}{space}{fence}")


def in_python(text: str) -> Verbatim:
    """The text as a literal of Python."""
    return Verbatim(json.dumps(text, ensure_ascii=False))


def in_shell(text: str) -> Verbatim:
    """In double quotes, as in Python, where a shell finds nothing in it to expand; on one line."""
    is_path = re.fullmatch(r"[\w./~ @+-]+", text)
    return in_python(text) if is_path else Verbatim(shlex.quote(" ".join(text.split())))


def request(model: str, text: str, causal: bool) -> Verbatim:
    """The body of a request for the reward of a rendered conversation, quoted for a shell."""
    body: dict[str, Any] = {"inputs": text, "raw_scores": True}
    if causal:
        body = {"model": model, "input": text, "add_special_tokens": False, "use_activation": False}
    return Verbatim(shlex.quote(json.dumps(body)))


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))
