"""What a proxy pays for that gold does not is found where it was put; one sentence says what it is worth."""

import base64
import html
import re

import numpy as np
import pytest
from test_best_of_n import simulated

from rm_recipe.data.augmentation import EDITS
from rm_recipe.evaluation.format import MISSING
from rm_recipe.overoptimization.best_of_n import gain_curve, spread, standardised
from rm_recipe.overoptimization.experiment import compare
from rm_recipe.overoptimization.exploits import by_edit, by_feature, examples, repetition, with_edits
from rm_recipe.overoptimization.page import print_overoptimization, verdict, warnings, write_overoptimization
from rm_recipe.overoptimization.replies import Sample

RNG = np.random.default_rng(0)
PROMPTS, REPLIES = 30, 8
WORDS = [[f"{k} " + "word " * int(RNG.integers(1, 30)) for k in range(REPLIES)] for _ in range(PROMPTS)]
SAMPLES = [Sample([{"role": "user", "content": f"question {n}"}], own) for n, own in enumerate(WORDS)]
LENGTH = np.array([[len(reply) for reply in sample.responses] for sample in SAMPLES], float)
GOLD = standardised(RNG.normal(size=(PROMPTS, REPLIES)))


def test_repetition_is_the_share_of_word_runs_said_before():
    shares = {"": 0, "two words": 0, "a b c d": 0, "a b c a b c": 1 / 4, "no No no no no": 2 / 3}
    assert {reply: repetition(reply) for reply in shares} == pytest.approx(shares)


def test_a_proxy_that_pays_for_length_is_found_out_and_one_that_only_errs_is_not():
    found = by_feature(SAMPLES, standardised(GOLD + 0.1 * LENGTH), GOLD)["length"]
    assert found["mean"] > found["ci95"][0] > 0.4
    noise = standardised(GOLD + RNG.normal(size=GOLD.shape))
    assert abs(by_feature(SAMPLES, noise, GOLD)["length"]["mean"]) < 0.15
    alike = [Sample(sample.prompt, ["one two three"] * REPLIES) for sample in SAMPLES]
    assert by_feature(alike, GOLD, -GOLD)["length"]["mean"] is None


def test_the_first_reply_with_words_is_edited_and_what_that_brings_each_model_is_found():
    edited = [edit("Yes. No.") for edit in EDITS.values()]
    one = Sample(SAMPLES[0].prompt, ["", " ", "Yes. No."])
    assert with_edits(one) == ["", " ", "Yes. No.", "Yes. No.", *edited]
    proxy, gold = (RNG.normal(size=(PROMPTS, 3 + 1 + len(EDITS))) for _ in range(2))
    proxy[:, 5] = proxy[:, 3] + 2
    gold[:, 5] = gold[:, 3] - 1
    found = by_edit(proxy, gold, n=3)
    means = {key: part["mean"] for key, part in found["repeated_sentence"].items()}
    own, theirs = 2 / spread(proxy[:, :3]), -1 / spread(gold[:, :3])
    assert means == pytest.approx({"proxy": own, "gold": theirs, "difference": own - theirs})
    assert list(found) == list(EDITS)


def test_the_largest_excess_comes_first_one_of_a_prompt_beside_golds_best():
    proxy, gold = GOLD.copy(), GOLD.copy()
    proxy[7, 3:5] += 9, 8
    proxy[2, 1] += 7
    gold[5, 0] -= 30  # that gold hates what the proxy finds nothing in is no exploit
    shown = examples(SAMPLES, proxy, gold)
    assert [item["prompt"] for item in shown[:2]] == [SAMPLES[7].prompt, SAMPLES[2].prompt]
    assert shown[0]["excess"] == pytest.approx(9)
    responses = [SAMPLES[7].responses[k] for k in (3, int(GOLD[7].argmax()))]
    assert [shown[0][key]["response"] for key in ("exploit", "best_by_gold")] == responses


# --- sentences and the page ----------------------------------------------------------------------

PROXY, PEAKED = simulated(200)
NOISE = np.random.default_rng(5).normal(size=PROXY.shape)
FLAT = np.minimum((PROXY - PROXY.min(axis=1, keepdims=True)) / 5, 0.6) + NOISE / 3


@pytest.mark.parametrize(
    ("proxy", "gold", "kind", "said"),
    [
        (PROXY, PEAKED, "bad", "Over-optimised: by gold the best of n peaks at about n = "),
        (PROXY, PROXY + NOISE, "good", "No over-optimisation up to n = 64 (square root of KL 1.78): gold"),
        (PROXY, -PROXY, "bad", "Over-optimised: by gold the best of n peaks at about n = 1 "),
        (PROXY[:40], NOISE[:40], "bad", "Choosing by this proxy gains nothing certain by gold: "),
        (PROXY, FLAT, "plain", "is neither a rise nor a fall for certain"),
        (PROXY[:19], PROXY[:19], "plain", "19 prompts are too few to tell: by gold "),
        (0 * PROXY, PEAKED, "bad", "gains nothing certain by gold: +0.00 standard deviations"),
    ],
)
def test_the_verdict(proxy, gold, kind, said):
    found, sentence = verdict(gain_curve(proxy, proxy), gain_curve(proxy, gold), len(proxy))
    assert said in sentence
    assert found == kind
    assert sentence.count(". ") == 0  # one sentence


def test_what_fools_the_proxy_alone_and_a_gold_that_is_the_proxy_are_pointed_out():
    edits = {
        name: {"proxy": {"mean": proxy}, "gold": {"mean": gold}, "difference": {"ci95": ends}}
        for name, proxy, gold, ends in (
            ("thank_you", 0.5, 0.1, [0.2, 0.6]),
            ("markdown", 0.5, 0.4, [-0.1, 0.3]),  # gold may like it as well
            ("trailing_space", -0.2, -0.9, [0.5, 0.9]),  # the proxy does not like it either
            ("repeated_sentence", 0.02, 0.0, [0.01, 0.03]),  # next to nothing
        )
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
        "proxies": ["outputs/overoptimization/<proxy_100>"],
        "gold": ["outputs/gold"],
        "sampling": {"policy": "some/model", "n": 8, "temperature": 0.7},
        "samples": {"file": "samples.jsonl", "n_prompts": 30, "n_replies": 8, **counts},
        "n": list(range(1, 9)),
        "kl": [0.1 * n for n in range(8)],
        "curves": {"outputs/overoptimization/<proxy_100>": found, "mean of the proxies": found},
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
    [source] = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', raw)
    drawn = base64.b64decode(source).decode()
    assert drawn.count(f"; gold peaks at n = {found['gold']['peak_n']}") >= 2  # a panel each
    write_overoptimization(tmp_path, {**content, "sampling": None})
    assert "How replies were drawn" not in (tmp_path / "overoptimization.html").read_text()


def test_the_table_on_the_terminal_fits_80_columns(content, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_overoptimization(content)
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "Best of 8 replies to each of 30 prompts, 3 prompts left out" in out
    assert "mean of the proxies: " in out
