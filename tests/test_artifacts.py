"""Files and folders are whole or not there."""

import json

import pytest

from rm_recipe.artifacts import whole_folder, write_json


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
