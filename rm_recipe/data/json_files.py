"""JSON files as numbered lines of text, decoded later: no row decides what type the next one has.

Readers that fix the types of columns from a file's beginning turn a later number or message list
into text without a word, or refuse a sound file. Here a line stays text until `parsing` reads it.
"""

import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from inspect import getsource
from pathlib import Path
from typing import Any, BinaryIO

import datasets as hf_datasets
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from rm_recipe.errors import DataError

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
