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
from rm_recipe.overoptimization.replies import (
    Sample,
    Sampling,
    read_prompts,
    read_samples,
    sample,
    settings_file,
)


def test_prompts_come_from_prompts_and_from_comparisons_each_once(tmp_path):
    rows = make_rows(2, seed=1)
    transcript = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi?\n\nAssistant: No"}
    file = write_jsonl(
        tmp_path / "prompts.jsonl",
        [{"prompt": "hello"}, *rows, {"prompt": "hello"}, transcript, {"prompt": "bad?", "is_safety": True}],
    )
    found, excluded = read_prompts(file)
    assert not excluded
    assert [one.prompt[-1]["content"] for one in found] == [
        "hello", *(row["prompt"][0]["content"] for row in rows), "Hi?", "bad?"
    ]  # fmt: skip
    assert [one.is_safety for one in found] == [False, False, False, False, True]


def test_replies_are_gathered_by_prompt(tmp_path):
    file = write_jsonl(
        tmp_path / "samples.jsonl",
        [
            {"prompt": "hello", "response": "a"},
            {"prompt": "other", "responses": ["x", ""], "cut": 1},
            {"prompt": [{"role": "user", "content": "hello"}], "response": "b"},
        ],
    )
    (hello, other), _ = read_samples(file)
    assert hello.responses == ["a", "b"]
    assert hello.cut is None
    assert (other.responses, other.cut) == (["x", ""], 1)


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
    with pytest.raises(DataError, match="no such file"):
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


def drawn(*args, **keys):
    """The replies alone."""
    return sample(*args, **keys)[0]


@pytest.fixture
def settings(tiny_llama):
    return Sampling(str(tiny_llama), n=6, max_new_tokens=5, seed=3)


def test_the_same_settings_draw_the_same_whatever_comes_before(settings, tmp_path):
    whole = drawn(settings, PROMPTS, tmp_path / "a.jsonl", overwrite=False)
    alone = drawn(settings, PROMPTS[1:2], tmp_path / "b.jsonl", overwrite=False)
    assert [len(found.responses) for found in whole] == [6, 6, 6]
    assert alone == whole[1:2]
    assert len(set(whole[0].responses)) > 1
    other = Sampling(settings.policy, n=6, max_new_tokens=5, seed=4)
    assert drawn(other, PROMPTS[1:2], tmp_path / "c.jsonl", overwrite=False) != alone


def test_what_was_interrupted_goes_on_and_ends_the_same(settings, tmp_path, monkeypatch):
    whole = drawn(settings, PROMPTS, tmp_path / "whole.jsonl", overwrite=False)
    target, draw, made = tmp_path / "samples.jsonl", module._draw, []

    def interrupted(*args):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(args)
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drawn(settings, PROMPTS, target, overwrite=False)
    with target.open("a") as file:
        file.write('{"prompt": [{"role": "us')  # as a kill leaves it
    again = []
    monkeypatch.setattr(module, "_draw", lambda *args: again.append(args) or draw(*args))
    assert drawn(settings, PROMPTS, target, overwrite=False) == whole
    assert len(again) == 2
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert drawn(settings, PROMPTS, target, overwrite=False) == whole
    assert len(again) == 2
    assert json.loads(settings_file(target).read_text())["seed"] == 3


def test_replies_of_other_settings_are_not_mixed_in_nor_lost_unasked(settings, tmp_path):
    target = tmp_path / "samples.jsonl"
    drawn(settings, PROMPTS[:1], target, overwrite=False)
    before = target.read_bytes()
    colder = Sampling(settings.policy, n=6, max_new_tokens=5, seed=3, temperature=0.01)
    with pytest.raises(
        RecipeError, match=r"were drawn otherwise \(temperature differ\): --samples takes them"
    ):
        drawn(colder, PROMPTS[:1], target, overwrite=False)
    assert target.read_bytes() == before
    drawn(colder, PROMPTS[:1], target, overwrite=True)
    assert len(read_samples(target)[0]) == 1
    assert target.read_bytes() != before


def test_the_models_own_sampling_settings_have_no_say(settings, tmp_path, tiny_llama):
    """top_k is 50 where nobody says otherwise; the KL divergence is from the whole policy."""
    folder = shutil.copytree(tiny_llama, tmp_path / "policy")
    own = {"top_k": 1, "temperature": 0.01, "do_sample": True, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(own))
    found = drawn(
        Sampling(str(folder), n=6, max_new_tokens=5, seed=3), PROMPTS, tmp_path / "a.jsonl", overwrite=False
    )
    plain = drawn(settings, PROMPTS, tmp_path / "b.jsonl", overwrite=False)
    assert [one.responses for one in found] == [one.responses for one in plain]


def test_draws_follow_the_policys_probabilities(tiny_llama, tmp_path):
    model, tokenizer = (kind.from_pretrained(tiny_llama) for kind in (AutoModelForCausalLM, AutoTokenizer))
    with torch.no_grad():
        model.lm_head.weight.mul_(15)  # or all tokens are as likely
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    settings = Sampling(str(tmp_path / "policy"), n=2000, max_new_tokens=1)
    (one,) = drawn(settings, PROMPTS[:1], tmp_path / "a.jsonl", overwrite=False)
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


def test_a_reply_ends_at_the_end_and_what_has_none_is_counted_as_cut(settings, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(settings.policy)
    folder, tokenizer = tmp_path / "policy", AutoTokenizer.from_pretrained(settings.policy)

    def likes(token):
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.model.norm.weight.fill_(1)
            model.lm_head.weight[token] = 9 * model.model.embed_tokens.weight[1].sign()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        logits = model(torch.tensor([[1, 5]])).logits[0, -1]
        if logits[token] < 0:
            with torch.no_grad():
                model.lm_head.weight[token] *= -1
            model.save_pretrained(folder)

    likes(2)
    ending = Sampling(str(folder), n=4, max_new_tokens=40, temperature=0.01)
    found = drawn(ending, PROMPTS[:1], tmp_path / "a.jsonl", overwrite=False)[0]
    assert found.responses == [""] * 4  # kept
    assert found.cut == 0
    assert drawn(settings, PROMPTS[:1], tmp_path / "b.jsonl", overwrite=False)[0].cut > 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"n": 1, "temperature": 0.0}, "'--n 1' must be 2 or more.*'--temperature 0.0' must be above 0"),
        ({"top_p": 0.0, "top_k": -1}, "'--top-p 0.0' must be above 0 and at most 1; '--top-k -1' must be 0"),
        ({"max_new_tokens": 0}, "'--max-new-tokens 0' must be 1 or more"),
        ({"policy": "./gone"}, "./gone does not exist"),
    ],
)
def test_settings_that_draw_nothing_are_refused(tiny_llama, tmp_path, keys, said):
    with pytest.raises(RecipeError, match=said.replace("(", r"\(")):
        drawn(Sampling(**{"policy": str(tiny_llama), **keys}), PROMPTS, tmp_path / "a.jsonl", overwrite=False)


def test_an_sft_adapter_is_a_policy(tiny_llama, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "sft")
    found = drawn(
        Sampling(str(tmp_path / "sft"), n=2, max_new_tokens=3), PROMPTS, tmp_path / "a.jsonl", overwrite=False
    )
    assert [len(one.responses) for one in found] == [2, 2, 2]


def test_a_policy_that_was_trained_on_is_another_one(settings, tiny_llama, tmp_path):
    """Under the same name; its old replies would be taken for new ones."""
    folder, target = shutil.copytree(tiny_llama, tmp_path / "policy"), tmp_path / "samples.jsonl"
    own = Sampling(str(folder), n=6, max_new_tokens=5)
    before = drawn(own, PROMPTS, target, overwrite=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"were drawn otherwise \(weights differ\)"):
        drawn(own, PROMPTS, target, overwrite=False)
    assert drawn(own, PROMPTS, target, overwrite=True) != before


@pytest.mark.parametrize(
    ("policy", "said"),
    [("gone", "does not exist"), ("judge", "as a language model: it is a LlamaForSequenceClassification")],
)
def test_a_policy_that_cannot_be_used_costs_no_replies(settings, tiny_llama, tmp_path, policy, said):
    target = tmp_path / "samples.jsonl"
    drawn(settings, PROMPTS, target, overwrite=False)
    before = target.read_bytes()
    folder = tmp_path / "judge"
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    with pytest.raises(RecipeError, match=said):
        drawn(Sampling(str(tmp_path / policy), n=2), PROMPTS, target, overwrite=True)
    assert target.read_bytes() == before


def test_prompts_that_the_policy_cannot_read_are_counted(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "policy")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    prompts = [
        *PROMPTS,
        Sample([{"role": "user", "content": "hello " * 600}], []),
        Sample([{"role": "system", "content": "Be kind"}, *PROMPTS[0].prompt], []),
    ]
    settings = Sampling(str(folder), n=2, max_new_tokens=3)
    found, excluded = sample(settings, prompts, tmp_path / "a.jsonl", overwrite=False)
    assert [one.prompt for one in found] == [one.prompt for one in PROMPTS]
    assert excluded == {"too_long_for_policy": 1, "refused_by_policys_template": 1}
    with pytest.raises(DataError, match="the policy can read no prompt: too_long_for_policy"):
        sample(settings, prompts[3:4], tmp_path / "b.jsonl", overwrite=False)


def test_a_policy_whose_tokenizer_has_no_token_to_pad_with_is_drawn_from(tiny_base, tmp_path):
    """GPT-2's is all one token: replies of unequal length are padded with one that the model has."""
    folder = shutil.copytree(tiny_base("gpt2"), tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        setattr(tokenizer, name, "</s>")
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = list(range(2, 60))  # so that some end early
    model.generation_config.save_pretrained(folder)
    found = drawn(
        Sampling(str(folder), n=16, max_new_tokens=8), PROMPTS, tmp_path / "a.jsonl", overwrite=False
    )
    assert {len(one.responses) for one in found} == {16}
    assert 0 < sum(one.cut for one in found) < 48
