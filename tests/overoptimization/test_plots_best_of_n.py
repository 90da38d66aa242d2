"""The picture shows what was measured, the same bytes each time."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from test_best_of_n import simulated

from rm_recipe.overoptimization.best_of_n import curve
from rm_recipe.overoptimization.page import Panel, best_of_n, save_best_of_n

PROXY, GOLD = simulated(40, replies=32)
CURVES = {"proxy": curve(PROXY, PROXY).as_dict(), "gold": curve(PROXY, GOLD).as_dict()}
ONE = {"proxy": curve(PROXY[:1], PROXY[:1]).as_dict(), "gold": curve(PROXY[:1], GOLD[:1]).as_dict()}
TWO = {
    name: curve(PROXY[:, :2], values[:, :2]).as_dict() for name, values in (("proxy", PROXY), ("gold", GOLD))
}


@pytest.mark.parametrize("panels", [1, 2, 3, 5])
def test_each_proxy_has_its_panel_with_its_peak(panels):
    svg = best_of_n([Panel(f"proxy {number}", CURVES) for number in range(panels)], "n", "spoken <b>")
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert [text for text in texts if text.startswith("proxy ")] == [f"proxy {i}" for i in range(panels)]
    assert texts.count(f"gold peaks, n = {CURVES['gold']['peak_n']}") == panels
    assert texts.count("gold, fitted") == panels
    assert 'aria-label="spoken &lt;b&gt;"' in svg
    assert not re.search(r"#[0-9a-f]{6}", svg.replace("#n-", ""))  # the page's colours alone


def test_the_same_figures_give_the_same_bytes(tmp_path):
    panels = [Panel("a", CURVES), Panel("b", ONE)]
    assert best_of_n(panels, "n", "l") == best_of_n(panels, "n", "l")
    for name in ("1.svg", "2.svg"):
        save_best_of_n(panels, tmp_path / name)
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "1.svg").getroot().tag.endswith("svg")


def test_the_gold_line_ends_where_it_was_measured():
    """The last point of gold lies below that of the proxy by as much as the figures say."""
    svg = best_of_n([Panel("a", CURVES)], "n", "l")
    ends = []
    for colour in ("chosen", "rejected"):
        path = re.search(rf'<path d="([^"]*)"[^>]*style="[^"]*stroke: var\(--{colour}\)', svg)[1]
        points = np.array(re.findall(r"[ML] (\S+) (\S+)", path), float)
        ends.append((points[0, 1], points[-1, 1]))
    (start, proxy_end), (gold_start, gold_end) = ends
    assert start == pytest.approx(gold_start)
    drawn = (gold_start - gold_end) / (start - proxy_end)
    assert drawn == pytest.approx(CURVES["gold"]["gain"][-1] / CURVES["proxy"]["gain"][-1], rel=1e-3)


@pytest.mark.parametrize("curves", [ONE, TWO])
def test_without_intervals_or_a_fit_there_is_a_picture_all_the_same(curves):
    assert best_of_n([Panel("$x$ <b>", curves)], "n", "l").count("<svg") == 1
