"""Uploading a proven export to the Hugging Face Hub: compared, sent as one commit, compared again.

A commit is whole or not there, so that an interrupt leaves nothing half published, and everything from the
first comparison on can be repeated after a fault on the way.
"""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._http import parse_ratelimit_headers

from rm_recipe import __version__
from rm_recipe.errors import PushError, RecipeError, RmRecipeError, one_line
from rm_recipe.exporting.card import FIGURE
from rm_recipe.exporting.upload_files import (
    ADAPTER,
    PROOF,
    TOKENIZER,
    File,
    adapter_files,
    base_model,
    export_files,
    is_repo_id,
)

ATTEMPTS = 5
FIRST_WAIT = 2.0  # seconds; doubled after each attempt
LONGEST_WAIT = 300.0  # the Hub counts requests in windows of five minutes
TIMEOUT = 120.0  # seconds without a sign of life; huggingface_hub itself would wait for ever
SILENCE = 20.0  # seconds of an upload by Xet, after which something is said
WITHOUT_XET = "set HF_HUB_DISABLE_XET=1 to upload without Xet"
PATHS_AT_ONCE = 500  # the Hub takes a thousand
PASSING_STATUS = (408, 412, 429)  # and from 500 on; 412: another commit came in between
# What would be loaded along with, or instead of, the model that is uploaded.
STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", ADAPTER[0],
         *TOKENIZER, PROOF, FIGURE)  # fmt: skip


def push(
    export: Path,
    repo_id: str,
    *,
    private: bool = False,
    adapter: bool = False,
    allow_failed_gate: bool = False,
) -> str:
    """Uploads a proven export in one commit; returns the repository's URL.

    What is there already is not sent again. Weights and tokenizer files of an earlier model go in the same
    commit.

    Args:
        private: create a private repository, and refuse one that is public.
        adapter: upload the adapter in `export`'s run instead of the merged model.
        allow_failed_gate: upload a model that missed its recipe's target.

    Raises:
        RecipeError: the id, the token or the export is not fit for it; nothing was sent.
        PushError: the Hub refused it, could not be reached, or holds something else than what was sent.
    """
    _check_id(repo_id)
    find_files = adapter_files if adapter else export_files
    files = find_files(export, repo_id, allow_failed_gate=allow_failed_gate)
    token = _token()
    _check_secret(files, token)
    base = base_model(export.resolve().parent / "model" / ADAPTER[0]) if adapter else None
    api = HfApi(token=token, library_name="rm_recipe", library_version=__version__)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if not _publish(api, repo_id, files, private, base) and attempt == 1:
                _say(f"{repo_id} holds these files already; nothing was sent")
            break
        except RmRecipeError:
            raise
        except Exception as error:
            cause = _cause(error)
            fault = _passing(cause).replace(token, "***")
            if not fault or _of_xet(cause) or attempt == ATTEMPTS:  # Xet has tried again for minutes
                raise _refusal(error, repo_id, token) from None
            seconds = _wait(cause, attempt)
        # Out of the handler, so that an interrupt of the wait carries no error of a library along.
        _say(f"{fault}; trying again in {seconds:g} s ({attempt + 1} of {ATTEMPTS})")
        time.sleep(seconds)
    return f"{api.endpoint}/{repo_id}"


def check_destination(repo_id: str) -> None:
    """Finds out before hours of training whether a push to this repository can be tried.

    Raises:
        RecipeError: the id is not of the form USER/NAME, or there is no token.
    """
    _check_id(repo_id)
    _token()


def _check_id(repo_id: str) -> None:
    if repo_id.count("/") != 1 or not is_repo_id(repo_id):
        raise RecipeError(
            f"{repo_id!r} cannot be a repository; give USER/NAME, of letters, digits, '-', '_' and '.'"
        )


def _token() -> str:
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        token = huggingface_hub.get_token()
    except Exception as error:  # an expired login that could not be renewed, for one
        raise RecipeError(f"there is no token for the Hub ({one_line(error)}); {log_in}") from None
    if not token:
        raise RecipeError(f"there is no token for the Hub; {log_in}")
    # The HTTP library would quote such a one, escaped, in its message.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise RecipeError(f"the token for the Hub has characters that no token has; {log_in}")
    return token


def _check_secret(files: dict[str, File], token: str) -> None:
    for name, file in files.items():
        if isinstance(file.content, bytes) and token.encode() in file.content:
            raise RecipeError(f"{name} holds your token for the Hub; remove it there and export anew")


def _publish(api: HfApi, repo_id: str, files: dict[str, File], private: bool, base: str | None) -> bool:
    """Makes the repository hold the files, in one commit; False where it does already."""
    # A new one each time: huggingface_hub replaces its client after a failed connection.
    huggingface_hub.get_session().timeout = TIMEOUT
    if base is not None:
        _check_base(api, base)
    # None leaves it to the organisation's default, which may be private; False would override that.
    api.create_repo(repo_id, repo_type="model", exist_ok=True, private=private or None)
    info = api.model_info(repo_id, timeout=TIMEOUT)
    if private and not info.private:
        raise RecipeError(
            f"{repo_id} is there and public, and --private was asked for; make it private in its settings, "
            "or push elsewhere"
        )
    there = {entry.rfilename for entry in info.siblings or []}
    stale = sorted(name for name in there - files.keys() if _is_stale(name))
    different = _different(api, repo_id, files, info.sha)
    if not different and not stale:
        return False
    additions = [CommitOperationAdd(name, files[name].content) for name in different]
    deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
    with _not_in_silence():
        commit = api.create_commit(
            repo_id,
            [*additions, *deletions],
            commit_message=f"Upload a reward model by rm_recipe {__version__}",
            # What was compared is what is committed to. It also keeps a commit whose answer was lost, and
            # that a late reader does not see yet, from being made twice.
            parent_commit=info.sha,
        )
    wrong = _different(api, repo_id, files, commit.oid)
    if wrong:
        raise PushError(
            f"what arrived at {repo_id} is not what was sent: {', '.join(wrong)}; do not use it; push again"
        )
    return True


@contextmanager
def _not_in_silence() -> Iterator[None]:
    """Says what may be wrong where an upload takes long: Xet waits for its storage without a word."""
    message = f"still uploading, by Xet; where no progress shows, {WITHOUT_XET}"
    timer = threading.Timer(SILENCE, _say, [message])
    timer.daemon = True
    if _uploads_by_xet():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_base(api: HfApi, base: str) -> None:
    """A relative path, seen from elsewhere, looks like a repository; the Hub knows."""
    try:
        api.model_info(base, timeout=TIMEOUT)
    except GatedRepoError:
        pass
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise
        raise RecipeError(
            f"the adapter's base {base} is not on the Hub, so nobody else could load it; push the merged "
            "model, without --adapter"
        ) from None


def _is_stale(name: str) -> bool:
    """Models are loaded from the top folder alone."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in STALE)


def _different(api: HfApi, repo_id: str, files: dict[str, File], revision: str | None) -> list[str]:
    """The files that the repository lacks or has otherwise."""
    names = sorted(files)
    found: dict[str, RepoFile] = {}
    for start in range(0, len(names), PATHS_AT_ONCE):
        paths = names[start : start + PATHS_AT_ONCE]
        entries = api.get_paths_info(repo_id, paths, revision=revision)
        found |= {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    return [name for name in names if name not in found or not _same(files[name], found[name])]


def _same(file: File, remote: RepoFile) -> bool:
    """By SHA-256 where the Hub keeps it, which it does for large files; else by git's name of the content."""
    if remote.lfs is not None:
        return remote.lfs.sha256 == file.sha256
    content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    blob = b"blob %d\0" % len(content) + content
    return remote.blob_id == hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException) -> BaseException:
    """What happened on the way to the Hub; an upload's errors are wrapped in a RuntimeError."""
    known = (HfHubHTTPError, httpx2.TransportError, json.JSONDecodeError, ConnectionError, TimeoutError)
    return next((link for link in _chain(error) if isinstance(link, known)), error)


def _passing(cause: BaseException) -> str:
    """What happened, in words, where it may go well the next time; else nothing."""
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        return f"the Hub answered {status}" if status in PASSING_STATUS or status >= 500 else ""
    # Not faults of the line: an address or a header that no request can have, and being told to stay away.
    if isinstance(cause, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError | OfflineModeIsEnabled):
        return ""
    if _of_xet(cause):
        return f"the Hub's Xet storage could not be reached ({_words(cause)})"
    if isinstance(cause, httpx2.TimeoutException | TimeoutError):
        return "the Hub did not answer in time"
    if isinstance(cause, httpx2.ConnectError):
        return f"the Hub could not be reached ({_words(cause)})"
    if isinstance(cause, httpx2.TransportError | ConnectionError):
        return f"the connection to the Hub was lost ({_words(cause)})"
    # A gateway's page of HTML, which huggingface_hub parses before it looks at the status.
    return "the Hub's answer was not JSON" if isinstance(cause, json.JSONDecodeError) else ""


def _of_xet(cause: BaseException) -> bool:
    """Whether hf_xet has failed: it raises Python's own errors, the HTTP client never does."""
    return isinstance(cause, ConnectionError | TimeoutError) and _uploads_by_xet()


def _uploads_by_xet() -> bool:
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _wait(cause: BaseException, attempt: int) -> float:
    """Seconds until the next attempt: doubling, or as long as the Hub asks for."""
    seconds = FIRST_WAIT * 2 ** (attempt - 1)
    if isinstance(cause, HfHubHTTPError):
        asked = cause.response.headers.get("Retry-After", "")
        limit = parse_ratelimit_headers(cause.response.headers)
        if asked.isdigit():
            seconds = max(seconds, float(asked))
        if limit is not None and limit.remaining == 0:
            seconds = max(seconds, limit.reset_in_seconds + 1.0)
    return min(seconds, LONGEST_WAIT)


def _refusal(error: BaseException, repo_id: str, token: str) -> RmRecipeError:
    """The error that the user sees; whatever a library or the Hub said may quote the token."""
    cause = _cause(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return RecipeError(
            "huggingface_hub is offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE); unset it to push"
        )
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if status == 401:
        return PushError("the Hub refused the token; log in with `hf auth login` or set HF_TOKEN")
    fault = _passing(cause)
    if status == 403:
        message = f"the token may not write to {repo_id} ({_words(cause)})"
    elif _of_xet(cause):
        message = f"{fault}; {WITHOUT_XET}; else push again later"
    elif fault:
        message = f"{fault}, {ATTEMPTS} times; push again later, which goes on from what has arrived"
    else:
        message = f"pushing to {repo_id} failed: {_words(cause)}"
    return PushError(message.replace(token, "***"))


def _words(cause: BaseException) -> str:
    """What was said, by the Hub where it was its answer."""
    said = cause.server_message if isinstance(cause, HfHubHTTPError) else None
    return one_line(Exception(said)) if said else one_line(cause) or type(cause).__name__


def _say(message: str) -> None:
    """To stderr: the URL is all that stdout gets."""
    print(message, file=sys.stderr, flush=True)
