"""What is trained on and what is held out: by prompt, by the seed alone, without leakage, and counted."""

from collections import Counter
from contextlib import nullcontext

import datasets as hf_datasets
import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from rm_recipe.data.comparison import Encoded
from rm_recipe.data.dataset import Split, set_aside
from rm_recipe.data.loading import normalise
from rm_recipe.data.splits import (
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


@pytest.fixture
def splits_by(write_recipe):
    """A function: the train split, the held-out one and the leakage by a recipe with these keys."""
    return lambda **keys: load_splits(read_recipe(write_recipe(**keys)))


def prompts(split) -> set[str]:
    return {prompt[-1]["content"] for prompt in split.comparisons["prompt"]}


@given(st.lists(st.sampled_from(["", "", "empty_response", "too_long"]), min_size=1, max_size=30))
def test_rows_are_comparisons_and_counted_reasons_and_nothing_else(reasons):
    n = len(reasons)
    columns = {"row": list(range(1, n + 1)), "subset": ["s"] * n, "excluded": reasons}
    columns["detail"] = [f"as {reason}" if reason else "" for reason in reasons]
    whole = Split(hf_datasets.Dataset.from_dict(columns), n, Counter(before=2))
    split = set_aside(whole)
    assert split.excluded == Counter(filter(None, reasons)) + Counter(before=2)
    assert whole.excluded == Counter(before=2)  # the whole is not changed
    assert split.column("row").tolist() == [n for n, reason in enumerate(reasons, 1) if not reason]
    for reason, names in split.first_rows.items():
        assert names == [f"s:{n} (as {reason})" for n, r in enumerate(reasons, 1) if r == reason][:5]
    some = split.select(np.arange(len(split.comparisons) // 2), "not_sampled")
    assert some.rows == n == len(some.comparisons) + some.excluded.total() - 2


def test_a_fingerprint_is_of_what_is_compared_in_its_order_and_nothing_else(splits_by, tmp_path):
    def fingerprints(rows, **keys):
        write_jsonl(tmp_path / "train.jsonl", rows)
        write_jsonl(tmp_path / "test.jsonl", make_rows(9, seed=2))
        train, held_out, _ = splits_by(dataset_name=str(tmp_path), **keys)
        return train.fingerprint, held_out.fingerprint

    rows = make_rows(30, seed=1)
    train, held_out = fingerprints(rows)
    assert fingerprints([{**row, "id": 3} for row in rows]) == (train, held_out)
    assert fingerprints(rows, max_eval_samples=7) == (train, held_out)
    changed = [
        fingerprints(rows[::-1]),
        fingerprints([{**rows[0], "chosen": "good"}, *rows[1:]]),
        fingerprints(rows, max_train_samples=20),
    ]
    assert len({train, held_out, *(other for other, _ in changed)}) == 5
    assert {same for _, same in changed} == {held_out}


def test_a_sample_is_a_prefix_of_the_seeds_shuffle(tmp_path):
    split = load_split(data(write_jsonl(tmp_path / "x.jsonl", make_rows(30, seed=1))), "test")
    small, large = sample(split, 5, seed=3), sample(split, 10, seed=3)
    assert small.comparisons["prompt"][:] == large.comparisons["prompt"][:5]
    assert small.excluded == {"not_sampled": 25}
    assert sample(split, 5, seed=4).comparisons["prompt"][:] != small.comparisons["prompt"][:]


def test_the_largest_batch_is_by_what_its_rows_take():
    """One sequence a row, a batch is as wide as its longest; with shared prefixes only tokens count."""
    prefix = [[1] * 10, [1] * 10, [1] * 50, [1] * 2]
    suffixes = [[[1] * 40, [1] * 40], [[1] * 70, [1] * 2], [[1] * 30, [1] * 30], [[1]] * 3]
    rows = hf_datasets.Dataset.from_dict({"prefix": prefix, "suffixes": suffixes})
    split = Split(rows.select([3, 0, 1, 2]), 4)  # out of order
    assert split.sizes(True).tolist() == [5, 90, 82, 110]
    assert split.sizes(False).tolist() == [9, 100, 92, 160]
    assert split.largest(3, shared=True).tolist() == [3, 1, 2]
    assert split.largest(3, shared=False).tolist() == [2, 3, 1]
    assert split.longest(1, shared=False) == [Encoded([1] * 10, suffixes[1])]
    assert len(split.longest(99, shared=True)) == 4


@pytest.fixture
def leaky(tmp_path):
    """Eight train rows, one of which is held out too, in capitals and with white space."""
    rows = make_rows(8, seed=1)
    prompt = [{"role": "user", "content": f" {rows[3]['prompt'][0]['content'].upper()}"}]
    write_jsonl(tmp_path / "leaky" / "train.jsonl", rows)
    write_jsonl(tmp_path / "leaky" / "test.jsonl", [*make_rows(3, seed=2), {**rows[3], "prompt": prompt}])
    return str(tmp_path / "leaky")


@pytest.mark.parametrize(("leakage", "left"), [("drop", 7), ("allow", 8), ("error", 8)])
def test_a_train_prompt_that_is_also_held_out_is_dropped_let_pass_or_refused(splits_by, leaky, leakage, left):
    """Also where the sample of what is held out has another."""
    train, test, found = splits_by(dataset_name=leaky, leakage=leakage, max_eval_samples=1)
    assert (len(train.comparisons), len(test.comparisons)) == (left, 1)
    assert train.excluded["leaked_prompt"] == 8 - left
    assert (found["prompts"], found["comparisons"]) == (1, 1)
    refused = pytest.raises(DataError, match="1 of 8 train comparisons .row 4. have a prompt that is also")
    with refused if leakage == "error" else nullcontext():
        refuse_leakage(found)


def test_data_that_all_leaks_is_refused_with_the_counts(splits_by, tmp_path):
    for name in ("train", "test"):
        write_jsonl(tmp_path / "same" / f"{name}.jsonl", make_rows(4, seed=1))
    with pytest.raises(DataError, match="no comparison is left to train on: 4 leaked_prompt"):
        splits_by(dataset_name=str(tmp_path / "same"), leakage="drop")


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
    assert len(of_test) == 20  # a tenth
    assert leakage["comparisons"] == 0
    assert train.rows == 601
    assert train.excluded == {"empty_response": 1, "held_out": len(test.comparisons)}
    assert train.rows == len(train.comparisons) + train.excluded.total()
    assert test.rows == len(test.comparisons)
    again = load_held_out_split(recipe)
    assert again.comparisons["prompt"][:] == test.comparisons["prompt"][:]


def test_a_prompt_stays_on_its_side_whatever_the_seed_and_the_order_and_a_share_is_that_share(
    splits_by, repeated, tmp_path
):
    held = prompts(load_held_out(data(repeated)))
    lines = repeated.read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(lines)))
    assert prompts(load_held_out(data(turned))) == held
    _, test, _ = splits_by(dataset_name=str(repeated), seed=5)
    assert prompts(test) == held
    more = load_held_out(data(repeated, test_split_size=0.5))
    assert len(more.comparisons) == 300
    assert held < prompts(more)


def test_by_first_turn_a_dialogue_is_held_out_with_all_its_depths(splits_by, tmp_path):
    rows = make_rows(30, seed=1)
    goes_on = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "far"}]
    rows += [row | {"prompt": row["prompt"] + goes_on} for row in rows]
    keys = {"dataset_name": str(write_jsonl(tmp_path / "deep.jsonl", rows)), "leakage": "allow"}
    for by in ("prompt", "first_turn"):
        train, test, leakage = splits_by(**keys, test_split_size=0.5, leakage_by=by)
        assert len(train.comparisons) + len(test.comparisons) == 60
        assert (leakage["first_turns"] == 0) == (by == "first_turn")


@pytest.mark.parametrize("size", [1e-9, 1 - 1e-9])
def test_of_two_prompts_or_more_there_are_some_on_either_side(splits_by, tmp_path, size):
    path = write_jsonl(tmp_path / "x.jsonl", make_rows(3, seed=1))
    train, test, _ = splits_by(dataset_name=str(path), test_split_size=size)
    assert (len(train.comparisons), len(test.comparisons)) == ((2, 1) if size < 0.5 else (1, 2))


def test_one_prompt_cannot_be_held_out_and_the_advice_works(splits_by, tmp_path):
    rows = [{"prompt": "Write a poem.", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(6)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match="same prompt, .* give a test split .* 'leakage: allow'"):
        splits_by(dataset_name=str(path))
    write_jsonl(tmp_path / "own" / "train.jsonl", rows[:4])
    write_jsonl(tmp_path / "own" / "test.jsonl", rows[4:])
    train, test, leakage = splits_by(dataset_name=str(tmp_path / "own"), leakage="allow")
    refuse_leakage(leakage)
    assert (len(train.comparisons), len(test.comparisons)) == (4, 2)


@pytest.fixture
def mixture(tmp_path, tiny_data):
    """Keys of a recipe with two sets of different shapes, pairs and rankings, each with a test split."""
    rankings = [{"prompt": f"{n}", "responses": ["a", "b", "c"], "scores": [n, n + 1, n]} for n in range(20)]
    write_jsonl(tmp_path / "rankings" / "train.jsonl", rankings[:16])
    write_jsonl(tmp_path / "rankings" / "test.jsonl", rankings[16:])
    sets = [{"path": str(tiny_data)}, {"path": str(tmp_path / "rankings")}]
    return {"dataset_name": "omit", "datasets": sets}


def test_a_mixture_of_pairs_and_rankings_is_one_train_and_one_test_split(splits_by, mixture):
    train, test, _ = splits_by(**mixture)
    assert (train.rows, test.rows) == (64 + 16, 40 + 4)
    assert set(train.comparisons["subset"][:]) == {"preferences", "rankings"}
    assert train[64 + 3].responses == ["b", "a", "c"]
    assert train[64 + 3].ranks == [0, 1, 1]


def test_fractions_keep_the_first_of_each_as_trl_does(splits_by, mixture):
    for entry in mixture["datasets"]:
        entry["fraction"] = 0.5
    train, test, _ = splits_by(**mixture)
    assert len(train.comparisons) == 32  # 16 rankings, and as many pairs
    assert train.excluded == {"not_in_fraction": 48}
    assert len(test.comparisons) == 44  # all that is held out
    assert train.comparisons["row"][:] == [*range(1, 17), *range(1, 17)]


def test_a_mixture_names_its_own_train_splits(splits_by, tmp_path, mixture):
    row = {"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1]}
    write_jsonl(tmp_path / "rankings" / "more.jsonl", [row])
    mixture["datasets"][1]["split"] = "more"
    assert splits_by(**mixture)[0].rows == 65


def test_a_test_split_for_some_of_a_mixture_is_refused(splits_by, mixture, tmp_path):
    (tmp_path / "rankings" / "test.jsonl").unlink()
    with pytest.raises(DataError, match="rankings' has no split 'test'; .* 'test_split_size' to hold out"):
        splits_by(**mixture)
    train, test, _ = splits_by(**mixture, test_split_size=0.3)
    assert len(train.comparisons) + len(test.comparisons) == 80


def test_a_comparison_without_its_margin_may_be_held_out_and_is_not_trained_on(splits_by, tmp_path):
    rows = [{**row, "m": None if n % 2 else 1} for n, row in enumerate(make_rows(60, seed=1))]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    train, test, leakage = splits_by(dataset_name=str(path), margin_column="m", test_split_size=0.5)
    assert train.rows == 60 == len(train.comparisons) + train.excluded.total()
    assert train.excluded["missing_margin"] == 30
    assert leakage["comparisons"] == 0
    assert all(row % 2 for row in train.comparisons["row"][:])
    assert any(row % 2 == 0 for row in test.comparisons["row"][:])
    assert (train.comparisons["margins"][0], test.comparisons["margins"][0]) == ([1.0], [])  # not needed
