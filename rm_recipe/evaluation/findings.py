"""What to think of an evaluation's figures: the gate, and what a reader has to know before believing them.

The figures are those of one data set in `evaluation.json`, perhaps of an older version: what is absent is
not spoken of.
"""

import math
from typing import Any

from rm_recipe.evaluation.format import (
    as_text,
    decimal,
    interval,
    is_number,
    limits,
    mapping,
    p_value,
    share,
    whole,
    words,
)
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


def gate(figures: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Whether held-out accuracy (its interval's lower end by default) reaches the recipe's target."""
    statistic = recipe.data.gate_statistic
    value = figures["accuracy"] if statistic == "accuracy" else figures["accuracy_ci95"][0]
    target = recipe.data.target_accuracy
    return {"target": target, "statistic": statistic, "value": value, "passed": value >= target}


def gate_words(result: Any) -> dict[str, Any] | None:
    """Whether the gate `passed`, the `verdict`, and `why`; None without a gate."""
    found = mapping(result)
    if not isinstance(found.get("passed"), bool):
        return None
    what = "accuracy" if found.get("statistic") == "accuracy" else "interval's lower end"
    verdict = f"Target {decimal(found.get('target'), 2)} {'' if found['passed'] else 'not '}reached"
    return {
        "passed": found["passed"],
        "verdict": verdict,
        "why": f"the {what} is {decimal(found.get('value'))}",
    }


def rule(name: str) -> str:
    """A baseline's key as words."""
    return RULES.get(name, words(name))


def edit(name: str) -> str:
    """An edit's key as words."""
    return EDITS.get(name, words(name))


def best_baseline(figures: dict[str, Any]) -> tuple[str, float] | None:
    """The key and the accuracy of the rule that does best."""
    found = {name: value for name, value in mapping(figures, "baselines").items() if is_number(value)}
    name = max(found, key=lambda key: found[key], default=None)
    return None if name is None else (name, found[name])


def readings(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Sentences on the figures, each with its kind: good, plain or bad.

    The first says what the model knows beyond the best baseline; the others warn or compare.
    """
    found = [
        _against_best(figures),
        _trained_on(figures),
        _guessing(figures),
        _loss(figures),
        _ties(figures),
        *(_exploit(figures, name) for name in mapping(figures, "consistency")),
        _against_other(figures),
    ]
    return [reading for reading in found if reading is not None]


def _against_best(figures: dict[str, Any]) -> tuple[str, str] | None:
    best, beats = best_baseline(figures), figures.get("beats_baselines")
    if best is None:
        return None
    lead = mapping(figures, "against_baselines", best[0])
    reach, difference = f"accuracy {decimal(best[1])}", lead.get("difference")
    if is_number(difference):
        ends = f" (95 % interval {interval(lead['ci95'], signed=True)})" if limits(lead.get("ci95")) else ""
        reach += f"; the model is {decimal(abs(difference))} {'ahead' if difference >= 0 else 'behind'}{ends}"
    name = f"'{rule(best[0])}'"
    if beats is True:
        return "good", f"The model beats the best baseline: {name} has {reach}."
    if beats is False:
        return "bad", f"This model has learnt little that the rule {name} does not know: that has {reach}."
    return "plain", f"The best baseline, {name}, has {reach}."


def _trained_on(figures: dict[str, Any]) -> tuple[str, str] | None:
    trained = figures.get("trained_prompts")
    if not is_number(trained) or not trained:
        return None
    what = f"{whole(trained)} of {whole(figures.get('n_scored'))} comparisons have a prompt that was trained"
    return "bad", f"{what} on: this accuracy is no held-out one."


def _guessing(figures: dict[str, Any]) -> tuple[str, str] | None:
    ends = limits(figures.get("accuracy_ci95"))
    if ends is None or ends[1] >= 0.5:
        return None
    accuracy = decimal(figures.get("accuracy"))
    return "bad", f"Accuracy {accuracy} is worse than guessing: are chosen and rejected swapped?"


def _loss(figures: dict[str, Any]) -> tuple[str, str] | None:
    loss = figures.get("loss")
    if not is_number(loss) or loss < LN2 - NEAR_LN2:
        return None
    near = loss < LN2 + NEAR_LN2
    why = "the model tells responses hardly apart" if near else "where the model is wrong, it is too sure"
    where = f"{'about' if near else 'above'} ln 2 = 0.693, which equal rewards for all responses give"
    return "bad", f"The loss, {decimal(loss)}, is {where}: {why}."


def _ties(figures: dict[str, Any]) -> tuple[str, str] | None:
    ties, pairs = figures.get("ties"), mapping(figures, "ranking").get("pairs", figures.get("n_scored"))
    if not is_number(ties) or not is_number(pairs) or ties <= MANY_TIES * pairs:
        return None
    why = "both responses got the very same reward, and each tie counts as half right"
    return "bad", f"{share(ties / pairs)} of the pairs are ties: {why}."


def _exploit(figures: dict[str, Any], name: str) -> tuple[str, str] | None:
    wins = mapping(figures, "consistency", name).get("wins")
    if not is_number(wins) or wins <= MANY_WINS:
        return None
    what = f"With {edit(name)} a rejected response overtakes the chosen one in {share(wins)} of the"
    return "bad", f"{what} comparisons tried: a policy will find that."


def _against_other(figures: dict[str, Any]) -> tuple[str, str] | None:
    other = mapping(figures, "against")
    if not is_number(other.get("difference")):
        return None
    name, accuracy = as_text(other.get("model")), decimal(other.get("other_accuracy"))
    lead = decimal(other["difference"], signed=True)
    lead += f" ({interval(other['ci95'], signed=True)})" if limits(other.get("ci95")) else ""
    return "plain", (
        f"{name} has accuracy {accuracy} on the {whole(other.get('n'))} comparisons that fit both models; "
        f"this model's minus that is {lead}, McNemar's p {p_value(other.get('p_value'))}."
    )
