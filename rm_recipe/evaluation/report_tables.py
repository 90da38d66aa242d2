"""The report's tables of one data set's figures, each with how to read it and what would be bad.

Every function takes the figures of one data set as `evaluation.json` holds them and returns None
where they are absent, so that files of an older version give a shorter report.
"""

from typing import Any

from rm_recipe.evaluation.findings import best_baseline, edit, rule
from rm_recipe.evaluation.format import (
    MISSING,
    Row,
    Table,
    as_text,
    decimal,
    interval,
    is_number,
    mapping,
    objects,
    p_value,
    share,
    strip,
    table,
    values,
    whole,
    words,
)

Figures = dict[str, Any]
BUCKETS = {
    "turns": (
        "Number of turns",
        "turns",
        "Comparisons by the number of turns in the conversation. Bad: accuracy that falls as it grows.",
    ),
    "prompt_tokens": (
        "Length of the prompt",
        "prompt tokens",
        "Prompts by their number of tokens. Bad: accuracy near 0.5 for long prompts; were they truncated?",
    ),
    "margin": (
        "Size of the margin",
        "|margin|",
        "Comparisons by how far apart the two rewards are. Where the model is sure it should be right: "
        "accuracy should rise from row to row. Bad: large margins and accuracy far below 1.",
    ),
}


def data_sets(evaluated: dict[str, Figures]) -> Table:
    """One line for each data set, all of them."""
    rows = []
    for name, figures in evaluated.items():
        accuracy, ends, best = figures.get("accuracy"), figures.get("accuracy_ci95"), best_baseline(figures)
        cells = [
            name,
            decimal(accuracy),
            interval(ends),
            whole(figures.get("n_scored")),
            whole(sum(n for n in mapping(figures, "excluded").values() if is_number(n))),
            whole(figures.get("ties")),
            decimal(figures.get("loss")),
            f"{decimal(best[1])} ({rule(best[0])})" if best else MISSING,
        ]
        rows.append(Row(cells, strip(accuracy, ends)))
    note = (
        "Accuracy is the share of comparisons whose chosen response got the higher reward; guessing gives "
        "0.5. n comparisons were scored. Bad: an interval that reaches down to 0.5 or to the best "
        "baseline, a loss near 0.693 or above, many ties or many comparisons left out."
    )
    head = ["data set", "accuracy", "95 % interval", "n", "left out", "ties", "loss", "best baseline"]
    return Table("All data sets", head, rows, note)  # whole: no data set is left out


def baselines(figures: Figures) -> Table | None:
    """Rules that need no reward model, and how far the model is ahead of each."""
    against, rules = mapping(figures, "against_baselines"), mapping(figures, "baselines")
    rows = []
    for name in dict.fromkeys([*rules, *against]):
        lead = mapping(against, name)
        ahead = [decimal(lead.get("difference"), signed=True), interval(lead.get("ci95"), signed=True)]
        rows.append(Row([rule(name), decimal(rules.get(name)), *ahead, p_value(lead.get("p_value"))]))
    note = (
        "Simple rules on the same comparisons; bag of words counts words and knows no order. The "
        "difference is the model's accuracy minus the rule's, its interval from a paired bootstrap, p "
        "from McNemar's test. Bad: an interval that holds 0, for then the rule explains what the model "
        "knows."
    )
    return table("Baselines", ["rule", "accuracy", "model minus rule", "95 % interval", "p"], rows, note)


def other_model(figures: Figures) -> Table | None:
    """This model and another one on the same comparisons."""
    other = mapping(figures, "against")
    found = {
        "comparisons that both scored": whole(other.get("n")),
        "accuracy of this model": decimal(other.get("accuracy")),
        "accuracy of the other": decimal(other.get("other_accuracy")),
        "difference": decimal(other.get("difference"), signed=True),
        "95 % interval of the difference": interval(other.get("ci95"), signed=True),
        "p (McNemar)": p_value(other.get("p_value")),
        "only this model is right": whole(other.get("only_this")),
        "only the other is right": whole(other.get("only_other")),
    }
    note = (
        "The comparisons on which only one model is right decide. While the interval of the difference "
        "holds 0, these data do not show which model is better."
    )
    return values(f"Against {as_text(other.get('model')) or 'another model'}", found, note)


def ranking(figures: Figures) -> Table | None:
    """Figures of comparisons with more than two responses."""
    ranked = mapping(figures, "ranking")
    found = {
        "pairs of different rank": whole(ranked.get("pairs")),
        "pairs ordered rightly": decimal(ranked.get("pairwise_accuracy")),
        "best response got the highest reward": decimal(ranked.get("best_of_k")),
        "Kendall's tau": decimal(ranked.get("kendall_tau"), signed=True),
    }
    note = (
        "Comparisons with more than two responses give several pairs. Tau is 1 where the order is right, "
        "0 where it is random, \N{MINUS SIGN}1 where it is reversed. Bad: tau near 0 or below, pairs near "
        "0.5."
    )
    return values("Rankings", found, note)


def subsets(figures: Figures) -> Table | None:
    """The largest subsets first."""
    found = [(name, mapping(figures, "subsets", name)) for name in mapping(figures, "subsets")]
    found.sort(key=lambda item: (-item[1]["n"] if is_number(item[1].get("n")) else 0, item[0]))
    note = (
        "Parts that the data set names, the largest first. Bad: a part whose whole interval lies below "
        "the others', and above all below 0.5. Wide intervals say only that a part is small."
    )
    return _accuracies("Subsets", "subset", found, note)


def buckets(figures: Figures, key: str) -> Table | None:
    """Accuracy in the ordered buckets of one of `BUCKETS`."""
    title, head, note = BUCKETS[key]
    found = objects(mapping(figures, "by"), key)
    return _accuracies(title, head, [(as_text(bucket.get("label")), bucket) for bucket in found], note)


def _accuracies(title: str, head: str, found: list[tuple[str, Figures]], note: str) -> Table | None:
    rows = []
    for name, part in found:
        accuracy, ends = part.get("accuracy"), part.get("accuracy_ci95")
        cells = [name, whole(part.get("n")), decimal(accuracy), interval(ends)]
        rows.append(Row(cells, strip(accuracy, ends)))
    return table(title, [head, "n", "accuracy", "95 % interval"], rows, note)


def length(figures: Figures) -> Table | None:
    """How far rewards follow length."""
    known = mapping(figures, "length")
    found = {
        "rank correlation of reward and response tokens": decimal(known.get("spearman"), signed=True),
        "rank correlation of margin and chosen minus rejected tokens": decimal(
            known.get("spearman_margin"), signed=True
        ),
        "accuracy where the chosen response is longer": decimal(known.get("accuracy_chosen_longer")),
        "accuracy where the chosen response is shorter": decimal(known.get("accuracy_chosen_shorter")),
    }
    note = (
        "Correlations are Spearman's, from \N{MINUS SIGN}1 to 1; 0 is no relation. Bad: correlations "
        "beyond about 0.3 either way, or accuracies far apart: the model then pays for length rather than "
        "content, and a policy trained on it will write ever longer (or shorter) answers."
    )
    return values("Length bias", found, note)


def consistency(figures: Figures) -> Table | None:
    """What edits that change no meaning do to rewards."""
    spread, rows = figures.get("std_reward"), []
    for name in mapping(figures, "consistency"):
        found = mapping(figures, "consistency", name)
        change = found.get("mean_change")
        relative = MISSING
        if is_number(change) and is_number(spread) and spread > 0:
            relative = decimal(change / spread, 2, signed=True)
        cells = [
            edit(name),
            whole(found.get("n")),
            decimal(change, signed=True),
            relative,
            decimal(found.get("std_change")),
            decimal(found.get("largest")),
            share(found.get("share_up")),
            share(found.get("wins")),
        ]
        rows.append(Row(cells))
    head = [
        "edit",
        "n",
        "mean change",
        "in std of rewards",
        "std of change",
        "largest (either way)",
        "raised",
        "wins by it",
    ]
    note = (
        "Responses were edited without changing what they say. Changes are in units of reward, and once "
        "more in standard deviations of all rewards. Raised: share of responses whose reward rises. Wins "
        "by it: share of rejected responses that overtake the chosen one. Bad: a mean beyond a quarter of "
        "a standard deviation, or more than a few per cent of wins, for a policy will find that trick."
    )
    return table("Edits that should not matter", head, rows, note)


def excluded(figures: Figures) -> Table | None:
    """Comparisons that were not scored, by reason."""
    total, rows = figures.get("n_comparisons"), []
    for reason, n in mapping(figures, "excluded").items():
        if is_number(n) and n:
            part = share(n / total) if is_number(total) and total else MISSING
            rows.append(Row([words(reason), whole(n), part]))
    note = (
        "Comparisons that were read but not scored. Bad: more than a few per cent, for the accuracy speaks "
        "only of the rest."
    )
    return table("Left out", ["reason", "comparisons", "of all"], rows, note)
