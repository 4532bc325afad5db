"""Results to stdout, as a table or as JSON; everything else to stderr.

JSON: times are RFC 3339 in UTC, money is a decimal text, what is unknown is null. Keys are only ever added.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Self
from urllib.parse import unquote

from daemon.domain.window import rfc3339

MASK = "***"
_USER = re.compile(r"(://)([^/?#\s]*)@")
_PARAMETER = re.compile(r"([?&;#])([^=&;#?\s]+)=([^&;#\s]+)")
_SECRET_NAME = re.compile(
    r"(?i)token|secret|passw|pwd|signature|credential|key$|(?:^|[^a-z])(?:sig|auth|authorization)$"
)


def _plain(value: object) -> object:
    """Turn what msgspec cannot write, or would write otherwise, into plain JSON values."""
    import dataclasses

    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime):
        return rfc3339(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def print_json(value: object) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(_plain(value)), indent=2).decode())


class JsonArray:
    """Prints an array item by item, however long it is. Decimals are numbers with all their digits."""

    def __init__(self) -> None:
        self._is_empty = True

    def __enter__(self) -> Self:
        print("[", end="")
        return self

    def add(self, item: Mapping[str, object]) -> None:
        import msgspec

        plain = {name: value if isinstance(value, Decimal) else _plain(value) for name, value in item.items()}
        text = msgspec.json.Encoder(decimal_format="number").encode(plain).decode()
        print(f"{'' if self._is_empty else ','}\n  {text}", end="")
        self._is_empty = False

    def __exit__(self, *_: object) -> None:
        print("]" if self._is_empty else "\n]")


def print_json_rows(rows: Iterable[Mapping[str, object]]) -> None:
    with JsonArray() as array:
        for row in rows:
            array.add(row)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """A rich table; `empty` is said on stderr in place of one without rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = [[cell(value) for value in row] for row in rows]
    if not lines:
        note(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    numeric = (
        [all(isinstance(row[i], int | Decimal | None) for row in rows) for i in range(len(columns))]
        if isinstance(rows, Sequence)
        else [False] * len(columns)
    )
    for column, is_number in zip(columns, numeric, strict=True):
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)  # a pipe has no width: never fold what a script may read
    console.print(table)


def cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case Decimal():
            return format(value, "f")
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
        case _:
            return visible(str(value))


def visible(text: str) -> str:
    """Names come from providers and from people: control characters must not reach a terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def masked(text: str) -> str:
    """A URL, or a text that names some, without the passwords in them: what publishers send may hold any.

    A user without a password is masked too, since it is then the user that opens the door.
    """
    return _PARAMETER.sub(_masked_parameter, _USER.sub(_masked_user, text))


def _masked_user(found: re.Match[str]) -> str:
    user, _, password = found[2].partition(":")
    return f"{found[1]}{user}:{MASK}@" if password else f"{found[1]}{MASK}@"


def _masked_parameter(found: re.Match[str]) -> str:
    start, name, _ = found.groups()
    return f"{start}{name}={MASK}" if _SECRET_NAME.search(unquote(name)) else found[0]


def note(text: str) -> None:
    """A remark for the person, on stderr."""
    print(visible(text), file=sys.stderr)


def print_error(text: str) -> None:
    print(f"error: {visible(text)}", file=sys.stderr)
