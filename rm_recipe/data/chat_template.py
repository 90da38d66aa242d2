"""What a base's chat template is made to write before a reward model is trained with it and shipped.

Four things of a template decide whether a reward means the same elsewhere. Where it ends: the reward is read
at the last token, and whoever samples replies (PPO) has the reply's end token there, so what a template
writes after it is dropped; and white space at the end of a reply, which says nothing, is too. How it begins:
with the BOS that the base was trained with, once. And when it is rendered: a date in it is fixed.
"""

import json
import re
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

# Stands for today in templates that ask for it, on every machine, so that a run can be resumed tomorrow and
# a score stays true. It is the one that Llama 3.2's template has where it knows no clock.
FIXED_DATE = datetime(2024, 7, 26, 12)
DIRECTIVES = "YymBbdeHIMSpAajFTDcxXzZfUWuwGVsRnt"
DATE_MACRO = "{% macro strftime_now("

# Takes the white space at its end from the reply that a conversation ends in.
TRIMMED = (
    "{% set messages = messages[:-1] + [dict(messages[-1], content=messages[-1].content.rstrip())] "
    "if messages and messages[-1].role == 'assistant' and messages[-1].content is string else messages %}"
    "{{ '' }}"
)

QUESTION, ANSWER = "Qzxquestion", "Qzxanswer"  # words that no template writes by itself
PROBE = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def fixed_date(template: str) -> str:
    """Put `FIXED_DATE` in the place of today in a template that asks for it.

    transformers gives templates a function `strftime_now`; a macro of the same name takes its place.
    """
    if "strftime_now" not in template or DATE_MACRO in template:
        return template
    parts = {f"%{letter}": FIXED_DATE.strftime(f"%{letter}") for letter in DIRECTIVES}
    parts |= {f"%-{letter}": FIXED_DATE.strftime(f"%{letter}").lstrip("0") for letter in "dmHIMSj"}
    parts["%%"] = "%"  # last: `%%d` is too odd to be taken care of
    return (
        DATE_MACRO + "format) %}{% set fixed = namespace(text=format) %}"
        "{% for part, value in " + json.dumps(parts) + ".items() %}"
        "{% set fixed.text = fixed.text.replace(part, value) %}{% endfor %}"
        "{{ fixed.text }}{% endmacro %}{{ '' }}" + _at_start(template)
    )


def end_of_reply(tokenizer: Tokenizer) -> tuple[str, str]:
    """Find the special token that ends a reply in the template's text, and what is written after it.

    Both are empty where no special token comes after a reply.
    """
    _, found, rest = render_probe(tokenizer).rpartition(ANSWER)
    one = special_tokens(tokenizer).pattern
    run = re.search(f"({one})(?:{one})*", rest)
    if not found or not run:
        return "", ""
    # Of several in a row (Command R7B: end of response, end of turn) those up to EOS, else the first.
    eos = str(tokenizer.eos_token)
    end = run[0].partition(eos)[0] + eos if eos in run[0] else run[1]
    return end, rest[run.start() + len(end) :]


def served(tokenizer: Tokenizer, leading: str) -> str:
    """Wrap the template: a conversation begins with `leading`, and ends with its reply and the end token.

    White space at the reply's end is taken from it. BOS stands in it as a text, so that the tokenizer need
    not name one that it never adds.

    Args:
        leading: the special tokens that the base's own tokenizer writes before every text.
    """
    template, bos = _at_start(str(tokenizer.chat_template)), tokenizer.bos_token
    if TRIMMED not in template:
        template = TRIMMED + template
    set_bos = f"{{% set bos_token = {_quoted(str(bos))} %}}"
    if bos and "bos_token" in template and not template.startswith(set_bos):
        template = set_bos + template
    end, after = end_of_reply(tokenizer)
    if not after and render_probe(tokenizer).startswith(leading):
        return template
    # The empty expressions keep jinja's trimming of white space around blocks away from the template's own.
    first, last = _quoted(leading), _quoted(end + after)
    return (
        "{% set whole %}{{ '' }}" + template.removesuffix("\n") + "{{ '' }}{% endset %}"
        f"{{% if not whole.startswith({first}) %}}{{{{ {first} }}}}{{% endif %}}"
        f"{{% if not add_generation_prompt and whole.endswith({last}) %}}"
        f"{{{{ whole[:whole | length - {len(after)}] }}}}{{% else %}}{{{{ whole }}}}{{% endif %}}"
    )


def _at_start(template: str) -> str:
    """The template without blanks before its first block, which jinja strips at the start of a file alone."""
    return re.sub(r"^[ \t]+(?=\{[%#])", "", template)


def _quoted(text: str) -> str:
    """As jinja reads a text."""
    return json.dumps(text, ensure_ascii=False)


def ppo_fault(tokenizer: Tokenizer) -> str | None:
    """Say why PPO would score other ids than the reward model was trained on; None where it would not.

    PPO scores the prompt with the generation prompt, the reply as it was sampled, and the end token.
    """
    end, after = end_of_reply(tokenizer)
    if not end:
        return "the chat template writes no end token after a reply"
    if after:
        return f"the chat template writes {after!r} after a reply's end token"
    try:
        prompt = render_probe(tokenizer, PROBE[:1], add_generation_prompt=True)
    except (TemplateError, TypeError):
        return "the chat template takes no prompt without its reply"
    reply = render_probe(tokenizer).removeprefix(prompt).removesuffix(end)
    if reply.strip() != ANSWER:
        return f"the chat template writes {reply!r} where a reply {ANSWER!r} was sampled after {prompt!r}"
    return None


def render_probe(tokenizer: Tokenizer, messages: list[dict[str, str]] = PROBE, **options: Any) -> str:
    """Render a question and an answer that occur nowhere else."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


@lru_cache(maxsize=64)  # asked for every text, and Llama 3 has 256 of them
def special_tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Compile the pattern of the tokenizer's own special tokens, as a text may hold them."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, named)) or r"(?!)")
