"""Files and folders are whole or not there."""

import json

import pytest

from rm_recipe.errors import RecipeError
from rm_recipe.files import read_json, read_json_lines, whole_folder, write_json


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_interrupted_folder_leaves_the_old_one_and_nothing_else(tmp_path, error):
    target = tmp_path / "export"
    target.mkdir()
    (target / "old").write_text("kept")
    with pytest.raises(error), whole_folder(target) as folder:
        (folder / "new").write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    assert [p.name for p in target.iterdir()] == ["old"]


def test_a_finished_folder_takes_the_old_ones_place(tmp_path):
    target = tmp_path / "export"
    for text in ("first", "second"):
        with whole_folder(target) as folder:
            (folder / text).write_text(text)
    assert [p.name for p in target.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"loss": 0.5})
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "is not JSON"),
        (b"[1]", "holds no JSON object"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": "\xff"}', "cannot be read"),
    ],
)
def test_a_file_or_line_that_is_no_json_object_is_named(tmp_path, content, fault):
    (tmp_path / "one.json").write_bytes(content)
    (tmp_path / "lines.jsonl").write_bytes(b"{}\n\n" + content + b"\n")
    with pytest.raises(RecipeError, match=f"one.json {fault}"):
        read_json(tmp_path / "one.json")
    place = "lines.jsonl" if "cannot" in fault else "lines.jsonl, line 3"
    with pytest.raises(RecipeError, match=f"{place} {fault}"):
        read_json_lines(tmp_path / "lines.jsonl")


def test_what_was_written_is_read_back_whatever_it_holds(tmp_path):
    write_json(tmp_path / "a.json", {"text": "\u2028 \x85 ü", "n": None})
    assert read_json(tmp_path / "a.json") == {"text": "\u2028 \x85 ü", "n": None}
    (tmp_path / "b.jsonl").write_text('{"text": "\u2028"}\n{"n": 1}\n', encoding="utf-8")
    assert read_json_lines(tmp_path / "b.jsonl") == [{"text": "\u2028"}, {"n": 1}]
