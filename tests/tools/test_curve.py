"""What more comparisons bring: runs of several sizes, and the line through them."""

import json

import numpy as np
import pytest

from rm_recipe.errors import RecipeError
from rm_recipe.tools.curve import curve, fit


def test_a_curve_has_a_run_for_each_size_and_makes_none_twice(write_recipe, tmp_path, capfd):
    path, output = write_recipe(num_train_epochs=1), tmp_path / "curve"
    found = curve(path, [], [48, 16, 32], output)
    runs = [json.loads((output / str(n) / "run.json").read_text()) for n in (16, 32, 48)]
    assert [run["comparisons"]["train"] for run in runs] == [16, 32, 48]
    points = [(point["comparisons"], point["accuracy"]) for point in found["points"]]
    evaluations = [json.loads((output / str(n) / "evaluation.json").read_text()) for n in (16, 32, 48)]
    accuracies = [content["datasets"]["held_out"]["accuracy"] for content in evaluations]
    assert points == list(zip((16, 32, 48), accuracies, strict=True))
    assert json.loads((output / "learning_curve.json").read_text()) == found
    assert (output / "learning_curve.svg").read_text().startswith("<?xml")
    said = capfd.readouterr().out
    assert "Twice the comparisons bring" in said
    assert "96 would give" in said
    assert curve(path, [], [16, 48], output)["points"] == [found["points"][0], found["points"][2]]
    assert capfd.readouterr().out.count("finished already") == 4  # two trainings, two evaluations


def test_the_line_is_the_one_that_was_planted():
    """And its interval covers the truth as often as it says."""
    sizes, n_test, covered = np.array([400, 800, 1600, 3200]), 2000, 0
    for seed in range(300):
        truth = 0.5 + 0.02 * np.log2(sizes / 100)
        seen = np.random.default_rng(seed).binomial(n_test, truth) / n_test
        half = 1.96 * np.sqrt(seen * (1 - seen) / n_test)
        points = [
            {"comparisons": int(n), "accuracy": a, "accuracy_ci95": [a - h, a + h]}
            for n, a, h in zip(sizes, seen, half, strict=True)
        ]
        found = fit(points)
        low, high = found["per_doubling"]["ci95"]
        covered += low <= 0.02 <= high
    assert 270 <= covered <= 297
    assert [point["comparisons"] for point in found["expected"]] == [6400, 12800]


@pytest.mark.parametrize(
    ("samples", "said"), [([16], "two numbers"), ([0, 16], "two numbers"), ([16, 4000], "64 train")]
)
def test_a_curve_that_cannot_be_drawn_is_refused_before_a_training(write_recipe, tmp_path, samples, said):
    with pytest.raises(RecipeError, match=said):
        curve(write_recipe(), [], samples, tmp_path / "curve")
    assert not (tmp_path / "curve").exists()
