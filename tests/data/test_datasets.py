"""What is trained on and what is held out: by prompt, by the seed alone, and without leakage."""

import gzip
import json

import numpy as np
import pytest
from conftest import make_rows, write_jsonl

from rm_recipe.data.loading import normalise
from rm_recipe.data.splits import (
    hold_out_share,
    load_held_out,
    load_held_out_split,
    load_split,
    load_splits,
    refuse_leakage,
    sample,
)
from rm_recipe.errors import DataError
from rm_recipe.recipe.reader import DataArguments, read_recipe


def data(path, **keys) -> DataArguments:
    return DataArguments(dataset_name=str(path), **keys)


def prompts(split) -> set[str]:
    return {prompt[-1]["content"] for prompt in split.comparisons["prompt"]}


def test_every_row_is_a_comparison_or_is_counted(tmp_path):
    rows = make_rows(5, seed=1)
    rows[1]["chosen"] = ""
    rows[2]["rejected"] = rows[2]["chosen"]
    split = load_split(data(write_jsonl(tmp_path / "x.jsonl", rows)), "test")
    assert split.rows == 5
    assert split.excluded == {"empty_response": 1, "identical_responses": 1}
    assert split.first_rows == {"empty_response": ["2"], "identical_responses": ["3"]}
    assert split.rows == len(split.comparisons) + split.excluded.total()
    assert split[0].responses == [rows[0]["chosen"], rows[0]["rejected"]]


def test_a_folder_in_hh_rlhfs_layout_gives_its_subsets_by_name(tmp_path):
    for subset in ("helpful-base", "harmless-base"):
        (tmp_path / subset).mkdir()
        for name in ("train", "test"):
            row = {
                side: f"\n\nHuman: {subset} {name}\n\nAssistant: {side}" for side in ("chosen", "rejected")
            }
            with gzip.open(tmp_path / subset / f"{name}.jsonl.gz", "wt") as file:
                file.write(json.dumps(row) + "\n")
    split = load_split(data(tmp_path, dataset_subsets=["helpful-base", "harmless-base"]), "test")
    assert split.comparisons["subset"][:] == ["helpful-base", "harmless-base"]
    assert split[1].prompt == [{"role": "user", "content": "harmless-base test"}]


def test_a_fingerprint_is_of_what_is_compared_in_its_order_and_nothing_else(
    write_recipe, tiny_data, tmp_path
):
    def fingerprints(change=lambda rows: rows, **keys):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in ("train", "test"):
            rows = [json.loads(line) for line in (tiny_data / f"{name}.jsonl").open()]
            write_jsonl(folder / f"{name}.jsonl", change(rows) if name == "train" else rows)
        splits = load_splits(read_recipe(write_recipe(dataset_name=str(folder), **keys)))[:2]
        return [split.fingerprint for split in splits]

    train, held_out = fingerprints()
    assert train != held_out
    assert fingerprints(lambda rows: [{**row, "id": 3} for row in rows]) == [train, held_out]
    assert fingerprints(max_eval_samples=7) == [train, held_out]
    changed = [
        fingerprints(lambda rows: rows[::-1]),
        fingerprints(lambda rows: rows[1:]),
        fingerprints(lambda rows: [{**rows[0], "chosen": "good"}, *rows[1:]]),
        fingerprints(max_train_samples=20),
    ]
    assert len({train, *(other for other, _ in changed)}) == 5
    assert {same for _, same in changed} == {held_out}


def test_a_sample_is_a_prefix_of_the_seeds_shuffle(tmp_path):
    split = load_split(data(write_jsonl(tmp_path / "x.jsonl", make_rows(30, seed=1))), "test")
    small, large = sample(split, 5, seed=3), sample(split, 10, seed=3)
    assert small.comparisons["prompt"][:] == large.comparisons["prompt"][:5]
    assert small.excluded == {"not_sampled": 25}
    assert sample(split, 5, seed=4).comparisons["prompt"][:] != small.comparisons["prompt"][:]
    by_two = load_split(data(tmp_path / "x.jsonl"), "test", 2)
    assert sample(by_two, 5, seed=3).comparisons["prompt"][:] == small.comparisons["prompt"][:]


def test_no_comparison_at_all_is_told_with_the_reasons_and_the_shapes(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"chosen": "a", "rejected": "b"}] * 2)
    with pytest.raises(
        DataError, match="no comparison in it .2 not_a_transcript, first in row 1.; a row has "
    ):
        load_split(data(path), "test")


# --- leakage ---------------------------------------------------------------------------------


@pytest.fixture
def leaky(tmp_path):
    """Eight train rows, one of which is held out too, in capitals and with white space."""
    rows = make_rows(8, seed=1)
    prompt = [{"role": "user", "content": f" {rows[3]['prompt'][0]['content'].upper()}"}]
    write_jsonl(tmp_path / "leaky" / "train.jsonl", rows)
    write_jsonl(tmp_path / "leaky" / "test.jsonl", [*make_rows(3, seed=2), {**rows[3], "prompt": prompt}])
    return str(tmp_path / "leaky")


@pytest.mark.parametrize(("leakage", "left"), [("drop", 7), ("allow", 8)])
def test_a_train_prompt_that_is_also_held_out_is_dropped_or_let_pass(write_recipe, leaky, leakage, left):
    recipe = read_recipe(write_recipe(dataset_name=leaky, leakage=leakage))
    train, test, found = load_splits(recipe)
    assert (len(train.comparisons), len(test.comparisons)) == (left, 4)
    assert train.excluded["leaked_prompt"] == 8 - left
    assert (found.prompts, found.comparisons) == (1, 1)
    refuse_leakage(recipe, found)


def test_leakage_is_refused_by_default(write_recipe, leaky):
    recipe = read_recipe(write_recipe(dataset_name=leaky))
    found = load_splits(recipe)[-1]
    with pytest.raises(
        DataError, match="1 of 8 train comparisons .row 4. have a prompt that is also held out"
    ):
        refuse_leakage(recipe, found)


def test_what_is_held_out_and_not_sampled_is_leakage_all_the_same(write_recipe, leaky):
    recipe = read_recipe(write_recipe(dataset_name=leaky, leakage="drop", max_eval_samples=1))
    train, test, found = load_splits(recipe)
    assert (len(train.comparisons), len(test.comparisons), found.comparisons) == (7, 1, 1)


def test_data_that_all_leaks_is_refused_with_the_counts(write_recipe, tmp_path):
    for name in ("train", "test"):
        write_jsonl(tmp_path / "same" / f"{name}.jsonl", make_rows(4, seed=1))
    recipe = read_recipe(write_recipe(dataset_name=str(tmp_path / "same"), leakage="drop"))
    with pytest.raises(DataError, match="no comparison is left to train on: 4 leaked_prompt"):
        load_splits(recipe)


# --- held out by prompt ----------------------------------------------------------------------


@pytest.fixture
def repeated(tmp_path):
    """One file: 200 prompts with three comparisons each, some prompts in capitals; one bad row."""
    rows = []
    for number, row in enumerate(make_rows(200, seed=1)):
        for version in range(3):
            text = row["prompt"][0]["content"]
            prompt = text.upper() if version == number % 3 else text
            rows.append({"prompt": prompt, "chosen": f"good {version}", "rejected": f"bad {number}"})
    rows.append({"prompt": "p", "chosen": "", "rejected": "bad"})
    return write_jsonl(tmp_path / "repeated.jsonl", rows)


def test_a_set_without_a_test_split_is_split_by_prompt_and_never_by_row(write_recipe, repeated):
    recipe = read_recipe(write_recipe(dataset_name=str(repeated)))
    train, test, leakage = load_splits(recipe)
    of_train, of_test = ({normalise(p) for p in prompts(split)} for split in (train, test))
    assert not of_train & of_test
    assert len(of_train | of_test) == 200
    assert len(test.comparisons) == 3 * len(of_test)
    assert 8 <= len(of_test) <= 32  # a tenth, by chance: 20 and four standard deviations
    assert leakage.comparisons == 0
    assert train.rows == 601
    assert train.excluded == {"empty_response": 1, "held_out": len(test.comparisons)}
    assert train.rows == len(train.comparisons) + train.excluded.total()
    assert test.rows == len(test.comparisons)
    again = load_held_out_split(recipe)
    assert again.comparisons["prompt"][:] == test.comparisons["prompt"][:]


def test_a_prompt_stays_on_its_side_whatever_the_seed_and_the_other_prompts(write_recipe, repeated, tmp_path):
    held = prompts(load_held_out(data(repeated)))
    lines = repeated.read_text().splitlines(keepends=True)
    half = tmp_path / "half.jsonl"
    half.write_text("".join(reversed(lines[:300])))
    assert prompts(load_held_out(data(half))) == held & prompts(load_split(data(half), None))
    _, test, _ = load_splits(read_recipe(write_recipe(dataset_name=str(repeated), seed=5)))
    assert prompts(test) == held


def test_test_split_size_is_the_share_of_the_prompts(repeated):
    sizes = [len(load_held_out(data(repeated, test_split_size=s)).comparisons) for s in (0.2, 0.5, 0.9)]
    assert sizes == sorted(sizes)
    assert np.allclose(np.array(sizes) / 600, [0.2, 0.5, 0.9], atol=0.12)
    smaller = prompts(load_held_out(data(repeated, test_split_size=0.2)))
    assert smaller < prompts(load_held_out(data(repeated, test_split_size=0.5)))


def test_a_test_split_that_is_there_is_used_unless_a_share_is_asked_for(tiny_data):
    assert hold_out_share(data(tiny_data)) is None
    assert hold_out_share(data(tiny_data, test_split_size=0.3)) == 0.3
    with pytest.raises(DataError, match="no file for the split 'validation'"):
        hold_out_share(data(tiny_data, dataset_test_split="validation"))


# --- mixtures --------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path, tiny_data):
    """Two sets of different shapes: pairs with a test split, and rankings with a test split."""
    rankings = [
        {"prompt": f"rank {n}", "responses": ["a", "b", "c"], "scores": [n, n + 1, n]} for n in range(20)
    ]
    write_jsonl(tmp_path / "rankings" / "train.jsonl", rankings[:16])
    write_jsonl(tmp_path / "rankings" / "test.jsonl", rankings[16:])
    return [{"path": str(tiny_data)}, {"path": str(tmp_path / "rankings")}]


def test_a_mixture_of_pairs_and_rankings_is_one_train_and_one_test_split(write_recipe, mixture):
    recipe = read_recipe(write_recipe(dataset_name="omit", datasets=mixture))
    train, test, _ = load_splits(recipe)
    assert (train.rows, test.rows) == (64 + 16, 40 + 4)
    assert set(train.comparisons["subset"][:]) == {"preferences", "rankings"}
    assert train[64 + 3].responses == ["b", "a", "c"]
    assert train[64 + 3].ranks == [0, 1, 1]


def test_a_mixture_of_single_files_is_held_out_by_prompt(write_recipe, tmp_path):
    write_jsonl(tmp_path / "x" / "mine.jsonl", make_rows(60, seed=1))
    entry = {"path": str(tmp_path / "x"), "data_files": "mine.jsonl"}
    train, test, leakage = load_splits(read_recipe(write_recipe(dataset_name="omit", datasets=[entry])))
    assert len(train.comparisons) + len(test.comparisons) == 60
    assert (0 < len(test.comparisons) < 20, leakage.comparisons) == (True, 0)


@pytest.mark.parametrize(("size", "side"), [(1e-9, "no comparison is"), (1 - 1e-9, "all comparisons are")])
@pytest.mark.parametrize("rows", [2, 3, 16])
def test_where_one_side_is_empty_the_share_that_is_advised_works(write_recipe, tmp_path, rows, size, side):
    path = write_jsonl(tmp_path / "x.jsonl", make_rows(rows, seed=1))
    with pytest.raises(DataError, match=f"{side} held out; set 'test_split_size: ") as caught:
        load_splits(read_recipe(write_recipe(dataset_name=str(path), test_split_size=size)))
    advised = float(str(caught.value).split("'test_split_size: ")[1].split("'")[0])
    train, test, _ = load_splits(read_recipe(write_recipe(dataset_name=str(path), test_split_size=advised)))
    assert min(len(train.comparisons), len(test.comparisons)) > 0
    assert f"holds out {len(test.comparisons)} of the {rows} prompts" in str(caught.value)


@pytest.mark.parametrize("prompt", ["Write a poem.", "Sing a song.", "Say something."])
def test_one_prompt_cannot_be_held_out_and_the_advice_works(write_recipe, tmp_path, prompt):
    rows = [{"prompt": prompt, "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(6)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    for size in (0.001, 0.999):
        with pytest.raises(DataError, match="same prompt, so give a test split .* 'leakage: allow'"):
            load_splits(read_recipe(write_recipe(dataset_name=str(path), test_split_size=size)))
    write_jsonl(tmp_path / "own" / "train.jsonl", rows[:4])
    write_jsonl(tmp_path / "own" / "test.jsonl", rows[4:])
    recipe = read_recipe(write_recipe(dataset_name=str(tmp_path / "own"), leakage="allow"))
    train, test, leakage = load_splits(recipe)
    refuse_leakage(recipe, leakage)
    assert (len(train.comparisons), len(test.comparisons)) == (4, 2)


def test_fractions_keep_the_first_of_each_as_trl_does(write_recipe, mixture):
    mixture[0]["fraction"], mixture[1]["fraction"] = 0.5, 0.5
    train, test, _ = load_splits(read_recipe(write_recipe(dataset_name="omit", datasets=mixture)))
    assert len(train.comparisons) == 32  # 16 rankings, and as many pairs
    assert train.excluded == {"not_in_fraction": 48}
    assert len(test.comparisons) == 44  # all that is held out
    assert train.comparisons["row"][:] == [*range(1, 17), *range(1, 17)]


def test_a_mixture_names_its_own_train_splits(write_recipe, tmp_path, mixture):
    write_jsonl(
        tmp_path / "rankings" / "more.jsonl", [{"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1]}]
    )
    mixture[1]["split"] = "more"
    train, _, _ = load_splits(read_recipe(write_recipe(dataset_name="omit", datasets=mixture)))
    assert train.rows == 65


def test_a_test_split_for_some_of_a_mixture_is_refused(write_recipe, mixture, tmp_path):
    (tmp_path / "rankings" / "test.jsonl").unlink()
    values = {"dataset_name": "omit", "datasets": mixture}
    with pytest.raises(DataError, match="rankings' has no split 'test' and others have"):
        load_splits(read_recipe(write_recipe(**values)))
    train, test, _ = load_splits(read_recipe(write_recipe(**values, test_split_size=0.3)))
    assert len(train.comparisons) + len(test.comparisons) == 80


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
def test_a_test_split_of_some_subsets_is_never_passed_over(tmp_path, order):
    write_jsonl(tmp_path / "one" / "train.jsonl", make_rows(3, seed=1))
    write_jsonl(tmp_path / "one" / "test.jsonl", make_rows(3, seed=2))
    write_jsonl(tmp_path / "two" / "train.jsonl", make_rows(3, seed=3))
    with pytest.raises(DataError, match="two' has no split 'test' and others have"):
        hold_out_share(data(tmp_path, dataset_subsets=order))


def test_a_comparison_without_its_margin_may_be_held_out_and_is_counted_once(write_recipe, tmp_path):
    rows = [{**row, "m": None if n % 2 else 1} for n, row in enumerate(make_rows(60, seed=1))]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    recipe = read_recipe(write_recipe(dataset_name=str(path), margin_column="m", test_split_size=0.5))
    train, test, _ = load_splits(recipe)
    assert train.rows == 60 == len(train.comparisons) + train.excluded.total()
    assert train.excluded["held_out"] == len(test.comparisons)
    assert train.excluded["missing_margin"] + train.excluded["held_out"] + len(train.comparisons) == 60
    assert set(train.comparisons["row"][:]).isdisjoint(test.comparisons["row"][:])
    assert all(row % 2 for row in train.comparisons["row"][:])
    assert any(row % 2 == 0 for row in test.comparisons["row"][:])
    assert train.first_rows["missing_margin"][0] in {"2", "4", "6", "8", "10", "12"}


def test_margins_are_read_for_training_and_not_needed_to_be_held_out(write_recipe, tmp_path):
    write_jsonl(tmp_path / "m" / "train.jsonl", [{**row, "m": 0.5} for row in make_rows(3, seed=1)])
    write_jsonl(tmp_path / "m" / "test.jsonl", make_rows(3, seed=2))
    recipe = read_recipe(write_recipe(dataset_name=str(tmp_path / "m"), margin_column="m"))
    train, test, _ = load_splits(recipe)
    assert train.comparisons["margins"][:] == [[0.5]] * 3
    assert test.comparisons["margins"][:] == [[]] * 3
