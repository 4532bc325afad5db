"""The statements of a flush, each one round trip; `daemon.sinks.ledger` says in which order and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from daemon.db.pool import Database, Executor, query
from daemon.db.text import storable
from daemon.domain.connection import ConnectionId, StreamId, TenantId
from daemon.domain.job import JobId, Summary
from daemon.domain.record import HASH_VERSION, GrainId, Pending, ReadyRow, Stored, Totals
from daemon.domain.window import Window

_LOCK_STREAMS = query("lock_streams")
_EPOCHS_OF = query("epochs_of")
_TAKE_BUCKETS = query("take_buckets")
_STORED_ROWS = query("stored_rows")
_BOOK_ROWS = query("book_rows")
_BOOK_VANISHED = query("book_vanished")
_NOTE_BOOKINGS = query("note_bookings")
_WRITE_BUCKETS = query("write_buckets")
_SUM_PENDING = query("sum_pending_buckets")
_END_STREAMS = query("end_streams")
_RAISE_FENCES = query("raise_fences")
_CLOSE_STREAMS = query("close_streams")
_STAMP_NEWS = query("stamp_news")
_OPEN_STREAMS = query("open_streams")
_PARK_STREAMS = query("park_streams")
_DEAD_LETTERS_OF = query("dead_letters_of")
_REMEMBER_DEAD = query("remember_dead")
_END_CONNECTIONS = query("end_connections")
_MAKE_PARTITIONS = query("make_partitions")
_NEXT_SEQS = query("next_seqs")
_OLD_MONTHS = query("old_ledger_months")
_DELETE_ROWS = query("delete_rows_before")
_DELETE_BUCKETS = query("delete_buckets_before")
_LOCK_TICK = query("lock_tick")
_WRITE_SUMMARY = query("write_summary")

BucketId = tuple[StreamId, datetime]

NEW, RESTATED, VANISHED = 1, 2, 3


class StreamFence(NamedTuple):
    """The newest answer that a stream has taken, under its lock, with the database's time."""

    last_seq: int
    last_window: Window | None
    now: datetime


class TakenBucket(NamedTuple):
    """A bucket that is ours to judge; its fence already stands at our seq."""

    hash_version: int
    digest: bytes
    pending: Pending | None
    is_new: bool


class BookRow(NamedTuple):
    """A row to write, as new or restated."""

    tenant_id: TenantId
    stream_id: StreamId
    bucket_start: datetime
    row: ReadyRow
    kind: int
    seq: int


class BucketWrite(NamedTuple):
    """What a bucket holds after this flush."""

    stream_id: StreamId
    bucket_start: datetime
    digest: bytes
    totals: Totals
    pending: Pending | None


class StreamEnd(NamedTuple):
    """How an attempt on a stream ended well: the new fence, cursors and stamps. None leaves a value as it is.

    `kind` is that of a collection; "" for reports.
    """

    stream_id: StreamId
    seq: int
    window: Window
    covered_from: datetime | None
    covered_to: datetime | None
    floor: datetime | None
    pages: int | None
    probe_digest: bytes | None
    is_hourly: bool
    is_daily: bool
    kind: str = ""


class ConnectionEnd(NamedTuple):
    """How a connection's turn in a batch ended.

    `is_proven`: at least one request got an answer. `sealed`: the credential that was used, as it was stored; what it
    met with tells nothing about another one. None: whichever is stored.
    """

    connection_id: ConnectionId
    is_proven: bool
    parked_reason: str | None
    sealed: bytes | None = None


async def next_seqs(db: Executor, count: int) -> list[int]:
    """`count` fresh poll_seqs, growing. Take one just before an attempt's first request (law 4)."""
    return [row[0] for row in await db.fetch(_NEXT_SEQS, count)]


async def make_partitions(db: Executor, instants: Iterable[datetime]) -> None:
    """Make sure that the ledger has a partition for the month of each instant. Outside of a flush."""
    await db.execute(_MAKE_PARTITIONS, list(instants))


async def drop_months(db: Database, kept: timedelta) -> list[str]:
    """Drop the ledger's months that ended longer ago than `kept`, with their rows and buckets; both sums stay equal.

    Polls must not read so far back again: `PollSettings.keep`.
    """
    dropped = []
    for month in await db.fetch(_OLD_MONTHS, kept):
        async with db.transaction(statement_timeout_ms=600_000) as tx:
            await tx.execute(_DELETE_ROWS, month["until"])
            await tx.execute(_DELETE_BUCKETS, month["until"])
            await tx.execute(f'drop table if exists "{month["name"]}"')  # another replica may have been first
        dropped.append(month["name"])
    return dropped


async def lock_streams(tx: Executor, streams: Iterable[StreamId]) -> dict[StreamId, StreamFence]:
    """Lock the streams in order; what comes back is missing those that no longer exist."""
    rows = await tx.fetch(_LOCK_STREAMS, sorted(set(streams)))
    return {
        row["id"]: StreamFence(
            row["last_seq"],
            Window(row["last_start"], row["last_end"]) if row["last_start"] is not None else None,
            row["now"],
        )
        for row in rows
    }


async def epochs_of(tx: Executor, streams: Iterable[StreamId]) -> dict[StreamId, list[tuple[datetime, GrainId]]]:
    """Each stream's grain epochs, oldest first, as (start, grain id). Read under the streams' locks."""
    found: dict[StreamId, list[tuple[datetime, GrainId]]] = {}
    for row in await tx.fetch(_EPOCHS_OF, sorted(set(streams))):
        found.setdefault(row["stream_id"], []).append((row["start_at"], row["grain_id"]))
    return found


async def take_buckets(
    tx: Executor, asked: Sequence[tuple[StreamId, datetime, int, bool]]
) -> dict[BucketId, TakenBucket]:
    """Lock and fence buckets, given as (stream, start, seq, has rows). Those that refuse are not in the result."""
    columns = _columns(sorted(asked), 4)
    rows = await tx.fetch(_TAKE_BUCKETS, *columns, HASH_VERSION)
    return {
        (row["stream_id"], row["bucket_start"]): TakenBucket(
            row["hash_version"],
            row["digest"],
            Pending(row["pending_since"], frozenset(row["pending_keys"] or ())) if row["pending_since"] else None,
            row["is_new"],
        )
        for row in rows
    }


async def stored_rows(tx: Executor, buckets: Iterable[BucketId]) -> dict[BucketId, list[Stored]]:
    """What the buckets hold now, tombstones included."""
    found: dict[BucketId, list[Stored]] = {}
    for row in await tx.fetch(_STORED_ROWS, *_columns(list(buckets), 2)):
        stored = Stored(row["row_key"], row["content_hash"], row["is_tombstone"])
        found.setdefault((row["stream_id"], row["bucket_start"]), []).append(stored)
    return found


async def book_rows(tx: Executor, rows: Sequence[BookRow]) -> None:
    """Write rows and their signed differences. No key may occur twice."""
    if not rows:
        return
    given = [
        (
            b.tenant_id,
            b.stream_id,
            b.bucket_start,
            b.row.key,
            b.row.content,
            b.row.dims_json,
            b.row.row.input_tokens,
            b.row.row.cache_read_tokens,
            b.row.row.cache_write_tokens,
            b.row.row.output_tokens,
            b.row.row.requests,
            b.row.row.quantity,
            b.row.row.unit,
            b.row.amount,
            b.row.currency,
            b.row.basis,
            b.row.rate_version,
            b.row.detail_json,
            b.kind,
            b.seq,
        )
        for b in rows
    ]
    await tx.execute(_BOOK_ROWS, *_columns(given, 20))


async def book_vanished(tx: Executor, keys: Sequence[tuple[StreamId, datetime, bytes]]) -> None:
    """Book keys down to zero."""
    if keys:
        await tx.execute(_BOOK_VANISHED, *_columns(keys, 3))


async def note_bookings(tx: Executor, seqs: Iterable[int], job: JobId) -> None:
    """Note which job booked the revisions of these poll_seqs: the way from a line of the ledger back to its cause."""
    if found := sorted(set(seqs)):
        await tx.execute(_NOTE_BOOKINGS, found, job)


async def write_buckets(tx: Executor, buckets: Sequence[BucketWrite]) -> None:
    """Store digests and totals; where rows are withheld, the totals are summed from what is stored."""
    if not buckets:
        return
    given = [
        (
            b.stream_id,
            b.bucket_start,
            b.digest,
            *b.totals,
            b.pending.since if b.pending else None,
            ",".join(sorted("\\x" + key.hex() for key in b.pending.keys)) if b.pending else "",
        )
        for b in buckets
    ]
    await tx.execute(_WRITE_BUCKETS, *_columns(given, 12), HASH_VERSION)
    pending = [(b.stream_id, b.bucket_start) for b in buckets if b.pending]
    if pending:
        await tx.execute(_SUM_PENDING, *_columns(pending, 2))


async def end_streams(tx: Executor, ends: Sequence[StreamEnd]) -> None:
    """Move fences, cursors and stamps."""
    if not ends:
        return
    given = [
        (
            e.stream_id,
            e.seq,
            e.window.start,
            e.window.end,
            e.covered_from,
            e.covered_to,
            e.floor,
            e.pages,
            e.probe_digest,
            e.is_hourly,
            e.is_daily,
        )
        for e in ends
    ]
    await tx.execute(_END_STREAMS, *_columns(given, 11))


async def raise_fences(tx: Executor, seqs: Mapping[StreamId, int]) -> None:
    """From its first item on, a reading of a collection bars those that began before it."""
    if seqs:
        await tx.execute(_RAISE_FENCES, list(seqs), list(seqs.values()))


async def stamp_news(tx: Executor, streams: Sequence[StreamId]) -> None:
    """Note, with the rows themselves, that something was booked (or withheld) in these streams."""
    if streams:
        await tx.execute(_STAMP_NEWS, list(streams))


async def close_streams(tx: Executor, job: JobId) -> None:
    """Give back to the ticks the stream that `job`, a poll_one, had to itself."""
    await tx.execute(_CLOSE_STREAMS, job)


async def open_streams(tx: Executor, jobs: Mapping[StreamId, JobId]) -> None:
    """Hand streams to the poll_one that each has now: ticks leave them out."""
    if jobs:
        await tx.execute(_OPEN_STREAMS, list(jobs), list(jobs.values()))


async def dead_letters_of(tx: Executor, streams: Iterable[StreamId]) -> dict[StreamId, JobId]:
    """The dead letters that still lie there for these streams."""
    rows = await tx.fetch(_DEAD_LETTERS_OF, sorted(streams))
    return {StreamId(row["id"]): JobId(row["dead_job"]) for row in rows}


async def remember_dead(tx: Executor, jobs: Mapping[StreamId, JobId]) -> None:
    """Note which job is, or is about to be, a stream's dead letter."""
    if jobs:
        await tx.execute(_REMEMBER_DEAD, list(jobs), list(jobs.values()))


async def park_streams(tx: Executor, reasons: Mapping[StreamId, str]) -> None:
    """Stop reading sources that the provider refuses, with the reason."""
    if reasons:
        await tx.execute(_PARK_STREAMS, list(reasons), [storable(reason) for reason in reasons.values()])


async def end_connections(tx: Executor, ends: Sequence[ConnectionEnd], job: JobId) -> None:
    """Close the connections' turn: the next tick may have them again."""
    if not ends:
        return
    rows = [(e.connection_id, e.is_proven, e.parked_reason and storable(e.parked_reason), e.sealed) for e in ends]
    await tx.execute(_END_CONNECTIONS, *_columns(rows, 4), job)


async def write_summary(
    tx: Executor, job: JobId, kind: str, slot: datetime | None, summary: Summary, request_id: str | None = None
) -> None:
    """Store what a batch did; the last batch of a tick finishes it."""
    await tx.execute(_LOCK_TICK, slot)
    await tx.execute(
        _WRITE_SUMMARY,
        job,
        slot,
        kind,
        summary.connections,
        summary.unchanged,
        summary.stored,
        summary.restated,
        summary.retried,
        summary.dead,
        summary.requests,
        summary.requests_saved,
        summary.rows,
        summary.duration_s,
        request_id,
        summary.items,
    )


def _columns(rows: Sequence[Sequence[object]], width: int) -> list[list[object]]:
    """Rows turned into the arrays that `unnest` takes."""
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]
