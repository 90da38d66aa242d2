"""A pass is computed once, by however many processes, and ends well when it is interrupted."""

import os
import signal
import threading

import datasets as hf_datasets
import pytest

from rm_recipe.data import dataset
from rm_recipe.data.dataset import processes, run_pass
from rm_recipe.errors import TrainingError

NUMBERS = {"number": hf_datasets.Value("int64")}


def numbers(n: int = 20) -> hf_datasets.Dataset:
    return hf_datasets.Dataset.from_dict({"number": list(range(n))})


def test_a_pass_is_computed_once_for_the_same_rows_settings_and_code(tmp_path):
    """Rows in memory have no cache; a file's have."""
    numbers().to_json(tmp_path / "n.jsonl")
    calls = []

    def double(row):
        calls.append(row)
        return {"number": 2 * row["number"]}

    def run(*depends_on):
        rows = hf_datasets.load_dataset("json", data_files=str(tmp_path / "n.jsonl"), split="train")
        return run_pass(rows, double, "Doubling", NUMBERS, depends_on)["number"][:]

    assert run("a", dataset) == run("a", dataset) == [2 * n for n in range(20)]
    assert len(calls) == 20
    run("b", dataset)
    assert len(calls) == 40


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("processes", [None, 2])
def test_ctrl_c_is_ctrl_c_however_many_processes_work(processes):
    """With several, datasets raises an error of its own on the way out."""

    def wait(row):
        import time

        time.sleep(0.5)
        return row

    timer = threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_pass(numbers(), wait, "Waiting", NUMBERS, ["wait"], processes)
    timer.join()


def test_a_process_that_is_killed_is_one_message():
    def die(row):
        import os

        os.kill(os.getpid(), 9)

    with pytest.raises(TrainingError, match="dying: a process was killed"):
        run_pass(numbers(), die, "Dying", NUMBERS, ["die"], 2)


def test_no_rows_have_the_new_columns_all_the_same():
    empty = numbers().select([])
    assert run_pass(empty, lambda row: row, "Nothing", {"other": NUMBERS["number"]}, []).column_names == [
        "other"
    ]


def test_small_sets_take_one_process_and_large_ones_the_cores():
    assert processes(1_000, None) is None
    assert processes(1_000_000, None) == min(8, len(os.sched_getaffinity(0)))
    assert processes(10, 3) == 3
