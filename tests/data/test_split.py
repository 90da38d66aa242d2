"""What is not among a split's comparisons is counted, and the sum is exact."""

from collections import Counter

import datasets as hf_datasets
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe.data.comparison import Encoded
from rm_recipe.data.dataset import Split, set_excluded_apart

REASONS = st.sampled_from(["", "", "empty_response", "too_long"])


def split_of(reasons: list[str]) -> Split:
    n = len(reasons)
    columns = {"row": list(range(1, n + 1)), "subset": ["s"] * n, "excluded": reasons}
    columns["detail"] = [f"as {reason}" if reason else "" for reason in reasons]
    return Split(hf_datasets.Dataset.from_dict(columns), n)


@given(st.lists(REASONS, min_size=1, max_size=30))
def test_rows_are_comparisons_and_counted_reasons_and_nothing_else(reasons):
    split = set_excluded_apart(split_of(reasons))
    assert split.rows == len(split.comparisons) + split.excluded.total() == len(reasons)
    assert split.excluded == Counter(filter(None, reasons))
    assert split.comparisons["row"][:] == [n for n, reason in enumerate(reasons, 1) if not reason]
    for reason, names in split.first_rows.items():
        assert names == [f"s:{n}" for n, r in enumerate(reasons, 1) if r == reason][:5]
    assert split.details == {reason: f"as {reason}" for reason in split.excluded}


def test_the_largest_batch_is_by_what_its_rows_take():
    """One sequence a row, a batch is as wide as its longest; with shared prefixes only tokens count."""
    rests = [[[1] * 40, [1] * 40], [[1] * 70, [1] * 2], [[1] * 30, [1] * 30]]
    columns = {"prefix": [[1] * 10, [1] * 10, [1] * 50], "rests": rests}
    split = Split(hf_datasets.Dataset.from_dict(columns), 3)
    assert split.sizes(True).tolist() == [90, 82, 110]
    assert split.sizes(False).tolist() == [100, 92, 160]
    assert split.largest(3, shared=True).tolist() == [2, 0, 1]
    assert split.largest(3, shared=False).tolist() == [1, 2, 0]
    assert split.longest(1, shared=False) == [Encoded([1] * 10, rests[1])]


def test_a_selection_counts_what_it_leaves_out():
    split = set_excluded_apart(split_of(["", "too_long", "", ""]))
    some = split.select(np.array([True, False, True]), "leaked_prompt")
    assert some.column("row").tolist() == [1, 4]
    assert some.excluded == {"too_long": 1, "leaked_prompt": 1}
    assert some.rows == len(some.comparisons) + some.excluded.total()
    assert split.excluded == {"too_long": 1}  # the whole is not changed
    assert split.select(np.array([True] * 3), "leaked_prompt") is split


def test_counts_are_told_on_one_line():
    rows = hf_datasets.Dataset.from_dict({"row": []})
    split = Split(rows, 3, Counter(a=2, b=1), {"a": ["helpful:7", "helpful:9"]})
    assert split.why_excluded() == "2 a, first in row helpful:7; 1 b"
    assert Split(rows, 0).why_excluded() == "no rows"


def test_the_longest_comparisons_are_found_with_their_prefix_once_or_for_each_response():
    shapes = [(5, (1, 1)), (1, (9, 3)), (6, (1, 1, 1)), (2, (2, 2)), (5, (2, 1))]
    rows = [{"prefix": [1] * n, "rests": [[2] * each for each in rests]} for n, rests in shapes]
    split = Split(hf_datasets.Dataset.from_list(rows).select([4, 3, 2, 1, 0]), len(rows))  # out of order
    encoded = [Encoded(row["prefix"], row["rests"]) for row in rows]
    assert split.longest(2, shared=True) == [encoded[1], encoded[2]]  # 13 and 9 tokens
    assert split.longest(2, shared=False) == [encoded[2], encoded[1]]  # 21 and 14
    assert len(split.longest(99, shared=True)) == 5
