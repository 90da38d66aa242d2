"""What is exported means the same to the programs that read it next, each with the libraries that it pins.

`make compat` makes the two environments of the slow tests: transformers 4.57; TRL 1.12, the last with PPO.
"""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY_DECODER, TINY_GPT2, base_of, make_recipe, make_tokenizer, save_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rm_recipe.data.comparison import Encoded, conversation
from rm_recipe.data.tokenization import render
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.compatibility import for_transformers_4, needs_transformers_5
from rm_recipe.exporting.export import export
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.scoring import RewardModel
from rm_recipe.training.train import train

SIZE = {**TINY_DECODER, "hidden_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


def rope(kind="default", **keys):
    return {"rope_type": kind, "rope_theta": 5e5, **keys}


def scaled(kind, **keys):
    return {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **keys}}


# How a model turns its positions, and how transformers 4 says it.
TWO_KINDS = {"full_attention": rope(), "sliding_attention": rope("linear", factor=2.0)}
ROTATIONS = {
    "llama": (rope(), {"rope_theta": 5e5}),
    "llama llama3": (rope("llama3", **LLAMA3), scaled("llama3", **LLAMA3)),
    "llama yarn": (rope("yarn", **YARN), scaled("yarn", **YARN)),
    "phi": (rope(partial_rotary_factor=0.25), {"rope_theta": 5e5, "partial_rotary_factor": 0.25}),
    "gpt2": (None, {}),
    "gemma3_text": (TWO_KINDS, {}),
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_positions_are_said_in_transformers_4s_words_or_not_at_all_and_mean_the_same_in_5s(tmp_path, kind):
    turned, words = ROTATIONS[kind]
    sizes = {**SIZE, "rope_parameters": turned} if turned else TINY_GPT2
    AutoConfig.for_model(kind.split()[0], **sizes, head_dim=16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    for_transformers_4(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    turning = ("rope_theta", "partial_rotary_factor", "rope_scaling")
    assert {key: said[key] for key in turning if key in said} == words
    after = AutoConfig.from_pretrained(tmp_path)
    assert getattr(after, "rope_parameters", None) == getattr(before, "rope_parameters", None)
    needs = needs_transformers_5(said), needs_transformers_5({"text_config": said})
    assert needs == (turned is TWO_KINDS,) * 2


def test_the_tokenizer_is_called_as_transformers_4_knows_it(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model("llama", **SIZE).save_pretrained(tmp_path)
    for_transformers_4(tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["additional_special_tokens"] == ["<x>"]
    assert "extra_special_tokens" not in said
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again("hello <x>")["input_ids"] == tokenizer("hello <x>")["input_ids"]


# --- other programs' environments --------------------------------------------------------------


def run_elsewhere(environment, script, *arguments, asked):
    python = REPOSITORY / environment / "bin" / "python"
    if not python.is_file():
        pytest.skip("run `make compat`")
    command = [str(python), str(Path(__file__).parent / script), *map(str, arguments)]
    result = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_data):
    """The base and the export of a run with rotations that are not the default, as Llama 3's."""
    folder = tmp_path_factory.mktemp("compatible")
    base = base_of(AutoModelForCausalLM, "llama", TINY_DECODER, rope_parameters=rope("llama3", **LLAMA3))
    save_base(folder / "base", base, make_tokenizer())
    train(read_recipe(make_recipe(folder, folder / "base", tiny_data, num_train_epochs=1)))
    evaluate(str(folder / "run"))
    export(folder / "run")
    return folder


PROMPTS = ["hello", "how are you", "the cat sat on the mat", "good dog"]


@pytest.mark.slow
def test_transformers_4_gives_the_same_ids_and_rewards(exported):
    folder = exported / "run" / "export"
    reward_model, tokenizer = RewardModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pairs = [(prompt, reply) for prompt in PROMPTS for reply in ("good", "bad no")]
    texts = [
        render(reward_model.tokenizer, conversation([{"role": "user", "content": prompt}], reply))
        for prompt, reply in pairs
    ]
    answer = run_elsewhere(".venv-transformers4", "read_by_transformers4.py", folder, asked=texts)
    assert answer["ids"] == tokenizer(texts)["input_ids"]
    rewards = reward_model.score([{"prompt": prompt, "response": reply} for prompt, reply in pairs])
    assert len({round(float(reward), 3) for reward in rewards}) == len(rewards)
    assert answer["rewards"] == pytest.approx(rewards.tolist(), abs=1e-4)
    assert answer["activation"] == "Identity"


@pytest.mark.slow
def test_two_steps_of_ppo_see_the_rewards_of_score(exported, tmp_path):
    """By TRL 1.12, from tokens that the policy sampled."""
    folder = exported / "run" / "export"
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS] * 2
    answer = run_elsewhere(".venv-ppo", "steps_of_ppo.py", folder, exported / "base", tmp_path, asked=asked)
    assert answer["steps"] == 2
    encoded, seen = [Encoded([], [ids]) for ids in answer["ids"]], answer["rewards"]
    assert len(seen) == 8
    rewards = RewardModel.from_pretrained(folder).score_encoded(encoded)
    assert [reward.item() for reward in rewards] == pytest.approx(seen, abs=1e-5)
