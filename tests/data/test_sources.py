"""Rows come from files, folders, the Hub and mixtures; what cannot be read is named with its line."""

import errno
import gzip
import json
import os

import datasets as hf_datasets
import pytest
from conftest import make_rows, write_jsonl
from trl.scripts.utils import DatasetConfig

from rm_recipe.data import loading
from rm_recipe.data.loading import JSON, MissingSplitError, decode, has_split, label, load_rows, sources_of
from rm_recipe.errors import DataError
from rm_recipe.recipe.schema import DataArguments

ROWS = make_rows(3, seed=1)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    hf_datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def source(path, **keys) -> DatasetConfig:
    return DatasetConfig(path=str(path), **keys)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".parquet.gz"])
def test_every_file_format_gives_the_same_rows(tmp_path, ending):
    path = tmp_path / f"data{ending.removesuffix('.gz')}"
    if ".jsonl" in ending:
        write_jsonl(path, ROWS)
    elif ".json" in ending:
        path.write_text(json.dumps(ROWS))
    else:
        hf_datasets.Dataset.from_list(ROWS).to_parquet(path)
    if ending.endswith(".gz"):
        packed = tmp_path / f"data{ending}"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    rows = load_rows(source(path), "train").to_list()
    assert [decode(row[JSON]) if JSON in row else row for row in rows] == ROWS


def test_a_folder_gives_the_split_of_the_subset(tmp_path):
    for subset in ("helpful-base", "harmless-base"):
        write_parquet(tmp_path / subset / "train.parquet", [{"chosen": subset}])
    data = DataArguments(dataset_name=str(tmp_path), dataset_subsets=["helpful-base", "harmless-base"])
    assert [load_rows(s, "train")["chosen"][:] for s in sources_of(data)] == [
        ["helpful-base"],
        ["harmless-base"],
    ]


def test_a_mixtures_entries_are_trls(tmp_path):
    path = write_parquet(tmp_path / "x" / "mine.parquet", ROWS)
    entry = {"path": str(path.parent), "data_files": "mine.parquet", "fraction": 0.5}
    [found] = sources_of(DataArguments(datasets=[entry]))
    assert isinstance(found, DatasetConfig)
    assert load_rows(found, "train").to_list() == ROWS
    assert not has_split(found, "test")  # one file: it is not held out against itself


def test_the_last_ending_says_what_a_file_is(tmp_path):
    path = write_jsonl(tmp_path / "x.parquet.jsonl", ROWS)
    assert [decode(row[JSON]) for row in load_rows(source(path), "train")] == ROWS


def test_a_set_is_labelled_by_its_subset_and_in_a_mixture_by_its_name_too(tmp_path, tiny_data):
    assert label(source("Anthropic/hh-rlhf", data_dir="helpful-base"), False) == "helpful-base"
    assert label(source("Anthropic/hh-rlhf", data_dir="helpful-base"), True) == "hh-rlhf/helpful-base"
    assert label(source(tiny_data), False) == ""
    assert label(source(tiny_data / "train.jsonl"), True) == "preferences/train.jsonl"


def test_a_missing_split_is_named_with_those_that_are_there(tmp_path, tiny_data):
    with pytest.raises(MissingSplitError, match="no file for the split 'validation'") as caught:
        load_rows(source(tiny_data), "validation")
    assert caught.value.others == ["test", "train"]
    assert has_split(source(tiny_data), "test")
    with pytest.raises(MissingSplitError):  # two others: nobody can say which was meant
        has_split(source(tiny_data), "validation")
    only = write_jsonl(tmp_path / "only" / "train.jsonl", ROWS)
    assert not has_split(source(only.parent), "test")
    assert not has_split(source(only), "test")  # a file is one split


def test_a_missing_folder_subset_or_file_is_named(tmp_path, tiny_data):
    with pytest.raises(DataError, match="check 'dataset_subsets'"):
        load_rows(source(tiny_data, data_dir="helpfull"), "train")
    with pytest.raises(DataError, match="does not exist"):
        load_rows(source(tmp_path / "none.jsonl"), "train")
    (tmp_path / "e.txt").write_text("x")
    with pytest.raises(DataError, match="is no data file"):
        load_rows(source(tmp_path / "e.txt"), "train")
    for name in ("train.jsonl", "train.json"):
        write_jsonl(tmp_path / "two" / name, ROWS)
    with pytest.raises(DataError, match="has 2 files for the split 'train'"):
        load_rows(source(tmp_path / "two"), "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.jsonl.gz", b"not gzip", "is not gzip"),
        ("c.parquet", b"not parquet", "cannot be read: Parquet"),
        ("d.jsonl", b"", "is empty"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named_with_its_fault(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(source(path), "train")
    assert str(path) in str(caught.value)


def test_a_parquet_file_without_rows_is_empty(tmp_path):
    path = tmp_path / "x.parquet"
    hf_datasets.Dataset.from_list(ROWS).select([]).to_parquet(path)
    with pytest.raises(DataError, match="x.parquet' is empty"):
        load_rows(source(path), "train")


def test_a_file_in_a_folder_whose_name_is_a_pattern_is_read(tmp_path):
    path = write_parquet(tmp_path / "[a]*" / "x.parquet", ROWS)
    assert load_rows(source(path), "train").to_list() == ROWS


def test_an_edited_parquet_file_is_read_anew_whatever_its_time(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", ROWS)
    load_rows(source(path), "train")
    state = path.stat()
    write_parquet(path, ROWS[:2])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert load_rows(source(path), "train").to_list() == ROWS[:2]


def test_a_json_file_beside_the_rows_is_a_split_only_where_it_holds_some(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    for name, content in (("infos.json", "{}"), ("state.json", '{\n  "a": 1\n}'), ("list.json", '["a"]')):
        (tmp_path / name).write_text(content)
    assert not has_split(source(tmp_path), "test")
    (tmp_path / "raw.json").write_text(json.dumps(ROWS))
    with pytest.raises(MissingSplitError) as caught:
        has_split(source(tmp_path), "test")
    assert caught.value.others == ["raw", "train"]
    (tmp_path / "raw.json").write_text("[" + json.dumps(ROWS[0]) + ",]")  # damaged, and meant to hold rows
    with pytest.raises(MissingSplitError):
        has_split(source(tmp_path), "test")


def test_a_folder_that_is_there_is_never_said_to_be_missing(tmp_path):
    path = write_jsonl(tmp_path / "sub" / "train.jsonl", ROWS)
    for entry, said in (
        ({"path": str(tmp_path), "data_files": "sub"}, "sub' is a folder; 'data_files' of a local folder"),
        ({"path": str(tmp_path / "sub"), "data_dir": "train.jsonl"}, "train.jsonl' is no folder; check"),
        ({"path": str(tmp_path), "data_dir": "none"}, "none' does not exist; check 'dataset_subsets'"),
        ({"path": str(path), "data_dir": "sub"}, "train.jsonl' is a file and has no subsets"),
    ):
        with pytest.raises(DataError, match=said):
            load_rows(DatasetConfig(**entry), "train")
    with pytest.raises(DataError, match="it has sub/"):
        load_rows(source(tmp_path), "train")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(DataError, match="is a Git LFS pointer, not the file itself; fetch it: git lfs pull"):
        load_rows(source(tmp_path / name), "train")


# --- the Hub, which is not here ----------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets.load_dataset`; remembers what it was asked for."""
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        if arguments["split"] not in ("train", "test"):
            raise ValueError(f"Unknown split \"{arguments['split']}\". Should be one of ['train', 'test'].")
        return hf_datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(loading.hf_datasets, "load_dataset", load_dataset)
    return asked


def test_the_four_tranches_of_hh_rlhf_are_asked_for_by_data_dir(hub):
    tranches = ["helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"]
    data = DataArguments(
        dataset_name="Anthropic/hh-rlhf", dataset_subsets=tranches, dataset_revision="09be8c5"
    )
    for found in sources_of(data):
        load_rows(found, "train", data.dataset_revision)
    assert [call["data_dir"] for call in hub] == tranches
    assert {(call["path"], call["revision"], call["split"]) for call in hub} == {
        ("Anthropic/hh-rlhf", "09be8c5", "train")
    }


def test_a_split_that_the_hub_does_not_have_is_named(hub):
    with pytest.raises(
        MissingSplitError, match="has no split 'validation'; it has 'train', 'test'"
    ) as caught:
        load_rows(source("someone/preferences"), "validation")
    assert caught.value.others == ["train", "test"]


def test_a_set_that_the_hub_does_not_give_is_one_message(monkeypatch):
    def fail(**_):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(loading.hf_datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="'a/b' cannot be loaded from the Hub: Couldn't reach the Hub"):
        load_rows(source("a/b"), "train")


def test_a_full_disk_is_not_blamed_on_the_data(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise hf_datasets.exceptions.DatasetGenerationError("x") from OSError(errno.ENOSPC, "No space")

    path = write_parquet(tmp_path / "x.parquet", ROWS)
    monkeypatch.setattr(loading.hf_datasets, "load_dataset", fail)
    with pytest.raises(OSError, match="No space"):
        load_rows(source(path), "train")
    monkeypatch.setattr(hf_datasets.Dataset, "from_generator", fail)
    with pytest.raises(OSError, match="No space"):
        load_rows(source(write_jsonl(tmp_path / "x.jsonl", ROWS)), "train")
