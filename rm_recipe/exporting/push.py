"""`rm-recipe push EXPORT --repo-id USER/NAME`: upload a verified export to the Hugging Face Hub.

Only files that `proof.json` names are uploaded, with the card and the evaluation. All go in one commit, which
is whole or not there, and their hashes are compared afterwards; so every step can be repeated after a fault.
"""

import json
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # not marked as exported
from huggingface_hub.utils.sha import git_hash

from rm_recipe import __version__
from rm_recipe.errors import PushError, RecipeError, RmRecipeError, one_line
from rm_recipe.evaluation.findings import HELD_OUT, gate_words
from rm_recipe.exporting.card import CARD, FIGURE, adapter_card, for_repository
from rm_recipe.files import read_json
from rm_recipe.recipe.reader import is_run_folder

PROOF, EVALUATION = "proof.json", "evaluation.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# What `AutoTokenizer` reads beside a model, by whichever tokenizer.
TOKENIZER = ["*token*.json", "*.model", "chat_template.jinja", "vocab.*", "merges.txt"]
# What would be loaded along with, or instead of, the model that is uploaded.
STALE = ["*.safetensors", "*.bin", "*.pt", "*.index.json", ADAPTER[0], PROOF, FIGURE, *TOKENIZER]

ATTEMPTS = 3  # of the whole; huggingface_hub itself sends each part of an upload up to six times
WAIT = 4.0  # seconds, doubled after each attempt
TIMEOUT = 120.0  # seconds without an answer; huggingface_hub by itself would wait for ever
PASSING_STATUS = (408, 412, 429)  # and from 500 on; 412: another commit came in between


def push(
    export: Path,
    repo_id: str,
    *,
    private: bool = False,
    adapter: bool = False,
    allow_failed_gate: bool = False,
) -> str:
    """Upload a verified export in one commit; return the repository's URL.

    What is there already is not sent again. Weights and tokenizer files of an earlier model are deleted in
    the same commit.

    Args:
        private: create a private repository, and refuse one that is public.
        adapter: upload the adapter in `export`'s run instead of the merged model.
        allow_failed_gate: upload a model that missed its recipe's target.

    Raises:
        RecipeError: the id, the token or the export is not fit for it; nothing was sent.
        PushError: the Hub refused it, could not be reached, or holds something else than what was sent.
    """
    check_destination(repo_id)
    token = str(huggingface_hub.get_token())
    find_files = adapter_files if adapter else export_files
    files = find_files(export, repo_id, allow_failed_gate=allow_failed_gate)
    for file in files:
        if isinstance(file.path_or_fileobj, bytes) and token.encode() in file.path_or_fileobj:
            raise RecipeError(f"{file.path_in_repo} holds your token for the Hub; remove it and export anew")
    base = adapter_base(export) if adapter else None
    api = HfApi(token=token, library_name="rm_recipe", library_version=__version__)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _publish(api, repo_id, files, private, base)
            break
        except RmRecipeError:
            raise
        except Exception as error:
            # An upload's errors are wrapped in a RuntimeError.
            cause = (error.__cause__ if type(error) is RuntimeError else None) or error
            if attempt == ATTEMPTS or not _may_pass(cause):
                raise _refusal(cause, repo_id, token) from None
            seconds = WAIT * 2 ** (attempt - 1)
            _say(f"{_words(cause)}; trying again in {seconds:g} s".replace(token, "***"))
        time.sleep(seconds)  # here, so that an interrupt of the wait carries no error of a library along
    return f"{api.endpoint}/{repo_id}"


def check_destination(repo_id: str) -> None:
    """Find out before hours of training whether a push to this repository can be tried.

    Raises:
        RecipeError: the id is not of the form USER/NAME, or there is no token.
    """
    if repo_id.count("/") != 1 or not is_repo_id(repo_id):
        raise RecipeError(
            f"{repo_id!r} cannot be a repository; give USER/NAME, of letters, digits, '-', '_' and '.'"
        )
    token = ""
    with suppress(Exception):  # an expired login that could not be renewed
        token = huggingface_hub.get_token() or ""
    if not token.isascii() or not token.isprintable() or not token or " " in token:
        raise RecipeError("there is no token for the Hub; log in with `hf auth login` or set HF_TOKEN")


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


# --- the files to upload, which a verification vouches for ---------------------------------------


def export_files(export: Path, repo_id: str, *, allow_failed_gate: bool) -> list[CommitOperationAdd]:
    """The files of an export, as they go into the repository.

    Raises:
        RecipeError: `export` is no export, not verified, changed since, not evaluated, or failed its gate.
    """
    files = _verified(export, allow_failed_gate)
    more = [name for name in (PROOF, EVALUATION, FIGURE) if (export / name).is_file()]
    card = for_repository((export / CARD).read_text(encoding="utf-8"), repo_id)
    return [*files, *_read(export, more), CommitOperationAdd(CARD, card.encode())]


def adapter_files(export: Path, repo_id: str, *, allow_failed_gate: bool) -> list[CommitOperationAdd]:
    """The files of the adapter that an export was merged from, as they go into the repository.

    Raises:
        RecipeError: what holds for `export_files`; or there is no adapter, or one of a local model.
    """
    _verified(export, allow_failed_gate)
    run = export.resolve().parent
    model = run / "model"
    if not is_run_folder(run) or not all((model / name).is_file() for name in ADAPTER):
        raise RecipeError(f"{export} is no RUN/export of a run with an adapter; push it without --adapter")
    more = {path.name for pattern in ("config.json", *TOKENIZER) for path in model.glob(pattern)}
    files = _read(model, [*ADAPTER, *sorted(more - set(ADAPTER))])
    if read_json(export / PROOF)["trained"].get(ADAPTER[1]) != _sha256(files[1]):
        raise RecipeError(
            f"{model} is not the adapter that {export} was verified against; {_export_anew(export)}"
        )
    base = adapter_base(export)
    if Path(base).is_dir() or not is_repo_id(base):
        raise RecipeError(
            f"the adapter's base is the local folder {base}, so nobody else could load it; push the merged "
            "model, without --adapter"
        )
    card = adapter_card(export, run, repo_id)
    shown = [FIGURE] if FIGURE in card and (export / FIGURE).is_file() else []
    return [*files, *_read(export, [EVALUATION, *shown]), CommitOperationAdd(CARD, card.encode())]


def adapter_base(export: Path) -> str:
    """What the adapter of an export's run was trained on: a repository or a folder."""
    return read_json(export.resolve().parent / "model" / ADAPTER[0])["base_model_name_or_path"] or ""


def _verified(export: Path, allow_failed_gate: bool) -> list[CommitOperationAdd]:
    """The files that the export's `proof.json` names, each as it was when it was verified."""
    config = export / "config.json"
    if not config.is_file() or "rm_recipe" not in read_json(config):
        hint = f"; its export is {export / 'export'}" if (export / "export").is_dir() else ""
        raise RecipeError(f"{export} is not an export of `rm-recipe export`{hint}")
    proof = read_json(export / PROOF) if (export / PROOF).is_file() else {}
    if proof.get("passed") is not True:
        raise RecipeError(f"{export} has no {PROOF} that says it passed; {_export_anew(export)}")
    hashes = proof.get("files") or {"model.safetensors": ""}
    gone = [name for name in (*hashes, CARD) if not (export / name).is_file()]
    files = [] if gone else _read(export, hashes)
    changed = [file.path_in_repo for file in files if _sha256(file) != hashes[file.path_in_repo]]
    if gone or changed:
        names = ", ".join(str(export / name) for name in [*gone, *changed])
        raise RecipeError(f"{names} changed or is gone since it was verified; {_export_anew(export)}")
    found = read_json(export / EVALUATION) if (export / EVALUATION).is_file() else {}
    if HELD_OUT not in found.get("datasets", {}):
        raise RecipeError(
            f"{export} was exported without an evaluation on held-out comparisons; run `rm-recipe evaluate "
            f"{_run(export)}`, then `rm-recipe export {_run(export)} --overwrite`"
        )
    gate = gate_words(found.get("gate"))
    if not allow_failed_gate and not (gate and gate["passed"]):
        why = gate["why"] if gate else "it has none"
        raise RecipeError(f"{export} has not passed its gate: {why}; --allow-failed-gate uploads it as it is")
    return files


def _read(folder: Path, names: Iterable[str]) -> list[CommitOperationAdd]:
    """Weights stay on the disk; the rest is sent as it is now, when it is checked."""
    paths = {name: folder / name for name in names}
    return [
        CommitOperationAdd(name, path if path.suffix == ".safetensors" else path.read_bytes())
        for name, path in paths.items()
    ]


def _sha256(file: CommitOperationAdd) -> str:
    return file.upload_info.sha256.hex()


def _run(export: Path) -> str:
    """The export's run, as a command would name it."""
    return str(export.parent) if is_run_folder(export.parent) else "RUN"


def _export_anew(export: Path) -> str:
    return f"export anew with `rm-recipe export {_run(export)} --overwrite`"


# --- the upload -----------------------------------------------------------------------------------


def _publish(
    api: HfApi, repo_id: str, files: list[CommitOperationAdd], private: bool, base: str | None
) -> None:
    """Make the repository hold the files, in one commit, and compare what it holds then.

    Args:
        base: of an adapter, which has to be on the Hub.
    """
    # Each time: huggingface_hub replaces its client after a failed connection.
    huggingface_hub.get_session().timeout = TIMEOUT
    if base and not api.repo_exists(base):  # a folder's relative path can look like a repository
        raise RecipeError(
            f"the adapter's base {base} is not on the Hub, so nobody else could load it; push the merged "
            "model, without --adapter"
        )
    # None leaves it to the organisation's default, which may be private; False would override that.
    api.create_repo(repo_id, exist_ok=True, private=private or None)
    info = api.model_info(repo_id)
    if private and not info.private:
        raise RecipeError(
            f"{repo_id} is there and public, and --private was asked for; make it private in its settings, "
            "or push elsewhere"
        )
    there = {entry.rfilename for entry in info.siblings or []}
    # Models are loaded from the top folder alone.
    stale = [
        CommitOperationDelete(name, is_folder=False)
        for name in sorted(there - {file.path_in_repo for file in files})
        if "/" not in name and any(fnmatch(name, pattern) for pattern in STALE)
    ]
    if not stale and not _different(api, repo_id, files, info.sha):
        _say(f"{repo_id} holds these files already; nothing was sent")
        return
    commit = api.create_commit(
        repo_id,
        [*files, *stale],
        commit_message=f"Upload a reward model by rm_recipe {__version__}",
        parent_commit=info.sha,  # so that what somebody else committed meanwhile is looked at first
    )
    if wrong := _different(api, repo_id, files, commit.oid):
        raise PushError(
            f"what arrived at {repo_id} is not what was sent: {', '.join(wrong)}; do not use it; push again"
        )


def _different(api: HfApi, repo_id: str, files: list[CommitOperationAdd], revision: str | None) -> list[str]:
    """The files that the repository lacks or has otherwise."""
    entries = api.get_paths_info(repo_id, [file.path_in_repo for file in files], revision=revision)
    found = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    return [file.path_in_repo for file in files if not _same(file, found.get(file.path_in_repo))]


def _same(file: CommitOperationAdd, remote: RepoFile | None) -> bool:
    """By SHA-256 where the Hub keeps it, which it does for large files; else by git's name of the content."""
    if remote is None:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == _sha256(file)
    with file.as_file() as content:
        return remote.blob_id == git_hash(content.read())


def _may_pass(cause: BaseException) -> bool:
    """Whether it may go well the next time. (Xet, whose errors are others, has tried again for minutes.)"""
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code >= 500 or cause.response.status_code in PASSING_STATUS
    # A gateway's page of HTML is parsed as JSON before its status is looked at.
    return isinstance(cause, httpx2.TransportError | json.JSONDecodeError)


def _refusal(cause: BaseException, repo_id: str, token: str) -> RmRecipeError:
    """The error that the user sees; whatever a library or the Hub said may quote the token."""
    if isinstance(cause, OfflineModeIsEnabled):
        return RecipeError(
            "huggingface_hub is offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE); unset it to push"
        )
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if status == 401:
        return PushError("the Hub refused the token; log in with `hf auth login` or set HF_TOKEN")
    message = f"pushing to {repo_id} failed: {_words(cause)}"
    if status == 403:
        message = f"the token may not write to {repo_id} ({_words(cause)})"
    elif _may_pass(cause):
        message += f", {ATTEMPTS} times; push again later, which goes on from what has arrived"
    elif isinstance(cause, ConnectionError | TimeoutError | RuntimeError):
        message += "; HF_HUB_DISABLE_XET=1 uploads without the Hub's Xet storage; else push again later"
    return PushError(message.replace(token, "***"))


def _words(cause: BaseException) -> str:
    """What happened, by the Hub's own words where it answered."""
    if isinstance(cause, HfHubHTTPError):
        said = one_line(Exception(cause.server_message or ""))
        return f"the Hub answered {cause.response.status_code}{f' ({said})' if said else ''}"
    if isinstance(cause, json.JSONDecodeError):
        return "the Hub's answer was not JSON"
    if isinstance(cause, httpx2.TransportError):
        return f"the Hub could not be reached ({one_line(cause) or type(cause).__name__})"
    return one_line(cause) or type(cause).__name__


def _say(message: str) -> None:
    """To stderr: the URL is all that stdout gets."""
    print(message, file=sys.stderr, flush=True)
