"""Each table says what the figures say, in their order, and is absent where they are."""

import pytest

from rm_recipe.evaluation import report
from rm_recipe.evaluation.report import BUCKETS, best_baseline, buckets, consistency, data_sets, subsets

ONE_ARGUMENT = ("baselines", "other_model", "ranking", "subsets", "length", "consistency", "excluded")


def cells(table):
    return [row.cells for row in table.rows]


@pytest.mark.parametrize("name", ONE_ARGUMENT)
@pytest.mark.parametrize("value", [None, {}, [], 1], ids=repr)
def test_a_table_without_figures_is_absent(name, value):
    keys = {"other_model": "against"}
    assert getattr(report, name)({}) is None
    assert getattr(report, name)({keys.get(name, name): value}) is None


@pytest.mark.parametrize("key", BUCKETS)
def test_buckets_keep_their_order_and_are_absent_without_any(key):
    parts = [
        {"label": label, "n": 5, "accuracy": 0.5, "accuracy_ci95": [0.2, 0.8]} for label in ("9", "1", "5")
    ]
    table = buckets({"by": {key: parts}}, key)
    assert cells(table) == [[label, "5", "0.500", "0.200 to 0.800"] for label in ("9", "1", "5")]
    assert table.rows[0].strip == (0.2, 0.5, 0.8)
    assert table.strips
    assert buckets({"by": {key: []}}, key) is None
    assert buckets({"by": None}, key) is None


def test_every_data_set_has_its_line_with_all_that_was_left_out():
    figures = {
        "accuracy": 0.8, "accuracy_ci95": [0.7, 0.9], "n_scored": 1200, "excluded": {"a": 2, "b": 3},
        "ties": 1, "loss": 0.4, "baselines": {"longer_wins": 0.6, "shorter_wins": 0.4, "bag_of_words": None},
    }  # fmt: skip
    table = data_sets({str(i): figures for i in range(60)})
    assert len(table.rows) == 60
    assert table.rows[0].cells == [
        "0", "0.800", "0.700 to 0.900", "1,200", "5", "1", "0.400", "0.600 (the longer response wins)",
    ]  # fmt: skip


def test_the_best_baseline_is_the_one_with_the_highest_accuracy():
    rules = {"longer_wins": 0.48, "shorter_wins": 0.52, "bag_of_words": 0.61}
    assert best_baseline({"baselines": rules}) == ("bag_of_words", 0.61)
    assert best_baseline({"baselines": {**rules, "bag_of_words": None}}) == ("shorter_wins", 0.52)
    assert best_baseline({"baselines": None}) is None


def test_baselines_say_how_far_the_model_is_ahead():
    table = report.baselines(
        {
            "baselines": {"bag_of_words": 0.61},
            "against_baselines": {
                "bag_of_words": {"difference": 0.26, "ci95": [0.22, 0.3], "p_value": 1e-20}
            },
        }
    )
    assert cells(table) == [["bag of words", "0.610", "+0.260", "+0.220 to +0.300", "below 0.001"]]


def test_baselines_of_an_older_file_have_no_empty_columns():
    assert report.baselines({"baselines": {"longer_wins": 0.48}}).head == ["rule", "accuracy"]


def test_the_largest_subsets_come_first():
    sizes = {"small": 5, "unknown": None, "large": 50, "also large": 50}
    table = subsets({"subsets": {name: {"n": n, "accuracy": 0.5} for name, n in sizes.items()}})
    assert [row.cells[0] for row in table.rows] == ["also large", "large", "small", "unknown"]


def test_an_edits_change_is_also_told_in_standard_deviations():
    found = {"n": 100, "mean_change": -0.5, "std_change": 0.1, "share_up": 0.4, "wins": 0.03, "largest": 0.9}
    table = consistency({"std_reward": 2.0, "consistency": {"thank_you": found, "something_new": found}})
    expected = ["100", "\N{MINUS SIGN}0.500", "\N{MINUS SIGN}0.25", "0.100", "0.900", "40.0 %", "3.0 %"]
    assert cells(table) == [["a thank-you added", *expected], ["something new", *expected]]
    assert "in std of rewards" not in consistency({"std_reward": 0, "consistency": {"markdown": found}}).head


def test_left_out_is_told_as_a_share_of_all():
    table = report.excluded({"n_comparisons": 200, "excluded": {"too_long": 10, "empty_response": 0}})
    assert cells(table) == [["too long", "10", "5.0 %"]]


def test_length_leaves_out_what_could_not_be_computed():
    table = report.length({"length": {"spearman": None, "accuracy_chosen_longer": 0.84}})
    assert cells(table) == [["accuracy where the chosen response is longer", "0.840"]]
