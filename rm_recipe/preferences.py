"""What a comparison is, and the shapes in which data sets write one.

A row of a data set becomes a `Comparison` or raises `Excluded` with the reason under which it is
counted; nothing is skipped in silence.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]  # {"role": "user" | "assistant" | "system", "content": text}

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


class Excluded(Exception):  # noqa: N818 - a verdict on a row, no error of the program
    """A row that is no comparison; the argument is the reason, a short name that is counted."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Comparison:
    """One prompt and its responses, best first (InstructGPT, arXiv 2203.02155, section 3.5).

    Attributes:
        prompt: the messages before the response, the last one not the assistant's.
        responses: texts of the assistant's reply, K >= 2, best first.
        subset: the part of the data set that the row comes from.
    """

    prompt: list[Message]
    responses: list[str]
    subset: str = ""

    def conversations(self) -> list[list[Message]]:
        """The K whole conversations, each ending in its response."""
        return [conversation(self.prompt, response) for response in self.responses]


def conversation(prompt: list[Message], response: str) -> list[Message]:
    """A prompt and its response as one list of messages."""
    return [*prompt, {"role": "assistant", "content": response}]


def parse_transcript(text: str) -> list[Message]:
    """An hh-rlhf transcript (`\\n\\nHuman: ...\\n\\nAssistant: ...`) as messages.

    Only a speaker's name after a blank line starts a turn, so `Human:` inside a message stays
    there. Each message loses the white space around it.

    Raises:
        Excluded: `not_a_transcript`, where text stands before the first turn.
    """
    before, *parts = _TURN.split("\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        raise Excluded("not_a_transcript")
    return [
        {"role": _SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def parse_row(row: Mapping[str, Any]) -> Comparison:
    """A comparison from a row with `chosen`, `rejected` and perhaps `prompt` and `subset`.

    Without a prompt, `chosen` and `rejected` are hh-rlhf transcripts or whole lists of messages.
    With one, the prompt is a text (one user message) or messages, and the responses are texts, one
    assistant message, or the whole conversation (UltraFeedback). Texts are taken as they stand.

    Raises:
        Excluded: with the reason.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        raise Excluded("missing_response")
    if row.get("prompt") is None:
        prompt, best = _split_reply(chosen)
        other_prompt, worst = _split_reply(rejected)
        if prompt != other_prompt:
            raise Excluded("differing_prompts")
    else:
        prompt = as_messages(row["prompt"])
        best, worst = _reply(prompt, chosen), _reply(prompt, rejected)
    if not any(message["content"].strip() for message in prompt):
        raise Excluded("empty_prompt")
    if not best.strip() or not worst.strip():
        raise Excluded("empty_response")
    if best.strip() == worst.strip():
        raise Excluded("identical_responses")
    return Comparison(prompt, [best, worst], str(row.get("subset") or ""))


def _split_reply(value: Any) -> tuple[list[Message], str]:
    messages = parse_transcript(value) if isinstance(value, str) else as_messages(value)
    if not messages or messages[-1]["role"] != "assistant":
        raise Excluded("ends_without_reply")
    return messages[:-1], messages[-1]["content"]


def as_messages(value: Any) -> list[Message]:
    """A prompt's messages; a text means one user message.

    Raises:
        Excluded: `not_messages`.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    try:
        messages = [{"role": m["role"], "content": m["content"]} for m in value]
    except (TypeError, KeyError):
        raise Excluded("not_messages") from None
    if not all(isinstance(text, str) for message in messages for text in message.values()):
        raise Excluded("not_messages")
    return messages


def _reply(prompt: list[Message], value: Any) -> str:
    """The reply of a text, of one assistant message, or of the prompt's messages and one more."""
    if isinstance(value, str):
        return value
    before, reply = _split_reply(value)
    if before not in ([], prompt):
        raise Excluded("differing_prompts")
    return reply
