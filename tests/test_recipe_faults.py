"""What is missing, out of range or in contradiction is found before anything is loaded."""

import pytest

from rm_recipe.errors import RecipeError
from rm_recipe.recipe import read_recipe


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"test_split_size": 1.0}, "'test_split_size: 1.0' must lie between 0 and 1"),
        ({"test_split_size": 0}, "'test_split_size: 0.0' must lie between 0 and 1"),
        ({"margin_map": {"better": 1}}, "'margin_map' needs a 'margin_column'"),
        ({"margin_column": "m", "margin_map": {"better": "much"}}, "should be a mapping"),
        ({"margin_column": "m", "margin_map": {"worse": -1}}, "a margin below 0 would reward being wrong"),
        ({"dataset_num_proc": 0}, "'dataset_num_proc: 0' must be above 0"),
        ({"streaming": True}, "key 'streaming' is not for a recipe: data sets are memory-mapped"),
        ({"datasets": [{"path": "x"}]}, "'datasets' and 'dataset_name' exclude each other"),
        ({"datasets": "x"}, "should be a list"),
        ({"save_total_limit": 1}, "'save_total_limit: 1' must be 2 or more: the older checkpoint is what is"),
        ({"save_only_model": True}, "key 'save_only_model' is not for a recipe: a checkpoint without"),
    ],
)
def test_a_fault_is_named_with_its_key(write_recipe, keys, fault):
    with pytest.raises(RecipeError, match="recipe.yaml") as caught:
        read_recipe(write_recipe(**keys))
    assert fault in str(caught.value)


ABOVE_0 = "'fraction' must be a number above 0 in every entry"


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([{"path": "a/b", "sprit": "x"}], "entry 1: unknown key 'sprit'. Did you mean 'split'?"),
        ([{"path": "a/b"}, {"name": "x"}], "entry 2 has no 'path'"),
        ([{"path": "a/b", "fraction": "half"}], "entry 1: 'fraction: half' should be a number"),
        ([{"path": "a/b", "fraction": True}], "entry 1: 'fraction: True' should be a number"),
        (
            [{"path": "a/b", "fraction": 1}, {"path": "c/d"}],
            ABOVE_0,
        ),
        (
            [{"path": "a/b", "fraction": 1}, {"path": "c/d", "fraction": 0}],
            ABOVE_0,
        ),
        ([{"path": "a/b", "fraction": float("inf")}], ABOVE_0),
        ([{"path": "a/b", "split": "test"}], "'split: test' is what is held out"),
        ([{"path": "./none"}], "'path: ./none' does not exist"),
    ],
)
def test_a_mixtures_faults_are_named_with_their_entry(write_recipe, entries, fault):
    with pytest.raises(RecipeError) as caught:
        read_recipe(write_recipe(dataset_name="omit", datasets=entries))
    assert fault in str(caught.value)


def test_a_mixture_is_read_from_the_command_line_and_saved_with_the_run(write_recipe, tiny_data, tmp_path):
    recipe = read_recipe(write_recipe(dataset_name="omit"), ["--datasets", f"[{{path: {tiny_data}}}]"])
    assert recipe.data.datasets == [{"path": str(tiny_data)}]
    recipe.save(tmp_path / "saved.yaml")
    assert read_recipe(tmp_path / "saved.yaml").data == recipe.data


def test_margins_are_read_with_words_or_numbers_as_categories(write_recipe):
    keys = {"margin_column": "m", "margin_map": {"significantly better": 1, "better": 0.5}}
    assert read_recipe(write_recipe(**keys)).data.margin_map == keys["margin_map"]
    recipe = read_recipe(write_recipe(margin_column="m"), ["--margin_map", "{3: 1, 2: 0.5}"])
    assert recipe.data.margin_map == {3: 1.0, 2: 0.5}


def test_a_files_subsets_are_refused(write_recipe, tiny_data):
    keys = {"dataset_name": str(tiny_data / "train.jsonl"), "dataset_subsets": ["a", "b"]}
    with pytest.raises(RecipeError, match="'dataset_subsets' are folders, and .* is a file"):
        read_recipe(write_recipe(**keys))


def test_a_mixture_may_train_on_a_split_called_test_where_another_share_is_held_out(write_recipe, tiny_data):
    keys = {"dataset_name": "omit", "datasets": [{"path": str(tiny_data), "split": "test"}]}
    with pytest.raises(RecipeError, match="is what is held out"):
        read_recipe(write_recipe(**keys))
    assert read_recipe(write_recipe(**keys, test_split_size=0.2)).data.test_split_size == 0.2
