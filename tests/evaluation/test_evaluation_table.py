"""The headline on the terminal, and what a reader has to know before believing it."""

import io

from rich.console import Console

from rm_recipe.evaluation.report import print_evaluation

FIGURES = {
    "n_scored": 990, "excluded": {"too_long": 10}, "accuracy": 0.7, "accuracy_ci95": [0.67, 0.73], "ties": 0,
    "loss": 0.6,
    "baselines": {"longer_wins": 0.55, "shorter_wins": 0.45, "bag_of_words": 0.61}, "beats_baselines": True,
    "trained_prompts": 0, "ranking": None,
}  # fmt: skip
GATE = {"target": 0.65, "statistic": "ci_low", "value": 0.67, "passed": True}


def printed(datasets: dict[str, dict], gate: dict | None = None, width: int = 80) -> str:
    output = io.StringIO()
    content = {"datasets": datasets, "gate": gate}
    print_evaluation(content, list(datasets), Console(file=output, width=width))
    return output.getvalue()


def test_accuracy_stands_beside_its_interval_and_the_best_rule():
    text = printed({"held_out": FIGURES}, GATE)
    for figure in ("0.700", "0.670 to 0.730", "990", "10", "0.610"):
        assert figure in text
    assert "Target 0.65 reached: the interval's lower end is 0.670." in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_gate_is_silent_where_the_held_out_split_was_not_evaluated():
    assert "Target" not in printed({"other": FIGURES}, GATE)


def test_remarks_stand_below_the_table_with_the_name_of_their_set():
    doubtful = FIGURES | {"ties": 60}
    assert "6.1 % of the pairs are ties" in printed({"held_out": doubtful})
    assert "b: 6.1 % of the pairs are ties" in printed({"a": FIGURES, "b": doubtful})


def test_names_cannot_command_the_terminal():
    text = printed({"\x1b[red]\u202e": FIGURES}, width=120)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\u241b[red][U+202E]" in text  # rich takes no markup in it either
