"""Prompts and replies to them, from files, several replies to each prompt."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rm_recipe.data.formats import is_comparison_shape, parse_row
from rm_recipe.data.json_files import read_rows, unit
from rm_recipe.data.messages import (
    Excluded,
    Malformed,
    Message,
    as_messages,
    as_reply,
    check_prompt,
    check_unicode,
    in_context,
)
from rm_recipe.errors import DataError


@dataclass(frozen=True)
class Sample:
    """A prompt and its replies.

    Attributes:
        is_safety: whether the prompt is marked as one that may bring an unsafe reply (Llama 2).
        cut: how many replies were cut at `max_new_tokens`; None where that is not known.
    """

    prompt: list[Message]
    responses: list[str]
    is_safety: bool = False
    cut: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The line of a samples file."""
        line: dict[str, Any] = {"prompt": self.prompt, "responses": self.responses}
        line |= {"is_safety": True} if self.is_safety else {}
        return line | ({"cut": self.cut} if self.cut is not None else {})


def read_prompts(file: Path, most: int | None = None) -> tuple[list[Sample], Counter[str]]:
    """The prompts of a .jsonl or .json file (.gz too), without replies, each once; and what was left out.

    A row has a `prompt` (a text or messages), or is a comparison of any shape that training takes.

    Args:
        most: so many are read, the first ones.

    Raises:
        DataError: naming file and row; or no prompt is left.
    """
    found: dict[str, Sample] = {}
    excluded: Counter[str] = Counter()
    for number, row in read_rows(file):
        with _row(file, number, excluded):
            if row.get("prompt") is None and is_comparison_shape(row):
                prompt = parse_row(row).prompt
            else:
                prompt = _prompt(row)
            found.setdefault(json.dumps(prompt), Sample(prompt, [], bool(row.get("is_safety"))))
        if len(found) == most:
            break
    return _some(file, found), excluded


def read_samples(file: Path, most: int | None = None) -> tuple[list[Sample], Counter[str]]:
    """Replies that are given, gathered by prompt; and what was left out.

    A row has a `prompt` and its `responses`, as `sample` writes them, or one `response`.

    Args:
        most: so many prompts are taken, the first ones.

    Raises:
        DataError: naming file and row; or no prompt is left.
    """
    found: dict[str, Sample] = {}
    excluded: Counter[str] = Counter()
    for number, row in read_rows(file):
        texts = row["responses"] if row.get("responses") is not None else [row.get("response")]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{file}, {unit(file)} {number}: expected a 'prompt' and its 'responses', a list of texts, "
                "or one 'response'"
            )
        with _row(file, number, excluded):
            prompt = _prompt(row)
            check_unicode(texts)
            replies = [as_reply(row["prompt"], str(text)) for text in texts]
            cut = row.get("cut")
            new = Sample(prompt, replies, bool(row.get("is_safety")), cut if isinstance(cut, int) else None)
            before = found.get(json.dumps(prompt))
            if before is not None:
                known = None if before.cut is None or new.cut is None else before.cut + new.cut
                new = replace(before, responses=[*before.responses, *replies], cut=known)
            found[json.dumps(prompt)] = new
    return _some(file, found)[:most], excluded


@contextmanager
def _row(file: Path, number: int, excluded: Counter[str]) -> Iterator[None]:
    """Within it, a row that is no prompt is counted, and a fault of the file is named."""
    try:
        yield
    except Excluded as reason:
        excluded[reason.reason] += 1
    except Malformed as fault:
        raise DataError(f"{file}, {unit(file)} {number}: {fault}") from None


def _some(file: Path, found: dict[str, Sample]) -> list[Sample]:
    if not found:
        raise DataError(f"{file} holds no prompt that can be used")
    return list(found.values())


def _prompt(row: dict[str, Any]) -> list[Message]:
    if row.get("prompt") is None:
        raise Malformed("prompt", "a text or a list of messages", None)
    prompt = in_context(as_messages(row["prompt"]), row)
    check_prompt(prompt)
    check_unicode([message["content"] for message in prompt])
    return prompt
