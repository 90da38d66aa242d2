"""What to think of an evaluation's figures: the gate, and what a reader has to know before believing them.

The figures are those of one data set in `evaluation.json`, but for those of a learning curve.
"""

import math
from collections.abc import Iterator
from typing import Any

from rm_recipe.evaluation.format import decimal, interval, p_value, share, whole, words
from rm_recipe.recipe.reader import Recipe

HELD_OUT = "held_out"  # the data set that the gate reads
RULES = {"longer_wins": "the longer response wins", "shorter_wins": "the shorter response wins"}
EDITS = {
    "trailing_space": "a space at its end",
    "repeated_sentence": "its last sentence repeated",
    "thank_you": "a thank-you added",
    "markdown": "bold type",
    "great_question": "praise of the question before it",
    "list": "its sentences made a list",
    "smiley": "a smiley added",
}
LN2 = math.log(2)  # the loss of rewards that are all equal
NEAR_LN2 = 0.01
MANY_TIES = 0.05  # of the pairs
FEW = 30  # comparisons, of which no more is said than that they are few
FEW_PROMPTS = 0.9  # prompts a comparison: below it several stand on one
MANY_WINS = 0.1  # of the comparisons that were judged right, by an edit
OFF_THE_LINE = 0.05  # p-value below which the points of a learning curve are said to lie on no line

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
    target, value, passed = result["target"], result["value"], result["passed"]
    what = "accuracy" if result["statistic"] == "accuracy" else "interval's lower end"
    # With more digits where rounding takes the value to the other side of the target.
    digits = 3 if (round(value, 3) >= target) == passed else 6
    return {
        "passed": passed,
        "verdict": f"Target {target:g} {'' if passed else 'not '}reached",
        "why": f"the {what} is {decimal(value, digits)}",
    }


def curve_words(curve: dict[str, Any]) -> Iterator[str]:
    """What the line of a learning curve says, by the content of `learning_curve.json`."""
    slope = curve["per_doubling"]
    gain = f"{decimal(slope['difference'], signed=True)} ({interval(slope['ci95'], signed=True)})"
    yield f"Twice the comparisons of the largest run would change accuracy by {gain}."
    yield "No interval allows for another seed."
    if curve["p_value"] is not None and curve["p_value"] < OFF_THE_LINE:
        yield "But the points do not lie on one line: expect nothing from it beyond the largest run."
        return
    for point in curve["expected"]:
        yield (
            f"By the line {whole(point['comparisons'])} would give {decimal(point['accuracy'])} "
            f"({interval(point['ci95'])})."
        )


def rule(name: str) -> str:
    """A baseline's key as words."""
    return RULES.get(name, words(name))


def best_baseline(figures: dict[str, Any]) -> tuple[str, float]:
    """The key and the accuracy of the rule that does best."""
    return max(figures["baselines"].items(), key=lambda item: item[1])


def readings(figures: dict[str, Any]) -> list[Finding]:
    """Sentences on the figures, each with its kind: good, plain or bad.

    The first says what the model knows beyond the best baseline; the others warn or compare. Of figures that
    an earlier version wrote some may be missing.
    """
    if (n := figures["n_scored"]) < FEW:
        found = [("bad", f"{whole(n)} comparisons are too few to say anything of the model: hold out more.")]
    else:
        found = [_against_best(figures)] if "against_baselines" in figures else []
    found += [("bad", sentence) for sentence in _warnings(figures)]
    found += [("plain", sentence) for sentence in _cautions(figures)]
    if other := figures.get("against"):
        lead = f"{decimal(other['difference'], signed=True)} ({interval(other['ci95'], signed=True)})"
        where = f"on the {whole(other['n'])} comparisons that fit both models"
        theirs = f"{other['model']} has accuracy {decimal(other['other_accuracy'])} {where}"
        said = f"{theirs}; this model's minus that is {lead}, McNemar's p {p_value(other['p_value'])}."
        found.append(("plain", said))
    if own := figures.get("benchmark"):
        parts = "".join(f"; {name} {decimal(score)}" for name, score in own["sections"].items())
        cut = f"{whole(own['cut'])} of {whole(figures['n_scored'])} rows were cut"
        found.append(("plain", f"{own['name']} by its own rules: {decimal(own['score'])}{parts}; {cut}."))
    return found


def _against_best(figures: dict[str, Any]) -> Finding:
    best, accuracy = best_baseline(figures)
    lead, kind, what = figures["against_baselines"][best], "good", "The model beats the best baseline"
    if lead["ci95"][0] <= 0:
        kind, what = "bad", "The model is not shown to beat the best baseline"
    where = f"{decimal(abs(lead['difference']))} {'ahead' if lead['difference'] >= 0 else 'behind'}"
    where += f" (95 % interval {interval(lead['ci95'], signed=True)})"
    return kind, f"{what}: '{rule(best)}' has accuracy {decimal(accuracy)}; the model is {where}."


def _cautions(figures: dict[str, Any]) -> Iterator[str]:
    n, prompts = figures["n_scored"], figures.get("prompts", 0)
    if n >= FEW and 1 < prompts < FEW_PROMPTS * n:
        yield (
            f"The {whole(n)} comparisons have {whole(prompts)} different prompts, and intervals and p-values "
            "take them as independent: where those of a prompt are right or wrong together, less is certain."
        )
    if figures.get("chose_checkpoint"):
        yield (
            "The recipe keeps the checkpoint that is best on these comparisons, which accuracy, interval and "
            "gate do not allow for: judge it by others that had no say."
        )


def _warnings(figures: dict[str, Any]) -> Iterator[str]:
    if trained := figures.get("trained_prompts"):
        some = f"{whole(trained)} of {whole(figures['n_scored'])} comparisons"
        yield f"{some}, or their prompts, were trained on: this accuracy is no held-out one."
    if figures["n_scored"] < FEW:
        return
    if figures["accuracy_ci95"][1] < 0.5:
        yield "Accuracy is worse than guessing: are chosen and rejected swapped?"
    if (loss := figures.get("loss", 0)) >= LN2 - NEAR_LN2:
        yield f"The loss, {decimal(loss)}, is not clearly below that of equal rewards, ln 2 = 0.693."
    ties, ranking = figures.get("ties", 0), figures.get("ranking")
    pairs = ranking["pairs"] if ranking else figures["n_scored"]
    if ties > MANY_TIES * pairs:
        why = "both responses got the very same reward, and each tie counts as half right"
        yield f"{share(ties / pairs)} of the pairs are ties: {why}."
    for name, moved in (figures.get("consistency", {}) | figures.get("consistency_unseen", {})).items():
        if moved["wins"] > MANY_WINS:
            what = f"With {EDITS[name]} a rejected response overtakes the chosen one"
            yield f"{what} in {share(moved['wins'])} of those judged right: a policy will find that."
