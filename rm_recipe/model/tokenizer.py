"""From conversations to token ids, exactly as the exported model will be served.

The chat template's text carries every special token, and the tokenizer that training uses and the
export ships adds none: `add_special_tokens` True or False give the same ids, in plain transformers,
in `pipeline` and in TRL's RL trainers. The pad token is never EOS, because a classifier reads its
reward at the last token that is not padding. What the template is made to write: `chat_template`.
"""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer

from rm_recipe.data import chat_template
from rm_recipe.errors import RecipeError
from rm_recipe.files import holds
from rm_recipe.model.lora import adapter_config, readable
from rm_recipe.processes import warn

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

# Of the model's embeddings, what its own tokenizer uses at least: DeepSeek's leaves 2 % in reserve.
SMALLEST_VOCABULARY = 0.9

_warn = cache(warn)  # once, however often the tokenizer is loaded


def load_tokenizer(
    name: str, revision: str = "main", template: str | None = None, *, of_base: bool = False
) -> Tokenizer:
    """Load a model's tokenizer, made safe for a reward model.

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
    adapter = adapter_config(name, revision)
    with readable(f"the tokenizer of '{name}' cannot be loaded"):
        if adapter is not None and not holds(name, "tokenizer_config.json", revision):
            name, revision = adapter.base_model_name_or_path, adapter.revision or "main"
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ValueError("it has no fast version, which rm_recipe needs")
        own = _read_template(template) if template else _own_template(tokenizer)
    if not (of_base or template or tokenizer.chat_template):
        _warn(
            f"{name}: it has no chat template; it gets a plain one, which it may not have been trained with"
        )
    tokenizer.chat_template = chat_template.fixed_date(own)
    if tokenizer.chat_template != own:
        date = f"{chat_template.FIXED_DATE:%d %b %Y}"
        _warn(f"{name}: its chat template writes today's date; here it is always {date}, so that scores last")
    leading = _leading_specials(tokenizer)
    safe = _without_added_specials(tokenizer)
    try:
        chat_template.render_probe(safe)
    except (TemplateError, TypeError) as error:
        raise RecipeError(f"{name}: its chat template fails on a question and an answer: {error}") from None
    if of_base:
        safe.chat_template = chat_template.served(safe, leading)
        if not chat_template.end_of_reply(safe)[0]:
            fault = "its chat template writes no special token after a reply"
            _warn(f"{name}: {fault}; the reward is read at the last token of all, where PPO does not look")
    return safe


def _read_template(template: str) -> str:
    """The chat template of a file, or of the tokenizer in a folder or on the Hub, as in TRL.

    Raises:
        RecipeError: it is neither.
    """
    with readable(
        f"'chat_template_path: {template}' is no template's file, and no tokenizer with a template"
    ):
        if Path(template).is_file():
            return Path(template).read_text(encoding="utf-8")
        return AutoTokenizer.from_pretrained(template, trust_remote_code=False).get_chat_template()


def _own_template(tokenizer: Tokenizer) -> str:
    """The template that a tokenizer has, of several the default one; else a plain one.

    Raises:
        ValueError: there are several, and none is the default.
    """
    if tokenizer.chat_template:
        return tokenizer.get_chat_template()
    return ENCODER_TEMPLATE if tokenizer.cls_token and tokenizer.sep_token else DECODER_TEMPLATE


def _leading_specials(tokenizer: Tokenizer) -> str:
    """The special tokens that a tokenizer writes before every text by itself: BOS, or an encoder's CLS."""
    bare, ids = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    count = next((place for place in range(len(ids)) if ids[place : place + len(bare)] == bare), 0)
    return "".join(tokenizer.convert_ids_to_tokens(ids[:count]))


def pad_token(tokenizer: Tokenizer) -> str:
    """A token to pad with that no conversation ends in."""
    added = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    marks = ("<pad", "[pad", "<|pad", "reserved", "unused")
    spare = [token for token in added if any(mark in token.lower() for mark in marks)]
    taken = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.sep_token}
    for token in (tokenizer.pad_token, tokenizer.unk_token, "<|endoftext|>", *spare):
        if token in added and token not in taken:
            return str(token)
    return "<|pad|>"


def _without_added_specials(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
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
        **named | {"pad_token": pad_token(tokenizer)},
    )


def positions(model: Any) -> int | None:
    """How many tokens a model has positions for; None where its config sets no limit.

    Of LongRoPE, Phi-3.5's, those that count: past them the longest conversation decides how all of its batch
    are read.

    Args:
        model: with or without weights. Some begin after the padding token's position, as RoBERTa does.
    """
    config = model.config.get_text_config()
    number = getattr(config, "max_position_embeddings", None)
    if number is None or number <= 0:  # XLNet's -1: its positions are relative
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        number = min(number, rope["original_max_position_embeddings"])
    embeddings = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = [getattr(module, "padding_idx", None) for module in embeddings]
    return int(number) - max((index + 1 for index in padding if index is not None), default=0)


def check_lengths(model: Any, max_length: int | None, name: str) -> None:
    """Refuse a `max_length` that the model has no positions for.

    Raises:
        RecipeError: naming both numbers.
    """
    there = positions(model)
    if there and (max_length is None or max_length > there):
        raise RecipeError(f"'max_length: {max_length}': {name} has {there} positions; set {there} or less")


def check_vocabulary(config: Any, tokenizer: Tokenizer, name: str) -> None:
    """Refuse a tokenizer that was made for another model.

    The model may hold a few embeddings more, to a multiple of 64 or in reserve. Added tokens may be missing
    (a pad token, Gemma's image token): they get embeddings later.

    Raises:
        RecipeError: naming both sizes.
    """
    size, added = config.get_text_config().vocab_size, tokenizer.added_tokens_decoder
    ids = [number for number in tokenizer.get_vocab().values() if number not in added]
    if max(ids, default=0) >= size or len(tokenizer) < SMALLEST_VOCABULARY * size:
        sizes = f"{len(tokenizer)} tokens and the model {size} embeddings"
        raise RecipeError(f"{name}: its tokenizer has {sizes}; are they of different models?")
