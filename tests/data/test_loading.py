"""Rows come from files, folders, the Hub and mixtures, with their own types; what cannot be read is named."""

import errno
import gzip
import json
import os
import signal
import threading
from pathlib import Path

import datasets as hf_datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import HH_RLHF, make_rows, needs_hh_rlhf, write_jsonl
from trl.scripts.utils import DatasetConfig

from rm_recipe.data import loading
from rm_recipe.data.comparison import Comparison
from rm_recipe.data.dataset import Split, run_pass
from rm_recipe.data.loading import label, read_rows, splits_of
from rm_recipe.data.splits import hold_out_share, load_split
from rm_recipe.errors import DataError, TrainingError
from rm_recipe.recipe.schema import DataArguments

ROWS = make_rows(3, seed=1)
ROW = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode()
PACKED = gzip.compress(ROW, mtime=0)  # without the time, so that every process calls the tests alike
LAYOUTS = Path(__file__).parent / "hunt" / "layouts"


def source(path, **keys) -> DatasetConfig:
    return DatasetConfig(path=str(path), **keys)


def load(path, split="train", selected=None, **keys) -> Split:
    """A split of a set, of which TRL's `columns` may select some."""
    some = {"datasets": [{"path": str(path), "columns": selected}]}
    keys |= some if selected else {"dataset_name": str(path)}
    return load_split(DataArguments(**keys), split, margins="margin_column" in keys)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    hf_datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def chosen(split: Split) -> list[str]:
    return [responses[0] for responses in split.comparisons["responses"]]


# --- files and folders -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ndjson.ndjson", "pretty.json", "index.parquet", "prefs.csv", "data.arrow"])
def test_a_packed_file_gives_the_same_rows(tmp_path, name):
    whole = load(LAYOUTS / name)
    path = tmp_path / "[a]*" / f"data.parquet{(LAYOUTS / name).suffix}.gz"  # the last ending counts
    path.parent.mkdir()
    path.write_bytes(gzip.compress((LAYOUTS / name).read_bytes()))
    assert load(path).comparisons["key"][:] == whole.comparisons["key"][:]
    assert whole.column("row").tolist() == [1, 2, 3, 4][: whole.rows]


def test_the_cache_goes_by_content_and_settings_and_not_by_the_time_of_change(tmp_path, monkeypatch):
    rows = [{**row, "m": 1} for row in make_rows(3, seed=3)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    first, state = load(path), path.stat()
    write_jsonl(path, [*rows[:2], {**rows[2], "chosen": "other"}])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert chosen(load(path))[2] == "other"
    monkeypatch.setattr(loading, "_parsed", lambda *_: pytest.fail("parsed again"))
    copy = load(write_jsonl(tmp_path / "copy" / "x.jsonl", rows))
    assert [copy[n] for n in range(3)] == [first[n] for n in range(3)]
    assert copy.comparisons._fingerprint == first.comparisons._fingerprint
    with pytest.raises(pytest.fail.Exception, match="parsed again"):
        load(path, margin_column="m")


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", "\ufeff{0}\n\n  \n{1}\r\n{2}", [1, 4, 5]),  # byte order mark, blank lines
        ("a.json", "[{0},\n\n{1},{2}]", [1, 2, 3]),
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
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.jsonl", ROW + b'\n{"a": ', "line 2: not JSON: Expecting value"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        ("a.jsonl.gz", b"not gzip at all", "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", PACKED[:-8] + b"\x00" * 8, "cannot be read: CRC check failed"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named_with_its_fault(tmp_path, name, content, fault):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=fault) as caught:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("comma", [",", ";", "\t", "|"])
def test_a_csv_is_read_as_excel_writes_it_in_any_country_or_asked_for_as_utf_8(tmp_path, comma):
    rows = [["prompt", "chosen", "rejected"], ['"What, why; how?"', "Because. It\u2019s so", "No"]]
    text = "".join(f"{comma.join(row)}\r\n" for row in rows)
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode("utf-8-sig"))
    found = load(path)[0]
    assert found.prompt[0]["content"] == "What, why; how?"
    assert found.responses == ["Because. It\u2019s so", "No"]
    path.write_bytes(text.encode("cp1252"))
    with pytest.raises(DataError, match=r"x.csv' cannot be read: .*; save it as UTF-8 .Excel: 'CSV UTF-8'"):
        load(path)


def test_a_csv_has_margins_labels_and_long_fields(tmp_path):
    file = tmp_path / "train.csv"
    long = "word " * 40_000
    file.write_text(f"prompt,chosen,rejected,margin\na,{long},c,0.5\nd,e,f,\n")
    assert load(file, margin_column="margin").comparisons["margins"][:] == [[0.5]]
    file.write_text("input,output_1,output_2,label\na,b,c,2\n")
    assert load(file).comparisons["responses"][:] == [["c", "b"]]  # the best first
    file.write_text('prompt,responses,order\nq,"[""a"", ""b""]","[4, 1]"\n')
    found = load(file, columns={"ranks": "order"}, margin_column="order")[0]
    assert (found.responses, found.margins) == (["b", "a"], [3.0])


def test_a_missing_split_is_named_with_those_that_are_there(tmp_path, tiny_data):
    assert hold_out_share(DataArguments(dataset_name=str(tiny_data))) is None
    for ask in (lambda data: load_split(data, "validation"), hold_out_share):
        with pytest.raises(DataError, match="has no split 'validation'; it has test, train"):
            ask(DataArguments(dataset_name=str(tiny_data), dataset_test_split="validation"))
    only = write_jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "train_args.json").write_text('{"a": 1}')
    (tmp_path / "metadata.json").write_text('{\n "a": 1\n}')  # says something about the rows
    (tmp_path / "stats.csv").write_text("step,loss\n1,0.7\n")
    for name in (only, tmp_path):  # a file is one split, whatever it is called
        assert hold_out_share(DataArguments(dataset_name=str(name))) == 0.1


def test_a_path_that_holds_no_data_is_named(tmp_path, tiny_data):
    path = write_jsonl(tmp_path / "sub" / "train.jsonl", ROWS)
    for name in ("train.jsonl", "train.json"):
        write_jsonl(tmp_path / "two" / name, ROWS)
    for entry, said in (
        (source(tiny_data, data_dir="helpfull"), "helpfull' does not exist; check .* 'dataset_subsets'"),
        (source(tmp_path / "none.jsonl"), "none.jsonl' does not exist"),
        (source(tmp_path, data_files="none.jsonl"), "none.jsonl' does not exist"),
        (source(path, data_dir="sub"), "train.jsonl/sub' does not exist"),
        (source(tmp_path / "two"), "has two files for the split 'train'"),
    ):
        with pytest.raises(DataError, match=said):
            splits_of(entry)
    with pytest.raises(DataError, match="train.jsonl' is no data set of the Hub: leave out 'dataset_revis"):
        load(path, dataset_revision="09be8c5")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none' holds no data file: it needs train.jsonl or "):
        load(tmp_path / "none")
    for name in ("helpful-base", "harmless-base"):  # of a clone
        write_jsonl(tmp_path / "clone" / name / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"'dataset_subsets': \['harmless-base', 'helpful-base'\]"):
        load(tmp_path / "clone")


def test_sources_are_the_subsets_of_a_set_or_the_entries_of_trls_mixtures(tmp_path, tiny_data):
    for subset in ("helpful-base", "harmless-base"):
        write_parquet(tmp_path / subset / "train.parquet", [{**ROWS[0], "chosen": subset}])
    split = load(tmp_path, dataset_subsets=["helpful-base", "harmless-base"])
    assert chosen(split) == split.comparisons["subset"][:] == ["helpful-base", "harmless-base"]
    entry = DataArguments(datasets=[{"path": str(tiny_data), "data_files": "test.jsonl"}])
    assert load_split(entry, None).rows == 40
    assert hold_out_share(entry) == 0.1  # one file: it is not held out against itself
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
        return hf_datasets.DatasetDict(dict.fromkeys(("train", "test"), hf_datasets.Dataset.from_list(ROWS)))

    monkeypatch.setattr(loading.hf_datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(loading.hf_datasets, "get_dataset_config_names", lambda *_: ["default", "preference"])
    return asked


def test_the_four_tranches_of_hh_rlhf_are_asked_for_by_data_dir(hub):
    tranches = ["helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"]
    assert load("Anthropic/hh-rlhf", dataset_subsets=tranches, dataset_revision="09be8c5").rows == 4 * 3
    assert [call["data_dir"] for call in hub] == tranches
    assert {(call["path"], call["revision"]) for call in hub} == {("Anthropic/hh-rlhf", "09be8c5")}
    assert load("nvidia/HelpSteer3", dataset_subsets=["preference"]).rows == 3
    assert (hub[-1]["name"], hub[-1]["data_dir"]) == ("preference", None)  # a configuration of that name


@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have_or_give_is_one_message():
    with pytest.raises(DataError, match="no split 'validation'; it has train, test"):
        load("someone/preferences", "validation")
    with pytest.raises(DataError, match="'a/b' cannot be loaded from the Hub: Couldn't reach the Hub"):
        load("a/b")


def test_a_full_disk_is_not_blamed_on_the_data(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise hf_datasets.exceptions.DatasetGenerationError("x") from OSError(errno.ENOSPC, "No space")

    monkeypatch.setattr(hf_datasets.Dataset, "from_generator", fail)
    with pytest.raises(OSError, match="No space"):
        load(write_jsonl(tmp_path / "x.jsonl", ROWS))


# --- every row is a comparison or is counted ---------------------------------------------------


def test_a_comparison_knows_its_row_subset_ranks_and_margins_and_a_reason_its_first_row(tmp_path):
    judged = [{"prompt": [{"role": role, "content": "a"}]} for role in ("judge", "narrator")]
    rows = [
        {"prompt": "p", "responses": ["a"], "scores": [1.0], "subset": "theirs"},
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 1]},
        *({**row, "responses": ["a", "b"], "scores": [1, 2], "subset": ""} for row in judged),
    ]
    write_jsonl(tmp_path / "mine" / "train.jsonl", rows)
    split = load(tmp_path, dataset_subsets=["mine"], margin_column="scores")
    asked = [{"role": "user", "content": "p"}]
    assert split[0] == Comparison(asked, ["b", "a", "c"], [0, 1, 1], [2.0, 2.0], "mine")
    assert split.column("row").tolist() == [2]
    unknown = ["mine:3 (role 'judge')", "mine:4 (role 'narrator')"]
    assert split.first_rows == {"single_response": ["theirs:1"], "unknown_role": unknown}
    assert split.why_excluded().endswith("; 2 unknown_role, first in row mine:3 (role 'judge')")


def test_a_rows_type_and_columns_are_its_own_however_far_down_it_stands(tmp_path):
    """Behind 11 MB of others: readers that decide by a file's beginning have decided."""
    reply = [{"role": "assistant", "content": "a", "name": "x"}]
    rows = [{**row, "chosen": "word " * 500, "m": 2} for row in make_rows(4_000, seed=5)]
    rows += [{"prompt": "p", "chosen": chosen, "rejected": "b", "m": 2} for chosen in ("a", reply)]
    rows += [{**row, "m": m, "later": 1} for row, m in zip(make_rows(2, seed=2), (1, 0.5), strict=True)]
    rows += [{**make_rows(1, seed=3)[0], "subset": 1, "m": "2"}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    split = load(path, margin_column="m")
    assert load(path, columns={"chosen": "chosen"}, margin_column="m").comparisons["subset"][-1] == "1"
    assert split.excluded == {}
    assert split[4_000] == split[4_001]
    assert split.comparisons["subset"][-2:] == ["", "1"]
    assert split.comparisons["margins"][-3:] == [[1.0], [0.5], [2.0]]
    rows.append({"prompt": "p", "chosen": 5, "rejected": "b"})
    with pytest.raises(DataError, match=f"line {len(rows)}: column 'chosen' should be a text or a list"):
        load(write_jsonl(tmp_path / "y.jsonl", rows))


def test_columns_and_rows_that_are_missing_or_of_the_wrong_type_are_named(tmp_path):
    rows = [{**row, "strength": "slightly", "subset": "theirs"} for row in make_rows(2, seed=1)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    pair, levels = ["prompt", "chosen", "rejected"], {"margin_column": "strength"}
    assert load(path, **levels, margin_map={"slightly": 0.3})[1].margins == [0.3]
    assert load(path, selected=pair).comparisons["subset"][0] != "theirs"
    table = write_parquet(tmp_path / "x.parquet", [{**row, "chosen": 5} for row in rows])
    empty = tmp_path / "none.parquet"
    hf_datasets.Dataset.from_list(rows).select([]).to_parquet(empty)
    renamed = {"margin_column": "subset", "columns": {"subset": "strength"}}
    for file, keys, said in (
        (path, {"margin_column": "margin"}, "strength, subset, and not margin"),
        (path, renamed, "its name to 'strength'; rename"),
        (path, levels | {"margin_map": {"much": 1}}, "line 1: column 'strength' .* one of margin_map's much"),
        (path, {"selected": pair[:2]}, "its columns are prompt, chosen; rm_recipe needs two replies or more"),
        (empty, {}, "none.parquet' is empty"),
        (table, {}, "x.parquet', row 1: column 'chosen' should be a text"),
    ):
        with pytest.raises(DataError, match=said):
            load(file, **keys)


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
    half = [{"subset": "\ud800"}, {"chosen": "\ud800"}, {"prompt": [{"role": "\ud800", "content": "a"}]}]
    split = load(write_jsonl(tmp_path / "x.jsonl", [{**row, **change} for change in half]))
    assert split.comparisons["subset"][:] == ["?"]
    assert split.first_rows == {"invalid_text": ["2"], "unknown_role": ["3 (role '?')"]}


@needs_hh_rlhf
@pytest.mark.parametrize(
    ("subset", "split", "rows", "differing", "empty"),
    [("harmless-base", "test", 350, 2, 1), ("helpful-base", "train", 1552, 5, 4)],
)
def test_genuine_hh_rlhf_rows_are_comparisons_but_for_empty_replies(subset, split, rows, differing, empty):
    """Those whose prompts differ all hold a reply that wrote its own `Assistant:`."""
    found = load(HH_RLHF, split, dataset_subsets=[subset])
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


def test_of_a_table_only_the_columns_of_a_comparison_are_read(tmp_path):
    file = tmp_path / "train.parquet"
    beyond = pa.array([2**50], pa.timestamp("ms"))  # which Python has no date for
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], "at": beyond}), file)
    split = load(file)
    assert (len(split.comparisons), split.unread) == (1, ["at"])
