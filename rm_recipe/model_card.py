"""A stand-in for the model card's module, so that `hub` can be tested; it is replaced by the real one."""

import re
from pathlib import Path


def for_repository(text: str, repo_id: str) -> str:
    """The card with the repository's id in place of the local folder."""
    found = re.search(r'^model = "(.+)"$', text, re.MULTILINE)
    return text.replace(found[1], repo_id) if found else text


def adapter_card(export: Path, run: Path, repo_id: str) -> str:
    """The card of the run's adapter."""
    return for_repository((export / "README.md").read_text(encoding="utf-8"), repo_id)
