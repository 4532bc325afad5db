"""What caused and what came of a delivery, a tick, a job or a booking, as `tallyd trace` shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from itertools import groupby
from operator import itemgetter

from daemon.db.activity import poll_body, with_outcome
from daemon.db.insights import REPORT_TIMEOUT_S, Tick, read_ticks
from daemon.db.pool import Database, Record, query

_TICK_OF_REQUEST = query("causes_tick_of_request")
_SLOT_OF_MESSAGE = query("causes_slot_of_message")
_DELIVERIES = query("causes_deliveries")
_JOBS = query("causes_jobs")
_ATTEMPTS = query("causes_attempts")
_MESSAGE = query("causes_message")
_JOB_OF_SEQ = query("causes_job_of_seq")
_READS = query("causes_reads")
_BOOKINGS = query("causes_bookings")

ATTEMPTS_MAX, DELIVERIES_MAX = 50, 10
_BOOKED_BY = ("poll_seq", "tenant", "connection", "provider", "source")
_REVISIONS = ("new", "restated", "vanished", "repriced")


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message of QStash that asked for a tick. `is_maker`: it is the one that made it."""

    message_id: str
    at: datetime
    is_maker: bool


@dataclass(frozen=True, slots=True)
class HandoverHistory:
    """What became of one batch at QStash; `released_by` is delivery, failure or refusal."""

    place: int
    message_id: str | None
    published_at: datetime | None
    released_at: datetime | None
    released_by: str | None
    reported_at: datetime | None
    reported_status: int | None


@dataclass(frozen=True, slots=True)
class BatchSummary:
    finished_at: datetime
    connections: int
    unchanged: int
    stored: int
    restated: int
    retried: int
    dead: int
    requests: int
    rows: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class TracedJob:
    """A job by its state's public name, or "gone" where no log says any more how it ended; then `kind` is None."""

    id: int
    kind: str | None
    state: str
    slot_at: datetime | None
    request_id: str | None
    summary: BatchSummary | None
    handover: HandoverHistory | None


@dataclass(frozen=True, slots=True)
class TracedAttempt:
    at: datetime
    attempt: int
    outcome: str
    worker: int | None
    took_ms: int | None
    note: str | None


@dataclass(frozen=True, slots=True)
class Sum:
    """Money of one currency and one basis."""

    currency: str
    basis: str
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Booking:
    """What one read of one source booked, in revisions. `sums` has nothing of rows without a known price."""

    poll_seq: int
    job: int
    booked_at: datetime
    tenant: str
    connection: str
    provider: str
    source: str
    new: int
    restated: int
    vanished: int
    repriced: int
    sums: tuple[Sum, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """From a cause to its bookings.

    Attributes:
        tick: None for work that belongs to none, such as a backfill.
        attempts: of a trace of one job, newest first.
        jobs_total, reads_total: `jobs` and `bookings` are cut to the limit that was asked for.
        jobs: of the tick, or the one that was asked about.
    """

    tick: Tick | None
    deliveries: tuple[Delivery, ...]
    jobs: tuple[TracedJob, ...]
    jobs_total: int
    attempts: tuple[TracedAttempt, ...]
    bookings: tuple[Booking, ...]
    reads_total: int


class Causes:
    """Args:
    complete_ratio: the share of a tick's batches that makes it complete.
    """

    def __init__(self, db: Database, complete_ratio: float = 1.0) -> None:
        self._db = db
        self._complete_ratio = complete_ratio

    async def trace_request(self, request_id: str, *, limit: int) -> Trace | None:
        """The tick that a delivery asked for, by its request id or its message's id; None when none is known."""
        slot = await self._db.fetchval(_TICK_OF_REQUEST, request_id)
        slot = slot or await self._db.fetchval(_SLOT_OF_MESSAGE, request_id)
        return None if slot is None else await self.trace_slot(slot, limit=limit)

    async def trace_slot(self, slot: datetime, *, limit: int) -> Trace | None:
        """A tick with everything that came of it; None when the slot has none."""
        tick, deliveries = await self._cause(slot)
        if tick is None:
            return None
        rows = await self._db.fetch(_JOBS, slot, tick.created_at, tick.request_id, [], limit)
        return await self._traced(tick, deliveries, rows, limit=limit)

    async def trace_job(self, job: int, *, limit: int, seq: int | None = None) -> Trace | None:
        """A job with its tick and what it booked, or what its read `seq` alone did; None when it has left no trace."""
        rows = await self._db.fetch(_JOBS, None, None, None, [job], limit)
        if not rows:
            return None
        slot = _traced_job(rows[0]).slot_at
        tick, deliveries = (None, ()) if slot is None else await self._cause(slot)
        trace = await self._traced(tick, deliveries, rows, limit=limit, seq=seq)
        attempts = await self._db.fetch(_ATTEMPTS, job, ATTEMPTS_MAX)
        return replace(trace, attempts=tuple(TracedAttempt(**with_outcome(row)) for row in attempts))

    async def trace_message(self, job: int, salt: int, *, limit: int) -> Trace | None:
        """The job that delivers a message; None when none has this name."""
        found = await self._db.fetchval(_MESSAGE, job, salt)
        return None if found is None else await self.trace_job(job, limit=limit)

    async def trace_seq(self, seq: int, *, limit: int) -> Trace | None:
        """The read `seq`, from what it booked back to its cause; None when it booked nothing that is known."""
        job = await self._db.fetchval(_JOB_OF_SEQ, seq)
        return None if job is None else await self.trace_job(job, limit=limit, seq=seq)

    async def _cause(self, slot: datetime) -> tuple[Tick | None, tuple[Delivery, ...]]:
        ticks = await read_ticks(self._db, 1, slot, self._complete_ratio)
        tick = ticks[0] if ticks else None
        rows = await self._db.fetch(_DELIVERIES, slot, DELIVERIES_MAX)
        # A delivery notes itself in the transaction of the tick that it makes, hence at the same now().
        made_at = None if tick is None else tick.created_at
        return tick, tuple(Delivery(**row, is_maker=row["at"] == made_at) for row in rows)

    async def _traced(
        self,
        tick: Tick | None,
        deliveries: tuple[Delivery, ...],
        rows: Sequence[Record],
        *,
        limit: int,
        seq: int | None = None,
    ) -> Trace:
        jobs = tuple(_traced_job(row) for row in rows)
        reads = await self._db.fetch(_READS, [job.id for job in jobs], seq, limit)
        return Trace(
            tick,
            deliveries,
            jobs,
            jobs_total=rows[0]["total"] if rows else 0,
            attempts=(),
            bookings=await self._bookings(reads),
            reads_total=reads[0]["total"] if reads else 0,
        )

    async def _bookings(self, reads: Sequence[Record]) -> tuple[Booking, ...]:
        """What reads booked, those of one hour together, so that a job that ran twice scans nothing in between."""
        spans: dict[datetime, list[Record]] = {}
        for read in reads:
            spans.setdefault(read["booked_at"].replace(minute=0, second=0, microsecond=0), []).append(read)
        bookings: list[Booking] = []
        for span in spans.values():
            known = {read["poll_seq"]: read for read in span}
            since, until = min(read["booked_at"] for read in span), max(read["until"] for read in span)
            rows = await self._db.fetch(_BOOKINGS, list(known), since, until, timeout_s=REPORT_TIMEOUT_S)
            parts = groupby(rows, itemgetter(*_BOOKED_BY))
            bookings.extend(_booking(known[key[0]], list(found)) for key, found in parts)
        return tuple(sorted(bookings, key=lambda booking: (booking.poll_seq, booking.tenant, booking.connection)))


def _booking(read: Record, parts: Sequence[Record]) -> Booking:
    """What the read booked of one source; `parts` are by currency and basis."""
    return Booking(
        job=read["job_id"],
        booked_at=read["booked_at"],
        **{name: parts[0][name] for name in _BOOKED_BY},
        **{name: sum(part[name] for part in parts) for name in _REVISIONS},
        sums=tuple(
            Sum(part["currency"], part["basis"], part["amount"]) for part in parts if part["amount"] is not None
        ),
    )


def _traced_job(row: Record) -> TracedJob:
    body = poll_body(row["body"])
    summary = handover = None
    if row["finished_at"] is not None:
        summary = BatchSummary(**{name: row[name] for name in BatchSummary.__dataclass_fields__})
    if row["place"] is not None:
        handover = HandoverHistory(**{name: row[name] for name in HandoverHistory.__dataclass_fields__})
    return TracedJob(
        row["id"],
        row["kind"],
        row["state"],
        row["slot_at"] or body.slot,
        row["request_id"] or body.request_id,
        summary,
        handover,
    )
