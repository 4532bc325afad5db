"""Quota counters: what was read of them, what was used, and how far they stand from the ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import IntEnum
from typing import NamedTuple

import msgspec

from daemon.db.pool import Database, Executor, query
from daemon.domain.collection import Counter
from daemon.domain.connection import ConnectionId, StreamId, TenantId

_TAKE = query("quota_take")
_LIST = query("quota_list")
_CHANGES = query("quota_changes")
_COUNTERS = query("quota_counters")
_STREAM = query("quota_stream")
_CONNECTIONS = query("quota_connections")
_HAS_SOURCE = query("quota_has_source")
_MARK = query("quota_mark")
_WRITTEN = query("quota_written")
_NOTE_DRIFT = query("quota_note_drift")
PRUNE = query("prune_quota_changes")
"""Names the weeks of the history that ended longer ago than so many seconds."""

PAGE = 5_000


class Kind(IntEnum):
    """What happened to a counter, as `quota_change.kind` stores it."""

    NEW = 1
    GROWN = 2
    RESET = 3
    RESTORED = 4
    REFUNDED = 5
    WRITTEN = 6
    DETAIL = 7


class Told(msgspec.Struct, frozen=True):
    """One change, as an event tells it. Amounts are texts, so that no reader rounds them."""

    key: str
    user: str | None
    tenant: str | None
    period: str | None
    value: str
    delta: str
    epoch: int
    revision: int
    kind: Kind


class Taken(NamedTuple):
    """What writing some counters changed, and when by the database's clock; `told` by key, where it was asked for."""

    at: datetime
    new: int
    changed: int
    told: list[Told]


@dataclass(frozen=True, slots=True)
class QuotaLine:
    """One counter. `used` is what was used in all its epochs, `value` what it showed when it was last read."""

    tenant: str
    name: str
    key: str
    user: str | None
    key_tenant: str | None
    period: str | None
    value: Decimal
    used: Decimal
    epoch: int
    revision: int
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class QuotaChange:
    """One line of a counter's history, the newest first."""

    at: datetime
    tenant: str
    name: str
    user: str | None
    period: str | None
    key: str
    revision: int
    epoch: int
    kind: Kind
    delta: Decimal
    value: Decimal


class Standing(NamedTuple):
    """A counter to compare: whose it is, what it shows, and since when."""

    key: str
    user: str
    tenant: str
    period: str | None
    value: Decimal
    updated_at: datetime


_told = msgspec.json.Decoder(list[Told])


async def take(
    tx: Executor,
    stream: StreamId,
    tenant: TenantId,
    seq: int,
    counters: Iterable[Counter],
    *,
    is_restored: bool,
    may_refund: bool,
    tells: bool,
) -> Taken:
    """Write what differs from what is stored, and its history. The stream is locked by the caller.

    Args:
        counters: no key twice.
        is_restored: of a fall: its server lost a part of what it had counted.
        may_refund: of a fall: the counter may be taken back without having begun again.
        tells: give back what changed.
    """
    columns = [*zip(*((c.key, c.user, c.tenant, c.period, c.value, c.detail.decode()) for c in counters), strict=True)]
    given = [list(column) for column in columns] if columns else [[]] * 6
    row = await tx.fetchrow(_TAKE, stream, tenant, seq, tells, *given, is_restored, may_refund)
    assert row is not None  # an aggregate without `group by` has one row
    return Taken(row["at"], row["new"], row["changed"], _told.decode(row["told"]) if row["told"] else [])


async def connections(db: Executor, tenant: str | None = None, name: str | None = None) -> list[ConnectionId]:
    """The quota sources that are synced."""
    return [ConnectionId(row["id"]) for row in await db.fetch(_CONNECTIONS, tenant, name)]


class QuotaStore:
    """The reads, and the marks of a write-back."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def has_source(self, tenant: str, name: str | None) -> bool:
        """Whether a tenant has a source, of this name, also one that is not synced any more."""
        return bool(await self._db.fetchval(_HAS_SOURCE, tenant, name))

    async def lines(
        self, tenant: str | None, name: str | None, user: str | None, *, most: int | None = None
    ) -> AsyncIterator[QuotaLine]:
        """By tenant, name and key, `PAGE` at a time."""
        after, left = ("", "", ""), most
        while left is None or left > 0:
            limit = PAGE if left is None else min(PAGE, left)
            rows = await self._db.fetch(_LIST, tenant, name, user, *after, limit)
            for row in rows:
                yield QuotaLine(**row)
            if len(rows) < limit:
                return
            after = (rows[-1]["tenant"], rows[-1]["name"], rows[-1]["key"])
            left = None if left is None else left - len(rows)

    async def changes(self, tenant: str | None, name: str | None, user: str | None, most: int) -> list[QuotaChange]:
        """The newest changes."""
        rows = await self._db.fetch(_CHANGES, tenant, name, user, most)
        return [QuotaChange(**{**row, "kind": Kind(row["kind"])}) for row in rows]

    async def stream_of(self, connection: ConnectionId) -> StreamId | None:
        """None as long as the source was never read."""
        found: int | None = await self._db.fetchval(_STREAM, connection)
        return None if found is None else StreamId(found)

    async def standing(self, stream: StreamId) -> AsyncIterator[list[Standing]]:
        """The counters that name a user, by key, `PAGE` at a time."""
        after = ""
        while rows := await self._db.fetch(_COUNTERS, stream, after, PAGE):
            yield [Standing(*row) for row in rows]
            after = rows[-1]["key"]

    async def mark(self, tx: Executor, stream: StreamId, values: Mapping[str, Decimal]) -> None:
        """Note what counters are about to be set to, or may have been set to while others looked."""
        await tx.execute(_MARK, stream, list(values), list(values.values()))

    async def written(
        self, tx: Executor, stream: StreamId, seq: int, values: Mapping[str, Decimal], written: Collection[str]
    ) -> None:
        """Of marked ones, note that those of `written` were set, and that the others were not there any more."""
        await tx.execute(_WRITTEN, stream, list(values), list(values.values()), [key in written for key in values], seq)

    async def note_drift(self, stream: StreamId, counters: int, counted: Decimal, booked: Decimal) -> None:
        await self._db.execute(_NOTE_DRIFT, stream, counters, counted, booked, counted - booked)
