"""What to think of an evaluation's figures: the gate, and what a reader has to know before believing them.

The figures are those of one data set in `evaluation.json`.
"""

import math
from typing import Any

from rm_recipe.evaluation.format import decimal, interval, p_value, share, whole, words
from rm_recipe.recipe.reader import Recipe

HELD_OUT = "held_out"  # the data set that the gate reads
RULES = {
    "longer_wins": "the longer response wins",
    "shorter_wins": "the shorter response wins",
    "bag_of_words": "bag of words",
}
EDITS = {
    "trailing_space": "a space at its end",
    "repeated_sentence": "its last sentence repeated",
    "thank_you": "a thank-you added",
    "markdown": "bold type",
}
LN2 = math.log(2)  # the loss of rewards that are all equal
NEAR_LN2 = 0.01
MANY_TIES = 0.05  # of the pairs
MANY_WINS = 0.1  # of the rejected responses, by an edit

Finding = tuple[str, str]  # its kind, good, plain or bad, and a sentence


def gate(figures: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Whether held-out accuracy (its interval's lower end by default) reaches the recipe's target."""
    statistic = recipe.data.gate_statistic
    value = figures["accuracy"] if statistic == "accuracy" else figures["accuracy_ci95"][0]
    target = recipe.data.target_accuracy
    return {"target": target, "statistic": statistic, "value": value, "passed": value >= target}


def gate_words(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Whether the gate `passed`, the `verdict`, and `why`; None without a gate."""
    if not result:
        return None
    what = "accuracy" if result["statistic"] == "accuracy" else "interval's lower end"
    return {
        "passed": result["passed"],
        "verdict": f"Target {decimal(result['target'], 2)} {'' if result['passed'] else 'not '}reached",
        "why": f"the {what} is {decimal(result['value'])}",
    }


def rule(name: str) -> str:
    """A baseline's key as words."""
    return RULES.get(name, words(name))


def best_baseline(figures: dict[str, Any]) -> tuple[str, float] | None:
    """The key and the accuracy of the rule that does best."""
    return max(figures.get("baselines", {}).items(), key=lambda item: item[1], default=None)


def readings(figures: dict[str, Any]) -> list[Finding]:
    """Sentences on the figures, each with its kind: good, plain or bad.

    The first says what the model knows beyond the best baseline; the others warn or compare.
    """
    found = _against_best(figures) + _warnings(figures)
    for name, moved in figures.get("consistency", {}).items():
        if moved["wins"] > MANY_WINS:
            what = f"With {EDITS.get(name, name)} a rejected response overtakes the chosen one in"
            how_often = f"{share(moved['wins'])} of the comparisons tried"
            found.append(("bad", f"{what} {how_often}: a policy will find that."))
    other = figures.get("against")
    if other:
        theirs = f"{other.get('model')} has accuracy {decimal(other.get('other_accuracy'))}"
        lead = f"{decimal(other.get('difference'), signed=True)} ({interval(other.get('ci95'), signed=True)})"
        where = f"on the {whole(other.get('n'))} comparisons that fit both models"
        difference = f"this model's minus that is {lead}, McNemar's p {p_value(other.get('p_value'))}"
        found.append(("plain", f"{theirs} {where}; {difference}."))
    return found


def _against_best(figures: dict[str, Any]) -> list[Finding]:
    best = best_baseline(figures)
    if best is None or "against_baselines" not in figures:
        return []
    lead = figures["against_baselines"][best[0]]
    ends = f" (95 % interval {interval(lead['ci95'], signed=True)})" if lead["ci95"] else ""
    where = "ahead" if lead["difference"] >= 0 else "behind"
    reach = f"accuracy {decimal(best[1])}; the model is {decimal(abs(lead['difference']))} {where}{ends}"
    if figures["beats_baselines"]:
        return [("good", f"The model beats the best baseline: '{rule(best[0])}' has {reach}.")]
    what = f"This model has learnt little that the rule '{rule(best[0])}' does not know"
    return [("bad", f"{what}: that has {reach}.")]


def _warnings(figures: dict[str, Any]) -> list[Finding]:
    said = []
    if figures.get("trained_prompts"):
        some = f"{whole(figures['trained_prompts'])} of {whole(figures['n_scored'])} comparisons"
        said.append(f"{some} have a prompt that was trained on: this accuracy is no held-out one.")
    if "accuracy_ci95" in figures and figures["accuracy_ci95"][1] < 0.5:
        accuracy = decimal(figures["accuracy"])
        said.append(f"Accuracy {accuracy} is worse than guessing: are chosen and rejected swapped?")
    loss = figures.get("loss", 0)
    if loss >= LN2 - NEAR_LN2:
        near = loss < LN2 + NEAR_LN2
        where = f"{'about' if near else 'above'} ln 2 = 0.693, which equal rewards for all responses give"
        why = "the model tells responses hardly apart" if near else "where the model is wrong, it is too sure"
        said.append(f"The loss, {decimal(loss)}, is {where}: {why}.")
    ties, ranking = figures.get("ties", 0), figures.get("ranking")
    pairs = ranking["pairs"] if ranking else figures.get("n_scored", 0)
    if ties > MANY_TIES * pairs:
        why = "both responses got the very same reward, and each tie counts as half right"
        said.append(f"{share(ties / pairs)} of the pairs are ties: {why}.")
    return [("bad", sentence) for sentence in said]
