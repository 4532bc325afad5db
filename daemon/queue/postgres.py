"""The durable queue on Postgres: statements in `db/sql/queue.sql`.

A job is one row in exactly one of `ready`, `due`, `lease` and `dead`, its body apart in `job`. Moving it is one
statement, and every write about a running job matches `(id, token)`: what comes back was accepted.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from time import monotonic
from typing import NamedTuple, assert_never

from daemon.db.pool import Database, Executor, Record, Session, query
from daemon.db.text import storable
from daemon.domain.errors import LeaseLostError, UsageError
from daemon.domain.job import (
    KEY_END,
    Cancelled,
    Completed,
    Discarded,
    Job,
    JobId,
    Lane,
    NewJob,
    Outcome,
    Retryable,
    Settlement,
    Snoozed,
    WorkerId,
)
from daemon.queue.gates import Gates
from daemon.queue.wake import Waker

BODY_BYTES_MAX = 1 << 20
LEASE_GRACE_S = 15.0
BACKOFF_BASE_S = 5.0
BACKOFF_MAX_S = 3600.0
STALE_S = 15.0
LOSSES_MAX = 5
PROMOTE_MAX = 2_000
RESCUE_MAX = 500
FLOOR_S = 0.5
ADMIT_S = 1.0
"""Who opens a gate lets pass at once; rounds over all of them only find what was missed."""
FLOOR_HEADS = 1_000
FIRST_KEY = -1
"""The cursor before every key: keys are never negative."""

_RESERVE = query("queue_reserve")
_ENQUEUE = query("queue_enqueue")
_ENQUEUE_LEASED = query("queue_enqueue_leased")
_DEDUP_TAKE = query("dedup_take")
_DEDUP_LOCK = query("dedup_lock")
_DEDUP_REPLACE = query("dedup_replace")
_UNCLAIMED_DUE = query("dedup_unclaimed_due")
_UNCLAIMED_READY = query("dedup_unclaimed_ready")
_CLAIM = query("claim_fair")
_RAISE_FLOOR = query("raise_floor")
_SETTLE = query("settle")
_LOCK_LEASE = query("lock_lease")
_LOCK_LEASES = query("lock_leases")
_RELEASE = query("release")
_RELEASE_OTHERS = query("release_others")
_BRING_FORWARD = query("bring_forward")
_CANCEL = query("cancel")
_PROMOTE = query("promote")
_RESCUE = query("rescue")
_REGISTER = query("register_worker")
_HEARTBEAT = query("heartbeat")
_STOP_WORKER = query("stop_worker")
_PARTITIONS = query("attempt_partitions")

Beat = Callable[[], Awaitable[bool]]
"""Tell the others that this worker lives. False when its row is gone or stopped: it needs a new id."""


class Ending(IntEnum):
    """How an attempt ended, as `attempt.outcome` stores it."""

    DONE = 1
    RETRY = 2
    SNOOZE = 3
    DEAD = 4
    CANCELLED = 5
    RELEASED = 8
    WORKER_LOST = 9


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """What a claim took.

    Attributes:
        last_key: the cursor for the next claim.
        is_held_back: jobs were left behind whose keys have all that the lane allows them in hand.
    """

    jobs: list[Job]
    last_key: int
    is_held_back: bool = False


@dataclass(frozen=True, slots=True)
class Promotion:
    """How many jobs became ready, and in how many seconds the next one is due, if any waits."""

    moved: int
    next_s: float | None


@dataclass(frozen=True, slots=True)
class Rescue:
    """Jobs taken back from lost workers: to run again, and dead after too many losses."""

    ready: list[JobId]
    dead: list[JobId]


Columns = Sequence[Sequence[object]]
"""The arguments of a statement that takes arrays."""
NOTHING_TOLD: Columns = ((),) * 9


class Settled(NamedTuple):
    """The jobs whose end was written, and the gates at which they gave back a place."""

    jobs: set[JobId]
    gates: set[int]


class PostgresQueue:
    """Safe to share between tasks. Everything raises StorageUnavailableError when Postgres is away."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._floor_due = 0.0
        self._admit_due = 0.0
        self.waker = Waker(db)
        self.gates = Gates(db)

    # Enqueue

    async def enqueue(self, jobs: Sequence[NewJob], tx: Session | None = None) -> list[JobId]:
        """Store jobs, in the caller's transaction when there is one; ids in the order given.

        A duplicate is not stored, and the id of the first is returned in its place.

        Raises:
            UsageError: a body is larger than 1 MiB, or a key negative.
            DataRejectedError: Postgres cannot hold what a job says.
        """
        _check(jobs)
        if not jobs:
            return []
        if tx is None:
            if any(job.dedup_id is not None for job in jobs):
                async with self._db.transaction() as own:
                    return await self.enqueue(jobs, own)
            ids = await _insert(self._db, jobs, [None] * len(jobs))
            self.waker.wake()
            return ids
        tx.on_commit(self.waker.wake)
        if all(job.dedup_id is None for job in jobs):
            return await _insert(tx, jobs, [None] * len(jobs))
        owners = await deduplicate(tx, jobs)
        fresh = [index for index, (_, is_new) in enumerate(owners) if is_new]
        await _insert(tx, [jobs[i] for i in fresh], [owners[i][0] for i in fresh])
        return [owner for owner, _ in owners]

    async def enqueue_leased(self, jobs: Sequence[NewJob], worker: WorkerId, tx: Session | None = None) -> list[Job]:
        """Store jobs as already claimed by `worker`, for a command that runs them itself. No delay, no dedup."""
        _check(jobs)
        if any(job.dedup_id is not None or job.delay for job in jobs):
            raise UsageError("job", "a leased job has neither a delay nor a dedup_id")
        if not jobs:
            return []
        arguments = _columns(jobs, [None] * len(jobs))[:7]
        rows = await (tx or self._db).fetch(_ENQUEUE_LEASED, *arguments, worker, LEASE_GRACE_S)
        return [_job(row) for row in rows]

    # Claim and settle

    async def claim(
        self,
        worker: WorkerId,
        limit: int,
        after_key: int = FIRST_KEY,
        lane: Lane | None = None,
        busy: Mapping[int, int] | None = None,
    ) -> ClaimResult:
        """Take up to `limit` jobs for `worker`, an equal share from each key after the cursor; then round again.

        A short answer is not the end: claim again until it is empty, which means that nothing can be claimed now. The
        lease runs for the job's time-out + 15 s.

        Args:
            lane: whose keys to claim from, and how many jobs of each may be in hand. None: all keys, without a limit.
            busy: how many of the lane's jobs are in hand by now, by key.
        """
        before, end, per_key = (
            (FIRST_KEY, KEY_END, None) if lane is None else (lane.first_key - 1, lane.end_key, lane.per_key)
        )
        in_hand = sorted(busy.items()) if busy and per_key is not None else []
        each = limit if per_key is None else per_key
        limits = (each, [key for key, _ in in_hand], [max(0, each - count) for _, count in in_hand])
        start = max(before, after_key)
        is_held_back = False
        for first, stop in ((start, end), (before, min(start + 1, end))):
            cursor, is_at_end = first, first + 1 >= stop
            while not is_at_end:
                rows = await self._db.fetch(_CLAIM, cursor, limit, worker, LEASE_GRACE_S, stop, *limits)
                cursor, is_at_end = rows[0]["last_key"], rows[0]["keys"] < limit
                is_held_back = is_held_back or rows[0]["is_held_back"]
                if rows[0]["id"] is not None:
                    self._floor_due = min(self._floor_due, monotonic() + FLOOR_S)
                    jobs = [_job(row) for row in rows]
                    return ClaimResult(jobs, FIRST_KEY if is_at_end else cursor, is_held_back)
        return ClaimResult([], FIRST_KEY, is_held_back)

    async def settle(self, settlements: Iterable[Settlement], told: Columns = NOTHING_TOLD) -> set[JobId]:
        """Write how jobs ended. Returns those whose lease was still ours; of the others nothing was written.

        Args:
            told: lines for the log of messages, as the columns of `event_insert`.
        """
        settled = await _settle(self._db, settlements, told)
        await self.open_up(settled.gates)
        return settled.jobs

    async def settle_many_in(
        self, tx: Session, settlements: Iterable[Settlement], told: Columns = NOTHING_TOLD
    ) -> Settled:
        """The same in the caller's transaction, after which the gates are the caller's to open."""
        return await _settle(tx, settlements, told)

    async def settle_in(self, tx: Session, settlement: Settlement) -> None:
        """Settle one job together with its data.

        Raises:
            LeaseLostError: somebody else owns the job; roll back.
        """
        if not (await _settle(tx, [settlement])).jobs:
            raise LeaseLostError(f"job {settlement.job.id}: token {settlement.job.token} is stale")

    async def lock_lease(self, tx: Session, job: Job) -> None:
        """Hold the lease until the transaction ends: the first statement of every flush.

        Raises:
            LeaseLostError: somebody else owns the job; roll back.
        """
        if await tx.fetchval(_LOCK_LEASE, job.id, job.token) is None:
            raise LeaseLostError(f"job {job.id}: token {job.token} is stale")

    async def lock_leases(self, tx: Session, jobs: Iterable[Job]) -> set[JobId]:
        """The same for several. Returns those that are still ours."""
        held = sorted(jobs, key=lambda job: job.id)
        return _ids(await tx.fetch(_LOCK_LEASES, [job.id for job in held], [job.token for job in held]))

    async def release(self, jobs: Iterable[Job]) -> set[JobId]:
        """Give claimed jobs back, to run at once elsewhere; no attempt is spent."""
        held = sorted(jobs, key=lambda job: job.id)
        if not held:
            return set()
        freed = _ids(await self._db.fetch(_RELEASE, [job.id for job in held], [job.token for job in held]))
        if freed:
            self.waker.wake()
        return freed

    async def release_others(self, worker: WorkerId, known: Iterable[JobId]) -> set[JobId]:
        """Give back what `worker` holds without knowing it: the answer to its claim was lost."""
        freed = _ids(await self._db.fetch(_RELEASE_OTHERS, worker, list(known)))
        if freed:
            self.waker.wake()
        return freed

    async def open_up(self, gates: Collection[int]) -> None:
        """Let pass at gates where there may be room since a commit, and wake those who wait for work."""
        if gates:
            await self.gates.open_up(gates)
            self.waker.wake()

    # Moves on request

    async def bring_forward(self, jobs: Iterable[JobId], tx: Session | None = None) -> set[JobId]:
        """Make waiting jobs ready now. Returns those that were waiting."""
        moved = _ids(await (tx or self._db).fetch(_BRING_FORWARD, sorted(jobs)))
        if tx is not None:
            tx.on_commit(self.waker.wake)
        elif moved:
            self.waker.wake()
        return moved

    async def cancel(self, jobs: Iterable[JobId], reason: str = "", tx: Session | None = None) -> set[JobId]:
        """Remove jobs for good; what a running one still writes is refused. Returns those that were there."""
        return _ids(await (tx or self._db).fetch(_CANCEL, sorted(jobs), storable(reason)))

    # Workers

    async def register_worker(self, info: str = "") -> WorkerId:
        """A new id for this run of the process; also makes sure that attempts can be logged."""
        await self._db.execute(_PARTITIONS)
        return WorkerId(await self._db.fetchval(_REGISTER, storable(info)))

    async def heartbeat(self, worker: WorkerId) -> bool:
        """One beat over the pool, for commands; a loop uses `heart`."""
        return await self._db.fetchval(_HEARTBEAT, worker) is not None

    @asynccontextmanager
    async def heart(self, worker: WorkerId) -> AsyncIterator[Beat]:
        """Beats over a connection of their own, so that a starved pool does not look like a lost worker."""
        async with self._db.dedicated() as session:

            async def beat() -> bool:
                return await session.fetchval(_HEARTBEAT, worker) is not None

            yield beat

    async def stop_worker(self, worker: WorkerId) -> None:
        """The last act of a worker: whatever it still holds is free at once."""
        await self.release_others(worker, ())
        await self._db.execute(_STOP_WORKER, worker)

    # What any replica does for all

    async def rescue(self, *, silent_s: float = STALE_S) -> Rescue:
        """Take jobs back from workers without a beat for `silent_s`, and those whose lease has run out.

        At 15 s only for a worker whose own beats have succeeded for as long: after an outage everyone looks stale.
        """
        rows = await self._db.fetch(_RESCUE, LOSSES_MAX, silent_s, RESCUE_MAX)
        rescued = Rescue(
            [JobId(row["id"]) for row in rows if not row["is_dead"]],
            [JobId(row["id"]) for row in rows if row["is_dead"]],
        )
        if rescued.ready:
            self.waker.wake()
        return rescued

    async def raise_floor(self) -> None:
        """Let claims start behind what is known to be gone for good, whoever claimed it."""
        await self._db.execute(_RAISE_FLOOR, FLOOR_HEADS)
        self._floor_due = math.inf  # until something is claimed

    async def promote(self) -> Promotion:
        """Move what has become due to ready, at most 2,000 at a time, and through the gates whom they let pass; and raise
        the floor, if it is time.
        """
        if monotonic() >= self._floor_due:
            await self.raise_floor()
        row = await self._db.fetchrow(_PROMOTE, PROMOTE_MAX)
        assert row is not None
        promotion = Promotion(row["moved"], row["next_s"])
        if row["is_held"] and (promotion.moved or monotonic() >= self._admit_due):
            admitted, opens_s = await self.gates.admit_waiting()
            self._admit_due = monotonic() + min(ADMIT_S, opens_s or ADMIT_S)
            waits = [wait_s for wait_s in (promotion.next_s, opens_s) if wait_s is not None]
            promotion = Promotion(promotion.moved + admitted, min(waits, default=None))
        if promotion.moved:
            self.waker.wake()
        return promotion


def backoff_s(attempt: int) -> float:
    """Seconds until the next try after `attempt` failures: doubling from 10 s to an hour, the upper half jittered."""
    longest = min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2.0 ** min(attempt, 20))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 (spreads load, guards nothing)


def _check(jobs: Sequence[NewJob]) -> None:
    for job in jobs:
        if len(job.body) > BODY_BYTES_MAX:
            raise UsageError("body", f"{len(job.body)} bytes is more than a job may carry", f"at most {BODY_BYTES_MAX}")
        if job.key < 0:
            raise UsageError("key", f"{job.key} is negative")


def _columns(jobs: Sequence[NewJob], ids: Sequence[JobId | None]) -> tuple[list[object], ...]:
    return (
        [*ids],
        [job.kind for job in jobs],
        [job.key for job in jobs],
        [job.prio for job in jobs],
        [job.max_attempts for job in jobs],
        [job.timeout_s for job in jobs],
        [job.body for job in jobs],
        [job.delay.total_seconds() for job in jobs],
    )


async def _insert(db: Executor, jobs: Sequence[NewJob], ids: Sequence[JobId | None]) -> list[JobId]:
    if not jobs:
        return []
    return [JobId(row["id"]) for row in await db.fetch(_ENQUEUE, *_columns(jobs, ids))]


async def deduplicate(tx: Session, jobs: Sequence[NewJob]) -> list[tuple[JobId, bool]]:
    """For each job its id, and whether it is to be stored under it.

    The dedup rows are locked until the caller commits, in the order of their keys, so that of two racing callers the
    second waits and then sees the first one's job. So is an unclaimed job which stands for a new one: it must not
    start before it can see what this transaction wrote.
    """
    reserved = [JobId(row["id"]) for row in await tx.fetch(_RESERVE, len(jobs))]
    first: dict[str, int] = {}
    for index, job in enumerate(jobs):
        if job.dedup_id is not None:
            first.setdefault(job.dedup_id, index)
    owner: dict[str, tuple[JobId, bool]] = {}
    while len(owner) < len(first):
        wanted = [key for key in first if key not in owner]
        windows = [jobs[first[key]].dedup_window.total_seconds() for key in wanted]
        taken = await tx.fetch(_DEDUP_TAKE, wanted, [reserved[first[key]] for key in wanted], windows)
        owner.update((row["key"], (reserved[first[row["key"]]], True)) for row in taken)
        held = await tx.fetch(_DEDUP_LOCK, [key for key in wanted if key not in owner])
        # One that was pruned between the two statements is in neither answer: go round again.
        claimable = [row["job_id"] for row in held if jobs[first[row["key"]]].only_unclaimed and not row["is_expired"]]
        unclaimed: set[JobId] = set()
        if claimable:
            # Promotion moves a job from due to ready, never back: in this order it cannot slip through.
            unclaimed |= _ids(await tx.fetch(_UNCLAIMED_DUE, claimable))
            unclaimed |= _ids(await tx.fetch(_UNCLAIMED_READY, claimable))
        replaced = []
        for row in held:
            job, mine = jobs[first[row["key"]]], reserved[first[row["key"]]]
            stands = not row["is_expired"] and (not job.only_unclaimed or row["job_id"] in unclaimed)
            owner[row["key"]] = (JobId(row["job_id"]), False) if stands else (mine, True)
            if not stands:
                replaced.append((row["key"], mine, job.dedup_window.total_seconds()))
        if replaced:
            keys, ids, replaced_windows = zip(*replaced, strict=True)
            await tx.execute(_DEDUP_REPLACE, keys, ids, replaced_windows)
    result = []
    for index, job in enumerate(jobs):
        if job.dedup_id is None:
            result.append((reserved[index], True))
        else:
            job_id, is_new = owner[job.dedup_id]
            result.append((job_id, is_new and first[job.dedup_id] == index))
    return result


async def _settle(db: Executor, settlements: Iterable[Settlement], told: Columns = NOTHING_TOLD) -> Settled:
    # In the order of ids: two settles with jobs in common (a zombie's and the owner's) must not wait for each other.
    ordered = sorted(
        (s for s in settlements if not (isinstance(s.outcome, Completed) and s.outcome.is_settled)),
        key=lambda s: s.job.id,
    )
    if not ordered:
        return Settled(set(), set())
    endings = [_ending(s.job, s.outcome) for s in ordered]
    delays = [delay_s for _, delay_s, _ in endings]
    notes = [note for _, _, note in endings]
    rows = await db.fetch(
        _SETTLE,
        [s.job.id for s in ordered],
        [s.job.token for s in ordered],
        [ending for ending, _, _ in endings],
        [s.took_ms for s in ordered],
        delays if any(delays) else [],
        notes if notes.count(None) < len(notes) else [],
        *told,
    )
    return Settled(_ids(rows), {gate for row in rows for gate in row["gates"]})


def _ending(job: Job, outcome: Outcome) -> tuple[Ending, float, str | None]:
    match outcome:
        case Completed(note=note):
            return Ending.DONE, 0.0, None if note is None else storable(note)
        case Retryable(reason, delay_s):
            if job.attempt >= job.max_attempts:
                return Ending.DEAD, 0.0, storable(reason)
            return Ending.RETRY, backoff_s(job.attempt) if delay_s is None else max(0.0, delay_s), storable(reason)
        case Snoozed(delay_s, reason):
            return Ending.SNOOZE, max(0.0, delay_s), storable(reason)
        case Discarded(reason):
            return Ending.DEAD, 0.0, storable(reason)
        case Cancelled(reason):
            return Ending.CANCELLED, 0.0, storable(reason)
        case _:
            assert_never(outcome)


def _ids(rows: Iterable[Record]) -> set[JobId]:
    return {JobId(row["id"]) for row in rows}


def _job(row: Record) -> Job:
    # By position: this runs for every job, and the statements that feed it share their first columns.
    return Job(row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9])
