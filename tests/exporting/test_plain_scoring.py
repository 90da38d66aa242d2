"""The fresh process: plain transformers, nothing of ours, and a fault in words."""

import json
import subprocess
import sys

import pytest
from conftest import CHAT_TEMPLATE
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe.exporting.plain_scoring import ppo_rewards
from rm_recipe.exporting.verify import PLAIN_SCORING
from rm_recipe.model.tokenizer import load_tokenizer
from rm_recipe.scoring import RewardModel


def ask(tmp_path, **request):
    (tmp_path / "request.json").write_text(json.dumps({"sampled": [], "device": "cpu", **request}))
    paths = [str(tmp_path / name) for name in ("request.json", "answer.json")]
    subprocess.run([sys.executable, "-P", PLAIN_SCORING, *paths], check=True, capture_output=True)
    return json.loads((tmp_path / "answer.json").read_text())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("plain") / "classifier"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_llama, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    model.config.problem_type = "regression"
    model.save_pretrained(folder)
    return folder


def test_it_gives_the_same_rewards_without_a_module_of_ours(classifier, tmp_path):
    sequences = [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 10, 11, 2]]
    answer = ask(tmp_path, folder=str(classifier), sequences=sequences, texts=["good cat"], left=True)
    assert not {"rm_recipe", "trl", "peft"} & set(answer["modules"])
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    expected = [model(model.dummy_inputs["input_ids"].new_tensor([ids])).logits.item() for ids in sequences]
    assert len(set(expected)) == 3
    for way in ("alone", "batched", "left", "float32"):
        assert answer[way] == pytest.approx(expected, abs=1e-6), way
    [piped] = answer["pipeline"]
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    assert piped["score"] == pytest.approx(model(**tokenizer("good cat", return_tensors="pt")).logits.item())
    assert answer["ids"] == [
        [tokenizer("good cat", add_special_tokens=False)["input_ids"]],
        [tokenizer("good cat")["input_ids"]],
    ]
    assert answer["ids"][0] != answer["ids"][1]  # this tokenizer adds BOS: no export of ours


def test_an_encoders_left_side_is_left_alone(classifier, tmp_path):
    answer = ask(tmp_path, folder=str(classifier), sequences=[[1, 2]], texts=["cat"], left=False)
    assert answer["left"] is None


PAIRS = [
    ("hello", "good good"),
    ("how are you", "fine thanks and you"),
    ("the cat sat on the mat", "no"),
    ("hello hello hello", "bad far away cat dog"),
]


@pytest.mark.parametrize("base", ["llama", "mistral", "gpt2"])
def test_ids_as_ppo_builds_them_get_the_rewards_of_score(tiny_base, tmp_path, base):
    """The prompt with its generation prompt, what a policy sampled, the end token; padded, in a batch."""
    tokenizer = load_tokenizer(str(tiny_base(base)))
    tokenizer.chat_template = CHAT_TEMPLATE.replace("</s>\n", "</s>")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base(base), num_labels=1).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.max_position_embeddings = 256
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = RewardModel.from_pretrained(tmp_path)
    expected = judge.score([{"prompt": prompt, "response": reply} for prompt, reply in PAIRS])
    conversations = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        for prompt, reply in PAIRS
    ]
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt, _ in PAIRS}) > 1
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    found = ppo_rewards(model, AutoTokenizer.from_pretrained(tmp_path), conversations)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(set(found)) == len(PAIRS)


def test_a_reply_that_no_policy_samples_so_has_no_reward_there(classifier):
    """`hello` is one token here, and the generation prompt ends within it."""
    tokenizer = load_tokenizer(str(classifier))
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}hel{% endif %}"
    )
    conversation = [{"role": "user", "content": "how "}, {"role": "assistant", "content": "hello"}]
    assert ppo_rewards(None, tokenizer, [conversation]) == [None]


def test_what_goes_wrong_is_said_in_words(tmp_path):
    answer = ask(tmp_path, folder=str(tmp_path), sequences=[[1]], texts=[], left=False)
    assert "Error: " in answer["error"]


def test_a_reward_model_of_ours_agrees(classifier):
    """The same folder through `RewardModel`: one way to score."""
    judge = RewardModel.from_pretrained(classifier)
    assert len(judge.score([{"prompt": "hello", "response": "good"}])) == 1
