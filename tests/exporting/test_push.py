"""What is pushed is the verified export alone: whole, in one commit, as it was sent; or a clear no.

huggingface_hub's real client talks to a Hub on localhost (`hub_server`); its waits are noted, not waited.
"""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import make_recipe, run_cli
from hub_server import LocalHub, Repo
from huggingface_hub import close_session, constants
from made_up_export import MODEL_FILES, REFUSED, evaluation, make_export, prove, write

from rm_recipe import RewardModel
from rm_recipe.errors import RecipeError, RmRecipeError
from rm_recipe.exporting.push import adapter_files, check_destination, export_files, is_repo_id
from rm_recipe.exporting.push import push as push_export

REPO = "ann/judge"
EXTRAS = {"README.md", "proof.json", "evaluation.json", "reliability.png"}
UPLOADED = MODEL_FILES | EXTRAS
ADAPTER_FILES = UPLOADED - {"model.safetensors", "proof.json"}
ADAPTER_FILES |= {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def server():
    with LocalHub() as server:
        yield server


@pytest.fixture
def hub(server):
    """An empty Hub."""
    server.reset()
    return server


def environment(server, home, **more):
    """Of a process whose Hub is this one."""
    ours = {"HF_ENDPOINT": server.url, "HF_TOKEN": server.token, "HF_HUB_DISABLE_XET": "1"}
    ours |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HOME": str(home), "COLUMNS": "80"}
    return {**os.environ, **ours, **more}


def run_python(*arguments, env, cwd=None):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd)


@pytest.fixture
def push(hub, monkeypatch, capfd):
    """A push to the Hub on localhost: its exit code, the URL or the error, stderr, the seconds of each wait.

    The token must not come out of it.
    """
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)  # huggingface_hub's waits, too

    def push(export, repo_id=REPO, token=hub.token, **options):
        monkeypatch.setenv("HF_TOKEN", token or "")
        waits.clear()
        capfd.readouterr()
        try:
            code, out = 0, push_export(export, repo_id, **options)
        except RmRecipeError as error:
            code, out = error.exit_code, str(error)
        result = SimpleNamespace(code=code, out=out, err=capfd.readouterr().err, waits=waits)
        stored = [*hub.objects.values()]
        stored += [text for repo in hub.repos.values() for files in repo.commits for text in files.values()]
        assert (token or hub.token).encode() not in b" ".join([*stored, out.encode(), result.err.encode()])
        return result

    yield push
    close_session()


@pytest.fixture
def export(tmp_path):
    return make_export(tmp_path)


def published(hub):
    """The newest commit's files, but for what every repository starts with."""
    return hub.repos[REPO].files.keys() - {".gitattributes"}


def commits(hub):
    """Made since the repository was created."""
    return len(hub.repos[REPO].commits) - 1 if REPO in hub.repos else 0


def was_pushed(result, hub):
    assert (result.code, result.out) == (0, f"{hub.url}/{REPO}"), result.err
    assert commits(hub) == 1
    assert published(hub) == UPLOADED


# What is pushed


def test_a_push_is_one_commit_with_all_files_and_no_other(hub, push, export):
    was_pushed(push(export), hub)
    files = hub.repos[REPO].files
    assert all(files[name] == (export / name).read_bytes() for name in UPLOADED - {"README.md"})
    card = (export / "README.md").read_text()
    assert files["README.md"].decode() == card.replace(str(export), REPO)
    assert not hub.repos[REPO].private
    before = len(hub.log)
    result = push(export)  # again
    assert (result.code, result.out) == (0, f"{hub.url}/{REPO}")
    assert "holds these files already" in result.err
    assert commits(hub) == 1
    write(export / "README.md", "---\ntags: [new]\n---\nA new card.\n")
    assert push(export).code == 0
    assert commits(hub) == 2
    assert not any(line.startswith("PUT") for line in hub.log[before:])  # but for the card nothing is sent
    assert hub.repos[REPO].files["README.md"].endswith(b"A new card.\n")


def test_pushing_needs_neither_torch_nor_transformers():
    program = "import sys, rm_recipe.exporting.push\n"
    program += "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert run_python("-c", program, env=None).stdout == "[]\n"


def test_shards_are_pushed_and_an_earlier_models_files_go_in_the_same_commit(hub, push, export):
    push(export)
    old = ("pytorch_model.bin", "vocab.json", "adapter_config.json", "notes.md", "onnx/model.bin")
    hub.repos[REPO].files.update(dict.fromkeys(old, b"of another model"))
    weights = export / "model.safetensors"
    for number in (1, 2):
        content = weights.read_bytes() + b"%d" % number
        (export / f"model-0000{number}-of-00002.safetensors").write_bytes(content)
    write(export / "model.safetensors.index.json", {"weight_map": {}})
    weights.unlink()
    prove(export)
    assert push(export).code == 0
    assert commits(hub) == 2
    shards = {path.name for path in export.glob("model*")}
    assert published(hub) == UPLOADED - {"model.safetensors"} | shards | {"notes.md", "onnx/model.bin"}
    # The other way round: the index would be loaded instead.
    for path in export.glob("model*"):
        path.unlink()
    weights.write_bytes(b"one file again")
    prove(export)
    assert push(export).code == 0
    assert published(hub) == UPLOADED | {"notes.md", "onnx/model.bin"}
    # A leftover alone is reason for a commit.
    hub.repos[REPO].files["pytorch_model.bin"] = b"another model"
    assert push(export).code == 0
    assert "pytorch_model.bin" not in published(hub)


def test_an_adapter_is_pushed_with_its_card_and_evaluation(hub, push, export):
    hub.repos["bob/base"] = Repo()
    result = push(export, adapter=True)
    assert result.code == 0, result.err
    assert (commits(hub), published(hub)) == (1, ADAPTER_FILES)
    weights = export.parent / "model" / "adapter_model.safetensors"
    assert hub.repos[REPO].files["adapter_model.safetensors"] == weights.read_bytes()
    # What is left of it would make the merged model unloadable.
    assert push(export).code == 0
    assert published(hub) == UPLOADED


def test_private_is_asked_for_and_neither_taken_back_nor_pushed_in_public(hub, push, export):
    for _ in range(2):
        assert push(export, private=True).code == 0
        assert hub.repos[REPO].private
    write(export / "README.md", "Another card.\n")
    assert push(export).code == 0
    assert hub.repos[REPO].private
    hub.repos[REPO] = Repo(private=False)
    result = push(export, private=True)
    assert result.code == 2
    assert "is there and public" in result.out
    assert commits(hub) == 0


# Faults on the way


@pytest.mark.parametrize(
    ("method", "path", "fault", "words"),
    [
        ("POST", "/commit/", 500, "the Hub answered 500"),
        ("POST", "/commit/", 429, "the Hub answered 429"),
        ("POST", "/repos/create", 503, "the Hub answered 503"),
        ("POST", "/validate-yaml", 504, "the Hub's answer was not JSON"),
        ("GET", "/api/models/", "reset", "the Hub could not be reached ("),
        ("POST", "/commit/", "cut", "the Hub could not be reached ("),
    ],
    ids=str,
)
def test_a_passing_fault_is_told_and_tried_again(hub, push, export, method, path, fault, words):
    hub.faults.append((method, path, fault))
    result = push(export)
    was_pushed(result, hub)
    assert words in result.err
    assert "; trying again in 4 s\n" in result.err
    assert hub.faults == []


@pytest.mark.parametrize("fault", ["reset", "lost", 500])
@pytest.mark.parametrize("request_", [("PUT", "/lfs/"), ("POST", "/batch")], ids="".join)
def test_a_fault_amid_the_upload_is_overcome(hub, push, export, request_, fault):
    hub.faults.append((*request_, fault))
    was_pushed(push(export), hub)


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, push, export):
    hub.faults.append(("POST", "/commit/", "lost"))
    was_pushed(push(export), hub)
    assert sum("/commit/" in line for line in hub.log) == 1


def test_another_commit_that_came_in_between_is_taken_into_account(hub, push, export):
    hub.faults.append(("POST", "/commit/", "overtaken"))
    result = push(export)
    assert result.code == 0, result.err
    assert "the Hub answered 412 (A commit has happened since); trying again" in result.err
    assert (commits(hub), published(hub)) == (2, UPLOADED)


@pytest.mark.parametrize(
    ("path", "fault"), [(("POST", "/commit/"), 500), (("POST", "/commit/"), "reset"), (("PUT", "/lfs/"), 500)]
)
def test_after_three_attempts_nothing_is_published_and_the_end_is_told(hub, push, export, path, fault):
    hub.faults += [(*path, fault)] * 100
    result = push(export)
    assert result.code == 1
    assert "3 times; push again later, which goes on from what has arrived" in result.out
    assert {4.0, 8.0} <= set(result.waits)
    assert commits(hub) == 0
    hub.faults.clear()
    was_pushed(push(export), hub)


def test_a_hub_that_cannot_be_reached_or_does_not_answer_is_not_waited_for_without_end(hub, export, tmp_path):
    program = "from rm_recipe import cli\nfrom rm_recipe.exporting import push\n"
    program += "push.TIMEOUT, push.WAIT = 0.5, 0.0; cli.main()"
    command = ["-c", program, "push", str(export), "--repo-id", REPO]
    nowhere = environment(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    result = run_python(*command, env=nowhere)
    assert result.returncode == 1
    assert "the Hub could not be reached (" in result.stderr
    assert "Traceback" not in result.stderr
    assert hub.token not in result.stderr
    hub.faults.append(("POST", "/repos/create", "slow"))
    result = run_python(*command, env=environment(hub, tmp_path))
    assert result.returncode == 0, result.stderr
    assert "trying again" in result.stderr
    assert commits(hub) == 1


def test_where_xets_storage_is_out_of_reach_the_way_around_it_is_named_and_works(hub, export, tmp_path):
    """As huggingface_hub uploads unless told otherwise, with fewer attempts of Xet's own than it makes."""
    command = ["-m", "rm_recipe", "push", str(export), "--repo-id", REPO]
    brief = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "700ms"}
    result = run_python(*command, env=environment(hub, tmp_path, HF_HUB_DISABLE_XET="0", **brief))
    assert (result.returncode, result.stdout) == (1, "")
    assert "HF_HUB_DISABLE_XET=1 uploads without the Hub's Xet storage; else push again" in result.stderr
    assert "Traceback" not in result.stderr
    assert commits(hub) == 0
    result = run_python(*command, env=environment(hub, tmp_path))
    assert (result.returncode, result.stdout) == (0, f"{hub.url}/{REPO}\n"), result.stderr
    assert published(hub) == UPLOADED


def test_an_interrupt_leaves_nothing_half_published(hub, export, tmp_path):
    hub.faults.append(("PUT", "/lfs/", "slow"))
    command = [sys.executable, "-m", "rm_recipe", "push", str(export), "--repo-id", REPO]
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **kept, env=environment(hub, tmp_path)) as process:
        until = time.monotonic() + 60
        while hub.faults and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "rm-recipe: interrupted" in err
    assert "Traceback" not in err
    assert commits(hub) == 0


def test_what_the_token_may_not_is_told_once(hub, push, export):
    for adapter in (False, True):
        result = push(export, adapter=adapter, token="hf_AnotherToken")
        assert (result.code, result.err) == (1, "")
        assert result.out.endswith("refused the token; log in with `hf auth login` or set HF_TOKEN")
    assert hub.repos == {}
    result = push(export, repo_id="bob/judge")
    assert (result.code, result.waits) == (1, [])
    assert "the token may not write to bob/judge (" in result.out
    assert hub.repos == {}


@pytest.mark.parametrize("status", [400, 404])
def test_any_other_answer_is_passed_on_in_one_sentence(hub, push, export, status):
    hub.faults.append(("POST", "/commit/", status))
    result = push(export)
    assert (result.code, commits(hub)) == (1, 0)
    said = f"pushing to {REPO} failed: the Hub answered {status} (Error {status} for Bearer ***)"
    assert result.out == said


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json"])
def test_what_arrived_otherwise_than_sent_is_named(hub, push, export, damaged):
    hub.corrupt.add(damaged)
    result = push(export)
    assert result.code == 1
    assert f"is not what was sent: {damaged}; do not use it; push again" in result.out
    hub.corrupt.clear()
    assert push(export).code == 0
    assert hub.repos[REPO].files[damaged] == (export / damaged).read_bytes()


# What is refused before anything is sent


def refused(result, hub, words):
    assert result.code == 2
    assert words in result.out
    assert result.err == ""
    assert hub.writes == []


@pytest.mark.parametrize("find", [export_files, adapter_files])
@pytest.mark.parametrize(
    ("spoil", "words"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_an_export_that_is_not_in_order_is_refused(export, find, spoil, words):
    spoil(export)
    with pytest.raises(RecipeError) as caught:
        find(export, REPO, allow_failed_gate=False)
    assert words in str(caught.value)
    assert "RUN" not in str(caught.value)  # its name is known here


def test_a_refused_export_sends_nothing_and_a_failed_gate_can_be_allowed(hub, push, export):
    write(export / "evaluation.json", evaluation(passed=False))
    refused(push(export), hub, "has not passed its gate: the interval's lower end is 0.612")
    assert hub.log == []
    was_pushed(push(export, allow_failed_gate=True), hub)


def test_only_what_was_verified_is_sent_as_it_was_then(export):
    (export / "model-00009-of-00009.safetensors").write_bytes(b"not verified")
    (export / "reliability.png").unlink()
    found = export_files(export, REPO, allow_failed_gate=False)
    files = {file.path_in_repo: file.path_or_fileobj for file in found}
    assert files.keys() == UPLOADED - {"reliability.png"}
    assert files["model.safetensors"] == str(export / "model.safetensors")
    before = (export / "config.json").read_bytes()
    write(export / "config.json", "changed meanwhile")
    assert files["config.json"] == before


def test_what_is_no_export_and_a_file_that_holds_the_token_are_refused(hub, push, export, tmp_path):
    refused(push(tmp_path / "gone"), hub, "gone is not an export")
    refused(push(export.parent), hub, f"its export is {export}")
    write(export / "README.md", f"Download with {hub.token}.")
    refused(push(export), hub, "README.md holds your token")


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "us er/x", "", "ann/", "ann/x.git"])
def test_an_id_that_no_repository_has_is_refused(hub, push, export, repo_id):
    refused(push(export, repo_id=repo_id), hub, f"{repo_id!r} cannot be a repository; give USER/NAME")
    assert not is_repo_id("/models/x")


def test_without_a_token_nothing_is_tried(hub, push, export):
    for token in ("", "hf_a b"):
        said = "no token for the Hub; log in with `hf auth login` or set HF_TOKEN"
        refused(push(export, token=token), hub, said)
        with pytest.raises(RecipeError, match="no token"):
            check_destination(REPO)


def test_offline_mode_is_told(hub, push, export, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(push(export), hub, "HF_HUB_OFFLINE")


def test_an_adapter_that_others_could_not_load_or_that_was_not_verified_is_refused(
    hub, push, export, tmp_path
):
    config = export.parent / "model" / "adapter_config.json"
    for base in (str(tmp_path), str(tmp_path / "gone"), ""):
        write(config, {"base_model_name_or_path": base})
        refused(push(export, adapter=True), hub, f"the adapter's base is the local folder {base}")
    write(config, {"base_model_name_or_path": "models/smollm2"})  # seen from another folder
    refused(push(export, adapter=True), hub, "the adapter's base models/smollm2 is not on the Hub")
    write(config, {"base_model_name_or_path": "bob/base"})
    weights = config.with_name("adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")  # trained on since
    refused(push(export, adapter=True), hub, "is not the adapter that")
    config.unlink()
    refused(push(export, adapter=True), hub, "is no RUN/export of a run with an adapter")
    refused(push(export.rename(tmp_path / "moved"), adapter=True), hub, "push it without --adapter")


# A recipe with `push_to_hub: true`, all the way

LOADED = """
import json, sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
name, messages = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForSequenceClassification.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
text = tokenizer.apply_chat_template(messages, tokenize=False)
plain = model.eval()(**tokenizer(text, return_tensors="pt")).logits.item()
reward_model = pipeline("text-classification", model=name, device="cpu")
from rm_recipe import RewardModel
item = {"prompt": messages[:-1], "response": messages[-1]["content"]}
again = RewardModel.from_pretrained(name).score([item])[0]
print(json.dumps([plain, reward_model(text)[0]["score"], float(again)]))
"""


def test_a_run_ends_with_its_export_on_the_hub_from_where_it_gives_the_same_rewards(
    server, tmp_path, tiny_llama, tiny_data
):
    keys = {"push_to_hub": True, "hub_model_id": "ann/tiny", "hub_private_repo": True}
    keys |= {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 4}
    recipe = make_recipe(tmp_path, tiny_llama, tiny_data, **keys)
    hub, export, env = server, tmp_path / "run" / "export", environment(server, tmp_path / "home")
    hub.reset()
    result = run_python("-m", "rm_recipe", "run", recipe, env=env)
    assert result.returncode == 0, result.stderr
    assert f"[push] ann/tiny\n{hub.url}/ann/tiny" in result.stdout
    repo = hub.repos["ann/tiny"]
    assert repo.private
    local = {path.name: path.read_bytes() for path in export.iterdir()}
    assert repo.files.keys() - {".gitattributes"} == local.keys()
    assert all(repo.files[name] == local[name] for name in local if name != "README.md")
    # Trainer itself uploaded nothing, and the token is nowhere.
    assert sum("/ann/tiny/commit/" in line and line.startswith("POST") for line in hub.log) == 1
    assert hub.token not in result.stdout + result.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("checkpoint-" in str(path) for path in files)
    assert not [path for path in files if path.name == "training_args.bin"]  # it pickles the token
    assert not [path for path in files if hub.token.encode() in path.read_bytes()]
    # By its name it gives the same rewards.
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good good"}]
    result = run_python("-c", LOADED, "ann/tiny", json.dumps(messages), env=env)
    assert result.returncode == 0, result.stderr
    expected = float(
        RewardModel.from_pretrained(export).score([{"prompt": "hello", "response": "good good"}])[0]
    )
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx([expected] * 3, abs=1e-5)
    # A second run sends nothing again.
    result = run_python("-m", "rm_recipe", "run", recipe, env=env)
    assert "holds these files already" in result.stderr
    assert len(repo.commits) == 2  # its first is what a repository starts with


@pytest.mark.parametrize(
    ("repo_id", "said"),
    [("just-a-name", "give USER/NAME"), (None, "'push_to_hub' needs 'hub_model_id'")],
)
def test_what_a_push_will_lack_is_said_before_training(write_recipe, tmp_path, repo_id, said):
    result = run_cli("run", str(write_recipe(push_to_hub=True, hub_model_id=repo_id)))
    assert result.returncode == 2
    assert said in result.stderr
    assert not (tmp_path / "run").exists()
