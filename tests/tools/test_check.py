"""`check --data` writes what it found, stops where training would, and leaves other runs alone."""

import json
import shutil

import pytest
from conftest import run_cli
from peft import LoraConfig
from transformers import CohereConfig, GraniteConfig

from rm_recipe.errors import DataError, RecipeError
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.tools.check import check_base, check_data, folder_at_hand
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


# --- the base, from its configuration ------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_length": 513}, "'max_length: 513': .* has 512 positions; set 512 or less"),
        ({"lora_target_modules": ["nope_proj"]}, "no layer is called nope_proj; this model's are down_proj"),
        ({"lora_modules_to_save": ["lm_hed"]}, "'lora_modules_to_save': this model has no lm_hed"),
        ({"lora_modules_to_save": ["nrm"]}, "Did you mean 'norm'?"),
        (
            {"lora_target_parameters": ["q_proj.bias"]},
            "'lora_target_parameters': this model has no q_proj.bias",
        ),
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
    ("name", "content", "message"),
    [
        ("chat_template.jinja", "{% if %}", "its chat template fails"),
        ("tokenizer.json", "{", "the tokenizer of '.*base' cannot be loaded"),
        ("config.json", '{"vocab_size": 999}', "are they of different models"),
        (
            "config.json",
            '{"quantization_config": {"quant_method": "gptq", "bits": 4}}',
            "cannot be trained in full",
        ),
    ],
)
def test_check_finds_a_tokenizer_or_weights_that_cannot_be_trained(
    write_recipe, tmp_path, tiny_llama, name, content, message
):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    if name == "config.json":
        content = json.dumps(json.loads((base / name).read_text()) | json.loads(content))
    (base / name).write_text(content)
    recipe = read_recipe(write_recipe(model_name_or_path=str(base), use_peft=False))
    for verb in (check_base, load_data):
        with pytest.raises(RecipeError, match=message):
            verb(recipe)


@pytest.mark.parametrize("make", [GraniteConfig, CohereConfig], ids=str)
def test_a_base_without_a_classifier_is_refused_before_the_data_is_read(
    write_recipe, tmp_path, monkeypatch, make
):
    base = make(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
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


@pytest.mark.parametrize("name", ["org/na me", "/nope/x/y", "a--b"])
def test_a_name_that_is_no_folder_and_no_hub_id_is_one_message(write_recipe, name):
    with pytest.raises(RecipeError, match=f"'model_name_or_path: {name}' does not exist, and is no Hub id"):
        check_base(read_recipe(write_recipe(model_name_or_path=name), check_inputs=False))


def test_an_sft_adapters_base_is_looked_at(tmp_path, tiny_llama):
    LoraConfig(base_model_name_or_path=str(tiny_llama), task_type="CAUSAL_LM").save_pretrained(
        tmp_path / "sft"
    )
    assert folder_at_hand(str(tmp_path / "sft"), "main") == str(tiny_llama)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"per_device_train_batch_size": 65}, "would drop all of the 64 comparisons: a batch has 65"),
        (
            {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 16},
            "would drop 8 of the 40 held-out comparisons at each evaluation",
        ),
    ],
)
def test_batches_that_would_be_dropped_are_named_before_the_model_is_loaded(write_recipe, keys, message):
    with pytest.raises(RecipeError, match=f"'dataloader_drop_last: true' {message}"):
        load_data(read_recipe(write_recipe(dataloader_drop_last=True, **keys)))
