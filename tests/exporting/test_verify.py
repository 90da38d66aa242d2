"""How steps are compared and files are scored anew; what an export must not survive is in test_export.

That plain transformers, TRL and PPO get `score`'s rewards every export proves, or it is refused.
"""

import re
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import make_rows, write_splits
from transformers import AutoConfig, AutoModelForSequenceClassification
from trl import RLOOConfig

from rm_recipe.data.splits import load_held_out_split
from rm_recipe.data.tokenization import tokenize
from rm_recipe.errors import ExportError
from rm_recipe.exporting import verify
from rm_recipe.exporting.plain_scoring import ppo_reward
from rm_recipe.model.reward_model import prepare_for_rewards
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.scoring import RewardModel


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

    def of(max_length=512, truncation="keep_end", **keys):
        split = load_held_out_split(read_recipe(write_recipe(**keys)))
        split = tokenize(split, reward_model.tokenizer, max_length, truncation)
        return verify.Verification(reward_model, split)

    return of


def test_truncated_conversations_have_no_text(verification, reward_model, tmp_path):
    """Of a short reply beside a long one, too: both read the same prompt, cut for the long one."""
    turns = [{"role": role, "content": "hello " * 12} for role in ("user", "assistant", "user")]
    rows = [{"prompt": turns, "chosen": "good", "rejected": "bad " * 30}, *make_rows(3, seed=2)]
    folder = write_splits(tmp_path / "turns", make_rows(4, seed=1), rows)
    data = {"truncation": "drop_oldest_turns", "dataset_name": str(folder)}
    short, long = map(len, verification(**data).sequences[:2])
    found = verification((short + long) // 2, **data)
    assert len(found.whole) == 6
    for number, messages in found.whole.items():
        text = reward_model.tokenizer.apply_chat_template(messages, tokenize=False)
        assert reward_model.tokenizer(text)["input_ids"] == found.sequences[number]


@pytest.mark.parametrize(
    ("moved", "share", "said"),
    [
        ({}, verify.ROUNDING, None),
        ({5: 2}, verify.ROUNDING, None),  # a single reward may move far
        ({5: 2}, 0, "it moved: held-out comparison 3, response 2 .* went from .* is allo"),
        ({5: 1, 6: 0.5}, 0, "3, response 2 "),
        ({7: np.nan}, verify.EIGHT_BITS, "4, response 2 "),
        (dict.fromkeys(range(0, 64, 2), 2), verify.EIGHT_BITS, "went from"),
    ],
)
def test_a_step_may_round_rewards_or_leaves_them_as_they_are(verification, monkeypatch, moved, share, said):
    """By so many standard deviations; what does move them adds to the tolerance."""
    followed = verification()
    after = followed.now.copy()
    for sequence, distance in moved.items():
        after[sequence] += distance * followed.spread
    monkeypatch.setattr(followed, "rewards", lambda: after)
    with pytest.raises(ExportError, match=said) if said else nullcontext():
        followed.check_step("merge", "it moved", share)
        most = max(moved.values(), default=0) * followed.spread
        assert followed.moved["merge"] == pytest.approx(most, rel=1e-4)
        assert followed.tolerance == pytest.approx(followed.float32 + most, rel=1e-4)


@pytest.mark.parametrize("base", ["llama", "gpt2", "bert", "deberta"])
def test_models_that_may_be_padded_on_the_left_are_known(tiny_base, base):
    config = AutoConfig.from_pretrained(tiny_base(base), num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    padded, mask = torch.tensor([[0, 0, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        moved = model(padded, attention_mask=mask).logits - model(ids).logits
    assert verify.pads_left(model) == (base == "llama") == bool(moved.abs().max() < 1e-5)


def test_trl_gives_the_rewards_of_score_where_it_sees_two_gpus(reward_model, tmp_path, monkeypatch):
    """With which it refuses to train in one process."""
    settle = RLOOConfig.__post_init__

    def see_two(self):
        settle(self)
        self._n_gpu = 2

    monkeypatch.setattr(RLOOConfig, "__post_init__", see_two)
    reward_model.model.save_pretrained(tmp_path)
    reward_model.tokenizer.save_pretrained(tmp_path)
    pairs = [("hello", "good good"), ("the cat sat on the mat", "no")]
    expected = reward_model.score([{"prompt": prompt, "response": reply} for prompt, reply in pairs])
    chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in pairs]
    found = verify.trl_rewards(tmp_path, chats, torch.device("cpu"))
    assert found == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_reply_that_no_policy_samples_so_has_no_reward_for_ppo(tiny_llama):
    """`hello` is one token here, and the generation prompt ends within it."""
    tokenizer = load_tokenizer(str(tiny_llama))
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}hel{% endif %}"
    )
    conversation = [{"role": "user", "content": "how "}, {"role": "assistant", "content": "hello"}]
    assert ppo_reward(None, tokenizer, conversation) is None


def test_a_fresh_process_needs_no_module_of_ours():
    imported = re.findall(r"^(?:from|import) (\w+)", verify.PLAIN_SCORING.read_text(), re.MULTILINE)
    assert set(imported) - sys.stdlib_module_names == {"torch", "transformers"}
