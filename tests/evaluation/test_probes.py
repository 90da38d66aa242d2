"""What edits that should not matter do to rewards, and what a bag of words can learn."""

import random
from functools import partial

import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from datasets import Dataset
from trl import ModelConfig

from rm_recipe.data.augmentation import EDITS, UNSEEN
from rm_recipe.data.comparison import Comparison
from rm_recipe.data.splits import load_split
from rm_recipe.data.tokenization import tokenize
from rm_recipe.evaluation.probes import N_COMPARISONS, bag_of_words, changes, consistency
from rm_recipe.model.reward_model import load_base
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.schema import DataArguments
from rm_recipe.scoring import RewardModel


@pytest.fixture
def model(tiny_llama):
    tokenizer = load_tokenizer(str(tiny_llama))
    model, _ = load_base(ModelConfig(str(tiny_llama)), tokenizer, seed=0)
    return RewardModel(model.eval(), tokenizer)


def make_split(model, tmp_path, rows):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    split = load_split(DataArguments(dataset_name=str(path)), "test")
    return tokenize(split, model.tokenizer, model.max_length, "drop_oldest_turns")


def test_changes_are_those_of_scoring_the_edited_replies_alone(model, tmp_path):
    split = make_split(model, tmp_path, make_rows(5, seed=3))
    found = consistency(split, model.score, EDITS)
    rows = [(row["prompt"], reply) for row in split.comparisons for reply in row["responses"]]
    rewards = {}
    for name, edit in {"none": str, **EDITS}.items():
        items = [{"prompt": prompt, "response": edit(reply)} for prompt, reply in rows]
        rewards[name] = model.score(items).reshape(5, 2)
    before = rewards.pop("none")
    right = before[:, 0] > before[:, 1]
    assert found.keys() == EDITS.keys()
    for name, after in rewards.items():
        change, overtakes = after - before, (after[:, 1] > before[:, 0])[right]
        assert (found[name]["n"], found[name]["share_up"]) == (10, (change > 0).mean())
        assert found[name]["mean_change"] == pytest.approx(change.mean(), abs=1e-5)
        assert found[name]["wins"] == (overtakes.mean() if right.any() else 0)


def test_a_large_data_set_is_sampled_and_what_an_edit_makes_too_long_is_left_out(model, tmp_path):
    score = partial(model.score, unfit=np.nan)
    split = make_split(model, tmp_path, make_rows(N_COMPARISONS + 40, seed=3))
    assert consistency(split, score, EDITS)["markdown"]["n"] == 2 * N_COMPARISONS
    rows = make_rows(8, seed=3)
    for row in rows[:3]:
        row["chosen"] += " good" * 60  # twice that is too long
    model.max_length = 160
    assert consistency(make_split(model, tmp_path, rows), score, EDITS)["markdown"]["n"] == 2 * 5
    assert consistency(make_split(model, tmp_path, rows[:3]), score, EDITS) == {}


# --- the probes, tried on rewards whose bias is known -------------------------------------------

ALL = EDITS | UNSEEN


def reward(seed, bias):
    """A reward of noise, another one for every text, and of a bias."""

    def score(items):
        texts = [item["response"] for item in items]
        return [random.Random(f"{seed} {text}").gauss() + bias(text) for text in texts]

    return score


class Some(list):
    """Of a split what the probes read."""

    comparisons = property(lambda self: self)


SOME = Some(Comparison([], [row["chosen"], row["rejected"]]) for row in make_rows(60, seed=3))


def test_a_reward_without_a_bias_is_not_accused():
    """Of 200, in a twentieth by chance one of the seven edits seems to matter, or up or down."""
    accused = 0
    for seed in range(200):
        found = consistency(SOME, reward(seed, lambda text: 0), ALL)
        accused += any(moved["p_value"] < 0.05 for moved in found.values())
    assert accused <= 17  # 10 expected; more than 17 has a chance of 1 in 100


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("repeated_sentence", lambda text: min(len(text) / 60, 1)),
        ("thank_you", lambda text: "Thank" in text),
        ("list", lambda text: text.startswith("- ")),
        ("markdown", lambda text: text.startswith("**")),
    ],
    ids=["length", "keyword", "list", "bold"],
)
def test_a_planted_bias_is_found_at_the_size_that_is_said_to_be_enough(name, bias):
    def probed(seed, size):
        return consistency(SOME, reward(seed, lambda text: size * bias(text)), ALL)[name]

    smallest = np.mean([probed(seed, 0)["smallest"] for seed in range(5)])
    size = smallest / (probed(0, 1000.0)["mean_change"] / 1000)  # of a unit of it
    found = [probed(seed, size)["raises"] for seed in range(40)]
    assert sum(found) >= 26  # 32 expected; fewer than 26 has a chance of 1 in 100
    small = [probed(seed, size / 5)["raises"] for seed in range(20)]
    assert sum(small) <= 6


def test_what_ten_comparisons_are_said_to_show_is_not_what_many_would():
    """By the normal's quantiles it was shown every other time, not four times in five."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(400, 10, 8, 2))
    drawn[:, :, 1:] += drawn[:, :, :1]  # what an edit makes of a reward, on average nothing
    smallest = np.mean([changes(rewards, list(ALL))["list"]["smallest"] for rewards in drawn])
    drawn[:, :, 1:] += smallest
    found = [changes(rewards, list(ALL))["list"]["raises"] for rewards in drawn]
    assert 0.7 < np.mean(found) < 0.9


@pytest.mark.parametrize(
    ("reply", "added"),
    [
        ("Yes. I do! Why not?", " Why not?"),
        ("It is 3.5. No", " No"),
        ("先看说明。最后检查一遍。", "最后检查一遍。"),
        ("「はい。」そうです\uff01\uff01いいえ\uff1f", "いいえ\uff1f"),
        ("他说“好。”然后走了。", "然后走了。"),
        ("मैं ठीक हूँ। और आप?", " और आप?"),
        ("هل أنت بخير؟ نعم.", " نعم."),
        ("没有句号", "没有句号"),
    ],
)
def test_the_last_sentence_alone_is_repeated_whatever_its_full_stop(reply, added):
    assert EDITS["repeated_sentence"](reply) == reply + added


# --- the bag of words --------------------------------------------------------------------------


def comparisons(*pairs: list[str]) -> Dataset:
    rows = {"responses": list(pairs), "ranks": [list(range(len(own))) for own in pairs]}
    return Dataset.from_dict(rows)


def test_a_bag_of_words_prefers_the_words_of_chosen_responses_whatever_their_order():
    score = bag_of_words(comparisons(*[["a good dog", "a bad dog"], ["good cat", "cat bad"]] * 5))
    good, bad, neither, unknown = score(["dog good", "bad dog", "dog", "never seen"])
    assert good > neither > bad
    assert unknown == 0
    # Equal bags give equal scores: no reward for standing first.
    score = bag_of_words(comparisons(*[["one two", "two one"], ["two one", "one two"]] * 4))
    assert np.ptp(score(["one two", "two one"])) == 0


@pytest.mark.parametrize("pairs", [[["one", "two"]], [["?", "!"], ["...", "-"]], [["one two", "two three"]]])
def test_without_words_that_come_twice_or_with_one_comparison_there_is_none(pairs, caplog):
    """Which is said."""
    assert bag_of_words(comparisons(*pairs)) is None
    assert "no bag-of-words baseline" in caplog.text


@pytest.mark.parametrize("sides", [("谢谢再试{}次。", "不用再试{}次。"), ("ขอบคุณครับ{}", "ไม่ต้องครับ{}")])
def test_where_no_spaces_are_written_characters_are_words(sides):
    score = bag_of_words(comparisons(*[[side.format(n) for side in sides] for n in range(20)]))
    chosen, rejected = score([side.format(77) for side in sides])
    assert chosen > rejected
