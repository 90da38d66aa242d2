"""Rewards do not depend on who asks, in what order, or with how many others."""

import gzip
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
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


def untrained(folder, **options) -> RewardModel:
    tokenizer = load_tokenizer(str(folder), **options)
    model, _ = load_base(ModelConfig(model_name_or_path=str(folder)), tokenizer, seed=0)
    return RewardModel(model.eval(), tokenizer)


@pytest.fixture(params=["tiny_llama", "tiny_distilbert"])
def model(request) -> RewardModel:
    return untrained(request.getfixturevalue(request.param))


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


def test_the_order_and_the_company_of_an_item_do_not_matter(model):
    together = model.score(ITEMS)
    assert np.allclose(model.score(ITEMS[::-1])[::-1], together, atol=1e-6)
    assert np.allclose([model.score([item])[0] for item in ITEMS], together, atol=1e-6)
    assert together[0] == pytest.approx(together[3], abs=1e-6)


def test_many_responses_to_one_prompt_are_split_and_score_the_same(model, monkeypatch):
    items = [{"prompt": "hello", "response": f"good cat {n}"} for n in range(30)]
    forward, sizes = model.model.forward, []

    def recorded(**rows):
        sizes.append(rows["input_ids"].numel())
        return forward(**rows)

    monkeypatch.setattr(model.model, "forward", recorded)
    together = model.score(items)
    (in_one,) = sizes
    monkeypatch.setattr("rm_recipe.scoring.TOKENS_PER_BATCH", 30)
    assert np.allclose(model.score(items), together, atol=1e-6)
    assert max(sizes[1:]) < in_one / 2


def test_evaluation_and_score_agree_on_prompts_near_max_length(model):
    """One by one, in batches and as evaluation reads them: a reply's context follows from its prompt."""
    model.max_length = limit = 60
    model.truncation = "keep_end" if not model.sharing.used else "drop_oldest_turns"
    comparisons = [
        Comparison(turns("cat " * words, "yes", "far"), ["good", "bad cat", "dog " * 20])
        for words in range(0, 40, 3)
    ]
    found = encode_all(model.tokenizer, comparisons, limit, model.truncation)
    fitting = [(c, row) for c, row in zip(comparisons, found, strict=True) if not row["excluded"]]
    assert len(fitting) > 5
    assert any(row["truncated"] for _, row in fitting)
    encoded = [Encoded(row["prefix"], row["suffixes"]) for _, row in fitting]
    evaluated = np.concatenate(model.score_encoded(encoded))
    items = [{"prompt": c.prompt, "response": reply} for c, _ in fitting for reply in c.responses]
    assert np.allclose(model.score(items), evaluated, atol=1e-6)
    assert np.allclose([model.score([item])[0] for item in items], evaluated, atol=1e-6)


def test_ids_as_ppo_builds_them_get_the_rewards_of_score(tiny_llama):
    """Prompt with generation prompt, sampled ids and their end token, padded on the left, in a batch."""
    model = untrained(tiny_llama, of_base=True)
    tokenizer, rows = model.tokenizer, []
    for item in ITEMS:
        messages = as_messages(item["prompt"])
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        sampled = tokenizer(f"{item['response']}{tokenizer.eos_token}")["input_ids"]
        rows.append(tokenizer(prompt)["input_ids"] + sampled)
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        rewards = model.model(**batch).logits[:, 0].numpy()
    assert len({len(row) for row in rows}) > 1
    assert np.allclose(rewards, model.score(ITEMS), atol=1e-6)


def test_rewards_that_are_no_numbers_are_refused(model):
    with torch.no_grad():
        getattr(model.model, "score", getattr(model.model, "classifier", None)).weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        model.score(ITEMS)


@pytest.mark.parametrize(
    ("prompt", "response", "fault"),
    [
        ("", "b", "expected a 'prompt' and a 'response'"),
        ("a", 3, "expected a 'prompt' and a 'response'"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: it holds no rows"),
        (b'{"prompt": "a", "response": "b"}\n{"prompt"', "line 2: not JSON"),
        (b'{"prompt": "a"}\n', "line 1: expected"),
        (b"\xff\xfe", "'utf-8' codec"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path, content, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        score_file("no model is loaded", path, tmp_path / "out.jsonl")
    assert str(path) in str(caught.value)


LINES = [json.dumps(item).encode() for item in ITEMS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + b"\n".join(LINES)),
        ("crlf.jsonl", b"\r\n".join(LINES) + b"\r\n"),
        ("packed.jsonl.gz", gzip.compress(b"\n".join(LINES))),
        ("list.json.gz", gzip.compress(b"[" + b",\n".join(LINES) + b"]")),
    ],
)
def test_score_reads_the_files_that_training_reads(model, tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda _: model)
    (tmp_path / name).write_bytes(content)
    assert score_file("m", tmp_path / name, tmp_path / "out.jsonl") == 4
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in ("prompt", "response")} for row in scored] == ITEMS
    assert [row["reward"] for row in scored] == pytest.approx(model.score(ITEMS).tolist(), abs=1e-6)
    model.max_length = 4
    with pytest.raises(
        DataError, match=f"{name}, {'row' if 'list' in name else 'line'} 1: response too long"
    ):
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


def test_a_model_or_input_that_is_not_there_is_named_and_leaves_no_output(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        score_file("whatever", tmp_path / "missing.jsonl", tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []
    for path, fault in (("./no/such", "no/such does not exist"), (tmp_path, "holds no model")):
        with pytest.raises(RecipeError, match=fault):
            RewardModel.from_pretrained(path)


def test_a_model_that_says_no_length_is_given_what_it_has_positions_for(tiny_distilbert, tmp_path):
    """64 of them: of a longer conversation the oldest turns go, where the model would fail."""
    folder = tmp_path / "plain"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_distilbert, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_distilbert).save_pretrained(folder)
    reward_model = RewardModel.from_pretrained(folder)
    said = turns(*["good " * 12] * 5)
    long, cut, short = reward_model.score([{"prompt": said[n:], "response": "fine"} for n in (0, 2, 4)])
    assert reward_model.max_length == 64
    assert long == pytest.approx(cut)
    assert long != short


@pytest.mark.parametrize(
    ("kind", "count", "current", "expected"),
    [
        ("cuda", 8, 0, "cuda:3"),  # under a launcher, before Accelerate has chosen
        ("cuda", 8, 5, "cuda:5"),  # chosen already
        ("cuda", 1, 0, "cuda:0"),  # each process sees its own alone
        (None, 0, 0, "cpu"),
    ],
)
def test_a_reward_model_goes_to_the_accelerator_of_its_process(monkeypatch, kind, count, current, expected):
    monkeypatch.setenv("LOCAL_RANK", "3")
    found = torch.device(kind) if kind else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current)
    assert str(this_device()) == expected
