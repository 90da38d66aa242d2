"""`rm-recipe push EXPORT --repo-id USER/NAME`: upload a verified export to the Hugging Face Hub.

Only files that `proof.json` names are uploaded, with the card and the evaluation. All go in one commit, which
is whole or not there, and their hashes are compared afterwards; so every step can be repeated after a fault.
"""

import json
import sys
import time
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.sha import git_hash

from rm_recipe import __version__
from rm_recipe.errors import PushError, RecipeError, RmRecipeError, one_line
from rm_recipe.evaluation.findings import HELD_OUT, gate_words
from rm_recipe.exporting.card import CARD, FIGURE, for_repository, is_repo_id
from rm_recipe.files import read_json

PROOF, EVALUATION = "proof.json", "evaluation.json"
# What would be loaded along with, or instead of, the model that is uploaded: other weights, a tokenizer.
STALE = ["*.safetensors", "*.bin", "*.pt", "*.index.json", "adapter_config.json"]
STALE += ["*token*.json", "*.model", "chat_template.jinja", "vocab.*", "merges.txt"]
ANEW = "export anew with `rm-recipe export RUN --overwrite`"

Files = dict[str, Path | bytes]  # by name; weights stay on the disk, the rest is sent as it is when checked

WAITS = (4.0, 8.0)  # seconds between attempts; huggingface_hub itself sends each part up to six times
TIMEOUT = 120.0  # seconds without an answer; huggingface_hub by itself would wait for ever
PASSING_STATUS = (408, 412, 429)  # and from 500 on; 412: another commit came in between
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def push(export: Path, repo_id: str, *, private: bool = False, allow_failed_gate: bool = False) -> str:
    """Upload a verified export in one commit; return the repository's URL.

    What is there already is not sent again. Weights and tokenizer files of an earlier model are deleted in
    the same commit.

    Args:
        private: create a private repository, and refuse one that is public.
        allow_failed_gate: upload a model that missed its recipe's target.

    Raises:
        RecipeError: the id, the token or the export is not fit for it; nothing was sent.
        PushError: the Hub refused it, could not be reached, or holds something else than what was sent.
    """
    token = check_destination(repo_id)
    verified = check_export(export, allow_failed_gate)
    files = export_files(export, repo_id, verified)
    for name, content in files.items():
        if isinstance(content, bytes) and token.encode() in content:
            raise RecipeError(f"{name} holds your token for the Hub; remove it and export anew")
    api = HfApi(token=token, library_name="rm_recipe", library_version=__version__)
    for seconds in (*WAITS, None):
        try:
            _upload(api, repo_id, files, verified, private)
            break
        except RmRecipeError:
            raise
        except Exception as error:
            happened, may_pass = _explain(error)
            happened = happened.replace(token, "***")
            if seconds is None or not may_pass:
                again = "; push again later, which goes on from what has arrived" if may_pass else ""
                raise PushError(f"pushing to {repo_id} failed: {happened}{again}") from None
        _say(f"{happened}; trying again in {seconds:g} s")
        time.sleep(seconds)  # here, so that an interrupt of the wait carries no error of a library along
    return f"{api.endpoint}/{repo_id}"


def check_destination(repo_id: str) -> str:
    """Find out before hours of training whether a push to this repository can be tried; return the token.

    Raises:
        RecipeError: the id is not of the form USER/NAME, there is no token, or huggingface_hub is offline.
    """
    if "/" not in repo_id or not is_repo_id(repo_id):
        raise RecipeError(
            f"{repo_id!r} cannot be a repository; give USER/NAME, of letters, digits, '-', '_' and '.'"
        )
    token = huggingface_hub.get_token()
    if not token:
        raise RecipeError(f"there is no token for the Hub; {LOGIN}")
    if huggingface_hub.is_offline_mode():
        raise RecipeError("huggingface_hub is offline; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to push")
    return token


# --- the files to upload, which a verification vouches for ---------------------------------------


def check_export(export: Path, allow_failed_gate: bool) -> dict[str, str]:
    """Check that an export was verified and evaluated.

    Returns:
        the SHA-256 of each file that was verified, which those that are sent have to have.

    Raises:
        RecipeError: `export` is no export, not whole, not verified, not evaluated, or failed its gate.
    """
    names = ("config.json", PROOF, EVALUATION)
    config, proof, evaluation = (read_json(export / name, missing_ok=True) for name in names)
    if "rm_recipe" not in config:
        raise RecipeError(f"{export} is not an export of `rm-recipe export`; give RUN/export")
    if proof.get("passed") is not True:
        raise RecipeError(f"{export} has no {PROOF} that says it passed; {ANEW}")
    if gone := [name for name in (*proof["files"], CARD) if not (export / name).is_file()]:
        raise RecipeError(f"{export} has no {', '.join(gone)} any more; {ANEW}")
    if HELD_OUT not in evaluation.get("datasets", {}):
        raise RecipeError(
            f"{export} was exported without an evaluation on held-out comparisons; run `rm-recipe evaluate "
            f"RUN`, then {ANEW}"
        )
    gate = gate_words(evaluation.get("gate")) or {"passed": False, "why": "it has none"}
    if not (gate["passed"] or allow_failed_gate):
        raise RecipeError(
            f"{export} has not passed its gate: {gate['why']}; --allow-failed-gate uploads it as it is"
        )
    return dict(proof["files"])


def export_files(export: Path, repo_id: str, verified: Iterable[str]) -> Files:
    """The files of a checked export, as they go into the repository."""
    paths = [export / name for name in (*verified, PROOF, EVALUATION, FIGURE) if (export / name).is_file()]
    files: Files = {path.name: path if path.suffix == ".safetensors" else path.read_bytes() for path in paths}
    card = for_repository((export / CARD).read_text(encoding="utf-8"), repo_id)
    return files | {CARD: card.encode()}


# --- the upload -----------------------------------------------------------------------------------


def _upload(api: HfApi, repo_id: str, files: Files, verified: dict[str, str], private: bool) -> None:
    """Make the repository hold the files, in one commit, and compare what it holds then.

    Args:
        verified: their hashes; the card, which may be edited, has none, nor has what came after the proof.
    """
    sent = [CommitOperationAdd(name, content) for name, content in files.items()]
    for file in sent:
        if verified.get(file.path_in_repo) not in (None, file.upload_info.sha256.hex()):
            raise RecipeError(f"{file.path_in_repo} changed since it was verified; {ANEW}")
    # Each time: huggingface_hub replaces its client after a failed connection.
    huggingface_hub.get_session().timeout = TIMEOUT
    # None leaves it to the organisation's default, which may be private; False would override that.
    api.create_repo(repo_id, exist_ok=True, private=private or None)
    info = api.model_info(repo_id, timeout=TIMEOUT)
    if private and not info.private:
        raise RecipeError(
            f"{repo_id} is public, not --private; make it private in its settings, or push elsewhere"
        )
    there = {entry.rfilename for entry in info.siblings or []} - files.keys()
    stale = [CommitOperationDelete(name) for name in sorted(filter(_is_loaded, there))]
    commit = api.create_commit(
        repo_id,
        [*sent, *stale],
        commit_message=f"Upload a reward model by rm_recipe {__version__}",
        parent_commit=info.sha,  # so that what somebody else committed meanwhile is looked at first
    )
    if commit.oid == info.sha:
        _say(f"{repo_id} holds these files already; nothing was sent")
    arrived = {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in api.get_paths_info(repo_id, list(files), revision=commit.oid)
        if isinstance(entry, RepoFile)
    }
    wrong = [file.path_in_repo for file in sent if arrived.get(file.path_in_repo) not in _hashes(file)]
    if wrong:
        raise PushError(
            f"what arrived at {repo_id} is not what was sent: {', '.join(wrong)}; do not use it; push again"
        )


def _is_loaded(name: str) -> bool:
    """Whether what is there already would be loaded: of the top folder, but for templates of other names."""
    of_top = "/" not in name and any(fnmatch(name, pattern) for pattern in STALE)
    return of_top or name.startswith("additional_chat_templates/")


def _hashes(file: CommitOperationAdd) -> list[str]:
    """What the Hub may call the content: its SHA-256, as of all weights, or git's name of a small file."""
    content = file.path_or_fileobj
    return [file.upload_info.sha256.hex(), *([git_hash(content)] if isinstance(content, bytes) else [])]


def _explain(error: Exception) -> tuple[str, bool]:
    """What happened, by the Hub's own words where it answered; and whether it may go well the next time."""
    # An upload's errors are wrapped in a RuntimeError.
    cause = (error.__cause__ if type(error) is RuntimeError else None) or error
    words, may_pass = one_line(cause) or type(cause).__name__, False
    if isinstance(cause, HfHubHTTPError):
        status, said = cause.response.status_code, one_line(Exception(cause.server_message or ""))
        advice = f"; {LOGIN}, by a token that may write there" if status in (401, 403) else ""
        words = f"the Hub answered {status} ({said}){advice}"
        may_pass = status >= 500 or status in PASSING_STATUS
    # A gateway's page of HTML is parsed as JSON before its status is looked at.
    elif isinstance(cause, httpx2.TransportError | json.JSONDecodeError):
        words, may_pass = f"the Hub could not be reached ({words})", True
    elif isinstance(cause, ConnectionError | TimeoutError | RuntimeError):  # Xet's, after minutes
        words += "; HF_HUB_DISABLE_XET=1 uploads without the Hub's Xet storage; else push again later"
    return words, may_pass


def _say(message: str) -> None:
    """To stderr: the URL is all that stdout gets."""
    print(message, file=sys.stderr, flush=True)
