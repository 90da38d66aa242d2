"""The fresh process: plain transformers, nothing of ours, and a fault in words."""

import json
import subprocess
import sys

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rm_recipe.proof import PLAIN_SCORING
from rm_recipe.scoring import RewardModel


def ask(tmp_path, **request):
    (tmp_path / "request.json").write_text(json.dumps(request))
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
    answer = ask(
        tmp_path, folder=str(classifier), sequences=sequences, texts=["good cat"], left=True, sampled=[]
    )
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
    answer = ask(tmp_path, folder=str(classifier), sequences=[[1, 2]], texts=["cat"], left=False, sampled=[])
    assert answer["left"] is None


def test_what_goes_wrong_is_said_in_words(tmp_path):
    answer = ask(tmp_path, folder=str(tmp_path), sequences=[[1]], texts=[], left=False, sampled=[])
    assert "Error: " in answer["error"]


def test_a_reward_model_of_ours_agrees(classifier):
    """The same folder through `RewardModel`: one way to score."""
    judge = RewardModel.from_pretrained(classifier)
    assert len(judge.score([{"prompt": "hello", "response": "good"}])) == 1
