"""Files and folders that are whole or not there: written under a temporary name, then renamed."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rm_recipe.errors import RecipeError
from rm_recipe.redaction import redacted

SCRATCH = ".part"  # how the names end of what is not finished


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its place when the block ends well.

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
    """Yields a path beside `target` to write to; it takes `target`'s place when the block ends well."""
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
    """Removes what kills left behind in a folder, and puts back what was about to be replaced."""
    for path in filter(is_scratch, list(folder.iterdir())):
        if not path.is_dir():
            path.unlink()
            continue
        target = folder / path.name.removeprefix(".").rpartition("-")[0]
        if (path / "old").exists() and not target.exists():
            (path / "old").rename(target)
        shutil.rmtree(path)


def write_json(target: Path, content: Any) -> None:
    """Writes `content` as indented JSON, redacted, whole or not at all. NaN is refused: it is not JSON."""
    text = json.dumps(redacted(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Of a file's bytes, as the Hub names large files."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        RecipeError: naming the file.
    """
    return _object(_read(path), str(path))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; empty lines are left out.

    Raises:
        RecipeError: naming file and line.
    """
    lines = enumerate(_read(path).split("\n"), 1)
    return [_object(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where} is not JSON that can be read: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{where} holds no JSON object")
    return content
