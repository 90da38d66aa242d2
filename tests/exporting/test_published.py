"""A recipe with `push_to_hub: true`, all the way: trained, proven, uploaded, and loaded back by its name."""

import json
import os
import subprocess
import sys

import pytest
from conftest import run_cli
from hub_server import LocalHub

from rm_recipe import RewardModel

LOADED = """
import json, sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
name = sys.argv[1]
model = AutoModelForSequenceClassification.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
text = tokenizer.apply_chat_template(json.loads(sys.argv[2]), tokenize=False)
plain = model.eval()(**tokenizer(text, return_tensors="pt")).logits.item()
judge = pipeline("text-classification", model=name, device="cpu")
from rm_recipe import RewardModel
messages = json.loads(sys.argv[2])
item = {"prompt": messages[:-1], "response": messages[-1]["content"]}
print(json.dumps([plain, judge(text)[0]["score"], float(RewardModel.from_pretrained(name).score([item])[0])]))
"""


def in_environment(hub, home):
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "COLUMNS": "80"}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny_llama, tiny_data):
    """The Hub after `rm-recipe run`, the folder, what was printed, and the environment."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "tiny.yaml").write_text(
        f"model_name_or_path: {tiny_llama}\ndataset_name: {tiny_data}\nuse_peft: true\nlora_r: 4\n"
        "max_length: 128\nnum_train_epochs: 2\nlearning_rate: 1e-2\ngradient_checkpointing: false\n"
        "use_cpu: true\nsave_steps: 8\ndisable_tqdm: true\n"
        "push_to_hub: true\nhub_model_id: ann/tiny\nhub_private_repo: true\n"
    )
    with LocalHub() as hub:
        environment = in_environment(hub, tmp_path_factory.mktemp("home"))
        result = subprocess.run(
            [sys.executable, "-m", "rm_recipe", "run", "tiny.yaml"],
            capture_output=True, text=True, check=False, cwd=folder, env=environment,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        yield hub, folder, result, environment


def test_the_run_ends_with_its_export_on_the_hub(published):
    hub, folder, result, _ = published
    repo = hub.repos["ann/tiny"]
    assert repo.private
    assert f"[push] ann/tiny\n{hub.url}/ann/tiny" in result.stdout
    export = folder / "outputs" / "tiny" / "export"
    local = {path.name for path in export.iterdir()}
    assert repo.files.keys() - {".gitattributes"} == local
    assert all(repo.files[name] == (export / name).read_bytes() for name in local - {"README.md"})


def test_by_its_name_it_gives_the_same_rewards(published):
    _, folder, _, environment = published
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good good"}]
    result = subprocess.run(
        [sys.executable, "-c", LOADED, "ann/tiny", json.dumps(messages)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    judge = RewardModel.from_pretrained(folder / "outputs" / "tiny" / "export")
    expected = float(judge.score([{"prompt": "hello", "response": "good good"}])[0])
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx([expected] * 3, abs=1e-5)


def test_trainer_uploaded_nothing_and_the_token_is_nowhere(published):
    hub, folder, result, _ = published
    assert sum("/commit/" in line and line.startswith("POST") for line in hub.log) == 1
    assert len(hub.repos) == 1
    token = hub.token.encode()
    assert token not in (result.stdout + result.stderr).encode()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any("checkpoint-" in str(path) for path in files)
    assert not [path for path in files if path.name == "training_args.bin"]  # it pickles the token
    assert not [path for path in files if token in path.read_bytes()]


def test_a_second_run_sends_nothing_again(published):
    hub, folder, _, environment = published
    before = len(hub.repos["ann/tiny"].commits)
    result = subprocess.run(
        [sys.executable, "-m", "rm_recipe", "run", "tiny.yaml"],
        capture_output=True, text=True, check=False, cwd=folder, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "holds these files already" in result.stderr
    assert len(hub.repos["ann/tiny"].commits) == before


@pytest.mark.parametrize(
    ("keys", "token", "said"),
    [
        (["--hub_model_id", "just-a-name"], "hf_x", "give USER/NAME"),
        ([], "", "there is no token for the Hub"),
        (["--hub_model_id", "null"], "hf_x", "'push_to_hub: true' needs a 'hub_model_id: USER/NAME'"),
    ],
)
def test_what_a_push_will_lack_is_said_before_training(published, tmp_path, monkeypatch, keys, token, said):
    _, folder, _, _ = published
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    result = run_cli("run", "tiny.yaml", "--output_dir", str(tmp_path / "run"), *keys, cwd=folder)
    assert result.returncode == 2
    assert said in result.stderr
    assert not (tmp_path / "run").exists()
