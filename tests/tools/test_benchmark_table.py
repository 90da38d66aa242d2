"""Ratios of a benchmark, and what is said where stock TRL ran out of memory."""

import io

from rich.console import Console

from rm_recipe.tools.benchmark import print_benchmark, summarise

SCORING = {"plain": [1, 2], "ours": [4, 10], "max_reward_difference": 0.0, "comparisons": 3}


def run(seconds, losses=(1.0, 0.5), memory=8):
    return {
        "comparisons": 10, "seconds": seconds, "tokens": 100, "padding": 25, "losses": list(losses),
        "peak_memory_bytes": memory, "flop_per_token": 1,
    }  # fmt: skip


def printed(content):
    target = io.StringIO()
    print_benchmark(content | {"setting": {"stock_batch": 2}}, Console(file=target, width=80))
    return target.getvalue()


def test_ratios_are_taken_within_a_repeat_so_that_a_slow_spell_cancels():
    results = {
        "stock": [run(4), run(40), run(4)],
        "stock_tuned": [run(2, memory=4), run(20, memory=4), run(8, memory=4)],
        "ours": [run(1, (1.0, 0.25)), run(10), run(2)],
    }
    content = summarise(results, SCORING)
    assert content["ratio"] == {
        "comparisons_per_s": 4, "peak_memory": 1, "tuned_comparisons_per_s": 2, "tuned_peak_memory": 2,
        "scoring": 4.5,
    }  # fmt: skip
    assert content["max_loss_difference"] == 0.25
    assert content["first_loss_difference"] == 0
    assert content["ours"]["padding_share"] == 0.2
    assert "4.00 times stock TRL's speed" in printed(content)


def test_without_stock_as_configured_its_smaller_batch_is_compared():
    ours = [run(1, (1.0, 0.25)), run(2)]
    content = summarise({"stock": [], "stock_tuned": [run(4), run(8)], "ours": ours}, SCORING)
    assert content["stock"] is None
    assert content["ratio"]["comparisons_per_s"] is content["ratio"]["peak_memory"] is None
    assert content["ratio"]["tuned_comparisons_per_s"] == 4
    assert content["max_loss_difference"] == 0.25
    text = printed(content)
    assert "out of memory" in text
    assert "times stock TRL's speed" not in text
    assert "4.00 times stock TRL at its best batch" in text


def test_without_stocks_smaller_batch_nothing_is_claimed_of_its_best():
    content = summarise({"stock": [run(4)], "stock_tuned": [], "ours": [run(1)]}, SCORING)
    assert content["ratio"]["comparisons_per_s"] == 4
    assert content["ratio"]["tuned_comparisons_per_s"] is content["ratio"]["tuned_peak_memory"] is None
    assert "best batch" not in printed(content)


def test_scoring_that_runs_out_of_memory_leaves_the_trainings_figures():
    content = summarise({"stock": [run(4)], "stock_tuned": [run(4)], "ours": [run(1)]}, None)
    assert content["scoring"] is content["ratio"]["scoring"] is None
    text = printed(content)
    assert "the padded loop ran out of memory" in text
    assert "4.00 times stock TRL's speed" in text


def test_without_any_stock_the_table_has_this_trainer_alone():
    content = summarise({"stock": [], "stock_tuned": [], "ours": [run(1)]}, SCORING)
    assert content["ratio"]["tuned_comparisons_per_s"] is content["max_loss_difference"] is None
    text = printed(content)
    assert text.count("out of memory") == 2
    assert "10.00" in text
