"""What is written to be read must not pass on: tokens, passwords, and where the user's home folder is."""

import os
import re
from collections.abc import Callable
from typing import Any

HIDDEN = "***"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # variables whose values are hidden
SHORTEST_TOKEN = 8  # a shorter value would be hidden inside words
# What nobody would make a name of: letters of both cases, with digits among them; or hexadecimal digits.
_MIXED = r"(?=[A-Za-z0-9]*[a-z])(?=[A-Za-z0-9]*[A-Z])"
_RANDOM = r"(?:(?=[A-Za-z0-9]{16})(?=[A-Za-z0-9]*[0-9])" + _MIXED + r"|(?=[0-9a-f]{32}))"
# Tokens by their beginnings: Hugging Face's (letters alone), GitHub's, OpenAI's and its like, AWS's; a URL's
# user:password.
_SECRETS = re.compile(
    rf"(?<![A-Za-z0-9])(?:(?:hf|api_org)_{_MIXED}[A-Za-z0-9]{{20,}}|gh[opsu]_[A-Za-z0-9]{{20,}}"
    rf"|github_pat_\w{{20,}}|sk-(?:proj|ant|svcacct|or)-[\w-]{{20,}}|sk-(?:[A-Za-z0-9]*[-_]){{0,8}}?{_RANDOM}[\w-]+"
    r"|AKIA[A-Z0-9]{16})(?![A-Za-z0-9])"
    r"|(?<=://)[^\s/?#@:\"'<>]*:[^\s/?#@\"'<>]+(?=@)"
)


def redact(text: str) -> str:
    """The text with `***` for tokens and passwords, and `~` for the user's home folder."""
    return _hide_home(hide_secrets(text))


def redacted(content: Any) -> Any:
    """Lists and mappings, as JSON has them, with every text in them redacted, keys too."""
    return _each_text(content, redact)


def hide_secrets(content: Any) -> Any:
    """A text, or lists and mappings of them, with `***` for tokens and passwords."""
    return _each_text(content, _hide_secrets)


def with_tilde(content: Any) -> Any:
    """Lists and mappings in which paths in the home folder begin with `~`; `expanded` takes them back."""
    home = _home()
    if not home:
        return content
    return _each_text(
        content, lambda text: "~" + text[len(home) :] if text == home or text.startswith(f"{home}/") else text
    )


def expanded(content: Any) -> Any:
    """Lists and mappings in which paths that begin with `~` name the home folder."""
    return _each_text(
        content, lambda text: os.path.expanduser(text) if text == "~" or text.startswith("~/") else text
    )


def _each_text(content: Any, change: Callable[[str], str]) -> Any:
    if isinstance(content, str):
        return change(content)
    if isinstance(content, dict):
        return {
            change(key) if isinstance(key, str) else key: _each_text(value, change)
            for key, value in content.items()
        }
    return [_each_text(item, change) for item in content] if isinstance(content, list | tuple) else content


def _hide_secrets(text: str) -> str:
    for name in TOKENS:
        token = os.environ.get(name, "").strip()
        if len(token) >= SHORTEST_TOKEN:
            text = text.replace(token, HIDDEN)
    return _SECRETS.sub(HIDDEN, text)


def _hide_home(text: str) -> str:
    """Whole components alone: for /root neither /rootfs nor /data/root is one."""
    home = _home()
    for folder in {home, os.path.realpath(home)} if home else ():
        before, after = r"(?:(?<=file://)|(?<![\w.+@~/-]))", r"(?!\.?[\w+@~-])"
        text = re.sub(f"{before}{re.escape(folder)}{after}", "~", text)
    return text


def _home() -> str:
    """HOME; empty where there is none, or where it is the root of everything, as in some containers."""
    home = os.environ.get("HOME", "").rstrip("/")
    return home if os.path.isabs(home) else ""
