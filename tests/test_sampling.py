"""Replies are drawn alike wherever a run begins, and files of replies are read in every shape."""

import json
import shutil

import pytest
import torch
from conftest import make_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe import sampling as sampling_module
from rm_recipe.errors import DataError, RecipeError
from rm_recipe.sampling import Sample, Sampling, read_prompts, read_samples, sample, settings_file

PROMPTS = [Sample([{"role": "user", "content": text}], []) for text in ("hello", "how are you", "yes")]


@pytest.fixture
def settings(tiny_llama):
    return Sampling(str(tiny_llama), n=6, max_new_tokens=5, seed=3)


def test_the_same_settings_draw_the_same_whatever_comes_before(settings, tmp_path):
    whole = sample(settings, PROMPTS, tmp_path / "a.jsonl", overwrite=False)
    alone = sample(settings, PROMPTS[1:2], tmp_path / "b.jsonl", overwrite=False)
    assert [len(found.responses) for found in whole] == [6, 6, 6]
    assert alone == whole[1:2]
    assert len(set(whole[0].responses)) > 1
    other = Sampling(settings.policy, n=6, max_new_tokens=5, seed=4)
    assert sample(other, PROMPTS[1:2], tmp_path / "c.jsonl", overwrite=False) != alone


def test_what_was_interrupted_goes_on_and_ends_the_same(settings, tmp_path, monkeypatch):
    whole = sample(settings, PROMPTS, tmp_path / "whole.jsonl", overwrite=False)
    target, draw, drawn = tmp_path / "samples.jsonl", sampling_module._draw, []

    def interrupted(*args):
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(args)
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sampling_module, "_draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(settings, PROMPTS, target, overwrite=False)
    with target.open("a") as file:
        file.write('{"prompt": [{"role": "us')  # as a kill leaves it
    again = []
    monkeypatch.setattr(sampling_module, "_draw", lambda *args: again.append(args) or draw(*args))
    assert sample(settings, PROMPTS, target, overwrite=False) == whole
    assert len(again) == 2
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sample(settings, PROMPTS, target, overwrite=False) == whole
    assert len(again) == 2
    assert json.loads(settings_file(target).read_text())["seed"] == 3


def test_replies_of_other_settings_are_not_mixed_in_nor_lost_unasked(settings, tmp_path):
    target = tmp_path / "samples.jsonl"
    sample(settings, PROMPTS[:1], target, overwrite=False)
    before = target.read_bytes()
    hotter = Sampling(settings.policy, n=6, max_new_tokens=5, seed=3, temperature=2.0)
    with pytest.raises(
        RecipeError, match=r"were drawn otherwise \(temperature differ\); --samples takes them"
    ):
        sample(hotter, PROMPTS[:1], target, overwrite=False)
    assert target.read_bytes() == before
    sample(hotter, PROMPTS[:1], target, overwrite=True)
    assert len(read_samples(target)) == 1
    assert target.read_bytes() != before


def test_the_models_own_sampling_settings_have_no_say(settings, tmp_path, tiny_llama):
    """top_k is 50 where nobody says otherwise; the KL divergence is from the whole policy."""
    folder = shutil.copytree(tiny_llama, tmp_path / "policy")
    own = {"top_k": 1, "temperature": 0.01, "do_sample": True, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(own))
    found = sample(
        Sampling(str(folder), n=6, max_new_tokens=5, seed=3), PROMPTS, tmp_path / "a.jsonl", overwrite=False
    )
    plain = sample(settings, PROMPTS, tmp_path / "b.jsonl", overwrite=False)
    assert [one.responses for one in found] == [one.responses for one in plain]


def test_draws_follow_the_policys_probabilities(tiny_llama, tmp_path):
    drawn = sample(
        Sampling(str(tiny_llama), n=2000, max_new_tokens=1),
        PROMPTS[:1],
        tmp_path / "a.jsonl",
        overwrite=False,
    )
    model, tokenizer = (kind.from_pretrained(tiny_llama) for kind in (AutoModelForCausalLM, AutoTokenizer))
    text = tokenizer.apply_chat_template(PROMPTS[0].prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        chances = model(ids).logits[0, -1].softmax(-1)
    for token in chances.topk(3).indices.tolist():
        reply = tokenizer.decode([token], skip_special_tokens=True)
        share = drawn[0].responses.count(reply) / 2000
        assert share == pytest.approx(float(chances[token]), abs=0.01)


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
    found = sample(ending, PROMPTS[:1], tmp_path / "a.jsonl", overwrite=False)[0]
    assert found.responses == [""] * 4  # kept
    assert found.cut == 0
    assert sample(settings, PROMPTS[:1], tmp_path / "b.jsonl", overwrite=False)[0].cut > 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"n": 1}, "'--n 1' must be 2 or more"),
        ({"temperature": 0.0}, "'--temperature 0.0' must be above 0"),
        ({"top_p": 0.0, "top_k": -1}, "'--top-p 0.0' must be above 0 and at most 1; '--top-k -1' must be 0"),
        ({"max_new_tokens": 0}, "'--max-new-tokens 0' must be 1 or more"),
        ({"max_new_tokens": 600}, "new ones exceed the policy's 512 positions"),
        ({"policy": "./gone"}, "'./gone' cannot be loaded"),
    ],
)
def test_settings_that_draw_nothing_are_refused(tiny_llama, tmp_path, keys, said):
    with pytest.raises(RecipeError, match=said.replace("(", r"\(")):
        sample(
            Sampling(**{"policy": str(tiny_llama), **keys}), PROMPTS, tmp_path / "a.jsonl", overwrite=False
        )


def test_a_classifier_is_no_policy(tiny_llama, tmp_path):
    folder = tmp_path / "judge"
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"is no language model: it has no lm_head\.weight"):
        sample(Sampling(str(folder), n=2), PROMPTS, tmp_path / "a.jsonl", overwrite=False)


def test_an_sft_adapter_is_a_policy(tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "sft")
    found = sample(
        Sampling(str(tmp_path / "sft"), n=2, max_new_tokens=3), PROMPTS, tmp_path / "a.jsonl", overwrite=False
    )
    assert [len(one.responses) for one in found] == [2, 2, 2]


# --- files ---------------------------------------------------------------------------------------


def test_prompts_come_from_prompts_and_from_comparisons_each_once(tmp_path):
    rows = make_rows(2, seed=1)
    transcript = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi?\n\nAssistant: No"}
    file = write_jsonl(
        tmp_path / "prompts.jsonl",
        [{"prompt": "hello"}, *rows, {"prompt": "hello"}, transcript, {"prompt": "bad?", "is_safety": True}],
    )
    found = read_prompts(file)
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
    hello, other = read_samples(file)
    assert hello.responses == ["a", "b"]
    assert hello.cut is None
    assert (other.responses, other.cut) == (["x", ""], 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "row 2: not JSON"),
        ("[]", "row 2: a row is a JSON object"),
        ('{"prompt": "a"}', "row 2: expected a 'prompt' and its 'responses', a list of texts"),
        ('{"prompt": "a", "responses": "b"}', "row 2: expected a 'prompt' and its 'responses'"),
        ('{"prompt": "a", "responses": [1]}', "row 2: expected a 'prompt' and its 'responses'"),
        ('{"responses": ["b"]}', "row 2: column 'prompt' should be a text or a list of messages"),
        ('{"prompt": " ", "responses": ["b"]}', "row 2: empty prompt"),
        ('{"prompt": "a", "responses": ["\\ud800"]}', "row 2: invalid text"),
    ],
)
def test_a_faulty_file_of_replies_is_named_with_its_row(tmp_path, line, said):
    file = tmp_path / "samples.jsonl"
    file.write_text('{"prompt": "hello", "responses": ["a", "b"]}\n' + line + "\n")
    with pytest.raises(DataError, match=said):
        read_samples(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), ("", "is empty"), ('{"text": "a"}\n', "row 1: column 'prompt'")],
)
def test_a_faulty_file_of_prompts_is_named(tmp_path, content, said):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=said):
        read_prompts(file)
