"""Rows of a source to comparisons: the first of two cached passes over a data set."""

import csv
import errno
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BufferedReader, TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError
from trl.scripts.utils import DatasetConfig

from rm_recipe.data import comparison, formats
from rm_recipe.data.comparison import Comparison, Excluded, Malformed, Message
from rm_recipe.data.dataset import cache_key
from rm_recipe.errors import DataError, one_line
from rm_recipe.files import LFS_POINTER, is_lfs_pointer, sha256
from rm_recipe.recipe.schema import DATA_FORMATS, DataArguments, looks_local

CODE = [sys.modules[__name__], formats, comparison]  # that a comparison follows from
AS_UTF_8 = "; save it as UTF-8 (Excel: 'CSV UTF-8')"
PEEK = 1000  # rows of a JSON file in which its columns have to be found

csv.field_size_limit(2**31 - 1)  # a long conversation is a field

_TEXT = hf_datasets.Value("string")
_PARSED = {
    "prompt": hf_datasets.List(dict.fromkeys(["role", "content", "tool_calls"], _TEXT)),
    "responses": hf_datasets.List(_TEXT),
    "ranks": hf_datasets.List(hf_datasets.Value("int32")),
    "margins": hf_datasets.List(hf_datasets.Value("float64")),
    **dict.fromkeys(["prompts_differ", "scored_lower"], hf_datasets.Value("bool")),
    **dict.fromkeys(["subset", "tools", "excluded", "detail"], _TEXT),
    **dict.fromkeys(["row", "prompt_key", "first_turn_key", "key"], hf_datasets.Value("int64")),
}
_FEATURES = hf_datasets.Features(_PARSED)


def load_rows(
    source: DatasetConfig, split: str, data: DataArguments, margin_column: str | None
) -> tuple[hf_datasets.Dataset, list[str], str]:
    """Read one split of one source: every row a comparison, or the reason why not. Cached by content.

    Args:
        split: its name, perhaps with a slice as `datasets` has them: `train[:20]`.

    Returns:
        the rows (`_PARSED`), the columns of the source that are not read, and its shape in words.

    Raises:
        DataError: there is no such split, the source cannot be read, its columns are not those of
            comparisons, or a row is malformed; with the row.
    """
    found, subset = find_split(source, split, data.dataset_revision), label(source, bool(data.datasets))
    columns, file = columns_of(found), found[0] if isinstance(found, list) else None
    content = [sha256(part) for part in found] if file else found._fingerprint
    place = f"'{file}'" if file and len(found) == 1 else f"'{source.path}', split '{split}'"
    ours = _named(columns, source, data, margin_column, place)
    shape = formats.shape_of(ours, place, data.columns or {})
    if shape.prompt == "prompt" and not shape.known and (asked := ours["prompt"]) in formats.PROMPT_PARTS:
        shape, ours[asked] = replace(shape, prompt=asked), asked  # with its `input` and the like
    margin = next((name for name, column in ours.items() if column == margin_column), None)
    wanted = {name: column for name, column in ours.items() if name in (*shape.read, margin)}
    if not source.columns:  # a row may have a column that the first ones lack
        wanted |= {name: name for name in shape.read if name not in (*ours, *ours.values())}
    scores = formats.score_columns(source.columns or columns)
    unread = [] if source.columns else [name for name in columns if name and name not in wanted.values()]
    known, other = formats.in_words(shape, ours)
    names = set() if "chosen" in (data.columns or {}) else formats.names_of(unread)
    options = (margin, data.margin_map, shape, names)

    def parse() -> Iterator[dict[str, Any]]:
        """The columns of `_PARSED`, row by row."""
        for number, row in rows_of(found, [*wanted.values(), *scores]):
            lower = formats.scored_lower(row, scores)
            row = {name: row.get(column) for name, column in wanted.items()}
            try:
                for part in formats.rows_of(row, shape):
                    yield _parsed(part, number, subset, *options) | {"scored_lower": lower}
            except Malformed as fault:  # which is told by the name that the file has for the column
                told = Malformed(wanted.get(fault.args[0], fault.args[0]), *fault.args[1:])
                raise DataError(f"{place}, {unit(file)} {number}: {told}; read as {known}{other}") from None

    key = cache_key(content, subset, margin_column, data.margin_map, source.columns, data.columns, *CODE)
    try:
        parsed = hf_datasets.Dataset.from_generator(parse, features=_FEATURES, fingerprint=key)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    return _sliced(parsed, split), unread, known


def _named(
    columns: list[str], source: DatasetConfig, data: DataArguments, margin_column: str | None, place: str
) -> dict[str, str]:
    """The columns of a source that may be read, by our names; one that is called so and not meant is not."""
    named = theirs(data.columns)
    asked = [*(source.columns or columns), *filter(None, [margin_column])]
    if missing := {*asked, *named.values()} - {*columns}:
        has = f"{place} has the columns {', '.join(columns)}"
        raise DataError(f"{has}, and not {', '.join(sorted(missing))} ('columns', 'margin_column')")
    given = {name: column for name, column in named.items() if name != "verdict" or "chosen" in named}
    ours = {name: name for name in asked if name not in given.values()} | given
    if margin_column and margin_column not in ours.values():
        reason = f"'columns' gives its name to '{ours[margin_column]}'"
        raise DataError(f"{place}: 'margin_column: {margin_column}' is not read, since {reason}; rename it")
    return ours


def theirs(columns: dict[str, str] | None) -> dict[str, str]:
    """The columns that `columns` names, without what it says of a verdict's values: `winner=1/2`."""
    return {k: v.partition("=")[0] if k == "verdict" else v for k, v in (columns or {}).items()}


def _sliced(rows: hf_datasets.Dataset, split: str) -> hf_datasets.Dataset:
    """The rows of a slice, `train[10:20]` or `train[:50%]`, as `datasets` means it."""
    if "[" not in split:
        return rows
    try:
        instruction = hf_datasets.ReadInstruction.from_spec(split)
        [part] = instruction.to_absolute({split.partition("[")[0]: len(rows)})
    except (ValueError, AssertionError) as error:
        raise DataError(f"split '{split}' cannot be read: {one_line(error)}") from None
    return rows.select(range(part.from_, part.to))


def _parsed(row: formats.Row, number: int, subset: str, *options: Any) -> dict[str, Any]:
    """The columns of `_PARSED`: of a comparison, or empty ones and the reason."""
    if row.get("subset") not in (None, ""):
        subset = str(row["subset"]).encode(errors="replace").decode()
    reason = detail = ""
    try:
        found = formats.parse_row(row, *options)
    except Excluded as excluded:
        found, reason, detail = Comparison([], []), excluded.reason, excluded.detail
    turns = normalised_prompt(found.prompt)
    content = [found.prompt, found.responses, found.ranks, found.margins, *filter(None, [found.tools])]
    return {
        **vars(found),
        "subset": subset,
        "row": number,
        "prompt_key": text_key(turns),
        "first_turn_key": text_key([next((turn for turn in turns if turn.startswith("user ")), "")]),
        "key": text_key([json.dumps(content, sort_keys=True)]),
        "prompts_differ": formats.prompts_differ(row) or reason == "differing_prompts",
        "excluded": reason,
        "detail": detail,
    }


def normalised_prompt(prompt: list[Message]) -> list[str]:
    """Return what equal prompts have in common: roles and normalised texts."""
    return [f"{m['role']} {normalise(m['content'])}{m.get('tool_calls') or ''}" for m in prompt]


def text_key(texts: Sequence[str]) -> int:
    """Hash texts to a 64-bit number, the same on every machine."""
    digest = hashlib.blake2b("\x00".join(texts).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


# Scripts without spaces between words, each a range of characters: Thai, Lao, Tibetan, Burmese, Khmer; kana
# and Chinese characters. There a character counts as a word.
UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"


def normalise(text: str) -> str:
    """Return a text in lower case with single spaces: what is equal then counts as the same text."""
    return " ".join(text.split()).casefold()


# --- sources: files, folders, the Hub and mixtures ---------------------------------------------


def sources_of(data: DataArguments) -> list[DatasetConfig]:
    """List the sources that a recipe names; `split` is the train split.

    They are `dataset_name` with each of `dataset_subsets`, or the entries of TRL's `datasets`.
    """
    if data.datasets:
        return [DatasetConfig(**entry) for entry in data.datasets]
    return [
        DatasetConfig(path=data.dataset_name, data_dir=subset, split=data.dataset_train_split)
        for subset in data.dataset_subsets or (None,)
    ]


def label(source: DatasetConfig, of_mixture: bool) -> str:
    """Name what rows without a `subset` get: the folder or configuration, in a mixture also the data set."""
    path = Path(source.path)
    name = "/".join(path.parts[-2:] if path.is_file() else path.parts[-1:]) if of_mixture else ""
    return "/".join(filter(None, [name, source.data_dir or source.name]))


def read_name(name: str) -> dict[str, Any]:
    """Read `NAME[:SUBSET][@SPLIT][#REVISION]` as keys of a recipe; a path that exists is one as it stands."""
    drive = r"(?:[A-Za-z]:(?=[\\/]))?"
    parts = re.fullmatch(rf"({drive}.+?)(?::([^:@#]+))?(?:@([^@#]+))?(?:#([^#]+))?", name, re.DOTALL)
    if parts is None or Path(name).exists():
        return {"dataset_name": name}
    path, subset, split, revision = parts.groups()
    named = {"dataset_test_split": split, "dataset_revision": revision}
    named |= {"dataset_name": path, "dataset_subsets": subset and [subset]}
    return {key: value for key, value in named.items() if value}


def splits_of(source: DatasetConfig, revision: str | None = None) -> dict[str, Any]:
    """Find the splits of a source: the local files of each, or of a data set on the Hub its rows.

    A file is one split, whatever it is called: its name here is empty.

    Raises:
        DataError: there is no such file, folder or data set.
    """
    place = Path(source.path, source.data_dir or "", str(source.data_files or ""))
    if revision and place.exists():
        raise DataError(f"'{place}' is no data set of the Hub: leave out 'dataset_revision: {revision}'")
    if place.is_file():
        if data_format(place) not in DATA_FORMATS:
            raise DataError(f"'{place}' is no data file; expected {', '.join(DATA_FORMATS)} (.gz too)")
        return {"": [place]}
    if place.is_dir():
        return _splits_in(place)
    if Path(source.path).exists() or looks_local(source.path):
        raise DataError(f"'{place}' does not exist; check 'dataset_name' and 'dataset_subsets'")
    keys = {key: getattr(source, key) for key in ("path", "name", "data_dir", "data_files")}
    try:
        if source.data_dir and source.data_dir in hf_datasets.get_dataset_config_names(source.path, revision):
            keys |= {"name": source.data_dir, "data_dir": None}
        return hf_datasets.load_dataset(**keys, revision=revision)
    except Exception as error:
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # not the data's fault
            raise
        reason = one_line(cause) or type(cause).__name__
        raise DataError(f"data set '{source.path}' cannot be loaded from the Hub: {reason}") from None


_SPLIT = "(train|test|validation|valid|val|dev)"
_SHARD = re.compile(r"-\d{5}-of-\d{5}(-\w+)?$")  # of a data set that came from the Hub


def _splits_in(folder: Path) -> dict[str, Any]:
    """The files of a local folder, by their splits' names, which are as on the Hub: train.jsonl.gz.

    The folder may be one of `save_to_disk`, or a clone of a data set on the Hub.
    """
    if (folder / "state.json").is_file():
        return {"": sorted(folder.glob("*.arrow"))}
    if (folder / "dataset_dict.json").is_file():
        return {part.name: sorted(part.glob("*.arrow")) for part in folder.iterdir() if part.is_dir()}
    splits: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        hidden = path.name[0] == "."  # as macOS leaves them
        if hidden or not path.is_file() or data_format(path) not in DATA_FORMATS or not _may_be_a_split(path):
            continue
        stem = path.name[: path.name.lower().rindex(data_format(path))]
        name = _SHARD.sub("", stem)
        if name in splits and name == stem:
            raise DataError(f"'{folder}' has two files for the split '{name}'")
        splits.setdefault(name, []).append(path)
    if not splits and (folder / "data").is_dir():
        return _splits_in(folder / "data")
    # As the Hub converts a data set: train/0000.parquet.
    parts = [part for part in sorted(folder.iterdir()) if part.is_dir() and re.fullmatch(_SPLIT, part.name)]
    return splits or {part.name: files for part in parts if (files := [*chain(*_splits_in(part).values())])}


def _may_be_a_split(path: Path) -> bool:
    """Tell whether a file holds comparisons; a .json, .csv or .arrow beside them may say something else."""
    if data_format(path) in (".jsonl", ".ndjson", ".parquet") or re.match(f"{_SPLIT}[.-]", path.name):
        return True
    try:
        return bool(formats.shapes_of(columns_of([path])))
    except DataError:
        return False


def find_split(source: DatasetConfig, split: str, revision: str | None = None) -> Any:
    """Find a split of a source, as `splits_of` has it; raises DataError where there is none.

    `train` is also `train_prefs`, and `test` `test_prefs`, or the only split that there is; but what is there
    for testing alone is not trained on.
    """
    splits, name = splits_of(source, revision), split.partition("[")[0]
    only = next(iter(splits), "")
    names = [name, f"{name}_prefs", ""]
    if len(splits) == 1 and (name == "test" or (name == "train" and not only.startswith("test"))):
        names.append(only)
    for name in names:
        if name in splits:
            return splits[name]
    raise no_split(splits, split, source)


def no_split(splits: dict[str, Any], split: str, source: DatasetConfig) -> DataError:
    """Say that a source has no such split, and what can be done."""
    place = Path(source.path, source.data_dir or "")
    parts = [*sorted(place.glob("*/")), *sorted(place.glob("data/*/"))]
    folders = [str(part.relative_to(place)) for part in parts if _splits_in(part)]
    if folders and not splits:
        return DataError(f"'{place}' has folders of data: name them in 'dataset_subsets': {folders}")
    if place.is_dir() and not splits:
        return DataError(f"'{place}' holds no data file: it needs train{' or train'.join(DATA_FORMATS)}")
    others = ", ".join(filter(None, splits))
    return DataError(
        f"'{place}' has no split '{split}'; it has {others or 'none'}; set 'dataset_train_split' and "
        "'dataset_test_split', or 'test_split_size' to hold out that share of all prompts"
    )


# --- files -------------------------------------------------------------------------------------
# Not by `load_dataset`: of JSON it fixes the types of columns from a file's beginning, and turns a later
# number or message list into text without a word, or refuses a sound file.


def data_format(file: Path) -> str:
    """Return the file's ending, `.gz` apart: one of `DATA_FORMATS`, or another."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def unit(file: Any) -> str:
    """Say what the numbers of a file's rows count."""
    return "line" if isinstance(file, Path) and data_format(file) in (".jsonl", ".ndjson") else "row"


def columns_of(found: Any) -> list[str]:
    """The columns of a split (see `splits_of`); of text files the keys in the first `PEEK` rows."""
    if not isinstance(found, list):
        return list(found.column_names)
    first = islice(read_rows(found[0], columns=[]), PEEK)
    return list(dict.fromkeys(name for _, row in first for name in row))


def rows_of(found: Any, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a split, of its shards' rows numbered on."""
    if not isinstance(found, list):
        read = [name for name in found.column_names if name in columns]
        yield from enumerate(found.select_columns(read), 1)
        return
    before = number = 0
    for file in found:
        for number, row in read_rows(file, columns):
            yield before + number, row
        before += number


def read_rows(file: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file of `DATA_FORMATS` (.gz too): its rows, numbered from 1 by line, element or row.

    Args:
        columns: of a table, those to read, all by default; with none it is one row, the columns' names.

    Raises:
        DataError: there is no such file, it cannot be read or holds no rows; with the row.
    """
    number = 0
    try:
        if is_lfs_pointer(file):
            raise DataError(f"'{file}' {LFS_POINTER}")
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
            for number, row in _values(stream, file, columns):
                if not isinstance(row, dict):
                    hint = "; a file that is one list is named .json" if isinstance(row, list) else ""
                    kind = f"a row is a JSON object, this is a {type(row).__name__}{hint}"
                    raise DataError(f"'{file}', {unit(file)} {number}: {kind}")
                yield number, row
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, csv.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        reason += AS_UTF_8 if isinstance(error, UnicodeDecodeError) else ""
        quotes = "; in a quoted text a quote is written twice, and the last one stands before the separator"
        reason += quotes if isinstance(error, csv.Error) else ""
        after = f" after {unit(file)} {number}" if number else ""
        raise DataError(f"'{file}' cannot be read{after}: {reason}") from None
    if not number:
        raise DataError(f"'{file}' is empty: it holds no rows")


def _values(
    stream: gzip.GzipFile | BufferedReader, file: Path, columns: Sequence[str] | None
) -> Iterator[tuple[int, Any]]:
    """The rows of a table, the elements of a JSON list, read all at once, or what each line holds."""
    start, ending = stream.read(1000), data_format(file)
    stream.seek(0)
    if ending in (".parquet", ".arrow"):
        open_arrow = pa.ipc.open_file if start.startswith(b"ARROW1") else pa.ipc.open_stream
        parquet = ending == ".parquet"
        table = pq.ParquetFile(stream) if parquet else open_arrow(stream).read_all()
        names = getattr(table, "schema_arrow", table.schema).names
        read = [name for name in names if columns is None or name in columns]
        batches = table.iter_batches(1000, columns=read) if parquet else table.select(read).to_batches(1000)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate([dict.fromkeys(names)] if columns == [] else rows, 1)
    elif ending in (".csv", ".tsv"):
        text, head = TextIOWrapper(stream, "utf-8-sig", newline=""), start.partition(b"\n")[0]
        comma = max([b",", b";", b"\t", b"|"], key=head.count).decode()  # Excel writes what the country uses
        reader = csv.DictReader(text, delimiter=comma, strict=True)
        names = [name for name in reader.fieldnames or () if name.strip()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"'{file}' has two columns of the same name: {', '.join(twice)}")
        for number, row in enumerate(reader, 1):
            if any(cell.strip() for cell in row.pop(None, [])):
                hint = "a text that holds the separator is written in quotes, without a space before them"
                there = f"more cells than the header has ({', '.join(names)})"
                raise DataError(f"'{file}', row {number}: {there}; {hint}")
            yield number, row
    elif ending == ".json" and start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from enumerate(_decode(stream.read(), f"'{file}', the list"), 1)
    else:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _decode(line, f"'{file}', line {number}")


def _decode(content: bytes, place: str) -> Any:
    """What UTF-8 JSON says; raises DataError with the place."""
    try:
        return json.loads(content.decode("utf-8-sig").rstrip())
    except (ValueError, RecursionError) as error:  # no UTF-8, or a number or thousands of brackets too many
        lines = "; a row is one line, or an element of the one list that a .json file is"
        hint = AS_UTF_8 if isinstance(error, UnicodeDecodeError) else lines
        raise DataError(f"{place}: not JSON: {error}{hint}") from None
