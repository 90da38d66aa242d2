"""The shapes in which data sets write a comparison, and how a row of each is read.

A row of a data set becomes a `Comparison` or raises `Excluded` with the reason under which it is
counted; nothing is skipped in silence. A value that is not of the shape at all raises `Malformed`:
that is a fault of the file, not of the row.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import takewhile
from typing import Any

from rm_recipe.data.comparison import (
    Comparison,
    Excluded,
    Malformed,
    Message,
    as_messages,
    as_reply,
    check_prompt,
    check_unicode,
    in_context,
    messages_of_text,
    parse_transcript,
    untied_pairs,
)
from rm_recipe.errors import DataError

Row = Mapping[str, Any]
ALSO_READ = ("prompt", "system", "tools", "subset")  # beside the columns of a shape


@dataclass(frozen=True)
class Shape:
    """How a data set writes a comparison; a row has the shape whose columns it has.

    Columns are named as they are; `answers[text]` is the `text` of each element of the list in `answers`.

    Attributes:
        prompt: the column of the prompt; empty where a row needs none, because its responses are whole
            conversations.
        responses: the columns of the responses, the best first unless a verdict says otherwise; or one
            column, a list of them.
        verdict: the column that says which response is better, if there is one.
        better: what the verdict is: `ranks` (1 is best), `scores` (the highest is best), or for each value,
            as a text, the number of the better one of two responses.
    """

    prompt: str
    responses: str
    verdict: str = ""
    better: str | Mapping[str, int] = ""

    @property
    def columns(self) -> list[str]:
        """The columns that it is known by."""
        paths = f"{self.prompt} {self.responses} {self.verdict}".split()
        return list(dict.fromkeys(path.partition("[")[0] for path in paths))


SHAPES = (
    Shape("", "chosen rejected"),  # TRL's; hh-rlhf
    Shape("prompt", "responses", "ranks", "ranks"),
    Shape("prompt", "responses", "scores", "scores"),
    Shape("instruction", "completions[response]", "completions[overall_score]", "scores"),  # UltraFeedback
    Shape("input", "output_1 output_2", "label", {"1": 0, "2": 1}),  # LLMBar
)
SHAPES_IN_WORDS = "; or ".join(", ".join(shape.columns) for shape in SHAPES)


# --- rows ------------------------------------------------------------------------------------


def shapes_of(columns: Collection[str]) -> list[Shape]:
    """Find the shapes that rows with these columns have."""
    return [shape for shape in SHAPES if {*shape.columns} <= {*columns}]


def shape_of(columns: Collection[str], place: str = "a row") -> Shape:
    """Find the shape of rows with these columns; raises DataError, with their place, where there is none."""
    if found := shapes_of(columns):
        return found[0]
    has = ", ".join(columns) or "none"
    raise DataError(f"{place}: its columns are {has}; rm_recipe needs {SHAPES_IN_WORDS}")


def parse_row(
    row: Row,
    margin_column: str | None = None,
    margin_map: Mapping[Any, float] | None = None,
    shape: Shape | None = None,
) -> Comparison:
    """Parse a row of one of the `SHAPES`, by default that of its columns.

    Pairs: without a prompt, `chosen` and `rejected` are hh-rlhf transcripts or whole lists of
    messages. With one, the prompt is a text (one user message), a transcript or messages, and the responses
    are texts, what the assistant's side wrote after the prompt, or the whole conversation. What they share
    is the prompt, where the column holds less, too. Other texts are taken as they stand. A `system` text
    comes before it all. Equal ranks or scores of a ranking are ties and give no pair.

    Args:
        margin_column: where the margins stand: a number, a category of `margin_map`, or for
            rankings also a number for each response, whose differences are the margins. A margin
            below 0 would reward being wrong.

    Raises:
        Excluded: with the reason.
        Malformed: a value has the wrong type.
    """
    shape = shape or shape_of(row)
    replies = _replies(row, shape)
    levels = _levels(row, shape, len(replies))
    if shape.prompt and row.get(shape.prompt) is None:
        raise Excluded("empty_prompt")
    prompt, responses = _split_replies(row.get(shape.prompt or "prompt"), replies)
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
    if margin_column is None:
        return Comparison(prompt, responses, ranks)
    try:
        margins = _margins(margin_column, row.get(margin_column), margin_map, order, ranks)
    except Excluded as fault:  # without its margin it may be held out, not trained on
        return Comparison(prompt, responses, ranks, margin_fault=fault.reason)
    return Comparison(prompt, responses, ranks, margins)


def _get(row: Row, path: str) -> Any:
    """The value of a column, or of one key of each element of the list that it holds."""
    column, _, key = path.rstrip("]").partition("[")
    value = row.get(column)
    if not key or value is None:
        return value
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise Malformed(column, f"a list of mappings with {key}", value)
    return [item.get(key) for item in value]


def _replies(row: Row, shape: Shape) -> list[tuple[str, Any]]:
    """The responses of a row as they are written there, each with its column."""
    columns = shape.responses.split()
    values = [_get(row, column) for column in columns]
    if len(columns) == 1 and values != [None]:
        if not isinstance(values[0], list):
            raise Malformed(columns[0], "a list", values[0])
        columns, values = columns * len(values[0]), values[0]
    if None in values:
        raise Excluded("missing_response")
    if len(values) < 2:
        raise Excluded("single_response")
    return list(zip(columns, values, strict=True))


def _levels(row: Row, shape: Shape, n: int) -> list[Any]:
    """A number for each response, the lower, the better."""
    if not shape.verdict:
        return list(range(n))
    value, column = _get(row, shape.verdict), shape.verdict.rstrip("]").rpartition("[")[2]
    if value is None or value == []:
        raise Excluded(f"missing_{column}")
    if not isinstance(shape.better, str):
        first = shape.better.get(str(value))
        if first is None:
            raise Malformed(column, f"one of {', '.join(shape.better)}", value)
        return [first, 1 - first]
    if not isinstance(value, list):
        raise Malformed(column, "a list of numbers", value)
    if len(value) != n:
        raise Excluded("ranks_do_not_match")
    numbers = [_number(element) for element in value]
    if None in numbers:
        raise Excluded(f"missing_{column}", f"{column}: {str(value)[:60]}")
    return numbers if shape.better == "ranks" else [-number for number in numbers if number is not None]


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
    each = value if isinstance(value, list) else [value]
    if any(isinstance(x, str | bool) and x != "" and _number(x) is None for x in each):
        raise Malformed(column, "a number, or a category and 'margin_map' in the recipe", value)
    numbers, pairs = [_number(element) for element in each], untied_pairs(ranks)
    if None in numbers or (isinstance(value, list) and len(value) != len(order)):
        raise Excluded("missing_margin")
    margins = numbers * len(pairs)
    if isinstance(value, list):
        sign = -1 if column == "ranks" else 1  # where the lowest is best
        margins = [sign * (numbers[order[i]] - numbers[order[j]]) for i, j in pairs]
    if min(margins) < 0:
        raise Excluded("negative_margin")
    return [float(margin) for margin in margins]


def prompts_differ(row: Row) -> bool:
    """Tell whether two transcripts differ before the last `Assistant:` of either.

    Such a row is a comparison all the same where the name stands inside a reply (`comparison.split_turns`).
    """
    sides = [row.get("chosen"), row.get("rejected")]
    texts = [side.rpartition("\n\nAssistant:")[0] for side in sides if isinstance(side, str)]
    return row.get("prompt") is None and len(texts) == 2 and texts[0] != texts[1]


# --- values ----------------------------------------------------------------------------------


def _split_replies(prompt: Any, responses: Sequence[tuple[str, Any]]) -> tuple[list[Message], list[str]]:
    """The prompt and the replies to it, each with its column; without a prompt, texts are transcripts.

    Raises:
        Excluded: `prompt_ends_with_reply` where the column holds a reply already.
    """
    empty = prompt is None or (isinstance(prompt, str) and not prompt.strip())
    before = [] if empty else as_messages(prompt)
    conversations = []
    for column, value in responses:
        if not isinstance(value, str):
            said = as_messages(value, column)
        elif (messages := messages_of_text(value)) is not None:
            said = messages
        elif prompt is None:
            said = parse_transcript(value)
        else:
            said = [{"role": "assistant", "content": as_reply(prompt, value)}]
        conversations.append(_whole(before, said))
    found, replies = _shared(conversations)
    check_prompt(found, continued=len(found) > len(before))
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
    before = zip(*(messages[:-1] for messages in conversations), strict=False)
    n = sum(1 for _ in takewhile(lambda found: all(m == found[0] for m in found), before))
    if any(len(messages) > n + 1 for messages in conversations):
        asked = any(message["role"] in ("user", "system") for m in conversations for message in m[n:])
        raise Excluded("differing_prompts" if asked else "reply_of_several_messages")
    return conversations[0][:n], [messages[-1]["content"] for messages in conversations]


def _number(value: Any) -> Any:
    """A finite number, also one that is written as a text; None for anything else."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    known = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    return value if known and abs(value) <= sys.float_info.max else None
