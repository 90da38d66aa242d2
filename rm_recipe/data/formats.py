"""The shapes in which data sets write a comparison, and how a row of each is read.

A row of a data set becomes a `Comparison` or raises `Excluded` with the reason under which it is
counted; nothing is skipped in silence. A value that is not of the shape at all raises `Malformed`:
that is a fault of the file, not of the row.
"""

import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import product
from typing import Any

from rm_recipe.data import comparison
from rm_recipe.data.comparison import Comparison, Excluded, Malformed, Message, as_messages, from_json
from rm_recipe.errors import DataError

Row = Mapping[str, Any]
ORDERS = ("ranks", "scores", "strength")  # what a verdict of numbers is
# Beside the columns of a shape.
ALSO_READ = ("prompt", *comparison.SYSTEM, "tools", "subset", *comparison.MEDIA)


@dataclass(frozen=True)
class Shape:
    """How a data set writes a comparison; a row has the shape whose columns it has.

    Columns are named as they are; `question.text` is a key of what stands in `question`, `answers[text]` that
    of each element of the list in `answers`; `a/b` is `a`, or `b` where there is no `a`.

    Attributes:
        name: as people call it.
        prompt: the column of the prompt; empty where a row needs none, because its responses are whole
            conversations.
        responses: the columns of the responses, the best first unless a verdict says otherwise; or one
            column, a list of them. What holds a list holds responses that are equally good.
        verdict: the column (or one for each response) that says which response is better, if there is one.
        better: what the verdict is: `ranks` (the lowest is best), `scores` (the highest is), `strength`
            (below 0 the first of two is better, above it the second), or values: for each response that
            where it is best, and those of a tie; of equal ones with `/` between them. One that names a
            column also stands for what that holds: `model_a` for the model's name.
        known: the columns that it is known by, where those above are made of them (`PREPARED`).
    """

    name: str
    prompt: str
    responses: str
    verdict: str = ""
    better: str = ""
    known: str = ""

    @property
    def columns(self) -> list[str]:
        """The columns that it is known by."""
        paths = (self.known or f"{self.prompt} {self.responses} {self.verdict}").split()
        return list(dict.fromkeys(re.split(r"[\[.]", path)[0] for path in paths))

    @property
    def read(self) -> list[str]:
        """The columns that are read where they are there."""
        named = [] if self.better in ORDERS else re.split("[/,] ?", self.better)
        return [*self.columns, *PROMPT_PARTS.get(self.prompt, ()), *ALSO_READ, *named]


# One a line, as the attributes of `Shape`; with `or` between what different sets have.
_SHAPES = """
TRL preference | prompt | chosen rejected
whole conversations (hh-rlhf) | | chosen rejected
OpenAI preference | input | preferred_output non_preferred_output
two replies | question or input or instruction or messages or conversations or trajectory | chosen rejected
two replies by other names | prompt or question or instruction or input or messages | \
  accepted rejected or chosen_response rejected_response or response_chosen response_rejected or \
  response_j response_k or response_w response_l
Math-Step-DPO | prompt | chosen rejected | | | prompt initial_reason_steps chosen rejected
LLaMA-Factory alpaca of old | instruction | output | | | instruction input output
ms-swift | | messages rejected_response
ms-swift messages | | messages rejected_messages
ranking | prompt | responses | ranks | ranks
ranking by scores | prompt | responses | scores | scores
UltraFeedback | instruction | completions[response] | completions[overall_score/fine-grained_score] | scores
distilabel ratings | instruction or prompt or messages | generations | ratings | scores
NeMo RL | context | completions[completion] | completions[rank] | ranks
Gemini preference | contents | completions[completion] | completions[score] | scores
Nectar | prompt | answers[answer] | answers[rank] | ranks
Stack Exchange answers | question | answers[text] | answers[pm_score] | scores
OpenAssistant tree | prompt | responses | ranks | ranks | message_tree_id prompt
summarize_from_feedback | info | summaries[text] | choice | 0, 1
PKU-SafeRLHF | prompt | response_0 response_1 | better_response_id or safer_response_id | 0, 1
SHP | history | human_ref_A human_ref_B | labels | 1, 0
WebGPT comparisons | question.full_text | answer_0 answer_1 | score_0 score_1 | scores
HelpSteer 2 | prompt | response_1 response_2 | preference_strength | strength
HelpSteer 3 | context | response1 response2 | overall_preference | strength
Chatbot Arena | | conversation_a conversation_b or messages_a messages_b | winner | model_a, model_b, EQUAL
two replies and a winner | prompt or question or instruction | \
  response_a response_b or response_A response_B | winner or preferred or preference or choice or label | \
  a/response_a/model_a/A>B, b/response_b/model_b/B>A, EQUAL/A=B
two numbered replies and a winner | prompt or question or instruction | response_1 response_2 | \
  winner or preferred or preference or choice or label | 1/response_1/model_1, 2/response_2/model_2, EQUAL
Chatbot Arena turns | prompt | response_a response_b | winner_model_a winner_model_b | scores
Unified-Feedback | | conv_A conv_B | conv_A_rating conv_B_rating | scores
Community Alignment | first_turn_prompt | first_turn_response_a first_turn_response_b \
  first_turn_response_c first_turn_response_d | first_turn_preferred_response | \
  response_a, response_b, response_c, response_d
Preference Collection | orig_instruction | orig_response_A orig_response_B | orig_preference | A, B
AlpacaFarm | instruction | output_1 output_2 | preference | 1, 2, 1.5
LLMBar, OffsetBias | input or instruction | output_1 output_2 | label | 1, 2
"""
EQUAL = "tie/tied/draw/equal/same/both/neither/tie (bothbad)/bothbad/both_bad/both_good"
_LINES = [
    [cell.strip().split(" or ") for cell in line.split("|")]
    for line in _SHAPES.strip().replace("EQUAL", EQUAL).splitlines()
]
SHAPES = [Shape(*cells) for line in _LINES for cells in product(*line)]
# Of columns that a recipe names.
ANY_TWO = [
    Shape("two replies and a verdict", "prompt", "chosen rejected", "verdict"),
    Shape("two conversations and a verdict", "", "chosen rejected", "verdict"),
]
NEEDED = (
    "two replies or more in a row (join rows of one), and which is better: prompt, chosen and rejected, or "
    "prompt, responses and ranks or scores, or the columns of a public set; others are named by 'columns: "
)


# --- columns that have to be made of others ----------------------------------------------------


def _exchanges(pairs: Iterable[Sequence[Any]]) -> list[dict[str, Any]]:
    """Messages of [question, answer], one pair after the other."""
    sides = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(sides, pair, strict=True)]


def in_parts(row: Row, column: str) -> Row:
    """As LLaMA-Factory joins them: the instruction and on the next line its input, after the `history`."""
    asked = row.get(column)
    if "input" in PROMPT_PARTS[column] and row.get("input"):
        texts = {name: row[name] for name in (column, "input") if row.get(name)}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise Malformed(name, f"a text, as '{column}' and 'input' are joined", text)
        asked = "\n".join(texts.values())
    before = from_json(row.get("history")) or []
    if before == asked:  # SHP's question, of which a prompt was made
        before = []
    turns = before if isinstance(before, list) else [before]
    if all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        turns = _exchanges(turns)
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise Malformed("history", "a list of [question, answer] or of messages (else rename it)", before)
    if turns:
        turns, asked = as_messages(turns, "history"), as_messages(asked, column) if asked else []
        asked = asked if _same(asked[: len(turns)], turns) else [*turns, *asked]
    return {**row, column: asked}


def _steps(row: Row) -> Row:
    """Both replies begin with the steps before them, as `full_chosen` does that a recipe may name."""
    steps = row.get("initial_reason_steps") or ""
    if not isinstance(steps, str):
        raise Malformed("initial_reason_steps", "a text", steps)
    ends = {side: row.get(side) for side in ("chosen", "rejected")}
    for side, end in ends.items():
        if isinstance(end, str) and end.strip() and not end.startswith(steps):
            ends[side] = steps + end
    return {**row, **ends}


def _openai(row: Row) -> Row:
    """`input` holds the messages, and tools if there are any."""
    return {**row, "input": _get(row, "input.messages"), "tools": _get(row, "input.tools")}


def _summary(row: Row) -> Row:
    """The query of Stiennon et al. 2020 (arXiv 2009.01325, appendix B.5): a Reddit post or an article."""
    subreddit, title, post, article = (
        _get(row, f"info.{key}") for key in ("subreddit", "title", "post", "article")
    )
    if not post and not article:
        raise Excluded("empty_prompt")
    about = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}" if post else f"Article: {article}"
    return {**row, "info": f"{about}\n\nTL;DR:"}


def _turns(row: Row) -> Row:
    """Each column is a list of texts as JSON, one a turn; or a text, of one turn."""
    names = ("prompt", "response_a", "response_b")
    asked, *sides = (from_json(row.get(name)) for name in names)
    if not all(isinstance(turns, list) for turns in (asked, *sides)):
        return row
    if any(len(turns) != len(asked) for turns in sides):
        raise Excluded("not_messages", "a question or a reply is missing")
    a, b = (_exchanges(zip(asked, turns, strict=True)) for turns in sides)
    return {**row, "prompt": [], "response_a": a, "response_b": b}


# What belongs to a prompt beside its own column.
PROMPT_PARTS = {"instruction": ("input", "history"), "question": ("history",), "prompt": ("history",)}
PREPARED: dict[str, Callable[[Row], Row]] = {
    "Math-Step-DPO": _steps,
    "OpenAI preference": _openai,
    "summarize_from_feedback": _summary,
    "Chatbot Arena turns": _turns,
}


# --- which shape rows have -------------------------------------------------------------------


def shapes_of(columns: Collection[str], known: Sequence[Shape] = SHAPES) -> list[Shape]:
    """Find the shapes that rows with these columns have, but for those that have a part of another's."""
    found = [shape for shape in known if {*shape.columns} <= {*columns}]
    return [shape for shape in found if not any(_beats(other, shape) for other in found)]


def _beats(one: Shape, other: Shape) -> bool:
    """Whether it has all that the other has and more, or the same replies to a prompt of a better name."""
    if {*other.columns} < {*one.columns}:
        return True
    if (one.responses, other.name) == ("chosen rejected", "distilabel ratings"):  # of which they were made
        return True
    alike = (one.responses, one.verdict) == (other.responses, other.verdict)
    names = (one.prompt, other.prompt)
    return alike and (names == ("instruction", "input") or names[0] == "prompt" != names[1])


def shape_of(columns: Collection[str], place: str = "a row", named: Mapping[str, str] = {}) -> Shape:
    """Find the shape of rows with these columns.

    Args:
        place: of the rows, for messages.
        named: names of ours and those of columns, as the recipe key `columns` has them: only a shape that
            reads them all.

    Raises:
        DataError: the rows have none, or several.
    """
    verdict, _, values = named.get("verdict", "").partition("=")
    known = [shape for shape in SHAPES if verdict in ("", shape.verdict)]
    if {"chosen", "rejected", "verdict"} <= {*named}:
        known = [replace(shape, better=_meanings(named["chosen"], named["rejected"])) for shape in ANY_TWO]
    asked = {name for name in named if name not in ("verdict", "history", *ALSO_READ[1:])}
    found = shapes_of(columns, [shape for shape in known if asked <= {*shape.columns}])
    if len(found) == 1:
        means = [mean.replace("|", "/") for mean in values.split("/")]
        if len(means) == len(found[0].responses.split()):  # which says nothing of ties
            means.append(EQUAL)
        return replace(found[0], better=", ".join(means)) if values else found[0]
    if found:
        fit = " and ".join(f"{shape.name} ({', '.join(shape.columns)})" for shape in found)
        ways = [_way(shape) for shape in found]
        if len({(shape.prompt, shape.responses) for shape in found}) == 1:
            ways = [f"{{verdict: {shape.verdict}}}" for shape in found]
        raise DataError(f"{place} fits {fit}; say which one: 'columns: {' or '.join(ways)}'")
    has = ", ".join(columns)[:500] or "none"  # the texts of a table without names
    raise DataError(f"{place}: its columns are {has}; rm_recipe needs {NEEDED}{suggested(columns)}'")


def _way(shape: Shape) -> str:
    """The value of `columns` that asks for a shape; where that cannot name its lists, the form."""
    replies = shape.responses.split()
    named = dict.fromkeys(("prompt", "responses", "scores"), "...")
    if len(replies) == 2 and not shape.verdict:
        named = {"prompt": shape.prompt, "chosen": replies[0], "rejected": replies[1]}
    elif {shape.responses, shape.verdict} <= {"responses", "ranks", "scores"}:
        named = {name: name for name in shape.columns}
    return json.dumps(named)


# Words in the names of columns: of a better and a worse reply, or of any two, and of what is none of the
# three; of a prompt; of a verdict; of a list of replies and of one of numbers for them.
_PAIRS = "chosen/rejected preferred/dispreferred better/worse best/worst good/bad winner/loser win/lose"
_PAIRS += " positive/negative pos/neg correct/incorrect accepted/rejected preferred/rejected"
_PAIRS += " preferred/non_preferred chosen/reject edited/original"
_EITHER = "a/b 1/2 0/1 left/right"
_NO_TEXT = r"\b(id|ids|idx|index|mask|model|score|rating|length|len|tokens)\b"
_PROMPT = r"\b(prompt|question|instruction|query|problem|input|context|messages|conversation)\b"
_VERDICT = r"\b(winner|preferred|preference|choice|chosen|label|verdict|better|best|comparison|result)\b"
_SEVERAL = r"\b(responses|completions|generations|answers|outputs|candidates|replies)$"
_NUMBERS = r"\b(scores|ratings|rewards|ranks)$"


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"\d+|[A-Z]?[^\W\dA-Z_]+|[A-Z]+", name)]


def _of_texts(columns: Collection[str]) -> dict[str, str]:
    """The columns that may hold texts, by the words of their names."""
    return {text: name for name in columns if not re.search(_NO_TEXT, text := " ".join(_words(name)))}


def suggested(columns: Collection[str]) -> str:
    """The value of `columns` that words suggest: only said, for a `winner` may be a reply or its author."""
    spelt = _of_texts(columns)

    def like(words: str, *others: str) -> str:
        found = [name for text, name in spelt.items() if re.search(words, text) and name not in others]
        return found[0] if len(found) == 1 else "..."

    for pair in f"{_PAIRS} {_EITHER}".split():
        better, worse = pair.replace("_", " ").split("/")
        for text, one in spelt.items():
            swapped = re.sub(rf"\b{better}\b", worse, text)
            # Others call them `response` and `rejected_response`.
            other = spelt.get(swapped if swapped != text else f"{worse} {text}")
            if other and (pair not in _EITHER or not re.search(_PROMPT, text)):
                said = {"verdict": like(_VERDICT, one, other)} if pair in _EITHER else {}
                named = {"prompt": like(_PROMPT, one, other), "chosen": one, "rejected": other}
                return json.dumps(named | said, ensure_ascii=False)
    several, numbers = like(_SEVERAL), like(_NUMBERS)
    if "..." not in (several, numbers):
        kind = "ranks" if numbers.lower().endswith("ranks") else "scores"
        return json.dumps({"prompt": like(_PROMPT), "responses": several, kind: numbers})
    return json.dumps(dict.fromkeys(("prompt", "chosen", "rejected"), "..."))


def in_words(shape: Shape, ours: Mapping[str, str]) -> tuple[str, str]:
    """Say what columns (by our names) were taken for, and how to ask for what their words suggest instead."""
    columns, named = [ours[name] for name in shape.columns], suggested(ours.values())
    another = not {*json.loads(named).values()} <= {"...", *columns}
    return f"{shape.name} (by {', '.join(columns)})", f"; another reading is 'columns: {named}'" * another


def _meanings(*names: str) -> str:
    """What a verdict on any two replies may be: a reply's column, or what only that has in its name."""
    own = ["_".join(word for word in _words(a) if word not in _words(b)) for a, b in (names, names[::-1])]
    each = [[name, part, f"model_{part}"] for name, part in zip(names, own, strict=True)]
    if {*own} == {"0", "1"}:  # 1 may also mean that the first is right
        each = [[name] for name in names]
    return ", ".join(["/".join(each[0]), "/".join(each[1]), EQUAL])


def names_of(columns: Collection[str]) -> set[str]:
    """How a verdict may name columns, in small letters: `response_b` as that, `response b` or `b`."""
    texts = _of_texts(columns)
    return {*map(str.lower, columns), *texts, *(words.rpartition(" ")[2] for words in texts)}


def check_replies(row: Row, shape: Shape, names: Collection[str]) -> None:
    """Raise Excluded where the replies of a pair are but `names` of columns that nothing reads."""
    replies = {name: row.get(name) for name in shape.responses.split()}
    if not shape.verdict and all(isinstance(v, str) and v.strip().lower() in names for v in replies.values()):
        column, name = next(iter(replies.items()))
        ways = f"name both replies' and 'verdict: {column}'; or 'chosen: {column}' where it is a reply"
        raise Excluded("column_names", f"'{name}' is the name of a column; in 'columns' {ways}")


def rows_of(row: Row, shape: Shape) -> list[Row]:
    """List the rows that a row stands for: of a tree one for each question with ranked replies."""
    if shape.name != "OpenAssistant tree":
        return [row]
    return list(_questions(row.get("prompt"), [])) or [{}]


def _questions(node: Any, before: list[Any]) -> Iterator[Row]:
    if not isinstance(node, Mapping):
        return
    messages: list[Any] = [*before, {"role": node.get("role"), "content": node.get("text")}]
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise Malformed("replies", "a list of messages", replies)
    ranked = [reply for reply in replies if reply.get("rank") is not None]
    if node.get("role") == "prompter" and len(ranked) > 1:
        texts, ranks = [reply.get("text") for reply in ranked], [reply["rank"] for reply in ranked]
        yield {"prompt": messages, "responses": texts, "ranks": ranks}
    for reply in replies:
        yield from _questions(reply, messages)


# --- rows ------------------------------------------------------------------------------------


def parse_row(
    row: Row,
    margin_column: str | None = None,
    margin_map: Mapping[Any, float] | None = None,
    shape: Shape | None = None,
    names: Collection[str] = (),
) -> Comparison:
    """Parse a row of one of the `SHAPES`, by default that of its columns.

    Pairs: without a prompt, `chosen` and `rejected` are hh-rlhf transcripts or whole lists of
    messages. With one, the prompt is a text (one user message), a transcript or messages, and the responses
    are texts, what the assistant's side wrote after the prompt, or the whole conversation. What they share is
    the prompt, where the column holds less, too. A `system` text comes before it all. Ties give no pair.

    Args:
        margin_column: where the margins stand: a number, a category of `margin_map`, or of rankings also a
            number for each response, whose differences they are. One below 0 would reward being wrong.
        names: those of columns (`names_of`) that are no reply.

    Raises:
        Excluded: with the reason.
        Malformed: a value has the wrong type.
    """
    if shape is None:
        shape = shape_of(row)
        row = rows_of(row, shape)[0]
    row = {name: value for name, value in row.items() if value == value}  # NaN, as a table has it, is nothing
    if shape.name in PREPARED:
        row = PREPARED[shape.name](row)
    check_replies(row, shape, names)
    if shape.prompt in PROMPT_PARTS:
        row = in_parts(row, shape.prompt)
    replies, levels = _replies(row, shape)
    levels = _levels(row, shape, len(replies)) if shape.verdict else levels
    asked = _get(row, shape.prompt) if shape.prompt else None
    if asked is None and shape.prompt and shape.verdict:
        raise Excluded("empty_prompt")
    prompt, responses = _split_replies(asked, replies)
    prompt, tools = comparison.in_context(prompt, row), comparison.tools_of(row)
    comparison.check_unicode([*(message["content"] for message in prompt), *responses])
    if not all(response.strip() for response in responses):
        raise Excluded("empty_response")
    order, responses, ranks = _ordered(responses, levels)
    margins: list[float] = []
    if margin_column is not None:
        margin = row.get(margin_column)
        if shape.better == "strength" and margin_column == shape.verdict:
            margin = abs(_number(margin))
        margins = _margins(margin_column, margin, margin_map, order, ranks)
    return Comparison(prompt, responses, ranks, margins, tools=tools)


def _ordered(responses: list[str], levels: list[Any]) -> tuple[list[int], list[str], list[int]]:
    """The responses best first: their numbers, texts and ranks; raises Excluded where none is better."""
    distinct = sorted(set(levels))
    order = sorted(range(len(responses)), key=lambda i: levels[i])
    responses, ranks = [responses[i] for i in order], [distinct.index(levels[i]) for i in order]
    if len(set(zip(map(str.strip, responses), ranks, strict=True))) > len(set(map(str.strip, responses))):
        raise Excluded("identical_responses")
    if len(distinct) == 1:
        raise Excluded("all_tied")
    return order, responses, ranks


def _get(row: Row, path: str) -> Any:
    """The value of a column, of a key of what stands there, or of a key of each element of its list."""
    if path.isidentifier():
        return row.get(path)
    column, bracket, key = re.split(r"([\[.])", path.rstrip("]"))
    value, keys = row.get(column), key.split("/")
    if value is None:
        return None
    items = from_json(value) if bracket == "[" else [value]
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        kind = "a list of mappings" if bracket == "[" else "a mapping"
        raise Malformed(column, f"{kind} with {keys[0]}", value)
    # One key for all: scores of two kinds are no ranking.
    key = next((key for key in keys if all(item.get(key) is not None for item in items)), keys[0])
    found = [item.get(key) for item in items]
    return found if bracket == "[" else found[0]


def _replies(row: Row, shape: Shape) -> tuple[list[tuple[str, Any]], list[Any]]:
    """The responses of a row as they are written there, each with its column; and their order."""
    columns = shape.responses.split()
    values = [_get(row, column) for column in columns]
    if len(columns) == 1 and values != [None]:
        values = from_json(values[0])
        if not isinstance(values, list):
            raise Malformed(columns[0], "a list of replies", values)
        columns *= len(values)
    replies, levels = [], []
    for level, (column, value) in enumerate(zip(columns, values, strict=True)):
        for reply in value if _is_several(value) else [value]:
            replies.append((column, reply))
            levels.append(level)
    if None in [reply for _, reply in replies]:
        raise Excluded("missing_response")
    if len(replies) < 2:
        raise Excluded("single_response")
    return replies, levels


def _is_several(value: Any) -> bool:
    """Whether a list holds several responses and is not the messages of one."""
    return isinstance(value, list) and not all(isinstance(item, Mapping) for item in value)


def _levels(row: Row, shape: Shape, n: int) -> list[Any]:
    """A number for each of n responses, the lower, the better."""
    paths = shape.verdict.split()
    column = re.findall(r"\w+(?=[/\]]|$)", paths[0])[0]  # of what a list holds, its key
    value = [_get(row, path) for path in paths] if len(paths) > 1 else _get(row, paths[0])
    if value is None or value in ([], ""):
        raise Excluded(f"missing_{column}")
    if shape.better not in ORDERS:
        if len(shape.responses.split()) not in (1, n):  # a column holds several
            raise Excluded("ranks_do_not_match")
        best = _best(row, shape, column, value)
        return [0 if number == best or best >= n else 1 for number in range(n)]
    values = [value, 0] if shape.better == "strength" else from_json(value)
    if not isinstance(values, list):
        raise Malformed(column, "a list of numbers", value)
    numbers = [_number(element) for element in values]
    if None in numbers:
        raise Excluded(f"missing_{column}", f"{column}: {str(value)[:60]}")
    if len(numbers) != n:
        raise Excluded("ranks_do_not_match")
    return [-number for number in numbers] if shape.better == "scores" else numbers


def _best(row: Row, shape: Shape, column: str, verdict: Any) -> int:
    """Which response a verdict means, by the values that it may have; one more than there are for a tie."""
    known = [values.split("/") for values in shape.better.split(", ")]
    meant = [number for number, values in enumerate(known) if _spelt(verdict) in map(_spelt, values)]
    # It may be what stands in a column that they name, or in the reply's own; a number may count the replies.
    if not meant and _number(verdict) is None:
        for values, reply in zip(known, shape.responses.split(), strict=False):
            values.append(reply)
        meant = [number for number, values in enumerate(known) if verdict in map(row.get, values)]
        if len(meant) > 1:
            raise Excluded("verdict_fits_both", f"{column}: {str(verdict)[:60]}")
    if len(meant) != 1:
        how = "what others mean is said by 'columns: {..., verdict: COLUMN=FIRST/SECOND/TIE}', each A or A|B"
        how += "; of numbers below and above 0 by COLUMN=strength" if _number(verdict) is not None else ""
        raise Malformed(column, f"one of {shape.better} ({how})", verdict)
    return meant[0]


def _spelt(value: Any) -> str:
    """A verdict's value, however it is written: `1` of 1, 1.0 and "1.0", `model a` of `Model_A`."""
    number = _number(value)
    text = str(value) if number is None else f"{float(number):.15g}"
    return text.strip().lower().replace("_", " ")


def _margins(
    column: str,
    value: Any,
    categories: Mapping[Any, float] | None,
    order: Sequence[int],
    ranks: Sequence[int],
) -> list[float]:
    if categories is not None and value is not None:
        known = {spell(name): m for spell in (_spelt, str) for name, m in categories.items()}
        found = known.get(str(value), known.get(_spelt(value)))  # as it is spelt, or as it is meant
        if found is None:
            raise Malformed(column, f"one of margin_map's {', '.join(map(str, categories))}", value)
        value = found
    value = from_json(value)
    each = value if isinstance(value, list) else [value]
    if any(isinstance(x, str | bool) and x != "" and _number(x) is None for x in each):
        raise Malformed(column, "a number, or a category and 'margin_map' in the recipe", value)
    numbers, pairs = [_number(element) for element in each], comparison.untied_pairs(ranks)
    if None in numbers or (isinstance(value, list) and len(value) != len(order)):
        raise Excluded("missing_margin")
    margins = numbers * len(pairs)
    if isinstance(value, list):
        sign = -1 if column == "ranks" else 1  # where the lowest is best
        margins = [sign * (numbers[order[i]] - numbers[order[j]]) for i, j in pairs]
    if min(margins) < 0:
        raise Excluded("negative_margin")
    return [float(margin) for margin in margins]


def score_columns(columns: Collection[str]) -> list[str]:
    """Find two columns with a score of `chosen` and of `rejected`, as `score_chosen` and `score_rejected`."""
    for name in columns:
        other = name.replace("chosen", "rejected")
        if other != name and other in columns and re.search("score|rating|reward", name):
            return [name, other]
    return []


def scored_lower(row: Row, columns: Sequence[str]) -> bool:
    """Tell whether the first of two `columns` has the lower number."""
    numbers = [_number(row.get(name)) for name in columns]
    return bool(numbers) and None not in numbers and numbers[0] < numbers[1]


def prompts_differ(row: Row) -> bool:
    """Tell whether two transcripts differ before the last `Assistant:` of either.

    Such a row is a comparison all the same where the name stands inside a reply
    (`comparison.parse_transcript`).
    """
    sides = [row.get("chosen"), row.get("rejected")]
    texts = [side.rpartition("\n\nAssistant:")[0] for side in sides if isinstance(side, str)]
    return row.get("prompt") is None and len(texts) == 2 and texts[0] != texts[1]


# --- values ----------------------------------------------------------------------------------


def _split_replies(prompt: Any, responses: Sequence[tuple[str, Any]]) -> tuple[list[Message], list[str]]:
    """The prompt and the replies to it, each with its column.

    Without a prompt, texts are transcripts, or replies in place of the last one of messages that come first.
    Replies to a transcript may all bear their speaker's name.

    Raises:
        Excluded: `prompt_ends_with_reply` where the column holds a reply already.
    """
    if isinstance(prompt, str):
        asked = f"\n\n{prompt.lstrip()}"
        name = f"{comparison.speakers(asked)[2]}:"
        named = all(isinstance(reply, str) and reply.lstrip().startswith(name) for _, reply in responses)
        if named and comparison.is_transcript(asked):
            prompt, responses = asked, [(c, reply.lstrip().removeprefix(name)) for c, reply in responses]
    empty = prompt is None or (isinstance(prompt, str) and not prompt.strip())
    before = [] if empty else as_messages(prompt)
    conversations: list[list[Message]] = []
    for column, value in responses:
        if not isinstance(value, str):
            said = as_messages(value, column)
        elif (messages := comparison.messages_of_text(value)) is not None:
            said = messages
        elif prompt is None and conversations and not isinstance(responses[0][1], str):
            said = [*conversations[0][:-1], {"role": "assistant", "content": value}]
        elif prompt is None:
            said = comparison.parse_transcript(value)
        else:
            said = [{"role": "assistant", "content": comparison.as_reply(prompt, value)}]
        conversations.append(_whole(before, said))
    found, replies = _shared(conversations)
    comparison.check_prompt(found, continued=len(found) > len(before))
    return found, replies


def _whole(prompt: list[Message], said: list[Message]) -> list[Message]:
    """The whole conversation of a prompt and messages that hold it, or a part of it, or follow it."""
    if not said or said[-1]["role"] != "assistant":
        raise Excluded("ends_without_reply")
    n = len(prompt)
    if not prompt or any(_same(said[start : start + n], prompt) for start in range(len(said) - n)):
        return said
    if len(said) > 1 and _same(prompt[-(len(said) - 1) :], said[:-1]):
        return [*prompt, said[-1]]
    follows = ["assistant", "tool", *["user"] * (prompt[-1]["role"] == "system")]
    if said[0]["role"] not in follows:
        raise Excluded("differing_prompts", "the messages do not hold the prompt")
    return [*prompt, *said]


def _same(one: list[Message], other: list[Message]) -> bool:
    """Whether messages are the same but for white space at their ends."""
    a, b = ([(m["role"], m["content"].strip(), m.get("tool_calls")) for m in each] for each in (one, other))
    return a == b


def _shared(conversations: Sequence[list[Message]]) -> tuple[list[Message], list[str]]:
    """What whole conversations have in common, and the one reply in which each ends."""
    prompt, rests = comparison.split_at_common_prefix(conversations)
    if any(len(rest) > 1 for rest in rests):
        asked = any(message["role"] in ("user", "system") for rest in rests for message in rest)
        raise Excluded("differing_prompts" if asked else "reply_of_several_messages")
    if any("tool_calls" in reply for [reply] in rests):
        raise Excluded("tool_calls", "a reply is a call of a tool")
    return prompt, [reply["content"] for [reply] in rests]


def _number(value: Any) -> Any:
    """A finite number, also one that is written as a text; None for anything else."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    known = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    return value if known and abs(value) <= sys.float_info.max else None
