"""TRL's own code, asked for the rewards of given conversations; the trainers' steps are in test_handoff."""

import pytest
from transformers import AutoModelForSequenceClassification
from trl import RLOOConfig

from rm_recipe.exporting.verify import trl_rewards
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.scoring import RewardModel


@pytest.fixture
def two_gpus(monkeypatch):
    """TRL's settings see two GPUs in this process."""
    settle = RLOOConfig.__post_init__

    def see_two(self):
        settle(self)
        self._n_gpu = 2

    monkeypatch.setattr(RLOOConfig, "__post_init__", see_two)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_trl_gives_the_rewards_of_score(tiny_base, tmp_path, base):
    """Also where it sees more GPUs than one, with which it refuses to train in one process."""
    tokenizer = load_tokenizer(str(tiny_base(base)))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base(base), num_labels=1)
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pairs = [("hello", "good"), ("how are you", "fine thanks and you"), ("hello", "no")]
    conversations = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        for prompt, reply in pairs
    ]
    judge = RewardModel.from_pretrained(tmp_path)
    expected = judge.score([{"prompt": prompt, "response": reply} for prompt, reply in pairs])
    assert len(set(expected.tolist())) == 3
    assert trl_rewards(tmp_path, conversations) == pytest.approx(expected.tolist(), abs=1e-6)
