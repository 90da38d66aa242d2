"""From conversations to token ids, exactly as the exported model will be served.

The chat template's text carries every special token, and the tokenizer that training uses and the
export ships adds none: `add_special_tokens` True or False give the same ids, in plain transformers,
in `pipeline` and in TRL's RL trainers. The pad token is never EOS, because a classifier reads its
reward at the last token that is not padding.
"""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rm_recipe.batching import Encoded, split_at_common_prefix
from rm_recipe.errors import RecipeError
from rm_recipe.preferences import Comparison, Excluded, Message

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


# Their first position is the one after the pad token's id.
POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "camembert", "roberta-prelayernorm"}


def load_tokenizer(
    name: str, revision: str = "main", trust_remote_code: bool = False, template: str | None = None
) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, made safe for a reward model.

    It gets a chat template if it has none, adds no special tokens by itself, also after it was
    saved and loaded, and has a pad token of its own: the first of `<unk>`-like and reserved tokens
    that is not EOS, or a new `<|pad|>`.

    Raises:
        RecipeError: it cannot be loaded, or the base has no fast tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(f"the tokenizer of '{name}' cannot be loaded: {reason}") from None
    if not tokenizer.is_fast:
        raise RecipeError(f"{name}: its tokenizer has no fast version, which rm_recipe needs")
    if template is not None:
        tokenizer.chat_template = _read_template(template)
    if tokenizer.chat_template is None:
        encoder = tokenizer.cls_token is not None and tokenizer.sep_token is not None
        tokenizer.chat_template = ENCODER_TEMPLATE if encoder else DECODER_TEMPLATE
    return _without_added_specials(tokenizer, pad_token(tokenizer))


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
    path = Path(template)
    if not path.is_file():
        raise RecipeError(f"'chat_template_path: {template}' does not exist")
    return path.read_text(encoding="utf-8")


def _without_added_specials(tokenizer: PreTrainedTokenizerBase, padding: str) -> PreTrainedTokenizerFast:
    """The same vocabulary in the generic class, which keeps the saved post-processor: none.

    BertTokenizer and LlamaTokenizer build theirs anew at every load, so that the special tokens
    that the template writes would come twice (`[CLS][CLS] ... [SEP][SEP]`).
    """
    backend = tokenizer.backend_tokenizer
    backend.post_processor = None
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        add_bos_token=False,
        add_eos_token=False,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        **{**named, "pad_token": padding},
    )


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text that is scored: the conversation through the chat template."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    comparison: Comparison,
    max_length: int | None,
    truncation: str = "drop_oldest_turns",
) -> Encoded:
    """The token ids of a comparison's K conversations, none longer than `max_length`.

    Every conversation is tokenised whole, so that no tokenizer can merge across the end of the
    prompt. `drop_oldest_turns` leaves out the same oldest turns for all K, up to the last
    question; `keep_end` cuts the same number of tokens off the front of the shared prefix.

    Raises:
        Excluded: `response_too_long` where a reply alone exceeds `max_length`, `too_long` where
            the last question and the reply do (or anything does, under `exclude`),
            `identical_after_tokenization`, `refused_by_template`.
    """
    prompt = comparison.prompt
    while True:
        try:
            texts = [
                render(tokenizer, messages)
                for messages in Comparison(prompt, comparison.responses).conversations()
            ]
        except TemplateError:  # such as one that wants user and assistant to alternate
            raise Excluded("refused_by_template") from None
        conversations = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        if max_length is None or max(map(len, conversations)) <= max_length:
            break
        shorter = _drop_oldest_turn(prompt) if truncation == "drop_oldest_turns" else None
        if shorter is None:
            special = set(tokenizer.all_special_ids)
            conversations = _cut_front(conversations, max_length, truncation, special)
            break
        prompt = shorter
    if len({tuple(ids) for ids in conversations}) < len(conversations):
        raise Excluded("identical_after_tokenization")
    return split_at_common_prefix(conversations)


def _drop_oldest_turn(prompt: list[Message]) -> list[Message] | None:
    """The prompt without its oldest exchange, a system message kept; None at the last question."""
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    turns = prompt[len(system) :]
    starts = [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]
    return [*system, *turns[starts[0] :]] if starts else None


def _cut_front(
    conversations: list[list[int]], max_length: int, truncation: str, special: set[int]
) -> list[list[int]]:
    """Cuts what is too much off the shared prefix, behind a special token that it starts with.

    An encoder reads its reward at that token.
    """
    over = max(map(len, conversations)) - max_length
    encoded = split_at_common_prefix(conversations)
    if max(map(len, encoded.rests)) > max_length:
        raise Excluded("response_too_long")
    kept = 1 if encoded.prefix and encoded.prefix[0] in special else 0
    if truncation != "keep_end" or kept + over >= len(encoded.prefix):
        raise Excluded("too_long")
    return [ids[:kept] + ids[kept + over :] for ids in conversations]


def check_lengths(config: Any, max_length: int | None, name: str) -> None:
    """Refuses a `max_length` that the model has no positions for.

    Raises:
        RecipeError: naming both numbers.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and config.model_type in POSITIONS_AFTER_PADDING:
        positions -= config.pad_token_id + 1
    if positions and (max_length is None or max_length > positions):
        raise RecipeError(
            f"'max_length: {max_length}': {name} has {positions} positions; set {positions} or less"
        )


def load_config(name: str, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        RecipeError: nothing can be loaded under that name.
    """
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(f"'model_name_or_path: {name}' cannot be loaded: {reason}") from None
