"""What keeps the queue small and honest: dead letters, figures, checks, housekeeping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

import msgspec

from daemon.db.pool import Database, Record, query
from daemon.domain.connection import ConnectionId
from daemon.domain.errors import StorageUnavailableError
from daemon.domain.job import JobId
from daemon.queue.wake import Waker

BATCH = 1_000

_DEAD_LIST = query("dead_list")
_DEAD_SHOW = query("dead_show")
_ATTEMPTS = query("attempts_of")
_DEAD_REPLAY = query("dead_replay")
_DEAD_DROP = query("dead_drop")
_OLD_DEAD = query("old_dead")
_STATS = query("queue_stats")
_CONSERVATION = query("queue_conservation")
_PARTITIONS = query("attempt_partitions")
_OLD_PARTITIONS = query("attempt_partition_names")
_PRUNE_DEDUP = query("prune_dedup")
_PRUNE_WORKERS = query("prune_workers")
_SWEEP_CONNECTIONS = query("sweep_connections")
_SWEEP_STREAMS = query("sweep_streams")
_SWEEP_SLOTS = query("sweep_slots")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """`connections` are those that its order names; none for a message."""

    id: JobId
    at: datetime
    attempt: int
    reason: str
    kind: str
    key: int
    connections: tuple[ConnectionId, ...] = ()


class _About(msgspec.Struct):
    """What the orders of all kinds that have connections have in common."""

    connections: list[int] = []
    connection: int | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One line of the attempts log; `outcome` is an `Ending`."""

    at: datetime
    attempt: int
    outcome: int
    took_ms: int | None
    note: str | None


@dataclass(frozen=True, slots=True)
class DeadDetail:
    letter: DeadLetter
    body: bytes
    max_attempts: int
    created_at: datetime
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Jobs by state, under the names that `job_state` gives them; ages in seconds, None when there is nothing.

    Attributes:
        pending: held by a limit: a FIFO queue, a flow-control key, an account's parallelism.
    """

    available: int
    scheduled: int
    retryable: int
    pending: int
    running: int
    discarded: int
    oldest_available_s: float | None
    oldest_running_s: float | None


@dataclass(frozen=True, slots=True)
class Misplaced:
    """A job that breaks the law of one state: `states` is empty or has several, or `has_job` is false."""

    id: JobId
    states: tuple[str, ...]
    has_job: bool


@dataclass(frozen=True, slots=True)
class Pruned:
    """What housekeeping removed or mended."""

    dedups: int
    workers: int
    partitions: int
    connections: int
    streams: int
    slots: int


class QueueMaintenance:
    def __init__(self, db: Database, waker: Waker | None = None) -> None:
        self._db = db
        self._waker = waker or Waker(db)

    async def dead_list(self, *, limit: int = 100, after: int = 0) -> list[DeadLetter]:
        """Dead letters by id, those above `after`."""
        rows = await self._db.fetch(_DEAD_LIST, after, limit)
        return [_letter(row) for row in rows]

    async def dead_show(self, job_id: JobId) -> DeadDetail | None:
        """One dead letter with its body and every attempt that the log still holds."""
        row = await self._db.fetchrow(_DEAD_SHOW, job_id)
        if row is None:
            return None
        attempts = await self._db.fetch(_ATTEMPTS, job_id)
        return DeadDetail(
            _letter(row),
            row["body"],
            row["max_attempts"],
            row["created_at"],
            tuple(Attempt(a["at"], a["attempt"], a["outcome"], a["took_ms"], a["note"]) for a in attempts),
        )

    async def dead_replay(self, jobs: Iterable[JobId]) -> set[JobId]:
        """Run dead jobs again, under the same id, with all their attempts. Returns those that were dead."""
        replayed = {JobId(row["id"]) for row in await self._db.fetch(_DEAD_REPLAY, sorted(jobs))}
        if replayed:
            self._waker.wake()
        return replayed

    async def dead_drop(self, jobs: Iterable[JobId]) -> set[JobId]:
        """Delete dead jobs. Returns those that were dead."""
        return {JobId(row["id"]) for row in await self._db.fetch(_DEAD_DROP, sorted(jobs))}

    async def stats(self) -> QueueStats:
        row = await self._db.fetchrow(_STATS)
        assert row is not None
        return QueueStats(**dict(row))

    async def conservation(self) -> list[Misplaced]:
        """The first 100 jobs that are not in exactly one state; empty when the law holds."""
        rows = await self._db.fetch(_CONSERVATION)
        return [Misplaced(r["id"], tuple(r["states"]), r["has_job"]) for r in rows]

    async def prune(
        self,
        *,
        attempts_kept: timedelta = timedelta(days=30),
        workers_kept: timedelta = timedelta(days=1),
        dead_kept: timedelta | None = None,
    ) -> Pruned:
        """Housekeeping: harmless when done twice, or by several at once. (A finished job's row went as it settled.)"""
        await self._db.execute(_PARTITIONS)
        if dead_kept is not None:
            while old := [JobId(row["id"]) for row in await self._db.fetch(_OLD_DEAD, dead_kept)]:
                await self.dead_drop(old)
        return Pruned(
            dedups=await self._in_batches(_PRUNE_DEDUP),
            workers=await self._in_batches(_PRUNE_WORKERS, workers_kept.total_seconds()),
            partitions=await drop_partitions(self._db, _OLD_PARTITIONS, attempts_kept),
            connections=await self._in_batches(_SWEEP_CONNECTIONS),
            streams=await self._in_batches(_SWEEP_STREAMS),
            slots=await self._in_batches(_SWEEP_SLOTS),
        )

    async def _in_batches(self, sql: str, *args: object) -> int:
        total = 0
        while True:
            done = int((await self._db.execute(sql, BATCH, *args)).rpartition(" ")[2])
            total += done
            if done < BATCH:
                return total


async def drop_partitions(db: Database, old: str, kept: timedelta) -> int:
    """Drop the partitions that a query names, as far as nobody uses them just now. Returns how many."""
    dropped = 0
    for row in await db.fetch(old, kept.total_seconds()):
        try:
            # It needs the log to itself for a moment. Whoever waits for that lock blocks all who write there, so not long.
            async with db.transaction(lock_timeout_ms=100) as tx:
                await tx.execute(f'drop table if exists "{row["name"]}"')
            dropped += 1
        except StorageUnavailableError:
            break  # busy: the next round tries again
    return dropped


def _letter(row: Record) -> DeadLetter:
    try:
        about = msgspec.json.decode(row["order_"] or b"{}", type=_About)
    except msgspec.MsgspecError:  # of a kind that knows no connections
        about = _About()
    ids = about.connections if about.connection is None else [about.connection]
    return DeadLetter(
        row["id"],
        row["at"],
        row["attempt"],
        row["reason"],
        row["kind"],
        row["key_id"],
        tuple(ConnectionId(id_) for id_ in ids),
    )
