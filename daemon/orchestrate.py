"""Step 2 of 8, orchestrate: one tick per slot, made by whichever replica inserts it first.

A tick is one transaction: its row, the due connections with their next due time, and the batches. Whoever loses the
race gets nothing; a crash undoes all of it. Missed slots are not replayed: the windows of the next tick catch up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import anyio
import structlog

from daemon.db import handovers, ticks
from daemon.db.pool import Database, Session
from daemon.domain.connection import ConnectionId
from daemon.domain.errors import UsageError
from daemon.domain.job import Job, NewJob, WorkerId
from daemon.domain.window import EPOCH, floor_to, rfc3339
from daemon.queue.postgres import PostgresQueue
from daemon.queue.qstash import publish_jobs
from daemon.telemetry import metrics
from daemon.telemetry.traces import span
from daemon.worker.ladder import Mode
from daemon.worker.poll import POLL, POLL_ATTEMPTS_MAX, PollOrder

log = structlog.get_logger()

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
IDLE_LADDER = ((7 * DAY, 6 * HOUR), (DAY, HOUR), (HOUR, timedelta(minutes=15)))
"""(unchanged for at least, poll this often), slowest first; below the last rung each tick polls."""
SYNC_TIMEOUT_S = 900.0
"""A collection may be a million items long."""


@dataclass(frozen=True, slots=True)
class TickSettings:
    """How ticks are cut.

    Attributes:
        tick_s: length of a slot; slots start at multiples of it since the Unix epoch, by the database's clock.
        batch_size: connections a job.
        batch_timeout_s: how long a batch may run.
        complete_s: how long after the tick its batches ought to be done.
        hand_over_s: how long batches that are handed over to QStash wait for it.
    """

    tick_s: int = 300
    batch_size: int = 100
    batch_timeout_s: float = 300.0
    complete_s: float = 300.0
    hand_over_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Occasion:
    """What asks for a tick.

    Attributes:
        message_id: of the delivery. A message makes one tick at the most, however often it is delivered.
        request_id: goes with the tick, its batches and what they book, so that each can be traced back.
        hands_over: QStash is to trigger the batches; they run without it after `TickSettings.hand_over_s`.
        grace_s: only makes the tick when its slot is at least that old.
        early_s: an order that comes so shortly before a slot, while the current one has its tick, is meant for that
            slot: whoever sent it has another clock. It waits.
    """

    via: ticks.Via = "command"
    message_id: str | None = None
    request_id: str | None = None
    hands_over: bool = False
    grace_s: float = 0.0
    early_s: float = 0.0


BY_COMMAND = Occasion()


class DueConnection(NamedTuple):
    """A connection to poll, and when it last had news. `every_s`: polled so often whether it has or not."""

    id: ConnectionId
    changed_at: datetime
    every_s: int | None = None


class PlannedTick(NamedTuple):
    """Batches of connections, and when each connection is due again."""

    batches: tuple[tuple[ConnectionId, ...], ...]
    next_due: tuple[datetime, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """What asking for a tick led to.

    Attributes:
        created: false when the slot had its tick already, or is over.
        leased: the batches, when they were leased to the caller's worker.
    """

    slot: datetime
    created: bool
    connections: int = 0
    batches: int = 0
    leased: tuple[Job, ...] = ()


def plan(slot: datetime, due: Sequence[DueConnection], settings: TickSettings) -> PlannedTick:
    """Lay out a tick: pure. `next_due` is in the order of the batches' connections."""
    ids = [item.id for item in due]
    size = settings.batch_size
    batches = tuple(tuple(ids[at : at + size]) for at in range(0, len(ids), size))
    return PlannedTick(batches, tuple(next_due(slot, item, settings.tick_s) for item in due))


def next_due(slot: datetime, item: DueConnection, tick_s: int) -> datetime:
    """The slot of a connection's next poll.

    On a slower rung the slot is picked by a hash of the connection's id, so that idle connections spread evenly; the
    jitter picks the slot and never delays within one.
    """
    idle = slot - item.changed_at
    period = timedelta(seconds=item.every_s or tick_s)
    if item.every_s is None:
        period = next((every for at_least, every in IDLE_LADDER if idle >= at_least), period)
    slots = max(1, period // timedelta(seconds=tick_s))
    this = int((slot - EPOCH) // timedelta(seconds=tick_s))
    wait = (_jitter(item.id) - this) % slots or slots
    return slot + wait * timedelta(seconds=tick_s)


def _jitter(connection: ConnectionId) -> int:
    return int.from_bytes(hashlib.sha256(b"tallyd.jitter %d" % connection).digest()[:8], "big")


async def tick(
    db: Database,
    queue: PostgresQueue,
    settings: TickSettings,
    slot: datetime | None = None,
    worker: WorkerId | None = None,
    occasion: Occasion = BY_COMMAND,
) -> Tick:
    """Make the tick of the current slot, or find that it is made.

    Args:
        slot: None for the slot that the database's clock is in; another one must be given exactly.
        worker: lease the batches to this worker at once instead of leaving them to whoever is free.

    Raises:
        UsageError: the slot is off the grid, or in the future.
    """
    now = await db.now()
    current = floor_to(now, settings.tick_s)
    if slot is None and occasion.early_s:
        now = await _its_slot(db, settings.tick_s, occasion.early_s, now)
        current = floor_to(now, settings.tick_s)
    wanted = current if slot is None else slot
    if wanted != floor_to(wanted, settings.tick_s):
        grid = rfc3339(floor_to(wanted, settings.tick_s))
        raise UsageError("slot", f"{rfc3339(wanted)} is no start of a {settings.tick_s} s slot", f"use {grid}")
    if wanted > current:
        raise UsageError("slot", f"{rfc3339(wanted)} is in the future; the database says {rfc3339(now)}")
    if wanted < current or now - current < timedelta(seconds=occasion.grace_s):
        return Tick(wanted, created=False)
    if occasion.message_id is None and await ticks.exists(db, current):  # most looks end here, and write nothing
        return Tick(current, created=False)
    with span("tick", tallyd__slot=rfc3339(current), tallyd__via=occasion.via) as trace:
        made = await _make(db, queue, settings, current, worker, occasion, trace.traceparent)
        trace.set(tallyd__tick__created=made.created, tallyd__tick__batches=made.batches)
    if made.created:
        metrics.TICKS.labels(occasion.via).inc()
        level = log.warning if occasion.via == "fallback" else log.info
        level(
            "tick.created",
            slot=current,
            connections=made.connections,
            batches=made.batches,
            via=occasion.via,
            request_id=occasion.request_id,
        )
    return made


@dataclass(frozen=True, slots=True)
class Sync:
    """What asking for a sync led to. `created`: false when this message had asked for it before."""

    created: bool
    connections: int = 0
    batches: int = 0


async def sync(
    db: Database,
    queue: PostgresQueue,
    settings: TickSettings,
    connections: Callable[[Session], Awaitable[Sequence[ConnectionId]]],
    occasion: Occasion,
) -> Sync:
    """Enqueue a poll of each connection out of turn, once for each message that asks for it. One that waits is enough, and
    waits until nobody else is reading the same.

    Args:
        connections: finds them, in the transaction that enqueues their batches.
    """
    slot = floor_to(await db.now(), settings.tick_s)
    async with db.transaction() as tx:
        if occasion.message_id is not None:
            earlier = await ticks.take_delivery(tx, occasion.message_id, slot)
            if earlier is not None:
                return Sync(created=False)
        ids = await connections(tx)
        jobs = [
            NewJob(
                POLL,
                PollOrder([id_], mode=Mode.POLL, in_turn=True, request_id=occasion.request_id).encode(),
                dedup_id=f"sync {id_}",
                dedup_window=DAY,
                only_unclaimed=True,
                max_attempts=POLL_ATTEMPTS_MAX,
                timeout_s=SYNC_TIMEOUT_S,
            )
            for id_ in ids
        ]
        batches = set(await queue.enqueue(jobs, tx))
    return Sync(created=True, connections=len(ids), batches=len(batches))


async def _its_slot(db: Database, tick_s: int, early_s: float, now: datetime) -> datetime:
    """Wait for the next slot, if it is about to begin and this one has its tick. Returns the database's time."""
    current = floor_to(now, tick_s)
    following = current + timedelta(seconds=tick_s)
    if following - now > timedelta(seconds=early_s) or not await ticks.exists(db, current):
        return now
    while now < following:
        await anyio.sleep((following - now).total_seconds())
        now = await db.now()
    return now


async def _make(
    db: Database,
    queue: PostgresQueue,
    settings: TickSettings,
    slot: datetime,
    worker: WorkerId | None,
    occasion: Occasion,
    trace: str | None,
) -> Tick:
    """One transaction: the delivery's mark, the tick, the batches with what hands them over, and the next due times."""
    complete = timedelta(seconds=settings.complete_s)
    async with db.transaction() as tx:
        if occasion.message_id is not None:
            earlier = await ticks.take_delivery(tx, occasion.message_id, slot)
            if earlier is not None:
                return Tick(earlier, created=False)
        if not await ticks.claim(tx, slot, occasion.via, occasion.request_id, complete):
            return Tick(slot, created=False)
        due = [
            DueConnection(*row) for row in await ticks.due_connections(tx, slot + timedelta(seconds=settings.tick_s))
        ]
        planned = plan(slot, due, settings)
        jobs = [
            NewJob(
                POLL,
                PollOrder([*batch], slot=slot, request_id=occasion.request_id, trace=trace).encode(),
                prio=50,
                delay=timedelta(seconds=settings.hand_over_s if occasion.hands_over else 0.0),
                max_attempts=POLL_ATTEMPTS_MAX,
                timeout_s=settings.batch_timeout_s,
            )
            for batch in planned.batches
        ]
        leased: list[Job] = []
        if worker is None:
            ids = await queue.enqueue(jobs, tx)
        else:
            leased = await queue.enqueue_leased(jobs, worker, tx)
            ids = [job.id for job in leased]
        if occasion.hands_over and ids:
            await handovers.hand_over(tx, ids, slot)
            await queue.enqueue(publish_jobs(slot, ids, settings.hand_over_s, occasion.request_id, trace), tx)
        owners = [id_ for id_, batch in zip(ids, planned.batches, strict=True) for _ in batch]
        await ticks.advance(tx, [item.id for item in due], planned.next_due, owners)
        await ticks.finish(tx, slot, len(due), len(ids))
    return Tick(slot, created=True, connections=len(due), batches=len(ids), leased=tuple(leased))
