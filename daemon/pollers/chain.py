"""What the providers' reports have in common: page chains, bucket grids, and fields told apart from their neighbours.

A chain is the whole answer to one question or no answer at all. Whatever breaks the contract of paging raises
SchemaDriftError, because a part that passes for the whole would wipe out what was booked before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, TypeVar

import msgspec

from daemon.domain.errors import CredentialError, SchemaDriftError, UsageError
from daemon.domain.ports import Answer
from daemon.domain.record import BucketRead, Dims, Row
from daemon.domain.window import Width, Window, rfc3339

Fields = dict[str, Any]
"""A row as it was sent: integers as int, every other number as Decimal."""

Instant = Annotated[datetime, msgspec.Meta(tz=True)]
"""A time that says its zone."""

T = TypeVar("T")
INT_MAX = 2**63 - 1
DIGITS_MAX = 100

_encode_detail = msgspec.json.Encoder(order="sorted", decimal_format="number").encode


@dataclass(frozen=True, slots=True)
class Page:
    """One page, read: its buckets in the order sent, with their rows."""

    buckets: Sequence[tuple[datetime, tuple[Row, ...]]]
    has_more: bool
    next_page: str | None


def decode(decoder: msgspec.json.Decoder[T], answer: Answer, what: str) -> T:
    """Parse a body. Raises SchemaDriftError, with the body, for anything that is not of the decoder's type."""
    try:
        return decoder.decode(answer.body)
    except msgspec.ValidationError as error:
        raise SchemaDriftError(f"{what}: {error}", answer.body) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ArithmeticError) as error:
        kind = answer.headers.get("content-type", "no content type")
        raise SchemaDriftError(f"{what}: the answer is not JSON ({kind})", answer.body) from error


@contextmanager
def reading(answer: Answer, what: str) -> Iterator[None]:
    """Name the source in a SchemaDriftError from inside, and give it the body where it has no closer excerpt."""
    try:
        yield
    except SchemaDriftError as error:
        raise SchemaDriftError(f"{what}: {error}", error.body or answer.body) from error
    except OverflowError as error:
        raise SchemaDriftError(f"{what}: a time is beyond reason", answer.body) from error


async def read_pages(ask: Callable[[str | None], Awaitable[Page]], *, end: datetime, pages_max: int) -> list[Page]:
    """Follow the cursors of one question to its end.

    Args:
        ask: reads the page at a cursor; the first has none.
        end: a page that goes beyond it is the last one needed.
        pages_max: a chain without an end by then is broken, not done.
    """
    pages: list[Page] = []
    seen: set[str] = set()
    cursor: str | None = None
    while len(pages) < pages_max:
        page = await ask(cursor)
        pages.append(page)
        if not page.has_more:
            return pages
        cursor = page.next_page
        if not cursor:
            raise SchemaDriftError("the page says that there are more, and gives no cursor")
        # Costs have been seen to hand out cursors for ever after the last bucket; an empty page is the end.
        if not page.buckets or page.buckets[-1][0] >= end:
            return pages
        if cursor in seen:
            raise SchemaDriftError("a page's cursor leads back to a page that was read")
        seen.add(cursor)
    raise SchemaDriftError(f"the page chain has no end after {pages_max} pages")


def check_grid(start: datetime, end: datetime, width: Width) -> None:
    """Raise SchemaDriftError for a bucket that is clipped, stretched or off the grid: its identity would not last."""
    if end - start != width.delta or width.floor(start) != start:
        raise SchemaDriftError(f"bucket {rfc3339(start)} to {rfc3339(end)} is not on the {width.value} grid")


def in_order(
    pages: Sequence[Page], window: Window, width: Width, *, may_send_empty: bool = False
) -> tuple[Window, tuple[BucketRead, ...]]:
    """The part of `window` that a chain covers, and its buckets in there, once their order is proven.

    A provider that sends empty buckets sends all of them between the first and the last, so that a hole means a lost
    page, and what comes after the last one is not covered: it may be late, or lost. It may well begin later than it
    was asked to, at the organisation's first day. That a provider is of this kind is told by the chain, by an empty
    bucket in it. A chain without one may come from a gateway that leaves them out, and so may an answer without any
    bucket; what seems to vanish there is withheld until a second read misses it too (`daemon.records.restate`).

    Args:
        may_send_empty: False for an API that never does.
    """
    buckets = [bucket for page in pages for bucket in page.buckets]
    sends_empty = may_send_empty and any(not rows for _, rows in buckets)
    taken: list[BucketRead] = []
    last: datetime | None = None
    for start, rows in buckets:
        if last is not None and (start <= last or (sends_empty and start - last != width.delta)):
            raise SchemaDriftError(f"bucket {rfc3339(start)} follows {rfc3339(last)}: repeated, out of order or a hole")
        if start < window.start:
            raise SchemaDriftError(f"bucket {rfc3339(start)} lies before the asked start {rfc3339(window.start)}")
        last = start
        if start < window.end:
            taken.append(BucketRead(start, rows))
    if sends_empty and last is not None:
        window = Window(window.start, min(window.end, last + width.delta))
    return window, tuple(taken)


# ── Fields ──────────────────────────────────────────────────────────────────────────────────────


def take_count(row: Fields, name: str) -> int | None:
    """Remove and return a count; None if it is absent or null."""
    value = row.pop(name, None)
    if type(value) is int and 0 <= value <= INT_MAX:
        return value
    if value is None:
        return None
    if type(value) is Decimal and 0 <= value <= INT_MAX and value == int(value):
        return int(value)
    raise SchemaDriftError(f"{name} is not a count", repr(value).encode())


def part(row: Fields, name: str) -> int:
    """A count that is a part of another one, left in the row; 0 if it is absent."""
    value = row.get(name)
    if value is None:
        return 0
    if type(value) is int and 0 <= value <= INT_MAX:
        return value
    raise SchemaDriftError(f"{name} is not a count", repr(value).encode())


def need_count(row: Fields, name: str) -> int:
    """Remove and return a count that the contract requires."""
    value = take_count(row, name)
    if value is None:
        raise SchemaDriftError(f"{name} is missing from a row", encode_detail(row))
    return value


def money(value: object) -> Decimal:
    """The exact amount of a JSON number or string: negative and exponent forms are legal, infinities are not."""
    if type(value) is int:
        value = Decimal(value)
    elif type(value) is str:
        try:
            # Decimal itself would also take underscores, blanks and digits of other scripts.
            value = Decimal(value) if value.isascii() and not set(value) & set("_ \t\r\n\f\v") else None
        except InvalidOperation:
            value = None
    if type(value) is not Decimal or not value.is_finite():
        raise SchemaDriftError("an amount is not a number")
    _sign, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    if len(digits) > DIGITS_MAX or exponent < -DIGITS_MAX:
        raise SchemaDriftError("an amount has more digits than we hold")
    if value.adjusted() > 30:
        raise SchemaDriftError("an amount is beyond reason")
    return value


def currency_code(value: object) -> str:
    """ISO 4217, upper case."""
    if type(value) is str and len(value) == 3 and value.isascii() and value.isalpha():
        return value.upper()
    raise SchemaDriftError("a cost has no currency", repr(value).encode())


def take_dims(row: Fields, names: Sequence[str]) -> Dims:
    """Remove and return the requested dimensions. `names` is sorted; an absent one is null."""
    return tuple([(name, _dim(name, row.pop(name, None))) for name in names])


def _dim(name: str, value: object) -> str | None:
    if value is None or type(value) is str:
        return value
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is int:
        return str(value)
    raise SchemaDriftError(f"dimension {name} is neither a text nor null")


def encode_detail(row: Mapping[str, object]) -> bytes:
    """What is left of a row, as canonical JSON. Null and zero say no more than absence, and are left out."""
    rest = {name: value for name, value in row.items() if value is not None and (value or type(value) is not int)}
    return _encode_detail(rest) if rest else b"{}"


# ── Settings and credentials ────────────────────────────────────────────────────────────────────


def check_group_by(
    setting: object, choices: Mapping[str, frozenset[str]], refused: Mapping[str, str] | None = None
) -> Mapping[str, Sequence[str]]:
    """The setting itself, once it is proven to map sources to lists of the dimensions in `choices`.

    Args:
        refused: dimensions that the provider has and we do not take, with the reason.
    """
    if not isinstance(setting, Mapping):
        raise UsageError(
            "settings.group_by", "must map a source to its dimensions", 'such as {"costs": ["project_id"]}'
        )
    for source, names in setting.items():
        field = f"settings.group_by.{source}"
        if source not in choices:
            raise UsageError(field, "no such source", f"use one of {', '.join(sorted(choices))}")
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise UsageError(field, "must be a list of dimensions")
        for name in names:
            if name not in choices[source]:
                reason = (refused or {}).get(name, "no dimension of this source")
                raise UsageError(field, f"{name}: {reason}", f"use some of {', '.join(sorted(choices[source]))}")
        if len(set(names)) != len(names):
            raise UsageError(field, "names a dimension twice")
    return setting


def check_known(settings: Mapping[str, object], known: Sequence[str]) -> None:
    """Raise UsageError for a setting that is not in `known`. What every connection may have is not among these."""
    for name in settings:
        if name not in known:
            raise UsageError(f"settings.{name}", "no such setting", f"use one of {', '.join([*known, *COMMON])}")


COMMON = ("overlap",)
"""Settings that every connection may have; the registry checks them."""
KEY_KINDS = {
    "sk-admin-": "an OpenAI admin key",
    "sk-proj-": "an OpenAI project key",
    "sk-svcacct-": "an OpenAI service account key",
    "sk-ant-admin": "an Anthropic Admin key",
    "sk-ant-api": "an Anthropic API key",
    "sk-ant-": "a key of Anthropic",
    "sk-or-": "an OpenRouter key",
}


def check_key_kind(credential: str, accepted: str, needed: str) -> None:
    """Raise CredentialError when the text is plainly a key of another kind, never repeating it.

    Shapes that nobody knows pass, since gateways hand out keys of their own.
    """
    if not credential or not credential.isascii() or not credential.isprintable() or " " in credential:
        raise CredentialError(f"the key is empty, or holds blanks or characters that no key has; needed is {needed}")
    if credential.startswith(accepted):
        return
    for prefix, kind in KEY_KINDS.items():
        if credential.startswith(prefix):
            raise CredentialError(f"this is {kind}; needed is {needed}")
