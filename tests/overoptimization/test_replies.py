"""Files of prompts and replies are read in every shape; replies are drawn alike wherever a run begins."""

import json
import shutil
from collections import Counter

import pytest
import torch
from conftest import make_rows, save_classifier, write_jsonl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rm_recipe.errors import DataError, RecipeError
from rm_recipe.overoptimization import replies as module
from rm_recipe.overoptimization.replies import Sample, Sampling, read_samples, sample

TRANSCRIPTS = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi?\n\nAssistant: No"}
EMPTY = {**TRANSCRIPTS, "rejected": "\n\nHuman: Hi?\n\nAssistant: "}


def test_prompts_come_from_prompts_and_from_comparisons_each_once(tmp_path):
    rows = [{"prompt": "hello"}, *make_rows(2, seed=1), {"prompt": "hello"}, TRANSCRIPTS, EMPTY]
    llmbar = {"input": "which?", "output_1": "this", "output_2": "that", "label": 2}
    two = {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "scores": [2, 1]}  # of two shapes
    rows += [llmbar, {"prompt": "bad?"}, two, {"prompt": "a", "responses": [1]}]
    found, excluded = read_samples(write_jsonl(tmp_path / "prompts.jsonl", rows), replies=False)
    texts = [one.prompt[-1]["content"] for one in found]
    asked = [row["prompt"][0]["content"] for row in rows[1:3]]
    assert texts == ["hello", *asked, "Hi?", "which?", "bad?", "a"]
    assert excluded == {"empty_response": 1}
    file = tmp_path / "more.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "b"}\n{\n')  # no more is read than wanted
    assert [one.prompt[0]["content"] for one in read_samples(file, 2, replies=False)[0]] == ["a", "b"]


def test_replies_are_gathered_by_prompt_and_what_is_none_is_counted_or_refused_with_its_row(tmp_path):
    hello = {"role": "user", "content": "hello"}
    system = {"role": "system", "content": "Be kind"}
    rows = [
        {"prompt": "hello", "response": "a", "instruction": "hello", "input": ""},  # or an alpaca's columns
        {"prompt": [hello], "responses": ["b"], "ranks": [1]},
        {"prompt": "hello", "system": "Be kind", "responses": ["x", ""], "cut": 1},
        {"prompt": " ", "responses": ["b"]},
        {"prompt": "a", "responses": ["\ud800"]},
    ]
    found, excluded = read_samples(write_jsonl(tmp_path / "s.jsonl", rows))
    assert found == [Sample([hello], ["a", "b"]), Sample([system, hello], ["x", ""], cut=1)]
    assert excluded == {"empty_prompt": 1, "invalid_text": 1}
    for line, said in {
        "{": "not JSON",
        '{"prompt": "a", "responses": [1]}': "column 'responses' should be a list of texts",
        '{"responses": ["b"]}': "column 'prompt' should be a text or a list of messages",
    }.items():
        (tmp_path / "s.jsonl").write_text(json.dumps(rows[0]) + "\n" + line + "\n")
        with pytest.raises(DataError, match=f"line 2: {said}"):
            read_samples(tmp_path / "s.jsonl")
    with pytest.raises(DataError, match="holds no prompt that can be used"):
        read_samples(write_jsonl(tmp_path / "s.jsonl", rows[3:]))


# --- replies drawn from a policy ---------------------------------------------------------------

PROMPTS = [Sample([{"role": "user", "content": text}], []) for text in ("hello", "how are you", "yes")]


def drawn(target, policy, prompts=PROMPTS, **keys):
    """The replies alone."""
    settings = {"n": 6, "max_new_tokens": 5, "seed": 3, **keys}
    return sample(Sampling(str(policy), **settings), prompts, target)[0]


def scaled(folder, base, factor):
    """The policy of a base whose logits are multiplied, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return model


def test_the_same_settings_draw_the_same_whatever_comes_before_and_what_is_drawn_survives_an_interrupt(
    tiny_llama, tmp_path, monkeypatch
):
    whole = drawn(tmp_path / "whole.jsonl", tiny_llama)
    assert [len(set(found.responses)) > 1 for found in whole] == [True] * 3
    assert read_samples(tmp_path / "whole.jsonl")[0] == whole
    assert drawn(tmp_path / "alone.jsonl", tiny_llama, PROMPTS[1:2]) == whole[1:2]
    assert drawn(tmp_path / "other.jsonl", tiny_llama, PROMPTS[1:2], seed=4) != whole[1:2]

    def interrupted(*args, draw=module._draw):
        if args[3] is PROMPTS[1]:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(module, "_draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "part.jsonl", tiny_llama)
    assert read_samples(tmp_path / "part.jsonl")[0] == whole[:1]
    with pytest.raises(RecipeError, match="part.jsonl holds replies already: --samples"):
        drawn(tmp_path / "part.jsonl", tiny_llama)
    assert read_samples(tmp_path / "part.jsonl")[0] == whole[:1]
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "none.jsonl", tiny_llama, PROMPTS[1:])
    monkeypatch.undo()
    assert drawn(tmp_path / "none.jsonl", tiny_llama, PROMPTS[1:]) == whole[1:]


def test_draws_follow_the_policys_probabilities_and_ends_whatever_its_own_settings(tiny_llama, tmp_path):
    """top_k is 50 where nobody says otherwise; the KL divergence is from the whole policy."""
    folder, ends = tmp_path / "policy", range(280, 300)
    model = scaled(folder, tiny_llama, 15)  # or all are as likely
    own = {"top_k": 1, "temperature": 0.01, "do_sample": True, "eos_token_id": list(ends)}
    (folder / "generation_config.json").write_text(json.dumps(own))
    (one,) = drawn(tmp_path / "a.jsonl", folder, PROMPTS[:1], n=2000, max_new_tokens=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(PROMPTS[0].prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        chances = model(ids).logits[0, -1].softmax(-1).tolist()
    expected: Counter[str] = Counter()
    for token, chance in enumerate(chances):
        expected["" if token in ends else tokenizer.decode([token], skip_special_tokens=True)] += chance
    found = Counter(one.responses)
    for reply, chance in [*expected.most_common(8), ("", expected[""])]:
        assert found[reply] / 2000 == pytest.approx(chance, abs=4 * (chance / 2000) ** 0.5)
    assert len(found) > 60  # more than the 50 that transformers would take
    ended = sum(chances[token] for token in [2, *ends])  # 2 is what the tokenizer calls EOS
    assert one.cut / 2000 == pytest.approx(1 - ended, abs=4 * (ended / 2000) ** 0.5)


def test_an_sft_adapter_is_a_policy_and_a_classifier_costs_no_replies(tiny_llama, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), lora).save_pretrained(tmp_path / "sft")
    assert [len(one.responses) for one in drawn(tmp_path / "some.jsonl", tmp_path / "sft")] == [6, 6, 6]
    target, classifier = tmp_path / "none.jsonl", save_classifier(tmp_path / "classifier", tiny_llama)
    damaged = shutil.copytree(tiny_llama, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"none")
    for policy, said in (
        (classifier, "as a language model: it is a Llama"),
        ("./gone", "./gone does not exist"),
        (damaged, "as a language model: "),
    ):
        with pytest.raises(RecipeError, match=said):
            drawn(target, policy)
    assert not target.exists()


def test_prompts_that_the_policy_cannot_read_are_counted(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "policy")
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}Hi"
    (folder / "chat_template.jinja").write_text(template)
    refused = Sample([{"role": "system", "content": "Be kind"}, *PROMPTS[0].prompt], [])
    settings = Sampling(str(folder), n=2, max_new_tokens=3)
    found, excluded = sample(settings, [*PROMPTS, refused], tmp_path / "a.jsonl")
    assert [one.prompt for one in found] == [one.prompt for one in PROMPTS]
    assert excluded == {"refused_by_policys_template": 1}
    long = Sample([{"role": "user", "content": "hello " * 600}], [])
    with pytest.raises(DataError, match="the policy can read no prompt: too_long_for_policy"):
        drawn(tmp_path / "b.jsonl", tiny_llama, [long])
