"""Files of prompts and replies are read in every shape; replies are drawn alike wherever a run begins."""

import json
import shutil
from collections import Counter

import pytest
import torch
from conftest import HH_RLHF, make_rows, needs_hh_rlhf, write_jsonl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe.errors import DataError, RecipeError
from rm_recipe.overoptimization import replies as module
from rm_recipe.overoptimization.replies import Sample, Sampling, read_prompts, read_samples, sample


def test_prompts_come_from_prompts_and_from_comparisons_each_once(tmp_path):
    rows = make_rows(2, seed=1)
    transcript = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi?\n\nAssistant: No"}
    file = write_jsonl(
        tmp_path / "prompts.jsonl",
        [{"prompt": "hello"}, *rows, {"prompt": "hello"}, transcript, {"prompt": "bad?", "is_safety": True}],
    )
    found, excluded = read_prompts(file)
    assert not excluded
    texts = [one.prompt[-1]["content"] for one in found]
    assert texts == ["hello", *(row["prompt"][0]["content"] for row in rows), "Hi?", "bad?"]
    assert [one.is_safety for one in found] == [False, False, False, False, True]


def test_replies_are_gathered_by_prompt(tmp_path):
    hello = [{"role": "user", "content": "hello"}]
    rows = [{"prompt": "hello", "response": "a"}, {"prompt": hello, "response": "b"}]
    file = write_jsonl(tmp_path / "s.jsonl", [*rows, {"prompt": "other", "responses": ["x", ""], "cut": 1}])
    assert [(one.responses, one.cut) for one in read_samples(file)[0]] == [(["a", "b"], None), (["x", ""], 1)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ('{"prompt": "a"}', "line 2: column 'responses' should be a list of texts"),
        ('{"prompt": "a", "responses": [1]}', "line 2: column 'responses' should be a list of texts"),
        ('{"responses": ["b"]}', "line 2: column 'prompt' should be a text or a list of messages"),
    ],
)
def test_a_faulty_file_of_replies_is_named_with_its_row(tmp_path, line, said):
    file = tmp_path / "samples.jsonl"
    file.write_text('{"prompt": "hello", "responses": ["a", "b"]}\n' + line + "\n")
    with pytest.raises(DataError, match=said):
        read_samples(file)
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "gone.jsonl")


def test_a_row_that_is_no_prompt_is_counted_and_the_others_are_read(tmp_path):
    rows = [
        {"prompt": " ", "responses": ["b"]},
        {"prompt": "hello", "responses": ["a"]},
        {"prompt": "a", "responses": ["\ud800"]},
    ]
    found, excluded = read_samples(write_jsonl(tmp_path / "samples.jsonl", rows))
    assert [one.responses for one in found] == [["a"]]
    assert excluded == {"empty_prompt": 1, "invalid_text": 1}
    pair = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi?\n\nAssistant: "}
    found, excluded = read_prompts(write_jsonl(tmp_path / "prompts.jsonl", [pair, *rows[1:]]))
    assert len(found) == 2
    assert excluded == {"empty_response": 1}
    with pytest.raises(DataError, match="holds no prompt that can be used"):
        read_prompts(write_jsonl(tmp_path / "none.jsonl", [pair]))


def test_no_more_rows_are_read_than_are_wanted(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "b"}\n{\n')
    assert [one.prompt[0]["content"] for one in read_prompts(file, 2)[0]] == ["a", "b"]


@needs_hh_rlhf
def test_the_prompts_of_genuine_hh_rlhf_are_read():
    found, excluded = read_prompts(HH_RLHF / "harmless-base" / "test.jsonl.gz")
    assert len(found) > 200
    assert excluded.total() < 20


# --- replies drawn from a policy ---------------------------------------------------------------

PROMPTS = [Sample([{"role": "user", "content": text}], []) for text in ("hello", "how are you", "yes")]


SETTINGS = {"n": 6, "max_new_tokens": 5, "seed": 3}


def drawn(target, policy, prompts=PROMPTS, overwrite=False, **keys):
    """The replies alone."""
    return sample(Sampling(str(policy), **{**SETTINGS, **keys}), prompts, target, overwrite=overwrite)[0]


def saved(folder, base, change):
    """A policy as `change` makes it of a base, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return model


def test_the_same_settings_draw_the_same_whatever_comes_before(tiny_llama, tmp_path):
    whole = drawn(tmp_path / "a.jsonl", tiny_llama)
    alone = drawn(tmp_path / "b.jsonl", tiny_llama, PROMPTS[1:2])
    assert [len(found.responses) for found in whole] == [6, 6, 6]
    assert alone == whole[1:2]
    assert len(set(whole[0].responses)) > 1
    assert drawn(tmp_path / "c.jsonl", tiny_llama, PROMPTS[1:2], seed=4) != alone


def test_what_was_interrupted_goes_on_and_ends_the_same(tiny_llama, tmp_path, monkeypatch):
    whole = drawn(tmp_path / "whole.jsonl", tiny_llama)
    target, draw, made = tmp_path / "samples.jsonl", module._draw, []

    def interrupted(*args):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(args)
        return draw(*args)

    monkeypatch.setattr(module, "_draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drawn(target, tiny_llama)
    with target.open("a") as file:
        file.write('{"prompt": [{"role": "us')  # as a kill leaves it
    again = []
    monkeypatch.setattr(module, "_draw", lambda *args: again.append(args) or draw(*args))
    for _ in range(2):
        assert drawn(target, tiny_llama) == whole
        assert len(again) == 2
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_replies_of_other_settings_or_weights_are_not_mixed_in_nor_lost_unasked(tiny_llama, tmp_path):
    """A policy that was trained on is another one under the same name."""
    target, folder = tmp_path / "samples.jsonl", shutil.copytree(tiny_llama, tmp_path / "policy")
    old = drawn(target, folder)
    before = target.read_bytes()
    with pytest.raises(RecipeError, match=r"otherwise \(temperature differ\): --samples takes them"):
        drawn(target, folder, temperature=0.01)
    saved(folder, tiny_llama, lambda model: model.lm_head.weight.mul_(-9))
    with pytest.raises(RecipeError, match=r"were drawn otherwise \(weights differ\)"):
        drawn(target, folder)
    assert target.read_bytes() == before
    assert drawn(target, folder, overwrite=True) != old
    assert len(read_samples(target)[0]) == 3


def test_draws_follow_the_policys_probabilities_whatever_its_own_settings(tiny_llama, tmp_path):
    """top_k is 50 where nobody says otherwise; the KL divergence is from the whole policy."""
    folder = tmp_path / "policy"
    model = saved(folder, tiny_llama, lambda model: model.lm_head.weight.mul_(15))  # or all are as likely
    own = {"top_k": 1, "temperature": 0.01, "do_sample": True, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(own))
    (one,) = drawn(tmp_path / "a.jsonl", folder, PROMPTS[:1], n=2000, max_new_tokens=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(PROMPTS[0].prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected: Counter[str] = Counter()
    with torch.no_grad():
        for token, chance in enumerate(model(ids).logits[0, -1].softmax(-1).tolist()):
            expected[tokenizer.decode([token], skip_special_tokens=True)] += chance
    assert expected.most_common(1)[0][1] > 0.02
    found = Counter(one.responses)
    for reply, chance in expected.most_common(8):
        assert found[reply] / 2000 == pytest.approx(chance, abs=4 * (chance / 2000) ** 0.5)
    assert len(found) > 60  # more than the 50 that transformers would take


def test_a_reply_ends_where_the_policy_ends_it_and_what_has_no_end_is_counted_as_cut(tiny_base, tmp_path):
    """Also of a tokenizer like GPT-2's, whose pad token is its end."""
    folder = shutil.copytree(tiny_base("gpt2"), tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        setattr(tokenizer, name, "</s>")
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = list(range(2, 60))  # so that some end early
    model.generation_config.save_pretrained(folder)
    found = drawn(tmp_path / "a.jsonl", folder, n=16, max_new_tokens=8)
    assert {len(one.responses) for one in found} == {16}
    assert 0 < sum(one.cut for one in found) < 48
    assert any(reply == "" for one in found for reply in one.responses)  # kept


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"n": 1, "temperature": 0.0}, "'--n 1' must be 2 or more.*'--temperature 0.0' must be above 0"),
        ({"top_p": 0.0, "top_k": -1}, "'--top-p 0.0' must be above 0 and at most 1; '--top-k -1' must be 0"),
        ({"max_new_tokens": 0}, "'--max-new-tokens 0' must be 1 or more"),
    ],
)
def test_settings_that_draw_nothing_are_refused(tiny_llama, tmp_path, keys, said):
    with pytest.raises(RecipeError, match=said):
        drawn(tmp_path / "a.jsonl", tiny_llama, **keys)


def test_an_sft_adapter_is_a_policy_and_a_classifier_costs_no_replies(tiny_llama, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), lora).save_pretrained(tmp_path / "sft")
    target, folder = tmp_path / "samples.jsonl", tmp_path / "classifier"
    assert [len(one.responses) for one in drawn(target, tmp_path / "sft")] == [6, 6, 6]
    before = target.read_bytes()
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    for policy, said in ((folder, "as a language model: it is a Llama"), ("./gone", "./gone does not exist")):
        with pytest.raises(RecipeError, match=said):
            drawn(target, policy, overwrite=True)
    assert target.read_bytes() == before


def test_prompts_that_the_policy_cannot_read_are_counted(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "policy")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    long = Sample([{"role": "user", "content": "hello " * 600}], [])
    refused = Sample([{"role": "system", "content": "Be kind"}, *PROMPTS[0].prompt], [])
    settings = Sampling(str(folder), n=2, max_new_tokens=3)
    found, excluded = sample(settings, [*PROMPTS, long, refused], tmp_path / "a.jsonl", overwrite=False)
    assert [one.prompt for one in found] == [one.prompt for one in PROMPTS]
    assert excluded == {"too_long_for_policy": 1, "refused_by_policys_template": 1}
    with pytest.raises(DataError, match="the policy can read no prompt: too_long_for_policy"):
        sample(settings, [long], tmp_path / "b.jsonl", overwrite=False)
