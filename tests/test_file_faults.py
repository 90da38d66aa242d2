"""A broken file is described by what is wrong and where."""

import gzip
import json

import pytest

from rm_recipe.file_faults import explain_fault

ROW = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode()
PACKED = gzip.compress(b"".join(ROW.replace(b"p", str(n).encode()) + b"\n" for n in range(500)))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", ROW + b'\n{"chosen": "a", "rej', "line 2: not JSON: Unterminated string"),
        ("a.jsonl", ROW + b"\n\n" + b"{x}\n", "line 3: not JSON"),
        ("a.jsonl", ROW + b"\n[1]\n", "line 2: a row is a JSON object, this is a list"),
        ("a.jsonl", ROW + b'\n{"chosen": "\xff"}\n', "line 2: not UTF-8 text (byte 13 of the line)"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl.gz", gzip.compress(b""), "the file is empty"),
        ("a.jsonl.gz", b"not gzip at all", "not gzip-compressed, though its name ends in .gz"),
        ("a.jsonl.gz", PACKED[: len(PACKED) // 2], "the compressed data ends early"),
        ("a.jsonl.gz", PACKED[:100] + b"\x00" * 50 + PACKED[150:], "damaged"),
        ("a.json", b'[{"chosen": "a"},\n {"chosen": ]', "line 2: not JSON"),
        ("a.json", b'[{"chosen": "a"},\n 5]', "row 2: a row is a JSON object, this is a int"),
        ("a.json", b"[]", "the file holds no rows"),
        ("a.json", b'[\n"\xff"]', "line 2: not UTF-8 text"),
        ("a.parquet", b"not parquet", "not a Parquet file"),
    ],
)
def test_the_fault_and_its_line_are_named(tmp_path, name, content, fault):
    path = tmp_path / name
    path.write_bytes(content)
    assert fault in explain_fault(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + ROW + b"\n\n" + ROW),
        ("a.json", b"[" + ROW + b"]"),
        ("a.json", ROW + b"\n" + ROW + b"\n"),
        ("a.jsonl.gz", PACKED),
        ("a.parquet", b"PAR1 and so on"),
    ],
)
def test_a_sound_file_has_no_fault(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert explain_fault(path) is None
