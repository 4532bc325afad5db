"""Quota counters against the ledger: how far they stand apart, and, where that is wanted, setting them right.

A `quota_drift` job follows each sync of a source that says what its counters measure. What is written back is the
ledger's own figure, never a difference, so that doing it twice changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple, Protocol, cast

import msgspec
import structlog

from daemon.db import ledger, streams
from daemon.db.insights import Insights, Question
from daemon.db.pool import Database, Session
from daemon.db.quota import QuotaStore, Standing
from daemon.db.secrets import Keyring
from daemon.domain.connection import Connection, ConnectionId, StreamId, Target
from daemon.domain.errors import PermanentError
from daemon.domain.job import Completed, Discarded, Job, NewJob, Outcome
from daemon.domain.overlap import Gateway
from daemon.domain.ports import Caller
from daemon.domain.window import Window
from daemon.queue.burial import letter_of, mourn
from daemon.queue.postgres import PostgresQueue
from daemon.worker.poll import PollDeps, grains_of

QUOTA_DRIFT = "quota_drift"
SOURCE = "quota"
PERIODS_KEPT = timedelta(days=35)
"""Counters whose period ended longer ago are left alone: the ledger may have lost what they counted."""
WRITE_MAX = 1_000
TOTAL = "total_tokens"

log = structlog.get_logger()


class DriftOrder(msgspec.Struct, frozen=True):
    """The body of a `quota_drift` job."""

    connection: int


class Setter(Protocol):
    """A poller whose counters can be set."""

    async def write(self, target: Target, values: Mapping[str, Decimal], call: Caller) -> set[str]:
        """Set those that exist, and leave their expiry alone. Returns which ones did."""
        ...


@dataclass(frozen=True, slots=True)
class Measure:
    """What the counters of a source count, as its settings say.

    Attributes:
        name: a sum of the ledger: one of `METRICS`, "total_tokens", or "amount", which is our own price in USD.
        dimension: the reports' dimension that holds what is the user in a key.
        unit: what one of a counter is in the ledger's terms, such as 0.01 where it counts cents.
        window: how far back a counter without a period counts: "day", "month" or "all".
    """

    name: str
    dimension: str
    unit: Decimal = Decimal(1)
    window: str = "month"

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Measure | None:
        """None where the settings do not say what is counted."""
        if "measure" not in settings:
            return None
        unit = Decimal(str(settings.get("unit", 1)))
        return cls(str(settings["measure"]), str(settings["dimension"]), unit, str(settings.get("window", "month")))


class Drift(NamedTuple):
    """One counter against the ledger, both in the counter's units. `booked` is None where the ledger has nothing."""

    key: str
    user: str
    tenant: str
    period: str | None
    counted: Decimal
    booked: Decimal | None

    @property
    def drift(self) -> Decimal:
        return self.counted - (self.booked or 0)


@dataclass(frozen=True, slots=True)
class QuotaDeps:
    """What counting and setting works with."""

    db: Database
    keyring: Keyring
    insights: Insights
    store: QuotaStore
    poll: PollDeps
    cost_sources: frozenset[tuple[str, str]]
    gateways: Sequence[Gateway]


class FollowUp:
    """Enqueues the comparison of the sources that have just been read, in the transaction that ends the reading."""

    def __init__(self, queue: PostgresQueue) -> None:
        self._queue = queue

    async def __call__(self, tx: Session, found: Sequence[StreamId]) -> None:
        rows = await streams.settings_of(tx, found)
        jobs = [
            NewJob(
                QUOTA_DRIFT,
                msgspec.json.encode(DriftOrder(connection)),
                key=tenant,
                prio=150,
                dedup_id=f"{QUOTA_DRIFT} {connection}",
                only_unclaimed=True,
                timeout_s=300.0,
            )
            for tenant, connection, settings in rows
            if Measure.of(settings) is not None
        ]
        await self._queue.enqueue(jobs, tx)


async def run_drift(job: Job, deps: QuotaDeps) -> Outcome:
    """Compare a source's counters with the ledger, note the sum, and set them where its settings ask for that."""
    order = msgspec.json.decode(job.body, type=DriftOrder)
    connection = await _connection(deps, ConnectionId(order.connection))
    if connection is None or connection.state in ("paused", "archived"):
        return Completed(note="the source is not synced any more")
    settings = connection.target.settings
    stream = await deps.store.stream_of(connection.id)
    if stream is None or Measure.of(settings) is None:
        return Completed(note="nothing to compare")
    counters, counted, booked, written = 0, Decimal(0), Decimal(0), 0
    refusal: PermanentError | None = None
    async for lines in compare(deps, connection, stream):
        known = [line for line in lines if line.booked is not None]
        counters += len(lines)
        counted += sum((line.counted for line in lines), Decimal(0))
        booked += sum((line.booked for line in known if line.booked is not None), Decimal(0))
        if settings.get("write_back") and refusal is None:
            try:
                written += await write_back(deps, connection, stream, known)
            except PermanentError as error:  # the figure is worth having all the same
                refusal = error
    await deps.store.note_drift(stream, counters, counted, booked)
    log.info(
        "quota.compared",
        connection=connection.label,
        counters=counters,
        counted=counted,
        booked=booked,
        drift=counted - booked,
        written=written,
    )
    if refusal is not None:
        return await _refused(job, deps, str(refusal))
    return Completed(note=f"{counters} counters compared, {written} written back")


async def _refused(job: Job, deps: QuotaDeps, reason: str) -> Outcome:
    """One dead letter of a source, not one after each sync."""
    async with deps.db.transaction() as tx:
        letter = await letter_of(tx, job)
        if letter is None:
            return Discarded(reason)
        await mourn(tx, {letter: reason})
    return Completed(note=f"refused, as dead letter {letter} says")


async def compare(deps: QuotaDeps, connection: Connection, stream: StreamId) -> AsyncIterator[list[Drift]]:
    """Each counter of a source that names a user with the ledger's figure, some thousand at a time.

    Raises:
        PermanentError: the settings do not say what the counters measure.
    """
    measure = Measure.of(connection.target.settings)
    if measure is None:
        raise PermanentError(
            f"{connection.label}: does not say what its counters measure; "
            f"`tallyd connections set {connection.label} measure=total_tokens dimension=user_id`"
        )
    now = await deps.db.now()
    sums = _Sums(deps, measure)
    async for page in deps.store.standing(stream):
        lines = []
        for counter in page:
            window = _window(counter, measure, now)
            if window is not None:
                booked = await sums.of(window, counter)
                if booked is None and counter.period is None and counter.updated_at < window.start:
                    continue  # what it shows was counted before: it was not reset since, or its key is gone
                lines.append(Drift(counter.key, counter.user, counter.tenant, counter.period, counter.value, booked))
        yield lines


class _Sums:
    """The ledger's sums by tenant and user, one report for each window."""

    def __init__(self, deps: QuotaDeps, measure: Measure) -> None:
        self._deps = deps
        self._measure = measure
        self._known: dict[Window, dict[tuple[str, str], Decimal]] = {}

    async def of(self, window: Window, counter: Standing) -> Decimal | None:
        if window not in self._known:
            self._known[window] = await self._read(window)
        return self._known[window].get((counter.tenant, counter.user))

    async def _read(self, window: Window) -> dict[tuple[str, str], Decimal]:
        measure = self._measure
        groups = ("tenant", f"dim:{measure.dimension}")
        deps = self._deps
        question = Question(window.start, window.end, groups, deps.cost_sources, gateways=deps.gateways)
        sums: dict[tuple[str, str], Decimal] = {}
        if measure.name == "amount":
            spend = await deps.insights.spend(question)
            found = [(line.group, line.amount) for line in spend.lines if line.basis == "local"]
        else:
            names = ("input_tokens", "output_tokens") if measure.name == TOTAL else (measure.name,)
            usage = await deps.insights.usage(question)
            found = [
                (line.group, Decimal(sum(dict(line.metrics)[name] or 0 for name in names))) for line in usage.lines
            ]
        for group, amount in found:
            (_, tenant), (_, user) = group
            if tenant is not None and user is not None:
                sums[tenant, user] = sums.get((tenant, user), Decimal(0)) + amount / measure.unit
        return sums


def settable(line: Drift) -> Decimal | None:
    """What a counter is to be set to, as it can hold it: one that counts in whole numbers would refuse a fraction for
    ever. None where it shows that already, or the ledger has nothing.
    """
    if line.booked is None:
        return None
    is_whole = line.counted == line.counted.to_integral_value()
    value = line.booked.to_integral_value(ROUND_HALF_UP) if is_whole else line.booked
    return None if value == line.counted else value


async def write_back(deps: QuotaDeps, connection: Connection, stream: StreamId, lines: Sequence[Drift]) -> int:
    """Set counters to what the ledger holds, where they differ. Returns how many were.

    Marked first and confirmed after: a reading that meets a counter between the two begins an epoch there, whichever
    value it finds. One that began before the confirmation is refused from then on, since it may have seen the counter as
    it was. Where one has written meanwhile, it may have met either value: the counters stay marked for the next one.
    """
    wanted = {line.key: value for line in lines if (value := settable(line)) is not None}
    setter = cast("Setter", deps.poll.pollers[connection.provider])
    count, keys = 0, list(wanted)
    for at in range(0, len(keys), WRITE_MAX):
        values = {key: wanted[key] for key in keys[at : at + WRITE_MAX]}
        seq = await deps.poll.seqs.next()
        async with deps.db.transaction() as tx:
            await ledger.lock_streams(tx, [stream])
            await ledger.raise_fences(tx, {stream: seq})
            await deps.store.mark(tx, stream, values)
        written = await setter.write(connection.target, values, deps.poll.caller(connection))
        count += len(written)
        after = await deps.poll.seqs.next()
        async with deps.db.transaction() as tx:
            fences = await ledger.lock_streams(tx, [stream])
            await ledger.raise_fences(tx, {stream: after})
            if stream in fences and fences[stream].last_seq == seq:
                await deps.store.written(tx, stream, seq, values, written)
            else:
                await deps.store.mark(tx, stream, {key: values[key] for key in written})
    return count


async def _connection(deps: QuotaDeps, id_: ConnectionId) -> Connection | None:
    """Raises what keeps its credential shut."""
    loaded, _ = await streams.load(
        deps.db, deps.keyring, [id_], lambda c: grains_of(deps.poll.pollers, c), await deps.db.now()
    )
    if not loaded:
        return None
    if loaded[0].problem is not None:
        raise loaded[0].problem
    return loaded[0].connection


# ── Periods ─────────────────────────────────────────────────────────────────────────────────────

_PERIOD = re.compile(r"(\d{4})(?:-?(\d{2})(?:-?(\d{2}))?)?", re.ASCII)


def period_window(text: str) -> Window | None:
    """The UTC year, month or day that a key's period names, such as 2026-11 or 20261126; None for any other text."""
    found = _PERIOD.fullmatch(text)
    if found is None:
        return None
    year, month, day = found.groups()
    try:
        start = datetime(int(year), int(month or 1), int(day or 1), tzinfo=UTC)
        if day is not None:
            return Window(start, start + timedelta(days=1))
        if month is not None:
            return Window(start, _next_month(start))
        return Window(start, start.replace(year=start.year + 1))
    except (ValueError, OverflowError):
        return None


def _next_month(start: datetime) -> datetime:
    return (start.replace(day=1) + timedelta(days=32)).replace(day=1)


def _window(counter: Standing, measure: Measure, now: datetime) -> Window | None:
    """What a counter covers; None where its period says nothing, is long over, or has not begun: keys may name as many of
    those as there are days to come, and each would be a report of its own.
    """
    if counter.period is not None:
        window = period_window(counter.period)
        is_near = window is not None and window.end >= now - PERIODS_KEPT and window.start <= now
        return window if is_near else None
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    match measure.window:
        case "day":
            return Window(today, today + timedelta(days=1))
        case "month":
            return Window(today.replace(day=1), _next_month(today))
        case _:
            return Window(datetime(1970, 1, 1, tzinfo=UTC), _next_month(today))
