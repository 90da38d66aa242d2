"""Rows of a source to comparisons: the first of two cached passes over a data set."""

import csv
import errno
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BufferedReader, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError
from trl.scripts.utils import DatasetConfig

from rm_recipe.data import comparison, formats
from rm_recipe.data.comparison import Comparison, Excluded, Malformed, Message
from rm_recipe.data.dataset import Split, arrow_column, cache_key, set_aside
from rm_recipe.errors import DataError, one_line
from rm_recipe.recipe.schema import DATA_FORMATS, DataArguments, looks_local

CODE = [sys.modules[__name__], formats, comparison]  # that a comparison follows from
PEEK = 1000  # rows of a JSON file in which its columns have to be found

csv.field_size_limit(2**31 - 1)  # a long conversation is a field

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
}


def load_comparisons(
    source: DatasetConfig, split: str, subset: str, data: DataArguments, margin_column: str | None
) -> Split:
    """Read one split of one source: every row a comparison or counted. Cached by content.

    Args:
        subset: the name that rows without a `subset` of their own get.

    Raises:
        MissingSplitError: the source has other splits.
        DataError: the source cannot be read, its columns are not those of comparisons, or a row is
            malformed; with the row.
    """
    file = find_file(source, split)
    place = f"'{file}'" if file else f"'{source.path}', split '{split}'"
    if file:
        columns, content = _columns_of(file), content_hash(file)
    else:
        table = _load_from_hub(source, split, data.dataset_revision)
        columns, content = table.column_names, table._fingerprint
    _check_columns(columns, source.columns, place, margin_column)
    chosen = source.columns or columns
    wanted = [name for name in chosen if name in formats.COLUMNS or name == margin_column]

    def parse() -> Iterator[dict[str, Any]]:
        rows = read_rows(file, wanted) if file else enumerate(table.select_columns(wanted), 1)
        for number, row in rows:
            if source.columns is not None:
                row = {name: row.get(name) for name in source.columns}
            try:
                yield _parsed(row, number, subset, margin_column, data.margin_map)
            except Malformed as fault:
                raise DataError(f"{place}, {unit(file)} {number}: {fault}") from None

    settings = [subset, margin_column, data.margin_map, source.columns]
    try:
        parsed = hf_datasets.Dataset.from_generator(
            parse,
            features=hf_datasets.Features(_PARSED),
            fingerprint=cache_key(content, *settings, *CODE),
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    differing = int(pc.sum(arrow_column(parsed, "prompts_differ")).as_py())
    unread = [] if source.columns else [name for name in formats.unread(columns) if name != margin_column]
    return set_aside(Split(parsed, len(parsed), differing_prompts=differing, unread=unread), "excluded")


def _check_columns(
    columns: list[str], chosen: list[str] | None, place: str, margin_column: str | None
) -> None:
    """Raise DataError where rows with these columns, or those `chosen` of them, cannot be comparisons."""
    read = chosen or columns
    missing = set(read) - set(columns)
    if missing:
        raise DataError(f"{place} has no column {', '.join(sorted(missing))} ('columns')")
    if not formats.is_comparison_shape(read):
        has = ", ".join(read) or "none"
        raise DataError(f"{place}: its columns are {has}; rm_recipe needs {formats.SHAPES_IN_WORDS}")
    if margin_column is not None and margin_column not in read:
        raise DataError(f"{place} has no column '{margin_column}' (margin_column)")


def _parsed(
    row: Mapping[str, Any],
    number: int,
    subset: str,
    margin_column: str | None,
    margin_map: Mapping[str | int, float] | None,
) -> dict[str, Any]:
    """The columns of `_PARSED`: of a comparison, or empty ones and the reason."""
    if row.get("subset") not in (None, ""):
        subset = str(row["subset"]).encode(errors="replace").decode()
    found = Comparison([], [], subset=subset)
    margin_fault = reason = detail = ""
    try:
        try:
            found = formats.parse_row(row, margin_column, margin_map)
        except Excluded as excluded:  # without its margin it may be held out, not trained on
            if excluded.reason not in ("missing_margin", "negative_margin"):
                raise
            margin_fault = excluded.reason
            found = formats.parse_row(row)
    except Excluded as excluded:
        reason, detail = excluded.reason, excluded.detail
    content = {name: getattr(found, name) for name in ("prompt", "responses", "ranks", "margins")}
    return {
        **content,
        "subset": subset,
        "margin_fault": margin_fault,
        "row": number,
        "prompt_key": text_key(normalised_prompt(found.prompt)),
        "key": text_key([json.dumps(list(content.values()), sort_keys=True)]),
        "prompts_differ": formats.prompts_differ(row) or reason == "differing_prompts",
        "excluded": reason,
        "detail": detail,
    }


def normalised_prompt(prompt: list[Message]) -> list[str]:
    """Return what equal prompts have in common: roles and normalised texts."""
    return [f"{message['role']} {normalise(message['content'])}" for message in prompt]


def text_key(texts: Sequence[str]) -> int:
    """Hash texts to a 64-bit number, the same on every machine."""
    digest = hashlib.blake2b("\x00".join(texts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


def normalise(text: str) -> str:
    """Return a text in lower case with single spaces: what is equal then counts as the same text."""
    return " ".join(text.split()).casefold()


# --- sources: files, folders, the Hub and mixtures ---------------------------------------------

# Files beside the rows that `datasets` writes about them.


class MissingSplitError(DataError):
    """A data set has no such split; `others` are the splits that it has."""

    def __init__(self, message: str, others: list[str]) -> None:
        super().__init__(message)
        self.others = others


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
    """Name a subset in reports: the folder or configuration, in a mixture also the data set."""
    part = str(source.data_dir or source.name or "")
    if not of_mixture:
        return part
    path = Path(source.path)
    name = f"{path.parent.name}/{path.name}" if path.is_file() else path.name
    return "/".join(filter(None, [name, part]))


def _load_from_hub(source: DatasetConfig, split: str, revision: str | None) -> hf_datasets.Dataset:
    """Load the rows of a split, memory-mapped.

    Raises:
        MissingSplitError: the data set has other splits.
        DataError: it cannot be loaded.
    """
    try:
        return hf_datasets.load_dataset(
            path=source.path,
            name=source.name,
            data_dir=source.data_dir,
            data_files=source.data_files,
            revision=revision,
            split=split,
        )
    except Exception as error:
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # not the data's fault
            raise
        reason = one_line(cause) or type(cause).__name__
        if not isinstance(error, ValueError) or not reason.startswith("Unknown split"):
            raise DataError(f"data set '{source.path}' cannot be loaded from the Hub: {reason}") from None
        others = str(error).partition("[")[2].rpartition("]")[0]
        message = f"data set '{source.path}' has no split '{split}'; it has {others}"
        raise MissingSplitError(message, [name.strip(" '\"") for name in others.split(",")]) from None


def has_split(source: DatasetConfig, split: str, revision: str | None = None) -> bool:
    """Tell whether the source has that split; False where it has one split only, another one.

    Raises:
        DataError: it has several, and not this one, or it cannot be read.
    """
    path = Path(source.path)
    if path.is_file() or (path.is_dir() and source.data_files is not None):
        return False  # a file is one split, whatever it is called
    try:
        if find_file(source, split) is None:  # on the Hub, which says so only when it is asked for it
            _load_from_hub(source, split, revision)
    except MissingSplitError as missing:
        if len(missing.others) > 1:
            raise
        return False
    return True


def find_file(source: DatasetConfig, split: str) -> Path | None:
    """Find the local file that holds a split; None for a data set on the Hub.

    Raises:
        DataError: the path was meant to be local and holds no such file.
    """
    path = Path(source.path)
    if path.is_dir():
        folder = path / (source.data_dir or "")
        if not folder.is_dir():
            raise DataError(f"'{folder}' is no folder; check 'dataset_subsets'")
        if source.data_files is None:
            return _split_file(folder, split)
        path = folder / str(source.data_files)
        if not path.is_file():
            raise DataError(f"'{path}' is no file; 'data_files' of a local folder is one file's name")
    elif path.is_file():
        if source.data_dir or source.data_files:
            raise DataError(f"'{path}' is a file and has no subsets or files; name the folder that has them")
    elif looks_local(source.path):
        raise DataError(f"'{path}' does not exist")
    else:
        return None
    if data_format(path) not in DATA_FORMATS:
        raise DataError(f"'{path}' is no data file; expected {', '.join(DATA_FORMATS)} (.gz too)")
    return path


def data_format(file: Path) -> str:
    """Return the file's ending, `.gz` apart: one of `DATA_FORMATS`, or another."""
    return Path(file.name.removesuffix(".gz")).suffix


def _split_file(folder: Path, split: str) -> Path:
    """The one file of a local folder that holds the split, named as on the Hub: train.jsonl.gz."""
    there = sorted(folder.iterdir())
    splits: dict[str, list[Path]] = {}
    for path in there:
        if path.is_file() and data_format(path) in DATA_FORMATS and _may_be_a_split(path):
            name = path.name.removesuffix(".gz").removesuffix(data_format(path))
            splits.setdefault(name, []).append(path)
    found = splits.get(split, [])
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"'{folder}' has {len(found)} files for the split '{split}'")
    names = [f"{path.name}/" if path.is_dir() else path.name for path in there]
    raise MissingSplitError(
        f"'{folder}' has no file for the split '{split}' ({split}{', '.join(DATA_FORMATS)}, .gz too); "
        f"it has {', '.join(names) or 'no files'}",
        list(splits),
    )


def _may_be_a_split(path: Path) -> bool:
    """Tell whether a file holds comparisons; a .json, .csv or .arrow beside them may say something else."""
    if data_format(path) in (".jsonl", ".parquet"):
        return True
    try:
        return formats.is_comparison_shape(_columns_of(path))
    except DataError:  # which is said when it is read; most other files are .json
        return data_format(path) != ".json"


# --- files -------------------------------------------------------------------------------------
# Not by `load_dataset`: of JSON it fixes the types of columns from a file's beginning, and turns a later
# number or message list into text without a word, or refuses a sound file.


def _columns_of(file: Path) -> list[str]:
    """The columns of a file; of text the keys in its first `PEEK` rows."""
    rows = islice(read_rows(file, names_only=True), PEEK)
    return list(dict.fromkeys(name for _, row in rows for name in row))


def read_rows(
    file: Path, columns: Sequence[str] | None = None, names_only: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file of `DATA_FORMATS` (.gz too): its rows, numbered from 1 by line, element or row.

    Args:
        columns: of a table, those to read, all by default.
        names_only: give one row of a table, with the names of its columns.

    Raises:
        DataError: there is no such file, it cannot be read or holds no rows; with the row.
    """
    if not file.is_file():
        raise DataError(f"{file}: {'no such file' if not file.exists() else 'not a file'}")
    number = 0
    try:
        with file.open("rb") as stream:
            if stream.read(23) == b"version https://git-lfs":
                raise DataError(f"'{file}' is a Git LFS pointer, not the file itself; fetch it: git lfs pull")
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, row in _values(stream, data_format(file), columns, names_only):
                if not isinstance(row, dict):
                    hint = "; a file that is one list is named .json" if isinstance(row, list) else ""
                    kind = f"a row is a JSON object, this is a {type(row).__name__}{hint}"
                    raise DataError(f"'{file}', {unit(file)} {number}: {kind}")
                yield number, row
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"'{file}' is damaged, or not gzip though its name says so") from None
    except OSError as error:
        raise DataError(f"'{file}' cannot be read: {error.strerror or error}") from None
    except _NotJsonError as error:
        raise DataError(f"'{file}', {error}") from None
    except (ValueError, OverflowError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"'{file}' cannot be read: {one_line(error)}") from None
    if not number:
        raise DataError(f"'{file}' is empty: it holds no rows")


class _NotJsonError(ValueError):
    """What a place of a file holds is no JSON."""


def _values(
    stream: gzip.GzipFile | BufferedReader, ending: str, columns: Sequence[str] | None, names_only: bool
) -> Iterator[tuple[int, Any]]:
    """The rows of a table, the elements of a JSON list, read all at once, or what each line holds."""
    start = stream.read(1000)
    stream.seek(0)
    if ending == ".parquet":
        table = pq.ParquetFile(stream)
        batches = table.iter_batches(batch_size=1000, columns=columns)
        yield from _table_rows(table.schema_arrow.names, batches, names_only)
    elif ending == ".arrow":
        opened = (pa.ipc.open_file if start.startswith(b"ARROW1") else pa.ipc.open_stream)(stream).read_all()
        names = opened.column_names
        batches = opened.select(columns or names).to_batches(max_chunksize=1000)
        yield from _table_rows(names, batches, names_only)
    elif ending == ".csv":
        text = TextIOWrapper(stream, "utf-8-sig", newline="")
        yield from enumerate(csv.DictReader(text, restkey="beyond the header"), 1)
    elif ending == ".json" and start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from enumerate(_decode(stream.read(), "the list"), 1)
    else:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _decode(line, f"line {number}")


def _table_rows(names: list[str], batches: Iterable[Any], names_only: bool) -> Iterator[tuple[int, Any]]:
    if names_only:
        yield 1, dict.fromkeys(names)
        return
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _decode(content: bytes, place: str) -> Any:
    """What UTF-8 JSON says; raises `_NotJsonError` with the place."""
    try:
        return json.loads(content.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise _NotJsonError(f"{place}, byte {error.start + 1} of it: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise _NotJsonError(f"{place}: not JSON: {error.msg} ({line}column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number or thousands of brackets too many
        raise _NotJsonError(f"{place}: not JSON: {error}") from None


def unit(file: Path | None) -> str:
    """Say what the numbers of a file's rows count."""
    return "row" if file is None or data_format(file) in set(DATA_FORMATS) - {".jsonl"} else "line"


def content_hash(file: Path) -> str:
    """Hash the bytes: the time of a change can be the same for two contents."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
