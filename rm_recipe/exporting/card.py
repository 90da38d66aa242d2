"""The model card: what an export's files say of it, for people and for the Hub.

Everything comes from `proof.json`, `evaluation.json`, `config.json` and the run's own records; what is not
known is not said. Nothing here needs torch.
"""

import json
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rm_recipe.evaluation.findings import HELD_OUT, best_baseline, gate_words, readings, rule
from rm_recipe.evaluation.format import decimal, interval, limits, mapping, whole
from rm_recipe.exporting.compatibility import READ_ALIKE, needs_transformers_5
from rm_recipe.files import read_json, redact, visible
from rm_recipe.recipe.reader import saved_values
from rm_recipe.recipe.schema import looks_local

# --- text that means nothing in Markdown -------------------------------------------------------

_SPECIAL = re.compile(r"[\\`*\[\]<>|#]")


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


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))


# --- the model card ----------------------------------------------------------------------------

TEMPLATE = "model_card.md.jinja"
CARD = "README.md"
FIGURE = "reliability.png"
REPO_ID, LICENCE = re.compile(r"[\w.-]+(?:/[\w.-]+)?"), re.compile(r"[\w.+-]+")
LANGUAGE = re.compile(r"[a-z]{2,3}(-\w+)?")
TAGS = ["reward-model", "rlhf", "trl", "rm_recipe"]


def write_card(export: Path, run: Path, model: str) -> None:
    """Writes an export's `README.md`; everything else that it is about has to be there.

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
    for old in (_in_shell(json.loads(found[1])), found[1]) if found else ():
        text = text.replace(old, json.dumps(repo_id))
    return text


def _card(export: Path, run: Path, model: str, *, adapter: bool) -> str:
    config, proof = read_json(export / "config.json"), read_json(export / "proof.json")
    evaluation = read_json(export / "evaluation.json") if (export / "evaluation.json").is_file() else {}
    recipe = saved_values(run)
    base = _base(recipe)
    evaluated = mapping(evaluation, "datasets")
    samples, causal = proof["samples"], proof["reward_at"] == "last token"
    model = redact(model)
    text = (
        _environment()
        .from_string(_template())
        .render(
            name=run.resolve().name,
            model=Verbatim(_in_python(model)),
            shell_model=Verbatim(_in_shell(model)),
            at_home=model.startswith("~"),
            reward_funcs=code(f"reward_funcs={_in_python(model)}"),
            base=base["shown"],
            base_made=base["made"],
            languages=", ".join(base["languages"]),
            data=Verbatim(" and ".join(map(code, _data(recipe))) or "its data"),
            results=[_result(name, figures) for name, figures in evaluated.items()],
            sentences=_sentences(evaluation),
            picture=(export / FIGURE).is_file(),
            adapter=adapter,
            samples=samples,
            either_side=proof["max_abs_diff"]["padding_side"] is not None,
            reward_mean=config["reward_mean"],
            reward_std=config["reward_std"],
            causal=causal,
            served=Verbatim(_request(model, samples[0]["text"], causal) if samples else ""),
            proof=proof,
            max_length=config["rm_recipe"].get("max_length"),
            versions=_versions(config),
            **_special_tokens(export, proof),
            training=_training(recipe, read_json(run / "run.json")),
            hh_rlhf=any("hh-rlhf" in name for name in _data(recipe)),
        )
    )
    data = ModelCardData(
        base_model=base["id"],
        license=base["license"],
        language=base["languages"] or None,
        datasets=[name for name in _data(recipe) if not _is_local(name)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification",
        tags=TAGS,
        model_name=run.resolve().name,
        eval_results=[
            _eval_result(name, figures, recipe)
            for name, figures in evaluated.items()
            if "accuracy" in figures
        ]
        or None,
    )
    return redact(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _template() -> str:
    return resources.files("rm_recipe.exporting").joinpath(TEMPLATE).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(  # noqa: S701 - Markdown: `plain` escapes that, HTML too
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    environment.policies["json.dumps_function"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["small"] = _small
    return environment


def _small(value: float) -> str:
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"


# --- figures ---------------------------------------------------------------------------------


def _shown(name: str) -> str:
    """A data set's name without the folders of whoever evaluated on it."""
    return Path(name).name if _is_local(name) else name


def _result(name: str, figures: dict[str, Any]) -> list[str]:
    best = best_baseline(figures)
    ends = figures.get("accuracy_ci95")
    return [
        "held out" if name == HELD_OUT else _shown(name),
        decimal(figures.get("accuracy")),
        interval(ends) if limits(ends) else "",
        whole(figures.get("n_scored")),
        whole(sum(mapping(figures, "excluded").values())),
        f"{decimal(best[1])} ({rule(best[0])})" if best else "",
    ]


def _sentences(evaluation: dict[str, Any]) -> list[str]:
    gate = gate_words(evaluation.get("gate"))
    held_out = mapping(evaluation, "datasets", HELD_OUT)
    said = [f"{gate['verdict']}: {gate['why']}."] if gate else []
    return said + [sentence for _, sentence in readings(held_out)]


def _eval_result(name: str, figures: dict[str, Any], recipe: dict[str, Any]) -> EvalResult:
    trained_on = _data(recipe)
    held_out = name == HELD_OUT
    source = (trained_on[0] if trained_on else "unknown") if held_out else name
    subsets = recipe.get("dataset_subsets") if held_out else None
    return EvalResult(
        task_type="text-classification",
        task_name="Preference accuracy",
        dataset_type=_shown(source),
        dataset_name=_shown(source),
        dataset_config=", ".join(subsets) if subsets else None,
        dataset_split=recipe.get("dataset_test_split") if held_out else None,
        dataset_revision=recipe.get("dataset_revision") if held_out else None,
        metric_type="accuracy",
        metric_name="Preference accuracy, a tie is one half",
        metric_value=round(figures["accuracy"], 4),
        metric_args={
            "ci95": [round(end, 4) for end in figures.get("accuracy_ci95", [])],
            "comparisons": figures.get("n_scored"),
        },
    )


# --- where it comes from ---------------------------------------------------------------------


def _is_local(name: str) -> bool:
    return looks_local(name) or Path(name).exists()


def _data(recipe: dict[str, Any]) -> list[str]:
    """The data sets that the recipe trains on."""
    mixture: Iterable[dict[str, Any]] = recipe.get("datasets") or []
    names = [recipe.get("dataset_name"), *(part.get("path") for part in mixture)]
    return [str(name) for name in dict.fromkeys(names) if name]


def _base(recipe: dict[str, Any]) -> dict[str, Any]:
    """The base model: its id on the Hub, if it has one, its licence, if it says so, its languages, how it was
    made, and what to call it."""
    name = str(recipe["model_name_or_path"])
    data: Any = None
    with suppress(Exception):  # without a card, without a network: then nothing is known
        data = ModelCard.load(Path(name, CARD) if _is_local(name) else name, ignore_metadata_errors=True).data
    known = data.base_model if _is_local(name) and data else name
    ident = known if isinstance(known, str) and REPO_ID.fullmatch(known) and not _is_local(known) else None
    languages = data.language if data else None
    made = data.to_dict().get("made") if _is_local(name) and data else None
    link = Verbatim(f"[{ident}](https://huggingface.co/{ident})")
    licence = data.license if data else None
    return {
        "id": ident,
        "license": licence if isinstance(licence, str) and LICENCE.fullmatch(licence) else None,
        "languages": [
            language
            for language in (languages if isinstance(languages, list) else [languages])
            if isinstance(language, str) and LANGUAGE.fullmatch(language)
        ],
        "made": made if isinstance(made, str) else None,
        "shown": link if ident else code(Path(name).name),
    }


def _versions(config: dict[str, Any]) -> Verbatim:
    """Which transformers reads it."""
    if needs_transformers_5(config):
        return Verbatim("It needs transformers 5: transformers 4 has no words for its positions.")
    if config.get("model_type") not in READ_ALIKE.split():
        return Verbatim("It is for transformers 5; no model of its kind was tried in transformers 4.")
    text = "transformers 4.57 and 5 read it alike."
    if config.get("attn_logit_softcapping"):  # Gemma 2
        text += (
            ' In transformers 4 add `attn_implementation="eager"`, as its default leaves out the soft cap.'
        )
    return Verbatim(text)


def _special_tokens(export: Path, proof: dict[str, Any]) -> dict[str, Any]:
    tokenizer = read_json(export / "tokenizer_config.json")
    end = proof.get("end_token", "")
    return {
        "pad_token": code(str(tokenizer.get("pad_token"))),
        "end_token": code(end),
        "end_differs": end != tokenizer.get("eos_token"),
    }


def _training(recipe: dict[str, Any], run: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader would ask of the run, and what it cost."""
    bits = "4" if recipe.get("load_in_4bit") else "8" if recipe.get("load_in_8bit") else ""
    method = "in full"
    if recipe.get("use_peft"):
        method = f"LoRA, rank {recipe['lora_r']}, alpha {recipe['lora_alpha']}"
        method += f", on a base in {bits} bits" if bits else ""
    batch = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * run["processes"]
    packages = ("torch", "transformers", "trl", "peft", "rm-recipe")
    return [
        ("method", method),
        ("comparisons", f"{run['comparisons']['train']:,}, {run['steps']} steps of {batch}"),
        ("learning rate", f"{recipe['learning_rate']:g}"),
        ("longest conversation", f"{recipe['max_length']} tokens" if recipe.get("max_length") else "any"),
        ("seed", str(run["seed"])),
        (
            "cost",
            f"{run['train_seconds'] / 60:.1f} minutes on {run['device']}, at most "
            f"{run['peak_memory_bytes'] / 1e9:.1f} GB",
        ),
        ("made with", ", ".join(f"{name} {run['versions'].get(name)}" for name in packages)),
    ]


def _in_python(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _in_shell(text: str) -> str:
    """In double quotes, as in Python, where a shell finds nothing in it to expand; on one line."""
    plain_path = re.fullmatch(r"[\w./~ @+-]+", text)
    return _in_python(text) if plain_path else shlex.quote(" ".join(text.split()))


def _request(model: str, text: str, causal: bool) -> str:
    """The body of a request for the reward of a rendered conversation, quoted for a shell."""
    body: dict[str, Any] = {"inputs": text, "raw_scores": True}
    if causal:
        body = {"model": model, "input": text, "add_special_tokens": False, "use_activation": False}
    return shlex.quote(json.dumps(body))
