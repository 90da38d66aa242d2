"""How figures are shown: numbers as text, tables on the terminal, pages in HTML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rm_recipe.files import redact, visible, whole_file

MISSING = "\N{EN DASH}"
TEMPLATES = Path(__file__).parent / "templates"


def words(key: str) -> str:
    """Write `a_key_like_this` as words."""
    return key.replace("_", " ")


def shorten(text: str, length: int = 20_000) -> str:
    """Cut a text at `length` characters and say how many more there were."""
    return text if len(text) <= length else f"{text[:length]} [and {len(text) - length:,} more characters]"


def decimal(value: Any, digits: int = 3, signed: bool = False) -> str:
    """Write a number with fixed digits and a true minus sign; a dash where there is none."""
    if not isinstance(value, int | float):
        return MISSING
    text = f"{value:{'+' if signed else ''}z.{digits}{'e' if abs(value) >= 1e6 else 'f'}}"
    return text.replace("-", "\N{MINUS SIGN}")


def whole(value: Any) -> str:
    """Write a count with its thousands set apart; a dash where there is none."""
    return f"{round(value):,}" if isinstance(value, int | float) else MISSING


def share(value: Any) -> str:
    """Write a share as a percentage; a dash where there is none."""
    return f"{value:.1%}".replace("%", " %") if isinstance(value, int | float) else MISSING


def interval(ends: Any, digits: int = 3, signed: bool = False) -> str:
    """Write `low to high`; a dash where there is no interval."""
    return " to ".join(decimal(end, digits, signed) for end in ends) if ends else MISSING


def p_value(value: Any) -> str:
    """Write a p-value; one that lies below three decimals is said to be below."""
    return "below 0.001" if isinstance(value, float) and value < 0.001 else decimal(value)


def print_text(text: str) -> None:
    """Print a sentence, which cannot command the terminal, wrapped to its width."""
    Console().print(Text(visible(text)))


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first and last column may wrap; its texts cannot command the terminal."""
    table = Table(title=title, title_justify="left")
    for heading in head:
        wraps = heading in (head[0], head[-1])
        table.add_column(heading, overflow="fold", no_wrap=not wraps, justify="left" if wraps else "right")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    Console().print(table)


def write_page(target: Path, template: Path, **values: Any) -> None:
    """Write a page; every text in it is escaped, redacted and made visible, Markup passes as it is.

    Args:
        template: may use those of `TEMPLATES`, and the functions of this module as filters.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(redact(value)) if type(value) is str else value,
    )
    shown = (words, shorten, decimal, whole, share, interval, p_value)
    environment.filters.update({function.__name__: function for function in shown})
    page = environment.get_template(template.name).render(**values)
    with whole_file(target) as partial:
        partial.write_bytes(page.encode("utf-8", "replace"))
