"""What is exported scores like what was evaluated, in plain transformers; or there is no export."""

import json

import pytest
import torch
from peft import LoraModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rm_recipe import RewardModel, quantisation
from rm_recipe import export as export_module
from rm_recipe.errors import ExportError, RecipeError
from rm_recipe.export import export
from rm_recipe.recipe import read_recipe
from rm_recipe.train import train

ITEMS = [{"prompt": "hello", "response": "good good"}, {"prompt": "hello", "response": "bad far"}]
SET_UPS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "4-bit": {"bf16": True, "load_in_4bit": True},
    "in full": {"use_peft": False, "learning_rate": 1e-3},
}


@pytest.fixture
def run(write_recipe, tmp_path, request):
    train(read_recipe(write_recipe(num_train_epochs=1, **SET_UPS[getattr(request, "param", "fp32")])))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("run", "drift"), [("fp32", 1e-5), ("bf16", 0.1), ("4-bit", 0.1), ("in full", 1e-5)], indirect=["run"]
)
def test_plain_transformers_gives_the_rewards_of_the_run(run, drift):
    checked = export(run)
    assert checked["n_sequences"] == 64
    assert checked["max_abs_diff"]["files"] <= 1e-5
    assert checked["max_abs_diff"]["merged"] <= drift
    folder = run / "export"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert model.dtype == torch.float32
    trained = RewardModel.from_pretrained(run).score(ITEMS)
    for item, reward in zip(ITEMS, trained, strict=True):
        messages = [
            {"role": "user", "content": item["prompt"]},
            {"role": "assistant", "content": item["response"]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        with torch.no_grad():
            assert model(**tokenizer(text, return_tensors="pt")).logits.item() == pytest.approx(
                reward, abs=drift
            )
    assert RewardModel.from_pretrained(folder).score(ITEMS) == pytest.approx(trained, abs=drift)


@pytest.mark.parametrize("run", ["bf16"], indirect=True)
def test_the_body_keeps_bf16_and_the_head_fp32(run):
    export(run)
    saved = load_file(run / "export" / "model.safetensors")
    assert saved["score.weight"].dtype == torch.float32
    assert saved["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_a_pipeline_gives_the_raw_reward(run):
    export(run)
    judge = pipeline("text-classification", model=str(run / "export"), device="cpu")
    text = judge.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good good"}], tokenize=False
    )
    result = judge(text)[0]
    assert result["label"] == "reward"
    assert result["score"] == pytest.approx(RewardModel.from_pretrained(run).score(ITEMS[:1])[0], abs=1e-5)


def test_an_export_that_scores_otherwise_is_not_put_in_place(run, monkeypatch):
    export(run)
    before = (run / "export" / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        export_module, "plain_rewards", lambda folder, conversations: torch.full((64,), 99.0).numpy()
    )
    with pytest.raises(
        ExportError, match=r"the files do not give .* comparison \d+, response \d .best first., went from"
    ):
        export(run, overwrite=True)
    assert (run / "export" / "model.safetensors").read_bytes() == before
    assert not [path for path in run.iterdir() if path.name.startswith(".export")]


def test_ctrl_c_leaves_no_half_written_export(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "plain_rewards", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(run)
    assert not [path for path in run.iterdir() if "export" in path.name]


def test_an_export_is_replaced_only_when_asked(run):
    export(run)
    with pytest.raises(RecipeError, match="add --overwrite to replace it"):
        export(run)
    export(run, overwrite=True)
    assert json.loads((run / "export" / "proof.json").read_text())["passed"]
    assert json.loads((run / "export" / "config.json").read_text())["problem_type"] == "regression"


def test_a_merge_that_moves_the_rewards_is_refused(run, monkeypatch):
    """peft#1836: 0.965 before the merge, 0.496 after."""
    merge = LoraModel.merge_and_unload

    def lose_head(model, **kwargs):
        merged = merge(model, **kwargs)
        torch.nn.init.normal_(merged.score.weight)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", lose_head)
    with pytest.raises(ExportError, match="merging changed the rewards: held-out comparison"):
        export(run)
    assert not (run / "export").exists()


@pytest.mark.parametrize("run", ["bf16", "4-bit"], indirect=True)
def test_what_the_precision_does_is_told_from_what_the_merge_does(run):
    """In fp32 the merge is exact, so that a misplaced head cannot pass for rounding."""
    moved = export(run)["max_abs_diff"]
    assert moved["merge"] <= 1e-5
    assert moved["rounding"] > 10 * moved["merge"]
    assert moved["evaluated"] > 10 * moved["merge"]
    assert (
        moved["merged"] <= sum(moved[stage] for stage in ("evaluated", "merge", "rounding", "files")) + 1e-6
    )


@pytest.mark.parametrize("run", ["4-bit"], indirect=True)
def test_a_base_that_is_de_quantised_wrongly_is_refused(run, monkeypatch):
    """It is loaded anew, so the merge alone would be exact: peft#1836 again."""
    right = quantisation.dequantize

    def wrongly(model):
        right(model)
        for parameter in model.base_model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)

    monkeypatch.setattr(quantisation, "dequantize", wrongly)
    with pytest.raises(ExportError, match="the model in fp32 is not what was evaluated: held-out comparison"):
        export(run)
    assert not (run / "export").exists()


def test_weights_that_are_rounded_too_coarsely_are_refused(run, monkeypatch):
    save = export_module.save

    def coarsely(judge, precision, folder, scale):
        for parameter in judge.model.parameters():
            parameter.data = (parameter.data * 2).round() / 2
        save(judge, precision, folder, scale)

    monkeypatch.setattr(export_module, "save", coarsely)
    with pytest.raises(ExportError, match="rounding the merged weights .* is allowed on average"):
        export(run)
    assert not (run / "export").exists()


@pytest.mark.parametrize("name", [".", "other"])
def test_overwriting_never_removes_what_is_no_export(run, tmp_path, name):
    target = run if name == "." else tmp_path / name
    target.mkdir(exist_ok=True)
    (target / "thesis.tex").write_text("kept")
    with pytest.raises(RecipeError, match="is not an export; choose another --output"):
        export(run, target, overwrite=True)
    assert (target / "thesis.tex").read_text() == "kept"


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RecipeError, match="is not a run folder"):
        export(tmp_path)
