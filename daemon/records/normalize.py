"""From a provider's snapshot to rows that are ready to book: merged, keyed, hashed and priced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from typing import Literal

import msgspec

from daemon.domain.record import Basis, Dims, Rating, ReadyBucket, ReadyRow, Row, Snapshot, totals_of
from daemon.records.identity import Keyer, bucket_digest, content_hash

UNPRICED = "unpriced"

Price = Callable[[Rating, datetime], tuple[Decimal | None, str]]
"""(rating, bucket start) to (amount in USD, or None when no price is known; the version of the rates)."""

_encode = msgspec.json.Encoder(order="deterministic").encode


def ready_buckets(
    snapshot: Snapshot, keyer: Keyer, kind: Literal["usage", "cost"], price: Price
) -> Iterator[ReadyBucket]:
    """Yield each bucket of the snapshot's window, oldest first, the empty ones included."""
    read = {bucket.start: bucket.rows for bucket in snapshot.buckets}
    for start in snapshot.window.buckets(snapshot.grain.width):
        rows = merge(read.get(start, ()))
        ready = tuple(_ready(row, start, keyer, kind, price) for row in rows)
        yield ReadyBucket(start, ready, bucket_digest((r.key, r.content) for r in ready), totals_of(rows))


def merge(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Sum rows of equal dimensions: a provider may split what it cannot name, and a key is written once."""
    seen: dict[Dims, Row] = {}
    for row in rows:
        twin = seen.get(row.dims)
        seen[row.dims] = row if twin is None else _sum(twin, row)
    return tuple(seen.values()) if len(seen) < len(rows) else rows


def _sum(a: Row, b: Row) -> Row:
    rating = a.rating
    if a.rating and b.rating:
        counts: dict[str, int] = dict(a.rating.counts)
        for name, count in b.rating.counts:
            counts[name] = counts.get(name, 0) + count
        rating = a.rating._replace(counts=tuple(sorted(counts.items())))
    return a._replace(
        input_tokens=_add(a.input_tokens, b.input_tokens),
        cache_read_tokens=_add(a.cache_read_tokens, b.cache_read_tokens),
        cache_write_tokens=_add(a.cache_write_tokens, b.cache_write_tokens),
        output_tokens=_add(a.output_tokens, b.output_tokens),
        requests=_add(a.requests, b.requests),
        quantity=_add_decimal(a.quantity, b.quantity),
        amount=_add_decimal(a.amount, b.amount),
        detail=_sum_detail(a.detail, b.detail),
        rating=rating,
    )


def _add(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else a + b


def _add_decimal(a: Decimal | None, b: Decimal | None) -> Decimal | None:
    return b if a is None else a if b is None else a + b


def _sum_detail(a: bytes, b: bytes) -> bytes:
    """Add what are numbers on both sides; elsewhere the greater text wins, so that the order does not matter."""
    left, right = msgspec.json.decode(a), msgspec.json.decode(b)
    for name, value in right.items():
        mine = left.get(name)
        if isinstance(mine, int) and isinstance(value, int) and not isinstance(mine, bool):
            left[name] = mine + value
        elif mine is None or _encode(value) > _encode(mine):
            left[name] = value
    return _encode(left)


def _ready(row: Row, start: datetime, keyer: Keyer, kind: Literal["usage", "cost"], price: Price) -> ReadyRow:
    amount, currency = row.amount, row.currency
    basis: Basis | None = None
    version: str | None = None
    if kind == "cost":
        basis = "provider"
    elif row.rating is not None:
        basis, currency = "local", "USD"
        amount, version = price(row.rating, start)
    return ReadyRow(
        keyer.row_key(start, row.dims),
        content_hash(row),
        row,
        _encode(dict(row.dims)).decode(),
        row.detail.decode(),
        amount,
        currency,
        basis,
        version,
    )
