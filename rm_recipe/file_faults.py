"""What is wrong with a data file that would not load: the line, and what was found there.

`datasets` reads fast and explains little, so a file that it gave up on is read again, slowly.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def explain_fault(path: Path) -> str | None:
    """A description such as `line 7: not JSON: ...`; None where nothing is found wrong."""
    if path.stat().st_size == 0:
        return "the file is empty"
    kind = Path(path.name.removesuffix(".gz")).suffix
    try:
        if kind == ".jsonl":
            return _fault_of_lines(path)
        if kind == ".json":
            return _fault_of_document(path)
        with _open(path) as file:
            start = file.read(4)
            while path.suffix == ".gz" and file.read(1 << 20):
                pass  # to the end, where damage shows
        return None if start == b"PAR1" else "not a Parquet file"
    except gzip.BadGzipFile:
        return "not gzip-compressed, though its name ends in .gz"
    except (EOFError, zlib.error):
        return "damaged: the compressed data ends early or does not fit together"


def _fault_of_lines(path: Path) -> str | None:
    number = 0
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            return f"line {number}: not UTF-8 text (byte {error.start + 1} of the line)"
        except json.JSONDecodeError as error:
            if line.strip():
                return f"line {number}: not JSON: {error.msg} (column {error.colno})"
            continue  # the reader skips blank lines
        if not isinstance(row, dict):
            return f"line {number}: a row is a JSON object, this is a {type(row).__name__}"
    return "the file is empty" if number == 0 else None


def _fault_of_document(path: Path) -> str | None:
    try:
        text = b"".join(_lines(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return f"line {line}: not UTF-8 text"
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        # A .json file may hold an object a line, too.
        by_line = _fault_of_lines(path)
        return by_line and f"line {error.lineno}: not JSON: {error.msg} (column {error.colno})"
    rows = rows if isinstance(rows, list) else [rows]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            return f"row {number}: a row is a JSON object, this is a {type(row).__name__}"
    return None if rows else "the file holds no rows"


def _lines(path: Path) -> Iterator[bytes]:
    with _open(path) as file:
        yield from file


def _open(path: Path) -> gzip.GzipFile | BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
