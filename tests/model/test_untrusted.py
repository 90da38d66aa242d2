"""Weights are read from safetensors files alone, and no code that comes with a model is run."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_load_model import save_adapter
from transformers import AutoConfig, AutoModelForSequenceClassification
from trl import ModelConfig

from rm_recipe import RewardModel
from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.export import export
from rm_recipe.model.reward_model import check_safetensors, load_base, load_trained
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.reader import read_recipe, saved_values
from rm_recipe.training.train import train

CONVERT = r"alone, a pickle, which can run code .* convert it by transformers"
ITEMS = [{"prompt": "hello", "response": "good good"}]


class Trap:
    """Whose unpickling writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def spring(folder: Path, name: str = "pytorch_model.bin") -> Path:
    """Puts a trap in the place of a folder's safetensors files; returns what its unpickling would write."""
    marker = folder / "sprung"
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(marker)))
    return marker


@pytest.fixture
def base(tiny_llama, tmp_path):
    """A copy of the tiny Llama's folder."""
    return shutil.copytree(tiny_llama, tmp_path / "base")


def test_a_base_that_is_a_pickle_is_refused_and_not_unpickled(base, write_recipe):
    marker = spring(base)
    with pytest.raises(RecipeError, match=f"has its weights in pytorch_model.bin {CONVERT}"):
        train(read_recipe(write_recipe(model_name_or_path=str(base))))
    assert not marker.exists()
    pickle.loads((base / "pytorch_model.bin").read_bytes())
    assert marker.exists()  # the trap was set


def test_an_index_of_safetensors_that_names_a_pickle_is_refused(base):
    tokenizer = load_tokenizer(str(base))
    names = load_file(base / "model.safetensors")
    marker = spring(base, "part.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part.bin")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RecipeError, match="cannot be loaded as a classifier"):
        load_base(ModelConfig(str(base)), tokenizer, 0)
    assert not marker.exists()


@pytest.mark.parametrize("part", ["adapter", "base"])
def test_an_sft_adapter_that_is_a_pickle_is_refused_and_one_on_such_a_base(base, tmp_path, part):
    sft, tokenizer = tmp_path / "sft", load_tokenizer(str(base))
    save_adapter(sft, base)
    marker = spring(sft, "adapter_model.bin") if part == "adapter" else spring(base)
    with pytest.raises(RecipeError, match=CONVERT):
        load_base(ModelConfig(str(sft)), tokenizer, 0)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["adapter", "whole model"])
def test_a_reward_model_that_is_a_pickle_is_refused(base, kind):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    model.save_pretrained(base)
    marker = spring(base, "adapter_model.bin" if kind == "adapter" else "pytorch_model.bin")
    with pytest.raises(RecipeError, match=CONVERT):
        RewardModel.from_pretrained(base)
    assert not marker.exists()


def test_a_repository_on_the_hub_that_is_a_pickle_is_refused(monkeypatch):
    monkeypatch.setattr("rm_recipe.files._on_hub", lambda name, file, revision: file == "pytorch_model.bin")
    with pytest.raises(RecipeError, match=f"'big/old' has its weights in pytorch_model.bin {CONVERT}"):
        check_safetensors("big/old")


# --- code of a model's own -------------------------------------------------------------------


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig): model_type = "own"
class M(LlamaForCausalLM): pass
class T(PreTrainedTokenizerFast): pass
"""


def give_code(folder: Path, *, model_type: str | None = None) -> Path:
    """Adds code of its own to a model's folder; returns what its import would write."""
    marker = folder / "imported"
    (folder / "own.py").write_text(f"__import__('pathlib').Path({str(marker)!r}).touch()\n{OWN_CODE}")
    classes = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.C", **dict.fromkeys(classes, "own.M")}
    config["model_type"] = model_type or config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": [None, "own.T"]}}
    if model_type:
        tokenizer["tokenizer_class"] = "T"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return marker


@pytest.fixture
def willing(monkeypatch, tmp_path):
    """A user who says yes whenever transformers asks whether to run a model's code."""
    asked = []
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    return asked


def test_a_base_that_needs_code_of_its_own_is_refused_without_a_question(base, write_recipe, willing):
    marker = give_code(base, model_type="own")
    with pytest.raises(RecipeError, match="contains custom code"):
        train(read_recipe(write_recipe(model_name_or_path=str(base))))
    with pytest.raises(RecipeError, match="contains custom code"):
        RewardModel.from_pretrained(base)
    assert not marker.exists()
    assert not willing
    AutoConfig.from_pretrained(base)
    assert willing
    assert marker.exists()  # it would run if it were trusted


def test_a_judge_of_a_kind_without_a_classifier_is_refused_without_a_question(base, willing):
    """transformers knows Mamba's config, so that only the classifier is the model's own."""
    tokenizer = load_tokenizer(str(base))
    marker = give_code(base, model_type="mamba")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"id2label": {"0": "reward"}}))
    with pytest.raises(RecipeError, match="contains custom code"):
        load_trained(str(base), tokenizer)
    assert not marker.exists()
    assert not willing


def test_an_sft_adapters_tokenizer_runs_no_code_of_its_own(base, tmp_path, willing):
    tokenizer, sft = load_tokenizer(str(base)), tmp_path / "sft"
    save_adapter(sft, base)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, sft / name)
    marker = give_code(sft, model_type="own")
    (sft / "config.json").unlink()
    load_base(ModelConfig(str(sft)), tokenizer, 0)
    with pytest.raises(RecipeError, match="contains custom code"):
        load_tokenizer(str(sft))
    assert not marker.exists()
    assert not willing


def test_a_base_with_code_is_trained_evaluated_and_exported_without_it(base, write_recipe, tmp_path, willing):
    marker, run = give_code(base), tmp_path / "run"
    train(read_recipe(write_recipe(model_name_or_path=str(base), max_steps=1)))
    saved = (run / "recipe.yaml").read_text()
    assert saved_values(run)["trust_remote_code"] is False
    # As somebody else's run might have it.
    (run / "recipe.yaml").write_text(saved.replace("trust_remote_code: false", "trust_remote_code: true"))
    evaluate(str(run))
    export(run)
    for folder in (run, run / "export"):
        assert RewardModel.from_pretrained(folder).score(ITEMS).shape == (1,)
    AutoModelForSequenceClassification.from_pretrained(run / "export", trust_remote_code=True)
    for folder in (run / "model", run / "export"):
        assert "auto_map" not in (folder / "config.json").read_text()
    assert not marker.exists()
    assert not willing


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__[1] }}", "{{ messages.append(1) }}"])
def test_a_chat_template_reaches_nothing_but_the_conversation(base, template):
    (base / "chat_template.jinja").write_text(template)
    with pytest.raises(RecipeError, match="chat template fails"):
        load_tokenizer(str(base))
