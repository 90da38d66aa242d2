"""Comparisons to token ids: whole conversations, truncated alike, split at their common prefix.

`tokenize` is the second of two cached passes over a data set; the first is `parsing`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets as hf_datasets
import jinja2
import tokenizers
import transformers
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rm_recipe import batching, preferences, tokenization
from rm_recipe.batching import Encoded, split_at_common_prefix
from rm_recipe.errors import DataError, one_line
from rm_recipe.messages import Excluded, Message
from rm_recipe.passes import run_pass
from rm_recipe.preferences import Comparison
from rm_recipe.split import Split, set_excluded_apart
from rm_recipe.tokenization import render


@dataclass(frozen=True)
class Tokenized:
    """What became of a comparison.

    Attributes:
        encoded: its token ids, None where it is left out.
        reason: why it is left out, else empty.
        detail: what the template said, where it refuses.
        lengths: tokens of the K whole conversations.
        fates: where one of them exceeds `max_length`, for each of `FATES` what becomes of the
            comparison: `truncated`, or the reason why it is left out.
    """

    encoded: Encoded | None
    reason: str
    lengths: list[int]
    fates: dict[str, str]
    detail: str = ""


TRUNCATIONS = ("drop_oldest_turns", "keep_end", "exclude")
# What other trainers do, for the doctor's report only: it can cut away all that tells replies apart.
CUT_END = "cut_end"
FATES = (*TRUNCATIONS, CUT_END)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    comparison: Comparison,
    max_length: int | None,
    truncation: str = "drop_oldest_turns",
) -> Encoded:
    """The token ids of a comparison's K conversations, none longer than `max_length`.

    Every conversation is tokenised whole, so that no tokenizer can merge across the end of the
    prompt. `drop_oldest_turns` leaves out the same oldest turns for all K, up to the last
    question; `keep_end` cuts the same number of tokens off the front, and never into the replies.

    Raises:
        Excluded: `response_too_long` where a reply alone exceeds `max_length`, `too_long` where
            the last question and the reply do (or anything does, under `exclude`),
            `identical_after_tokenization`, `refused_by_template`.
    """
    conversations = _tokenize(tokenizer, [comparison])[0]
    if isinstance(conversations, str):
        raise Excluded("refused_by_template", conversations)
    return _fit(tokenizer, comparison, conversations, max_length, truncation)


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    comparisons: Sequence[Comparison],
    max_length: int | None,
    truncation: str,
) -> list[Tokenized]:
    """`encode` for many comparisons, in one call of the tokenizer, with what the doctor reports."""
    results = []
    for comparison, conversations in zip(comparisons, _tokenize(tokenizer, comparisons), strict=True):
        if isinstance(conversations, str):
            results.append(Tokenized(None, "refused_by_template", [], {}, conversations))
            continue
        lengths = [len(ids) for ids in conversations]
        fits = max_length is None or max(lengths) <= max_length
        outcomes: dict[str, Encoded | str] = {}
        for choice in (truncation,) if fits else TRUNCATIONS:
            try:
                outcomes[choice] = _fit(tokenizer, comparison, conversations, max_length, choice)
            except Excluded as excluded:
                outcomes[choice] = excluded.reason
        fates: dict[str, str] = {}
        if not fits:
            fates = {key: got if isinstance(got, str) else "truncated" for key, got in outcomes.items()}
            cut = [ids[:max_length] for ids in conversations]
            fates[CUT_END] = "identical" if _identical(cut, comparison.ranks) else "truncated"
        chosen = outcomes[truncation]
        if isinstance(chosen, str):
            results.append(Tokenized(None, chosen, lengths, fates))
        else:
            results.append(Tokenized(chosen, "", lengths, fates))
    return results


def tokenize(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation: str,
    num_proc: int | None = None,
) -> Split:
    """Adds the columns `prefix` (token ids), `rests` (ids for each response), `lengths`, `fates`.

    What does not fit `max_length` is truncated or counted as `encode` says.

    Raises:
        DataError: nothing is left.
    """
    backend = tokenizer.backend_tokenizer.to_str()
    versions = [tokenizers.__version__, transformers.__version__, jinja2.__version__]
    named = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}  # templates read them
    settings = [backend, tokenizer.chat_template, named, max_length, truncation, versions]
    text = hf_datasets.Value("string")
    ids = hf_datasets.List(hf_datasets.Value("int32"))
    added = {
        "prefix": ids,
        "rests": hf_datasets.List(ids),
        "lengths": ids,
        "fates": dict.fromkeys(FATES, text),
        "excluded": text,
        "detail": text,
    }

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The new columns of a batch."""
        comparisons = [
            Comparison(*row) for row in zip(batch["prompt"], batch["responses"], batch["ranks"], strict=True)
        ]
        results = encode_all(tokenizer, comparisons, max_length, truncation)
        return {
            "prefix": [r.encoded.prefix if r.encoded else [] for r in results],
            "rests": [r.encoded.rests if r.encoded else [] for r in results],
            "lengths": [r.lengths for r in results],
            "fates": [{choice: r.fates.get(choice, "") for choice in FATES} for r in results],
            "excluded": [r.reason for r in results],
            "detail": [r.detail for r in results],
        }

    encoded = run_pass(
        split.comparisons,
        encode,
        "Tokenising",
        {**split.comparisons.features, **added},
        [*settings, sys.modules[__name__], tokenization, batching, preferences],
        num_proc,
        batched=True,
    )
    result = set_excluded_apart(replace(split, comparisons=encoded, tokenized=encoded))
    if not len(result.comparisons):
        raise DataError(f"no comparison is left after tokenising: {result.why_excluded()}")
    return result


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, comparisons: Sequence[Comparison]
) -> list[list[list[int]] | str]:
    """The ids of each comparison's K whole conversations; the template's words where it refuses one."""
    texts: list[list[str] | str] = []
    for comparison in comparisons:
        try:
            texts.append([render(tokenizer, messages) for messages in comparison.conversations()])
        except (TemplateError, TypeError) as error:  # such as one that wants roles to alternate
            texts.append(f"the template says: {one_line(error)}")
    # Past the wrapper, whose own work for each text takes as long again as the tokenizer's.
    flat = [text for group in texts if isinstance(group, list) for text in group]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # which the wrapper leaves behind when somebody asked it for either
    backend.no_padding()
    encodings = iter(backend.encode_batch_fast(flat, add_special_tokens=False))
    return [group if isinstance(group, str) else [next(encodings).ids for _ in group] for group in texts]


def _fit(
    tokenizer: PreTrainedTokenizerBase,
    comparison: Comparison,
    conversations: list[list[int]],
    max_length: int | None,
    truncation: str,
) -> Encoded:
    prompt = comparison.prompt
    while max_length is not None and max(map(len, conversations)) > max_length:
        shorter = _drop_oldest_turn(prompt) if truncation == "drop_oldest_turns" else None
        if shorter is None:
            question = _question_length(tokenizer, prompt, conversations)
            special = set(tokenizer.all_special_ids)
            conversations = _cut_front(conversations, question, max_length, truncation, special)
            break
        prompt = shorter
        again = _tokenize(tokenizer, [replace(comparison, prompt=prompt)])[0]
        if isinstance(again, str):
            raise Excluded("refused_by_template", again)
        conversations = again
    if _identical(conversations, comparison.ranks):
        raise Excluded("identical_after_tokenization")
    return split_at_common_prefix(conversations)


def _identical(conversations: list[list[int]], ranks: list[int]) -> bool:
    """Whether two conversations that are not tied read the same."""
    seen: dict[tuple[int, ...], int] = {}
    return any(
        seen.setdefault(tuple(ids), rank) != rank for ids, rank in zip(conversations, ranks, strict=True)
    )


def _drop_oldest_turn(prompt: list[Message]) -> list[Message] | None:
    """The prompt without its oldest exchange, a system message kept; None at the last question."""
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    turns = prompt[len(system) :]
    starts = [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]
    return [*system, *turns[starts[0] :]] if starts else None


def _question_length(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], conversations: list[list[int]]
) -> int:
    """Tokens before the replies, which the K replies' own common start is not among."""
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError):  # one that takes no prompt without its reply
        return len(split_at_common_prefix(conversations).prefix)
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    return len(split_at_common_prefix([[*alone, -1], *conversations]).prefix)


def _cut_front(
    conversations: list[list[int]], question: int, max_length: int, truncation: str, special: set[int]
) -> list[list[int]]:
    """Cuts what is too much off the front, behind a special token that it starts with.

    An encoder reads its reward at that token. The first `question` tokens may be cut, the replies
    behind them never.
    """
    longest = max(map(len, conversations))
    if longest - question > max_length:
        raise Excluded("response_too_long")
    over, kept = longest - max_length, 1 if conversations[0][0] in special else 0
    if truncation != "keep_end" or kept + over >= question:
        raise Excluded("too_long")
    return [ids[:kept] + ids[kept + over :] for ids in conversations]
