"""What the report makes of `predictions.jsonl`: rewards and margins to draw, and comparisons to read."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from rm_recipe.evaluation import plots
from rm_recipe.evaluation.format import as_text, decimal, is_number, limits, mapping, objects, shorten, whole

LONGEST_TEXT = 20_000  # characters of one message that are shown
MOST_SHOWN = 10


@dataclass
class Predictions:
    """What the report needs of one data set's predictions."""

    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    shown: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"mistake": [], "close": []})


@dataclass(frozen=True)
class Picture:
    """A figure of the report. `note` says how to read it and what would be bad."""

    title: str
    svg: Markup
    note: str


def by_data_set(lines: Iterable[dict[str, Any]]) -> dict[str, Predictions]:
    """The lines of `predictions.jsonl` by their data set. Lines without rewards count for nothing."""
    found: dict[str, Predictions] = {}
    for line in lines:
        _add(found, line)
    return found


def _add(found: dict[str, Predictions], line: dict[str, Any]) -> None:
    own = found.setdefault(as_text(line.get("dataset")), Predictions())
    rewards, ranks = line.get("rewards"), line.get("ranks")
    if isinstance(rewards, list) and isinstance(ranks, list) and len(rewards) == len(ranks):
        pairs = [(reward, rank) for reward, rank in zip(rewards, ranks, strict=True) if is_number(reward)]
        best = min((rank for rank in ranks if is_number(rank)), default=0)
        own.chosen += [reward for reward, rank in pairs if rank == best]
        own.rejected += [reward for reward, rank in pairs if rank != best]
    if is_number(line.get("margin")):
        own.margins.append(line["margin"])
    kept = own.shown.get(as_text(line.get("shown")))
    if kept is not None and len(kept) < MOST_SHOWN and mapping(line, "text"):
        kept.append(line)


# --- comparisons to read ---------------------------------------------------------------------


def examples(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Comparisons as the template shows them; the surest mistakes, or the closest calls, first."""
    sign = 1 if kind == "mistake" else -1
    known = [line for line in lines if is_number(line.get("margin"))]
    size = {id(line): abs(line["margin"]) * sign for line in known}
    return [_example(line) for line in sorted(lines, key=lambda line: -size.get(id(line), float("-inf")))]


def _example(line: dict[str, Any]) -> dict[str, Any]:
    text = mapping(line, "text")
    prompt = text.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "prompt", "content": prompt}]
    messages = [
        {"role": as_text(message.get("role")) or "?", "content": _content(message.get("content"))}
        for message in objects({"prompt": prompt}, "prompt")
    ]
    where = [f"row {as_text(line['row'])}"] if line.get("row") is not None else []
    where += [f"subset {as_text(line['subset'])}"] if line.get("subset") else []
    where += [f"{whole(line['turns'])} turns"] if is_number(line.get("turns")) else []
    return {
        "title": f"margin {decimal(line.get('margin'), 3, signed=True)}",
        "where": ", ".join(where),
        "prompt": messages,
        "responses": _responses(line, text.get("responses")),
    }


def _responses(line: dict[str, Any], texts: Any) -> list[dict[str, Any]]:
    texts = texts if isinstance(texts, list) else []
    values = {
        key: line[key] if isinstance(line.get(key), list) else []
        for key in ("rewards", "ranks", "response_tokens")
    }
    columns = [values[key] + [None] * (len(texts) - len(values[key])) for key in values]
    rewards, ranks, tokens = columns
    best = min((rank for rank in ranks if is_number(rank)), default=0)
    highest = max((reward for reward in rewards if is_number(reward)), default=None)
    alone = highest is not None and rewards.count(highest) == 1
    return [
        {
            "content": _content(content),
            "reward": f"reward {decimal(rewards[i], 3, signed=True)}",
            "tokens": whole(tokens[i]) if is_number(tokens[i]) else "",
            "chosen": ranks[i] == best,
            "verdict": _verdict(ranks[i], best, len(texts)),
            "preferred": alone and rewards[i] == highest,
        }
        for i, content in enumerate(texts)
    ]


def _verdict(rank: Any, best: Any, responses: int) -> str:
    if not is_number(rank):
        return "response"
    if rank == best:
        return "chosen"
    return "rejected" if responses == 2 else f"rank {whole(rank + 1)}"


def _content(content: Any) -> str:
    return shorten(as_text(content), LONGEST_TEXT)


# --- pictures --------------------------------------------------------------------------------


def pictures(figures: dict[str, Any], own: Predictions, name: str) -> list[Picture]:
    """The figures of one data set, of those that its numbers allow.

    Args:
        name: begins the ids inside them.
    """
    made = [_rewards(own, name), _margins(own, name), _reliability(figures, name), _by_length(figures, name)]
    return [picture for picture in made if picture is not None]


def _rewards(own: Predictions, name: str) -> Picture | None:
    if not own.chosen and not own.rejected:
        return None
    label = f"Histograms of {len(own.chosen):,} chosen and {len(own.rejected):,} rejected responses' rewards."
    svg = plots.rewards(own.chosen, own.rejected, f"{name}-rewards", label)
    note = (
        "Rewards have no unit and no zero of their own; only differences mean something. Chosen responses "
        "should lie to the right of rejected ones. Bad: two shapes on top of each other, or one lonely "
        "spike."
    )
    return Picture("Rewards", Markup(svg), note)  # noqa: S704 - plots escapes what it is given


def _margins(own: Predictions, name: str) -> Picture | None:
    if not own.margins:
        return None
    below, total = sum(margin < 0 for margin in own.margins), len(own.margins)
    label = f"Histogram of {total:,} margins: {below:,} lie below 0."
    svg = plots.margins(own.margins, f"{name}-margins", label)
    note = (
        f"How much more the chosen response got, in units of reward: {below:,} of {total:,} comparisons "
        "lie left of 0, where the model prefers the rejected response. Bad: much left of 0, and above all "
        "far left: mistakes that the model is sure of."
    )
    return Picture("Margins", Markup(svg), note)  # noqa: S704


def _reliability(figures: dict[str, Any], name: str) -> Picture | None:
    found = objects(mapping(figures, "calibration"), "bins")
    keys = ("confidence", "accuracy", "n")
    bins = [
        tuple(item[key] for key in keys) for item in found if all(is_number(item.get(key)) for key in keys)
    ]
    if not bins:
        return None
    pairs = ", ".join(f"{confidence:.2f} right {accuracy:.2f}" for confidence, accuracy, _ in bins)
    svg = plots.reliability(bins, f"{name}-reliability", f"Reliability curve: confident {pairs}.")
    note = (
        "Where the model says 80 %, it should be right in 80 % of pairs: "
        "points on the dashed line. Bad: points below it (too sure). Points "
        "of few pairs scatter." + _calibration_words(figures)
    )
    return Picture("Calibration", Markup(svg), note)  # noqa: S704


def _by_length(figures: dict[str, Any], name: str) -> Picture | None:
    rows = []
    for item in objects(mapping(figures, "by"), "length_difference"):
        ends = limits(item.get("accuracy_ci95"))
        if ends and is_number(item.get("accuracy")) and is_number(item.get("n")):
            rows.append((as_text(item.get("label")), int(item["n"]), float(item["accuracy"]), *ends))
    if not rows:
        return None
    spoken = "; ".join(f"{label}: {accuracy:.3f}" for label, _, accuracy, *_ in rows[: plots.MOST_BUCKETS])
    what = "chosen minus rejected, response tokens"
    svg = plots.accuracy_by(
        rows, what, f"{name}-length", f"Accuracy by length difference ({what}): {spoken}."
    )
    note = (
        "Each point is the accuracy where the chosen response is so many tokens longer (shorter: minus) "
        "than the rejected one; the line is its 95 % interval. Bad: a slope from below 0.5 up to 1, or "
        "down: the model judges by length."
    )
    return Picture("Accuracy by length difference", Markup(svg), note)  # noqa: S704


def _calibration_words(figures: dict[str, Any]) -> str:
    """What the reliability curve comes to, in sentences."""
    found, text = mapping(figures, "calibration"), ""
    if is_number(found.get("ece")):
        text += f" The mean gap between the two (expected calibration error) is {decimal(found['ece'])}."
    heat, after, loss = (found.get(key) for key in ("temperature", "ece_after", "loss_after"))
    if is_number(heat):
        kind = "too sure" if heat > 1.005 else "not sure enough" if heat < 0.995 else "as sure as it may be"
        text += f" Rewards are best divided by {decimal(heat, 2)} (temperature): the model is {kind}."
        gains = [f"error {decimal(after)}"] if is_number(after) else []
        gains += [f"loss {decimal(loss)}"] if is_number(loss) else []
        text += f" So divided: {', '.join(gains)} (cross-validated)." if gains else ""
    return text
