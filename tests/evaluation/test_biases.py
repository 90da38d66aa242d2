"""Accuracy in parts of the data: every comparison in exactly one of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe.evaluation.metrics import (
    BUCKETS,
    accuracy_by_bucket,
    accuracy_by_subset,
    accuracy_interval,
    rank_correlation,
)


def test_a_few_whole_numbers_get_a_bucket_each():
    rows = accuracy_by_bucket([1, 3, 1, 2], np.array([1, 0, 0.5, 1]))
    assert [(row["label"], row["n"], row["accuracy"]) for row in rows] == [
        ("1", 2, 0.75), ("2", 1, 1), ("3", 1, 0),
    ]  # fmt: skip
    assert rows[0]["accuracy_ci95"] == accuracy_interval(0.75, 2)


def test_many_values_are_cut_into_buckets_of_about_the_same_size():
    values = np.random.default_rng(0).permutation(100)
    rows = accuracy_by_bucket(values, (values >= 40).astype(float))
    assert [row["label"] for row in rows] == ["0 to 19", "20 to 39", "40 to 59", "60 to 79", "80 to 99"]
    assert [row["n"] for row in rows] == [20] * BUCKETS
    assert [row["accuracy"] for row in rows] == [0, 0, 1, 1, 1]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(0.0), min_size=1, max_size=60))
def test_every_value_is_in_exactly_one_bucket(values):
    right = np.arange(len(values), dtype=float) % 2
    rows = accuracy_by_bucket(values, right)
    assert sum(row["n"] for row in rows) == len(values)
    assert sum(row["n"] * row["accuracy"] for row in rows) == pytest.approx(right.sum())


def test_subsets_are_named_and_what_belongs_to_none_is_left_out():
    found = accuracy_by_subset(["a", "", "b", "a"], np.array([1, 0, 0.5, 0]))
    assert {name: (part["n"], part["accuracy"]) for name, part in found.items()} == {
        "a": (2, 0.5),
        "b": (1, 0.5),
    }


def test_rank_correlation_is_none_where_nothing_varies():
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1], [2]) is None
    assert rank_correlation([1, 2, 30], [5, 6, 7]) == pytest.approx(1)
