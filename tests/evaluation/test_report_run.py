"""The training record and the data report, as tables, curves and sentences."""

import re

from rm_recipe.evaluation.report import cost, data_tables, leakage_words, training_pictures, versions

LOG = [
    {"step": 10, "loss": 0.69, "accuracy": 0.5, "learning_rate": 1e-4, "grad_norm": None},
    {"step": 20, "loss": 0.5, "accuracy": 0.7, "learning_rate": 5e-5, "grad_norm": None},
    {"step": 20, "eval_loss": 0.6},
    {"step": 20, "train_runtime": 3.0, "train_loss": 0.6},
]


def test_a_curve_is_drawn_for_each_quantity_that_has_values():
    pictures = training_pictures({"log": LOG})
    assert [picture.title for picture in pictures] == ["Loss", "Accuracy", "Learning rate"]
    assert 'id="training-loss-line-train"' in pictures[0].svg
    assert 'id="training-loss-line-held"' in pictures[0].svg
    assert "line-held" not in pictures[1].svg
    assert "train ends at 0.5, held out ends at 0.6" in pictures[0].svg


def test_no_log_gives_no_curve():
    for log in (
        None,
        [],
        [None, 3],
        [{"loss": 0.5}],
        [{"step": None, "loss": 0.5}],
        [{"step": 1, "loss": "x"}],
    ):
        assert training_pictures({"log": log}) == []


def test_a_log_of_one_step_is_a_point():
    (picture,) = training_pictures({"log": [{"step": 1, "loss": 0.5}]})
    assert re.search(r"<use [^>]*x=", picture.svg)


def test_cost_is_told_in_units():
    table = cost({"train_seconds": 235.5, "peak_memory_bytes": 2**31, "comparisons_per_s": 13.59,
                  "steps": 1200,
                  "prefix_sharing": {"used": False, "reason": "no causal classifier"}})  # fmt: skip
    assert {tuple(row.cells) for row in table.rows} == {
        ("optimiser steps", "1,200"),
        ("training time", "3 min 56 s"),
        ("comparisons per second", "13.6"),
        ("peak memory", "2.0 GiB"),
        ("prompts encoded once for both responses", "no (no causal classifier)"),
    }
    assert cost({}) is None


def test_versions_name_what_a_repetition_needs():
    table = versions(
        {"seed": 0, "versions": {"torch": "2.13.0", "peft": None}, "data_fingerprints": {"held_out": "85e0"}}
    )
    assert [row.cells for row in table.rows] == [
        ["torch", "2.13.0"], ["seed", "0"], ["fingerprint of held out data", "85e0"],
    ]  # fmt: skip
    assert versions({}) is None


def test_each_split_is_a_column_and_a_reason_of_one_is_zero_in_the_other():
    report = {"splits": {"train": {"rows": 8000, "excluded": {"too_long": 5}}, "test": {"rows": 9}}}
    (table,) = data_tables(report)
    assert table.head == ["", "train", "test"]
    assert [row.cells for row in table.rows] == [
        ["rows read", "8,000", "9"],
        ["left out: too long", "5", "0"],
    ]
    assert data_tables({}) == data_tables({"splits": None}) == []


def test_leakage_is_told_with_what_became_of_it():
    found = {"prompts": 2, "comparisons": 7}
    assert "7 training comparisons stand on 2 held-out prompts; they were left out" in leakage_words(
        {"leakage": {**found, "policy": "drop"}}
    )
    assert "trained on all the same" in leakage_words({"leakage": {**found, "policy": "allow"}})
    assert "No held-out prompt" in leakage_words({"leakage": {"comparisons": 0}})
    assert leakage_words({"held_out_by_prompt": 0.1}).startswith("10.0 % of the prompts")
    assert leakage_words({}) == leakage_words({"leakage": None}) == ""
