"""What is pushed is the verified export alone: whole, in one commit, as it was sent; or a clear no.

huggingface_hub's real client talks to a Hub in memory (`made_up_hub`); its waits are noted, not waited.
"""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from conftest import make_recipe
from huggingface_hub import constants
from made_up_export import MODEL_FILES, evaluation, make_export, prove, write
from made_up_hub import URL, MadeUpHub, Repo

from rm_recipe.errors import RecipeError, RmRecipeError
from rm_recipe.exporting.push import TIMEOUT
from rm_recipe.exporting.push import push as push_export
from rm_recipe.tools.pipeline import run as run_recipe

REPO = "ann/judge"
UPLOADED = MODEL_FILES | {"README.md", "proof.json", "evaluation.json", "reliability.png"}
DROPPED = httpx2.ReadError("[Errno 104] Connection reset by peer")


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub, which this process's huggingface_hub talks to."""
    hub = MadeUpHub()
    huggingface_hub.set_client_factory(hub.client)
    offline = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": "/nowhere"}
    for name, value in {"ENDPOINT": URL, **offline}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    yield hub
    huggingface_hub.set_client_factory(lambda: httpx2.Client(timeout=None))


@pytest.fixture
def push(hub, monkeypatch, capfd):
    """A push: its exit code, the URL or the error, stderr, the seconds of each wait.

    The token must not come out of it.
    """
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)  # huggingface_hub's waits, too

    def push(export, repo_id=REPO, token=hub.token, **options):
        monkeypatch.setenv("HF_TOKEN", token)
        waits.clear()
        capfd.readouterr()
        try:
            code, out = 0, push_export(export, repo_id, **options)
        except RmRecipeError as error:
            code, out = error.exit_code, str(error)
        result = SimpleNamespace(code=code, out=out, err=capfd.readouterr().err, waits=waits)
        stored = [*hub.objects.values()]
        stored += [text for repo in hub.repos.values() for files in repo.commits for text in files.values()]
        assert hub.token.encode() not in b" ".join([*stored, out.encode(), result.err.encode()])
        return result

    return push


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
    assert (result.code, result.out) == (0, f"{URL}/{REPO}"), result.err
    assert commits(hub) == 1
    assert published(hub) == UPLOADED
    assert hub.faults == []


def failed(result, hub, code, words):
    """Nothing is published."""
    assert (result.code, commits(hub)) == (code, 0)
    assert words in result.out


# What is pushed


def test_a_push_is_one_commit_with_all_files_and_no_other(hub, push, export):
    was_pushed(push(export), hub)
    files = hub.repos[REPO].files
    assert all(files[name] == (export / name).read_bytes() for name in UPLOADED - {"README.md"})
    card = (export / "README.md").read_text()
    assert files["README.md"].decode() == card.replace(str(export), REPO)
    assert not hub.repos[REPO].private
    before = len(hub.log)
    assert "holds these files already" in push(export).err
    assert commits(hub) == 1
    write(export / "README.md", "---\ntags: [new]\n---\nA new card.\n")
    assert push(export).code == 0
    assert commits(hub) == 2
    assert not any(line.startswith("PUT") for line in hub.log[before:])  # but for the card nothing is sent
    assert hub.repos[REPO].files["README.md"].endswith(b"A new card.\n")


def test_pushing_needs_neither_torch_nor_transformers():
    program = "import sys, rm_recipe.exporting.push\n"
    program += "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_shards_are_pushed_and_an_earlier_models_files_go_in_the_same_commit(hub, push, export):
    push(export)
    old = ["pytorch_model.bin", "vocab.json", "adapter_config.json", "notes.md", "onnx/model.bin"]
    old += ["additional_chat_templates/tool_use.jinja"]  # in a folder, and loaded all the same
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
    (export / "model-00009-of-00009.safetensors").write_bytes(b"not verified")
    assert push(export).code == 0
    assert published(hub) == UPLOADED | {"notes.md", "onnx/model.bin"}


def test_private_is_asked_for_and_neither_taken_back_nor_pushed_in_public(hub, push, export):
    for options in ({"private": True}, {"private": True}, {}):
        assert push(export, **options).code == 0
        assert hub.repos[REPO].private
    hub.repos[REPO] = Repo(private=False)
    failed(push(export, private=True), hub, 2, f"{REPO} is public")


# Faults on the way


@pytest.mark.parametrize(
    ("method", "path", "fault", "words"),
    [
        ("POST", "/commit/", 500, "the Hub answered 500"),
        ("POST", "/commit/", 429, "the Hub answered 429"),
        ("POST", "/repos/create", 503, "the Hub answered 503"),
        ("POST", "/validate-yaml", 504, "the Hub could not be reached ("),
        ("GET", "/api/models/", DROPPED, "the Hub could not be reached ([Errno 104]"),
        ("POST", "/repos/create", httpx2.ReadTimeout(""), "the Hub could not be reached (ReadTimeout"),
        ("POST", "/commit/", "lost", "the Hub could not be reached ("),  # and the commit not made twice
    ],
    ids=str,
)
def test_a_passing_fault_is_told_and_tried_again(hub, push, export, method, path, fault, words):
    hub.faults.append((method, path, fault))
    result = push(export)
    was_pushed(result, hub)
    assert words in result.err
    assert "; trying again in 4 s\n" in result.err


@pytest.mark.parametrize("fault", [DROPPED, "lost", 500], ids=str)
def test_a_fault_amid_the_upload_is_overcome(hub, push, export, fault):
    hub.faults += [("PUT", "/lfs/", fault), ("POST", "/batch", fault)]
    was_pushed(push(export), hub)


def test_another_commit_that_came_in_between_is_taken_into_account(hub, push, export):
    hub.faults.append(("POST", "/commit/", hub.overtake))
    result = push(export)
    assert result.code == 0, result.err
    assert "the Hub answered 412 (A commit has happened since); trying again" in result.err
    assert (commits(hub), published(hub)) == (2, UPLOADED)


def test_weights_that_change_between_two_attempts_are_not_sent(hub, push, export):
    weights = export / "model.safetensors"
    hub.faults.append(("POST", "/batch", lambda: weights.write_bytes(weights.read_bytes()[:-1] + b"!")))
    hub.faults.append(("POST", "/commit/", 500))
    failed(push(export), hub, 2, "model.safetensors changed since it was verified")


@pytest.mark.parametrize("fault", [("POST", "/commit/", 500), ("PUT", "/lfs/", 500), ("POST", "", DROPPED)])
def test_after_three_attempts_nothing_is_published_and_the_end_is_told(hub, push, export, fault):
    hub.faults += [fault] * 100
    result = push(export)
    failed(result, hub, 1, "; push again later, which goes on from what has arrived")
    assert {4.0, 8.0} <= set(result.waits)
    assert hub.timeouts <= {TIMEOUT, 3}  # nor is an answer waited for without end
    hub.faults.clear()
    was_pushed(push(export), hub)


def test_where_xets_storage_is_out_of_reach_the_way_around_it_is_named(hub, push, export, monkeypatch):
    """As huggingface_hub uploads unless told otherwise, with fewer attempts of Xet's own than it makes."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "700ms")
    failed(push(export), hub, 1, "HF_HUB_DISABLE_XET=1 uploads without the Hub's Xet storage; else push")


def test_an_interrupt_leaves_nothing_half_published(hub, push, export, as_in_a_terminal):
    hub.faults.append(("PUT", "/lfs/", lambda: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        push(export)
    assert commits(hub) == 0


def test_what_the_token_may_not_is_told_once(hub, push, export):
    for options, said in (
        ({"token": "hf_AnotherToken"}, "401 (Invalid credentials in Authorization header); log in with `hf"),
        ({"repo_id": "bob/judge"}, "403 (You don't have the rights to create bob/judge); log in with `hf"),
    ):
        result = push(export, **options)
        assert (result.code, result.err, result.waits) == (1, "", [])
        assert f"the Hub answered {said}" in result.out
    assert not hub.repos


def test_any_other_answer_is_passed_on_in_one_sentence(hub, push, export):
    hub.faults.append(("POST", "/commit/", 400))
    failed(push(export), hub, 1, f"pushing to {REPO} failed: the Hub answered 400 (Error 400 for Bearer ***)")


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
    failed(result, hub, 2, words)
    assert (result.err, hub.writes) == ("", [])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("proof.json", None, "has no proof.json that says it passed; export anew with `rm-recipe export"),
        ("proof.json", '{"passed": false}', "has no proof.json that says it passed"),
        ("proof.json", "{", "proof.json is not JSON that can be read"),
        ("model.safetensors", "!", "model.safetensors changed since it was verified"),
        ("model.safetensors", None, "has no model.safetensors any more"),
        ("tokenizer.json", "{}", "tokenizer.json changed since it was verified"),
        ("evaluation.json", None, "was exported without an evaluation"),
        ("evaluation.json", '{"datasets": {"reward-bench": {}}, "gate": null}', "without an evaluation"),
        ("README.md", None, "has no README.md any more"),
        ("config.json", '{"num_labels": 1}', "is not an export of `rm-recipe export`; give RUN/export"),
    ],
)
def test_an_export_that_is_not_in_order_is_refused(hub, push, export, file, content, words):
    (export / file).unlink()
    if content:
        write(export / file, content)
    refused(push(export, allow_failed_gate=True), hub, words)


def test_a_refused_export_sends_nothing_and_a_failed_gate_can_be_allowed(hub, push, export, tmp_path):
    for folder in (tmp_path / "gone", export.parent):
        refused(push(folder), hub, "is not an export")
    write(export / "evaluation.json", evaluation() | {"gate": None})
    refused(push(export), hub, "has not passed its gate: it has none")
    write(export / "evaluation.json", evaluation(passed=False))
    refused(push(export), hub, "has not passed its gate: the interval's lower end is 0.612")
    assert hub.log == []
    was_pushed(push(export, allow_failed_gate=True), hub)


def test_a_file_that_holds_the_token_is_refused(hub, push, export):
    write(export / "README.md", f"Download with {hub.token}.")
    refused(push(export), hub, "README.md holds your token")


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "us er/x", "", "ann/", "ann/x.git"])
def test_an_id_that_no_repository_has_is_refused(hub, push, export, repo_id):
    refused(push(export, repo_id=repo_id), hub, f"{repo_id!r} cannot be a repository; give USER/NAME")


def test_without_a_token_or_offline_nothing_is_tried(hub, push, export, monkeypatch):
    refused(push(export, token=""), hub, "no token for the Hub; log in with `hf auth login` or set HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(push(export), hub, "HF_HUB_OFFLINE")


# A recipe with `push_to_hub: true`, all the way


def test_a_run_ends_with_its_export_on_the_hub(hub, tmp_path, tiny_llama, tiny_data, monkeypatch, capfd):
    keys = {"push_to_hub": True, "hub_model_id": "ann/tiny", "hub_private_repo": True}
    keys |= {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 4}
    recipe = make_recipe(tmp_path, tiny_llama, tiny_data, **keys)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # of training, which must not upload anything:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    run_recipe(recipe, [])
    printed = capfd.readouterr()
    assert f"[push] ann/tiny\n{URL}/ann/tiny" in printed.out
    repo = hub.repos["ann/tiny"]
    assert repo.private
    local = {path.name: path.read_bytes() for path in (tmp_path / "run" / "export").iterdir()}
    assert repo.files.keys() - {".gitattributes"} == local.keys()
    assert all(repo.files[name] == local[name] for name in local if name != "README.md")
    # The token is nowhere.
    assert hub.token not in printed.out + printed.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("checkpoint-" in str(path) for path in files)
    assert not [path for path in files if path.name == "training_args.bin"]  # it pickles the token
    assert not [path for path in files if hub.token.encode() in path.read_bytes()]
    # A second run sends nothing again.
    run_recipe(recipe, [])
    assert "holds these files already" in capfd.readouterr().err
    assert len(repo.commits) == 2  # its first is what a repository starts with


def test_an_id_that_no_repository_has_is_refused_before_training(hub, write_recipe, tmp_path):
    with pytest.raises(RecipeError, match="give USER/NAME"):
        run_recipe(write_recipe(push_to_hub=True, hub_model_id="just-a-name"), [])
    assert not (tmp_path / "run").exists()
