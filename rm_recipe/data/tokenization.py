"""Comparisons to token ids: whole conversations, truncated alike, split at their common prefix.

`tokenize` is the second of two cached passes over a data set; the first is in `loading`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import datasets as hf_datasets
import jinja2
import pyarrow.compute as pc
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase as Tokenizer

from rm_recipe.data import chat_template
from rm_recipe.data import comparison as comparison_module
from rm_recipe.data.comparison import Comparison, Encoded, Excluded, Message, split_at_common_prefix
from rm_recipe.data.dataset import Split, arrow_column, as_comparisons, run_pass, set_aside
from rm_recipe.errors import DataError, one_line
from rm_recipe.processes import warn

# The part of `max_length` that is kept for a reply, so that the context it is read in follows from the
# prompt and not from what the reply is scored beside.
REPLY_SHARE = 0.25
_Ids = list[list[int]]
_IDS, _TEXT = hf_datasets.List(hf_datasets.Value("int32")), hf_datasets.Value("string")
_TOKENIZED = {"prefix": _IDS, "suffixes": hf_datasets.List(_IDS), "lengths": _IDS, "reply_lengths": _IDS}
_TOKENIZED |= {"truncated": hf_datasets.Value("bool"), "unshown": _TEXT, "excluded": _TEXT, "detail": _TEXT}


def encode(
    tokenizer: Tokenizer,
    comparison: Comparison,
    max_length: int | None,
    truncation: str = "drop_oldest_turns",
) -> Encoded:
    """Tokenise a comparison's K conversations, none longer than `max_length`.

    Every conversation is tokenised whole, so that no tokenizer can merge across the end of the prompt. What a
    prompt loses follows from the prompt: it may take all of `max_length` but `REPLY_SHARE`, and only a reply
    that is longer than that share takes more. `drop_oldest_turns` leaves out the oldest turns, up to the last
    question, which is kept as long as the reply fits beside it; `keep_end` cuts tokens off the front, and
    never into the reply.

    Raises:
        Excluded: `response_too_long` where a reply alone exceeds `max_length`, `too_long` where
            the last question and the reply do (or anything does, under `exclude`),
            `identical_after_tokenization`, `refused_by_template`, `control_tokens` where a text holds one
            of the tokenizer's special tokens, which would be read as that token.
    """
    [row] = encode_all(tokenizer, [comparison], max_length, truncation)
    if row["excluded"]:
        raise Excluded(row["excluded"], row["detail"])
    return Encoded(row["prefix"], row["suffixes"])


def encode_all(
    tokenizer: Tokenizer,
    comparisons: Sequence[Comparison],
    max_length: int | None,
    truncation: str,
    *,
    alike: bool = False,
) -> list[dict[str, Any]]:
    """Tokenise many comparisons in one call of the tokenizer, as `encode` does one.

    Args:
        alike: cut all K prompts as the longest reply needs it, so that in training nothing but the replies
            tells the conversations apart. Otherwise each is what its reply would get alone.

    Returns:
        for each comparison `prefix` and `suffixes` as in `Encoded`, `lengths` (tokens of the K whole
        conversations), `reply_lengths` (those from where these part: prompts may be cut unequally, and are
        then in the suffixes), `truncated`, `unshown` (whose text the chat template leaves out: a role, or
        `reply`), and where it is left out only `excluded`, the reason, with `detail`.
    """
    truncate = partial(_truncate, tokenizer, max_length=max_length, truncation=truncation)
    rows, texts = [], []
    for comparison in comparisons:
        row: dict[str, Any] = {"prefix": [], "suffixes": [], "lengths": [], "reply_lengths": []}
        rows.append(row | {"truncated": False, "unshown": "", "excluded": "", "detail": ""})
        try:
            texts.append(_texts(tokenizer, comparison))
        except Excluded as excluded:
            texts.append([])
            rows[-1] |= {"excluded": excluded.reason, "detail": excluded.detail}
    ids = iter(_ids(tokenizer, [text for own in texts for text in own]))
    for comparison, own, row in zip(comparisons, texts, rows, strict=True):
        if row["excluded"]:
            continue
        row["unshown"] = _unshown(comparison, own)
        whole = [next(ids) for _ in own]
        row["lengths"] = [len(conversation) for conversation in whole]
        try:
            if alike:
                fitted = truncate(comparison, whole)
            else:
                each = [replace(comparison, responses=[text], ranks=[0]) for text in comparison.responses]
                fitted = [truncate(one, [ids])[0] for one, ids in zip(each, whole, strict=True)]
            _check_ranks(fitted, comparison.ranks)
            prefix, suffixes = split_at_common_prefix(fitted)
            row |= {"prefix": prefix, "suffixes": suffixes, "truncated": fitted != whole}
            replies = split_at_common_prefix(whole)[1] if row["truncated"] else suffixes
            row["reply_lengths"] = [*map(len, replies)]
        except Excluded as excluded:
            row |= {"excluded": excluded.reason, "detail": excluded.detail}
    return rows


def tokenize(
    split: Split,
    tokenizer: Tokenizer,
    max_length: int | None,
    truncation: str,
    num_proc: int | None = None,
    *,
    alike: bool = False,
) -> Split:
    """Add the columns that `encode_all` returns; cached.

    What does not fit `max_length` is truncated or counted as `encode` says. Warns of texts that the chat
    template leaves out.

    Raises:
        DataError: nothing is left.
    """

    def encode_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = encode_all(tokenizer, as_comparisons(batch), max_length, truncation, alike=alike)
        return {name: [row[name] for row in rows] for name in _TOKENIZED}

    depends_on = [*follows_from(tokenizer), max_length, truncation, alike]
    rows = split.comparisons
    features = {**rows.features, **_TOKENIZED}
    tokenized = run_pass(rows, encode_batch, "Tokenising", features, depends_on, num_proc, batched=True)
    result = set_aside(replace(split, comparisons=tokenized, tokenized=tokenized))
    if not len(result.comparisons):
        hint = "; raise 'max_length'" if {"too_long", "response_too_long"} & {*result.excluded} else ""
        raise DataError(f"no comparison is left after tokenising: {result.why_excluded()}{hint}")
    counts = pc.value_counts(arrow_column(result.comparisons, "unshown")).to_pylist()
    if unshown := [f"{found['values']} in {found['counts']}" for found in counts if found["values"]]:
        warn(f"the chat template leaves out text of comparisons: {', '.join(unshown)}")
    return result


def follows_from(tokenizer: Tokenizer) -> list[Any]:
    """List what token ids follow from, beside texts and lengths: tokenizer, template, versions and code."""
    named = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}  # templates read them
    versions = [tokenizers.__version__, transformers.__version__, jinja2.__version__]
    code = [sys.modules[__name__], chat_template, comparison_module]
    return [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, named, *versions, *code]


def render(tokenizer: Tokenizer, messages: list[Message], tools: str = "", **options: Any) -> str:
    """Render the text that is scored: a conversation, with the tools it offers, by the chat template."""
    messages = [m | {"tool_calls": json.loads(m["tool_calls"])} if "tool_calls" in m else m for m in messages]
    if tools:
        options["tools"] = json.loads(tools)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _texts(tokenizer: Tokenizer, comparison: Comparison) -> list[str]:
    """The K conversations through the chat template; raises Excluded where that cannot be."""
    calls = [message["tool_calls"] for message in comparison.prompt if "tool_calls" in message]
    tools = [text for text in (comparison.tools, *calls) if text]
    texts = [*(message["content"] for message in comparison.prompt), *comparison.responses, *tools]
    if found := next(filter(None, map(chat_template.special_tokens(tokenizer).search, texts)), None):
        raise Excluded("control_tokens", f"take {found[0]} out of the text")
    try:
        texts = [render(tokenizer, messages, comparison.tools) for messages in comparison.conversations()]
    except (jinja2.TemplateError, TypeError) as error:  # such as one that wants roles to alternate
        raise Excluded("refused_by_template", f"the template says: {one_line(error)}") from None
    comparison_module.check_unicode(texts)  # of tools
    for tool in (tool for text in tools for tool in json.loads(text)):
        name = str((tool.get("function") or tool).get("name"))
        said = [*(message["content"] for message in comparison.prompt), comparison.responses[0]]
        if texts[0].count(name) <= sum(text.count(name) for text in said):
            raise Excluded("tools", f"the template does not show '{name}'")
    return texts


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts, past the wrapper, whose work takes as long again as the tokenizer's."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # which the wrapper leaves behind when somebody asked it for either
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _unshown(comparison: Comparison, texts: Sequence[str]) -> str:
    """Whose text is not in the rendered conversations: `reply` (R1's template cuts thoughts) or a role."""
    if not all(reply.strip() in text for reply, text in zip(comparison.responses, texts, strict=True)):
        return "reply"
    hidden = (m["role"] for m in comparison.prompt if m["content"].strip() not in texts[0])
    return next(hidden, "")


def _check_ranks(conversations: _Ids, ranks: list[int]) -> None:
    """Raise Excluded where two conversations that are not tied read the same."""
    as_read = [tuple(ids) for ids in conversations]
    if len(set(zip(as_read, ranks, strict=True))) > len(set(as_read)):
        raise Excluded("identical_after_tokenization")


def _truncate(
    tokenizer: Tokenizer, comparison: Comparison, conversations: _Ids, max_length: int | None, truncation: str
) -> _Ids:
    """The comparison's conversations cut alike, so that none is longer than `max_length`."""
    if max_length is None:
        return conversations
    room = max_length - int(max_length * REPLY_SHARE)  # for the prompt
    while (longest := max(map(len, conversations))) > room:
        prompt_tokens, prompt_tokens_kept = _prompt_tokens(tokenizer, comparison, conversations)
        if longest <= max_length and (prompt_tokens <= room or truncation == "exclude"):  # which cuts nothing
            break
        if longest - prompt_tokens_kept > max_length:
            raise Excluded("response_too_long")
        if truncation == "keep_end":
            over = max(prompt_tokens - room, longest - max_length)
            return _cut_front(tokenizer, conversations, prompt_tokens_kept, over)
        shorter = _drop_oldest_turn(comparison.prompt) if truncation == "drop_oldest_turns" else None
        if shorter is None and longest > max_length:
            raise Excluded("too_long")
        if shorter is None:
            break
        comparison = replace(comparison, prompt=shorter)
        conversations = _ids(tokenizer, _texts(tokenizer, comparison))
    return conversations


def _drop_oldest_turn(prompt: list[Message]) -> list[Message] | None:
    """The prompt without its oldest exchange, a system message kept; None at the last question."""
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    turns = prompt[len(system) :]
    starts = [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]
    return [*system, *turns[starts[0] :]] if starts else None


def _prompt_tokens(tokenizer: Tokenizer, comparison: Comparison, conversations: _Ids) -> tuple[int, int]:
    """Tokens of the prompt by itself, whatever the replies, and those of them that the conversations keep.

    The K replies' own common start is not among them.
    """
    try:
        text = render(tokenizer, comparison.prompt, comparison.tools, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError):  # one that takes no prompt without its reply
        common = len(split_at_common_prefix(conversations)[0])
        return common, common
    [alone] = _ids(tokenizer, [text])
    return len(alone), len(split_at_common_prefix([[*alone, -1], *conversations])[0])


def _cut_front(tokenizer: Tokenizer, conversations: _Ids, prompt_tokens: int, over: int) -> _Ids:
    """Cuts `over` tokens off the front, behind a special token that it starts with.

    An encoder reads its reward at that token. The first `prompt_tokens` tokens may be cut, the replies
    behind them never.
    """
    first = tokenizer.convert_ids_to_tokens(conversations[0][0])
    kept = 1 if chat_template.special_tokens(tokenizer).fullmatch(first) else 0
    if kept + over >= prompt_tokens:
        raise Excluded("too_long")
    return [ids[:kept] + ids[kept + over :] for ids in conversations]
