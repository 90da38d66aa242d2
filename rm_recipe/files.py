"""Files: whole or not there, without tokens or the user's home in them, and no pickles of weights."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rm_recipe.errors import RecipeError

# Controls except tab and newline, surrogates, marks of direction, characters without a width, tags.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)


SCRATCH = ".part"  # how the names end of what is not finished


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block ends well.

    After an exception, Ctrl-C included, `target` is as it was and nothing else is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=SCRATCH, dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; it takes `target`'s place when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}{SCRATCH}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def is_scratch(path: Path) -> bool:
    """Whether a kill left this behind while one of the above was at work."""
    return path.name.startswith(".") and path.name.endswith(SCRATCH)


def tidy(folder: Path) -> None:
    """Remove what kills left behind in a folder, and put back what was about to be replaced."""
    for path in filter(is_scratch, list(folder.iterdir())):
        target = folder / path.name.removeprefix(".").rpartition("-")[0]
        if (path / "old").exists() and not target.exists():
            (path / "old").rename(target)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_json(target: Path, content: Any) -> None:
    """Write `content` as indented JSON, redacted, whole or not at all. NaN is refused: it is not JSON."""
    text = json.dumps(redacted(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Hash a file's bytes, as the Hub names large files."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """Read the object that a JSON file holds.

    Args:
        missing_ok: an empty one where there is no such file.

    Raises:
        RecipeError: naming the file.
    """
    if missing_ok and not path.is_file():
        return {}
    content = _parsed(path, json.loads)
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds no JSON object")
    return content


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file with one a line.

    Raises:
        RecipeError: naming the file.
    """
    return list(_parsed(path, lambda text: [json.loads(line) for line in text.split("\n") if line]))


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not JSON that can be read: {error}") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from working in a run's folder meanwhile.

    A process that was killed holds no lock. The lock's file is a temporary one, outside the folder.

    Raises:
        RecipeError: another process is at work in it.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"rm-recipe-{name}.lock", blocking=False)
    try:
        held = lock.acquire()
    except Timeout:
        raise RecipeError(f"another process is at work in {folder}: wait for it, or end it") from None
    with held:
        yield


def visible(text: str) -> str:
    """Replace what has no shape of its own by its number in brackets, U+202E for one.

    Tab, newline and joiners inside words stay.
    """
    return _HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text.replace("\r\n", "\n"))


# --- redaction: no tokens, passwords or user's home folder -------------------------------------

HIDDEN = "***"
SHORTEST_TOKEN = 8  # a shorter value would be hidden inside words
# Tokens by their beginnings: Hugging Face's, GitHub's, OpenAI's and its like, AWS's; a URL's user:password.
_SECRETS = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf|api_org)_[A-Za-z0-9]{30,}|gh[opsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|sk-(?:proj|ant|svcacct|or)-[\w-]{20,}|sk-[A-Za-z0-9]{40,}|AKIA[A-Z0-9]{16})(?![A-Za-z0-9])"
    r"|(?<=://)[^\s/?#@:\"'<>]*:[^\s/?#@\"'<>]+(?=@)"
)


def redact(text: str) -> str:
    """The text with `***` for tokens and passwords, and `~` for the user's home folder."""
    text, home = hide_secrets(text), os.path.expanduser("~").rstrip("/\\")
    # Whole components alone: for /home/ann neither /home/anna nor /data/home/ann is one.
    before, after = r"(?:(?<=file://)|(?<![\w.+@~/-]))", r"(?!\.?[\w+@~-])"
    return re.sub(f"{before}{re.escape(home)}{after}", "~", text) if home else text


def redacted(content: Any) -> Any:
    """Lists and mappings, as JSON has them, with every text in them redacted, keys too."""
    return _each_text(content, redact)


def expanded(content: Any) -> Any:
    """Lists and mappings in which paths that begin with `~` name the home folder."""
    return _each_text(content, lambda x: re.sub(r"^~(?=[/\\]|\Z)", lambda _: os.path.expanduser("~"), x))


def hide_secrets(text: str) -> str:
    """The text with `***` for tokens and passwords."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = os.environ.get(name, "").strip()
        if len(token) >= SHORTEST_TOKEN:
            text = text.replace(token, HIDDEN)
    return _SECRETS.sub(HIDDEN, text)


def _each_text(content: Any, change: Callable[[str], str]) -> Any:
    if isinstance(content, str):
        return change(content)
    if isinstance(content, dict):
        return {_each_text(key, change): _each_text(value, change) for key, value in content.items()}
    return [_each_text(item, change) for item in content] if isinstance(content, list | tuple) else content


# --- weights: safetensors alone; the rest are pickles, and unpickling can run code ---------------

# Of a whole model, and of an adapter: what is safe comes first. Or an index of several such files is there.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def holds(name: str, file: str, revision: str = "main") -> bool:
    """Whether a folder or a Hub repository has a file; the Hub is asked once.

    Raises:
        OSError, httpx.HTTPError: the Hub has nothing under that name, or cannot be reached.
    """
    return (Path(name) / file).is_file() if Path(name).is_dir() else _on_hub(name, file, revision)


@cache
def _on_hub(name: str, file: str, revision: str) -> bool:
    from transformers.utils.hub import has_file

    return bool(has_file(name, file, revision))


def is_lfs_pointer(path: Path) -> bool:
    """Tell whether a file is what Git LFS leaves in the place of one that it has not fetched."""
    with path.open("rb") as file:
        return file.read(23) == b"version https://git-lfs"


LFS_POINTER = "is a Git LFS pointer, not the file itself; fetch it: git lfs pull"


def pickle_fault(name: str, revision: str = "main", *, adapter: bool = False) -> str:
    """What is wrong with a model or adapter whose weights are a pickle; else nothing.

    Raises:
        OSError, httpx.HTTPError: as `holds` does.
    """
    weights = ADAPTER_WEIGHTS if adapter else WEIGHTS
    files = (file + index for file in weights for index in ("", ".index.json"))
    found = next((file for file in files if holds(name, file, revision)), "")
    if ".bin" not in found:
        return ""
    how = "PeftModel.from_pretrained(BASE, ...)" if adapter else "AutoModel.from_pretrained(...)"
    fault = f"'{name}' has its weights in {found} alone, a pickle, which can run code when it is read"
    return f"{fault}; if you trust it, convert it by transformers: `{how}` and `.save_pretrained(FOLDER)`"
