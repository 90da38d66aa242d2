"""A base becomes a reward model whose head is fp32, new and seeded; what cannot is refused in one message."""

import json
import shutil
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import CHAT_TEMPLATE, logged, make_tokenizer, save_classifier, weights
from datasets import Dataset
from huggingface_hub.utils import httpx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from trl import ModelConfig, RewardConfig, RewardTrainer

from rm_recipe import RewardModel
from rm_recipe.data.comparison import Encoded, split_at_common_prefix
from rm_recipe.errors import RecipeError, TrainingError
from rm_recipe.exporting.export import export
from rm_recipe.model import head, lora
from rm_recipe.model.head import Float32Linear, check_saved_head, outermost
from rm_recipe.model.lora import check_head_is_whole, load_config
from rm_recipe.model.reward_model import READ_PADDING, check_base, is_decoder, load_base
from rm_recipe.model.shared_prefix import _small
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import load_data, train


def base(folder, seed: int = 0, **keys):
    config = ModelConfig(model_name_or_path=str(folder), **keys)
    return load_base(config, load_tokenizer(str(folder)), seed)


@pytest.fixture
def save(tiny_llama, tmp_path):
    """A function: saves a model as a base with the tiny Llama's tokenizer, and gives the folder."""

    def to(model, tokenizer_of=tiny_llama):
        model.save_pretrained(tmp_path / "base")
        load_tokenizer(str(tokenizer_of)).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return to


def in_4_bits(folder, kind=AutoModelForCausalLM):
    return kind.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


# --- the head -------------------------------------------------------------------------------------


# What a base lacks, and how many linear layers its body has.
LACKING = {
    "llama": (["score"], 14),
    "gpt2": (["score"], 8),
    "distilbert": (["classifier", "pre_classifier"], 12),
    "deberta": (["classifier", "pooler"], 12),
}


@pytest.mark.parametrize("bits", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
@pytest.mark.parametrize("name", LACKING)
def test_what_the_base_lacks_is_found_and_is_fp32_and_not_quantised(tiny_base, name, bits):
    """The heads of encoders were."""
    model, new = base(tiny_base(name), dtype="bfloat16", use_peft=True, **bits)
    lacking, linear_layers = LACKING[name]
    assert new == lacking
    for module in map(model.get_submodule, new):
        layers = [each for each in module.modules() if isinstance(each, torch.nn.Linear)]
        assert {type(layer) for layer in layers} == {Float32Linear}
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    quantised = [each for each in model.modules() if isinstance(each, (Linear4bit, Linear8bitLt))]
    assert len(quantised) == (linear_layers if bits else 0)
    assert next(model.base_model.parameters()).dtype == torch.bfloat16
    assert model.config.num_labels == 1


def test_of_names_inside_each_other_the_outermost_are_the_head():
    assert outermost(["pooler.dense", "classifier", "pooler", "pool"]) == ["classifier", "pool", "pooler"]


@pytest.mark.parametrize(("name", "classifier"), [("llama", "score"), ("bert", "classifier")])
def test_of_a_classifier_of_two_labels_the_head_is_drawn_anew(tiny_base, tmp_path, name, classifier):
    save_classifier(tmp_path, tiny_base(name), labels=2)
    (model, new), (again, _) = base(tmp_path), base(tmp_path)
    assert new == [classifier]
    weight = model.get_submodule(classifier).weight
    assert weight.unique().shape == (32,)
    assert torch.equal(weight, again.get_submodule(classifier).weight)  # by the seed


def test_the_heads_start_comes_from_the_seed(tiny_llama):
    first, again, other = (base(tiny_llama, seed)[0].score.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_of_a_saved_model_the_head_alone_is_read_back(tmp_path, monkeypatch):
    """One that was trained in full may fill the memory."""
    read = []

    @contextmanager
    def opened(*args, **keys):
        with safe_open(*args, **keys) as file:
            get = file.get_tensor
            yield SimpleNamespace(keys=file.keys, get_tensor=lambda name: read.append(name) or get(name))

    monkeypatch.setattr(head, "safe_open", opened)
    saved = {"model.q.weight": torch.ones(2), "score.weight": torch.ones(2)}
    save_file(saved, tmp_path / "model.safetensors")
    check_saved_head(tmp_path, {"score.weight": torch.zeros(2)})
    assert lora.untrained_layers(tmp_path) == []
    assert read == ["score.weight"]


def test_a_saved_head_that_is_missing_or_did_not_move_is_noticed(tmp_path):
    for name, fault in {"pre_classifier": "is missing", "classifier": "did not move"}.items():
        saved = {f"base_model.model.{name}.weight": torch.ones(1, 2)}
        save_file(saved, tmp_path / "adapter_model.safetensors")
        with pytest.raises(TrainingError, match=f" classifier.weight {fault}"):
            check_saved_head(tmp_path, {"classifier.weight": torch.ones(1, 2)})


# --- what is refused --------------------------------------------------------------------------------


def test_a_classifier_of_two_labels_is_no_reward_model(tiny_llama, save):
    folder = save(AutoModelForSequenceClassification.from_pretrained(tiny_llama))
    with pytest.raises(RecipeError, match="has 2 labels; a reward model has a head with one"):
        RewardModel.from_pretrained(folder)


def test_a_model_that_cannot_be_had_or_read_is_named(tiny_llama, tmp_path, monkeypatch):
    """As half a download is, or a Git LFS pointer; or the Hub cannot be reached."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(RecipeError, match="model.safetensors' is a Git LFS pointer.*git lfs pull"):
        base(tmp_path / "base")

    def answer(*_):
        raise httpx.ProxyError("407 Proxy Authentication Required")

    monkeypatch.setattr("rm_recipe.files._on_hub", answer)
    with pytest.raises(RecipeError, match="'model_name_or_path: user/behind-a-proxy' cannot be loaded: 407"):
        load_config("user/behind-a-proxy")


def test_a_base_that_lacks_weights_of_its_body_is_refused_and_not_trained_with_random_ones(tiny_llama, save):
    causal = AutoModelForCausalLM.from_pretrained(tiny_llama)
    causal.model.layers = causal.model.layers[:1]
    with pytest.raises(RecipeError, match=r"do not fit its config.json \(model.layers.1.input_layernorm.w"):
        base(save(causal))


def test_a_model_that_there_is_no_memory_for_is_not_called_a_wrong_one(tiny_llama, monkeypatch):
    def raise_it(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", raise_it)
    with pytest.raises(torch.OutOfMemoryError):
        base(tiny_llama)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"lora_target_modules": ["q_proj", "k_prj"]}, "no k_prj; its linear layers are down_proj, .*k_proj"),
        ({"lora_target_modules": ["*q_proj"]}, "by 'lora_target_modules: .* nothing to repeat"),
        ({"lora_target_modules": [".*mlp.query"]}, "LoRA cannot be added: No modules .* are down_proj"),
        ({"lora_target_modules": ["self_attn"]}, "LoRA cannot be added: Target module LlamaAttention"),
        ({"lora_target_parameters": ["q_proj.weight"]}, "LoRA cannot be added: Trying .* are down_proj"),
    ],
)
def test_what_lora_cannot_adapt_is_refused_before_weights_are_read(tiny_llama, keys, fault):
    """PEFT says nothing of one name among others."""
    config = ModelConfig(model_name_or_path="m", use_peft=True, **keys)
    with pytest.raises(RecipeError, match=fault):
        check_base(load_config(str(tiny_llama)), config, 64)


@pytest.mark.slow
def test_the_list_of_encoders_whose_rewards_depend_on_padding_is_that_of_this_transformers():
    """On small random copies: of 127 kinds those that can be made by their defaults."""
    ids, mask = torch.tensor([[1, 3, 4, 5, 2, *[0] * 9]]), torch.tensor([[1] * 5 + [0] * 9])
    found = set()
    torch.manual_seed(0)
    for kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        with suppress(Exception):
            small = _small(kind(), 20)
            with torch.device("meta"):
                outline = AutoModelForSequenceClassification.from_config(small)
            if is_decoder(outline) or outline.num_parameters() > 5e7:
                continue
            model = AutoModelForSequenceClassification.from_config(small).double().eval()
            with torch.no_grad():
                alone, padded = model(ids[:, :5]), model(ids, attention_mask=mask)
            if (alone.logits - padded.logits).abs().max() > 1e-9:  # the others' are 1e-15
                found.add(kind.model_type)
    assert found == set(READ_PADDING)


# --- in few bits --------------------------------------------------------------------------------------


def test_an_evaluation_in_the_middle_changes_nothing_that_is_trained(write_recipe, tmp_path):
    """A forward without gradients repacked 4-bit weights, and later gradients were wrong."""
    keys = {"load_in_4bit": True, "bf16": True, "max_steps": 3}
    for name, more in {"without": {}, "evaluated": {"eval_strategy": "steps", "eval_steps": 1}}.items():
        train(read_recipe(write_recipe(**keys, **more, output_dir=str(tmp_path / name))))
    assert len(logged(tmp_path / "evaluated", "eval_loss")) >= 2
    without, evaluated = weights(tmp_path / "without"), weights(tmp_path / "evaluated")
    assert without.keys() == evaluated.keys()
    assert all(torch.equal(without[key], evaluated[key]) for key in without)


def test_a_base_that_comes_quantised_is_trained_with_its_head_whole(tiny_llama, save, write_recipe, tmp_path):
    folder = save(in_4_bits(tiny_llama))
    train(read_recipe(write_recipe(model_name_or_path=str(folder))))
    model = RewardModel.from_pretrained(tmp_path / "run")
    good, bad = model.score([{"prompt": "hello 3 cat", "response": r} for r in ("good good", "bad bad")])
    assert good > bad
    with pytest.raises(RecipeError, match="comes quantised, so it cannot be trained in full"):
        check_base(load_config(str(folder)), ModelConfig(model_name_or_path=str(folder)), 64)


def test_a_head_that_is_quantised_is_refused(tiny_distilbert, save):
    quantised = in_4_bits(tiny_distilbert, AutoModelForMaskedLM)
    with pytest.raises(RecipeError, match="cannot be loaded as a classifier: "):
        base(save(quantised, tiny_distilbert), use_peft=True)
    model, _ = base(tiny_distilbert)
    model.classifier = Linear4bit(32, 1)
    with pytest.raises(RecipeError, match=r"m' comes with a quantised head \(classifier\): take the orig"):
        check_head_is_whole(model, ["classifier"], "m")


# --- reading back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("resized", [None, 1], ids=["pads with EOS", "a pad token"])
def test_a_reward_adapter_of_trls_on_gpt2_gives_the_rewards_it_was_trained_to(tiny_base, tmp_path, resized):
    """Its base has no token to pad with, so that one is added: by whoever trained, or here."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("gpt2"))
    tokenizer.unk_token = None
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base("gpt2"), num_labels=1)
    if resized:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer))
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([{"chosen": "good cat", "rejected": "bad dog"}] * 4),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["c_attn"]),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = RewardModel.from_pretrained(tmp_path / "adapter")
    assert loaded.model.get_input_embeddings().num_embeddings == 318
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.item()
    found = loaded.score_encoded([Encoded(*split_at_common_prefix([[5, 6, 7, 8], [5, 6, 9]]))])[0][0]
    assert found == pytest.approx(expected, abs=1e-6)


# --- an SFT adapter as the start ----------------------------------------------------------------------


def save_adapter(folder, base, **keys) -> PeftModel:
    """An adapter that does something, without a tokenizer."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base) if not isinstance(base, torch.nn.Module) else base
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, **keys)
    return model.eval()


@pytest.fixture
def sft(tiny_llama, tmp_path):
    """The folder of an SFT adapter on the tiny Llama."""
    save_adapter(tmp_path / "sft", tiny_llama)
    return tmp_path / "sft"


def hidden(causal) -> torch.Tensor:
    with torch.no_grad():
        return causal(torch.tensor([[5, 6, 7, 8]]), output_hidden_states=True).hidden_states[-1]


def hidden_of_base(folder, **keys) -> torch.Tensor:
    with torch.no_grad():
        return base(folder, **keys)[0].model(torch.tensor([[5, 6, 7, 8]])).last_hidden_state


def test_an_sft_adapter_is_merged_into_its_base_before_the_head_is_added(sft, tiny_llama):
    expected = hidden(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), sft).eval())
    assert torch.allclose(hidden_of_base(sft), expected, atol=1e-6)
    assert not torch.allclose(hidden_of_base(tiny_llama), expected, atol=1e-2)
    merged, _ = base(sft)
    assert torch.equal(merged.score.weight, base(tiny_llama)[0].score.weight)  # the seed's, whatever the body
    assert merged.name_or_path == str(sft)


@pytest.mark.parametrize("all_embeddings", [True, False])
def test_an_adapter_whose_embeddings_grew_with_its_tokenizer_keeps_both(tiny_llama, tmp_path, all_embeddings):
    """Or trains the new ones alone, as TRL's SFT does; PEFT saves them under another name then."""
    tokenizer, causal = make_tokenizer(), AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<|tool|>"])
    causal.resize_token_embeddings(len(tokenizer))
    expected = causal.get_input_embeddings().weight.detach().clone()
    if all_embeddings:
        save_adapter(tmp_path, causal, save_embedding_layers=True)
    else:
        tokens = LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[len(tokenizer) - 1])
        get_peft_model(causal, tokens).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = base(tmp_path)[0].get_input_embeddings().weight
    rows = slice(None) if all_embeddings else slice(len(tokenizer) - 1)
    assert torch.equal(found[rows], expected[rows])
    assert len(found) == len(tokenizer)


def test_an_adapter_on_a_quantised_base_is_merged_into_what_it_was_trained_on(tiny_llama, save, tmp_path):
    """QLoRA on a 4-bit repository is how most train on one small GPU."""
    causal = save_adapter(tmp_path / "sft", save(in_4_bits(tiny_llama)))
    lora.keep_layout(causal)
    expected = hidden(causal).float()
    found = hidden_of_base(tmp_path / "sft", dtype="float32")
    assert torch.allclose(found, expected, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("quantised", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_from_an_sft_adapter_is_read_back_and_exported_with_it(write_recipe, tmp_path, sft, quantised):
    keys = {"bf16": True, "load_in_4bit": True} if quantised else {}
    train(read_recipe(write_recipe(model_name_or_path=str(sft), num_train_epochs=1, **keys)))
    run = tmp_path / "run"
    settings = json.loads((run / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(sft)
    items = [{"prompt": "hello", "response": reply} for reply in ("good good", "bad far")]
    rewards = RewardModel.from_pretrained(run).score(items)
    assert export(run)["passed"]
    exported = RewardModel.from_pretrained(run / "export").score(items)
    assert abs(rewards - exported).max() <= (0.1 if quantised else 1e-5)
    merged = AutoModelForSequenceClassification.from_pretrained(run / "export")
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_an_adapter_without_a_tokenizer_takes_its_bases_and_with_one_its_own(sft):
    assert load_tokenizer(str(sft)).chat_template == CHAT_TEMPLATE
    own = make_tokenizer()
    own.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    own.save_pretrained(sft)
    assert load_tokenizer(str(sft)).chat_template == own.chat_template


def test_an_adapter_whose_weights_do_not_fit_its_base_is_refused(sft, tiny_llama, tmp_path):
    """PEFT warns, and leaves the layers without it as they were."""
    settings = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    get_peft_model(classifier, settings).save_pretrained(tmp_path / "reward")

    def lose(part: str, folder) -> None:
        saved = load_file(folder / "adapter_model.safetensors")
        kept = {key: value for key, value in saved.items() if part not in key}
        save_file(kept, folder / "adapter_model.safetensors")

    for folder, read in ((sft, base), (tmp_path / "reward", RewardModel.from_pretrained)):
        lose("q_proj", folder)
        with pytest.raises(RecipeError, match=r"does not fit its base \(.*q_proj"):
            read(folder)
    lose("score", tmp_path / "reward")
    with pytest.raises(RecipeError, match="the adapter .* cannot be loaded: .*score"):
        RewardModel.from_pretrained(tmp_path / "reward")


def test_an_adapter_of_the_wrong_kind_or_without_its_base_is_refused(write_recipe, tiny_llama, tmp_path, sft):
    with pytest.raises(RecipeError, match="is the adapter of a language model, not of a reward model"):
        RewardModel.from_pretrained(sft)
    train(read_recipe(write_recipe(max_steps=1)))
    again = read_recipe(write_recipe(model_name_or_path=str(tmp_path / "run" / "model")))
    with pytest.raises(RecipeError, match="adapter of a classifier, .* start from its export"):
        load_data(again)
    settings = json.loads((sft / "adapter_config.json").read_text())
    for content in (json.dumps(settings | {"base_model_name_or_path": "./gone"}), "{"):
        (sft / "adapter_config.json").write_text(content)
        with pytest.raises(RecipeError, match="cannot be loaded"):
            base(sft)
