"""Rows come from files, folders, the Hub and mixtures, with their own types; what cannot be read is named."""

import errno
import gzip
import json
import os
import signal
import threading

import datasets as hf_datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import HH_RLHF, make_rows, needs_hh_rlhf, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl.scripts.utils import DatasetConfig

from rm_recipe.data import loading
from rm_recipe.data.comparison import Comparison
from rm_recipe.data.dataset import Split, run_pass
from rm_recipe.data.loading import (
    MissingSplitError,
    has_split,
    label,
    load_comparisons,
    read_rows,
    sources_of,
)
from rm_recipe.errors import DataError, TrainingError
from rm_recipe.recipe.schema import DataArguments

ROWS = make_rows(3, seed=1)
ROW = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode()
PACKED = gzip.compress(b"".join(ROW.replace(b"p", str(n).encode()) + b"\n" for n in range(500)), mtime=0)


def source(path, **keys) -> DatasetConfig:
    return DatasetConfig(path=str(path), **keys)


def load(path, split="train", subset="", margin_column=None, columns=None, **keys) -> Split:
    found = path if isinstance(path, DatasetConfig) else source(path, columns=columns)
    return load_comparisons(found, split, subset, DataArguments(**keys), margin_column)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    hf_datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def chosen(split: Split) -> list[str]:
    return [responses[0] for responses in split.comparisons["responses"]]


# --- files and folders -------------------------------------------------------------------------


def write_arrow(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    ".jsonl": write_jsonl,
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".parquet": write_parquet,
    ".csv": lambda path, rows: hf_datasets.Dataset.from_list(rows).to_csv(path),
    ".arrow": write_arrow,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", WRITERS)
def test_every_file_format_gives_the_same_rows(tmp_path, ending, packed):
    path = tmp_path / "[a]*" / f"data.parquet{ending}"  # the last ending counts
    path.parent.mkdir()
    rows = [{**row, "prompt": row["prompt"][0]["content"]} for row in ROWS]
    WRITERS[ending](path, rows)
    if packed:
        content = path.read_bytes()
        path = path.with_name(f"{path.name}.gz")
        path.write_bytes(gzip.compress(content))
    split = load(path)
    assert split.comparisons["prompt"][:] == [row["prompt"] for row in ROWS]
    assert chosen(split) == [row["chosen"] for row in ROWS]
    assert split.column("row").tolist() == [1, 2, 3]


def test_the_cache_goes_by_content_and_not_by_the_time_of_change(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    load(path)
    state = path.stat()
    write_jsonl(path, [*ROWS[:2], {**ROWS[2], "chosen": "other"}])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert chosen(load(path))[2] == "other"
    copy = load(write_jsonl(tmp_path / "copy" / "x.jsonl", ROWS))
    assert copy.comparisons._fingerprint == load(write_jsonl(path, ROWS)).comparisons._fingerprint


def test_a_second_start_parses_nothing_and_other_settings_do(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", [{**row, "m": 1} for row in make_rows(5, seed=3)])
    first = load(path, subset="a")

    def refuse(*_):
        raise AssertionError("parsed again")

    monkeypatch.setattr(loading, "_parsed", refuse)
    again = load(path, subset="a")
    assert [again[n] for n in range(5)] == [first[n] for n in range(5)]
    for settings_ in ({"subset": "b"}, {"subset": "a", "margin_column": "m"}):
        with pytest.raises(AssertionError, match="parsed again"):
            load(path, **settings_)


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", "\ufeff{0}\n\n  \n{1}\r\n{2}", [1, 4, 5]),  # byte order mark, blank lines
        ("a.json", "[{0},\n\n{1},{2}]", [1, 2, 3]),
        ("a.json", "\ufeff \n [{0},{1},{2}]", [1, 2, 3]),
        ("a.json", "{0}\n{1}\n{2}\n", [1, 2, 3]),
    ],
)
def test_rows_come_with_the_number_of_their_line_or_element(tmp_path, name, content, numbers):
    for key, row in enumerate(ROWS):
        content = content.replace(f"{{{key}}}", json.dumps({**row, "u": "\u2028"}, ensure_ascii=False))
    (tmp_path / name).write_text(content, newline="")
    assert [number for number, _ in read_rows(tmp_path / name)] == numbers
    assert load(tmp_path / name).column("row").tolist() == numbers


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", ROW + b'\n{"chosen": "\xff"}\n', "line 2, byte 13 of it: not UTF-8 text"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.jsonl", ROW + b'\n{"a": ', "line 2: not JSON: Expecting value"),
        ("a.jsonl", ROW + b"\n[1]", "line 2: a row is a JSON object, this is a list"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        ("a.jsonl.gz", b"not gzip at all", "not gzip though its name says so"),
        ("a.jsonl.gz", PACKED[: len(PACKED) // 2], "is damaged"),
        ("a.jsonl.gz", PACKED[:-8] + b"\x00" * 8, "is damaged"),  # the checksum
        ("a.json", b'[{"chosen": "a"},\n {"chosen": ]', r"not JSON: Expecting value \(line 2, column 13\)"),
        ("a.json", b"[]", "is empty"),
        ("a.json", b'[\n"\xff"]', "byte 4 of it: not UTF-8 text"),
        ("a.parquet", b"not parquet", "cannot be read: Parquet"),
        ("a.tsv", b"a\tb", "is no data file"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "is a Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "is a Git LFS pointer"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named_with_its_fault(tmp_path, name, content, fault):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=fault) as caught:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_split_is_named_with_those_that_are_there(tmp_path, tiny_data):
    with pytest.raises(MissingSplitError, match="no file for the split 'validation'") as caught:
        load(tiny_data, "validation")
    assert caught.value.others == ["test", "train"]
    assert has_split(source(tiny_data), "test")
    with pytest.raises(MissingSplitError):  # two others: nobody can say which was meant
        has_split(source(tiny_data), "validation")
    only = write_jsonl(tmp_path / "only" / "train.jsonl", ROWS)
    (tmp_path / "only" / "dataset_infos.json").write_text("{}")  # says something about the rows
    assert not has_split(source(only.parent), "test")
    assert not has_split(source(only), "test")  # a file is one split


def test_a_path_that_holds_no_data_is_named_with_what_to_do(tmp_path, tiny_data):
    path = write_jsonl(tmp_path / "sub" / "train.jsonl", ROWS)
    for name in ("train.jsonl", "train.json"):
        write_jsonl(tmp_path / "two" / name, ROWS)
    for entry, said in (
        (source(tiny_data, data_dir="helpfull"), "helpfull' is no folder; check 'dataset_subsets'"),
        (source(tmp_path / "none.jsonl"), "none.jsonl' does not exist"),
        (source(tmp_path, data_files="sub"), "sub' is no file; 'data_files' of a local folder"),
        (source(path, data_dir="sub"), "train.jsonl' is a file and has no subsets"),
        (source(tmp_path / "two"), "has 2 files for the split 'train'"),
        (source(tmp_path), "it has sub/, two/"),
    ):
        with pytest.raises(DataError, match=said):
            load(entry)


def test_sources_are_the_subsets_of_a_set_or_the_entries_of_trls_mixtures(tmp_path, tiny_data):
    for subset in ("helpful-base", "harmless-base"):
        write_parquet(tmp_path / subset / "train.parquet", [{**ROWS[0], "chosen": subset}])
    data = DataArguments(dataset_name=str(tmp_path), dataset_subsets=["helpful-base", "harmless-base"])
    assert [chosen(load(found)) for found in sources_of(data)] == [["helpful-base"], ["harmless-base"]]
    [found] = sources_of(DataArguments(datasets=[{"path": str(tiny_data), "data_files": "test.jsonl"}]))
    assert load(found).rows == 40
    assert not has_split(found, "test")  # one file: it is not held out against itself
    assert label(source("Anthropic/hh-rlhf", data_dir="helpful-base"), False) == "helpful-base"
    assert label(source("Anthropic/hh-rlhf", data_dir="helpful-base"), True) == "hh-rlhf/helpful-base"
    assert label(source(tiny_data / "train.jsonl"), True) == "preferences/train.jsonl"


# --- the Hub, which is not here ----------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets.load_dataset`; remembers what it was asked for."""
    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        if arguments["path"] == "a/b":
            raise ConnectionError("Couldn't reach\nthe Hub")
        if arguments["split"] not in ("train", "test"):
            raise ValueError(f"Unknown split \"{arguments['split']}\". Should be one of ['train', 'test'].")
        return hf_datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(loading.hf_datasets, "load_dataset", load_dataset)
    return asked


def test_the_four_tranches_of_hh_rlhf_are_asked_for_by_data_dir(hub):
    tranches = ["helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"]
    data = {"dataset_name": "Anthropic/hh-rlhf", "dataset_subsets": tranches, "dataset_revision": "09be8c5"}
    for found in sources_of(DataArguments(**data)):
        assert load(found, **data).rows == 3
    assert [call["data_dir"] for call in hub] == tranches
    asked = {(call["path"], call["revision"], call["split"]) for call in hub}
    assert asked == {("Anthropic/hh-rlhf", "09be8c5", "train")}


def test_what_the_hub_does_not_have_or_give_is_one_message(hub):
    with pytest.raises(MissingSplitError, match="no split 'validation'; it has 'train', 'test'") as caught:
        load("someone/preferences", "validation")
    assert caught.value.others == ["train", "test"]
    with pytest.raises(DataError, match="'a/b' cannot be loaded from the Hub: Couldn't reach the Hub"):
        load("a/b")


def test_a_full_disk_is_not_blamed_on_the_data(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise hf_datasets.exceptions.DatasetGenerationError("x") from OSError(errno.ENOSPC, "No space")

    monkeypatch.setattr(hf_datasets.Dataset, "from_generator", fail)
    with pytest.raises(OSError, match="No space"):
        load(write_jsonl(tmp_path / "x.jsonl", ROWS))


# --- every row is a comparison or is counted ---------------------------------------------------

TEXTS = st.sampled_from(
    ["", " ", "a", "b", "\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b", None]
)
PAIRS = st.fixed_dictionaries(
    {"prompt": st.sampled_from([None, "p", " "]), "chosen": TEXTS, "rejected": TEXTS}
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PAIRS, min_size=1, max_size=12))
def test_the_sum_of_comparisons_and_reasons_is_exact(tmp_path, rows):
    rows.append({"prompt": "p", "chosen": "x", "rejected": "y"})
    split = load(write_jsonl(tmp_path / "x.jsonl", rows))
    assert split.rows == len(rows) == len(split.comparisons) + split.excluded.total()
    assert len(split.comparisons) >= 1


def test_a_comparison_knows_its_row_subset_ranks_and_margins_and_a_reason_its_first_row(tmp_path):
    judged = [{"prompt": [{"role": role, "content": "a"}]} for role in ("judge", "narrator")]
    rows = [
        {"prompt": "p", "responses": ["a"], "scores": [1.0], "subset": "theirs"},
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 1]},
        *({**row, "responses": ["a", "b"], "scores": [1, 2], "subset": ""} for row in judged),
    ]
    split = load(write_jsonl(tmp_path / "x.jsonl", rows), subset="mine", margin_column="scores")
    asked = [{"role": "user", "content": "p"}]
    assert split[0] == Comparison(asked, ["b", "a", "c"], [0, 1, 1], [2.0, 2.0], "mine")
    assert split.column("row").tolist() == [2]
    assert split.first_rows == {"single_response": ["theirs:1"], "unknown_role": ["mine:3", "mine:4"]}
    assert split.details == {"unknown_role": "role 'judge'"}
    assert split.why_excluded().endswith("; 2 unknown_role, first in row mine:3: role 'judge'")


def padded(rows: list[dict]) -> list[dict]:
    """The rows behind 11 MB of others: readers that decide by a file's beginning have decided."""
    return [{**row, "chosen": "word " * 500} for row in make_rows(4_000, seed=5)] + rows


def test_a_rows_type_and_columns_are_its_own_however_far_down_it_stands(tmp_path):
    reply = [{"role": "assistant", "content": "a", "name": "x"}]
    rows = padded([{"prompt": "p", "chosen": chosen, "rejected": "b", "m": None} for chosen in ("a", reply)])
    rows += [{**row, "m": m, "later": 1} for row, m in zip(make_rows(2, seed=2), (1, 0.5), strict=True)]
    rows += [
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "m": 1, "subset": n} for n in range(2)
    ]
    rows[0]["m"] = 2
    split = load(write_jsonl(tmp_path / "x.jsonl", rows), margin_column="m")
    assert split.excluded == {}
    assert split[4_000] == split[4_001]
    assert split.comparisons["subset"][-3:] == ["", "0", "1"]
    assert split.comparisons["margins"][-4:-2] == [[1.0], [0.5]]
    assert split.comparisons["margin_fault"][:2] == ["", "missing_margin"]
    rows.append({"prompt": "p", "chosen": 5, "rejected": "b"})
    with pytest.raises(DataError, match=f"line {len(rows)}: column 'chosen' should be a text or a list"):
        load(write_jsonl(tmp_path / "y.jsonl", rows))


def test_columns_and_rows_that_are_missing_or_of_the_wrong_type_are_named(tmp_path):
    rows = [{**row, "strength": "slightly", "subset": "theirs"} for row in make_rows(2, seed=1)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match="x.jsonl' has no column 'margin'"):
        load(path, margin_column="margin")
    with pytest.raises(DataError, match="line 1: column 'strength' should be one of margin_map's much"):
        load(path, margin_column="strength", margin_map={"much": 1})
    assert load(path, margin_column="strength", margin_map={"slightly": 0.3})[1].margins == [0.3]
    assert load(path, columns=["prompt", "chosen", "rejected"]).comparisons["subset"][:] == [""] * 2
    with pytest.raises(DataError, match="x.jsonl' has no column other"):
        load(path, columns=["prompt", "chosen", "rejected", "other"])
    with pytest.raises(
        DataError, match="its columns are prompt, chosen; rm_recipe needs chosen and rejected"
    ):
        load(path, columns=["prompt", "chosen"])
    empty = tmp_path / "none.parquet"
    hf_datasets.Dataset.from_list(rows).select([]).to_parquet(empty)
    with pytest.raises(DataError, match="none.parquet' is empty"):
        load(empty)
    table = write_parquet(tmp_path / "x.parquet", [{**row, "chosen": 5} for row in rows])
    with pytest.raises(DataError, match="x.parquet', row 1: column 'chosen' should be a text"):
        load(table)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_columns_that_are_not_read_are_named(tmp_path, write):
    rows = [{**row, "instruction": "doc", "score": 2.5} for row in make_rows(3, seed=1)]
    path = write(tmp_path / f"x.{'jsonl' if write is write_jsonl else 'parquet'}", rows)
    assert load(path).unread == ["instruction", "score"]
    assert load(path, margin_column="score").unread == ["instruction"]
    assert load(path, columns=["prompt", "chosen", "rejected"]).unread == []  # the recipe says so


def test_prompts_that_differ_are_counted_whatever_became_of_them(tmp_path):
    question = "\n\nHuman: q\n\nAssistant:"
    user, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [
        {"chosen": f"{question} a\n\nAssistant: b", "rejected": f"{question} c"},
        {"chosen": f"{question} a", "rejected": "\n\nHuman: p\n\nAssistant: c"},
        {"chosen": [user, reply], "rejected": [reply, reply]},
        {"chosen": f"{question} a", "rejected": f"{question} c"},
        {"chosen": f"{question} a\n\nAssistant: b", "rejected": f"{question} "},
    ]
    split = load(write_jsonl(tmp_path / "x.jsonl", rows))
    assert len(split.comparisons) == 2
    assert split.excluded == {"differing_prompts": 2, "empty_response": 1}
    assert split.differing_prompts == 4


def test_half_a_surrogate_pair_is_counted_in_a_text_and_replaced_in_a_name(tmp_path):
    row = make_rows(1, seed=1)[0]
    split = load(
        write_jsonl(tmp_path / "x.jsonl", [{**row, "subset": "\ud800"}, {**row, "chosen": "\ud800"}])
    )
    assert split.comparisons["subset"][:] == ["?"]
    assert split.excluded == {"invalid_text": 1}


@needs_hh_rlhf
@pytest.mark.parametrize(
    ("subset", "split", "rows", "differing", "empty"),
    [("harmless-base", "test", 350, 2, 1), ("helpful-base", "train", 1552, 5, 4)],
)
def test_genuine_hh_rlhf_rows_are_comparisons_but_for_empty_replies(subset, split, rows, differing, empty):
    """Those whose prompts differ all hold a reply that wrote its own `Assistant:`."""
    found = load(source(HH_RLHF, data_dir=subset), split, subset)
    assert (found.rows, found.differing_prompts) == (rows, differing)
    assert found.excluded == {"empty_response": empty}
    assert all(prompt[0]["role"] == "user" for prompt in found.comparisons["prompt"])


# --- cached passes -----------------------------------------------------------------------------

NUMBERS = hf_datasets.Dataset.from_dict({"number": list(range(20))})


@pytest.mark.usefixtures("as_in_a_terminal")
def test_ctrl_c_is_ctrl_c_however_many_processes_work():
    """With several, datasets raises an error of its own on the way out."""

    def wait(row):
        import time

        time.sleep(0.5)
        return row

    timer = threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_pass(NUMBERS, wait, "Waiting", NUMBERS.features, ["wait"], 2)
    timer.join()


def test_a_process_that_is_killed_is_one_message():
    def die(row):
        import os

        os.kill(os.getpid(), 9)

    with pytest.raises(TrainingError, match="dying: a process was killed"):
        run_pass(NUMBERS, die, "Dying", NUMBERS.features, ["die"], 2)


def test_what_lies_beside_a_split_is_no_split_unless_it_holds_comparisons(tmp_path):
    rows = b"".join(ROW + b"\n" for _ in range(3))
    (tmp_path / "train.jsonl").write_bytes(rows)
    (tmp_path / "metadata.json").write_text('{\n "a": 1\n}')
    (tmp_path / "stats.csv").write_text("step,loss\n1,0.7\n")
    with pytest.raises(MissingSplitError) as caught:
        loading.find_file(DatasetConfig(path=str(tmp_path)), "test")
    assert caught.value.others == ["train"]


def test_a_csv_has_margins_labels_and_long_fields(tmp_path):
    file = tmp_path / "train.csv"
    long = "word " * 40_000
    file.write_text(f"prompt,chosen,rejected,margin\na,{long},c,0.5\nd,e,f,\n")
    data = DataArguments(dataset_name=str(file), margin_column="margin")
    split = load_comparisons(DatasetConfig(path=str(file)), "train", "", data, "margin")
    assert split.comparisons["margins"][:] == [[0.5], []]
    file = tmp_path / "llmbar.csv"
    file.write_text("input,output_1,output_2,label\na,b,c,2\n")
    split = load_comparisons(DatasetConfig(path=str(file)), "train", "", data, None)
    assert split.comparisons["responses"][:] == [["c", "b"]]  # the best first


def test_of_a_table_only_the_columns_of_a_comparison_are_read(tmp_path):
    file = tmp_path / "train.parquet"
    beyond = pa.array([2**50], pa.timestamp("ms"))  # which Python has no date for
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], "at": beyond}), file)
    data = DataArguments(dataset_name=str(file))
    split = load_comparisons(DatasetConfig(path=str(file)), "train", "", data, None)
    assert (len(split.comparisons), split.unread) == (1, ["at"])
