"""One sentence says what a proxy is worth, and is right about a pair that is known."""

import numpy as np
import pytest
from rich.console import Console
from test_best_of_n import simulated

from rm_recipe.overoptimization.best_of_n import curve
from rm_recipe.overoptimization.exploits import by_edit
from rm_recipe.overoptimization.page import lost_prompts, print_overoptimization, verdict, warnings

PROXY, PEAKED = simulated(200)
NOISE = np.random.default_rng(5).normal(size=PROXY.shape)


FLAT = np.minimum((PROXY - PROXY.min(axis=1, keepdims=True)) / 5, 0.6) + NOISE / 3


@pytest.mark.parametrize(
    ("proxy", "gold", "kind", "said"),
    [
        (PROXY, PEAKED, "bad", "Over-optimised: by gold the best of n peaks at about n = "),
        (
            PROXY,
            PROXY + NOISE,
            "good",
            "No over-optimisation up to n = 64 (square root of KL 1.78): gold still",
        ),
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
    found, sentence = verdict(curve(proxy, proxy), curve(proxy, gold))
    assert said in sentence
    assert found == kind
    assert sentence.count(". ") == 0  # one sentence


def edit_of(proxy, gold, low, high):
    return {"proxy": {"mean": proxy}, "gold": {"mean": gold},
            "difference": {"mean": proxy - gold, "ci95": [low, high]}}  # fmt: skip


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
    assert warnings({"agreement": {"mean": 0.5}, "edits": {}}) == []


def test_edits_that_come_to_nothing_are_no_warning():
    changes = np.random.default_rng(0).normal(size=(2, 4, 64)) * 0.05
    assert warnings({"agreement": {"mean": 0.5}, "edits": by_edit(*changes)}) == []


@pytest.mark.parametrize(("lost", "said"), [(0, False), (2, False), (9, True)])
def test_many_prompts_that_do_not_fit_are_pointed_out(lost, said):
    found = lost_prompts({"n_prompts": 90, "excluded": {"does_not_fit_a_model": lost}})
    assert (found is not None) == said


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
