"""What a comparison is: messages, responses and ranks, as texts and as tokens; and how a row is refused.

`Excluded` is a verdict on one row and is counted under its reason; `Malformed` is a fault of the file.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product, takewhile
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Message = dict[str, str]  # {"role": one of ROLES, "content": text}, and perhaps "tool_calls": JSON
ROLES = ("system", "user", "assistant", "tool")
# What others call them; capitals do not matter.
ROLE_NAMES = {role: role for role in ROLES} | {"developer": "system", "human": "user", "prompter": "user"}
ROLE_NAMES |= dict.fromkeys(("gpt", "bot", "ai", "model"), "assistant")
ROLE_NAMES |= {"observation": "tool", "function": "tool"}
# Columns; the last two are Gemini's.
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "systemInstruction")
# Columns of what no text model can read.
MEDIA = ("images", "image", "image_path", "videos", "video", "audios", "audio")
TEXTS = ("content", "value", "text", "parts")  # keys of the text; the last is Gemini's
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of what a `Message` has no place for
CALLS = ("tool_calls", "function_calls", "functions")  # the last two are OLMo's, whose texts are not read
_WRITTEN_OUT = re.compile(r"""(array\()?\[?\s*\{\s*(['"])""")  # messages as text, by Python or as JSON
# How a text begins, or begins and ends, that holds turns in a form that is not read: a chat template's, or
# speakers that do not begin lines.
_UNREAD_TURNS = re.compile(
    r"(<s>|<bos>|<BOS_TOKEN>|\[gMASK\]<sop>)?\s*"
    r"(<[|\uff5c][^<>]+[|\uff5c]>|<start_of_turn>\w|\[INST\].*\[/INST\]|<extra_id_\d>\w)"
    r"|(?-i:prompter:|[^\n]{0,300}\bUSER:.*\bASSISTANT:\s*$)"
    r"|(BEGINNING OF CONVERSATION:|#+|<|\w+ Correct)?\s*(Human|User|\u7528\u6237)>?[:\uff1a]"
    r".*\b(Assistant|AI|Bot|GPT|\u52a9\u624b)>?[:\uff1a]\s*$",
    re.DOTALL | re.IGNORECASE,
)
_NVIDIA_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")  # after the first one of HelpSteer's prompts


class Excluded(Exception):  # noqa: N818 - a verdict on a row, no error of the program
    """A row that is no comparison.

    Args:
        reason: a short name that is counted.
        detail: what of this row, in words.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail.encode(errors="replace").decode()  # half a surrogate pair


class Malformed(Exception):  # noqa: N818 - becomes a DataError with file and row
    """A value of the wrong type; the arguments are its column, what was expected, and the value."""

    def __str__(self) -> str:
        column, expected, value = self.args
        return f"column '{column}' should be {expected}, not {type(value).__name__} {str(value)[:60]!r}"


def from_json(value: Any) -> Any:
    """What a text says as JSON, which a list in a .csv has to be; anything else as it is."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def conversation(prompt: list[Message], response: str) -> list[Message]:
    """Join a prompt and its response to one list of messages."""
    return [*prompt, {"role": "assistant", "content": response}]


def as_messages(value: Any, column: str = "prompt") -> list[Message]:
    """Read a prompt; a text means one user message, unless it is itself messages or a transcript.

    Raises:
        Excluded: see `messages_of_text`; `unread_turns` where a text holds turns of another form; a message
            that has no role or text, or says more than its text.
        Malformed: neither a text nor a list of messages.
    """
    if isinstance(value, str):
        messages = messages_of_text(value)
        if messages is None:
            _check_turns(value)
            messages = _turns_of_helpsteer(value)
        return messages[:-1] if messages[-1:] == [{"role": "assistant", "content": ""}] else messages
    several: Any = [value] if isinstance(value, Mapping) else value
    if not isinstance(several, list) or not all(isinstance(m, Mapping) for m in several):
        raise Malformed(column, "a text or a list of messages", value)
    return [_message(message) for message in several]


def messages_of_text(text: str) -> list[Message] | None:
    """Read the messages that a text is: JSON, as text columns hold them, or an hh-rlhf transcript.

    Returns:
        None where it is a text like any other.

    Raises:
        Excluded: `python_repr` where Python wrote a list into the text, which says less than JSON does;
            `not_messages` for JSON that is not whole.
    """
    start = _WRITTEN_OUT.match(text.lstrip())
    keys = [{"role", "content"}, {"from", "value"}]
    if start and any(all(f"{start[2]}{key}{start[2]}" in text for key in pair) for pair in keys):
        if start[2] == "'":
            raise Excluded("python_repr", "write messages as JSON, not by Python's str()")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise Excluded("not_messages", "JSON text that cannot be decoded") from None
        value = value if isinstance(value, list) else [value]
        if all(isinstance(message, dict) and any(p <= message.keys() for p in keys) for message in value):
            return as_messages(value)
    return parse_transcript(text) if is_transcript(text) else None


def _turns_of_helpsteer(text: str) -> list[Message]:
    """The turns of a prompt of HelpSteer 1 and 2, whose first speaker is not named; of any other text one."""
    first, *turns = _NVIDIA_TURN.split(text)
    sides = zip(["User", *turns[::2]], [first, *turns[1::2]], strict=True)
    return [{"role": role.lower(), "content": said} for role, said in sides]


def _check_turns(text: str) -> None:
    before, name, after = text.partition("\n\nAssistant:")
    # hh-rlhf's without the first speaker; whoever quotes a dialogue quotes him, too.
    headless = name and "\n\nHuman:" not in before and "\n\nHuman:" in after
    if headless or text.rstrip().endswith("\n\nAssistant:") or _UNREAD_TURNS.match(text.lstrip()):
        raise Excluded("unread_turns", "a text with turns of a chat template or of speakers; give messages")


def as_reply(prompt: Any, text: str) -> str:
    """Return a reply's text: after a transcript without the white space around it, as those are read.

    Raises:
        Excluded: `unread_turns` where it begins with the name that a text like `Human: ...` lacks.
    """
    if not isinstance(prompt, str):
        return text
    if is_transcript(prompt):
        return text.strip()
    _check_turns(f"{prompt} {text.lstrip()[: len('Assistant:')]}")
    return text


def in_context(prompt: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """Put the system message of a row, in one of `SYSTEM`, before its prompt.

    Raises:
        Excluded: `two_system_messages` that differ, or pictures and the like (`MEDIA`).
        Malformed: it is no text.
    """
    if media := next(filter(row.get, MEDIA), ""):
        raise Excluded("not_text", f"'{media}' holds what no text model can read")
    column = next(filter(row.get, SYSTEM), "")
    if not column:
        return prompt
    system = row[column]
    if isinstance(system, Mapping):
        [system] = [message["content"] for message in as_messages({**system, "role": "system"})]
    if not isinstance(system, str):
        raise Malformed(column, "a text", system)
    if not prompt or prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"].strip() != system.strip():
        raise Excluded("two_system_messages", f"one in '{column}', another in the messages")
    return prompt


def tools_of(row: Mapping[str, Any]) -> str:
    """Return the tools that a row's prompt offers, as JSON; raises Malformed where they are no list."""
    tools = from_json(row.get("tools"))
    if not tools:
        return ""
    if isinstance(tools, list):
        tools = [from_json(tool) for tool in tools]
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise Malformed("tools", "a list of mappings, or one as JSON", tools)
    return json.dumps(tools, default=str)  # of a table: dates


def _is_tool(tool: Any) -> bool:
    """Whether it describes a function, by itself or under `function`."""
    return isinstance(tool, Mapping) and isinstance(tool.get("function") or tool, Mapping)


def _message(message: Mapping[str, Any]) -> Message:
    if thoughts := next(filter(message.get, THOUGHTS), ""):
        raise Excluded("reasoning_content", f"a message has {thoughts}")
    role = message.get("role", message.get("from"))
    content = next((message[key] for key in TEXTS if key in message), None)
    calls: Any = next(filter(None, (from_json(message.get(key)) for key in CALLS)), [])
    if message.get("function_call"):  # as OpenAI had it before
        calls = [{"type": "function", "function": message["function_call"]}]
    if isinstance(content, list):
        content = _joined(content)
    elif content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise Excluded("not_messages", f"a message's role or content is no text: {str(message)[:60]}")
    if role.strip().lower() not in ROLE_NAMES:  # a template may pass over it and its text
        raise Excluded("unknown_role", f"role '{role[:40]}'")
    read = {"role": ROLE_NAMES[role.strip().lower()], "content": content}
    return {**read, "tool_calls": _calls(calls)} if calls else read


def _calls(calls: Any) -> str:
    """Calls of tools as JSON, their arguments too where they are a text, as OpenAI writes them."""
    try:
        calls = json.loads(json.dumps(calls))
        for call in calls:
            function = call.get("function") or call
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Excluded("tool_calls", "calls of tools that cannot be decoded") from None
    return json.dumps(calls)


def _joined(parts: list[Any]) -> str:
    """The text of a content in parts, as templates write it: one part after the other."""
    for part in parts:
        keys = part if isinstance(part, Mapping) else {type(part).__name__: part}
        kind = keys.get("type") or ", ".join(filter(keys.get, keys))  # Gemini has a key for each type
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise Excluded("not_text", f"a part of type '{str(kind)[:40]}'")
    return "".join(part["text"] for part in parts)


def check_prompt(prompt: list[Message], continued: bool = False) -> None:
    """Raise Excluded for a prompt that asks nothing, or (unless `continued`) has been answered already."""
    if not any(message["content"].strip() for message in prompt if message["role"] == "user"):
        raise Excluded("empty_prompt")
    if prompt[-1]["role"] == "assistant" and not continued:
        raise Excluded("prompt_ends_with_reply")


def check_unicode(texts: Sequence[str]) -> None:
    """Raise Excluded for half a surrogate pair, which JSON can hold and no tokenizer can read."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise Excluded("invalid_text") from None


# --- hh-rlhf transcripts (`\n\nHuman: ...\n\nAssistant: ...`) as turns and messages ---------------
# The format has no way to quote a speaker's name, so a rule has to say where a turn starts: at a
# name after a blank line, and only where the speaker changes. `Human:` in the middle of a message,
# or an `Assistant:` that an assistant's reply wrote itself, is then part of the message.
# Others' transcripts have other names, or no blank line before any reply.

_SPEAKERS = [*product(("Human", "User"), ("Assistant", "Bot", "AI"))]


def speakers(text: str) -> tuple[str, str, str]:
    """What stands before the names of a transcript, and who asks and who answers in it."""
    for asks, answers in _SPEAKERS:
        if text.lstrip().startswith(f"{asks}:") and f"\n{answers}:" in text:
            # hh-rlhf's own have single newlines before names that a message wrote itself.
            of_hh = (asks, answers) == ("Human", "Assistant") and "\n\nAssistant:" in text
            close = re.search(rf"[^\n]\n({asks}|{answers}):", text)
            return "\n" if close and not of_hh else "\n\n", asks, answers
    return "\n\n", "Human", "Assistant"


def is_transcript(text: str) -> bool:
    """Tell whether a text is a transcript by its look, and no message that speaks of one.

    It begins with a blank line and a speaker, or with a speaker and ends where the reply is to come.
    """
    text = text.replace("\r\n", "\n")
    before, *names = speakers(text)
    begins = text.lstrip().startswith(tuple(f"{name}:" for name in names))
    return begins and (text.startswith("\n\n") or text.rstrip().endswith(f"{before}{names[1]}:"))


def parse_transcript(text: str) -> list[Message]:
    """Read a transcript's messages, each without the white space around it.

    Raises:
        Excluded: `not_a_transcript`: text stands before the first speaker, or there is none.
    """
    text = text.replace("\r\n", "\n")
    before, *names = speakers(text)
    start, *parts = re.split(f"{before}({'|'.join(names)}):", before + text.lstrip())
    if start or not parts:
        raise Excluded("not_a_transcript")
    turns: list[tuple[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        if turns and turns[-1][0] == speaker:
            turns[-1] = (speaker, f"{turns[-1][1]}{before}{speaker}:{said}")
        else:
            turns.append((speaker, said))
    return [{"role": ROLE_NAMES[speaker.lower()], "content": said.strip()} for speaker, said in turns]


@dataclass(frozen=True)
class Encoded:
    """One tokenised comparison: K whole conversations, split at their common prefix.

    Attributes:
        prefix: the tokens that all K conversations start with.
        suffixes: for each response the tokens after the prefix, at least one each.
    """

    prefix: list[int]
    suffixes: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens that the comparison takes in a row."""
        return len(self.prefix) + sum(map(len, self.suffixes))

    def conversations(self) -> list[list[int]]:
        """Return the K whole conversations, as they are served."""
        return [self.prefix + rest for rest in self.suffixes]


def split_at_common_prefix(conversations: Sequence[Sequence[Any]]) -> tuple[list[Any], list[list[Any]]]:
    """Split K conversations, of messages or of tokens, into their longest common prefix and the K rests.

    The prefix is shortened where a rest would be empty: that is the reply, and at its end the reward is read.
    """
    places = zip(*(each[:-1] for each in conversations), strict=False)
    prefix = [place[0] for place in takewhile(lambda place: place.count(place[0]) == len(place), places)]
    return prefix, [list(each[len(prefix) :]) for each in conversations]


@dataclass(frozen=True)
class Comparison:
    """One prompt and its responses, best first (InstructGPT, arXiv 2203.02155, section 3.5).

    Attributes:
        prompt: the messages before the response.
        responses: texts of the assistant's reply, K >= 2, best first.
        ranks: K ranks, 0 for the best, not decreasing; equal ones are ties. Strictly increasing
            unless given.
        margins: how much better the first of each of `untied_pairs(ranks)` is (Llama 2, arXiv 2307.09288,
            section 3.2.2); empty where nothing is known.
        subset: the part of the data set that the row comes from.
        tools: those that the prompt offers, as JSON; empty for none.
    """

    prompt: list[Message]
    responses: list[str]
    ranks: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    subset: str = ""
    tools: str = ""

    def __post_init__(self) -> None:
        if not self.ranks:
            self.ranks.extend(range(len(self.responses)))

    def conversations(self) -> list[list[Message]]:
        """Return the K whole conversations, each ending in its response."""
        return [conversation(self.prompt, response) for response in self.responses]


def untied_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """List the pairs (better, worse) of K ranks, best first: K choose 2 of them without ties."""
    k = len(ranks)
    return [(i, j) for i in range(k) for j in range(i + 1, k) if ranks[i] < ranks[j]]


Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def agreement(chosen: ArrayLike, rejected: ArrayLike) -> Array:
    """Score each pair: 1 where chosen got the higher reward, 1/2 at a tie, 0 otherwise; `(n,)`.

    A tie says nothing about the preference, so counting it as a win (trl PR 1012) or as a loss
    (trl's `eval_accuracy`) would both be wrong.
    """
    margin = np.asarray(chosen, float) - np.asarray(rejected, float)
    return np.asarray((np.sign(margin) + 1) / 2)


def pair_indices(ranks: Sequence[Sequence[int]]) -> tuple[Indices, Indices, Indices]:
    """Number the untied pairs of comparisons whose responses are laid end to end, best first.

    Args:
        ranks: for each comparison the ranks of its K responses.

    Returns:
        better, worse, comparison: `(pairs,)` each; the first two count responses, the last
        comparisons.
    """
    starts = np.cumsum([0, *map(len, ranks)])
    pairs = [(starts[n] + i, starts[n] + j, n) for n, own in enumerate(ranks) for i, j in untied_pairs(own)]
    better, worse, comparison = np.array(pairs, np.int64).reshape(-1, 3).T
    return better, worse, comparison


def mean_by_comparison(values: ArrayLike, comparison: Indices) -> Array:
    """Average over each comparison's pairs, so that each comparison weighs 1; `(comparisons,)`.

    InstructGPT (arXiv 2203.02155, equation 1) divides by K choose 2 for the same reason.
    """
    return np.asarray(np.bincount(comparison, np.asarray(values, float)) / np.bincount(comparison))


def pairwise_agreement(values: ArrayLike, ranks: Sequence[Sequence[int]]) -> Array:
    """Compute for each comparison the share of its untied pairs that `values` order as its ranks do.

    Args:
        values: of all responses end to end, `(responses,)`: rewards, or lengths for a baseline.
            Equal ones count 1/2.

    Returns:
        `(comparisons,)`
    """
    values = np.asarray(values, float)
    better, worse, comparison = pair_indices(ranks)
    return mean_by_comparison(agreement(values[better], values[worse]), comparison)
