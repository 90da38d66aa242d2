"""One line a comparison, and the text of those that are shown."""

import numpy as np
from datasets import Dataset
from test_figures import make_scored

from rm_recipe.data.dataset import Split
from rm_recipe.evaluation.summary import SHOWN, examples, predictions, read_predictions, write_predictions


def make_split(n: int) -> Split:
    prompt = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": prompt, "responses": [f"good {i}", f"bad {i}"], "ranks": [0, 1], "margins": [],
         "subset": "", "row": 10 + i}
        for i in range(n)
    ]  # fmt: skip
    return Split(Dataset.from_list(rows), n)


def test_the_worst_mistakes_and_the_closest_of_the_others_are_shown():
    margins = np.array([-5.0, 3.0, 0.1, -0.2, -7.0, 0.0])
    right = (np.sign(margins) + 1) / 2
    assert examples(margins, right) == {"mistake": [4, 0, 3], "close": [5, 2, 1]}
    many = np.linspace(-1, 1, 200)
    found = examples(many, (many > 0).astype(float))
    assert [len(found[kind]) for kind in ("mistake", "close")] == [SHOWN, SHOWN]
    assert not set(found["mistake"]) & set(found["close"])


def test_only_what_is_shown_carries_its_text():
    rewards = [[float(i), 50.0] for i in range(60)]
    lines = predictions("x", make_split(60), make_scored(rewards))
    assert [line["index"] for line in lines if line.get("shown") == "mistake"] == list(range(10))
    assert [line["index"] for line in lines if line.get("shown") == "close"] == list(range(45, 55))
    assert all(("text" in line) == ("shown" in line) for line in lines)
    assert lines[3]["text"]["responses"] == ["good 3", "bad 3"]
    assert (lines[3]["row"], lines[3]["margin"], lines[3]["tokens"]) == (13, -47, [5, 6])


def test_lines_of_other_data_sets_stay_and_those_of_the_same_one_go(tmp_path):
    write_predictions(tmp_path, [{"dataset": "a", "index": 0}, {"dataset": "b", "index": 0}])
    write_predictions(tmp_path, [{"dataset": "a", "index": 1}])
    assert read_predictions(tmp_path) == [{"dataset": "b", "index": 0}, {"dataset": "a", "index": 1}]
