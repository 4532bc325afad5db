"""Step 7 of 8, sinks: the ledger, which books what was read and nothing else (laws 2 to 5).

One flush is one transaction, always in this order:

    lease ─> streams ─> all buckets ─> rows and ledger ─> buckets ─> stream ends ─> connections ─> summary, settle
    fence    fence      fence, judge   signed deltas      digests    cursors
             └────────> collections, each in its taker ────────────>┘

The lease lock fences a zombie, the stream lock serialises the flushes of one stream (so that no two of them can wait
for each other's buckets), and each bucket refuses an answer that is older than what it took. Old values are read in a
statement that starts after the locks are held.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Protocol

import structlog

from daemon.db import ledger as store
from daemon.db.pool import Database, Session
from daemon.domain.collection import Collected
from daemon.domain.connection import Connection, Stream, StreamId
from daemon.domain.errors import DataRejectedError, DeadlockError
from daemon.domain.job import JobId
from daemon.domain.record import GrainId, Pending, ReadyBucket
from daemon.domain.window import Width
from daemon.records.restate import Change, Witness, judge

DEADLOCK_TRIES = 5

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Piece:
    """One complete snapshot of one stream, ready to book.

    `witnesses` names the buckets that a second read confirms; the others have none.
    """

    connection: Connection
    stream: Stream
    seq: int
    grain_id: GrainId
    width: Width
    buckets: Sequence[ReadyBucket]
    witnesses: Mapping[datetime, Witness] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(len(bucket.rows) for bucket in self.buckets)

    def cut(self, rows: int) -> Iterator[Piece]:
        """Parts of about that many rows at the most. A bucket is never cut: it is judged as a whole."""
        part: list[ReadyBucket] = []
        count = 0
        for bucket in self.buckets:
            if part and count + len(bucket.rows) > rows:
                yield replace(self, buckets=tuple(part))
                part, count = [], 0
            part.append(bucket)
            count += len(bucket.rows)
        if part:
            yield replace(self, buckets=tuple(part))


@dataclass(frozen=True, slots=True)
class Lot:
    """Some items of one collection, ready to be taken by the taker of their kind."""

    connection: Connection
    stream: Stream
    kind: str
    seq: int
    part: Collected

    @property
    def rows(self) -> int:
        return len(self.part.items)

    def cut(self, rows: int) -> Iterator[Lot]:
        """Parts of that many items at the most; one without items still tells what could not be read."""
        items = self.part.items
        for at in range(0, max(1, len(items)), rows):
            yield replace(self, part=replace(self.part, items=items[at : at + rows]))


class Taker(Protocol):
    """What writes the items of collections of one kind, in the transaction of a flush.

    The streams are locked, and every lot is of the newest reading that has begun: no other one of the same collection
    writes before this transaction ends.
    """

    async def take(self, tx: Session, lots: Sequence[Lot]) -> Mapping[StreamId, Effect]:
        """Write what differs from what is stored. The same lot taken again changes nothing."""
        ...

    async def end(self, tx: Session, ends: Mapping[StreamId, int]) -> Mapping[StreamId, Effect]:
        """Collections whose reading of that seq came to its end: what it did not hold is gone."""
        ...


@dataclass(frozen=True, slots=True)
class Effect:
    """What booking did to one stream, in revisions; `refused` counts buckets, `items` what a collection held."""

    new: int = 0
    restated: int = 0
    restated_closed: int = 0
    vanished: int = 0
    withheld: int = 0
    refused: int = 0
    items: int = 0

    @property
    def rows(self) -> int:
        return self.new + self.restated + self.vanished

    def __add__(self, other: Effect) -> Effect:
        return Effect(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


Effects = Mapping[StreamId, Effect]
LockLease = Callable[[Session], Awaitable[None]]
"""Locks the lease of the job whose flush it is, or raises LeaseLostError."""
Step = Callable[[Session, Effects], Awaitable[None]]
"""Something that commits with a flush, and may depend on what the flush changed."""


@dataclass(slots=True)
class Flush:
    """What goes to the ledger in one transaction.

    Attributes:
        job: the poll that holds the lease.
        ends, connection_ends, parked: see the statements of the same names in `daemon.db.ledger`.
        also: further steps of the transaction, such as follow-up jobs, or the summary with the settling of the job.
    """

    job: JobId
    pieces: list[Piece] = field(default_factory=list)
    lots: list[Lot] = field(default_factory=list)
    ends: list[store.StreamEnd] = field(default_factory=list)
    connection_ends: list[store.ConnectionEnd] = field(default_factory=list)
    parked: dict[StreamId, str] = field(default_factory=dict)
    also: list[Step] = field(default_factory=list)


class LedgerSink:
    """Books pieces in Postgres.

    Args:
        takers: of lots, by their kind.
    """

    def __init__(self, db: Database, takers: Mapping[str, Taker] | None = None) -> None:
        self._db = db
        self._takers = takers or {}
        self._months: set[tuple[int, int]] = set()

    async def book(self, flush: Flush, lock_lease: LockLease) -> Effects:
        """Commit a flush.

        Args:
            lock_lease: locks the lease of the job, or raises LeaseLostError: then nothing of the flush is written.

        Raises:
            LeaseLostError: another replica has the job now.
            DataRejectedError: Postgres refuses some of the data; nothing is written. See `find_culprits`.
            StorageUnavailableError: nothing is written, or, if the reply to the commit was lost, all of it is. Booking
                it again is refused by the fences, so nothing is ever booked twice.
        """
        await self._prepare_partitions(flush.pieces)
        for attempt in range(DEADLOCK_TRIES):
            try:
                async with self._db.transaction() as tx:
                    await lock_lease(tx)
                    return await self._write(tx, flush)
            except DeadlockError:
                if attempt == DEADLOCK_TRIES - 1:
                    raise
                log.info("flush.deadlocked", job_id=flush.job, attempt=attempt)
        raise AssertionError("unreachable")

    async def find_culprits(self, flush: Flush, lock_lease: LockLease) -> dict[StreamId, DataRejectedError]:
        """Bisect a refused flush: which streams hold what Postgres refuses. Nothing is written."""
        streams = sorted({p.stream.id for p in flush.pieces} | {lot.stream.id for lot in flush.lots})
        return await self._bisect(flush, streams, lock_lease)

    async def _bisect(
        self, flush: Flush, streams: Sequence[StreamId], lock_lease: LockLease
    ) -> dict[StreamId, DataRejectedError]:
        try:
            await self._rehearse(flush, set(streams), lock_lease)
        except DataRejectedError as error:
            if len(streams) == 1:
                return {streams[0]: error}
            middle = len(streams) // 2
            left = await self._bisect(flush, streams[:middle], lock_lease)
            return left | await self._bisect(flush, streams[middle:], lock_lease)
        return {}

    async def _rehearse(self, flush: Flush, streams: set[StreamId], lock_lease: LockLease) -> None:
        part = Flush(
            flush.job,
            pieces=[piece for piece in flush.pieces if piece.stream.id in streams],
            lots=[lot for lot in flush.lots if lot.stream.id in streams],
        )
        try:
            async with self._db.transaction() as tx:
                await lock_lease(tx)
                await self._write(tx, part)
                raise _Rollback
        except _Rollback:
            return

    async def _prepare_partitions(self, pieces: Sequence[Piece]) -> None:
        starts = {bucket.start for piece in pieces for bucket in piece.buckets if bucket.rows}
        missing = [start for start in starts if (start.year, start.month) not in self._months]
        if missing:
            await store.make_partitions(self._db, missing)
            self._months.update((start.year, start.month) for start in missing)

    async def _write(self, tx: Session, flush: Flush) -> Effects:
        effects: dict[StreamId, Effect] = {}
        locked = {p.stream.id for p in flush.pieces} | {lot.stream.id for lot in flush.lots}
        locked |= {e.stream_id for e in flush.ends}
        locked |= set(flush.parked)
        if locked:
            fences = await store.lock_streams(tx, locked)
            effects = {stream: Effect() for stream in locked}
            if flush.pieces:
                await self._write_pieces(tx, flush, fences, effects)
            await self._write_lots(tx, flush, fences, effects)
            await store.end_streams(tx, flush.ends)
            await store.park_streams(tx, flush.parked)
        await store.end_connections(tx, flush.connection_ends, flush.job)
        for step in flush.also:
            await step(tx, effects)
        return effects

    async def _write_lots(
        self,
        tx: Session,
        flush: Flush,
        fences: Mapping[StreamId, store.StreamFence],
        effects: dict[StreamId, Effect],
    ) -> None:
        kinds: dict[str, list[Lot]] = {}
        for lot in flush.lots:
            fence = fences.get(lot.stream.id)
            if fence is None or fence.last_seq > lot.seq:
                effects[lot.stream.id] += Effect(refused=1)
            else:
                kinds.setdefault(lot.kind, []).append(lot)
        await store.raise_fences(tx, {lot.stream.id: lot.seq for lots in kinds.values() for lot in lots})
        taken: dict[StreamId, Effect] = {}
        for kind, lots in kinds.items():
            taken |= await self._takers[kind].take(tx, lots)
        for kind, taker in self._takers.items():
            ended = {
                end.stream_id: end.seq
                for end in flush.ends
                if end.kind == kind and (fence := fences.get(end.stream_id)) and fence.last_seq <= end.seq
            }
            for stream, effect in (await taker.end(tx, ended)).items() if ended else ():
                taken[stream] = taken.get(stream, Effect()) + effect
        for stream, effect in taken.items():
            effects[stream] += effect
        await store.stamp_news(tx, [stream for stream, effect in taken.items() if effect.rows])

    async def _write_pieces(
        self,
        tx: Session,
        flush: Flush,
        fences: Mapping[StreamId, store.StreamFence],
        effects: dict[StreamId, Effect],
    ) -> None:
        epochs = await store.epochs_of(tx, fences)
        asked: dict[store.BucketId, tuple[Piece, ReadyBucket]] = {}
        for piece in flush.pieces:
            fence = fences.get(piece.stream.id)
            owners = epochs.get(piece.stream.id, [])
            for bucket in piece.buckets:
                if fence is None or _is_fenced(fence, piece, bucket.start) or not _owns(owners, piece, bucket.start):
                    effects[piece.stream.id] += Effect(refused=1)
                else:
                    asked[piece.stream.id, bucket.start] = (piece, bucket)
        taken = await store.take_buckets(
            tx, [(stream, start, p.seq, bool(b.rows)) for (stream, start), (p, b) in asked.items()]
        )
        changed = {
            key: grip for key, grip in taken.items() if grip.pending is not None or grip.digest != asked[key][1].digest
        }
        stored = await store.stored_rows(tx, [key for key, grip in changed.items() if not grip.is_new])
        rows: list[store.BookRow] = []
        vanished: list[tuple[StreamId, datetime, bytes]] = []
        booked: set[int] = set()
        writes: list[store.BucketWrite] = []
        for key, grip in changed.items():
            piece, bucket = asked[key]
            now = fences[piece.stream.id].now
            change = judge(
                bucket,
                stored.get(key, ()),
                witness=piece.witnesses.get(bucket.start, "none"),
                pending=grip.pending,
                now=now,
            )
            effects[piece.stream.id] += _effect(change, is_closed=bucket.start + piece.width.delta <= now)
            tenant = piece.connection.tenant_id
            rows += [store.BookRow(tenant, *key, row, store.NEW, piece.seq) for row in change.new]
            rows += [store.BookRow(tenant, *key, row, store.RESTATED, piece.seq) for row in change.restated]
            vanished += [(*key, gone) for gone in change.vanished]
            if change.new or change.restated or change.vanished:
                booked.add(piece.seq)
            pending = Pending(change.pending_since, frozenset(change.withheld)) if change.pending_since else None
            writes.append(store.BucketWrite(*key, change.digest, bucket.totals, pending))
        for stream, start in asked.keys() - taken.keys():
            piece, bucket = asked[stream, start]
            effects[stream] += Effect(refused=int(bool(bucket.rows)))
        await store.book_rows(tx, rows)
        await store.book_vanished(tx, vanished)
        await store.note_bookings(tx, booked, flush.job)
        await store.write_buckets(tx, writes)
        await store.stamp_news(tx, [stream for stream, effect in effects.items() if effect.rows or effect.withheld])


class _Rollback(Exception):  # noqa: N818 - not an error: it ends a rehearsal
    pass


def _is_fenced(fence: store.StreamFence, piece: Piece, start: datetime) -> bool:
    """Whether a newer answer covered this bucket, also one that changed nothing."""
    return fence.last_seq > piece.seq and fence.last_window is not None and start in fence.last_window


def _owns(epochs: Sequence[tuple[datetime, GrainId]], piece: Piece, start: datetime) -> bool:
    """Whether the piece's grain is the one that owns the bucket (schedule 7)."""
    at = bisect_right(epochs, start, key=lambda epoch: epoch[0])
    return at > 0 and epochs[at - 1][1] == piece.grain_id


def _effect(change: Change, *, is_closed: bool) -> Effect:
    return Effect(
        new=len(change.new),
        restated=len(change.restated),
        restated_closed=len(change.restated) + len(change.vanished) if is_closed else 0,
        vanished=len(change.vanished),
        withheld=len(change.withheld),
    )
