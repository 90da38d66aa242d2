"""The shapes in which data sets write a comparison.

A row of a data set becomes a `Comparison` or raises `Excluded` with the reason under which it is
counted; nothing is skipped in silence. A value that is not of the shape at all raises `Malformed`:
that is a fault of the file, not of the row.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from rm_recipe.data.comparison import (
    Comparison,
    Excluded,
    Malformed,
    Message,
    as_messages,
    as_reply,
    before_last_reply,
    check_prompt,
    check_question,
    check_unicode,
    in_context,
    messages_of_text,
    parse_transcript,
    untied_pairs,
)

# The columns that a row is recognised by; then what is missing, in words.
SHAPES: tuple[set[str], ...] = (
    {"chosen", "rejected"},
    {"prompt", "responses", "ranks"},
    {"prompt", "responses", "scores"},
    {"instruction", "completions"},  # UltraFeedback as published
    {"input", "output_1", "output_2", "label"},  # LLMBar as published
)
SHAPES_IN_WORDS = (
    "chosen and rejected (and perhaps prompt), or prompt, responses and ranks or scores, or (LLMBar) input, "
    "output_1, output_2 and label"
)
# Read beside those of a shape; `tools` leaves a row out, as a Message cannot say them.
ALSO_READ = {"prompt", "system", "tools", "subset"}
COLUMNS = ALSO_READ.union(*SHAPES)


# --- rows ------------------------------------------------------------------------------------


def is_comparison_shape(columns: Collection[str]) -> bool:
    """Tell whether rows with these columns can be comparisons."""
    return any(shape <= set(columns) for shape in SHAPES)


def unread(columns: Collection[str]) -> list[str]:
    """List the columns that are part of no comparison, of rows with all these columns."""
    read = ALSO_READ.union(*(shape for shape in SHAPES if shape <= set(columns)))
    return [name for name in columns if name not in read]


def parse_row(
    row: Mapping[str, Any],
    margin_column: str | None = None,
    margin_map: Mapping[Any, float] | None = None,
) -> Comparison:
    """Parse a row of one of the `SHAPES`.

    Pairs: without a prompt, `chosen` and `rejected` are hh-rlhf transcripts or whole lists of
    messages. With one, the prompt is a text (one user message), a transcript or messages, and the responses
    are texts, what the assistant's side wrote after the prompt, or the whole conversation. What they share
    is the prompt, where the column holds less, too. Other texts are taken as they stand. A `system` text
    comes before it all.

    Rankings: `responses` of one prompt with `ranks` (1 is best) or `scores` (the highest is best);
    equal ones are ties and give no pair.

    Benchmarks as published: RewardBench's pairs are of the first kind, with their own `subset`; LLMBar's have
    two outputs and the number of the better one (`label`).

    Args:
        margin_column: where the margins stand: a number, a category of `margin_map`, or for
            rankings also a number for each response, whose differences are the margins. A margin
            below 0 would reward being wrong.

    Raises:
        Excluded: with the reason.
        Malformed: a value has the wrong type.
    """
    prompt, responses, levels = _by_shape(row)
    prompt = in_context(prompt, row)
    check_unicode([*(message["content"] for message in prompt), *responses])
    if not all(response.strip() for response in responses):
        raise Excluded("empty_response")
    distinct = sorted(set(levels))
    order = sorted(range(len(responses)), key=lambda i: levels[i])
    responses, ranks = [responses[i] for i in order], [distinct.index(levels[i]) for i in order]
    if len(set(zip(map(str.strip, responses), ranks, strict=True))) > len(set(map(str.strip, responses))):
        raise Excluded("identical_responses")
    if len(distinct) == 1:
        raise Excluded("all_tied")
    margins = []
    if margin_column is not None:
        margins = _margins(margin_column, row.get(margin_column), margin_map, order, ranks)
    return Comparison(prompt, responses, ranks, margins)


def _by_shape(row: Mapping[str, Any]) -> tuple[list[Message], list[str], list[float]]:
    """Prompt, responses and for each a level (the lower, the better), of the shape that has values."""
    if row.get("chosen") is not None or row.get("rejected") is not None:  # TRL's columns come first
        return _pair(row)
    if row.get("responses") is not None or row.get("completions") is not None:
        return _ranking(row)
    if row.get("output_1") is not None:
        return _labelled(row)
    raise Excluded("missing_response")


def _pair(row: Mapping[str, Any]) -> tuple[list[Message], list[str], list[float]]:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        raise Excluded("missing_response")
    return *_split_replies(row.get("prompt"), {"chosen": chosen, "rejected": rejected}), [0, 1]


def _labelled(row: Mapping[str, Any]) -> tuple[list[Message], list[str], list[float]]:
    """Two outputs and the number, 1 or 2, of the better one."""
    needed = {"input": "empty_prompt", "output_2": "missing_response", "label": "missing_label"}
    for column, reason in needed.items():
        if row.get(column) is None:
            raise Excluded(reason)
    if str(row["label"]) not in ("1", "2"):  # in a .csv a number is text
        raise Malformed("label", "1 or 2, the number of the better output", row["label"])
    outputs = {name: row[name] for name in ("output_1", "output_2")}
    return *_split_replies(row["input"], outputs), [0, 1] if str(row["label"]) == "1" else [1, 0]


def _ranking(row: Mapping[str, Any]) -> tuple[list[Message], list[str], list[float]]:
    column = "scores" if row.get("ranks") is None and "scores" in row else "ranks"
    prompt, replies, levels = row.get("prompt"), row.get("responses"), row.get(column)
    if replies is None:
        column, prompt, completions = "overall_score", row.get("instruction"), row["completions"]
        if not isinstance(completions, list) or not all(isinstance(c, Mapping) for c in completions):
            raise Malformed("completions", "a list of mappings with response and overall_score", completions)
        replies = [completion.get("response") for completion in completions]
        scores = [completion.get(column) for completion in completions]
        levels = [score if _is_number(score) else None for score in scores]  # N/A where the judge gave none
    if prompt is None:
        raise Excluded("empty_prompt")
    if not isinstance(replies, list):
        raise Malformed("responses", "a list", replies)
    if None in replies:
        raise Excluded("missing_response")
    if len(replies) < 2:
        raise Excluded("single_response")
    if not levels or (isinstance(levels, list) and None in levels):
        raise Excluded(f"missing_{column}")
    if not isinstance(levels, list) or not all(map(_is_number, levels)):
        raise Malformed(column, "a list of numbers", levels)
    if len(levels) != len(replies):
        raise Excluded("ranks_do_not_match")
    if not all(map(_is_finite, levels)):
        raise Excluded(f"missing_{column}")
    sign = 1 if column == "ranks" else -1
    return *_split_replies(prompt, dict(enumerate(replies))), [sign * level for level in levels]


def _margins(
    column: str,
    value: Any,
    categories: Mapping[Any, float] | None,
    order: Sequence[int],
    ranks: Sequence[int],
) -> list[float]:
    if categories is not None and value is not None:
        found = [m for name, m in categories.items() if name == value or str(name) == str(value)]
        if not found:
            raise Malformed(column, f"one of margin_map's {', '.join(map(str, categories))}", value)
        value = found[0]
    if isinstance(value, str):  # in a .csv a number is text
        with suppress(ValueError):
            value = float(value) if value else None
    pairs = untied_pairs(ranks)
    if value is None or (isinstance(value, list) and (None in value or len(value) != len(order))):
        raise Excluded("missing_margin")
    if isinstance(value, list) and all(map(_is_number, value)):
        sign = -1 if column == "ranks" else 1  # where the lowest is best
        margins = [sign * (value[order[i]] - value[order[j]]) for i, j in pairs]
    elif _is_number(value):
        margins = [value] * len(pairs)
    else:
        raise Malformed(column, "a number, or a category and 'margin_map' in the recipe", value)
    if not all(map(_is_finite, margins)):
        raise Excluded("missing_margin")
    if min(margins) < 0:
        raise Excluded("negative_margin")
    return [float(margin) for margin in margins]


def prompts_differ(row: Mapping[str, Any]) -> bool:
    """Tell whether two transcripts differ before the last `Assistant:` of either.

    Such a row is a comparison all the same where the name stands inside a reply (`comparison.split_turns`).
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is not None or not (isinstance(chosen, str) and isinstance(rejected, str)):
        return False
    return before_last_reply(chosen) != before_last_reply(rejected)


# --- values ----------------------------------------------------------------------------------


def _split_replies(prompt: Any, responses: Mapping[Any, Any]) -> tuple[list[Message], list[str]]:
    """The prompt and the replies to it; without a prompt, texts are transcripts.

    Raises:
        Excluded: `prompt_ends_with_reply` where the column holds a reply already.
    """
    empty = prompt is None or (isinstance(prompt, str) and not prompt.strip())
    before = [] if empty else as_messages(prompt)
    conversations = []
    for column, value in responses.items():
        if not isinstance(value, str):
            said = as_messages(value, column if isinstance(column, str) else "responses")
        elif (messages := messages_of_text(value)) is not None:
            said = messages
        elif prompt is None:
            said = parse_transcript(value)
        else:
            said = [{"role": "assistant", "content": as_reply(prompt, value)}]
        conversations.append(_whole(before, said))
    found, replies = _shared(conversations)
    (check_prompt if len(found) <= len(before) else check_question)(found)
    return found, replies


def _whole(prompt: list[Message], said: list[Message]) -> list[Message]:
    """The whole conversation of a prompt and messages that hold it, or a part of it, or follow it."""
    if not said or said[-1]["role"] != "assistant":
        raise Excluded("ends_without_reply")
    n = len(prompt)
    if any(_same(said[start : start + n], prompt) for start in range(len(said) - n)):
        return said
    if len(said) > 1 and _same(prompt[-(len(said) - 1) :], said[:-1]):
        return [*prompt, said[-1]]
    follows = ["assistant", "tool", *["user"] * (prompt[-1]["role"] == "system")]
    if said[0]["role"] not in follows:
        raise Excluded("differing_prompts", "the messages do not hold the prompt")
    return [*prompt, *said]


def _same(one: list[Message], other: list[Message]) -> bool:
    """Whether messages are the same but for white space at their ends."""
    stripped = [[(m["role"], m["content"].strip()) for m in messages] for messages in (one, other)]
    return stripped[0] == stripped[1]


def _shared(conversations: Sequence[list[Message]]) -> tuple[list[Message], list[str]]:
    """What whole conversations have in common, and the one reply in which each ends."""
    n = 0
    while n < min(map(len, conversations)) - 1 and all(m[n] == conversations[0][n] for m in conversations):
        n += 1
    if any(len(messages) > n + 1 for messages in conversations):
        asked = any(message["role"] in ("user", "system") for m in conversations for message in m[n:])
        raise Excluded("differing_prompts" if asked else "reply_of_several_messages")
    return conversations[0][:n], [messages[-1]["content"] for messages in conversations]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _is_finite(number: float) -> bool:
    return abs(number) <= sys.float_info.max  # not for infinity, NaN or whole numbers of hundreds of digits
