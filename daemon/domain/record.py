"""What a provider reports: grains, rows, and complete snapshots of a window."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Literal, NamedTuple, NewType

from daemon.domain.window import Width, Window

Basis = Literal["provider", "local"]
GrainId = NewType("GrainId", str)
HASH_VERSION = 1
"""Of row keys, content hashes and bucket digests. Code of an older version leaves newer buckets alone."""
Dims = tuple[tuple[str, str | None], ...]
"""Every requested dimension with its value, sorted by name. Null is a value of its own."""

EXACT = Context(prec=200, traps=[Inexact, InvalidOperation])
"""Arithmetic of money and quantities. Python's default rounds to 28 digits; this holds any sum of amounts of 100 digits,
and raises an ArithmeticError rather than round."""


@dataclass(frozen=True, slots=True)
class Grain:
    """How one source is cut: rows of two grains of a source must never feed the same sum.

    Attributes:
        api: the generation of the provider's API, such as "reports" or "analytics".
        width: the bucket length.
        group_by: the requested dimensions, sorted by name.
    """

    api: str
    width: Width
    group_by: tuple[str, ...]


class Rating(NamedTuple):
    """What a row is priced by: disjoint counts of one model, under the provider's own pricing context.

    Attributes:
        provider: the price list's name for the provider, such as "openai".
        model: as the provider reported it; an alias is resolved by the price list.
        context: choices that change the rate, sorted, such as (("service_tier", "flex"),) or (("processing", "batch"),).
        counts: (class, count) of tokens or searches that do not overlap; classes are the price list's, such as
            "input", "cache_read", "cache_write", "cache_write_1h", "output", "input_audio", "web_search".
        is_long: True or False when the provider says which context tier it was; None when a sum may mix them.
    """

    provider: str
    model: str
    context: tuple[tuple[str, str], ...]
    counts: tuple[tuple[str, int], ...]
    is_long: bool | None = None


class Row(NamedTuple):
    """One line of a report, in the field's common terms. `None` means: the provider does not say.

    Tokens and requests are counts. `input_tokens` is all input, cached included. `quantity` counts what is not a
    token (images, seconds, characters, sessions, searches), in `unit`. `amount` is money in `currency` (ISO 4217,
    upper case), never a float, and is set by the poller only where the provider itself reports money. `detail` is the
    canonical JSON object of every other field that the provider sent, unknown ones included, for later readers.
    `rating` says how to price the row locally; None where the row has no price of its own.
    """

    dims: Dims
    input_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    output_tokens: int | None = None
    requests: int | None = None
    quantity: Decimal | None = None
    unit: str | None = None
    amount: Decimal | None = None
    currency: str | None = None
    detail: bytes = b"{}"
    rating: Rating | None = None


class Totals(NamedTuple):
    """The sums of a bucket, for comparing an ungrouped read with what is stored. `None` adds as nothing."""

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0
    quantity: Decimal = Decimal(0)
    amount: Decimal = Decimal(0)


def totals_of(rows: tuple[Row, ...]) -> Totals:
    """Sum the rows of one bucket. Money counts only as the provider reported it."""
    input_tokens = cache_read_tokens = cache_write_tokens = output_tokens = requests = 0
    quantity = amount = Decimal(0)
    for row in rows:
        input_tokens += row.input_tokens or 0
        cache_read_tokens += row.cache_read_tokens or 0
        cache_write_tokens += row.cache_write_tokens or 0
        output_tokens += row.output_tokens or 0
        requests += row.requests or 0
        if row.quantity is not None:
            quantity = EXACT.add(quantity, row.quantity)
        if row.amount is not None:
            amount = EXACT.add(amount, row.amount)
    return Totals(input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, requests, quantity, amount)


@dataclass(frozen=True, slots=True)
class BucketRead:
    """All rows that the provider has for one bucket, as sent: some may share their dimensions. Empty means it said so."""

    start: datetime
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One complete page chain: it is authoritative for every bucket of its window.

    Attributes:
        window: aligned; each of its buckets is covered, also those that the provider left out because they are empty.
            It may end earlier than was asked for, where the provider's answer did.
        buckets: those with rows (and possibly empty ones), oldest first, each start at most once.
        pages: how many pages the chain had.
        digest: of this very data, as `Probe.digest` tells it; None where probes compare totals.
    """

    grain: Grain
    window: Window
    buckets: tuple[BucketRead, ...]
    pages: int
    digest: bytes | None = None


class ReadyRow(NamedTuple):
    """A row with its identity and its money. `rate_version` is set for local prices only."""

    key: bytes
    content: bytes
    row: Row
    dims_json: str
    detail_json: str
    amount: Decimal | None
    currency: str | None
    basis: Basis | None
    rate_version: str | None


class ReadyBucket(NamedTuple):
    """All rows of one bucket, as read; `digest` covers them, `totals` are their sums."""

    start: datetime
    rows: tuple[ReadyRow, ...]
    digest: bytes
    totals: Totals


class Stored(NamedTuple):
    """A current row as the ledger has it."""

    key: bytes
    content: bytes
    is_tombstone: bool


class Pending(NamedTuple):
    """The keys that an earlier read missed, and since when (database time)."""

    since: datetime
    keys: frozenset[bytes]
