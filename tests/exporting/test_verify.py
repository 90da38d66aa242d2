"""How two steps are compared and files are scored anew; what an export must not survive is in test_export."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, make_rows, write_jsonl
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from trl import RLOOConfig

from rm_recipe.data.splits import load_held_out_split
from rm_recipe.data.tokenization import tokenize
from rm_recipe.errors import ExportError
from rm_recipe.exporting.plain_scoring import ppo_rewards
from rm_recipe.exporting.verify import (
    EIGHT_BITS,
    N_COMPARISONS,
    N_SERVED,
    PLAIN_SCORING,
    ROUNDING,
    Verification,
    pads_left,
    trl_rewards,
)
from rm_recipe.model.reward_model import prepare_for_rewards
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.scoring import RewardModel

PAIRS = [
    ("hello", "good good"),
    ("how are you", "fine thanks and you"),
    ("the cat sat on the mat", "no"),
    ("hello hello hello", "bad far away cat dog"),
]
ITEMS = [{"prompt": prompt, "response": reply} for prompt, reply in PAIRS]
CONVERSATIONS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}] for prompt, reply in PAIRS
]


@pytest.fixture
def reward_model(tiny_llama):
    tokenizer = load_tokenizer(str(tiny_llama))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).eval()
    prepare_for_rewards(model, tokenizer)
    return RewardModel(model, tokenizer)


@pytest.fixture
def verification(reward_model, write_recipe):
    """Of the held-out comparisons of a recipe, truncated to so many tokens."""

    def of(max_length=512, truncation="keep_end", predictions=(), **keys):
        split = load_held_out_split(read_recipe(write_recipe(**keys)))
        split = tokenize(split, reward_model.tokenizer, max_length, truncation)
        return Verification(reward_model, split, predictions)

    return of


def test_64_replies_are_compared_and_8_of_them_as_texts(verification):
    line = {"dataset": "held_out", "index": 1, "row": 2, "rewards": [2.0, -1.0]}
    found = verification(predictions=[line, line | {"dataset": "other", "index": 0, "row": 1}])
    assert len(found.names) == len(found.sequences) == len(found.now) == 2 * N_COMPARISONS == 64
    assert list(found.texts) == list(range(N_SERVED))
    assert found.recorded[2:4].tolist() == [2.0, -1.0]
    assert np.isnan(found.recorded).sum() == 62


def test_truncated_conversations_have_no_text(verification, reward_model, tmp_path):
    """Of a short reply beside a long one, too: both read the same prompt, cut for the long one."""
    turns = [{"role": role, "content": "hello " * 12} for role in ("user", "assistant", "user")]
    rows = [{"prompt": turns, "chosen": "good", "rejected": "bad " * 30}, *make_rows(3, seed=2)]
    for name in ("train", "test"):
        write_jsonl(tmp_path / "turns" / f"{name}.jsonl", rows if name == "test" else make_rows(4, seed=1))
    data = {"truncation": "drop_oldest_turns", "dataset_name": str(tmp_path / "turns")}
    short, long = map(len, verification(**data).sequences[:2])
    found = verification((short + long) // 2, **data)
    assert len(found.texts) == 6
    for number, messages in found.texts.items():
        text = reward_model.tokenizer.apply_chat_template(messages, tokenize=False)
        assert reward_model.tokenizer(text)["input_ids"] == found.sequences[number]


def test_the_reply_that_moved_most_is_named_with_both_rewards(verification, monkeypatch):
    followed = verification()
    for moved, said in ({5: 0.25, 6: 0.125}, "3, response 2"), ({7: np.nan}, "4, response 2"):
        after = followed.now.copy()
        for sequence, difference in moved.items():
            after[sequence] += difference
        monkeypatch.setattr(followed, "rewards", lambda after=after: after)
        said = f"it moved: held-out comparison {said} .* went from .* is allo"
        with pytest.raises(ExportError, match=said):
            followed.check_step("merge", "it moved")


def test_only_steps_that_round_and_do_move_rewards_add_to_the_tolerance(verification, reward_model):
    followed = verification()
    followed.check_step("merge", "")
    followed.check_step("rounding", "", ROUNDING)
    assert followed.tolerance == followed.float32
    for parameter in reward_model.model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    followed.check_step("rounding", "", ROUNDING)
    moved = followed.moved["rounding"]
    assert followed.float32 < moved < ROUNDING * followed.spread
    assert followed.tolerance == pytest.approx(followed.float32 + moved)


def test_what_rounds_may_move_a_single_reward_far_but_not_all_of_them(verification, monkeypatch):
    followed = verification()
    before = followed.now
    one = before + np.where(np.arange(len(before)) == 3, 2 * followed.spread, 0)
    monkeypatch.setattr(followed, "rewards", lambda: one)
    followed.check_step("precision", "", ROUNDING)
    assert followed.moved["precision"] == pytest.approx(2 * followed.spread, rel=1e-4)
    followed.now = before
    with pytest.raises(ExportError):
        followed.check_step("merge", "nothing is rounded")
    shuffled = np.random.default_rng(0).permutation(before)
    monkeypatch.setattr(followed, "rewards", lambda: shuffled)
    with pytest.raises(ExportError):
        followed.check_step("precision", "others", EIGHT_BITS)


@pytest.mark.parametrize(
    ("base", "either"), [("llama", True), ("gpt2", False), ("bert", False), ("deberta", False)]
)
def test_models_that_may_be_padded_on_the_left_are_known(tiny_base, base, either):
    model = AutoModelForSequenceClassification.from_config(
        AutoModel.from_pretrained(tiny_base(base)).config, dtype=torch.float32
    ).eval()
    model.config.num_labels, model.config.pad_token_id = 1, 0
    ids = torch.tensor([[5, 6, 7, 8]])
    padded, mask = torch.tensor([[0, 0, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        moved = model(padded, attention_mask=mask).logits - model(ids).logits
    assert pads_left(model) == either == bool(moved.abs().max() < 1e-5)


def save_classifier(base, folder, template=None):
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = template or tokenizer.chat_template
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.problem_type = "regression"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return RewardModel.from_pretrained(folder)


@pytest.mark.parametrize("base", ["llama", "bert"])
def test_trl_gives_the_rewards_of_score(tiny_base, tmp_path, monkeypatch, base):
    """Also where it sees more GPUs than one, with which it refuses to train in one process."""
    settle = RLOOConfig.__post_init__

    def see_two(self):
        settle(self)
        self._n_gpu = 2

    monkeypatch.setattr(RLOOConfig, "__post_init__", see_two)
    expected = save_classifier(tiny_base(base), tmp_path).score(ITEMS).tolist()
    assert len(set(expected)) == len(ITEMS)
    assert trl_rewards(tmp_path, CONVERSATIONS, torch.device("cpu")) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_ids_as_ppo_builds_them_get_the_rewards_of_score(tiny_base, tmp_path, base):
    """The prompt with its generation prompt, what a policy sampled, the end token; padded, in a batch."""
    reward_model = save_classifier(tiny_base(base), tmp_path, CHAT_TEMPLATE.replace("</s>\n", "</s>"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    found = ppo_rewards(model, AutoTokenizer.from_pretrained(tmp_path), CONVERSATIONS)
    assert found == pytest.approx(reward_model.score(ITEMS).tolist(), abs=1e-5)
    assert len(set(found)) == len(PAIRS)


def test_a_reply_that_no_policy_samples_so_has_no_reward_for_ppo(tiny_llama):
    """`hello` is one token here, and the generation prompt ends within it."""
    tokenizer = load_tokenizer(str(tiny_llama))
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}hel{% endif %}"
    )
    conversation = [{"role": "user", "content": "how "}, {"role": "assistant", "content": "hello"}]
    assert ppo_rewards(None, tokenizer, [conversation]) == [None]


def ask(tmp_path, **request):
    request = {"folder": str(tmp_path / "model"), "sampled": [], "device": "cpu", "left": True, **request}
    (tmp_path / "request.json").write_text(json.dumps(request))
    paths = [str(tmp_path / name) for name in ("request.json", "answer.json")]
    subprocess.run([sys.executable, "-P", PLAIN_SCORING, *paths], check=True, capture_output=True)
    return json.loads((tmp_path / "answer.json").read_text())


def test_a_fresh_process_gives_the_same_rewards_without_a_module_of_ours(tiny_llama, tmp_path):
    imported = re.findall(r"^(?:from|import) (\w+)", PLAIN_SCORING.read_text(), re.MULTILINE)
    assert set(imported) - sys.stdlib_module_names == {"torch", "transformers"}
    save_classifier(tiny_llama, tmp_path / "model")
    sequences = [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 10, 11, 2]]
    answer = ask(tmp_path, sequences=sequences, texts=["good cat"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits.item() for ids in sequences]
        text = model(**tokenizer("good cat", return_tensors="pt")).logits.item()
    for way in ("alone", "batched", "left", "float32"):
        assert answer[way] == pytest.approx(expected, abs=1e-6), way
    assert answer["pipeline"][0]["score"] == pytest.approx(text)
    assert answer["ids"] == [[tokenizer("good cat")["input_ids"]]] * 2


def test_what_goes_wrong_in_a_fresh_process_is_said_in_words(tmp_path):
    assert "Error: " in ask(tmp_path, sequences=[[1]], texts=[])["error"]
