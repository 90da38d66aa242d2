"""Pictures take their colours from the page, nothing from elsewhere, and are the same bytes each time."""

import re

import matplotlib
import numpy as np
import pytest

from rm_recipe.evaluation import plots

MARGINS = np.random.default_rng(0).normal(1, 2, 500)
LINES = [{"rewards": [margin, 0.0], "ranks": [0, 1], "margin": margin} for margin in [*MARGINS, 0.0]]
LOG = [{"step": 1, "loss": 0.7, "grad_norm": None}, {"step": 2, "loss": 0.6, "eval_loss": 0.65}]
DRAWINGS = {
    "draw_rewards": {"lines": LINES},
    "draw_margins": {"lines": LINES},
    "draw_reliability": {"bins": [{"confidence": 0.9, "accuracy": 0.8, "n": 60}]},
    "draw_curves": {"log": LOG},
}


def drawn(name, label="label"):
    return plots.svg(getattr(plots, name), "x", label, **DRAWINGS[name])


@pytest.mark.parametrize("values", [MARGINS, [0.0], [3.0, 3.0], [-1e-9, 1e9], [0.3, 0.6, 0.7], [-5.0, -4.9]])
def test_every_value_is_in_a_bar_and_no_bar_holds_both_signs(values):
    edges = np.array(plots.edges_of(values))
    assert np.histogram(values, edges)[0].sum() == len(values)
    small = 1e-9 * abs(edges).max()
    assert not np.any((edges[:-1] < -small) & (edges[1:] > small))


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_a_part_of_its_page_whatever_the_users_settings(name):
    svg = drawn(name)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert drawn(name) == svg
        assert matplotlib.rcParams["font.size"] == 30
    assert {"var(--muted)", "var(--line)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not re.findall(r"#[0-9a-f]{6}", svg.replace("#x-", ""))
    assert not re.findall(r"http|<style|<metadata|<script|xlink|width=\"\d+pt", svg)
    assert re.match(r'<svg viewBox="[^"]*" role="img" aria-label="label">', svg)
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert all(found.startswith("x-") for found in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= set(ids)


def test_a_label_is_text_that_is_escaped():
    assert 'aria-label="a &quot;quoted&quot; &lt;label&gt; [U+202E]"' in drawn(
        "draw_curves", 'a "quoted" <label> \u202e'
    )
