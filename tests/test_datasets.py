"""Every row of a source is a comparison or is counted, and samples are the seed's."""

import gzip
import json

import pytest
from conftest import REPOSITORY, make_rows, write_jsonl

from rm_recipe.datasets import load_split, load_splits, sample, tokenize
from rm_recipe.errors import DataError
from rm_recipe.recipe import DataArguments, read_recipe
from rm_recipe.tokenization import load_tokenizer


def data(path, **keys) -> DataArguments:
    return DataArguments(dataset_name=str(path), **keys)


def test_every_row_is_a_comparison_or_is_counted(tmp_path):
    rows = make_rows(5, seed=1)
    rows[1]["chosen"] = ""
    rows[2]["rejected"] = rows[2]["chosen"]
    split = load_split(data(write_jsonl(tmp_path / "x.jsonl", rows)), "test")
    assert split.rows == 5
    assert split.excluded == {"empty_response": 1, "identical_responses": 1}
    assert split.rows == len(split.comparisons) + sum(split.excluded.values())
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


def test_a_sample_is_a_prefix_of_the_seeds_shuffle(tmp_path):
    split = load_split(data(write_jsonl(tmp_path / "x.jsonl", make_rows(30, seed=1))), "test")
    small, large = sample(split, 5, seed=3), sample(split, 10, seed=3)
    assert small.comparisons["prompt"][:] == large.comparisons["prompt"][:5]
    assert small.excluded == {"not_sampled": 25}
    assert sample(split, 5, seed=4).comparisons["prompt"][:] != small.comparisons["prompt"][:]


def test_what_does_not_fit_is_counted_by_the_tokenising(tmp_path, tiny_llama):
    rows = make_rows(3, seed=1)
    rows[1]["chosen"] = "far away " * 50
    split = load_split(data(write_jsonl(tmp_path / "x.jsonl", rows)), "test")
    encoded = tokenize(split, load_tokenizer(str(tiny_llama)), 60, "drop_oldest_turns")
    assert encoded.excluded == {"response_too_long": 1}
    assert len(encoded.encoded()) == 2
    assert encoded.rows == 3


@pytest.mark.parametrize(("leakage", "left"), [("drop", 7), ("allow", 8)])
def test_a_train_prompt_that_is_also_held_out_is_dropped_or_let_pass(write_recipe, tmp_path, leakage, left):
    folder = leaky(tmp_path)
    train, test = load_splits(read_recipe(write_recipe(dataset_name=str(folder), leakage=leakage)))
    assert (len(train.comparisons), len(test.comparisons)) == (left, 4)
    assert train.excluded["leaked_prompt"] == 8 - left


def test_leakage_stops_training_by_default(write_recipe, tmp_path):
    with pytest.raises(DataError, match="1 of 8 train comparisons have a prompt that is also held out"):
        load_splits(read_recipe(write_recipe(dataset_name=str(leaky(tmp_path)))))


def leaky(tmp_path):
    rows = make_rows(8, seed=1)
    shared = {
        **rows[3],
        "prompt": [{"role": "user", "content": f" {rows[3]['prompt'][0]['content'].upper()}"}],
    }
    write_jsonl(tmp_path / "leaky" / "train.jsonl", rows)
    write_jsonl(tmp_path / "leaky" / "test.jsonl", [*make_rows(3, seed=2), shared])
    return tmp_path / "leaky"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"chosen": "a", "rej', "cannot be read as .jsonl"),
        ("b.jsonl.gz", b"not gzip", "cannot be read as .jsonl"),
        ("c.jsonl", b'{"text": "a"}\n', "no column chosen or rejected; it has text"),
        ("d.jsonl", b"", "cannot be read|no comparison"),
        ("e.txt", b"x", "is no data file"),
        ("f.jsonl", b'{"chosen": "a", "rejected": "b"}\n', "no comparison in it .1 not_a_transcript"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_split(data(path), "test")


def test_a_missing_split_or_subset_is_named(tmp_path, tiny_data):
    with pytest.raises(DataError, match="has no file for the split 'validation'"):
        load_split(data(tiny_data), "validation")
    with pytest.raises(DataError, match="check 'dataset_subsets'"):
        load_split(data(tiny_data, dataset_subsets=["helpfull"]), "test")


HH_RLHF = REPOSITORY.parent / "shared" / "data" / "hh-rlhf"


@pytest.mark.skipif(
    not HH_RLHF.is_dir(), reason="the development copy of hh-rlhf is not beside the repository"
)
@pytest.mark.parametrize(
    ("subset", "split", "rows", "excluded"),
    [
        ("harmless-base", "train", 1479, {"empty_response": 2, "differing_prompts": 2}),
        ("harmless-base", "test", 350, {"empty_response": 1, "differing_prompts": 2}),
        ("helpful-base", "train", 1552, {"empty_response": 4, "differing_prompts": 5}),
        ("helpful-base", "test", 350, {"differing_prompts": 1}),
    ],
)
def test_genuine_hh_rlhf_rows_are_comparisons_but_for_these(subset, split, rows, excluded):
    found = load_split(data(HH_RLHF, dataset_subsets=[subset]), split)
    assert (found.rows, found.excluded) == (rows, excluded)
    assert len(found.comparisons) == rows - sum(excluded.values())
    assert all(prompt[0]["role"] == "user" for prompt in found.comparisons["prompt"])
