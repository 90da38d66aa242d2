"""From conversations to token ids, exactly as the exported model will be served.

The chat template's text carries every special token, and the tokenizer that training uses and the
export ships adds none: `add_special_tokens` True or False give the same ids, in plain transformers,
in `pipeline` and in TRL's RL trainers. The pad token is never EOS, because a classifier reads its
reward at the last token that is not padding. What the template is made to write: `chat_template`.
"""

import json
import logging
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
from jinja2 import TemplateError
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from rm_recipe.data import chat_template
from rm_recipe.data.messages import Message
from rm_recipe.data.tokenization import render
from rm_recipe.errors import RecipeError, one_line
from rm_recipe.model import source
from rm_recipe.model.source import load_config
from rm_recipe.recipe.weights import holds

# For models without a template: a name and a colon before each message, as in hh-rlhf, and EOS at
# the end, where a decoder's reward is read.
DECODER_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '\\n\\n' if not loop.first }}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% else %}{{ eos_token }}{% endif %}"
)
ENCODER_TEMPLATE = (
    "{{ cls_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}{{ sep_token }}"
    "{% endfor %}"
)
# BART and its like read the reward at the last EOS, and want as many of them in every conversation.
ENCODER_DECODER_TEMPLATE = (
    "{{ cls_token }}{% for message in messages %}"
    "{{ '\\n' if not loop.first }}{{ message['role'] }}: {{ message['content'] }}"
    "{% endfor %}{{ sep_token }}"
)

# Of the model's embeddings, what its own tokenizer uses at least: DeepSeek's leaves 2 % in reserve.
SMALLEST_VOCABULARY = 0.9

# Where ids show that a tokenizer is not the one of its files: spaces, lines, digits, code, other scripts.
SAMPLE_TEXT = "Hello  there,\n\n it's 2024: \tdef f(x): return x**12  # na\u00efve \u4f60\u597d \U0001f642"

logger = logging.getLogger("rm_recipe")


def load_tokenizer(
    name: str,
    revision: str = "main",
    template: str | None = None,
    *,
    of_base: bool = False,
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, made safe for a reward model.

    It gets a chat template if it has none, whose date is fixed if it writes one, adds no special tokens by
    itself, also after it was saved and loaded, truncates at the front, and has a pad token of its own: the
    first of `<unk>`-like and reserved tokens that is not EOS, or a new `<|pad|>`.

    Args:
        template: a file with a template to use in place of the model's own.
        of_base: of a base to train: the template is made to begin with the base's BOS and to end with a
            reply's end token (`chat_template.served`). A trained reward model keeps what it was trained with.

    Raises:
        RecipeError: it cannot be loaded, has no fast version, or its chat template is broken.
    """
    adapter = source.adapter_config(name, revision)
    try:
        if adapter is not None and not holds(name, "tokenizer_config.json", revision):
            name, revision = adapter.base_model_name_or_path, adapter.revision or "main"
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"the tokenizer of '{name}' cannot be loaded: {one_line(error)}") from None
    if not tokenizer.is_fast:
        raise RecipeError(f"{name}: its tokenizer has no fast version, which rm_recipe needs")
    if template is not None:
        tokenizer.chat_template = _read_template(template)
    own = _one_template(tokenizer, name)
    own = own if own is not None else _plain_template(tokenizer, name, revision)
    tokenizer.chat_template = chat_template.fixed_date(own)
    if tokenizer.chat_template != own:
        date = f"{chat_template.FIXED_DATE:%d %b %Y}"
        _warn(f"{name}: its chat template writes today's date; here it is always {date}, so that scores last")
    _compare_with_file(tokenizer, name, revision)
    leading = _leading_specials(tokenizer)
    safe = _without_added_specials(tokenizer, pad_token(tokenizer))
    try:
        chat_template.render_probe(safe)
    except (TemplateError, TypeError) as error:
        raise RecipeError(f"{name}: its chat template fails on a question and an answer: {error}") from None
    if of_base:
        safe.chat_template = chat_template.served(safe, leading)
        if not chat_template.end_of_reply(safe)[0]:
            _warn(
                f"{name}: its chat template writes no special token after a reply, so the reward is read at "
                "the last token of whatever it ends with, where PPO, which needs an end token, does not look"
            )
    return safe


def _one_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str | None:
    """The template, of several the default one: what is shipped is what is rendered, alone."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return templates
    if "default" not in templates:
        raise RecipeError(
            f"{name}: none of its chat templates ({', '.join(templates)}) is called default; name a "
            "file with one as 'chat_template_path'"
        )
    return str(templates["default"])


def _plain_template(tokenizer: PreTrainedTokenizerBase, name: str, revision: str) -> str:
    if tokenizer.cls_token is None or tokenizer.sep_token is None:
        return DECODER_TEMPLATE
    with suppress(RecipeError):  # a tokenizer alone
        if load_config(name, revision).is_encoder_decoder:
            return ENCODER_DECODER_TEMPLATE
    return ENCODER_TEMPLATE


@cache
def _warn(message: str) -> None:
    """Says it once, however often the tokenizer is loaded."""
    logger.warning("warning: %s", message)


def _leading_specials(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special tokens that a tokenizer writes before every text by itself: BOS, or an encoder's CLS."""
    bare, ids = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    count = next((place for place in range(len(ids)) if ids[place : place + len(bare)] == bare), 0)
    return "".join(tokenizer.convert_ids_to_tokens(ids[:count]))


def _compare_with_file(tokenizer: PreTrainedTokenizerBase, name: str, revision: str) -> None:
    """Says where transformers' class of tokenizer gives other ids than the tokenizer.json beside it.

    Some classes build their own from the vocabulary, as TinyLlama's first checkpoints show.
    """
    if not holds(name, "tokenizer.json", revision):
        return
    file = tokenizers.Tokenizer.from_file(str(cached_file(name, "tokenizer.json", revision=revision)))
    ours, theirs = (
        backend.encode(SAMPLE_TEXT, add_special_tokens=False).ids
        for backend in (tokenizer.backend_tokenizer, file)
    )
    if ours != theirs:
        _warn(
            f"{name}: transformers' {type(tokenizer).__name__} gives other token ids than its "
            "tokenizer.json; transformers' are used, and shipped"
        )


def pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token to pad with that no conversation ends in."""
    own, eos = tokenizer.pad_token, tokenizer.eos_token
    if own is not None and own not in (eos, tokenizer.sep_token):
        return str(own)
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    for token in [tokenizer.unk_token, "<|endoftext|>", *filter(_reserved, special)]:
        if token in special and token not in (eos, tokenizer.bos_token, tokenizer.sep_token):
            return str(token)
    return "<|pad|>"


def _reserved(token: str) -> bool:
    return any(part in token.lower() for part in ("<pad", "[pad", "<|pad", "reserved", "unused"))


def _read_template(template: str) -> str:
    """The chat template of a file, or of the tokenizer in a folder or on the Hub, as in TRL."""
    try:
        if Path(template).is_file():
            return Path(template).read_text(encoding="utf-8")
        found = AutoTokenizer.from_pretrained(template).chat_template
    except UnicodeDecodeError:
        raise RecipeError(f"'chat_template_path: {template}' is not UTF-8 text") from None
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(
            f"'chat_template_path: {template}' is no template's file, and no tokenizer that can be loaded: "
            f"{one_line(error)}"
        ) from None
    found = found.get("default") if isinstance(found, dict) else found
    if not found:
        raise RecipeError(f"'chat_template_path: {template}' has no chat template")
    return str(found)


def _without_added_specials(tokenizer: PreTrainedTokenizerBase, padding: str) -> PreTrainedTokenizerFast:
    """The same vocabulary in the generic class, which keeps the saved post-processor: none.

    BertTokenizer and LlamaTokenizer build theirs anew at every load, so that the special tokens
    that the template writes would come twice (`[CLS][CLS] ... [SEP][SEP]`).
    """
    backend = tokenizer.backend_tokenizer
    backend.post_processor = None
    backend.no_truncation()  # tokenizer.json may hold settings of what it was used for before
    backend.no_padding()
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        add_bos_token=False,
        add_eos_token=False,
        padding_side="right",
        truncation_side="left",  # whoever cuts what is too long cuts the prompt, not the reply
        model_input_names=["input_ids", "attention_mask"],
        **{**named, "pad_token": padding},
    )


def positions(config: Any) -> int | None:
    """How many tokens a model has positions for; None where its config sets no limit.

    Some begin after the padding token's, as RoBERTa does, so the model itself is asked, without weights.
    """
    number = getattr(config.get_text_config(), "max_position_embeddings", None)
    if number is None or number <= 0:  # XLNet's -1: its positions are relative
        return None
    kind: Any = type(config)
    return int(number) - _unused_positions(kind, config.to_json_string(use_diff=False))


@cache
def _unused_positions(kind: Any, content: str) -> int:
    """Of a configuration, by its class and its content."""
    config = kind.from_dict(json.loads(content))
    vars(config).pop("quantization_config", None)
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
    except Exception:  # whatever a foreign architecture raises; who loads it says what
        return 0
    return max(
        (
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        ),
        default=0,
    )


def check_lengths(config: Any, max_length: int | None, name: str) -> None:
    """Refuses a `max_length` that the model has no positions for.

    Raises:
        RecipeError: naming both numbers.
    """
    there = positions(config)
    if there and (max_length is None or max_length > there):
        raise RecipeError(f"'max_length: {max_length}': {name} has {there} positions; set {there} or less")


def check_one_end(config: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuses a template that writes EOS after every turn, for BART and its like.

    Raises:
        RecipeError: saying what template to take.
    """
    if not config.is_encoder_decoder:
        return
    turn: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    short, long = (
        tokenizer(render(tokenizer, turn * n))["input_ids"].count(config.eos_token_id) for n in (1, 2)
    )
    if short != long:
        raise RecipeError(
            f"{name}: its chat template writes {tokenizer.eos_token} after every turn, and a "
            f"{config.model_type} classifier wants as many in every conversation; name a template that "
            "writes it at the end alone as 'chat_template_path'"
        )


def check_vocabulary(config: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuses a tokenizer that was made for another model.

    The model may hold a few embeddings more, to a multiple of 64 or in reserve. Added tokens may be missing
    (a pad token, Gemma's image token): they get embeddings later.

    Raises:
        RecipeError: naming both sizes.
    """
    size = config.get_text_config().vocab_size
    added = tokenizer.added_tokens_decoder
    beyond = [
        token for token, number in tokenizer.get_vocab().items() if number >= size and number not in added
    ]
    if beyond or len(tokenizer) < SMALLEST_VOCABULARY * size:
        example = f", none for '{beyond[0]}' among others" if beyond else ""
        raise RecipeError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens and the model {size} embeddings{example}; "
            "are they of different models?"
        )
