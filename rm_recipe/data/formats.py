"""The shapes in which data sets write a comparison.

A row of a data set becomes a `Comparison` or raises `Excluded` with the reason under which it is
counted; nothing is skipped in silence. A value that is not of the shape at all raises `Malformed`:
that is a fault of the file, not of the row.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from rm_recipe.data.comparison import Comparison, untied_pairs
from rm_recipe.data.messages import (
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
)

# The columns that a row is recognised by, the first that fits; then what is missing, in words.
SHAPES: tuple[set[str], ...] = (
    {"chosen", "rejected"},
    {"prompt", "responses", "ranks"},
    {"prompt", "responses", "scores"},
    {"instruction", "completions"},  # UltraFeedback as published
    {"input", "output_1", "output_2", "label"},  # LLMBar as published
)
# Beside those of its shape, what is read of a row: `tools` leaves it out, a Message cannot say them.
ALSO_READ = {"system", "tools", "subset"}
MARGIN_REASONS = ("missing_margin", "negative_margin")  # why a comparison cannot be trained on

SHAPES_IN_WORDS = (
    "chosen and rejected (and perhaps prompt), or prompt, responses and ranks or scores, or (LLMBar) input, "
    "output_1, output_2 and label"
)


# --- rows ------------------------------------------------------------------------------------


def is_comparison_shape(columns: Collection[str]) -> bool:
    """Whether rows with these columns can be comparisons."""
    return any(shape <= set(columns) for shape in SHAPES)


def parse_row(
    row: Mapping[str, Any],
    margin_column: str | None = None,
    margin_map: Mapping[Any, float] | None = None,
) -> Comparison:
    """A comparison from a row of one of the `SHAPES`.

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
    kind = _kind(row)
    if kind == "label":
        prompt, responses, levels = _labelled(row)
    else:
        prompt, responses, levels = _ranking(row) if kind == "ranking" else _pair(row)
    prompt = in_context(prompt, row)
    check_unicode([*(message["content"] for message in prompt), *responses])
    if not all(response.strip() for response in responses):
        raise Excluded("empty_response")
    order = sorted(range(len(responses)), key=lambda i: levels[i])
    distinct = sorted(set(levels))
    ranks = [distinct.index(levels[i]) for i in order]
    responses = [responses[i] for i in order]
    ranks_of_text: dict[str, int] = {}
    for response, rank in zip(responses, ranks, strict=True):
        if ranks_of_text.setdefault(response.strip(), rank) != rank:
            raise Excluded("identical_responses")
    if len(distinct) == 1:
        raise Excluded("all_tied")
    margins = []
    if margin_column is not None:
        margins = _margins(margin_column, row.get(margin_column), margin_map, order, ranks)
    return Comparison(prompt, responses, ranks, margins)


def _kind(row: Mapping[str, Any]) -> str:
    """Which of the shapes a row has values for; TRL's columns come first."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return "pair"
    if row.get("responses") is not None or row.get("completions") is not None:
        return "ranking"
    return "label" if row.get("output_1") is not None else "pair"


def unread(row: Mapping[str, Any], margin_column: str | None = None) -> list[str]:
    """The columns of a row that hold something and are no part of its comparison, and such keys of messages.

    Numbers are no text: a message's `weight` goes unnamed.
    """
    columns = {
        "pair": {"prompt", "chosen", "rejected"},
        "label": {"input", "output_1", "output_2", "label"},
        "ranking": {"prompt", "responses", "ranks" if row.get("ranks") is not None else "scores"}
        if row.get("responses") is not None
        else {"instruction", "completions"},
    }[_kind(row)]
    read = columns | ALSO_READ | {margin_column}
    names = [name for name, value in row.items() if name not in read and value not in (None, "", [], {})]
    keys = dict.fromkeys(
        f"{key} (of messages)"
        for column in ("prompt", "chosen", "rejected", "responses")
        for message in (_mappings(row.get(column)) if column in columns else ())
        for key, value in message.items()
        if key not in ("role", "content") and isinstance(value, str | list | Mapping) and value
    )
    return [*names, *keys]


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """The mappings in lists, and in lists of lists."""
    for part in value if isinstance(value, list) else ():
        yield from [part] if isinstance(part, Mapping) else _mappings(part)


def _pair(row: Mapping[str, Any]) -> tuple[list[Message], list[str], list[float]]:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        raise Excluded("missing_response")
    if row.get("prompt") is not None:
        return *_split_replies(row["prompt"], {"chosen": chosen, "rejected": rejected}), [0.0, 1.0]
    conversations = []
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        messages = messages_of_text(value) if isinstance(value, str) else as_messages(value, column)
        conversations.append(_whole([], _transcript(str(value)) if messages is None else messages))
    prompt, replies = _shared(conversations)
    check_question(prompt)
    return prompt, replies, [0.0, 1.0]


def _labelled(row: Mapping[str, Any]) -> tuple[list[Message], list[str], list[float]]:
    """Two outputs and the number, 1 or 2, of the better one."""
    if row.get("input") is None:
        raise Excluded("empty_prompt")
    if row.get("output_2") is None:
        raise Excluded("missing_response")
    if row.get("label") is None:
        raise Excluded("missing_label")
    if row["label"] not in (1, 2):
        raise Malformed("label", "1 or 2, the number of the better output", row["label"])
    prompt, outputs = _split_replies(row["input"], {name: row[name] for name in ("output_1", "output_2")})
    return prompt, outputs, [0.0, 1.0] if row["label"] == 1 else [1.0, 0.0]


def _ranking(row: Mapping[str, Any]) -> tuple[list[Message], list[str], list[float]]:
    """Prompt, responses and for each a level: the lower, the better."""
    column = "ranks" if row.get("ranks") is not None or "scores" not in row else "scores"
    if row.get("responses") is None:
        column = "overall_score"  # UltraFeedback's; where its judge gave none it says N/A
        completions = _list("completions", row["completions"])
        if not all(isinstance(completion, Mapping) for completion in completions):
            raise Malformed("completions", "mappings with response and overall_score", completions)
        row = {
            "prompt": row.get("instruction"),
            "responses": [completion.get("response") for completion in completions],
            column: [completion.get(column) for completion in completions],
        }
    if row.get("prompt") is None:
        raise Excluded("empty_prompt")
    replies = _list("responses", row["responses"])
    if any(reply is None for reply in replies):
        raise Excluded("missing_response")
    if len(replies) < 2:
        raise Excluded("single_response")
    levels = _list(column, row.get(column))
    if any(level is None for level in levels) or not levels:
        raise Excluded(f"missing_{column}")
    if not all(_is_number(level) for level in levels):
        if column == "overall_score":
            raise Excluded(f"missing_{column}", f"{levels} are no numbers"[:80])
        raise Malformed(column, "a list of numbers", levels)
    if len(levels) != len(replies):
        raise Excluded("ranks_do_not_match")
    if not all(map(_is_finite, levels)):
        raise Excluded(f"missing_{column}")
    sign = 1 if column == "ranks" else -1
    prompt, texts = _split_replies(row["prompt"], dict(enumerate(replies)))
    return prompt, texts, [sign * x for x in levels]


def _margins(
    column: str,
    value: Any,
    categories: Mapping[Any, float] | None,
    order: Sequence[int],
    ranks: Sequence[int],
) -> list[float]:
    pairs = untied_pairs(ranks)
    if value is None:
        raise Excluded("missing_margin")
    if categories is not None:
        found = [m for name, m in categories.items() if name == value or str(name) == str(value)]
        if not found:
            raise Malformed(column, f"one of margin_map's {', '.join(map(str, categories))}", value)
        value = found[0]
    if isinstance(value, list) and all(_is_number(number) or number is None for number in value):
        if len(value) != len(order) or None in value:
            raise Excluded("missing_margin")
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
    """Whether two transcripts differ before the last `Assistant:` of either.

    Such a row is a comparison all the same where the name stands inside a reply (`messages`).
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is not None or not (isinstance(chosen, str) and isinstance(rejected, str)):
        return False
    return before_last_reply(chosen) != before_last_reply(rejected)


# --- values ----------------------------------------------------------------------------------


def _split_replies(prompt: Any, responses: Mapping[Any, Any]) -> tuple[list[Message], list[str]]:
    """The prompt and the replies to it, of the prompt's column and those of the responses.

    Raises:
        Excluded: `prompt_ends_with_reply` where the column holds a reply already.
    """
    empty = isinstance(prompt, str) and not prompt.strip()
    before = [] if empty else as_messages(prompt)
    conversations = []
    for column, value in responses.items():
        if isinstance(value, str):
            said = messages_of_text(value) or [_assistant(as_reply(prompt, value))]
        else:
            said = as_messages(value, column if isinstance(column, str) else "responses")
        conversations.append(_whole(before, said))
    found, replies = _shared(conversations)
    (check_prompt if len(found) <= len(before) else check_question)(found)
    return found, replies


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


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
    return [(m["role"], m["content"].strip()) for m in one] == [
        (m["role"], m["content"].strip()) for m in other
    ]


def _shared(conversations: Sequence[list[Message]]) -> tuple[list[Message], list[str]]:
    """What whole conversations have in common, and the one reply in which each ends."""
    n = 0
    while n < min(map(len, conversations)) - 1 and all(m[n] == conversations[0][n] for m in conversations):
        n += 1
    if any(len(messages) > n + 1 for messages in conversations):
        asked = any(message["role"] in ("user", "system") for m in conversations for message in m[n:])
        raise Excluded("differing_prompts" if asked else "reply_of_several_messages")
    return conversations[0][:n], [messages[-1]["content"] for messages in conversations]


def _transcript(text: str) -> list[Message]:
    try:
        return parse_transcript(text.replace("\r\n", "\n"))
    except ValueError:
        raise Excluded("not_a_transcript") from None


def _list(column: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise Malformed(column, "a list", value)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number of hundreds of digits
        return False
