"""Rows of a source to comparisons: the first of two cached passes over a data set."""

import errno
import glob
import gzip
import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from inspect import getsource
from pathlib import Path
from typing import Any, BinaryIO

import datasets as hf_datasets
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from trl.scripts.utils import DatasetConfig

from rm_recipe.data import comparison, formats, messages
from rm_recipe.data.dataset import Split, arrow_column, run_pass, set_excluded_apart
from rm_recipe.data.formats import is_comparison_shape
from rm_recipe.data.messages import Excluded, Malformed, Message
from rm_recipe.errors import DataError
from rm_recipe.files import whole_file
from rm_recipe.recipe.schema import DATA_FORMATS, DataArguments, looks_local

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
    file = find_file(source, split)
    place = f"'{file}'" if file else f"'{source.path}', split '{split}'"
    counted = unit(file) if file and data_format(file) != ".parquet" else "row"
    _check_columns(rows, source, place, counted, margin_column)
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
                raise DataError(f"{place}, {counted} {number}: {fault}") from None
        return {name: [row[name] for row in parsed] for name in _PARSED}

    ours = [sys.modules[__name__], messages, formats, comparison]
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


# --- sources: files, folders, the Hub and mixtures ---------------------------------------------


class MissingSplitError(DataError):
    """A data set has no such split; `others` are the splits that it has."""

    def __init__(self, message: str, others: list[str]) -> None:
        super().__init__(message)
        self.others = others


def sources_of(data: DataArguments) -> list[DatasetConfig]:
    """What `dataset_name` and `dataset_subsets`, or TRL's `datasets`, name; `split` is the train split."""
    if data.datasets:
        return [DatasetConfig(**entry) for entry in data.datasets]
    assert data.dataset_name is not None
    subsets: list[str | None] = list(data.dataset_subsets or []) or [None]
    return [
        DatasetConfig(path=data.dataset_name, data_dir=subset, split=data.dataset_train_split)
        for subset in subsets
    ]


def label(source: DatasetConfig, of_mixture: bool) -> str:
    """The subset's name in reports: the folder or configuration, in a mixture also the set itself."""
    part = str(source.data_dir or source.name or "")
    if not of_mixture:
        return part
    path = Path(source.path)
    name = f"{path.parent.name}/{path.name}" if path.is_file() else path.name
    return "/".join(filter(None, [name, part]))


def load_rows(source: DatasetConfig, split: str, revision: str | None = None) -> hf_datasets.Dataset:
    """The rows of one split, memory-mapped: their own columns, or the two of `_FEATURES`.

    Raises:
        MissingSplitError: the set has others.
        DataError: it cannot be read; for a local file with the line.
    """
    file = find_file(source, split)
    try:
        if file is None:
            return hf_datasets.load_dataset(
                path=source.path,
                name=source.name,
                data_dir=source.data_dir,
                data_files=source.data_files,
                revision=revision,
                split=split,
            )
        return _load_parquet(file) if data_format(file) == ".parquet" else load_json_rows(file)
    except DataError:
        raise
    except Exception as error:
        raise _as_data_error(error, source, file, split) from None


def _load_parquet(file: Path) -> hf_datasets.Dataset:
    refuse_pointer(file)
    content = content_hash(file)
    unpacked = _unpacked(file, content)
    if not pq.read_metadata(unpacked).num_rows:
        raise DataError(f"'{file}' is empty: it holds no rows")
    # As the configuration's name, the content decides what the cache holds, not the time of change.
    name, files = f"content-{content[:32]}", {"train": glob.escape(str(unpacked))}
    return hf_datasets.load_dataset("parquet", name=name, data_files=files, split="train")


def has_split(source: DatasetConfig, split: str, revision: str | None = None) -> bool:
    """Whether the set has that split; False where it has one split only, another one.

    Raises:
        DataError: it has several, and not this one, or it cannot be read.
    """
    path = Path(source.path)
    if path.is_file() or (path.is_dir() and source.data_files is not None):
        return False  # a file is one split, whatever it is called
    try:
        if find_file(source, split) is None:  # on the Hub, which says so only when it is asked for it
            load_rows(source, split, revision)
    except MissingSplitError as missing:
        if len(missing.others) > 1:
            raise
        return False
    return True


def find_file(source: DatasetConfig, split: str) -> Path | None:
    """The local file that holds a split; None for a set on the Hub.

    Raises:
        DataError: the path was meant to be local and holds no such file.
    """
    path = Path(source.path)
    if path.is_dir():
        path = path / (source.data_dir or "")
        if not path.is_dir():
            what = "is no folder" if path.exists() else "does not exist"
            raise DataError(f"'{path}' {what}; check 'dataset_subsets'")
        if source.data_files is None:
            return _split_file(path, split)
        if not isinstance(source.data_files, str):
            raise DataError(f"'{path}': 'data_files' of a local folder is one file's name")
        path = path / source.data_files
        if path.is_dir():
            raise DataError(f"'{path}' is a folder; 'data_files' of a local folder is one file's name")
    elif path.is_file() and (source.data_dir or source.data_files):
        raise DataError(f"'{path}' is a file and has no subsets or files; name the folder that has them")
    if not path.is_file():
        if looks_local(source.path) or Path(source.path).exists():
            raise DataError(f"'{path}' does not exist")
        return None
    if data_format(path) not in DATA_FORMATS:
        raise DataError(f"'{path}' is no data file; expected .jsonl, .json or .parquet (.gz too)")
    return path


def data_format(file: Path) -> str:
    """`.jsonl`, `.json`, `.parquet` or another ending, `.gz` apart."""
    return Path(file.name.removesuffix(".gz")).suffix


def _split_file(folder: Path, split: str) -> Path:
    """The one file of a local folder that holds the split, named as on the Hub: train.jsonl.gz."""
    endings = [f"{suffix}{gz}" for suffix in DATA_FORMATS for gz in ("", ".gz")]
    found = [folder / f"{split}{ending}" for ending in endings if (folder / f"{split}{ending}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"'{folder}' has {len(found)} files for the split '{split}'")
    there = sorted(folder.iterdir())
    others = [
        path.name.removesuffix(end)
        for path in there
        for end in endings
        if path.name.endswith(end) and path.is_file() and _may_be_split(path)
    ]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in there]
    raise MissingSplitError(
        f"'{folder}' has no file for the split '{split}' "
        f"({', '.join(split + ending for ending in endings)}); it has {', '.join(names) or 'no files'}",
        others,
    )


def _may_be_split(file: Path) -> bool:
    """Whether a data file holds rows: a .json beside them may say something about the data set instead."""
    if data_format(file) != ".json":
        return True
    try:
        row = next(numbered_rows(file))[JSON]
    except DataError:  # damaged, but meant to hold some
        return True
    try:
        return is_comparison_shape(decode(row))
    except ValueError:  # one object over several lines
        return False


def _unpacked(file: Path, content: str) -> Path:
    """The file, or of a .parquet.gz a copy without gzip."""
    if file.suffix != ".gz":
        return file
    copy = Path(hf_datasets.config.EXTRACTED_DATASETS_PATH) / f"{content}.parquet"
    if not copy.is_file():
        with whole_file(copy) as partial, gzip.open(file) as packed, partial.open("wb") as target:
            shutil.copyfileobj(packed, target)
    return copy


def _as_data_error(error: Exception, source: DatasetConfig, file: Path | None, split: str) -> Exception:
    cause = error.__cause__ or error
    # The machine's faults, not the data's; that the file itself may not be read is a fault of input.
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    if full or isinstance(cause, MemoryError):
        return cause if isinstance(cause, Exception) else error
    reason = " ".join(str(cause).split())[:300] or type(cause).__name__
    if file is not None:
        return DataError(f"'{file}' cannot be read: {reason}")
    if isinstance(error, ValueError) and str(error).startswith("Unknown split"):
        others = str(error).partition("[")[2].rpartition("]")[0]
        message = f"data set '{source.path}' has no split '{split}'; it has {others}"
        return MissingSplitError(message, [name.strip(" '\"") for name in others.split(",")])
    return DataError(f"data set '{source.path}' cannot be loaded from the Hub: {reason}")


# --- JSON files as numbered lines of text, decoded later ---------------------------------------
# Readers that fix the types of columns from a file's beginning turn a later number or message list
# into text without a word, or refuse a sound file. Here a line stays text until `parse_rows` reads it.

# The columns, by names that no data set has; numbers count lines, of a list its elements, from 1.
NUMBER, JSON = "rm_recipe_number", "rm_recipe_json"
_POINTER = b"version https://git-lfs"
_FEATURES = {NUMBER: hf_datasets.Value("int64"), JSON: hf_datasets.Value("string")}


def load_json_rows(file: Path) -> hf_datasets.Dataset:
    """The rows of a .jsonl or .json file (.gz too), memory-mapped and cached by the file's content.

    Raises:
        DataError: the file is empty, not UTF-8, or not what its name says.
    """
    source = getsource(sys.modules[__name__])
    try:
        return hf_datasets.Dataset.from_generator(
            numbered_rows,
            features=hf_datasets.Features(_FEATURES),
            gen_kwargs={"file": file},
            fingerprint=Hasher.hash([content_hash(file), is_document(file), source]),
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a .jsonl or .json file (.gz too) with their numbers, as training reads them.

    Raises:
        DataError: there is no such file, or it cannot be read; with the row.
    """
    if not file.is_file():
        raise DataError(f"{file}: {'no such file' if not file.exists() else 'not a file'}")
    try:
        for row in numbered_rows(file):
            yield row[NUMBER], decode(row[JSON])
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{file}, {unit(file)} {row[NUMBER]}: {error}") from None


def unit(file: Path) -> str:
    """What the numbers of a file's rows count."""
    return "row" if is_document(file) else "line"


def refuse_pointer(file: Path) -> None:
    """Raises DataError for what Git LFS leaves in a file's place where it has not fetched it."""
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise DataError(f"'{file}' is a Git LFS pointer, not the file itself; fetch it: git lfs pull")


def is_document(file: Path) -> bool:
    """Whether a file may hold one list of rows: a .json, where a .jsonl has one a line."""
    return file.name.removesuffix(".gz").endswith(".json")


def content_hash(file: Path) -> str:
    """A hash of the bytes: the time of a change can be the same for two contents."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def decode(text: str) -> dict[str, Any]:
    """The row that a line holds.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
        raise ValueError(f"not JSON that can be read: {error}") from None
    if not isinstance(row, dict):
        hint = "; a file that is one list is named .json" if isinstance(row, list) else ""
        raise ValueError(f"a row is a JSON object, this is a {type(row).__name__}{hint}")
    return row


def numbered_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows, still text, with their numbers, in the columns `NUMBER` and `JSON`."""
    refuse_pointer(file)
    found = False
    try:
        rows = _elements(file) if is_document(file) else None
        for number, text in _lines(file) if rows is None else rows:
            found = True
            yield {NUMBER: number, JSON: text}
    except gzip.BadGzipFile:
        with file.open("rb") as stream:
            what = "damaged" if stream.read(2) == b"\x1f\x8b" else "not gzip, though its name says so"
        raise DataError(f"'{file}' is {what}") from None
    except (EOFError, zlib.error):
        raise DataError(f"'{file}' is damaged: the compressed data ends early or does not fit") from None
    if not found:
        raise DataError(f"'{file}' is empty: it holds no rows")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = f"line {number}, byte {error.start + 1} of it"
                raise DataError(f"'{file}', {where}: not UTF-8 text") from None
            if text.strip():
                yield number, text.rstrip()


def _elements(file: Path) -> Iterable[tuple[int, str]] | None:
    """The elements of a list, all read at once; None where the file holds an object a line."""
    with _open(file) as stream:
        if not stream.read(4096).lstrip(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return None
    with _open(file) as stream:
        content = stream.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"'{file}', line {line}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"'{file}', {where}: not JSON: {error.msg}") from None
    return ((number, json.dumps(row)) for number, row in enumerate(rows, 1))


def _open(file: Path) -> gzip.GzipFile | BinaryIO:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")
