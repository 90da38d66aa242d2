"""Pictures hold their numbers, ask for nothing, and are the same bytes whatever the user's settings."""

import base64
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from rm_recipe.evaluation import plots

MARGINS = np.random.default_rng(0).normal(1, 2, 500)
LINES = [{"rewards": [margin, 0.0], "ranks": [0, 1], "margin": margin} for margin in [*MARGINS, 0.0]]
LOG = [{"step": 1, "loss": 0.7, "grad_norm": None}, {"step": 2, "loss": 0.6, "eval_loss": 0.65}]


@pytest.mark.parametrize("values", [MARGINS, [0.0], [3.0, 3.0], [-1e-9, 1e9], [0.3, 0.6, 0.7], [-5.0, -4.9]])
def test_every_value_is_in_a_bar_and_no_bar_holds_both_signs(values):
    edges = np.array(plots.edges_of(values))
    assert np.histogram(values, edges)[0].sum() == len(values)
    small = 1e-9 * abs(edges).max()
    assert not np.any((edges[:-1] < -small) & (edges[1:] > small))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("draw_rewards", {"lines": LINES}, {"chosen", "rejected"}),
        ("draw_margins", {"lines": LINES}, {"right", "wrong", "tie"}),
        ("draw_reliability", {"bins": [{"confidence": 0.9, "accuracy": 0.8, "n": 60}]}, {"model", "ideal"}),
        ("draw_curves", {"log": LOG}, {"held out", "grad norm"}),
    ],
)
def test_a_drawing_is_an_image_of_its_own_whatever_the_users_settings(name, data, said):
    draw, label = getattr(plots, name), 'a "quoted" <label> \u202e'
    image = plots.svg(draw, label, **data)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert plots.svg(draw, label, **data) == image
        assert matplotlib.rcParams["font.size"] == 30
    source, spoken = re.findall(r'^<img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)">$', image)[0]
    assert spoken == "a &#34;quoted&#34; &lt;label&gt; [U+202E]"
    assert said <= {element.text for element in ElementTree.fromstring(base64.b64decode(source)).iter()}
