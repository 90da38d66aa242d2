"""Rows of a source to comparisons: the first of two cached passes over a data set."""

import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import datasets as hf_datasets
from trl.scripts.utils import DatasetConfig

from rm_recipe import preferences, sources, transcripts
from rm_recipe.errors import DataError
from rm_recipe.json_files import JSON, NUMBER, decode
from rm_recipe.passes import run_pass
from rm_recipe.preferences import Excluded, Malformed, Message
from rm_recipe.split import Split, set_excluded_apart

PEEK = 1000  # rows of a JSON file that say which columns it has
_WANTED = set().union(*preferences.SHAPES) | {"subset"}

_TEXT = hf_datasets.Value("string")
_PARSED = {
    "prompt": hf_datasets.List({"role": _TEXT, "content": _TEXT}),
    "responses": hf_datasets.List(_TEXT),
    "ranks": hf_datasets.List(hf_datasets.Value("int32")),
    "margins": hf_datasets.List(hf_datasets.Value("float64")),
    "subset": _TEXT,
    "margin_fault": _TEXT,
    "row": hf_datasets.Value("int64"),
    "prompt_key": hf_datasets.Value("int64"),
    "prompts_differ": hf_datasets.Value("bool"),
    "excluded": _TEXT,
}


def parse_rows(
    rows: hf_datasets.Dataset,
    source: DatasetConfig,
    split: str,
    subset: str,
    margin_column: str | None,
    margin_map: dict[str | int, float] | None,
    num_proc: int | None,
) -> Split:
    """The comparisons of one source; its own columns give way to `_PARSED`.

    Raises:
        DataError: the columns are not those of comparisons, or a row is malformed.
    """
    file = sources.find_file(source, split)
    place, unit = f"'{file or source.path}'", "line" if file and ".jsonl" in file.suffixes else "row"
    place = place if file else f"{place}, split '{split}'"
    columns = _columns(rows, place, unit)
    if source.columns is not None:
        missing = set(source.columns) - set(columns)
        if missing:
            raise DataError(f"{place} has no column {', '.join(sorted(missing))} ('columns')")
        columns = list(source.columns)
    if not preferences.is_comparison_shape(columns):
        has = ", ".join(columns) or "none"
        raise DataError(f"{place}: its columns are {has}; rm_recipe needs {preferences.SHAPES_IN_WORDS}")
    if margin_column is not None and margin_column not in columns:
        raise DataError(f"{place} has no column '{margin_column}' (margin_column)")
    empty = dict.fromkeys(column for column in columns if column in _WANTED | {margin_column})
    if JSON not in rows.column_names:
        rows = rows.select_columns(list(empty))

    def parse(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        parsed = []
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            row = dict(zip(batch, values, strict=True))
            number = row.get(NUMBER, index + 1) if JSON in row else index + 1
            try:
                row = decode(row[JSON]) if JSON in row else row
                row = empty | {key: value for key, value in row.items() if key in empty}
                row["subset"] = row.get("subset") or subset
                parsed.append(_parsed_row(row, number, margin_column, margin_map))
            except (Malformed, ValueError) as fault:
                raise DataError(f"{place}, {unit} {number}: {fault}") from None
        return {name: [row[name] for row in parsed] for name in _PARSED}

    ours = [sys.modules[__name__], preferences, transcripts]
    try:
        parsed = run_pass(
            rows,
            parse,
            "Parsing",
            _PARSED,
            [subset, margin_column, margin_map, source.columns, *ours],
            num_proc,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
        )
    except UnicodeDecodeError:  # its reader lets it through, Python's text does not
        raise DataError(f"{place}: not UTF-8 text") from None
    return set_excluded_apart(Split(parsed, len(parsed)))


def _columns(rows: hf_datasets.Dataset, place: str, unit: str) -> list[str]:
    """The names of the columns: of JSON, those of its first rows."""
    if JSON not in rows.column_names:
        return list(rows.column_names)
    names: dict[str, None] = {}
    for row in rows.select(range(min(PEEK, len(rows)))):
        try:
            names |= dict.fromkeys(decode(row[JSON]))
        except ValueError as fault:
            raise DataError(f"{place}, {unit} {row[NUMBER]}: {fault}") from None
    return list(names)


def _parsed_row(
    row: dict[str, Any], number: int, margin_column: str | None, margin_map: dict[str | int, float] | None
) -> dict[str, Any]:
    """The comparison's columns, or empty ones and the reason."""
    result = {
        "prompt": [], "responses": [], "ranks": [], "margins": [], "margin_fault": "",
        "subset": str(row["subset"]), "row": number, "prompt_key": 0,
        "prompts_differ": preferences.prompts_differ(row), "excluded": "",
    }  # fmt: skip
    try:
        try:
            comparison = preferences.parse_row(row, margin_column, margin_map)
        except Excluded as excluded:  # without its margin it may be held out, not trained on
            if excluded.reason not in preferences.MARGIN_REASONS:
                raise
            result["margin_fault"] = excluded.reason
            comparison = preferences.parse_row(row)
    except Excluded as excluded:
        return {**result, "excluded": excluded.reason}
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
