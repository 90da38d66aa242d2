"""The report's figures are those counted by hand, and it stands where the contract says."""

import json

import numpy as np
import pytest
from conftest import HH_RLHF, make_rows, needs_hh_rlhf, write_jsonl
from rich.console import Console

from rm_recipe.data.comparison import Comparison
from rm_recipe.data.doctor import examine, examine_split, print_report
from rm_recipe.data.splits import load_splits
from rm_recipe.data.tokenization import render, tokenize
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.training.train import load_data


def report_of(recipe_path):
    recipe = read_recipe(recipe_path)
    _, train_split, test_split, leakage = load_data(recipe)
    return examine(recipe, train_split, test_split, leakage)


def test_every_flaw_is_counted_with_its_row(write_recipe, flawed):
    report = report_of(write_recipe(**flawed, leakage="allow"))
    figures = report["splits"]["train"]
    assert figures["excluded"] == {
        "empty_response": 1, "identical_responses": 1, "response_too_long": 1, "too_long": 1,
    }  # fmt: skip
    assert figures["first_rows"] == {
        "empty_response": ["7"], "identical_responses": ["8"], "response_too_long": ["9"], "too_long": ["11"],
    }  # fmt: skip
    assert (figures["rows"], figures["comparisons"]) == (13, 9)
    assert figures["duplicates"] == {"exact": 2, "near": 0, "contradictory": 0, "repeated_prompts": 2}
    assert figures["truncated"] == 1
    assert figures["truncation"] == {
        "drop_oldest_turns": {"truncated": 1, "excluded": 2},
        "keep_end": {"truncated": 2, "excluded": 1},
        "exclude": {"truncated": 0, "excluded": 3},
        "cut_end": {"truncated": 3, "identical": 2},
    }
    assert report["leakage"] == {"prompts": 1, "comparisons": 1, "first_rows": ["6"], "policy": "allow"}


def test_the_report_has_the_contracts_keys_and_its_sums(write_recipe, flawed):
    report = report_of(write_recipe(**flawed, leakage="drop", max_train_samples=4))
    assert report.keys() >= {"splits", "leakage"}
    assert report["splits"].keys() == {"train", "test"}
    for figures in report["splits"].values():
        assert figures.keys() >= {
            "rows", "comparisons", "excluded", "duplicates", "differing_prompts", "truncated",
            "identical_after_truncation", "baselines", "shared_prefix_share", "tokens",
        }  # fmt: skip
        assert figures["duplicates"].keys() >= {"exact", "near"}
        assert figures["baselines"].keys() == {"longer_wins", "shorter_wins"}
        assert figures["tokens"].keys() == {"p50", "p90", "p99", "max"}
        assert figures["rows"] == figures["comparisons"] + sum(figures["excluded"].values())
    assert report["splits"]["train"]["excluded"]["leaked_prompt"] == 1
    json.dumps(report, allow_nan=False)


def test_tokens_prefix_share_and_baselines_equal_a_naive_count(write_recipe, tiny_data, tiny_llama):
    figures = report_of(write_recipe())["splits"]["train"]
    tokenizer = load_tokenizer(str(tiny_llama), of_base=True)
    lengths, longer, shared, plain = [], [], 0, 0
    for row in map(json.loads, (tiny_data / "train.jsonl").open()):
        both = [
            tokenizer(render(tokenizer, messages))["input_ids"]
            for messages in Comparison(row["prompt"], [row["chosen"], row["rejected"]]).conversations()
        ]
        lengths += [len(ids) for ids in both]
        same = 0
        while both[0][same] == both[1][same]:
            same += 1
        plain += sum(map(len, both))
        shared += sum(map(len, both)) - same
        longer.append((np.sign(len(both[0]) - len(both[1])) + 1) / 2)
    assert figures["tokens"]["max"] == max(lengths)
    assert figures["tokens"]["p50"] == np.percentile(lengths, 50, method="higher")
    assert figures["shared_prefix_share"] == pytest.approx(1 - shared / plain)
    assert figures["baselines"]["longer_wins"] == pytest.approx(np.mean(longer))
    assert figures["baselines"]["shorter_wins"] == pytest.approx(1 - np.mean(longer))


def test_the_table_fits_80_columns_and_tells_what_was_found(write_recipe, flawed):
    rows = [{"prompt": f"{n}", "responses": ["a", "b", "c"], "scores": [1, 2, 3]} for n in range(3)]
    report = report_of(write_recipe(**flawed, leakage="drop"))
    console = Console(width=80, record=True)
    print_report(report, console)
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= 80
    assert "train, response_too_long: row 9" in printed
    assert "Leakage: 1 train comparisons on 1 held-out prompts, left out of train (row 6)." in printed
    assert "drop_oldest_turns (this recipe)" in printed
    assert "pairs in them" not in printed
    path = write_jsonl(write_recipe().parent / "r.jsonl", rows)
    report = report_of(write_recipe(dataset_name=str(path), test_split_size=0.5))
    print_report(report, console)
    printed = console.export_text()
    assert "pairs in them" in printed
    assert "Held out: 50% of the prompts" in printed


def test_reasons_are_told_with_what_they_were_and_columns_that_are_not_read(write_recipe, tmp_path):
    rows = [{**row, "context": "doc"} for row in make_rows(30, seed=1)]
    rows[0]["prompt"] = [{"role": "judge", "content": "a"}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    report = report_of(write_recipe(dataset_name=str(path), test_split_size=0.5))
    assert report["splits"]["train"]["columns_not_read"] == ["context"]
    console = Console(width=80, record=True)
    print_report(report, console)
    printed = console.export_text()
    assert "train, unknown_role: row 1 (role 'judge')" in printed
    assert printed.count("Columns not read: context.") == 1


def test_names_in_brackets_are_printed_as_they_are(write_recipe, tmp_path):
    rows = [{**row, "subset": "[/INST] [red]"} for row in make_rows(30, seed=1)]
    rows[0]["chosen"] = ""
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    console = Console(width=80, record=True)
    print_report(report_of(write_recipe(dataset_name=str(path), test_split_size=0.5)), console)
    assert "train, empty_response: row [/INST] [red]:1" in console.export_text()


@needs_hh_rlhf
@pytest.mark.parametrize(
    ("subset", "longer", "share"), [("harmless-base", 0.445, 0.37), ("helpful-base", 0.61, 0.37)]
)
def test_genuine_hh_rlhf_is_as_it_was_counted_before(write_recipe, tiny_llama, subset, longer, share):
    """The official harmless-base test split, of which this is a part: longer wins 0.445, shared 37 %."""
    recipe = read_recipe(write_recipe(dataset_name=str(HH_RLHF), dataset_subsets=[subset]))
    train_split, test_split, leakage = load_splits(recipe)
    assert leakage.comparisons == 0
    tokenizer = load_tokenizer(str(tiny_llama))
    for split in (train_split, test_split):
        figures = examine_split(tokenize(split, tokenizer, None, "exclude"), "exclude")
        assert figures["duplicates"]["exact"] == 0
        assert figures["baselines"]["longer_wins"] == pytest.approx(longer, abs=0.03)
        assert figures["shared_prefix_share"] == pytest.approx(share, abs=0.05)
