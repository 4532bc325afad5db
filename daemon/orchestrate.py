"""Step 2 of 8, orchestrate: one tick per slot, made by whichever replica inserts it first.

A tick is one transaction: its row, the due connections with their next due time, and the batches. Whoever loses the
race gets nothing; a crash undoes all of it. Missed slots are not replayed: the windows of the next tick catch up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import structlog

from daemon.db import ticks
from daemon.db.pool import Database
from daemon.domain.connection import ConnectionId
from daemon.domain.errors import UsageError
from daemon.domain.job import Job, NewJob, WorkerId
from daemon.domain.window import EPOCH, floor_to, rfc3339
from daemon.queue.postgres import PostgresQueue
from daemon.worker.poll import POLL, POLL_ATTEMPTS_MAX, PollOrder

log = structlog.get_logger()

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
IDLE_LADDER = ((7 * DAY, 6 * HOUR), (DAY, HOUR), (HOUR, timedelta(minutes=15)))
"""(unchanged for at least, poll this often), slowest first; below the last rung each tick polls."""


@dataclass(frozen=True, slots=True)
class TickSettings:
    """How ticks are cut.

    Attributes:
        tick_s: length of a slot; slots start at multiples of it since the Unix epoch, by the database's clock.
        batch_size: connections a job.
        batch_timeout_s: how long a batch may run.
    """

    tick_s: int = 300
    batch_size: int = 100
    batch_timeout_s: float = 300.0


class DueConnection(NamedTuple):
    """A connection to poll, and when it last had news."""

    id: ConnectionId
    changed_at: datetime


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
    period = next((every for at_least, every in IDLE_LADDER if idle >= at_least), timedelta(seconds=tick_s))
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
    wanted = current if slot is None else slot
    if wanted != floor_to(wanted, settings.tick_s):
        grid = rfc3339(floor_to(wanted, settings.tick_s))
        raise UsageError("slot", f"{rfc3339(wanted)} is no start of a {settings.tick_s} s slot", f"use {grid}")
    if wanted > current:
        raise UsageError("slot", f"{rfc3339(wanted)} is in the future; the database says {rfc3339(now)}")
    if wanted < current:
        return Tick(wanted, created=False)
    async with db.transaction() as tx:
        if not await ticks.claim(tx, current):
            return Tick(current, created=False)
        due = [
            DueConnection(*row) for row in await ticks.due_connections(tx, current + timedelta(seconds=settings.tick_s))
        ]
        planned = plan(current, due, settings)
        jobs = [
            NewJob(
                POLL,
                PollOrder([*batch], slot=current).encode(),
                prio=50,
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
        owners = [id_ for id_, batch in zip(ids, planned.batches, strict=True) for _ in batch]
        await ticks.advance(tx, [item.id for item in due], planned.next_due, owners)
        await ticks.finish(tx, current, len(due), len(ids))
    made = Tick(current, created=True, connections=len(due), batches=len(ids), leased=tuple(leased))
    log.info("tick.created", slot=current, connections=made.connections, batches=made.batches)
    return made
