"""Rows of a source to comparisons: the first of two cached passes over a data set."""

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import datasets as hf_datasets
import pyarrow.compute as pc
from trl.scripts.utils import DatasetConfig

from rm_recipe.data import formats, json_files, messages, sources, transcripts
from rm_recipe.data.dataset import Split, arrow_column, set_excluded_apart
from rm_recipe.data.json_files import JSON, NUMBER, decode
from rm_recipe.data.messages import Excluded, Malformed, Message
from rm_recipe.data.passes import run_pass
from rm_recipe.errors import DataError

PEEK = 1000  # rows of a JSON file in which its columns have to be found
_WANTED = set().union(*formats.SHAPES) | formats.ALSO_READ

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
    "key": hf_datasets.Value("int64"),
    "prompts_differ": hf_datasets.Value("bool"),
    "excluded": _TEXT,
    "detail": _TEXT,
    "unread": hf_datasets.List(_TEXT),
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
    place = f"'{file}'" if file else f"'{source.path}', split '{split}'"
    unit = json_files.unit(file) if file and sources.data_format(file) != ".parquet" else "row"
    _check_columns(rows, source, place, unit, margin_column)
    wanted = _WANTED | {margin_column}
    if source.columns is not None:
        wanted &= set(source.columns)
    unread = []
    if JSON not in rows.column_names:
        if source.columns is None:
            unread = [column for column in rows.column_names if column not in wanted]
        rows = rows.select_columns([column for column in rows.column_names if column in wanted])

    def parse(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """The columns of `_PARSED` for a batch."""
        parsed = []
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            row = dict(zip(batch, values, strict=True))
            number = row.get(NUMBER, index + 1)
            try:
                row = decode(row[JSON]) if JSON in row else row
                if source.columns is not None:
                    row = {key: value for key, value in row.items() if key in wanted}
                parsed.append(_parsed_row(row, number, subset, margin_column, margin_map))
            except (Malformed, ValueError) as fault:
                raise DataError(f"{place}, {unit} {number}: {fault}") from None
        return {name: [row[name] for row in parsed] for name in _PARSED}

    ours = [sys.modules[__name__], messages, formats, transcripts]
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
    except UnicodeDecodeError:  # Parquet's reader lets it through, Python's text does not
        raise DataError(f"{place}: not UTF-8 text") from None
    differing = int(pc.sum(arrow_column(parsed, "prompts_differ")).as_py() or 0)
    unread += pc.unique(pc.list_flatten(arrow_column(parsed, "unread"))).to_pylist()
    parsed = parsed.remove_columns(["prompts_differ", "unread"])
    return set_excluded_apart(Split(parsed, len(parsed), differing_prompts=differing, unread=unread))


def _check_columns(
    rows: hf_datasets.Dataset, source: DatasetConfig, place: str, unit: str, margin_column: str | None
) -> None:
    """Raises DataError where the columns, of JSON those of its first rows, cannot be comparisons."""
    columns = dict.fromkeys(rows.column_names)
    if JSON in columns:
        columns = {}
        for row in rows.select(range(min(PEEK, len(rows)))):
            try:
                columns |= dict.fromkeys(decode(row[JSON]))
            except ValueError as fault:
                raise DataError(f"{place}, {unit} {row[NUMBER]}: {fault}") from None
    missing = set(source.columns or ()) - set(columns)
    if missing:
        raise DataError(f"{place} has no column {', '.join(sorted(missing))} ('columns')")
    read = source.columns or list(columns)
    if not formats.is_comparison_shape(read):
        has = ", ".join(read) or "none"
        raise DataError(f"{place}: its columns are {has}; rm_recipe needs {formats.SHAPES_IN_WORDS}")
    if margin_column is not None and margin_column not in read:
        raise DataError(f"{place} has no column '{margin_column}' (margin_column)")


def _parsed_row(
    row: dict[str, Any],
    number: int,
    subset: str,
    margin_column: str | None,
    margin_map: dict[str | int, float] | None,
) -> dict[str, Any]:
    """The comparison's columns, or empty ones and the reason."""
    own = row.get("subset")
    name = subset if own is None or own == "" else str(own).encode(errors="replace").decode()
    result: dict[str, Any] = {
        "prompt": [], "responses": [], "ranks": [], "margins": [], "margin_fault": "",
        "subset": name, "row": number, "prompt_key": 0, "key": 0,
        "prompts_differ": formats.prompts_differ(row), "excluded": "", "detail": "",
        "unread": formats.unread(row, margin_column),
    }  # fmt: skip
    try:
        try:
            comparison = formats.parse_row(row, margin_column, margin_map)
        except Excluded as excluded:  # without its margin it may be held out, not trained on
            if excluded.reason not in formats.MARGIN_REASONS:
                raise
            result["margin_fault"] = excluded.reason
            comparison = formats.parse_row(row)
    except Excluded as excluded:
        result["prompts_differ"] |= excluded.reason == "differing_prompts"
        return {**result, "excluded": excluded.reason, "detail": excluded.detail}
    for name in ("prompt", "responses", "ranks", "margins"):
        result[name] = getattr(comparison, name)
    content = [result[name] for name in ("prompt", "responses", "ranks", "margins")]
    result["key"] = text_key([json.dumps(content, sort_keys=True)])
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
