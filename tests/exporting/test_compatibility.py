"""What is exported means the same to the programs that read it next, each with the libraries that it pins.

`make compat` makes the two environments of the slow tests: transformers 4.57; TRL 1.12, the last with PPO.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY, TINY_DECODER, TINY_GPT2, WORDS, make_recipe, make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    Phi3Config,
    PhiConfig,
)

from rm_recipe.data.comparison import Encoded, conversation
from rm_recipe.data.tokenization import render
from rm_recipe.evaluation.evaluate import evaluate
from rm_recipe.exporting.compatibility import for_transformers_4, needs_transformers_5
from rm_recipe.exporting.export import export
from rm_recipe.recipe.reader import read_recipe
from rm_recipe.scoring import RewardModel
from rm_recipe.tools.offline import save_base_model
from rm_recipe.training.train import train

SIZE = {**TINY_DECODER, "hidden_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
ENCODER = {**TINY, "hidden_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.5] * 8, "long_factor": [3.0] * 8}


def rope(kind="default", theta=5e5, **keys):
    return {"rope_type": kind, "rope_theta": theta, **keys}


def scaled(kind, **keys):
    return {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **keys}}


def two(full, sliding):
    return {"full_attention": full, "sliding_attention": sliding}


# How a model turns its positions, and how transformers 4 says it.
PHI3 = Phi3Config(**SIZE, original_max_position_embeddings=32, rope_parameters=rope("longrope", **LONG))
NEOX = GPTNeoXConfig(**ENCODER, rope_parameters=rope(partial_rotary_factor=0.5))
GEMMA3 = Gemma3TextConfig(
    **SIZE | {"num_hidden_layers": 6},
    head_dim=16,
    sliding_window=8,
    rope_parameters=two(rope("linear", factor=8.0), rope(theta=2e4)),
)
MODERNBERT = ModernBertConfig(
    **ENCODER | {"num_hidden_layers": 4},
    local_attention=16,
    cls_token_id=1,
    sep_token_id=2,
    rope_parameters=two(rope(), rope(theta=2e4)),
)
ROTATIONS = {
    "llama": (LlamaConfig(**SIZE, rope_parameters=rope()), {"rope_theta": 5e5}),
    "llama3": (LlamaConfig(**SIZE, rope_parameters=rope("llama3", **LLAMA3)), scaled("llama3", **LLAMA3)),
    "yarn": (LlamaConfig(**SIZE, rope_parameters=rope("yarn", **YARN)), scaled("yarn", **YARN)),
    "phi": (
        PhiConfig(**SIZE, rope_parameters=rope(partial_rotary_factor=0.25)),
        {"rope_theta": 5e5, "partial_rotary_factor": 0.25},
    ),
    "phi3": (PHI3, {"rope_theta": 5e5, "rope_scaling": {"type": "longrope", **LONG}}),
    "gpt_neox": (NEOX, {"rotary_emb_base": 5e5, "rotary_pct": 0.5}),
    "gemma3": (GEMMA3, scaled("linear", factor=8.0) | {"rope_local_base_freq": 2e4}),
    "modernbert": (MODERNBERT, {"global_rope_theta": 5e5, "local_rope_theta": 2e4}),
    "gpt2": (GPT2Config(**TINY_GPT2, pad_token_id=0), {}),
}


def read(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ROTATIONS)
def test_positions_are_said_in_transformers_4s_words_and_mean_the_same_in_5s(tmp_path, kind):
    config, words = ROTATIONS[kind]
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    for_transformers_4(tmp_path)
    assert {key: read(tmp_path).get(key) for key in words} == words
    after = AutoConfig.from_pretrained(tmp_path)
    kept = [dict(getattr(config, "rope_parameters", {})) for config in (before, after)]
    kept[1].pop("type", None)  # Phi 3's older name of `rope_type`, beside it
    assert kept[0] == kept[1]
    assert not needs_transformers_5(read(tmp_path))


def test_positions_that_transformers_4_has_no_words_for_are_not_said_wrongly(tmp_path):
    config = Gemma3TextConfig(
        **SIZE, head_dim=16, rope_parameters=two(rope(), rope("linear", theta=2e4, factor=2.0))
    )
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for_transformers_4(tmp_path)
    assert not {"rope_theta", "rope_local_base_freq", "rope_scaling"} & set(read(tmp_path))
    assert needs_transformers_5(read(tmp_path))
    assert needs_transformers_5({"model_type": "gemma3", "text_config": read(tmp_path)})


def test_the_text_part_of_a_multimodal_configuration_says_it_too(tmp_path):
    config = {"model_type": "llava", "text_config": ROTATIONS["llama"][0].to_dict() | {"dtype": "bfloat16"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(tmp_path)
    for_transformers_4(tmp_path)
    assert read(tmp_path)["text_config"]["rope_theta"] == 5e5
    assert read(tmp_path)["text_config"]["torch_dtype"] == "bfloat16"


def test_the_tokenizer_is_called_as_transformers_4_knows_it(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(**SIZE).save_pretrained(tmp_path)
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
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=len(tokenizer), **TINY_DECODER, rope_parameters=rope("llama3", **LLAMA3))
    )
    model.config.quantization_config = {}  # as one that was de-quantised
    save_base_model(model, tokenizer, folder / "base")
    train(read_recipe(make_recipe(folder, folder / "base", tiny_data, num_train_epochs=1)))
    evaluate(str(folder / "run"))
    export(folder / "run")
    return folder


PROMPTS = ["hello", "how are you", "the cat sat on the mat", "good dog"]


@pytest.mark.slow
def test_transformers_4_gives_the_same_ids_and_rewards(exported):
    export_folder, base = exported / "run" / "export", exported / "base"
    reward_model = RewardModel.from_pretrained(export_folder)
    pairs = [(prompt, reply) for prompt in PROMPTS for reply in ("good", "bad no")]
    texts = [
        render(reward_model.tokenizer, conversation([{"role": "user", "content": prompt}], reply))
        for prompt, reply in pairs
    ]
    answers = run_elsewhere(
        ".venv-transformers4", "read_by_transformers4.py", export_folder, base, asked=texts
    )
    for folder, kind in (
        (export_folder, AutoModelForSequenceClassification),
        (base, AutoModelForCausalLM),
    ):
        model, tokenizer = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        answer = answers[str(folder)]
        assert answer["ids"] == [tokenizer(text)["input_ids"] for text in texts]
        for ids, seen in zip(answer["ids"], answer["outputs"], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits
            expected = logits.item() if folder == export_folder else logits[0, -1].tolist()
            assert seen == pytest.approx(expected, abs=1e-4)
    rewards = reward_model.score([{"prompt": prompt, "response": reply} for prompt, reply in pairs])
    assert len({round(float(reward), 3) for reward in rewards}) == len(rewards)
    assert answers[str(export_folder)]["outputs"] == pytest.approx(rewards.tolist(), abs=1e-4)
    assert answers[str(export_folder)]["activation"] == "Identity"


@pytest.mark.slow
def test_transformers_4_turns_positions_as_5_does(tmp_path):
    expected, tokenizer = {}, make_tokenizer()
    text = "hello how are you the cat sat on the mat good dog far away"
    for kind, (config, _) in ROTATIONS.items():
        config = type(config).from_dict(config.to_dict() | {"vocab_size": len(tokenizer), "num_labels": 1})
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)  # so that positions matter
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        for_transformers_4(tmp_path / kind)
        with torch.no_grad():
            expected[kind] = model(**tokenizer(text, return_tensors="pt")).logits.item()
    answers = run_elsewhere(
        ".venv-transformers4",
        "read_by_transformers4.py",
        *(tmp_path / kind for kind in expected),
        asked=[text],
    )
    seen = {kind: answers[str(tmp_path / kind)]["outputs"][0] for kind in expected}
    assert seen == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_two_steps_of_ppo_see_the_rewards_of_score(exported, tmp_path):
    """By TRL 1.12, from tokens that the policy sampled."""
    export_folder = exported / "run" / "export"
    asked = {"words": WORDS, "prompts": [[{"role": "user", "content": prompt}] for prompt in PROMPTS] * 2}
    answer = run_elsewhere(
        ".venv-ppo", "steps_of_ppo.py", export_folder, exported / "base", tmp_path, asked=asked
    )
    assert answer["steps"] == 2
    reward_model = RewardModel.from_pretrained(export_folder)
    ids, scores = [row for row, _ in answer["seen"]], [score for _, score in answer["seen"]]
    assert len(ids) == 8
    assert reward_model.score_encoded([Encoded([], [row]) for row in ids]) == pytest.approx(scores, abs=1e-5)
    texts = []
    for row, score in zip(ids, scores, strict=True):
        prompt, reply = reward_model.tokenizer.decode(row).split("</s>\n<|assistant|>\n")
        if reply.endswith("</s>") and reply != "</s>":  # the others were cut, or say nothing
            texts.append((prompt.removeprefix("<s><|user|>\n"), reply.removesuffix("</s>"), score))
    assert len(texts) >= 3
    rewards = reward_model.score([{"prompt": prompt, "response": reply} for prompt, reply, _ in texts])
    assert rewards.tolist() == pytest.approx([score for *_, score in texts], abs=1e-5)
