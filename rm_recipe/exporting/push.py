"""Uploading a proven export to the Hugging Face Hub: compared, sent as one commit, compared again.

A commit is whole or not there, so that an interrupt leaves nothing half published, and everything from the
first comparison on can be repeated after a fault on the way.
"""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._http import parse_ratelimit_headers
from huggingface_hub.utils._validators import validate_repo_id

from rm_recipe import __version__
from rm_recipe.errors import PushError, RecipeError, RmRecipeError, one_line
from rm_recipe.exporting.card import CARD, FIGURE, adapter_card, for_repository
from rm_recipe.files import read_json, sha256
from rm_recipe.recipe.reader import is_run_folder, saved_values

# --- the files to upload, which a proof vouches for --------------------------------------------

WEIGHTS = ".safetensors"
PROOF, EVALUATION = "proof.json", "evaluation.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# What `AutoTokenizer` reads beside a model, by whichever tokenizer.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
PICKLES = (".bin", ".pt", ".pth", ".pkl")  # training_args.bin among them, which may hold a token


class File(NamedTuple):
    """A file to upload: weights stay on the disk; the rest is sent as it was when it was checked."""

    content: bytes | Path
    sha256: str


def export_files(export: Path, repo_id: str, *, allow_failed_gate: bool) -> dict[str, File]:
    """The files of an export, by their names in the repository.

    Raises:
        RecipeError: `export` is no export, unproven, changed since, not evaluated, or failed its gate.
    """
    files = _proven(export)
    _check_evaluation(export, allow_failed_gate)
    _check_card(export)
    _check_data(export)
    card = for_repository(_text(export / CARD), repo_id)
    more = [name for name in (PROOF, EVALUATION, FIGURE) if (export / name).is_file()]
    return files | _read(export, more) | {CARD: _file(card.encode())}


def adapter_files(export: Path, repo_id: str, *, allow_failed_gate: bool) -> dict[str, File]:
    """The files of the adapter that an export was merged from, by their names in the repository.

    Raises:
        RecipeError: what holds for `export_files`; or there is no adapter, or one of a local model.
    """
    _proven(export)
    _check_evaluation(export, allow_failed_gate)
    _check_card(export)
    run = export.resolve().parent
    model = run / "model"
    if not is_run_folder(run) or not all((model / name).is_file() for name in ADAPTER):
        raise RecipeError(f"{export} is no RUN/export of a run with an adapter; push it without --adapter")
    merged = read_json(export / PROOF).get("trained")
    if not isinstance(merged, dict) or merged.get(ADAPTER[1]) != sha256(model / ADAPTER[1]):
        raise RecipeError(f"{model} is not the adapter that {export} was proven against; {_anew(export)}")
    base = base_model(model / ADAPTER[0])
    if Path(base).is_dir() or not is_repo_id(base):
        raise RecipeError(
            f"the adapter's base is the local folder {base}, so nobody else could load it; push the merged "
            "model, without --adapter"
        )
    _check_data(export)
    card = adapter_card(export, run, repo_id)
    more = [name for name in ("config.json", *TOKENIZER) if (model / name).is_file()]
    shown = [FIGURE] if FIGURE in card and (export / FIGURE).is_file() else []
    return (
        _read(model, [*ADAPTER, *more]) | _read(export, [EVALUATION, *shown]) | {CARD: _file(card.encode())}
    )


def base_model(adapter_config: Path) -> str:
    """What an adapter was trained on: a repository or a folder."""
    return str(read_json(adapter_config).get("base_model_name_or_path") or "")


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def _proven(export: Path) -> dict[str, File]:
    """The files that the export's proof names, each as it was when it was proven."""
    if not export.is_dir():
        raise RecipeError(f"{export} is not a folder; give an export, RUN/export")
    config = export / "config.json"
    if not config.is_file() or "rm_recipe" not in read_json(config):
        hint = f"; its export is {export / 'export'}" if (export / "export").is_dir() else ""
        raise RecipeError(f"{export} is not an export of `rm-recipe export`{hint}")
    if not (export / PROOF).is_file():
        raise RecipeError(f"{export} was never proven, as it has no {PROOF}; {_anew(export)}")
    proof = read_json(export / PROOF)
    if proof.get("passed") is not True:
        raise RecipeError(f"{export / PROOF} says that the export did not pass; {_anew(export)}")
    hashes = proof.get("files")
    if not isinstance(hashes, dict) or not any(name.endswith(WEIGHTS) for name in hashes):
        raise RecipeError(f"{export / PROOF} names no weights that were proven; {_anew(export)}")
    for name in hashes:
        if Path(name).name != name or name.startswith(".") or name.endswith(PICKLES):
            raise RecipeError(f"{export / PROOF} names {name!r}, which is no file of an export")
        if not (export / name).is_file():
            raise RecipeError(f"{export / name} is gone since it was proven; {_anew(export)}")
    files = _read(export, hashes)
    for name, file in files.items():
        if file.sha256 != hashes[name]:
            raise RecipeError(f"{export / name} has changed since it was proven; {_anew(export)}")
    return files


def _check_evaluation(export: Path, allow_failed_gate: bool) -> None:
    found = read_json(export / EVALUATION) if (export / EVALUATION).is_file() else {}
    if not _mapping(found.get("datasets")).get("held_out"):
        raise RecipeError(
            f"{export} was exported without an evaluation on held-out comparisons; run `rm-recipe evaluate "
            f"{_run(export)}`, then `rm-recipe export {_run(export)} --overwrite`"
        )
    gate = _mapping(found.get("gate"))
    if gate.get("passed") is not True and not allow_failed_gate:
        what = "accuracy" if gate.get("statistic") == "accuracy" else "lower end of the accuracy's interval"
        why = (
            f"the {what} is {_decimal(gate.get('value'))}, the recipe's target {_decimal(gate.get('target'))}"
            if gate
            else f"{export / EVALUATION} has no gate"
        )
        raise RecipeError(f"{export} has not passed its gate: {why}; --allow-failed-gate uploads it as it is")


def _check_data(export: Path) -> None:
    """Compares the data with what the export's run was trained with, where run and data are here.

    Raises:
        RecipeError: what is held out changed since.
    """
    run = export.resolve().parent
    if not is_run_folder(run) or not (run / "run.json").is_file():
        return
    values = saved_values(run)
    paths = [entry.get("path") for entry in values.get("datasets") or []] or [values.get("dataset_name")]
    if not all(Path(str(path)).exists() for path in paths):
        return
    # With torch and much else, which an upload needs not.
    from rm_recipe.recipe.reader import read_run_recipe
    from rm_recipe.training.run_folder import check_data

    with redirect_stdout(sys.stderr):  # the URL is all that stdout gets
        try:
            recipe = read_run_recipe(run)
        except RecipeError as error:  # of a machine that has other hardware or packages
            print(f"warning: whether the data of {run} changed since training cannot be told: {error}")
            return
        check_data(run, recipe)


def _check_card(export: Path) -> None:
    if not (export / CARD).is_file():
        raise RecipeError(f"{export} has no {CARD}, the model's card; {_anew(export)}")


def _read(folder: Path, names: Iterable[str]) -> dict[str, File]:
    return {name: _file(folder / name) for name in names}


def _file(content: bytes | Path) -> File:
    if isinstance(content, bytes):
        return File(content, hashlib.sha256(content).hexdigest())
    if content.suffix != WEIGHTS:
        return _file(content.read_bytes())
    return File(content, sha256(content))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None


def _run(export: Path) -> str:
    """The export's run, as a command would name it."""
    return str(export.parent) if is_run_folder(export.parent) else "RUN"


def _anew(export: Path) -> str:
    return f"export anew with `rm-recipe export {_run(export)} --overwrite`"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _decimal(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else str(value)


# --- the upload: compared, sent as one commit, compared again ----------------------------------

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
