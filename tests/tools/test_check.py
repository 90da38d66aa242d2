"""`check --data` writes what it found, stops where training would, and leaves other runs alone."""

import json
import shutil

import pytest
from peft import LoraConfig
from transformers import GraniteConfig

from rm_recipe.errors import DataError, RecipeError
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.check import check_base, check_data, folder_at_hand, parse_bytes
from rm_recipe.training.train import load_data, train


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
    assert (report["leakage"]["comparisons"], report["leakage"]["policy"]) == (1, "error")
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


# --- the base, from its configuration ------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_length": 513}, "'max_length: 513': .* has 512 positions; set 512 or less"),
        ({"lora_modules_to_save": ["nrm"]}, "has no nrm; its linear layers are "),
        ({"attn_implementation": "nonsense"}, "cannot be loaded as a classifier"),
    ],
)
def test_check_finds_what_training_would_refuse_of_the_base(write_recipe, monkeypatch, keys, message):
    recipe = read_recipe(write_recipe(**keys))
    monkeypatch.setattr("rm_recipe.training.train.load_splits", lambda *_: pytest.fail("the data is read"))
    for verb in (check_base, load_data):
        with pytest.raises(RecipeError, match=message):
            verb(recipe)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", {"model": {}}, "the tokenizer of '.*base' cannot be loaded"),
        ("config.json", {"vocab_size": 999}, "are they of different models"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "cannot be trained in full"),
    ],
)
def test_check_finds_a_tokenizer_or_weights_that_cannot_be_trained(
    write_recipe, tmp_path, tiny_llama, name, change, message
):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | change))
    recipe = read_recipe(write_recipe(model_name_or_path=str(base), use_peft=False))
    for verb in (check_base, load_data):
        with pytest.raises(RecipeError, match=message):
            verb(recipe)


def test_a_base_without_a_classifier_is_refused_before_the_data_is_read(write_recipe, tmp_path, monkeypatch):
    base = GraniteConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    base.save_pretrained(tmp_path / "base")
    recipe = read_recipe(write_recipe(model_name_or_path=str(tmp_path / "base")))
    monkeypatch.setattr("rm_recipe.training.train.load_splits", lambda *_: pytest.fail("the data is read"))
    lacking = f"base': transformers .* has no sequence classifier for '{base.model_type}', and a reward model"
    for verb in (check_base, load_data):
        with pytest.raises(RecipeError, match=lacking):
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
    assert folder_at_hand("ann/base", "main") == str(snapshot)
    with pytest.raises(RecipeError, match="'max_length: 513': ann/base has 512 positions"):
        check_base(read_recipe(write_recipe(model_name_or_path="ann/base", max_length=513)))
    check_base(read_recipe(write_recipe(model_name_or_path="bob/base", max_length=513)))


def test_a_name_that_is_no_folder_and_no_hub_id_is_one_message(write_recipe):
    recipe = read_recipe(write_recipe(model_name_or_path="org/na me"), check_inputs=False)
    with pytest.raises(RecipeError, match="org/na me' does not exist, and is no Hub id"):
        check_base(recipe)


def test_an_sft_adapters_base_is_looked_at(tmp_path, tiny_llama):
    LoraConfig(base_model_name_or_path=str(tiny_llama), task_type="CAUSAL_LM").save_pretrained(
        tmp_path / "sft"
    )
    assert folder_at_hand(str(tmp_path / "sft"), "main") == str(tiny_llama)


def test_batches_that_would_be_dropped_are_named_before_the_model_is_loaded(write_recipe):
    keys = {"per_device_train_batch_size": 65, "dataloader_drop_last": True}
    with pytest.raises(RecipeError, match="would drop all of the 64 comparisons: a batch has 65"):
        load_data(read_recipe(write_recipe(**keys)))
    keys = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 16}
    with pytest.raises(RecipeError, match="would drop 8 of the 40 held-out comparisons at each evaluation"):
        load_data(read_recipe(write_recipe(dataloader_drop_last=True, **keys)))


def test_a_size_of_memory_is_read_with_its_unit():
    assert [parse_bytes(text) for text in ("8", "8GB", "0.5 GiB", "8000MB")] == [8e9, 8e9, 2**29, 8e9]
