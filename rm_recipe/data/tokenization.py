"""Comparisons to token ids: whole conversations, truncated alike, split at their common prefix.

`tokenize` is the second of two cached passes over a data set; the first is in `loading`.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import datasets as hf_datasets
import jinja2
import pyarrow.compute as pc
import tokenizers
import transformers
from jinja2 import TemplateError
from transformers import (
    PreTrainedTokenizerBase,
)

from rm_recipe.data import chat_template
from rm_recipe.data import comparison as comparison_module
from rm_recipe.data.chat_template import special_tokens
from rm_recipe.data.comparison import Comparison, Encoded, split_at_common_prefix
from rm_recipe.data.dataset import Split, arrow_column, run_pass, set_excluded_apart
from rm_recipe.data.messages import Excluded, Message, conversation
from rm_recipe.errors import DataError, one_line

logger = logging.getLogger("rm_recipe")


@dataclass(frozen=True)
class Tokenized:
    """What became of a comparison.

    Attributes:
        encoded: its token ids, None where it is left out.
        reason: why it is left out, else empty; `detail` says what the template did, where it refuses.
        lengths: tokens of the K whole conversations.
        fates: where one of them may not fit `max_length`, for each of `FATES` what becomes of the
            comparison: `truncated` (`shortened_for_reply` where a reply exceeds its share), the reason why
            it is left out, or nothing.
        unshown: whose text the chat template leaves out: a role, or `reply`; else empty.
    """

    encoded: Encoded | None
    reason: str
    lengths: list[int]
    fates: dict[str, str]
    unshown: str = ""
    detail: str = ""


TRUNCATIONS = ("drop_oldest_turns", "keep_end", "exclude")
TRUNCATED, SHORTENED = "truncated", "shortened_for_reply"
# The part of `max_length` that is kept for a reply, so that the context it is read in follows from the
# prompt and not from what the reply is scored beside.
REPLY_SHARE = 0.25
# What other trainers do, for the doctor's report only: it can cut away all that tells replies apart.
CUT_END = "cut_end"
FATES = (*TRUNCATIONS, CUT_END)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    comparison: Comparison,
    max_length: int | None,
    truncation: str = "drop_oldest_turns",
    *,
    alike: bool = False,
) -> Encoded:
    """The token ids of a comparison's K conversations, none longer than `max_length`.

    Every conversation is tokenised whole, so that no tokenizer can merge across the end of the prompt. What a
    prompt loses follows from the prompt: it may take all of `max_length` but `REPLY_SHARE`, and only a reply
    that is longer than that share takes more. `drop_oldest_turns` leaves out the oldest turns, up to the last
    question, which is kept as long as the reply fits beside it; `keep_end` cuts tokens off the front, and
    never into the reply.

    Args:
        alike: cut all K prompts as the longest reply needs it, so that in training nothing but the replies
            tells the conversations apart. Otherwise each is what its reply would get alone.

    Raises:
        Excluded: `response_too_long` where a reply alone exceeds `max_length`, `too_long` where
            the last question and the reply do (or anything does, under `exclude`),
            `identical_after_tokenization`, `refused_by_template`, `control_tokens` where a text holds one
            of the tokenizer's special tokens, which would be read as that token.
    """
    conversations = _ids(tokenizer, _texts(tokenizer, comparison))
    return _fit(tokenizer, comparison, conversations, max_length, truncation, alike)[0]


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    comparisons: Sequence[Comparison],
    max_length: int | None,
    truncation: str,
    *,
    alike: bool = False,
) -> list[Tokenized]:
    """`encode` for many comparisons, in one call of the tokenizer, with what the doctor reports."""
    texts: list[list[str] | Excluded] = []  # or why there are none
    for comparison in comparisons:
        try:
            texts.append(_texts(tokenizer, comparison))
        except Excluded as excluded:
            texts.append(excluded)
    encodings = iter(_ids(tokenizer, [text for group in texts if isinstance(group, list) for text in group]))
    results = []
    for comparison, group in zip(comparisons, texts, strict=True):
        if isinstance(group, Excluded):
            results.append(Tokenized(None, group.reason, [], {}, detail=group.detail))
            continue
        conversations = [next(encodings) for _ in group]
        results.append(
            replace(
                _tokenized(tokenizer, comparison, conversations, max_length, truncation, alike),
                unshown=_unshown(tokenizer, comparison, group),
            )
        )
    return results


def _tokenized(
    tokenizer: PreTrainedTokenizerBase,
    comparison: Comparison,
    conversations: list[list[int]],
    max_length: int | None,
    truncation: str,
    alike: bool,
) -> Tokenized:
    lengths = [len(ids) for ids in conversations]
    fits = max_length is None or max(lengths) <= max_length - _share(max_length)  # nothing can be cut
    outcomes: dict[str, Encoded | str] = {}
    fates: dict[str, str] = {}
    for choice in (truncation,) if fits else TRUNCATIONS:
        try:
            outcomes[choice], fates[choice] = _fit(
                tokenizer, comparison, conversations, max_length, choice, alike
            )
        except Excluded as excluded:
            outcomes[choice] = fates[choice] = excluded.reason
    if max_length is not None and max(lengths) > max_length:
        cut = [ids[:max_length] for ids in conversations]
        fates[CUT_END] = "identical" if _identical(cut, comparison.ranks) else TRUNCATED
    chosen = outcomes[truncation]
    fates = {choice: fate for choice, fate in fates.items() if fate and not fits}
    if isinstance(chosen, str):
        return Tokenized(None, chosen, lengths, fates)
    return Tokenized(chosen, "", lengths, fates)


def tokenize(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation: str,
    num_proc: int | None = None,
    *,
    alike: bool = False,
) -> Split:
    """Adds the columns `prefix` (token ids), `rests` (ids for each response), `lengths`, `fates`, `unshown`.

    What does not fit `max_length` is truncated or counted as `encode` says. Warns of texts that the chat
    template leaves out.

    Raises:
        DataError: nothing is left.
    """
    backend = tokenizer.backend_tokenizer.to_str()
    versions = [tokenizers.__version__, transformers.__version__, jinja2.__version__]
    named = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}  # templates read them
    settings = [backend, tokenizer.chat_template, named, max_length, truncation, alike, versions]
    text = hf_datasets.Value("string")
    ids = hf_datasets.List(hf_datasets.Value("int32"))
    added = {
        "prefix": ids,
        "rests": hf_datasets.List(ids),
        "lengths": ids,
        "fates": dict.fromkeys(FATES, text),
        "unshown": text,
        "excluded": text,
        "detail": text,
    }

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The new columns of a batch."""
        comparisons = [
            Comparison(*row) for row in zip(batch["prompt"], batch["responses"], batch["ranks"], strict=True)
        ]
        results = encode_all(tokenizer, comparisons, max_length, truncation, alike=alike)
        return {
            "prefix": [r.encoded.prefix if r.encoded else [] for r in results],
            "rests": [r.encoded.rests if r.encoded else [] for r in results],
            "lengths": [r.lengths for r in results],
            "fates": [{choice: r.fates.get(choice, "") for choice in FATES} for r in results],
            "unshown": [r.unshown for r in results],
            "excluded": [r.reason for r in results],
            "detail": [r.detail for r in results],
        }

    encoded = run_pass(
        split.comparisons,
        encode,
        "Tokenising",
        {**split.comparisons.features, **added},
        [*settings, sys.modules[__name__], chat_template, comparison_module],
        num_proc,
        batched=True,
    )
    result = set_excluded_apart(replace(split, comparisons=encoded, tokenized=encoded))
    if not len(result.comparisons):
        raise DataError(f"no comparison is left after tokenising: {result.why_excluded()}")
    unshown = count_unshown(result)
    if unshown:
        parts = ", ".join(f"{whose} in {n}" for whose, n in unshown.items())
        logger.warning(
            "warning: of %d comparisons the chat template leaves out text: %s", len(result.comparisons), parts
        )
    return result


def count_unshown(split: Split) -> dict[str, int]:
    """In how many comparisons the template leaves out text, by whose it is: a role's, or the `reply`."""
    counts = pc.value_counts(arrow_column(split.comparisons, "unshown")).to_pylist()
    return {item["values"]: item["counts"] for item in counts if item["values"]}


def _texts(tokenizer: PreTrainedTokenizerBase, comparison: Comparison) -> list[str]:
    """The K conversations through the chat template; raises Excluded where that cannot be."""
    texts = [*(message["content"] for message in comparison.prompt), *comparison.responses]
    if any(map(special_tokens(tokenizer).search, texts)):
        raise Excluded("control_tokens")
    try:
        return [render(tokenizer, messages) for messages in comparison.conversations()]
    except (TemplateError, TypeError) as error:  # such as one that wants user and assistant to alternate
        raise Excluded("refused_by_template", f"the template says: {one_line(error)}") from None


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts, past the wrapper, whose work takes as long again as the tokenizer's."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # which the wrapper leaves behind when somebody asked it for either
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _unshown(tokenizer: PreTrainedTokenizerBase, comparison: Comparison, texts: Sequence[str]) -> str:
    """Whose text is not in the rendered conversations; empty where all is."""
    if not all(reply.strip() in text for reply, text in zip(comparison.responses, texts, strict=True)):
        return "reply"  # R1's template cuts what was thought
    roles = tuple(message["role"] for message in comparison.prompt)
    return _unshown_role(tokenizer, str(tokenizer.chat_template), roles)


@lru_cache(maxsize=1024)
def _unshown_role(tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...]) -> str:
    """The first role whose message the template leaves out of such a prompt (TinyLlama's own: `tool`)."""
    words = [f"Qz{number}x" for number in range(len(roles))]
    prompt = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    try:
        text = render(tokenizer, conversation(prompt, "Qzreply"))
    except (TemplateError, TypeError):  # it wants certain contents; what it shows is not known
        return ""
    return next((role for role, word in zip(roles, words, strict=True) if word not in text), "")


def _share(max_length: int) -> int:
    """Tokens of `max_length` that are kept for a reply and its end token."""
    return int(max_length * REPLY_SHARE)


def _fit(
    tokenizer: PreTrainedTokenizerBase,
    comparison: Comparison,
    conversations: list[list[int]],
    max_length: int | None,
    truncation: str,
    alike: bool,
) -> tuple[Encoded, str]:
    """The conversations as they fit, and how: `TRUNCATED`, `SHORTENED`, or nothing where they are whole."""
    how = ""
    groups = [list(range(len(conversations)))] if alike else [[k] for k in range(len(conversations))]
    fitted: list[list[int]] = []
    for group in groups:
        whole = ids = [conversations[k] for k in group]
        if max_length is not None and max(map(len, whole)) > max_length - _share(max_length):
            part = replace(
                comparison,
                responses=[comparison.responses[k] for k in group],
                ranks=[comparison.ranks[k] for k in group],
            )
            ids, shortened = _truncate(tokenizer, part, whole, max_length, truncation)
            if ids != whole:
                how = SHORTENED if shortened or how == SHORTENED else TRUNCATED
        fitted += ids
    conversations = fitted
    if _identical(conversations, comparison.ranks):
        raise Excluded("identical_after_tokenization")
    return split_at_common_prefix(conversations), how


def _truncate(
    tokenizer: PreTrainedTokenizerBase,
    comparison: Comparison,
    conversations: list[list[int]],
    max_length: int,
    truncation: str,
) -> tuple[list[list[int]], bool]:
    """Conversations cut alike, and whether they had to be for a reply longer than its share."""
    prompt, room = comparison.prompt, max_length - _share(max_length)
    shortened = False
    while True:
        alone, question = _question(tokenizer, prompt, conversations)
        longest = max(map(len, conversations))
        in_share = alone <= room or truncation == "exclude"  # which cuts nothing
        if in_share and longest <= max_length:
            return conversations, shortened
        if longest - question > max_length:
            raise Excluded("response_too_long")
        if truncation == "keep_end":
            over = max(alone - room, longest - max_length)
            return _cut_front(tokenizer, conversations, question, over), over > max(0, alone - room)
        shorter = _drop_oldest_turn(prompt) if truncation == "drop_oldest_turns" else None
        if shorter is None:
            if longest > max_length:
                raise Excluded("too_long")
            return conversations, shortened
        prompt, shortened = shorter, shortened or in_share
        conversations = _ids(tokenizer, _texts(tokenizer, replace(comparison, prompt=prompt)))


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


def _question(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], conversations: list[list[int]]
) -> tuple[int, int]:
    """Tokens of the prompt by itself, whatever the replies, and those of them that the conversations keep.

    The K replies' own common start is not among them.
    """
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError):  # one that takes no prompt without its reply
        common = len(split_at_common_prefix(conversations).prefix)
        return common, common
    alone = _ids(tokenizer, [text])[0]
    return len(alone), len(split_at_common_prefix([[*alone, -1], *conversations]).prefix)


def _cut_front(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[int]], question: int, over: int
) -> list[list[int]]:
    """Cuts `over` tokens off the front, behind a special token that it starts with.

    An encoder reads its reward at that token. The first `question` tokens may be cut, the replies
    behind them never.
    """
    first = tokenizer.convert_ids_to_tokens(conversations[0][0])
    kept = 1 if special_tokens(tokenizer).fullmatch(first) else 0
    if kept + over >= question:
        raise Excluded("too_long")
    return [ids[:kept] + ids[kept + over :] for ids in conversations]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text that is scored: the conversation through the chat template."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False))
