"""What is pushed is the proven export and nothing else: whole, in one commit, as it was sent; or a clear no.

huggingface_hub's real client talks to a Hub on localhost (`hub_server`), in a process of its own, as it reads
its environment at import. That process stays for all tests, but for its waits, which are noted, not waited.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import LocalHub, Repo
from made_up_export import MODEL_FILES, REFUSED, failed_gate, make_export, prove, write

from rm_recipe.errors import RecipeError
from rm_recipe.exporting import push as hub_module

REPO = "ann/judge"
UPLOADED = MODEL_FILES | {"README.md", "proof.json", "evaluation.json", "reliability.png"}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json",
                 "tokenizer_config.json", "chat_template.jinja", "README.md", "evaluation.json",
                 "reliability.png"}  # fmt: skip

PROCESS = """
import gc, json, os, sys, tempfile, time, traceback
answers, waits = os.fdopen(os.dup(1), "w"), []
time.sleep = waits.append
from rm_recipe import cli
for line in sys.stdin:
    arguments, environment = json.loads(line)
    for key, value in environment.items():
        os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    waits.clear()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.argv = ["rm-recipe", *arguments]
        try:
            code = cli.main() or 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = traceback.print_exc() or -1
        gc.collect()  # huggingface_hub closes the progress bar of a failed upload no earlier
        sys.stdout.flush(), sys.stderr.flush()
        out.seek(0), err.seek(0)
        print(json.dumps([code, out.read(), err.read(), waits]), file=answers, flush=True)
"""


@dataclass
class Result:
    """Of `rm-recipe push`: `waits` are the seconds of each wait, huggingface_hub's own among them."""

    code: int
    out: str
    err: str
    waits: list[float]

    @property
    def message(self) -> str:
        """The one of ours on stderr, where huggingface_hub writes as well."""
        (message,) = [line for line in self.err.splitlines() if line.startswith("rm-recipe: ")]
        return message


@pytest.fixture(scope="module")
def server() -> Iterator[LocalHub]:
    with LocalHub() as server:
        yield server


def environment(server: LocalHub, home: Path) -> dict[str, str]:
    """Of a process whose Hub is this one."""
    ours = {"HF_ENDPOINT": server.url, "HF_TOKEN": server.token, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HOME": str(home)}  # fmt: skip
    return {**os.environ, **ours}


@pytest.fixture(scope="module")
def process(server: LocalHub, tmp_path_factory) -> Iterator[Any]:
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(server, tmp_path_factory.mktemp("hf")),
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def hub(server: LocalHub) -> LocalHub:
    """An empty Hub."""
    server.reset()
    return server


@pytest.fixture
def push(hub: LocalHub, process: Any) -> Callable[..., Result]:
    """`rm-recipe push EXPORT --repo-id ...`, in the other process; the token must not come out of it."""

    def push(export: Path, *options: str, repo_id: str = REPO, token: str | None = hub.token) -> Result:
        arguments = ["push", str(export), "--repo-id", repo_id, *options]
        print(json.dumps([arguments, {"HF_TOKEN": token}]), file=process.stdin, flush=True)
        result = Result(*json.loads(process.stdout.readline()))
        secret = token or hub.token
        assert secret not in result.out + result.err
        assert "Traceback" not in result.err
        stored = [
            content for repo in hub.repos.values() for files in repo.commits for content in files.values()
        ]
        assert not any(secret.encode() in content for content in [*stored, *hub.objects.values()])
        return result

    return push


@pytest.fixture
def export(tmp_path) -> Path:
    return make_export(tmp_path)


def published(hub: LocalHub) -> set[str]:
    """The newest commit's files, but for what every repository starts with."""
    return hub.repos[REPO].files.keys() - {".gitattributes"}


def commits(hub: LocalHub) -> int:
    """Made since the repository was created."""
    return len(hub.repos[REPO].commits) - 1 if REPO in hub.repos else 0


# What is pushed


def test_a_push_is_one_commit_with_all_files_and_no_other(hub, push, export):
    result = push(export)
    assert (result.code, result.out) == (0, f"{hub.url}/{REPO}\n"), result.err
    assert commits(hub) == 1
    assert published(hub) == UPLOADED
    files = hub.repos[REPO].files
    assert all(files[name] == (export / name).read_bytes() for name in UPLOADED - {"README.md"})
    card = (export / "README.md").read_text()
    assert files["README.md"].decode() == card.replace(str(export), REPO)
    assert not hub.repos[REPO].private


def test_the_command_works_in_a_process_of_its_own(hub, export, tmp_path):
    arguments = ["push", str(export), "--repo-id", REPO]
    result = subprocess.run(
        [sys.executable, "-m", "rm_recipe", *arguments],
        capture_output=True, text=True, check=False, env=environment(hub, tmp_path / "hf"),
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, f"{hub.url}/{REPO}\n"), result.stderr
    assert published(hub) == UPLOADED


def test_pushing_needs_neither_torch_nor_transformers():
    program = "import sys, rm_recipe.exporting.push\n"
    program += "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_what_was_pushed_can_be_downloaded(hub, push, export, tmp_path):
    push(export, "--private")
    program = (
        "import sys; from huggingface_hub import snapshot_download, hf_hub_download as get\n"
        "snapshot_download(sys.argv[1], local_dir=sys.argv[2]); get(sys.argv[1], 'config.json')\n"
        "try: get(sys.argv[1], 'tokenizer.json', token=False)\n"
        "except Exception as error: print(type(error).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, REPO, str(tmp_path / "there")],
        capture_output=True, text=True, check=False, env=environment(hub, tmp_path / "hf"),
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "RepositoryNotFoundError\n"), result.stderr
    for name in MODEL_FILES:
        assert (tmp_path / "there" / name).read_bytes() == (export / name).read_bytes()


def test_a_second_push_makes_no_commit(hub, push, export):
    push(export)
    before = len(hub.log)
    result = push(export)
    assert (result.code, result.out) == (0, f"{hub.url}/{REPO}\n")
    assert "holds these files already" in result.err
    assert commits(hub) == 1
    assert not any("commit" in line or "PUT" in line for line in hub.log[before:])


def test_shards_are_pushed_and_an_earlier_models_files_go_in_the_same_commit(hub, push, export):
    push(export)
    old = {"pytorch_model.bin": b"1", "vocab.json": b"2", "adapter_config.json": b"3", "notes.md": b"4",
           "onnx/model.bin": b"5", "config.json": b"6"}  # fmt: skip
    hub.repos[REPO].files.update(old)
    weights = export / "model.safetensors"
    for number in (1, 2):
        (export / f"model-0000{number}-of-00002.safetensors").write_bytes(
            weights.read_bytes() + b"%d" % number
        )
    write(export / "model.safetensors.index.json", {"weight_map": {}})
    weights.unlink()
    prove(export)
    result = push(export)
    assert result.code == 0, result.err
    assert commits(hub) == 2
    shards = {path.name for path in export.glob("model*")}
    assert published(hub) == UPLOADED - {"model.safetensors"} | shards | {"notes.md", "onnx/model.bin"}
    assert hub.repos[REPO].files["config.json"] == (export / "config.json").read_bytes()
    # The other way round: the index would be loaded instead.
    for path in export.glob("model*"):
        path.unlink()
    weights.write_bytes(b"one file again")
    prove(export)
    assert push(export).code == 0
    assert published(hub) == UPLOADED | {"notes.md", "onnx/model.bin"}


def test_a_leftover_alone_is_reason_for_a_commit(hub, push, export):
    push(export)
    hub.repos[REPO].files["pytorch_model.bin"] = b"another model"
    assert push(export).code == 0
    assert commits(hub) == 2
    assert published(hub) == UPLOADED


def test_only_what_changed_is_sent_again(hub, push, export):
    push(export)
    before = len(hub.log)
    write(export / "README.md", "---\ntags: [new]\n---\nA new card.\n")
    assert push(export).code == 0
    assert commits(hub) == 2
    assert not any(line.startswith("PUT") for line in hub.log[before:])
    assert hub.repos[REPO].files["README.md"].endswith(b"A new card.\n")


def test_an_adapter_is_pushed_with_its_card_and_evaluation(hub, push, export):
    hub.repos["bob/base"] = Repo()
    result = push(export, "--adapter")
    assert result.code == 0, result.err
    assert commits(hub) == 1
    assert published(hub) == ADAPTER_FILES
    weights = (export.parent / "model" / "adapter_model.safetensors").read_bytes()
    assert hub.repos[REPO].files["adapter_model.safetensors"] == weights
    # What is left of it would make the merged model unloadable.
    assert push(export).code == 0
    assert published(hub) == UPLOADED


def test_private_is_asked_for_and_not_taken_back(hub, push, export):
    assert push(export, "--private").code == 0
    assert hub.repos[REPO].private
    write(export / "README.md", "Another card.\n")
    assert push(export).code == 0
    assert hub.repos[REPO].private
    assert commits(hub) == 2


def test_private_is_not_published_into_a_public_repository(hub, push, export):
    hub.repos[REPO] = Repo(private=False)
    result = push(export, "--private")
    assert result.code == 2
    assert "is there and public" in result.err
    assert commits(hub) == 0
    assert not any("PUT" in line or "preupload" in line for line in hub.log)


# Faults on the way

PASSING = [
    ("POST", "/commit/", 500, "the Hub answered 500"),
    ("POST", "/commit/", 502, "the Hub answered 502"),
    ("POST", "/repos/create", 503, "the Hub answered 503"),
    ("POST", "/validate-yaml", 504, "the Hub's answer was not JSON"),
    ("POST", "/paths-info/", 500, "the Hub answered 500"),
    ("GET", "/api/models/", "reset", "the connection to the Hub was lost"),
    ("POST", "/commit/", "reset", "the connection to the Hub was lost"),
    ("POST", "/commit/", "cut", "the connection to the Hub was lost"),
]


@pytest.mark.parametrize(("method", "path", "fault", "words"), PASSING, ids=lambda value: str(value))
def test_a_passing_fault_is_told_and_tried_again(hub, push, export, method, path, fault, words):
    hub.faults += [(method, path, fault)] * 2
    result = push(export)
    assert (result.code, result.out) == (0, f"{hub.url}/{REPO}\n"), result.err
    assert f"{words}" in result.err
    assert "; trying again in 2 s (2 of 5)\n" in result.err
    assert hub.faults == [] or fault == "cut"
    assert commits(hub) == 1
    assert published(hub) == UPLOADED


@pytest.mark.parametrize("fault", ["reset", "cut", "lost", 500])
@pytest.mark.parametrize(
    "request_", [("PUT", "/lfs/"), ("POST", "/preupload/"), ("POST", "/batch")], ids="".join
)
def test_a_fault_amid_the_upload_is_overcome(hub, push, export, request_, fault):
    hub.faults.append((*request_, fault))
    result = push(export)
    assert result.code == 0, result.err
    assert commits(hub) == 1
    assert published(hub) == UPLOADED


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, push, export):
    hub.faults.append(("POST", "/commit/", "lost"))
    result = push(export)
    assert (result.code, result.out) == (0, f"{hub.url}/{REPO}\n"), result.err
    assert "the connection to the Hub was lost" in result.err
    assert "holds these files already" not in result.err
    assert sum("/commit/" in line for line in hub.log) == 1
    assert commits(hub) == 1
    assert published(hub) == UPLOADED


def test_another_commit_that_came_in_between_is_taken_into_account(hub, push, export):
    hub.faults.append(("POST", "/commit/", "overtaken"))
    result = push(export)
    assert result.code == 0, result.err
    assert "the Hub answered 412; trying again" in result.err
    assert commits(hub) == 2
    assert published(hub) == UPLOADED


def test_the_hubs_own_wait_is_kept_to(hub, push, export):
    hub.faults.append(("POST", "/commit/", 429))
    result = push(export)
    assert result.code == 0, result.err
    assert "the Hub answered 429; trying again in 8 s (2 of 5)" in result.err
    assert result.waits == [8.0]


@pytest.mark.parametrize("fault", [500, "reset"])
def test_after_five_attempts_nothing_is_published_and_the_end_is_told(hub, push, export, fault):
    hub.faults += [("POST", "/commit/", fault)] * 6
    result = push(export)
    assert (result.code, result.out) == (1, "")
    assert "5 times; push again later" in result.message
    assert len(hub.faults) == 1
    assert result.waits == [2.0, 4.0, 8.0, 16.0]
    assert commits(hub) == 0
    hub.faults.clear()
    assert push(export).code == 0


def test_an_upload_that_never_succeeds_ends_too(hub, push, export):
    hub.faults += [("PUT", "/lfs/", 500)] * 100
    result = push(export)
    assert result.code == 1
    assert "rm-recipe: the Hub answered 500, 5 times" in result.message
    assert commits(hub) == 0


def test_a_hub_that_cannot_be_reached_is_named_as_such(hub, export, tmp_path):
    program = "import time; time.sleep = lambda _: None\nfrom rm_recipe.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program, "push", str(export), "--repo-id", REPO],
        capture_output=True, text=True, check=False,
        env=environment(hub, tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert result.returncode == 1
    assert "rm-recipe: the Hub could not be reached (" in result.stderr
    assert "Traceback" not in result.stderr
    assert hub.token not in result.stderr


def test_a_hub_that_does_not_answer_is_not_waited_for_without_end(hub, export, tmp_path):
    hub.faults.append(("POST", "/repos/create", "slow"))
    program = "from rm_recipe import cli\nfrom rm_recipe.exporting import push\n"
    program += "push.TIMEOUT, push.FIRST_WAIT = 0.5, 0.0; cli.main()"
    result = subprocess.run(
        [sys.executable, "-c", program, "push", str(export), "--repo-id", REPO],
        capture_output=True, text=True, check=False, env=environment(hub, tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "the Hub did not answer in time; trying again" in result.stderr
    assert commits(hub) == 1


def test_where_xets_storage_is_out_of_reach_the_way_around_it_is_named_and_works(hub, export, tmp_path):
    """As huggingface_hub uploads unless told otherwise, with fewer attempts of Xet's own than it makes."""
    brief = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "700ms"}
    program = (
        "from rm_recipe import cli\nfrom rm_recipe.exporting import push; push.SILENCE = 0.1; cli.main()"
    )
    with_xet = {**environment(hub, tmp_path), **brief}
    del with_xet["HF_HUB_DISABLE_XET"]
    command = [sys.executable, "-c", program, "push", str(export), "--repo-id", REPO]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=with_xet)
    assert (result.returncode, result.stdout) == (1, "")
    assert "still uploading, by Xet; where no progress shows, set HF_HUB_DISABLE_XET=1" in result.stderr
    assert "rm-recipe: the Hub's Xet storage could not be reached (" in result.stderr
    assert "set HF_HUB_DISABLE_XET=1 to upload without Xet; else push again later" in result.stderr
    assert "Traceback" not in result.stderr
    assert commits(hub) == 0
    without = {**with_xet, "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=without)
    assert (result.returncode, result.stdout) == (0, f"{hub.url}/{REPO}\n"), result.stderr
    assert "Xet" not in result.stderr
    assert published(hub) == UPLOADED


def test_an_interrupt_leaves_nothing_half_published(hub, export, tmp_path):
    hub.faults.append(("PUT", "/lfs/", "slow"))
    arguments = ["push", str(export), "--repo-id", REPO]
    with subprocess.Popen(
        [sys.executable, "-m", "rm_recipe", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(hub, tmp_path),
    ) as process:  # fmt: skip
        until = time.monotonic() + 60
        while hub.faults and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "rm-recipe: interrupted" in err
    assert "Traceback" not in err
    assert commits(hub) == 0


@pytest.mark.parametrize("options", [[], ["--adapter"]])
def test_a_refused_token_is_told_once(hub, push, export, options):
    result = push(export, *options, token="hf_AnotherToken")
    assert (result.code, result.out) == (1, "")
    assert result.err == f"{result.message}\n"
    assert result.message.endswith("the Hub refused the token; log in with `hf auth login` or set HF_TOKEN")
    assert hub.repos == {}


@pytest.mark.parametrize("there", [False, True])
def test_a_token_that_may_not_write_is_told_once(hub, push, export, there):
    if there:
        hub.repos["bob/judge"] = Repo()
    result = push(export, repo_id="bob/judge")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("rm-recipe: the token may not write to bob/judge (You don't have ")
    assert result.err.count("\n") == 1
    assert result.waits == []
    assert there == ("bob/judge" in hub.repos)
    assert not there or len(hub.repos["bob/judge"].commits) == 1


@pytest.mark.parametrize("status", [400, 402, 404, 413])
def test_any_other_answer_is_passed_on_in_one_sentence(hub, push, export, status):
    hub.faults.append(("POST", "/commit/", status))
    result = push(export)
    assert result.code == 1
    assert result.message == (f"rm-recipe: pushing to {REPO} failed: Error {status} for Bearer ***")
    assert commits(hub) == 0


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json"])
def test_what_arrived_otherwise_than_sent_is_named(hub, push, export, damaged):
    hub.corrupt.add(damaged)
    result = push(export)
    assert (result.code, result.out) == (1, "")
    assert f"is not what was sent: {damaged}; do not use it; push again" in result.message
    hub.corrupt.clear()
    assert push(export).code == 0
    assert hub.repos[REPO].files[damaged] == (export / damaged).read_bytes()


# What is refused before anything is sent


def refused(result: Result, hub: LocalHub, words: str) -> None:
    assert (result.code, result.out) == (2, "")
    assert words in result.err
    assert result.err.startswith("rm-recipe: ")
    assert result.err.count("\n") == 1
    assert hub.writes == []


@pytest.mark.parametrize(("spoil", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_an_export_that_is_not_in_order_is_refused_before_anything_is_sent(hub, push, export, spoil, words):
    spoil(export)
    refused(push(export), hub, words)
    assert hub.log == []


def test_an_export_whose_held_out_data_changed_since_is_refused_where_they_are_here(
    hub, push, export, tiny_data
):
    run = export.parent
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("ann/pairs", str(tiny_data)))
    record = json.loads((run / "run.json").read_text())
    write(run / "run.json", {**record, "data_fingerprints": {"train": "0" * 64, "held_out": "0" * 64}})
    for options in ([], ["--adapter"]):
        result = push(export, *options)
        assert (result.code, result.out) == (2, "")
        assert "the held-out comparisons are not those that" in result.message
        assert hub.writes == []
    (run / "recipe.yaml").write_text(recipe.replace("ann/pairs", str(tiny_data / "gone")))
    assert push(export).code == 0


def test_a_file_that_holds_the_token_is_refused(hub, push, export):
    write(export / "README.md", f"Download with {hub.token}.")
    refused(push(export), hub, "README.md holds your token")
    assert hub.log == []


def test_a_failed_gate_is_uploaded_if_allowed(hub, push, export):
    failed_gate(export)
    assert push(export, "--allow-failed-gate").code == 0
    assert published(hub) == UPLOADED


def test_what_is_no_export_is_refused(hub, push, export, tmp_path):
    refused(push(tmp_path / "gone"), hub, "gone is not a folder")
    refused(push(export.parent), hub, f"its export is {export}")


@pytest.mark.parametrize(
    "repo_id", ["name", "a/b/c", "us er/x", "", "/", "ann/", "/x", "ann/x.git", "ann/a--b"]
)
def test_an_id_that_no_repository_has_is_refused(hub, push, export, repo_id):
    refused(push(export, repo_id=repo_id), hub, f"{repo_id!r} cannot be a repository; give USER/NAME")
    with pytest.raises(RecipeError, match="give USER/NAME"):
        hub_module.check_destination(repo_id)


@pytest.mark.parametrize(
    ("token", "words"), [(None, "no token"), ("hf_a b", "has characters that no token has")]
)
def test_without_a_token_nothing_is_tried(hub, push, export, monkeypatch, token, words):
    result = push(export, token=token)
    refused(result, hub, words)
    assert "`hf auth login` or set HF_TOKEN" in result.err
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(RecipeError, match=words):
        hub_module.check_destination(REPO)


def test_a_destination_with_a_token_is_fine(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    hub_module.check_destination(REPO)


def test_offline_mode_is_told(hub, export, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "rm_recipe", "push", str(export), "--repo-id", REPO],
        capture_output=True, text=True, check=False, env=environment(hub, tmp_path) | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    refused(Result(result.returncode, result.stdout, result.stderr, []), hub, "HF_HUB_OFFLINE")


def test_an_adapter_of_a_local_model_is_refused(hub, push, export, tmp_path):
    config = export.parent / "model" / "adapter_config.json"
    for base in (str(tmp_path), str(tmp_path / "gone"), ""):
        write(config, {"base_model_name_or_path": base})
        refused(push(export, "--adapter"), hub, f"the adapter's base is the local folder {base}")
    # A relative path of another place looks like a repository, which the Hub does not have.
    write(config, {"base_model_name_or_path": "models/smollm2"})
    refused(push(export, "--adapter"), hub, "the adapter's base models/smollm2 is not on the Hub")


def test_an_export_without_its_run_has_no_adapter(hub, push, export, tmp_path):
    (export.parent / "model" / "adapter_config.json").unlink()
    refused(push(export, "--adapter"), hub, "is no RUN/export of a run with an adapter")
    refused(push(export.rename(tmp_path / "moved"), "--adapter"), hub, "push it without --adapter")
