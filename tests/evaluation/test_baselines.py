"""A bag of words learns words and nothing else."""

import numpy as np
from datasets import Dataset

from rm_recipe.evaluation.probes import bag_of_words


def comparisons(*pairs: list[str]) -> Dataset:
    rows = {"responses": list(pairs), "ranks": [list(range(len(own))) for own in pairs]}
    return Dataset.from_dict(rows)


def test_it_prefers_the_words_of_chosen_responses_whatever_their_order():
    judge = bag_of_words(comparisons(*[["a good dog", "a bad dog"], ["good cat", "cat bad"]] * 5))
    good, bad, neither = judge(["dog good", "bad dog", "dog"])
    assert good > neither > bad


def test_words_that_it_does_not_know_score_nothing():
    judge = bag_of_words(comparisons(*[["good dog", "bad dog"]] * 4))
    assert judge(["never seen", ""]).tolist() == [0, 0]


def test_the_two_sides_are_alike_to_it():
    """Equal bags give equal scores: no reward for standing first."""
    judge = bag_of_words(comparisons(*[["one two", "two one"], ["two one", "one two"]] * 4))
    assert np.ptp(judge(["one two", "two one"])) == 0


def test_rankings_teach_it_by_their_untied_pairs():
    rows = Dataset.from_dict(
        {"responses": [["best word", "good word", "bad word"]] * 6, "ranks": [[0, 1, 1]] * 6}
    )
    best, good, bad = bag_of_words(rows)(["best", "good", "bad"])
    assert best > good
    assert good == bad


def test_without_words_that_come_twice_there_is_none():
    assert bag_of_words(comparisons(["one", "two"])) is None
    assert bag_of_words(comparisons(["?", "!"], ["...", "-"])) is None


def test_one_comparison_is_too_little():
    assert bag_of_words(comparisons(["one two", "two three"])) is None
