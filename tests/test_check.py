"""`check --data` writes what it found, stops where training would, and leaves other runs alone."""

import json

import pytest
from conftest import run_cli

from rm_recipe.check import check_data
from rm_recipe.errors import DataError, RecipeError
from rm_recipe.recipe import read_recipe
from rm_recipe.train import train


def test_check_writes_the_report_and_training_may_follow_in_the_same_folder(write_recipe, tmp_path):
    recipe = read_recipe(write_recipe(num_train_epochs=1))
    check_data(recipe)
    target = tmp_path / "run" / "data_report.json"
    checked = json.loads(target.read_text())
    train(recipe)
    assert json.loads(target.read_text()) == checked


def test_check_writes_the_report_although_leakage_stops_training(write_recipe, flawed, tmp_path):
    recipe = read_recipe(write_recipe(**flawed))
    with pytest.raises(
        DataError, match="1 of 11 train comparisons .row 6. have a prompt that is also held out"
    ):
        check_data(recipe)
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["leakage"] == {"prompts": 1, "comparisons": 1, "first_rows": ["6"], "policy": "error"}
    with pytest.raises(DataError, match="also held out"):
        train(recipe)
    assert not (tmp_path / "run" / "recipe.yaml").exists()  # nothing was started


def test_check_leaves_another_recipes_report_alone(write_recipe, tmp_path, capsys):
    train(read_recipe(write_recipe(num_train_epochs=1)))
    before = (tmp_path / "run" / "data_report.json").read_bytes()
    check_data(read_recipe(write_recipe(num_train_epochs=1, max_length=100)))
    assert "max_length 100: truncated" in (printed := capsys.readouterr().out)
    assert "not written; " in printed
    assert "holds a run of another recipe (max_length differ)" in printed
    assert (tmp_path / "run" / "data_report.json").read_bytes() == before
    check_data(read_recipe(write_recipe(num_train_epochs=1)))
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="is a file"):
        check_data(read_recipe(write_recipe(output_dir=str(tmp_path / "file"))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt"\n', "line 2: not JSON"),
        (b'{"prompt": "p", "chosen": "a"}\n', "its columns are prompt, chosen"),
        (b'{"prompt": "p", "chosen": 1, "rejected": "b"}\n', "line 1: column 'chosen'"),
        (b"", "is empty"),
    ],
)
def test_a_bad_file_ends_with_one_message_and_exit_code_2(write_recipe, tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    recipe = write_recipe(dataset_name=str(path))
    result = run_cli("check", str(recipe), "--data")
    assert result.returncode == 2
    assert message in result.stderr
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
