"""One sentence says what a proxy is worth, and is right where that is known; the page says the same."""

import html
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from rich.console import Console
from test_best_of_n import simulated
from test_exploits import SAMPLES

from rm_recipe.evaluation.format import MISSING
from rm_recipe.overoptimization.best_of_n import curve
from rm_recipe.overoptimization.experiment import compare
from rm_recipe.overoptimization.page import print_overoptimization, verdict, warnings, write_overoptimization

PROXY, PEAKED = simulated(200)
NOISE = np.random.default_rng(5).normal(size=PROXY.shape)
FLAT = np.minimum((PROXY - PROXY.min(axis=1, keepdims=True)) / 5, 0.6) + NOISE / 3


@pytest.mark.parametrize(
    ("proxy", "gold", "kind", "said"),
    [
        (PROXY, PEAKED, "bad", "Over-optimised: by gold the best of n peaks at about n = "),
        (PROXY, PROXY + NOISE, "good", "No over-optimisation up to n = 64 (square root of KL 1.78): gold"),
        (PROXY, -PROXY, "bad", "Choosing by this proxy makes replies worse by gold: \N{MINUS SIGN}1."),
        (PROXY[:40], NOISE[:40], "bad", "Choosing by this proxy gains nothing certain by gold: "),
        (PROXY, FLAT, "plain", "is neither a rise nor a fall for certain"),
        (PROXY[:1], PEAKED[:1], "plain", "1 prompt is too few to tell: by gold "),
        (PROXY[:19], PROXY[:19], "plain", "19 prompts are too few to tell: by gold "),
        (0 * PROXY, PEAKED, "bad", "This proxy gives all replies to a prompt the same reward"),
        (PROXY[:, :2], PROXY[:, :2] + NOISE[:, :2] / 9, "good", "gold still rises, by +"),
    ],
)
def test_the_verdict(proxy, gold, kind, said):
    found, sentence = verdict(curve(proxy, proxy), curve(proxy, gold), len(proxy))
    assert said in sentence
    assert found == kind
    assert sentence.count(". ") == 0  # one sentence


def edit_of(proxy, gold, low, high):
    difference = {"mean": proxy - gold, "ci95": [low, high]}
    return {"proxy": {"mean": proxy}, "gold": {"mean": gold}, "difference": difference}


def test_what_fools_the_proxy_alone_and_a_gold_that_is_the_proxy_are_pointed_out():
    edits = {
        "thank_you": edit_of(0.5, 0.1, 0.2, 0.6),
        "markdown": edit_of(0.5, 0.4, -0.1, 0.3),  # gold may like it as well
        "trailing_space": edit_of(-0.2, -0.9, 0.5, 0.9),  # the proxy does not like it either
        "repeated_sentence": edit_of(0.02, 0.0, 0.01, 0.03),  # next to nothing
    }
    one, other = warnings({"agreement": {"mean": 0.995}, "edits": edits})
    assert "is it the same model?" in one
    assert other == "With a thank-you added replies gain 0.50 by this proxy and 0.10 by gold."


@pytest.fixture(scope="module")
def content():
    proxy, gold = simulated(30, replies=8)
    edits = np.random.default_rng(0).normal(size=(30, 5))
    found = compare(SAMPLES, np.hstack([proxy, edits + np.array([0, 3, 3, 3, 3])]), np.hstack([gold, edits]))
    counts = {"empty_replies": 1, "excluded": {"does_not_fit_a_model": 3}, "cut_replies": None}
    return {
        "proxies": ["outputs/<a>", "outputs/b"],
        "gold": ["outputs/gold"],
        "sampling": {"policy": "some/model", "n": 8, "temperature": 0.7},
        "samples": {"file": "samples.jsonl", "n_prompts": 30, "n_replies": 8, **counts},
        "n": list(range(1, 9)),
        "kl": [0.1 * n for n in range(8)],
        "curves": {"outputs/<a>": found, "outputs/b": found},
    }


def test_the_page_has_every_part_and_the_figures(content, tmp_path):
    write_overoptimization(tmp_path, content)
    raw = (tmp_path / "overoptimization.html").read_text()
    page, (name, found) = html.unescape(raw), next(iter(content["curves"].items()))
    titles = ["All proxies", "Best of n", "What the proxy pays for", "Edits that should not matter"]
    titles += ["Largest excess", "How replies were drawn", "What was scored"]
    first, n = found["examples"][0], "prompts left out: does not fit a model"
    said = [f"{name}: {found['verdict']}", *(f"<h3>{title}</h3>" for title in titles), n]
    said += [first["exploit"]["response"].strip(), f"excess +{first['excess']:.2f}"]
    assert [text for text in said if text not in page] == []
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", raw)
    assert MISSING not in cells  # as for a wrong name in the template
    gains = {f"{found['gold']['gain'][n - 1]:+.2f}".replace("-", "\N{MINUS SIGN}") for n in (2, 4, 8)}
    assert gains <= set(cells)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_overoptimization(tmp_path, content)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_overoptimization(tmp_path, {**content, "sampling": None})
    assert "How replies were drawn" not in (tmp_path / "overoptimization.html").read_text()


@pytest.mark.parametrize("shape", [(1, 8), (30, 2)])
def test_each_proxy_has_its_panel_also_without_intervals_or_a_fit(content, tmp_path, shape):
    proxy, gold = (rewards[: shape[0], : shape[1]] for rewards in simulated(30, replies=8))
    full = content["curves"]["outputs/b"]
    own = {**full, "proxy": curve(proxy, proxy), "gold": curve(proxy, gold)}
    curves = {"outputs/b": full, "$x$ <b>": own, "third": full}
    write_overoptimization(tmp_path, {**content, "n": content["n"][: shape[1]], "curves": curves})
    texts = [text.text for text in ElementTree.parse(tmp_path / "overoptimization.svg").iter() if text.text]
    titles = {f"{name}; gold peaks at n = {found['gold']['peak_n']}" for name, found in curves.items()}
    assert titles <= set(texts)
    drawn = re.search(r"<svg viewBox.*?</svg>", (tmp_path / "overoptimization.html").read_text(), re.DOTALL)
    assert not re.search(r"#[0-9a-f]{6}", drawn[0].replace("#curves-", ""))  # the page's colours alone


def test_the_table_on_the_terminal_fits_80_columns(content, capsys):
    found = content["curves"]["outputs/b"]
    curves = {"outputs/overoptimization/proxy_100": found, "mean of the proxies": found}
    print_overoptimization({**content, "curves": curves}, Console(width=80))
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "Best of 8 replies to each of 30 prompts, 3 prompts left out" in out
    assert "mean of the proxies: " in out
