"""Both trainers on the same samples, measured in turns, each in a fresh process."""

import json
import sys
from types import SimpleNamespace

import pytest
from conftest import run_cli, write_jsonl

from rm_recipe.errors import TrainingError
from rm_recipe.tools import benchmark
from rm_recipe.tools.benchmark import OutOfMemoryError, best_batch_size, in_turns, run_worker

FIGURES = {"comparisons_per_s", "tokens_per_s", "padding_share", "peak_memory_bytes", "losses"}


def test_both_trainers_see_the_same_losses_and_the_file_says_what_was_run(write_recipe, tmp_path):
    recipe = write_recipe(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3)
    result = run_cli("benchmark", str(recipe), "--steps", "3", "--repeats", "1", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "benchmark.json").read_text())
    for name in ("stock", "stock_tuned", "ours"):
        assert content[name].keys() >= FIGURES
        assert len(content[name]["losses"]) == 3
        assert len(content[name]["comparisons_per_s_each"]) == 1
        assert content[name]["comparisons_per_s"] > 0
        assert content[name]["model_flop_utilisation"] is None  # no GPU
    assert content["max_loss_difference"] <= 1e-5
    assert content["stock"]["losses"][0] != content["stock"]["losses"][2]
    assert content["scoring"]["max_reward_difference"] <= 1e-5
    assert content["ratio"].keys() == {
        "comparisons_per_s", "peak_memory", "tuned_comparisons_per_s", "tuned_peak_memory", "scoring"
    }  # fmt: skip
    # The same real tokens give fewer of them here: the prompt stands there once.
    assert content["ours"]["padding_share"] < content["stock"]["padding_share"]
    assert content["setting"]["recipe"]["per_device_train_batch_size"] == 2
    assert content["setting"]["stock_batch"] in (1, 2, 4)
    assert content["machine"]["versions"]["trl"]
    assert "times stock TRL's speed" in result.stdout
    assert "rm_recipe computes 0." in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if "written:" not in line) <= 80
    assert not (tmp_path / "run").exists()  # nothing is left of the trainings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "--steps of at least 2"),
        (["--repeats", "0"], "1 --repeats"),
        (["--per_device_train_batch_size", "65"], "the data has fewer"),
        (["--stock-batch", "3"], "has to divide the effective batch of 8"),
    ],
)
def test_what_cannot_be_compared_is_refused(write_recipe, arguments, message):
    result = run_cli("benchmark", str(write_recipe()), *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_rankings_are_refused_because_stock_takes_pairs(write_recipe, tmp_path):
    row = {"prompt": "hello", "responses": ["good", "bad", "no"], "ranks": [1, 2, 3]}
    for name in ("train", "test"):
        rows = [row | {"prompt": f"{name} {n}"} for n in range(8)]
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    result = run_cli("benchmark", str(write_recipe(dataset_name=str(tmp_path / "data"))))
    assert result.returncode == 2
    assert "benchmark needs pairs" in result.stderr


class Speeds:
    """Measurements that take a batch size's comparisons a second from a table; None: out of memory."""

    def __init__(self, table):
        self.table = table

    def training(self, what, batch=None, steps=None):
        found = self.table["ours" if what == "ours" else batch]
        if found is None:
            raise OutOfMemoryError("not enough memory")
        return {"comparisons": found, "seconds": 1.0}


@pytest.mark.parametrize(
    ("table", "best", "tried"),
    [
        ({1: 2, 2: 5, 4: 4, 8: 3, 16: 9, 32: 9}, 2, {4, 8, 2, 1}),
        ({1: 1, 2: 1, 4: 1, 8: 3, 16: 4, 32: None}, 16, {4, 8, 16, 32}),
        ({1: 1, 2: 1, 4: 1, 8: 3, 16: None, 32: 9}, 8, {4, 8, 16}),
        ({1: 2, 2: 1, 4: None, 8: None, 16: None, 32: None}, 1, {8, 4, 2, 1}),
        ({1: 1, 2: 2, 4: None, 8: None, 16: None, 32: None}, 2, {8, 4, 2, 1}),
    ],
)
def test_stocks_best_batch_is_found_without_trying_everything(table, best, tried):
    training = SimpleNamespace(train_batch_size=8, gradient_accumulation_steps=4)
    found, seen = best_batch_size(SimpleNamespace(training=training), Speeds(table))
    assert found == best
    assert set(seen) == tried


def test_stock_without_enough_memory_is_left_out_and_ours_is_not(capsys):
    found = in_turns(Speeds({None: None, 2: 5, "ours": 9}), 2, repeats=3)
    assert [len(found[name]) for name in ("stock", "stock_tuned", "ours")] == [0, 3, 3]
    assert capsys.readouterr().out.count("not enough memory") == 1  # not tried three times
    assert [one["comparisons"] for one in found["stock_tuned"] + found["ours"]] == [5] * 3 + [9] * 3
    with pytest.raises(OutOfMemoryError, match="ours"):
        in_turns(Speeds({None: 1, 2: 5, "ours": None}), 2, repeats=3)


def test_a_measurement_that_fails_says_why():
    with pytest.raises(TrainingError, match="no such thing"):
        run_worker([sys.executable, "-c", "raise SystemExit('no such thing')"])


@pytest.mark.parametrize(
    "said",
    [
        "torch.OutOfMemoryError: CUDA out of memory.",
        "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_every_way_to_run_out_of_memory_is_known_as_such(said):
    with pytest.raises(OutOfMemoryError):
        run_worker([sys.executable, "-c", f"raise SystemExit({said!r})"])


def test_a_measurement_that_fills_the_memory_is_ended_and_a_full_machine_measures_nothing(monkeypatch):
    percents = iter([30.0, 96.0, 96.0])
    monkeypatch.setattr(benchmark.psutil, "virtual_memory", lambda: SimpleNamespace(percent=next(percents)))
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(OutOfMemoryError):
        run_worker(command)
    with pytest.raises(TrainingError, match="96 % of the memory is in use already"):
        run_worker(command)
