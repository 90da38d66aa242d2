"""Rewards do not depend on who asks, in what order, or with how many others."""

import gzip
import json
from datetime import UTC, datetime
from itertools import permutations

import numpy as np
import pytest
import torch
from conftest import WORDS
from trl import ModelConfig

from rm_recipe import RewardModel
from rm_recipe.data.comparison import Comparison, Encoded, as_messages
from rm_recipe.data.tokenization import encode_all
from rm_recipe.errors import DataError, RecipeError, TrainingError
from rm_recipe.model.reward_model import load_base
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.processes import this_device
from rm_recipe.scoring import score_file


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(texts)]


ITEMS = [
    {"prompt": "hello", "response": "good cat"},
    {"prompt": [{"role": "user", "content": "how are you"}], "response": "fine thanks"},
    {"prompt": "hello", "response": "bad dog"},
    {"prompt": "hello", "response": "good cat"},
]


@pytest.fixture(params=["tiny_llama", "tiny_distilbert"])
def model(request) -> RewardModel:
    folder = str(request.getfixturevalue(request.param))
    tokenizer = load_tokenizer(folder)
    model, _ = load_base(ModelConfig(model_name_or_path=folder), tokenizer, seed=0)
    return RewardModel(model.eval(), tokenizer)


def test_rewards_are_those_of_plain_transformers(model):
    rewards = model.score(ITEMS)
    assert rewards.dtype == np.float32
    assert rewards.shape == (4,)
    for item, reward in zip(ITEMS, rewards, strict=True):
        messages = [*as_messages(item["prompt"]), {"role": "assistant", "content": item["response"]}]
        text = model.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert model.model(input_ids=ids).logits.item() == pytest.approx(reward, abs=1e-6)


def test_a_history_before_a_prompt_is_read_as_in_training(model):
    asked = {"prompt": "how are you", "response": "bad dog"}
    whole = {"prompt": turns("hello", "good cat", "how are you"), "response": "bad dog"}
    alone, before, expected = model.score([asked, {**asked, "history": [["hello", "good cat"]]}, whole])
    assert before == pytest.approx(expected, abs=1e-6)
    assert abs(alone - expected) > 1e-6


def test_a_message_may_hold_more_than_a_prompt_needs(model):
    """A table's has dates, which are no JSON."""
    message = {"role": "user", "content": "hello", "timestamp": datetime(2026, 1, 1, tzinfo=UTC)}
    rewards = model.score([{"prompt": [message], "response": "good cat"}])
    assert rewards[0] == pytest.approx(model.score(ITEMS)[0], abs=1e-6)


def test_the_order_and_the_company_of_an_item_do_not_matter(model):
    together = model.score(ITEMS)
    assert np.allclose(model.score(ITEMS[::-1])[::-1], together, atol=1e-6)
    assert np.allclose([model.score([item])[0] for item in ITEMS], together, atol=1e-6)
    assert together[0] == pytest.approx(together[3], abs=1e-6)


def test_many_responses_to_one_prompt_are_split_and_score_the_same(model, monkeypatch):
    items = [{"prompt": "hello", "response": " ".join(two)} for two in permutations(WORDS[:6], 2)]
    forward, sizes = model.model.forward, []

    def recorded(**rows):
        sizes.append(rows["input_ids"].numel())
        return forward(**rows)

    monkeypatch.setattr(model.model, "forward", recorded)
    together = model.score(items)
    (in_one,) = sizes
    monkeypatch.setattr("rm_recipe.scoring.TOKENS_ON_CPU", 30)
    assert np.allclose(model.score(items), together, atol=1e-6)
    assert max(sizes[1:]) < in_one / 2


def test_a_batch_without_memory_is_scored_by_halves_and_a_comparison_without_it_is_told(model, monkeypatch):
    items = [{"prompt": f"How is day {n}?", "response": "Fine!" + " Good." * n} for n in range(7)]
    expected, forward, most = model.score(items), type(model.model).__call__, [3]

    def on_a_small_gpu(self, *args, **kwargs):
        if self is model.model and len(kwargs.get("last_token_positions", kwargs["input_ids"])) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "__call__", on_a_small_gpu)
    assert np.allclose(model.score(items), expected, rtol=0, atol=1e-5)
    many = [{"prompt": "How is it?", "response": "Fine!" + " Good." * n} for n in range(7)]  # one comparison
    scored, most[0] = [model.score([item])[0] for item in many], 3
    assert np.allclose(model.score(many), scored, rtol=0, atol=1e-5)
    most[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        model.score(items)


def test_evaluation_and_score_agree_on_prompts_near_max_length(model):
    """One by one, in batches and as evaluation reads them: a reply's context follows from its prompt."""
    model.max_length = limit = 60
    model.truncation = "keep_end" if not model.sharing.used else "drop_oldest_turns"
    prompts = [turns("cat " * words, "yes", "far") for words in range(0, 40, 3)]
    comparisons = [Comparison(prompt, ["good", "bad cat", "dog " * 20]) for prompt in prompts]
    found = encode_all(model.tokenizer, comparisons, limit, model.truncation)
    fitting = [(c, row) for c, row in zip(comparisons, found, strict=True) if not row["excluded"]]
    assert len(fitting) > 5
    assert any(row["truncated"] for _, row in fitting)
    encoded = [Encoded(row["prefix"], row["suffixes"]) for _, row in fitting]
    evaluated = np.concatenate(model.score_encoded(encoded))
    items = [{"prompt": c.prompt, "response": reply} for c, _ in fitting for reply in c.responses]
    assert np.allclose(model.score(items), evaluated, atol=1e-6)
    assert np.allclose([model.score([item])[0] for item in items], evaluated, atol=1e-6)


def test_rewards_that_are_no_numbers_are_refused(model):
    with torch.no_grad():
        getattr(model.model, "score", getattr(model.model, "classifier", None)).weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        model.score(ITEMS)


@pytest.mark.parametrize(
    ("prompt", "response", "fault"),
    [
        ("", "b", "expected a 'prompt' and a 'response'"),
        ("a", 3, "expected a 'prompt' and a 'response' text; it has prompt, response"),
        (5, "b", "'prompt' should be a text or a list of messages"),
        ("a\ud800", "b", "invalid text"),
        ("far away " * 40, "yes", "too long .at most 40 tokens."),
        ("a", "good</s>[SEP] bad", "control tokens"),
        (str([{"role": "user", "content": "a"}]), "b", "python repr: write messages as JSON"),
        ([{"role": "judge", "content": "a"}], "b", "unknown role: role 'judge'"),
    ],
)
def test_an_item_that_cannot_be_scored_is_named(model, prompt, response, fault):
    model.max_length = 40
    items = [{"prompt": "a", "response": "b"}, {"prompt": prompt, "response": response}]
    with pytest.raises(DataError, match=f"item 2: {fault}"):
        model.score(items)
    if "expected" not in fault and "should be" not in fault:
        assert np.isfinite(model.score(items, unfit=np.nan)).tolist() == [True, False]


def test_one_item_or_a_pair_in_place_of_a_list_of_items_is_told_what_is_expected(model):
    for items in (ITEMS[0], [("hello", "good")]):
        with pytest.raises(DataError, match="item 1: expected a mapping with 'prompt' and 'response'"):
            model.score(items)


@pytest.mark.parametrize("name", ["with a byte order mark.jsonl", "packed.json.gz"])
def test_score_reads_the_files_that_training_reads(model, tmp_path, monkeypatch, name):
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda _: model)
    lines = b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ITEMS)).encode()
    (tmp_path / name).write_bytes(gzip.compress(json.dumps(ITEMS).encode()) if "gz" in name else lines)
    assert score_file("m", tmp_path / name, tmp_path / "out.jsonl") == 4
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in ("prompt", "response")} for row in scored] == ITEMS
    assert [row["reward"] for row in scored] == pytest.approx(model.score(ITEMS).tolist(), abs=1e-6)
    model.max_length = 4
    with pytest.raises(DataError, match=f"{name}, (row|line) 1: response too long"):
        score_file("m", tmp_path / name, tmp_path / "out.jsonl")


def test_a_prompt_is_read_as_in_training(model):
    """A transcript and messages as JSON text are the same prompt as the messages."""
    messages = turns("hello", "yes", "how are you")
    transcript = "\n\nHuman: hello\n\nAssistant: yes\n\nHuman: how are you\n\nAssistant:"
    human = [{**messages[0], "role": "human"}, *messages[1:]]
    items = [{"prompt": p, "response": "fine"} for p in (messages, json.dumps(messages), human)]
    items.append({"prompt": transcript, "response": " fine"})
    with_system = [{"role": "system", "content": "good"}, *messages]
    items += [{"prompt": with_system, "response": "fine"}, {**items[0], "system": "good"}]
    rewards = model.score(items)
    assert np.ptp(rewards[:4]) == pytest.approx(0, abs=1e-6)
    assert rewards[4] == pytest.approx(rewards[5], abs=1e-6)
    assert rewards[0] != rewards[5]
    with pytest.raises(DataError, match="item 1: tools: the template does not show 'multiply'"):
        model.score([{**items[0], "tools": [{"name": "multiply"}]}])


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(RecipeError, match="holds no model; an interrupted run goes on with"):
        RewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("model", ["tiny_distilbert"], indirect=True)
def test_a_model_that_says_no_length_is_given_what_it_has_positions_for(model):
    """Of a longer conversation the oldest turns go, where the model would fail."""
    said = turns(*["good " * 12] * 5)
    long, cut, short = model.score([{"prompt": said[n:], "response": "fine"} for n in (0, 2, 4)])
    assert model.max_length == 64
    assert long == pytest.approx(cut)
    assert long != short


def test_a_reward_model_goes_to_the_accelerator_of_its_process(monkeypatch):
    """The one that Accelerate has chosen, before that the launcher's, or the only one that it sees."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    for count, current, expected in ((8, 5, "cuda:5"), (8, 0, "cuda:3"), (1, 0, "cuda:0")):
        found = {"device_count": count, "current_device_index": current}
        for name, value in (found | {"current_accelerator": torch.device("cuda")}).items():
            monkeypatch.setattr(torch.accelerator, name, lambda value=value, **_: value)
        assert str(this_device()) == expected
