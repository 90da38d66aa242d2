"""What is drawn is what was counted, in the page's colours, the same bytes each time."""

import re

import matplotlib
import numpy as np
import pytest

from rm_recipe.evaluation import plots

MARGINS = np.random.default_rng(0).normal(1, 2, 500)
DRAWINGS = {
    "rewards": lambda name: plots.rewards([1.0, 2.5, 2.0], [0.5, -1.0, 0.0], name, "label"),
    "margins": lambda name: plots.margins(MARGINS, name, "label"),
    "reliability": lambda name: plots.reliability([(0.55, 0.5, 20), (0.9, 0.8, 60)], name, "label"),
    "accuracy_by": lambda name: plots.accuracy_by([("a", 5, 0.6, 0.5, 0.7)], "tokens", name, "label"),
    "curves": lambda name: plots.curves(
        {"train": [(1, 0.7), (2, 0.5)]}, "loss", name, "label", (0.69, "ln 2")
    ),
}
each_drawing = pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)


def boxes(svg, prefix):
    """For each bar the number in its id -> its (left, width, height), in points."""
    found = {}
    for number, path in re.findall(rf'<g id="{prefix}-(\d+)">\s*<path d="([^"]*)"', svg):
        points = np.array(re.findall(r"[ML] (\S+) (\S+)", path), float)
        left, top = points.min(0)
        right, bottom = points.max(0)
        found[int(number)] = (left, right - left, bottom - top)
    return found


@pytest.mark.parametrize(
    "values", [MARGINS, [0.0], [3.0, 3.0], [-1e-9, 1e9], [0.3, 0.6, 0.7], [-5.0, -4.9], [1e300, -1e300], []]
)
def test_every_value_is_counted_and_no_bar_holds_both_signs(values):
    edges = plots.edges_around_zero(values)
    counts = plots.counts_between(values, edges)
    assert counts.sum() == len(values)
    assert np.all(np.diff(edges) > 0)
    assert not np.any((edges[:-1] < -1e-9 * abs(edges).max()) & (edges[1:] > 1e-9 * abs(edges).max()))
    negative = edges[:-1] < -(edges[1] - edges[0]) / 2
    assert counts[negative].sum() == np.sum(np.asarray(values, float) < 0)


def test_bars_are_as_high_and_as_far_apart_as_the_counts():
    svg = plots.margins(MARGINS, "m", "label")
    edges = plots.edges_around_zero(MARGINS)
    counts = plots.counts_between(MARGINS, edges)
    drawn = {**boxes(svg, "m-wrong"), **boxes(svg, "m-right")}
    assert set(drawn) == set(np.flatnonzero(counts))
    tallest = int(counts.argmax())
    for number, (left, width, height) in drawn.items():
        assert height / drawn[tallest][2] == pytest.approx(counts[number] / counts[tallest], abs=1e-3)
        assert left - drawn[tallest][0] == pytest.approx((number - tallest) * width, abs=1e-2)
    wrong = sum(counts[number] for number in boxes(svg, "m-wrong"))
    assert wrong == (MARGINS < 0).sum()


def test_ties_are_drawn_as_neither_right_nor_wrong():
    svg = plots.margins([0.0, 0.0, 0.0], "m", "label")
    assert not boxes(svg, "m-wrong")
    assert not boxes(svg, "m-right")
    assert 'id="m-tie"' in svg or ">tie<" in svg


def test_points_stand_where_the_figures_are():
    svg = plots.reliability([(0.6, 0.6, 10), (0.7, 0.7, 10), (0.9, 0.8, 30)], "r", "label")
    line = re.search(r'<g id="r-model">\s*<path d="([^"]*)"', svg)[1]
    x, y = np.array(re.findall(r"[ML] (\S+) (\S+)", line), float).T
    assert (x[2] - x[1]) / (x[1] - x[0]) == pytest.approx(2, abs=1e-3)
    assert (y[2] - y[1]) / (y[1] - y[0]) == pytest.approx(1, abs=1e-3)
    assert y[1] < y[0]  # a higher accuracy is further up


def test_a_value_that_is_none_leaves_a_gap_in_its_line():
    nan = float("nan")
    svg = plots.curves({"train": [(1, 0.7), (2, 0.6), (3, nan), (4, 0.5), (5, 0.4)]}, "loss", "c", "label")
    line = re.search(r'<g id="c-line-train">\s*<path d="([^"]*)"', svg)[1]
    assert line.count("M") == 2


@each_drawing
def test_the_same_numbers_give_the_same_bytes(draw):
    assert draw("x") == draw("x")


@each_drawing
def test_a_drawing_takes_its_colours_from_the_page_and_nothing_from_elsewhere(draw):
    svg = draw("x")
    assert {"var(--chosen)", "var(--muted)", "var(--line)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    assert not re.findall(r"http|<style|<metadata|<script|xlink|width=\"\d+pt", svg)
    assert svg.startswith("<svg viewBox=")
    assert 'role="img" aria-label="label"' in svg


@each_drawing
def test_ids_begin_with_the_name_and_every_reference_is_answered(draw):
    svg = draw("x")
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert all(found.startswith("x-") for found in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= set(ids)
    assert not set(ids) & set(re.findall(r'\bid="([^"]*)"', draw("y")))


def test_the_users_settings_change_nothing_and_stay():
    usual = DRAWINGS["curves"]("x")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert DRAWINGS["curves"]("x") == usual
        assert matplotlib.rcParams["font.size"] == 30


def test_labels_are_text_that_is_escaped_and_no_formula():
    buckets = [("<b>$x^2$ & \u202e\x07", 5, 0.6, 0.5, 0.7)]
    svg = plots.accuracy_by(buckets, "tokens", "x", 'a "quoted" <label>')
    assert "&lt;b&gt;$x^2$ &amp; [U+202E]\u2407" in svg
    assert 'aria-label="a &quot;quoted&quot; &lt;label&gt;"' in svg
