"""What edits that should not matter do to rewards."""

import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from trl import ModelConfig

from rm_recipe.data.splits import load_split
from rm_recipe.data.tokenization import tokenize
from rm_recipe.evaluation.probes import EDITS, N_COMPARISONS, consistency
from rm_recipe.model.reward_model import load_base
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.schema import DataArguments
from rm_recipe.scoring import RewardModel


@pytest.mark.parametrize(
    ("name", "reply", "edited"),
    [
        ("repeated_sentence", "One. Two three!", "One. Two three! Two three!"),
        ("repeated_sentence", "no end", "no end no end"),
        ("thank_you", "Fine.", "Fine. Thank you!"),
        ("markdown", "a\n\nb", "**a**\n\n**b**"),
        ("trailing_space", "a", "a \n"),
    ],
)
def test_an_edit_keeps_what_the_reply_says(name, reply, edited):
    assert EDITS[name](reply) == edited


@pytest.fixture
def judge(tiny_llama):
    tokenizer = load_tokenizer(str(tiny_llama))
    model, _ = load_base(ModelConfig(str(tiny_llama)), tokenizer, seed=0)
    return RewardModel(model.eval(), tokenizer)


def make_split(judge, tmp_path, rows):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    split = load_split(DataArguments(dataset_name=str(path)), "test")
    return tokenize(split, judge.tokenizer, judge.max_length, "drop_oldest_turns")


def test_changes_are_those_of_scoring_the_edited_replies_alone(judge, tmp_path):
    split = make_split(judge, tmp_path, make_rows(5, seed=3))
    found = consistency(judge, split, judge.score_encoded)
    assert found.keys() == EDITS.keys()
    for name, edit in EDITS.items():
        before, after = (
            judge.score(
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


def test_a_large_data_set_is_sampled(judge, tmp_path):
    split = make_split(judge, tmp_path, make_rows(N_COMPARISONS + 40, seed=3))
    found = consistency(judge, split, judge.score_encoded)
    assert found["markdown"]["n"] == 2 * N_COMPARISONS


def test_replies_that_an_edit_makes_too_long_are_left_out(judge, tmp_path):
    rows = make_rows(8, seed=3)
    for row in rows[:3]:
        row["chosen"] += " good" * 60  # twice that is too long
    judge.max_length = 160
    split = make_split(judge, tmp_path, rows)
    assert len(split.comparisons) == 8
    assert consistency(judge, split, judge.score_encoded)["markdown"]["n"] == 2 * 5
    split = make_split(judge, tmp_path, rows[:3])
    assert consistency(judge, split, judge.score_encoded) == {}
