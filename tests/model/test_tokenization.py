"""The text that is scored: served as trained, one BOS at most, a pad token that is not EOS."""

import json

import pytest
import torch
from conftest import TINY, make_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe.data.tokenization import render
from rm_recipe.errors import RecipeError
from rm_recipe.model.shared_prefix import Sharing
from rm_recipe.model.tokenizer import check_lengths, check_vocabulary, load_tokenizer, pad_token, positions
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import load_data, load_model, make_trainer

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good cat"}]


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_distilbert"])
def test_special_tokens_come_once_also_after_saving_and_loading(fixture, request, tmp_path):
    tokenizer = load_tokenizer(str(request.getfixturevalue(fixture)))
    tokenizer.save_pretrained(tmp_path)
    text = render(tokenizer, MESSAGES)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    for other in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert render(other, MESSAGES) == text
        for add_special_tokens in (True, False):
            assert other(text, add_special_tokens=add_special_tokens)["input_ids"] == expected
        assert other.pad_token_id == tokenizer.pad_token_id


def test_an_encoder_reads_cls_text_sep(tiny_distilbert):
    tokenizer = load_tokenizer(str(tiny_distilbert))
    ids = tokenizer(render(tokenizer, MESSAGES))["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens.count("[CLS]") == 1
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"


def test_a_pad_token_that_is_eos_is_replaced_by_an_unused_one(tiny_llama):
    assert make_tokenizer().pad_token == "</s>"
    assert load_tokenizer(str(tiny_llama)).pad_token == "<unk>"


def test_a_vocabulary_without_an_unused_token_gets_a_new_one():
    tokenizer = make_tokenizer()
    tokenizer.unk_token = None
    assert pad_token(tokenizer) == "<|pad|>"


def test_a_model_without_a_template_gets_a_plain_one(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    text = render(load_tokenizer(str(tmp_path)), MESSAGES)
    assert text == "<s>User: hello\n\nAssistant: good cat</s>"


def test_an_ordinary_word_is_no_pad_token():
    tokenizer = make_tokenizer()
    tokenizer.unk_token = None
    vocabulary = {**tokenizer.get_vocab(), "Ġreserved": 999}
    tokenizer.get_vocab = lambda: vocabulary
    assert pad_token(tokenizer) == "<|pad|>"
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|reserved_7|>"]})
    assert pad_token(tokenizer) == "<|reserved_7|>"


AFTER_PADDING = [
    *("camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
]
ODD_KEYS = {
    "longformer": {"attention_window": [4, 4]},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 8},
    "markuplm": {"max_depth": 4, "xpath_unit_hidden_size": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "lilt": {"channel_shrink_ratio": 1, "hidden_size": 48},
}


@pytest.mark.parametrize("kind", [*AFTER_PADDING, "bert", "electra", "gpt2", "opt", "llama"])
def test_a_model_runs_on_as_many_tokens_as_it_is_said_to_have_positions_for(kind):
    """Not on one more where there are embeddings of them, which may begin after the padding token's."""
    keys = {"vocab_size": 30, "max_position_embeddings": 20, "pad_token_id": 1, "num_labels": 1}
    config = AutoConfig.for_model(kind, **TINY | keys | ODD_KEYS.get(kind, {}))
    number = positions(config)
    assert number == (18 if kind in AFTER_PADDING else 20)
    check_lengths(config, number, "m")
    with pytest.raises(RecipeError, match=f"m has {number} positions; set {number} or less"):
        check_lengths(config, number + 1, "m")
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        assert model(input_ids=torch.full((1, number), 5)).logits.isfinite().all()
        if kind != "llama":
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, number + 1), 5))


def test_positions_of_an_esm_that_rotates_and_of_xlnet_are_not_embedded():
    keys = {"max_position_embeddings": 20, "pad_token_id": 1, "position_embedding_type": "rotary"}
    rotary = AutoConfig.for_model("esm", **TINY, vocab_size=30, **keys)
    assert positions(rotary) == 20
    assert positions(AutoConfig.for_model("xlnet")) is None
    check_lengths(AutoConfig.for_model("xlnet"), None, "m")


def test_more_length_than_positions_is_refused_with_both_numbers(tiny_distilbert):
    config = AutoConfig.from_pretrained(tiny_distilbert)
    check_lengths(config, 64, "m")
    with pytest.raises(RecipeError, match="'max_length: 65': m has 64 positions"):
        check_lengths(config, 65, "m")


def test_of_several_templates_the_default_one_is_taken_and_saved_alone(tiny_llama, tmp_path):
    """A second one would be written into a folder of its own, which nothing here proves or uploads."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(tmp_path / "several")
    taken = load_tokenizer(str(tmp_path / "several"))
    assert taken.chat_template == tokenizer.chat_template["default"]
    taken.save_pretrained(tmp_path / "saved")
    assert all(path.is_file() for path in (tmp_path / "saved").iterdir())
    tokenizer.chat_template = {"tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(RecipeError, match=r"none of its chat templates \(tool_use\) is called default"):
        load_tokenizer(str(tmp_path / "none"))


def test_a_template_that_is_broken_is_refused_with_its_fault(tiny_llama, tmp_path):
    template = tmp_path / "t.jinja"
    for text in ("{% for message in messages %}", "{{ messages[0]['content'] + 1 }}"):
        template.write_text(text)
        with pytest.raises(RecipeError, match="its chat template fails on a question and an answer: "):
            load_tokenizer(str(tiny_llama), template=str(template))


def test_a_tokenizer_of_another_model_is_refused_with_both_sizes(tiny_llama):
    tokenizer, config = load_tokenizer(str(tiny_llama)), AutoConfig.from_pretrained(tiny_llama)
    check_vocabulary(config, tokenizer, "m")
    own = config.vocab_size
    config.vocab_size = own + 20  # spare embeddings
    check_vocabulary(config, tokenizer, "m")
    for size in (own - 1, 2 * own):
        config.vocab_size = size
        with pytest.raises(RecipeError, match=f"m: its tokenizer has {own} tokens and the model {size} "):
            check_vocabulary(config, tokenizer, "m")


def test_a_pad_token_without_an_embedding_is_no_tokenizer_of_another_model(tiny_llama, tmp_path):
    """Many a model was given one without anyone resizing its embeddings."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<image_soft_token>"])  # Gemma 3's, which its text models have no embedding for
    tokenizer.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tiny_llama)
    assert tokenizer.pad_token_id == config.vocab_size
    check_vocabulary(config, load_tokenizer(str(tmp_path)), "m")


def test_ids_that_are_not_those_of_the_tokenizer_file_are_told_of(tiny_llama, tmp_path, caplog):
    """Some of transformers' classes build their own rules from the vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path))
    assert "gives other token ids" not in caplog.text
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    content["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(content))
    load_tokenizer(str(tmp_path))
    assert "gives other token ids than its tokenizer.json" in caplog.text


# --- chat_template_path --------------------------------------------------------------------------

OTHER_TEMPLATE = "{% for message in messages %}{{ message['content'] }}!{{ eos_token }}{% endfor %}"


def test_a_template_may_be_a_file_or_the_one_of_another_tokenizer(tiny_llama, tmp_path):
    (tmp_path / "t.jinja").write_text(OTHER_TEMPLATE)
    other = make_tokenizer()
    other.chat_template = OTHER_TEMPLATE
    other.save_pretrained(tmp_path / "other")
    for template in ("t.jinja", "other"):
        tokenizer = load_tokenizer(str(tiny_llama), template=str(tmp_path / template))
        assert render(tokenizer, MESSAGES) == "hello!</s>good cat!</s>"


def test_a_template_that_cannot_be_read_is_one_message(tiny_llama, tmp_path):
    (tmp_path / "binary.jinja").write_bytes(bytes(range(256)))
    (tmp_path / "empty").mkdir()
    other = make_tokenizer()
    other.chat_template = None
    other.save_pretrained(tmp_path / "plain")
    for name, fault in (
        ("binary.jinja", "binary.jinja' is not UTF-8 text"),
        ("empty", "empty' is no template's file, and no tokenizer that can be loaded: "),
        ("gone/hub", "is no template's file, and no tokenizer that can be loaded: "),
        ("plain", "plain' has no chat template"),
    ):
        with pytest.raises(RecipeError, match=f"'chat_template_path: .*{fault}"):
            load_tokenizer(str(tiny_llama), template=str(tmp_path / name) if "/" not in name else name)


@pytest.mark.parametrize("suffix", [".jinja", ""])
def test_the_template_that_is_trained_with_is_ours_and_not_what_trl_would_read_again(
    write_recipe, tmp_path, suffix
):
    """TRL puts the file's own text into the tokenizer, and fails at a folder's added tokens."""
    path = tmp_path / f"other{suffix}"
    if suffix:
        path.write_text(OTHER_TEMPLATE)
    else:
        other = make_tokenizer()
        other.chat_template = OTHER_TEMPLATE
        other.save_pretrained(path)
    recipe = read_recipe(write_recipe(chat_template_path=str(path)))
    tokenizer, train_split, test_split, _ = load_data(recipe)
    tokenizer.chat_template = made = f"{tokenizer.chat_template}{{# made safe #}}"
    model = load_model(recipe, tokenizer)
    trainer = make_trainer(recipe, tokenizer, *model, train_split, test_split, Sharing(False, "off", None))
    assert trainer.processing_class.chat_template == made
    assert recipe.resolved()["chat_template_path"] == str(path)
