"""Rows of JSON files keep their own types and numbers; what is broken is named with its line."""

import gzip
import json
import os

import pytest
from conftest import make_rows, write_jsonl

from rm_recipe.data.loading import JSON, NUMBER, content_hash, decode, load_json_rows
from rm_recipe.errors import DataError

ROWS = make_rows(3, seed=1)
ROW = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode()
PACKED = gzip.compress(b"".join(ROW.replace(b"p", str(n).encode()) + b"\n" for n in range(500)), mtime=0)


def loaded(path) -> list[tuple[int, dict]]:
    return [(row[NUMBER], decode(row[JSON])) for row in load_json_rows(path)]


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", "{0}\n{1}\n{2}\n", [1, 2, 3]),
        (
            "a.jsonl",
            "\ufeff{0}\n\n  \n{1}\r\n{2}",
            [1, 4, 5],
        ),  # byte order mark, blank lines
        ("a.json", "[{0},\n\n{1},{2}]", [1, 2, 3]),
        ("a.json", "\ufeff \n [{0},{1},{2}]", [1, 2, 3]),
        ("a.json", "{0}\n{1}\n{2}\n", [1, 2, 3]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_come_with_the_number_of_their_line_or_element(tmp_path, name, content, numbers, packed):
    for key, row in enumerate(ROWS):
        content = content.replace(f"{{{key}}}", json.dumps(row))
    path = tmp_path / f"{name}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert loaded(path) == list(zip(numbers, ROWS, strict=True))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", ROW + b'\n{"chosen": "\xff"}\n', "line 2, byte 13 of it: not UTF-8 text"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.jsonl.gz", b"not gzip at all", "is not gzip, though its name says so"),
        ("a.jsonl.gz", PACKED[: len(PACKED) // 2], "is damaged: the compressed data ends early"),
        ("a.jsonl.gz", PACKED[:100] + b"\x00" * 50 + PACKED[150:], "is damaged"),
        ("a.jsonl.gz", PACKED[:-8] + b"\x00" * 8, "is damaged"),  # the checksum
        ("a.json", b'[{"chosen": "a"},\n {"chosen": ]', "line 2, column 13: not JSON"),
        ("a.json", b"[]", "is empty"),
        ("a.json", b'[\n"\xff"]', "line 2: not UTF-8 text"),
    ],
)
def test_a_broken_file_is_named_with_its_fault(tmp_path, name, content, fault):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=fault) as caught:
        load_json_rows(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": ', "not JSON: Expecting value .column 7."),
        ("[1]", "a row is a JSON object, this is a list"),
        ("[" * 100_000, "not JSON that can be read"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ],
)
def test_a_line_that_is_no_row_says_why(text, fault):
    with pytest.raises(ValueError, match=fault):
        decode(text)


def test_the_cache_goes_by_content_and_not_by_the_time_of_change(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    assert len(loaded(path)) == 3
    state = path.stat()
    write_jsonl(path, [*ROWS[:2], {**ROWS[2], "chosen": "other"}])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert loaded(path)[2][1]["chosen"] == "other"
    copy = write_jsonl(tmp_path / "copy" / "x.jsonl", ROWS)
    write_jsonl(path, ROWS)
    assert content_hash(copy) == content_hash(path)
    assert load_json_rows(copy)._fingerprint == load_json_rows(path)._fingerprint
