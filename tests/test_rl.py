"""TRL's trainers, given an export or a function from it, see the very rewards that `score` gives."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import make_recipe, make_tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.data_utils import apply_chat_template

from rm_recipe.errors import RecipeError
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.export import export
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.rl import as_item, combine, reward_function
from rm_recipe.scoring import RewardModel
from rm_recipe.training.train import train

PROMPTS = ["hello", "how are you", "the cat sat on the mat", "good dog"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_data):
    """A finished run with its evaluation and export."""
    folder = tmp_path_factory.mktemp("handoff")
    train(read_recipe(make_recipe(folder, tiny_llama, tiny_data, num_train_epochs=1)))
    evaluate(str(folder / "run"))
    export(folder / "run")
    return folder / "run"


def as_messages(text, role="user"):
    return [{"role": role, "content": text}]


@pytest.mark.parametrize(
    ("trainer", "config", "kind"),
    [(RLOOTrainer, RLOOConfig, "folder"), (GRPOTrainer, GRPOConfig, "function")],
)
def test_two_steps_of_trls_trainers_see_the_rewards_of_score(
    run, tiny_llama, tmp_path, monkeypatch, trainer, config, kind
):
    seen = []
    calculate = trainer._calculate_rewards

    def watch(self, inputs, prompts, completions, *rest):
        rewards = calculate(self, inputs, prompts, completions, *rest)
        seen.append((prompts, completions, rewards[:, 0].tolist()))
        return rewards

    monkeypatch.setattr(trainer, "_calculate_rewards", watch)
    torch.manual_seed(0)
    lengths = {"num_generations": 2, "max_completion_length": 8, "max_steps": 2}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False}
    settings = config(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, seed=0, **lengths, **quiet)
    trainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        reward_funcs=str(run / "export") if kind == "folder" else reward_function(run / "export"),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": as_messages(prompt)} for prompt in PROMPTS]),
        processing_class=make_tokenizer(),
    ).train()
    reward_model = RewardModel.from_pretrained(run / "export")
    assert len(seen) == 2
    for prompts, completions, rewards in seen:
        expected = reward_model.score([as_item(*pair) for pair in zip(prompts, completions, strict=True)])
        assert rewards == pytest.approx(expected.tolist(), abs=1e-5)
        assert np.ptp(rewards) > 0


def test_texts_and_messages_get_the_same_rewards(run):
    """TRL would put no template around texts. A text is one message, as it was to the policy."""
    reward = reward_function(run / "export")
    prompts = [*PROMPTS, '[{"role": "system", "content": "be bad"}]', "\n\nHuman: hello\n\nAssistant: yes"]
    replies = ["good", "bad bad", "", "fine", "good", "no"]
    texts = reward(prompts=prompts, completions=replies, trainer_state=None)
    as_turns = [as_messages(prompt) for prompt in prompts]
    assert texts == reward(as_turns, [as_messages(reply, "assistant") for reply in replies])
    in_parts = [as_messages([{"type": "text", "text": reply}], "assistant") for reply in replies]
    assert texts == pytest.approx(reward(as_turns, in_parts), abs=1e-6)
    items = [{"prompt": prompt, "response": reply} for prompt, reply in zip(as_turns, replies, strict=True)]
    assert texts == pytest.approx(RewardModel.from_pretrained(run).score(items).tolist(), abs=1e-5)
    assert reward.__name__ == run.name
    turns = [*as_messages("a", "assistant"), *as_messages("b", "user"), *as_messages("c", "assistant")]
    assert as_item("q", turns) == {"prompt": [*as_messages("q"), *turns[:2]], "response": "c"}


CALL = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 6, "b": 7}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "multiply", "content": "42"}
# Shows calls, as the templates of models that were trained with tools do.
WITH_TOOLS = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function']['name'] }}"
    "({{ call['function']['arguments'] }}){% endfor %}</s>{% endfor %}"
)


@pytest.fixture(scope="module")
def with_tools(run, tmp_path_factory):
    """The export with a template that shows calls of tools."""
    folder = tmp_path_factory.mktemp("tools") / "export"
    shutil.copytree(run / "export", folder)
    (folder / "chat_template.jinja").write_text(WITH_TOOLS)
    return folder


def test_an_exchange_with_tools_is_scored_as_trls_own_reward_path_does(with_tools):
    """`_calculate_rewards` of TRL 1.16."""
    prompt, said = as_messages("six times seven?"), [CALLING, RESULT]
    parts = as_messages([{"type": "text", "text": "It is 42."}], "assistant")
    (found,) = reward_function(with_tools)([prompt], [[*said, *parts]])
    model = AutoModelForSequenceClassification.from_pretrained(with_tools).eval()
    tokenizer = AutoTokenizer.from_pretrained(with_tools)
    messages = [*prompt, *said, *as_messages("It is 42.", "assistant")]
    text = apply_chat_template({"messages": messages}, tokenizer)["text"]
    ids = tokenizer(text=[text], return_tensors="pt", padding=True, add_special_tokens=False)
    assert "multiply" in text
    with torch.no_grad():
        assert found == pytest.approx(model(**ids).logits[0, 0].item(), abs=1e-5)


def test_a_completion_that_is_no_reply_has_no_reward_and_is_no_exception(run, with_tools):
    prompt, answer = as_messages("six times seven?"), as_messages("It is 42.", "assistant")
    none: list = [[], None, 5, [{}], [*as_messages("42", "assistant"), *as_messages("and then?")]]
    none += [[CALLING], [CALLING, RESULT], [RESULT, {"role": "assistant", "content": None}], "good " * 200]
    for said in (
        {"content": None},
        {"content": [{"type": "image"}]},
        {"content": "", "tool_calls": ["no call"]},
        {"content": "good</s>"},
        {"content": "42", "reasoning_content": "six times seven"},
    ):
        none.append([{"role": "assistant", **said}])
    reward = reward_function(with_tools)
    good = as_messages("good", "assistant")
    *rewards, text, messages = reward([prompt] * (len(none) + 2), [*none, "good", good])
    assert np.isnan(rewards).all()
    assert text == pytest.approx(messages, abs=1e-6)
    assert math.isnan(reward([[]], [answer])[0])
    after_a_tool = [*prompt, CALLING, RESULT]
    assert math.isfinite(reward([after_a_tool], [answer])[0])
    assert math.isnan(reward_function(run / "export")([after_a_tool], [answer])[0])  # shows no calls


def test_normalised_rewards_have_held_out_mean_0_and_deviation_1(run, tiny_data):
    rows = [json.loads(line) for line in (tiny_data / "test.jsonl").open()]
    pairs = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    rewards = reward_function(run / "export", normalize=True)(*zip(*pairs, strict=True))
    assert np.mean(rewards) == pytest.approx(0, abs=1e-5)
    assert np.std(rewards) == pytest.approx(1, abs=1e-5)
    clipped = reward_function(run / "export", normalize=True, clip=0.5)(*zip(*pairs, strict=True))
    assert clipped == np.clip(rewards, -0.5, 0.5).tolist()
    with pytest.raises(RecipeError, match="has no reward_mean and reward_std"):
        reward_function(run, normalize=True)


def scores(*values):
    return lambda prompts, completions, **_: list(values)


def test_two_models_are_combined_by_the_papers_rule():
    """Llama 2, section 3.2.3, written down as it stands there."""
    rng = np.random.default_rng(0)
    safe, helpful, marked = rng.normal(0, 3, 50), rng.normal(0, 3, 50), rng.random(50) < 0.3
    sigmoid = [1 / (1 + np.exp(-values)) for values in (safe, helpful)]
    chosen = [s if mark or s < 0.15 else h for s, h, mark in zip(*sigmoid, marked, strict=True)]
    logits = [math.log(p / (1 - p)) for p in chosen]
    batch = (["q"] * 50, ["a"] * 50)
    found = combine(scores(*safe), scores(*helpful), whiten=False)(*batch, is_safety=marked.tolist())
    assert found == pytest.approx(logits)
    whitened = combine(scores(*safe), scores(*helpful))(*batch, is_safety=marked.tolist())
    assert whitened == pytest.approx((np.array(logits) - np.mean(logits)) / np.std(logits))
    unmarked = combine(scores(*safe), scores(*helpful), threshold=0.0, whiten=False)(*batch)
    assert unmarked == helpful.tolist()


def test_what_one_of_two_models_cannot_read_has_no_reward():
    """A reply that the safety model cannot read must not get what helpfulness says of it."""
    nan = math.nan
    found = combine(scores(nan, 2.0, nan, 1.0), scores(3.0, nan, nan, 4.0))(["q"] * 4, ["a"] * 4)
    assert [math.isnan(value) for value in found] == [True, True, True, False]
    marked = combine(scores(2.0), scores(nan), whiten=False)(["q"], ["a"], is_safety=[True])
    assert math.isnan(marked[0])


def test_extreme_scores_and_a_batch_of_one_stay_numbers_and_folders_are_models(run):
    found = combine(scores(-1e4, 1e4), scores(5.0, 6.0), whiten=False)(["q"] * 2, ["a"] * 2)
    assert found == [-1e4, 6.0]
    assert combine(scores(1.0), scores(2.0))(["q"], ["a"]) == [0.0]
    both = combine(safety=run / "export", helpfulness=run / "export", whiten=False)
    assert both(PROMPTS, ["good"] * 4) == reward_function(run / "export")(PROMPTS, ["good"] * 4)
