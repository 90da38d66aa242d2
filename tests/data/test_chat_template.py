"""Where a reward is read, how a text begins, and that no clock changes it."""

import copy
from pathlib import Path

import pytest
import trl
from conftest import make_tokenizer
from transformers import AutoTokenizer

from rm_recipe.data import chat_template
from rm_recipe.data.chat_template import ppo_fault
from rm_recipe.data.tokenization import render
from rm_recipe.model.tokenizer import load_tokenizer

MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "fine thanks"},
]
# Each in our words: what it is made of, and the token that ends a reply.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama 2": (LLAMA_2, "</s>"),
    "tinyllama": (make_tokenizer().chat_template, "</s>"),
    "plain": (None, "</s>"),
}


def save(folder: Path, template: str | None) -> str:
    """A tokenizer that adds BOS by itself, with a template; its folder's name."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_ends_with_the_end_token_that_ppo_scores(tmp_path, name):
    template, end = TEMPLATES[name]
    base = load_tokenizer(save(tmp_path / "base", template), of_base=True)
    base.save_pretrained(tmp_path / "export")
    for tokenizer in (base, AutoTokenizer.from_pretrained(tmp_path / "export")):
        text = render(tokenizer, MESSAGES)
        assert text.endswith(f"fine thanks{' ' * (name == 'llama 2')}{end}")
        assert tokenizer(text)["input_ids"][-1] == tokenizer.convert_tokens_to_ids(end)
        assert ppo_fault(tokenizer) is None
        prompt = render(tokenizer, MESSAGES[:-1], add_generation_prompt=True)
        assert text.startswith(prompt)  # so prompt and sampled ids together are what was trained on
        blank = [*MESSAGES[:-1], MESSAGES[-1] | {"content": "fine thanks \t\n\n"}]
        assert render(tokenizer, blank) == text  # white space at a reply's end is no part of it
        assert text.count("<s>") == (2 if name == "llama 2" else 1)


def test_apart_from_its_ends_a_template_writes_what_it_wrote(tmp_path):
    for template, end in (TEMPLATES[name] for name in ("chatml", "llama 2", "tinyllama")):
        folder = save(tmp_path, template)
        own, made = load_tokenizer(folder), load_tokenizer(folder, of_base=True)
        for messages in (MESSAGES, [{"role": "user", "content": " x \n"}, MESSAGES[1]]):
            before, after = (render(tokenizer, messages).removeprefix("<s>") for tokenizer in (own, made))
            assert after == before[: before.rindex(end) + len(end)]
        for turns, option in ((MESSAGES[:3], "add_generation_prompt"), (MESSAGES, "continue_final_message")):
            before, after = (render(tokenizer, turns, **{option: True}) for tokenizer in (own, made))
            assert before.removeprefix("<s>") == after.removeprefix("<s>")


def test_a_trained_model_of_other_people_and_an_encoder_keep_their_templates(tmp_path, tiny_distilbert):
    """The one was trained with what follows the end token, and scores there."""
    assert render(load_tokenizer(save(tmp_path, CHATML)), MESSAGES).endswith("<|im_end|>\n")
    own, made = (load_tokenizer(str(tiny_distilbert), of_base=of_base) for of_base in (False, True))
    assert own.chat_template == made.chat_template.removeprefix(chat_template.TRIMMED)


BUNDLED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
MARKS = (
    "<|im_start|> <|im_end|> <|eot_id|> <end_of_turn> <|end|> <|return|> <turn|> <|END_OF_TURN_TOKEN|> "
    "<|eot|> <\uff5cend\u2581of\u2581sentence\uff5c>"
).split()
THINKING = ("qwen3", "qwen3_8", "deepseek_r1_distill", "deepseekv3", "glm4moe", "gptoss", "nemotron_3_nano")


def test_trls_templates_end_as_ppo_needs_it_or_say_why_not():
    reasons = {}
    plain = make_tokenizer()
    for path in BUNDLED:
        tokenizer = copy.deepcopy(plain)
        text = path.read_text(encoding="utf-8")
        tokenizer.add_special_tokens({"extra_special_tokens": [mark for mark in MARKS if mark in text]})
        tokenizer.chat_template = chat_template.fixed_date(text)
        try:
            before = chat_template.render_probe(tokenizer)
        except Exception:  # one that takes pictures, not text
            continue
        end, after = chat_template.end_of_reply(tokenizer)
        tokenizer.chat_template = chat_template.served(tokenizer, "")
        assert chat_template.render_probe(tokenizer) == before.removesuffix(after), path.name
        assert bool(end) == (not any(name in path.name for name in ("smolvlm", "glm", "idefics")))
        reasons[path.stem] = ppo_fault(tokenizer)
    assert len(reasons) > 40
    assert all(reasons[name] for name in THINKING)
    for name in ("qwen2_5", "llama3", "gemma", "phi3", "qwen3_instruct_2507", "cohere", "lfm2"):
        assert reasons[name] is None, name


def test_a_template_without_an_end_token_is_told_of_once(tmp_path, caplog):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    folder = save(tmp_path, template)
    for _ in range(2):
        tokenizer = load_tokenizer(folder, of_base=True)
    assert caplog.text.count("writes no special token after a reply") == 1
    assert ppo_fault(tokenizer) == "the chat template writes no end token after a reply"


def test_a_date_is_the_same_on_every_day(tmp_path, caplog):
    template = (
        "{% set format = '%d %b %Y' %}{{ strftime_now(format) if strftime_now is defined else 'no clock' }}"
        "{% macro late() %}{{ strftime_now('%H:%M:%S %A %j %-d %%') }}{% endmacro %}{{ late() }}" + CHATML
    )
    base = load_tokenizer(save(tmp_path, template), of_base=True)
    base.save_pretrained(tmp_path / "export")
    texts = {
        render(tokenizer, MESSAGES, strftime_now=lambda _, clock=clock: clock)
        for tokenizer in (base, load_tokenizer(str(tmp_path / "export")))
        for clock in ("one clock", "another")
    }
    assert len(texts) == 1
    assert texts.pop().startswith("<s>26 Jul 202412:00:00 Friday 208 26 %<|im_start|>user\nhello")
    assert "writes today's date; here it is always 26 Jul 2024" in caplog.text
    assert base.chat_template == load_tokenizer(str(tmp_path / "export"), of_base=True).chat_template


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
def test_bos_comes_once_where_the_base_had_it(tmp_path, template):
    """TinyLlama's template writes none, and its tokenizer did: a text without is not as the base saw it."""
    tokenizer = load_tokenizer(save(tmp_path, template), of_base=True)
    bos = tokenizer.bos_token_id
    ids = tokenizer(render(tokenizer, MESSAGES))["input_ids"]
    assert (ids[0], ids.count(bos)) == (bos, 1)
    prompt = render(tokenizer, MESSAGES[:1], add_generation_prompt=True)
    assert tokenizer(prompt)["input_ids"].count(bos) == 1
    tokenizer.bos_token = None  # as in an export, which names none
    assert tokenizer(render(tokenizer, MESSAGES))["input_ids"] == ids
