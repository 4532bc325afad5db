"""The reads that the command line, and later the web and the metrics, share: usage, spend, gaps, status, the laws; what
happens right now; and what caused or came of a delivery, a job or a booking.

Without `as_of`, sums are taken over the current rows: the same as over the ledger (a law that `doctor` checks), but a
row is one line there and one line per revision here, and it carries its dimensions with it. With `as_of` they are taken
over the ledger's deltas that had been booked by then.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Generic, TypeVar

import msgspec

from daemon.db.pool import Database, Record, query
from daemon.domain.errors import UsageError
from daemon.domain.job import SYSTEM_KEY
from daemon.domain.record import Basis
from daemon.domain.window import rfc3339

_HORIZON = query("insights_horizon")
_UNPRICED = query("insights_unpriced")
_GAPS = query("insights_gaps")
_TICKS = query("insights_ticks")
_STATUS = query("insights_status")
_LABELS = query("insights_stream_labels")
_HANDOVERS = query("insights_handovers")
_REPLICAS = query("insights_replicas")
_RUNNING = query("insights_running")
_QUEUE = query("insights_queue")
_SETTLED = query("insights_settled")
_FAILURES = query("insights_failures")
_TICK_OF_REQUEST = query("insights_tick_of_request")
_SLOT_OF_MESSAGE = query("insights_slot_of_message")
_DELIVERIES = query("insights_deliveries")
_BATCHES = query("insights_batches")
_ATTEMPTS = query("insights_attempts")
_JOB_OF_SEQ = query("insights_job_of_seq")
_READS = query("insights_reads")
_BOOKINGS = query("insights_bookings")

_REPORT_TIMEOUT_S = 600.0
STALE = timedelta(days=2)
SKEW_S_MAX = 2.0
MINUTES = 15
"""How far back the settled attempts of `activity` reach."""
FAILURES_FOR = timedelta(days=1)
LOG_BLOCKS = 1_000
"""Of the attempts log, from its end: 8 MB, some 80,000 attempts."""
KIND_ROWS = 10_000
"""Of each state of the queue, when its kinds are counted."""
REPLICAS_MAX, RUNNING_MAX, FAILURES_MAX = 100, 100, 20
ATTEMPTS_MAX, DELIVERIES_MAX = 50, 10
_OUTCOMES = {1: "done", 2: "retry", 3: "snooze", 4: "dead", 5: "cancelled", 8: "released", 9: "worker lost"}
OUTCOMES = tuple(_OUTCOMES.values())

# What a key means in SQL, over u (a row's dimensions), c (connection), t (tenant), s (stream).
_KEYS: dict[str, str] = {
    "tenant": "t.name",
    "connection": "c.name",
    "provider": "c.provider",
    "source": "s.source",
    "model": "coalesce(u.dims ->> 'model', u.detail ->> 'model')",
    "day": "to_char(u.bucket_start at time zone 'UTC', 'YYYY-MM-DD')",
    "hour": "to_char(u.bucket_start at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:00:00\"Z\"')",
    "month": "to_char(u.bucket_start at time zone 'UTC', 'YYYY-MM')",
    "project": "coalesce(u.dims ->> 'project_id', u.dims ->> 'workspace_id')",
    "api_key": "u.dims ->> 'api_key_id'",
    "user": "coalesce(u.dims ->> 'user_id', u.dims ->> 'actor')",
    "service_tier": "u.dims ->> 'service_tier'",
    "line_item": "coalesce(u.dims ->> 'line_item', u.dims ->> 'description')",
}
GROUP_KEYS = tuple(_KEYS)
_DIM = re.compile(r"dim:([a-z][a-z0-9_]{0,62})")
Line = TypeVar("Line")
METRICS = ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens", "requests")

_CURRENT = """
  select u.* from usage_row u where not u.is_tombstone
    and ($1::timestamptz is null or u.bucket_start >= $1) and ($2::timestamptz is null or u.bucket_start < $2)
    and $3::timestamptz is null
"""
# Rows that had vanished by then are left out, as they are above: they sum to nothing, and null must stay null.
_AS_OF = """
  select l.stream_id, l.bucket_start, r.dims, r.detail, r.currency, r.basis, l.input_tokens, l.cache_read_tokens,
    l.cache_write_tokens, l.output_tokens, l.requests, l.amount
  from (
    select stream_id, bucket_start, row_key, sum(input_tokens) as input_tokens,
      sum(cache_read_tokens) as cache_read_tokens, sum(cache_write_tokens) as cache_write_tokens,
      sum(output_tokens) as output_tokens, sum(requests) as requests, sum(amount) as amount,
      (array_agg(kind order by revision desc))[1] = 3 as is_gone
    from ledger
    where ($1::timestamptz is null or bucket_start >= $1) and ($2::timestamptz is null or bucket_start < $2)
      and booked_at <= $3
    group by 1, 2, 3
  ) l join usage_row r using (stream_id, bucket_start, row_key)
  where not l.is_gone
"""


@dataclass(frozen=True, slots=True)
class UsageLine:
    """`group` in the order that was asked for; a metric that no row reports is None."""

    group: tuple[tuple[str, str | None], ...]
    metrics: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True, slots=True)
class SpendLine:
    group: tuple[tuple[str, str | None], ...]
    amount: Decimal
    currency: str
    basis: Basis


@dataclass(frozen=True, slots=True)
class Question:
    """What to sum: buckets that start in [since, until), None meaning no bound.

    Attributes:
        group_by: of `GROUP_KEYS`, or `dim:<name>` for a provider's own dimension.
        cost_sources: (provider, source) pairs that report money, not usage.
        as_of: the answer as it was then; clamped to the oldest open flush.
    """

    since: datetime | None
    until: datetime | None
    group_by: Sequence[str]
    cost_sources: Collection[tuple[str, str]]
    as_of: datetime | None = None


@dataclass(frozen=True, slots=True)
class Report(Generic[Line]):
    """The lines, and the instant that was really answered for when `as_of` was asked: never past an open flush."""

    lines: tuple[Line, ...]
    as_of: datetime | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """`kind` is parked, paused, never_read, history (older buckets not reached yet) or stale."""

    tenant: str
    connection: str
    provider: str
    source: str | None
    kind: str
    from_at: datetime | None
    to_at: datetime | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick and how far it is.

    Attributes:
        done_in_time: batches done by the deadline; None until it has passed.
        is_complete: whether enough of them were; None while that is open.
    """

    slot_at: datetime
    created_at: datetime
    via: str
    request_id: str | None
    connections: int
    batches: int
    batches_done: int
    deadline_at: datetime | None
    done_in_time: int | None
    finished_at: datetime | None
    is_complete: bool | None = None

    def judged(self, ratio: float) -> Tick:
        """As `tick.incomplete` judges it: by the deadline, `ratio` of the batches. Without a deadline, all of them."""
        verdict: bool | None = None
        if self.done_in_time is not None:
            verdict = self.done_in_time >= ratio * self.batches
        elif self.finished_at is not None:
            verdict = self.deadline_at is None or self.finished_at <= self.deadline_at
        return replace(self, is_complete=verdict)


@dataclass(frozen=True, slots=True)
class Handovers:
    """The batches of one tick that were handed over to QStash.

    Attributes:
        published: those that QStash has accepted.
        delivery, failure, refusal: released by that.
        waiting: nothing has released them yet.
        deadline: nothing ever did, so that they ran when their hand-over deadline had come.
    """

    slot_at: datetime
    batches: int
    published: int
    delivery: int
    failure: int
    refusal: int
    waiting: int
    deadline: int


@dataclass(frozen=True, slots=True)
class Status:
    """`lag_s`: how long ago the connection that waits longest for its poll was last polled; None when none waits.

    `qstash_paused_s`: for how much longer nothing is handed over to QStash; None when something may be.
    """

    now: datetime
    tenants: int
    connections: dict[str, int]
    parked_sources: int
    dead_letters: int
    unpriced_rows: int
    lag_s: float | None
    due: int
    replicas: int
    qstash_paused_s: float | None
    qstash_pause_reason: str | None
    ticks: tuple[Tick, ...]
    handovers: tuple[Handovers, ...]


@dataclass(frozen=True, slots=True)
class Replica:
    """A worker that beats, or did until lately.

    Attributes:
        beat_s: since its last heartbeat.
        settled: what it settled within the last minute, by outcome.
    """

    worker: int
    info: str
    beat_s: float
    up_s: float
    running: int
    settled: dict[str, int]


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that a worker has. `tenant` is None for the system's own, which mix tenants; the rest is of polls only."""

    id: int
    kind: str
    tenant: str | None
    attempt: int
    worker: int
    running_s: float
    slot_at: datetime | None
    connections: int | None
    source: str | None


@dataclass(frozen=True, slots=True)
class KindCount:
    """How many jobs of a kind are in a state. `is_cut`: at least so many, for the state has more than are looked at."""

    kind: str
    state: str
    jobs: int
    is_cut: bool


@dataclass(frozen=True, slots=True)
class Minute:
    """What was settled in one of the last minutes, by outcome; the minute `ago` 0 ends now."""

    ago: int
    settled: dict[str, int]


@dataclass(frozen=True, slots=True)
class Failure:
    at: datetime
    job: int
    kind: str | None
    attempt: int
    outcome: str
    worker: int | None
    took_ms: int | None
    note: str | None


@dataclass(frozen=True, slots=True)
class Activity:
    """What happens right now.

    Attributes:
        running_total: `running` holds those that run longest.
        minutes: the last `MINUTES`, newest first; only those that the log was read for.
        settled_for_s: how far back the log was read for `minutes`.
        failures: attempts that ended in a retry, as a dead letter or with their worker, newest first.
    """

    now: datetime
    replicas: tuple[Replica, ...]
    running: tuple[RunningJob, ...]
    running_total: int
    kinds: tuple[KindCount, ...]
    minutes: tuple[Minute, ...]
    settled_for_s: float
    failures: tuple[Failure, ...]


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


class _PollBody(msgspec.Struct):
    """As much of a poll's body as can be shown."""

    connections: list[int] = []
    slot: datetime | None = None
    request_id: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One verdict of `doctor`; `detail` says what was found, `fix` what to do about it."""

    name: str
    is_ok: bool
    detail: str
    fix: str = ""


_LAWS: tuple[tuple[str, str, str], ...] = (
    (
        "ledger equals rows",
        query("law_ledger_equals_rows"),
        "report it with this output; `tallyd poll --full` re-reads",
    ),
    ("revisions contiguous", query("law_revisions_contiguous"), "report it with this output"),
    ("bucket totals equal rows", query("law_bucket_totals"), "`tallyd poll --full` on the connection re-reads them"),
    ("buckets within their grain", query("law_grain_epochs"), "`tallyd poll --full` on the connection re-reads them"),
    (
        "poll_seq ahead of every fence",
        query("law_poll_seq"),
        "look what else the copy has lost, then `tallyd doctor --fix`",
    ),
    ("ids ahead of every row", query("law_ids"), "look what else the copy has lost, then `tallyd doctor --fix`"),
    ("jobs in one state each", query("law_jobs_conserved"), "report it with this output"),
    ("ready jobs above the floor", query("law_ready_floor"), "`update ready_floor set at = '0'` in psql"),
    ("partitions made ahead", query("law_partitions"), "start a replica: its maintenance makes them"),
)


class Insights:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def usage(self, question: Question) -> Report[UsageLine]:
        """Token and request sums, of the usage reports only."""
        keys, expressions = _grouping(question.group_by)
        as_of = await self._settled(question.as_of)
        sums = ", ".join(f"sum(u.{metric})::bigint" for metric in METRICS)
        lines = []
        for row in await self._grouped(question, as_of, expressions, sums, where="not x.is_cost"):
            values = tuple(row.values())
            group, metrics = values[: len(keys)], values[len(keys) :]
            lines.append(UsageLine(tuple(zip(keys, group, strict=True)), tuple(zip(METRICS, metrics, strict=True))))
        return Report(tuple(lines), as_of)

    async def spend(self, question: Question) -> Report[SpendLine]:
        """Money, split by currency and basis: as the cost reports say, and as we price the usage reports.

        Unpriced rows have no amount and are not in here: see `unpriced`.
        """
        keys, expressions = _grouping(question.group_by)
        as_of = await self._settled(question.as_of)
        where = "u.amount is not null and u.basis = case when x.is_cost then 'provider' else 'local' end"
        expressions = [*expressions, "u.currency", "u.basis"]
        lines = []
        for row in await self._grouped(question, as_of, expressions, "trim_scale(sum(u.amount))", where=where):
            *group, currency, basis, amount = row.values()
            lines.append(SpendLine(tuple(zip(keys, group, strict=True)), amount, currency, basis))
        return Report(tuple(lines), as_of)

    async def _grouped(
        self, question: Question, as_of: datetime | None, expressions: Sequence[str], sums: str, *, where: str
    ) -> list[Record]:
        # Only texts of this module get into the statement; a dimension's name has passed its pattern.
        columns = "".join(f"{expression} as k{i}, " for i, expression in enumerate(expressions))
        places = ", ".join(str(i + 1) for i in range(len(expressions)))
        sql = (
            f"with u as ({_CURRENT if as_of is None else _AS_OF})\n"  # noqa: S608
            f"select {columns}{sums}\n"
            "from u join stream s on s.id = u.stream_id join connection c on c.id = s.connection_id\n"
            "join tenant t on t.id = c.tenant_id\n"
            "cross join lateral (select exists (select from unnest($4::text[], $5::text[]) as x(provider, source)"
            " where x.provider = c.provider and x.source = s.source) as is_cost) x\n"
            f"where {where}\n" + (f"group by {places} order by {places}" if places else "having count(*) > 0")
        )
        providers = [provider for provider, _ in question.cost_sources]
        sources = [source for _, source in question.cost_sources]
        return await self._db.fetch(
            sql, question.since, question.until, as_of, providers, sources, timeout_s=_REPORT_TIMEOUT_S
        )

    async def _settled(self, as_of: datetime | None) -> datetime | None:
        if as_of is None:
            return None
        horizon: datetime = await self._db.fetchval(_HORIZON)
        # Strictly before the horizon: a flush that began at that very instant may still be open.
        return min(as_of, horizon - timedelta(microseconds=1))

    async def unpriced(self, *, since: datetime | None, until: datetime | None) -> list[tuple[str | None, int]]:
        """(model, rows) without a known price, most rows first."""
        return [(row["model"], row["rows"]) for row in await self._db.fetch(_UNPRICED, since, until)]

    async def gaps(self, *, tenant: str | None = None, stale: timedelta = STALE) -> list[Gap]:
        """What the ledger does not hold though it should: by tenant, connection and source."""
        return [Gap(**row) for row in await self._db.fetch(_GAPS, tenant, stale)]

    async def status(self, *, ticks: int = 5, complete_ratio: float = 1.0) -> Status:
        """Args:
        complete_ratio: the share of a tick's batches that makes it complete.
        """
        row = await self._db.fetchrow(_STATUS)
        assert row is not None  # a select without `from` has one row
        last = await self._ticks(ticks, None, complete_ratio)
        slots = [tick.slot_at for tick in last]
        handovers = tuple(Handovers(**found) for found in await self._db.fetch(_HANDOVERS, slots))
        states = msgspec.json.decode(row["connections"], type=dict[str, int])
        return Status(**{**row, "connections": states}, ticks=last, handovers=handovers)

    async def _ticks(self, limit: int, slot: datetime | None, ratio: float) -> tuple[Tick, ...]:
        return tuple(Tick(**row).judged(ratio) for row in await self._db.fetch(_TICKS, limit, slot))

    async def activity(self) -> Activity:
        """What happens right now: short reads, one after the other, whose cost does not grow with the tables."""
        now = await self._db.now()
        settled = await self._db.fetch(_SETTLED, timedelta(minutes=MINUTES), LOG_BLOCKS)
        reached: datetime | None = settled[0]["reached_at"] if settled else None
        read_for = timedelta(minutes=MINUTES) if reached is None else min(now - reached, timedelta(minutes=MINUTES))
        kinds = await self._db.fetch(_QUEUE, KIND_ROWS)
        looked_at = {state: sum(row["jobs"] for row in kinds if row["state"] in state) for state in _TABLES}
        cut = {name for state, jobs in looked_at.items() if jobs >= KIND_ROWS for name in state}
        replicas = await self._db.fetch(_REPLICAS, REPLICAS_MAX)
        running = await self._db.fetch(_RUNNING, RUNNING_MAX)
        failures = await self._db.fetch(_FAILURES, FAILURES_FOR, LOG_BLOCKS, FAILURES_MAX)
        return Activity(
            now=now,
            replicas=tuple(
                Replica(
                    **row,
                    settled=_by_outcome(s for s in settled if (s["worker"], s["minutes_ago"]) == (row["worker"], 0)),
                )
                for row in replicas
            ),
            running=tuple(_running(row) for row in running),
            running_total=sum(row["jobs"] for row in kinds if row["state"] == "running"),
            kinds=tuple(KindCount(**row, is_cut=row["state"] in cut) for row in kinds),
            minutes=tuple(
                Minute(ago, _by_outcome(s for s in settled if s["minutes_ago"] == ago))
                for ago in range(MINUTES)
                if ago * 60 < read_for.total_seconds()
            ),
            settled_for_s=read_for.total_seconds(),
            failures=tuple(
                Failure(**{**row, "outcome": _OUTCOMES.get(row["outcome"], str(row["outcome"]))}) for row in failures
            ),
        )

    async def trace_request(self, request_id: str, *, limit: int, complete_ratio: float = 1.0) -> Trace | None:
        """The tick that a delivery asked for, by its request id or its message's id; None when none is known."""
        slot = await self._db.fetchval(_TICK_OF_REQUEST, request_id)
        slot = slot or await self._db.fetchval(_SLOT_OF_MESSAGE, request_id)
        return None if slot is None else await self.trace_slot(slot, limit=limit, complete_ratio=complete_ratio)

    async def trace_slot(self, slot: datetime, *, limit: int, complete_ratio: float = 1.0) -> Trace | None:
        """A tick with everything that came of it; None when the slot has none."""
        tick, deliveries = await self._cause(slot, complete_ratio)
        if tick is None:
            return None
        rows = await self._db.fetch(_BATCHES, slot, tick.created_at, tick.request_id, [], limit)
        return await self._traced(tick, deliveries, rows, limit=limit)

    async def trace_job(
        self, job: int, *, limit: int, seq: int | None = None, complete_ratio: float = 1.0
    ) -> Trace | None:
        """A job with its tick and what it booked, or what its read `seq` alone did; None when it has left no trace."""
        rows = await self._db.fetch(_BATCHES, None, None, None, [job], limit)
        if not rows:
            return None
        slot = _traced_job(rows[0]).slot_at
        tick, deliveries = (None, ()) if slot is None else await self._cause(slot, complete_ratio)
        trace = await self._traced(tick, deliveries, rows, limit=limit, seq=seq)
        attempts = tuple(
            TracedAttempt(**{**row, "outcome": _OUTCOMES.get(row["outcome"], str(row["outcome"]))})
            for row in await self._db.fetch(_ATTEMPTS, job, ATTEMPTS_MAX)
        )
        return replace(trace, attempts=attempts)

    async def trace_seq(self, seq: int, *, limit: int, complete_ratio: float = 1.0) -> Trace | None:
        """The read `seq`, from what it booked back to its cause; None when it booked nothing that is known."""
        job = await self._db.fetchval(_JOB_OF_SEQ, seq)
        if job is None:
            return None
        return await self.trace_job(job, limit=limit, seq=seq, complete_ratio=complete_ratio)

    async def _cause(self, slot: datetime, ratio: float) -> tuple[Tick | None, tuple[Delivery, ...]]:
        ticks = await self._ticks(1, slot, ratio)
        rows = await self._db.fetch(_DELIVERIES, slot, DELIVERIES_MAX)
        # A delivery notes itself in the transaction of the tick that it makes, hence at the same now().
        made_at = ticks[0].created_at if ticks else None
        deliveries = tuple(Delivery(row["message_id"], row["at"], row["at"] == made_at) for row in rows)
        return (ticks[0] if ticks else None), deliveries

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
        bookings = await self._bookings(reads)
        jobs_total = rows[0]["total"] if rows else 0
        return Trace(tick, deliveries, jobs, jobs_total, (), bookings, reads[0]["total"] if reads else 0)

    async def _bookings(self, reads: Sequence[Record]) -> tuple[Booking, ...]:
        """What reads booked, those of one hour together, so that a job that ran twice scans nothing in between."""
        spans: dict[datetime, list[Record]] = {}
        for read in reads:
            spans.setdefault(read["booked_at"].replace(minute=0, second=0, microsecond=0), []).append(read)
        bookings: list[Booking] = []
        for span in spans.values():
            known = {read["poll_seq"]: read for read in span}
            since, until = min(read["booked_at"] for read in span), max(read["until"] for read in span)
            groups: dict[tuple[int, str, str, str, str], list[Record]] = {}
            for row in await self._db.fetch(_BOOKINGS, list(known), since, until, timeout_s=_REPORT_TIMEOUT_S):
                key = (row["poll_seq"], row["tenant"], row["connection"], row["provider"], row["source"])
                groups.setdefault(key, []).append(row)
            for key, parts in groups.items():
                read = known[key[0]]
                counts = {
                    name: sum(part[name] for part in parts) for name in ("new", "restated", "vanished", "repriced")
                }
                sums = tuple(
                    Sum(part["currency"], part["basis"], part["amount"]) for part in parts if part["amount"] is not None
                )
                bookings.append(
                    Booking(
                        poll_seq=key[0],
                        job=read["job_id"],
                        booked_at=read["booked_at"],
                        tenant=key[1],
                        connection=key[2],
                        provider=key[3],
                        source=key[4],
                        **counts,
                        sums=sums,
                    )
                )
        return tuple(sorted(bookings, key=lambda booking: (booking.poll_seq, booking.tenant, booking.connection)))

    async def laws(self) -> list[Check]:
        """Every law that SQL can check, each in one statement."""
        checks = []
        for name, sql, fix in _LAWS:
            rows = await self._db.fetch(sql, timeout_s=_REPORT_TIMEOUT_S)
            checks.append(Check(name, not rows, await self._described(rows) if rows else "holds", fix if rows else ""))
        return checks

    async def clock_skew(self) -> Check:
        """The middle of the round trip against the database's clock. Only logs and deadlines depend on it."""
        before = datetime.now(UTC)
        there: datetime = await self._db.fetchval("select clock_timestamp()")
        skew_s = abs((there - (before + (datetime.now(UTC) - before) / 2)).total_seconds())
        is_ok = skew_s <= SKEW_S_MAX
        return Check("clock", is_ok, f"{skew_s:.3f} s from the database's", "" if is_ok else "set the clock by NTP")

    async def _described(self, rows: Sequence[Record]) -> str:
        ids = [row["stream_id"] for row in rows if row.get("stream_id") is not None]
        labels = {row["id"]: row["label"] for row in await self._db.fetch(_LABELS, ids)} if ids else {}
        shown = []
        for row in rows[:5]:
            values = dict(row)
            stream_id = values.pop("stream_id", None)
            where = "" if stream_id is None else f"{labels.get(stream_id, f'stream {stream_id}')}: "
            shown.append(where + ", ".join(f"{key} {_plain(value)}" for key, value in values.items()))
        return "; ".join(shown) + (f"; and {len(rows) - 5} more" if len(rows) > 5 else "")


def _grouping(group_by: Sequence[str]) -> tuple[list[str], list[str]]:
    keys: list[str] = []
    expressions: list[str] = []
    for key in group_by:
        dim = _DIM.fullmatch(key)
        if key in keys:
            raise UsageError("--group-by", f"{key} is there twice", "name each key once")
        if dim is None and key not in _KEYS:
            raise UsageError("--group-by", f"unknown key {key!r}", f"use {', '.join(_KEYS)} or dim:<name>")
        keys.append(key)
        expressions.append(_KEYS[key] if dim is None else f"u.dims ->> '{dim[1]}'")
    return keys, expressions


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return rfc3339(value)
    return format(value, "f") if isinstance(value, Decimal) else str(value)


_TABLES = (("available",), ("scheduled", "retryable"), ("running",), ("discarded",))
"""Which states share a table of the queue."""


def _by_outcome(rows: Iterable[Record]) -> dict[str, int]:
    """Attempts by outcome, those alone that there are, in the order of `OUTCOMES`."""
    counts: dict[int, int] = {}
    for row in rows:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + row["jobs"]
    return {name: counts[code] for code, name in _OUTCOMES.items() if code in counts}


def _poll_body(body: bytes | None) -> _PollBody:
    """What a body says; nothing where another version has written it otherwise."""
    try:
        return _PollBody() if body is None else msgspec.json.decode(body, type=_PollBody)
    except msgspec.MsgspecError:
        return _PollBody()


def _running(row: Record) -> RunningJob:
    body = _poll_body(row["body"])
    tenant = None if row["key_id"] == SYSTEM_KEY else row["tenant"] or f"tenant {row['key_id']}"
    return RunningJob(
        row["id"],
        row["kind"],
        tenant,
        row["attempt"],
        row["worker"],
        row["running_s"],
        body.slot,
        len(body.connections) if body.connections else None,
        body.source,
    )


def _traced_job(row: Record) -> TracedJob:
    body = _poll_body(row["body"])
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
