"""`check --data` writes what it found, stops where training would, and leaves other runs alone."""

import json
import shutil

import pytest
from conftest import set_keys
from peft import LoraConfig

from rm_recipe.errors import DataError, RecipeError
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.check import check_base, check_data, parse_bytes
from rm_recipe.training.train import load_data, train


def test_check_writes_a_report_and_training_may_follow_whose_report_it_leaves(write_recipe, tmp_path, capsys):
    recipe = read_recipe(write_recipe(num_train_epochs=1))
    check_data(recipe)
    target = tmp_path / "run" / "data_report.json"
    checked = json.loads(target.read_text())
    train(recipe)
    assert json.loads(target.read_text()) == checked
    check_data(read_recipe(write_recipe(num_train_epochs=1, max_length=100)))
    assert "report: not written; " in capsys.readouterr().out
    assert json.loads(target.read_text()) == checked


def test_check_writes_the_report_although_leakage_stops_training(write_recipe, flawed, tmp_path):
    recipe = read_recipe(write_recipe(**flawed))
    with pytest.raises(DataError, match="1 of 11 train comparisons .row 6. have a prompt that is also held"):
        check_data(recipe)
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert (report["leakage"]["comparisons"], report["leakage"]["policy"]) == (1, "error")
    with pytest.raises(DataError, match="also held out"):
        train(recipe)
    assert not (tmp_path / "run" / "recipe.yaml").exists()  # nothing was started


# --- the base, from its configuration ------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        (None, {"max_length": 513}, "'max_length: 513': .* has 512 positions; set 512 or less"),
        (None, {"lora_modules_to_save": ["nrm"]}, "has no nrm; its linear layers are "),
        (None, {"attn_implementation": "nonsense"}, "cannot be loaded as a classifier"),
        ("tokenizer.json", {"model": {}}, "the tokenizer of '.*base' cannot be loaded"),
        ("config.json", {"vocab_size": 999}, "are they of different models"),
        ("config.json", {"model_type": "granite"}, "has no sequence classifier for 'granite'"),
    ],
)
def test_check_finds_what_training_would_refuse_of_the_base_before_the_data_is_read(
    write_recipe, tmp_path, tiny_llama, monkeypatch, file, keys, message
):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    if file:
        set_keys(base / file, **keys)
        keys = {}
    recipe = read_recipe(write_recipe(model_name_or_path=str(base), **keys))
    monkeypatch.setattr("rm_recipe.training.train.load_splits", lambda *_: pytest.fail("the data is read"))
    for verb in (check_base, load_data):
        with pytest.raises(RecipeError, match=message):
            verb(recipe)


def test_a_base_is_at_hand_in_the_hubs_cache_and_elsewhere_it_is_not_asked_for(
    write_recipe, tmp_path, tiny_llama, monkeypatch
):
    """A check stays quick: nothing is fetched."""
    snapshot = tmp_path / "hub" / "models--ann--base" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_llama, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(RecipeError, match="'max_length: 513': ann/base has 512 positions"):
        check_base(read_recipe(write_recipe(model_name_or_path="ann/base", max_length=513)))
    check_base(read_recipe(write_recipe(model_name_or_path="bob/base", max_length=513)))
    with pytest.raises(RecipeError, match="org/na me' does not exist, and is no Hub id"):
        check_base(read_recipe(write_recipe(model_name_or_path="org/na me")))


def test_an_sft_adapters_base_is_looked_at(write_recipe, tmp_path, tiny_llama):
    adapter = LoraConfig(base_model_name_or_path=str(tiny_llama), task_type="CAUSAL_LM")
    adapter.save_pretrained(tmp_path / "sft")
    recipe = read_recipe(write_recipe(model_name_or_path=str(tmp_path / "sft"), max_length=513))
    with pytest.raises(RecipeError, match="sft has 512 positions"):
        check_base(recipe)


def test_a_size_of_memory_is_read_with_its_unit():
    assert [parse_bytes(text) for text in ("8", "8GB", "0.5 gb")] == [8e9, 8e9, 5e8]
