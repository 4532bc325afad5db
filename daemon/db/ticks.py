"""Ticks and what their batches did."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

from daemon.db.pool import Executor, query
from daemon.domain.connection import ConnectionId
from daemon.domain.job import JobId, Summary

_CLAIM = query("claim_tick")
_TAKE_DELIVERY = query("take_delivery")
_DELIVERY_SLOT = query("delivery_slot")
_JUDGE = query("judge_ticks")
_DUE = query("due_connections")
_TAKE_TURN = query("take_turn")
_ADVANCE = query("advance_connections")
_HAND_OVER = query("hand_over_connections")
_FINISH = query("finish_tick")
_HAS = query("has_tick")
_OPEN_BATCHES = query("tick_open_batches")
_STILL_OPEN = query("jobs_still_open")
_SUMMARIES = query("summaries_of")
_JOBS = query("jobs_of_tick")
_PRUNE_TICKS = query("prune_ticks")
_PRUNE_SUMMARIES = query("prune_summaries")
_PRUNE_DELIVERIES = query("prune_deliveries")
_PRUNE_HANDOVERS = query("prune_handovers")
_PRUNE_BOOKINGS = query("prune_bookings")

PRUNE_ROUNDS_MAX = 1_000

Via = Literal["internal", "fallback", "qstash", "command"]
"""What made a tick: the schedule; the schedule in QStash's place; a delivery; a person."""


class Judged(NamedTuple):
    """A tick whose deadline has passed: batches expected, and done by then."""

    slot: datetime
    expected: int
    done: int
    deadline: datetime


async def claim(tx: Executor, slot: datetime, via: Via, request_id: str | None, complete: timedelta) -> bool:
    """Insert the tick of a slot, whose batches ought to be done within `complete`.

    A race is decided by the unique key: the losers wait for the commit and get False.
    """
    return await tx.fetchval(_CLAIM, slot, via, request_id, complete) is not None


async def take_delivery(tx: Executor, message_id: str, slot: datetime) -> datetime | None:
    """Note that a message asked for the tick of `slot`. Returns the slot that an earlier copy of it asked for, if any."""
    if await tx.fetchval(_TAKE_DELIVERY, message_id, slot) is not None:
        return None
    first: datetime = await tx.fetchval(_DELIVERY_SLOT, message_id)
    return first


async def judge(db: Executor) -> list[Judged]:
    """Store of each tick whose deadline has passed how much of it was done by then; each tick is returned once."""
    rows = await db.fetch(_JUDGE)
    return [Judged(row["slot_at"], row["batches"], row["done_in_time"], row["deadline_at"]) for row in rows]


async def due_connections(tx: Executor, slot_end: datetime) -> list[tuple[ConnectionId, datetime, int | None]]:
    """Active connections that are due before `slot_end` and not being polled, locked: each with its last change, and
    the seconds from poll to poll, where its settings give them.
    """
    rows = await tx.fetch(_DUE, slot_end)
    return [(ConnectionId(row["id"]), row["changed_at"], row["every_s"]) for row in rows]


async def take_turn(db: Executor, job: JobId, connections: Sequence[ConnectionId]) -> bool:
    """Give the connections to a job, unless another one has one of them."""
    return len(await db.fetch(_TAKE_TURN, job, sorted(connections))) == len(connections)


async def advance(
    tx: Executor, connections: Sequence[ConnectionId], next_due: Sequence[datetime], jobs: Sequence[JobId]
) -> None:
    """Give each connection its next due time, and to the batch that polls it now."""
    if connections:
        await tx.execute(_ADVANCE, list(connections), list(next_due), list(jobs))


async def hand_over(tx: Executor, job: JobId, connections: Sequence[ConnectionId], heirs: Sequence[JobId]) -> None:
    """Let each connection that `job` has open be open for its heir instead."""
    await tx.execute(_HAND_OVER, job, list(connections), list(heirs))


async def finish(tx: Executor, slot: datetime, connections: int, batches: int) -> None:
    """Note what the tick is expected to do."""
    await tx.execute(_FINISH, slot, connections, batches)


async def exists(db: Executor, slot: datetime) -> bool:
    """Whether the slot has its tick."""
    return bool(await db.fetchval(_HAS, slot))


async def open_batches(db: Executor, slot: datetime) -> list[JobId]:
    """The batches of a tick that wait or run. One that died is over, as is one that was split."""
    return [JobId(row["id"]) for row in await db.fetch(_OPEN_BATCHES, slot)]


async def still_open(db: Executor, jobs: Sequence[JobId]) -> list[JobId]:
    """Those of the jobs that wait or run: by id, so cheap enough to be asked again and again."""
    return [JobId(row["id"]) for row in await db.fetch(_STILL_OPEN, list(jobs))]


async def jobs_of(db: Executor, slot: datetime) -> list[JobId]:
    """The finished batches of a tick."""
    return [JobId(row["job_id"]) for row in await db.fetch(_JOBS, slot)]


async def summary_of(db: Executor, jobs: Sequence[JobId]) -> tuple[int, Summary]:
    """How many of the jobs have finished, and the sum of what they did; the duration is the longest one's."""
    row = await db.fetchrow(_SUMMARIES, list(jobs))
    assert row is not None
    fields = dict(row)
    return fields.pop("batches"), Summary(**fields)


async def prune(db: Executor, ticks_days: int | None, summaries_days: int | None) -> None:
    """Delete what is older than its retention; None keeps it for ever."""
    await _prune(db, _PRUNE_DELIVERIES)
    if ticks_days is not None:
        await _prune(db, _PRUNE_TICKS, timedelta(days=ticks_days))
        await _prune(db, _PRUNE_HANDOVERS, timedelta(days=ticks_days))
    if summaries_days is not None:
        await _prune(db, _PRUNE_SUMMARIES, timedelta(days=summaries_days))
        await _prune(db, _PRUNE_BOOKINGS, timedelta(days=summaries_days))


async def _prune(db: Executor, sql: str, *args: object) -> None:
    for _ in range(PRUNE_ROUNDS_MAX):
        if await db.execute(sql, *args) == "DELETE 0":
            return
