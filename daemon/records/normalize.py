"""From a provider's snapshot to rows that are ready to book: merged, keyed, hashed and priced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from functools import reduce
from typing import Any, Literal

import msgspec

from daemon.domain.errors import SchemaDriftError
from daemon.domain.record import EXACT, Basis, Dims, Rating, ReadyBucket, ReadyRow, Row, Snapshot, totals_of
from daemon.records.identity import Keyer, bucket_digest, content_hash

Price = Callable[[Rating, datetime], tuple[Decimal | None, str]]
"""(rating, bucket start) to (amount in USD, or None when no price is known; the version of the rates)."""

_encode = msgspec.json.Encoder(order="deterministic", decimal_format="number").encode
_decode = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode


def ready_buckets(
    snapshot: Snapshot, keyer: Keyer, kind: Literal["usage", "cost"], price: Price
) -> Iterator[ReadyBucket]:
    """Yield each bucket of the snapshot's window, oldest first, the empty ones included."""
    read = {bucket.start: bucket.rows for bucket in snapshot.buckets}
    for start in snapshot.window.buckets(snapshot.grain.width):
        rows = merge(read.get(start, ()))
        ready = tuple(_ready(row, start, keyer, kind, price) for row in rows)
        yield ReadyBucket(start, ready, bucket_digest((r.key, r.content) for r in ready), totals_of(rows))


def merge(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Sum rows of equal dimensions: a provider may split what it cannot name, and a key is written once.

    The order of the rows never matters: one that changes between polls must not look like a restatement.

    Raises:
        SchemaDriftError: what shares its dimensions has no sum: other units or currencies, numbers beyond reason.
    """
    if len({row.dims for row in rows}) == len(rows):
        return tuple(rows)
    twins: dict[Dims, list[Row]] = {}
    for row in rows:
        twins.setdefault(row.dims, []).append(row)
    return tuple([_sum(group) if len(group) > 1 else group[0] for group in twins.values()])


def _sum(rows: Sequence[Row]) -> Row:
    units = {row.unit for row in rows if row.quantity is not None}
    currencies = {row.currency for row in rows if row.amount is not None}
    if len(units) > 1 or len(currencies) > 1:
        raise SchemaDriftError("rows of equal dimensions count in different units", rows[0].detail)
    try:
        return Row(
            rows[0].dims,
            _total([row.input_tokens for row in rows]),
            _total([row.cache_read_tokens for row in rows]),
            _total([row.cache_write_tokens for row in rows]),
            _total([row.output_tokens for row in rows]),
            _total([row.requests for row in rows]),
            _exact_total([row.quantity for row in rows]),
            units.pop() if units else None,
            _exact_total([row.amount for row in rows]),
            currencies.pop() if currencies else None,
            _sum_details([row.detail for row in rows]),
            _sum_ratings([row.rating for row in rows if row.rating is not None]),
        )
    except ArithmeticError as error:
        raise SchemaDriftError("a sum has more digits than we hold", rows[0].detail) from error


def _total(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _exact_total(numbers: Iterable[Decimal | None]) -> Decimal | None:
    known = [number for number in numbers if number is not None]
    return reduce(EXACT.add, known) if known else None


def _sum_details(details: Sequence[bytes]) -> bytes:
    """Add what is a number in every row that has it; of anything else the least text stands for all."""
    if len(set(details)) == 1 and details[0] == b"{}":
        return details[0]
    told: dict[str, list[object]] = {}
    for detail in details:
        for name, value in _decode(detail).items():
            if value is not None:
                told.setdefault(name, []).append(value)
    return _encode({name: _one_for_all(values) for name, values in told.items()})


def _one_for_all(values: list[object]) -> object:
    whole = [value for value in values if type(value) is int]
    parts = [value for value in values if type(value) is Decimal]
    if len(whole) + len(parts) < len(values):
        return min(values, key=_encode)
    # Sorted, because whether a sum of far-apart numbers fits may depend on its order.
    return reduce(EXACT.add, sorted(parts), Decimal(sum(whole))) if parts else sum(whole)


def _sum_ratings(ratings: Sequence[Rating]) -> Rating | None:
    """None unless all are of one model in one context: rows that cost differently have no price together."""
    if len({(rating.provider, rating.model, rating.context) for rating in ratings}) != 1:
        return None
    counts: dict[str, int] = {}
    for rating in ratings:
        for name, count in rating.counts:
            counts[name] = counts.get(name, 0) + count
    lengths = {rating.is_long for rating in ratings}
    is_long = lengths.pop() if len(lengths) == 1 else None
    return ratings[0]._replace(counts=tuple(sorted(counts.items())), is_long=is_long)


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
