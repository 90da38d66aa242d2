"""What more comparisons bring: runs of several sizes, and the line through them."""

import json

import numpy as np
import pytest
from scipy.special import expit
from statsmodels.stats.proportion import proportion_confint

from rm_recipe.errors import RecipeError
from rm_recipe.tools.curve import curve, fit, print_curve


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
    assert "Twice the comparisons of the largest run would change" in said
    assert "96 would give" in said
    for n in (16, 32, 48):
        page = " ".join((output / str(n) / "report.html").read_text().split())
        assert f"{found['points'][2]['accuracy']:.3f} at 48." in page
        assert "Twice the comparisons of the largest run would change accuracy by" in page
    assert curve(path, [], [16, 48], output)["points"] == [found["points"][0], found["points"][2]]
    assert capfd.readouterr().out.count("finished already") == 4  # two trainings, two evaluations


def points_of(sizes, accuracies, n_test=2000):
    """As `curve` has them, with Wilson's intervals."""
    ends = [proportion_confint(round(accuracy * n_test), n_test, method="wilson") for accuracy in accuracies]
    rows = zip(sizes, accuracies, ends, strict=True)
    return [{"comparisons": int(n), "accuracy": a, "accuracy_ci95": [*end]} for n, a, end in rows]


def test_the_line_is_the_one_that_was_planted():
    """And its intervals cover the truth as often as they say."""
    sizes, n_test, covered, off = np.array([400, 800, 1600, 3200]), 2000, 0, 0
    truth = expit(0.1 * np.log2(sizes / 50))
    of_6400, of_next = expit(0.1 * np.log2(6400 / 50)), expit(0.1 * np.log2(6400 / 50)) - truth[-1]
    for seed in range(300):
        seen = np.random.default_rng(seed).binomial(n_test, truth) / n_test
        found = fit(points_of(sizes, seen, n_test))
        (low, high), (least, most) = found["expected"][0]["ci95"], found["per_doubling"]["ci95"]
        covered += int(low <= of_6400 <= high) + int(least <= of_next <= most)
        off += found["p_value"] < 0.05
    assert 540 <= covered <= 594
    assert 4 <= off <= 28
    assert [point["comparisons"] for point in found["expected"]] == [6400, 12800]


def test_a_curve_that_levels_off_is_told_and_none_ends_above_1(capsys):
    content = {"points": points_of([360, 720, 1440, 2880, 5760], [0.58, 0.68, 0.83, 0.9, 0.92])}
    content |= fit(content["points"])
    assert all(max(point["ci95"]) < 1 for point in content["expected"])
    print_curve(content)
    assert "not lie on one line" in capsys.readouterr().out
    straight = {"points": points_of([400, 800, 1600], [0.64, 0.66, 0.68])}
    print_curve(straight | fit(straight["points"]))
    said = capsys.readouterr().out
    assert "not lie on one line" not in said
    assert "No interval allows for another seed" in said


@pytest.mark.parametrize(
    ("samples", "said"), [([16], "two numbers"), ([0, 16], "two numbers"), ([16, 4000], "64 train")]
)
def test_a_curve_that_cannot_be_drawn_is_refused_before_a_training(write_recipe, tmp_path, samples, said):
    with pytest.raises(RecipeError, match=said):
        curve(write_recipe(), [], samples, tmp_path / "curve")
    assert not (tmp_path / "curve").exists()
