"""Text that stands in Markdown and means nothing there: names may hold whatever a file's name may."""

import re

from rm_recipe.evaluation.format import visible

_SPECIAL = re.compile(r"[\\`*\[\]<>|#]")


class Verbatim(str):
    """Text that is Markdown already, or stands in a block of code: `plain` leaves it alone."""

    __slots__ = ()


def plain(text: str) -> str:
    """The text as it is read, on one line: no markup, no HTML, no end of a table's cell."""
    return text if isinstance(text, Verbatim) else _SPECIAL.sub(r"\\\g<0>", _one_line(text))


def code(text: str) -> Verbatim:
    """The text as a span of code, whatever backticks there are in it."""
    text = _one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return Verbatim(f"{fence}{space}{text}{space}{fence}")


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))
