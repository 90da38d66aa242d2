"""The text that is scored: served as trained, one BOS at most, a pad token that is not EOS."""

import pytest
import torch
from conftest import ENDS, TINY, make_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe.data.tokenization import render
from rm_recipe.errors import RecipeError
from rm_recipe.model.tokenizer import check_lengths, check_vocabulary, load_tokenizer, pad_token, positions
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import load_data, load_model, make_trainer

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good cat"}]


@pytest.fixture
def save(tmp_path):
    """A function: saves the tiny tokenizer with another template, in a folder."""

    def make(name: str, template):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


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
        cut = other(text, truncation=True, max_length=4)["input_ids"]
        assert cut == expected[-4:]  # whoever cuts what is too long keeps the reply


def test_a_model_without_a_template_gets_a_plain_one_and_if_trained_is_told_of(save, tiny_distilbert, capsys):
    folder, plain = save("t", None), "<s>User: hello\n\nAssistant: good cat</s>"
    assert render(load_tokenizer(folder, of_base=True), MESSAGES) == plain
    assert "chat template" not in capsys.readouterr().err
    assert render(load_tokenizer(folder), MESSAGES) == plain
    assert "warning: " + folder + ": it has no chat template; it gets a plain" in capsys.readouterr().err
    encoder = load_tokenizer(str(tiny_distilbert))
    tokens = encoder.convert_ids_to_tokens(encoder(render(encoder, MESSAGES))["input_ids"])
    assert tokens.count("[CLS]") == 1
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")


def test_a_pad_token_is_one_that_no_conversation_ends_in(tiny_llama):
    """An unused one, no ordinary word that looks like one, else a new one."""
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token == "</s>"
    assert load_tokenizer(str(tiny_llama)).pad_token == "<unk>"
    tokenizer.unk_token = None
    vocabulary = {**tokenizer.get_vocab(), "Ġreserved": 999}
    tokenizer.get_vocab = lambda: vocabulary
    assert pad_token(tokenizer) == "<|pad|>"
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|reserved_7|>"]})
    assert pad_token(tokenizer) == "<|reserved_7|>"


# --- what does not fit its model --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"), [("roberta", 18), ("longformer", 18), ("bert", 20), ("opt", 20), ("llama", 20)]
)
def test_a_model_runs_on_as_many_tokens_as_it_is_said_to_have_positions_for(kind, expected):
    """Not on one more where there are embeddings of them, which may begin after the padding token's."""
    sizes = {"vocab_size": 30, "max_position_embeddings": 20, "pad_token_id": 1, "num_labels": 1}
    config = AutoConfig.for_model(kind, **TINY, **sizes, attention_window=[4, 4])
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert positions(model) == expected
    check_lengths(model, expected, "m")
    with pytest.raises(RecipeError, match=f"m has {expected} positions; set {expected} or less"):
        check_lengths(model, expected + 1, "m")
    with torch.no_grad():
        assert model(input_ids=torch.full((1, expected), 5)).logits.isfinite().all()
        if kind != "llama":
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, expected + 1), 5))


def test_of_longrope_the_positions_are_those_in_which_a_reward_does_not_depend_on_its_batch():
    """Phi-3.5's: one conversation past 4,096 tokens changed the rewards of all others beside it."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": 20, "vocab_size": 60}
    keys = {**TINY, **ENDS, **sizes, "pad_token_id": 0, "num_labels": 1}
    config = AutoConfig.for_model("phi3", **keys, rope_parameters={**rope, "rope_theta": 1e4})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert positions(model) == 20
    short, rewards = torch.arange(5, 10), {}
    for length in (5, 20, 21):
        batch = torch.zeros(2, length, dtype=torch.long)
        batch[0, :5], batch[1] = short, 7
        with torch.no_grad():
            rewards[length] = model(input_ids=batch, attention_mask=(batch != 0).long()).logits[0].item()
    assert rewards[20] == pytest.approx(rewards[5], abs=1e-6)
    assert abs(rewards[21] - rewards[5]) > 1e-5


def test_a_tokenizer_of_another_model_is_refused_with_both_sizes(tiny_llama, tmp_path):
    """Not for a token without an embedding: many a model was given a pad token and not resized."""
    tokenizer, config = load_tokenizer(str(tiny_llama)), AutoConfig.from_pretrained(tiny_llama)
    check_vocabulary(config, tokenizer, "m")
    own = config.vocab_size
    config.vocab_size = own + 20  # spare embeddings
    check_vocabulary(config, tokenizer, "m")
    for size in (own - 1, 2 * own):
        config.vocab_size = size
        with pytest.raises(RecipeError, match=f"m: its tokenizer has {own} tokens and the model {size} "):
            check_vocabulary(config, tokenizer, "m")
    config.vocab_size = own
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<image_soft_token>"])  # Gemma 3's, which its text models have no embedding for
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.pad_token_id == own
    check_vocabulary(config, load_tokenizer(str(tmp_path)), "m")


# --- templates --------------------------------------------------------------------------------------

OTHER_TEMPLATE = "{% for message in messages %}{{ message['content'] }}!{{ eos_token }}{% endfor %}"


def test_of_several_templates_the_default_one_is_taken_and_saved_alone(save, tmp_path):
    """A second one would be written into a folder of its own, which nothing here proves or uploads."""
    taken = load_tokenizer(save("several", {"default": OTHER_TEMPLATE, "tool_use": "{{ messages }}"}))
    assert taken.chat_template == OTHER_TEMPLATE
    taken.save_pretrained(tmp_path / "saved")
    assert all(path.is_file() for path in (tmp_path / "saved").iterdir())
    with pytest.raises(RecipeError, match="multiple chat templates with no default"):
        load_tokenizer(save("none", {"tool_use": "{{ messages }}"}))


def test_a_template_that_is_broken_or_cannot_be_read_is_one_message(tiny_llama, save, tmp_path):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "broken").write_text("{{ messages[0]['content'] + 1 }}")
    with pytest.raises(RecipeError, match="its chat template fails on a question and an answer: "):
        load_tokenizer(str(tiny_llama), template=str(tmp_path / "broken"))
    for template in (str(tmp_path / "binary"), "gone/hub", save("plain", None)):
        with pytest.raises(RecipeError, match=f"'chat_template_path: {template}' is no template's file"):
            load_tokenizer(str(tiny_llama), template=template)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_template_that_is_trained_with_is_ours_and_not_what_trl_reads(write_recipe, save, tmp_path, kind):
    """TRL puts the file's own text into the tokenizer, and fails at a folder's added tokens."""
    path = str(tmp_path / "other.jinja") if kind == "file" else save("other", OTHER_TEMPLATE)
    (tmp_path / "other.jinja").write_text(OTHER_TEMPLATE)
    recipe = read_recipe(write_recipe(chat_template_path=path))
    tokenizer, *splits, _ = load_data(recipe)
    assert render(tokenizer, MESSAGES) == "<s>hello!</s>good cat!</s>"
    tokenizer.chat_template = made = f"{tokenizer.chat_template}{{# made safe #}}"
    trainer = make_trainer(recipe, tokenizer, *load_model(recipe, tokenizer), *splits)
    assert trainer.processing_class.chat_template == made
    assert recipe.resolved()["chat_template_path"] == path
