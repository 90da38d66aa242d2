"""What edits that should not matter do to rewards, and what a bag of words can learn."""

import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from datasets import Dataset
from trl import ModelConfig

from rm_recipe.data.splits import load_split
from rm_recipe.data.tokenization import tokenize
from rm_recipe.evaluation.probes import EDITS, N_COMPARISONS, bag_of_words, consistency
from rm_recipe.model.reward_model import load_base
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.schema import DataArguments
from rm_recipe.scoring import RewardModel


@pytest.mark.parametrize(
    ("name", "reply", "edited"),
    [
        ("repeated_sentence", "One. Two three!", "One. Two three! Two three!"),
        ("thank_you", "Fine.", "Fine. Thank you!"),
        ("markdown", "a\n\nb", "**a**\n\n**b**"),
        ("trailing_space", "a", "a \n"),
    ],
)
def test_an_edit_keeps_what_the_reply_says(name, reply, edited):
    assert EDITS[name](reply) == edited


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
    found = consistency(model, split, model.score_encoded)
    assert found.keys() == EDITS.keys()
    for name, edit in EDITS.items():
        before, after = (
            model.score(
                [
                    {"prompt": row["prompt"], "response": change(reply)}
                    for row in split.comparisons
                    for reply in row["responses"]
                ]
            ).reshape(5, 2)
            for change in (str, edit)
        )
        change, was_right = after - before, before[:, 0] > before[:, 1]
        assert found[name]["n"] == 10
        assert found[name]["mean_change"] == pytest.approx(change.mean(), abs=1e-5)
        assert found[name]["largest"] == pytest.approx(np.abs(change).max(), abs=1e-5)
        assert found[name]["share_up"] == (change > 0).mean()
        overtakes = (after[:, 1] > before[:, 0])[was_right]
        assert found[name]["wins"] == (overtakes.mean() if was_right.any() else 0)


def test_a_large_data_set_is_sampled_and_replies_that_an_edit_makes_too_long_are_left_out(model, tmp_path):
    split = make_split(model, tmp_path, make_rows(N_COMPARISONS + 40, seed=3))
    assert consistency(model, split, model.score_encoded)["markdown"]["n"] == 2 * N_COMPARISONS
    rows = make_rows(8, seed=3)
    for row in rows[:3]:
        row["chosen"] += " good" * 60  # twice that is too long
    model.max_length = 160
    split = make_split(model, tmp_path, rows)
    assert len(split.comparisons) == 8
    assert consistency(model, split, model.score_encoded)["markdown"]["n"] == 2 * 5
    assert consistency(model, make_split(model, tmp_path, rows[:3]), model.score_encoded) == {}


# --- the bag of words --------------------------------------------------------------------------


def comparisons(*pairs: list[str]) -> Dataset:
    rows = {"responses": list(pairs), "ranks": [list(range(len(own))) for own in pairs]}
    return Dataset.from_dict(rows)


def test_a_bag_of_words_prefers_the_words_of_chosen_responses_whatever_their_order():
    score = bag_of_words(comparisons(*[["a good dog", "a bad dog"], ["good cat", "cat bad"]] * 5))
    good, bad, neither, unknown = score(["dog good", "bad dog", "dog", "never seen"])
    assert good > neither > bad
    assert unknown == 0


def test_the_two_sides_are_alike_to_it():
    """Equal bags give equal scores: no reward for standing first."""
    score = bag_of_words(comparisons(*[["one two", "two one"], ["two one", "one two"]] * 4))
    assert np.ptp(score(["one two", "two one"])) == 0


def test_rankings_teach_it_by_their_untied_pairs():
    rows = {"responses": [["best word", "good word", "bad word"]] * 6, "ranks": [[0, 1, 1]] * 6}
    best, good, bad = bag_of_words(Dataset.from_dict(rows))(["best", "good", "bad"])
    assert best > good
    assert good == bad


@pytest.mark.parametrize("pairs", [[["one", "two"]], [["?", "!"], ["...", "-"]], [["one two", "two three"]]])
def test_without_words_that_come_twice_or_with_one_comparison_there_is_none(pairs):
    assert bag_of_words(comparisons(*pairs)) is None
