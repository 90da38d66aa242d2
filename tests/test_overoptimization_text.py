"""One sentence says what a proxy is worth, and is right about a pair that is known."""

import numpy as np
import pytest
from rich.console import Console
from test_best_of_n import simulated

from rm_recipe.best_of_n import curve
from rm_recipe.overoptimization_text import print_overoptimization, verdict, warnings

PROXY, PEAKED = simulated(200)
NOISE = np.random.default_rng(5).normal(size=PROXY.shape)


@pytest.mark.parametrize(
    ("proxy", "gold", "kind", "said"),
    [
        (PROXY, PEAKED, "bad", "Over-optimised: by gold the best of n peaks at n = "),
        (
            PROXY,
            PROXY + NOISE,
            "good",
            "No over-optimisation up to n = 64 (square root of KL 1.78): gold still",
        ),
        (PROXY, -PROXY, "bad", "Choosing by this proxy makes replies worse by gold: \N{MINUS SIGN}1."),
        (PROXY[:20], NOISE[:20], "bad", "Choosing by this proxy gains nothing certain by gold: "),
        (PROXY[:1], PEAKED[:1], "plain", "One prompt gives no interval: by gold its best of n peaks at n = "),
        (0 * PROXY, PEAKED, "bad", "This proxy gives all replies to a prompt the same reward"),
        (
            PROXY[:, :2],
            PROXY[:, :2] + NOISE[:, :2] / 9,
            "plain",
            "cannot be told from these prompts (too few",
        ),
    ],
)
def test_the_verdict(proxy, gold, kind, said):
    found, sentence = verdict(curve(proxy, proxy), curve(proxy, gold))
    assert found == kind
    assert said in sentence
    assert sentence.count(". ") == 0  # one sentence


def test_a_flat_gold_is_called_flat():
    flat = np.minimum((PROXY - PROXY.min(axis=1, keepdims=True)) / 5, 0.75)[:40] + NOISE[:40] / 3
    kind, sentence = verdict(curve(PROXY[:40], PROXY[:40]), curve(PROXY[:40], flat))
    assert kind in ("plain", "bad")
    assert "Gold has gained" in sentence or "peaks" in sentence


def test_what_fools_the_proxy_and_a_gold_that_is_the_proxy_are_pointed_out():
    found = {
        "agreement": {"mean": 0.995},
        "edits": {"thank_you": {"fooled": 0.5}, "markdown": {"fooled": 0.1}},
    }
    one, other = warnings(found)
    assert "is it the same model?" in one
    assert other == "With a thank-you added 50.0 % of replies gain by this proxy and not by gold."
    assert warnings({"agreement": {"mean": 0.5}, "edits": {}}) == []


def test_the_table_fits_80_columns(capsys):
    by_proxy, by_gold = curve(PROXY, PROXY), curve(PROXY, PEAKED)
    found = {
        "verdict": verdict(by_proxy, by_gold)[1], "kind": "bad", "proxy": by_proxy.as_dict(),
        "gold": by_gold.as_dict(), "agreement": {"mean": 0.5, "ci95": None}, "edits": {},
    }  # fmt: skip
    content = {
        "samples": {"n_prompts": 200, "n_replies": 64, "excluded": {"does_not_fit_a_model": 3}},
        "curves": {"outputs/overoptimization/proxy_100": found, "mean of the proxies": found},
    }
    console = Console(width=80)
    print_overoptimization(content, console)
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "Best of 64 replies to each of 200 prompts, 3 prompts left out" in out
    assert "mean of the proxies: Over-optimised" in out
