"""Rows of a source to comparisons: the first of two cached passes over a data set."""

import hashlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import datasets as hf_datasets
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from trl.scripts.utils import DatasetConfig

from rm_recipe import preferences, sources, transcripts
from rm_recipe.errors import DataError
from rm_recipe.preferences import Excluded, Malformed, Message
from rm_recipe.split import Split, arrow_column, processes, set_excluded_apart

MALFORMED = "malformed: "

_TEXT = hf_datasets.Value("string")
_PARSED = hf_datasets.Features(
    {
        "prompt": hf_datasets.List({"role": _TEXT, "content": _TEXT}),
        "responses": hf_datasets.List(_TEXT),
        "ranks": hf_datasets.List(hf_datasets.Value("int32")),
        "margins": hf_datasets.List(hf_datasets.Value("float64")),
        "subset": _TEXT,
        "row": hf_datasets.Value("int64"),
        "prompt_key": hf_datasets.Value("int64"),
        "prompts_differ": hf_datasets.Value("bool"),
        "excluded": _TEXT,
    }
)


def parse_rows(
    rows: hf_datasets.Dataset,
    source: DatasetConfig,
    split: str,
    subset: str,
    margin_column: str | None,
    margin_map: dict[str | int, float] | None,
    num_proc: int | None,
) -> Split:
    """The comparisons of one source; its own columns give way to `_PARSED`."""
    columns = set(rows.column_names)
    if not preferences.is_comparison_shape(columns):
        has = ", ".join(rows.column_names) or "none"
        raise DataError(
            f"'{source.path}', split '{split}': its columns are {has}; rm_recipe needs "
            f"{preferences.SHAPES_IN_WORDS}"
        )
    if margin_column is not None and margin_column not in columns:
        raise DataError(f"'{source.path}', split '{split}' has no column '{margin_column}' (margin_column)")
    wanted = set().union(*preferences.SHAPES) | {"subset", margin_column}
    rows = rows.select_columns([column for column in rows.column_names if column in wanted])

    def parse(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        parsed = []
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            row = dict(zip(batch, values, strict=True))
            row["subset"] = row.get("subset") or subset
            parsed.append(_parsed_row(row, index, margin_column, margin_map))
        return {name: [row[name] for row in parsed] for name in _PARSED}

    modules = [inspect.getsource(m) for m in (sys.modules[__name__], preferences, transcripts)]
    try:
        parsed = rows.map(
            parse,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            new_fingerprint=Hasher.hash([rows._fingerprint, subset, margin_column, margin_map, modules]),
            num_proc=processes(len(rows), num_proc),
            desc="Parsing",
            features=_PARSED,
        )
    except UnicodeDecodeError as error:  # the reader lets it through, Python's text does not
        file = sources.find_file(source, split)
        raise DataError(f"'{file or source.path}' cannot be read: {sources.explain(error, file)}") from None
    differing = int(pc.sum(arrow_column(parsed, "prompts_differ")).as_py() or 0)
    result = set_excluded_apart(
        Split(parsed.remove_columns("prompts_differ"), len(parsed), differing_prompts=differing)
    )
    for reason, names in result.first_rows.items():
        if reason.startswith(MALFORMED):
            row = names[0].rpartition(":")[2]
            file = sources.find_file(source, split) or source.path
            raise DataError(f"'{file}', row {row}: {reason.removeprefix(MALFORMED)}")
    return result


def _parsed_row(
    row: dict[str, Any], index: int, margin_column: str | None, margin_map: dict[str | int, float] | None
) -> dict[str, Any]:
    """The comparison's columns, or empty ones and the reason."""
    result = {
        "prompt": [], "responses": [], "ranks": [], "margins": [], "subset": str(row["subset"]),
        "row": index + 1, "prompt_key": 0, "prompts_differ": preferences.prompts_differ(row), "excluded": "",
    }  # fmt: skip
    try:
        comparison = preferences.parse_row(row, margin_column, margin_map)
    except Excluded as excluded:
        return {**result, "excluded": excluded.reason}
    except Malformed as fault:
        column, expected, value = fault.args
        found = f"{type(value).__name__} {str(value)[:60]!r}"
        return {**result, "excluded": f"{MALFORMED}column '{column}' should be {expected}, not {found}"}
    for name in ("prompt", "responses", "ranks", "margins"):
        result[name] = getattr(comparison, name)
    return {**result, "prompt_key": text_key(normalised_prompt(comparison.prompt))}


def normalised_prompt(prompt: list[Message]) -> list[str]:
    """What two prompts have in common that are the same one: roles and normalised texts."""
    return [f"{message['role']} {normalise(message['content'])}" for message in prompt]


def text_key(texts: Sequence[str]) -> int:
    """A 64-bit number that stands for these texts, the same on every machine."""
    digest = hashlib.blake2b("\x00".join(texts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


def normalise(text: str) -> str:
    """A text without what does not make it another one: case and the kind of white space."""
    return " ".join(text.split()).casefold()
