"""What the report says in words and digits: numbers, tables, and text that cannot hide or break anything."""

import json
import math
from dataclasses import dataclass
from typing import Any, TypeGuard

MISSING = "\N{EN DASH}"
LARGEST_TABLE = 50


@dataclass(frozen=True)
class Row:
    """A line of a table: its cells, the first one its heading; `strip` is (low, value, high) in [0, 1]."""

    cells: list[str]
    strip: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Table:
    """A table of the report. `note` says how to read it and what would be bad."""

    title: str
    head: list[str]
    rows: list[Row]
    note: str
    more: int = 0

    @property
    def strips(self) -> bool:
        """Whether a column draws intervals."""
        return any(row.strip for row in self.rows)


def shorten(text: str, length: int) -> str:
    """At most `length` characters, and how many more there were."""
    return text if len(text) <= length else f"{text[:length]} [and {len(text) - length:,} more characters]"


def as_text(value: Any) -> str:
    """A value of a JSON file as text: a string as it is, null as nothing, anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def words(key: str) -> str:
    """`a_key_like_this` as words."""
    return key.replace("_", " ")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number. `true` is none, a whole number beyond floats neither."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def mapping(value: Any, *keys: str) -> dict[str, Any]:
    """The object at the end of a path of keys; empty where something on the way is absent or none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def objects(value: Any, key: str) -> list[dict[str, Any]]:
    """The objects of the list under a key; empty where it is absent."""
    found = mapping(value).get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def decimal(value: Any, digits: int = 3, signed: bool = False) -> str:
    """A number with fixed digits and a true minus sign; a dash where there is none."""
    if not is_number(value):
        return MISSING
    large = abs(value) >= 1e6
    text = f"{value:{'+' if signed else ''}.{digits}{'e' if large else 'f'}}"
    if not float(text):
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def whole(value: Any) -> str:
    """A count with its thousands set apart; a dash where there is none."""
    return f"{round(value):,}" if is_number(value) else MISSING


def share(value: Any) -> str:
    """A share as a percentage; a dash where there is none."""
    return f"{value:.1%}".replace("%", " %") if is_number(value) else MISSING


def limits(value: Any) -> tuple[float, float] | None:
    """An interval as two numbers, None where it is none."""
    if isinstance(value, list) and len(value) == 2 and all(map(is_number, value)):
        return float(value[0]), float(value[1])
    return None


def interval(value: Any, signed: bool = False) -> str:
    """`low to high` of an interval; a dash where there is none."""
    both = limits(value)
    return f"{decimal(both[0], 3, signed)} to {decimal(both[1], 3, signed)}" if both else MISSING


def strip(value: Any, ends: Any) -> tuple[float, float, float] | None:
    """An accuracy and its interval, to be drawn; None where it is not whole or not in [0, 1]."""
    both = limits(ends)
    if both is None or not is_number(value):
        return None
    low, high = both
    return (low, float(value), high) if 0 <= low <= value <= high <= 1 else None


def p_value(value: Any) -> str:
    """A p-value; what lies below three decimals is said to be below."""
    return "below 0.001" if is_number(value) and value < 0.001 else decimal(value)


def duration(seconds: Any) -> str:
    """Seconds as hours, minutes and seconds."""
    if not is_number(seconds):
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{decimal(seconds, 1)} s"


def table(title: str, head: list[str], rows: list[Row], note: str) -> Table | None:
    """The table with as many rows as are shown and no column of dashes alone; None without any row."""
    if not rows:
        return None
    more, rows = max(len(rows) - LARGEST_TABLE, 0), rows[:LARGEST_TABLE]
    known = [0] + [i for i in range(1, len(head)) if any(row.cells[i] != MISSING for row in rows)]
    shown = [Row([row.cells[i] for i in known], row.strip) for row in rows]
    return Table(title, [head[i] for i in known], shown, note, more)


def values(title: str, found: dict[str, str], note: str) -> Table | None:
    """A table of two columns, without those of which nothing is known."""
    rows = [Row([text, value]) for text, value in found.items() if value not in ("", MISSING)]
    return table(title, ["", "value"], rows, note)
