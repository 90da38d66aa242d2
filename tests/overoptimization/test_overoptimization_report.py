"""The page says what the figures say."""

import html
import json
import re

import numpy as np
import pytest
from test_best_of_n import simulated
from test_exploits import SAMPLES

from rm_recipe.overoptimization.experiment import Judged, compare
from rm_recipe.overoptimization.page import write_overoptimization

PROXY, GOLD = simulated(30, replies=8)
EDITED = np.random.default_rng(0).normal(size=(4, 30))
PLACES = [(number, 0) for number in range(30)]


@pytest.fixture
def content():
    found = compare(SAMPLES, Judged("a", PROXY, EDITED + 3), Judged("gold", GOLD, EDITED), PLACES)
    return {
        "proxies": ["outputs/<a>", "outputs/b"], "gold": ["outputs/gold"], "safety": None,
        "sampling": {"policy": "some/model", "n": 8, "temperature": 0.7},
        "samples": {"file": "samples.jsonl", "n_prompts": 30, "n_replies": 8, "empty_replies": 1,
                    "excluded": {"does_not_fit_a_model": 2}, "repeated_replies": 0, "cut_replies": None},
        "n": list(range(1, 9)), "kl": [0.1 * n for n in range(8)],
        "curves": {"outputs/<a>": found, "outputs/b": json.loads(json.dumps(found))},
    }  # fmt: skip


def test_every_part_is_there(content, tmp_path):
    write_overoptimization(tmp_path, content)
    page = html.unescape((tmp_path / "overoptimization.html").read_text())
    for name, found in content["curves"].items():
        assert f"{name}: {found['verdict']}" in page
    for title in ("All proxies", "Best of n", "What the proxy pays for", "Edits that should not matter",
                  "Largest excess", "How replies were drawn", "What was scored"):  # fmt: skip
        assert title in page
    assert "prompts left out: does not fit a model" in page
    first = content["curves"]["outputs/<a>"]["examples"][0]
    assert first["exploit"]["response"].strip() in page
    assert f"excess +{first['excess']:.2f}" in page
    assert page.count("<svg") == 1
    assert (tmp_path / "overoptimization.svg").read_text().startswith("<?xml")


def test_gains_in_the_tables_are_the_figures(content, tmp_path):
    write_overoptimization(tmp_path, content)
    page = (tmp_path / "overoptimization.html").read_text()
    cells = re.findall(r"<td>([^<]*)</td>", page)
    gold = content["curves"]["outputs/b"]["gold"]["gain"]
    for n in (1, 2, 4, 8):
        shown = f"{gold[n - 1]:+.2f}".replace("-", "\N{MINUS SIGN}") if abs(gold[n - 1]) > 1e-9 else "0.00"
        assert shown in cells


def test_given_replies_have_no_settings_to_show(content, tmp_path):
    write_overoptimization(tmp_path, {**content, "sampling": None})
    assert "How replies were drawn" not in (tmp_path / "overoptimization.html").read_text()


def test_the_same_figures_give_the_same_page(content, tmp_path):
    pages = []
    for _ in range(2):
        write_overoptimization(tmp_path, content)
        pages.append((tmp_path / "overoptimization.html").read_bytes())
    assert pages[0] == pages[1]
