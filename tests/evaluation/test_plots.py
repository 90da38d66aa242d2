"""Pictures take their colours from the page, nothing from elsewhere, and are the same bytes each time."""

import re

import matplotlib
import numpy as np
import pytest

from rm_recipe.evaluation import plots

MARGINS = np.random.default_rng(0).normal(1, 2, 500)
PART = {"n": 5, "accuracy": 0.6, "accuracy_ci95": [0.5, 0.7]}
DRAWINGS = {
    "rewards": lambda name: plots.rewards([1.0, 2.5, 2.0], [0.5, -1.0, 0.0], name, "label"),
    "margins": lambda name: plots.margins(MARGINS, name, "label"),
    "ties": lambda name: plots.margins([0.0, 0.0], name, "label"),
    "reliability": lambda name: plots.reliability([(0.55, 0.5, 20), (0.9, 0.8, 60)], name, "label"),
    "accuracy_by": lambda name: plots.accuracy_by([{"label": "a", **PART}], "tokens", name, "label"),
    "curves": lambda name: plots.curves(
        {"train": [(1, 0.7), (2, float("nan")), (3, 0.5)]}, "loss", name, "label", (0.69, "ln 2")
    ),
}


@pytest.mark.parametrize("values", [MARGINS, [0.0], [3.0, 3.0], [-1e-9, 1e9], [0.3, 0.6, 0.7], [-5.0, -4.9]])
def test_every_value_is_in_a_bar_and_no_bar_holds_both_signs(values):
    edges = np.array(plots.edges_of(values))
    assert np.histogram(values, edges)[0].sum() == len(values)
    small = 1e-9 * abs(edges).max()
    assert not np.any((edges[:-1] < -small) & (edges[1:] > small))


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_a_drawing_is_a_part_of_its_page(draw):
    svg = draw("x")
    assert svg == draw("x")
    assert {"var(--muted)", "var(--line)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not re.findall(r"#[0-9a-f]{6}", svg.replace("#x-", ""))
    assert not re.findall(r"http|<style|<metadata|<script|xlink|width=\"\d+pt", svg)
    assert re.match(r'<svg viewBox="[^"]*" role="img" aria-label="label">', svg)
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert all(found.startswith("x-") for found in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= set(ids)


def test_the_users_settings_change_nothing_and_stay():
    usual = DRAWINGS["curves"]("x")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert DRAWINGS["curves"]("x") == usual
        assert matplotlib.rcParams["font.size"] == 30


def test_labels_are_text_that_is_escaped_and_no_formula():
    buckets = [{"label": "<b>$x^2$ & \u202e", **PART}]
    svg = plots.accuracy_by(buckets, "tokens", "x", 'a "quoted" <label>')
    assert "&lt;b&gt;$x^2$ &amp; [U+202E]" in svg
    assert 'aria-label="a &quot;quoted&quot; &lt;label&gt;"' in svg
