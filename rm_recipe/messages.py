"""Messages, and the two ways in which a row of a data set is refused.

`Excluded` is a verdict on one row and is counted under its reason; `Malformed` is a fault of the file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, str]  # {"role": one of ROLES, "content": text}
ROLES = ("system", "user", "assistant", "tool")


class Excluded(Exception):  # noqa: N818 - a verdict on a row, no error of the program
    """A row that is no comparison; the argument is the reason, a short name that is counted."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


class Malformed(Exception):  # noqa: N818 - becomes a DataError with file and row
    """A value of the wrong type; the arguments are its column, what was expected, and the value."""

    def __str__(self) -> str:
        column, expected, value = self.args
        return f"column '{column}' should be {expected}, not {type(value).__name__} {str(value)[:60]!r}"


def conversation(prompt: list[Message], response: str) -> list[Message]:
    """A prompt and its response as one list of messages."""
    return [*prompt, {"role": "assistant", "content": response}]


def as_messages(value: Any, column: str = "prompt") -> list[Message]:
    """A prompt's messages; a text means one user message.

    Raises:
        Excluded: `not_messages` where a message has no role or no content, `unknown_role`.
        Malformed: neither a text nor a list of messages.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
        raise Malformed(column, "a text or a list of messages", value)
    messages = [{"role": m.get("role"), "content": m.get("content")} for m in value]
    if not all(isinstance(text, str) for message in messages for text in message.values()):
        raise Excluded("not_messages")
    if any(message["role"] not in ROLES for message in messages):
        raise Excluded("unknown_role")  # a template may pass over it and its text
    return messages


def check_prompt(prompt: list[Message]) -> None:
    """Raises Excluded for a prompt that asks nothing, or that has been answered already."""
    if not any(message["content"].strip() for message in prompt if message["role"] == "user"):
        raise Excluded("empty_prompt")
    if prompt[-1]["role"] == "assistant":
        raise Excluded("prompt_ends_with_reply")


def check_unicode(texts: Sequence[str]) -> None:
    """Raises Excluded for half a surrogate pair, which JSON can hold and no tokenizer can read."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise Excluded("invalid_text") from None
