"""The internal queue: how fast processes drain jobs that do nothing, and how much WAL that writes.

Every drainer is a process of its own, on the same durable server, and starts on one gate. A job counts once its
settling is committed. tallyd runs its real loop; PgQueuer runs as its documentation says, with the fastest of the batch
sizes that a short trial finds; the bare side is a loop of two statements on tallyd's tables, and nothing else.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier, Event
from time import monotonic
from typing import Any

import anyio
import anyio.to_thread
import asyncpg

from bench.report import Line, Target
from bench.stage import Stage, has_uvloop, summarise
from daemon.db.pool import Database
from daemon.domain.job import Completed, Job, JobId, NewJob, Outcome, Settlement
from daemon.queue.postgres import PostgresQueue
from daemon.telemetry.logs import configure
from daemon.worker.loop import WorkerLoop

CONCURRENCY = 1_000
BARE_BATCH = 500
KEYS = 10
DEADLINE_S = 300
TRIALS = ((10, 5), (100, 1), (500, 1), (1_000, 1), (500, 2))
"""(batch size, queue managers in the process) for PgQueuer: its own benchmark's first, then larger ones."""

spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Gate:
    """What the drainers of one run share: a common start, and the count of settled jobs with the time of the last."""

    total: int
    ready: Barrier
    settled: Synchronized[int]
    last: Synchronized[float]
    done: Event

    @classmethod
    def make(cls, processes: int, total: int) -> Gate:
        return cls(total, spawn.Barrier(processes + 1), spawn.Value("q", 0), spawn.Value("d", 0.0), spawn.Event())

    def count(self, jobs: int) -> None:
        with self.settled.get_lock():
            self.settled.value += jobs
            self.last.value = monotonic()
            if self.settled.value >= self.total:
                self.done.set()

    async def until_done(self) -> None:
        await anyio.to_thread.run_sync(self.done.wait, DEADLINE_S)


@dataclass(frozen=True, slots=True)
class Side:
    """Something that drains: what a process runs, how its database is filled, and the table that is empty afterwards."""

    drain: Callable[[str, Gate], None]
    fill: Callable[[str, int], Awaitable[None]]
    table: str


@dataclass(frozen=True, slots=True)
class Drained:
    jobs_s: float
    wal_bytes: float
    """Per job, from the first claim to the last settling."""


async def throughput(stage: Stage) -> list[Line]:
    """One process and two against one of PgQueuer's, and against bare SQL."""
    jobs = stage.size(60_000, 500)
    batch, managers = await _tuned(stage)
    tallyd, plain_sql = Side(drain_tallyd, _fill_tallyd, "job"), Side(drain_bare, _fill_tallyd, "job")
    theirs = _pgqueuer(batch, managers)
    one: list[tuple[float, float]] = []
    two: list[tuple[float, float]] = []
    bare: list[tuple[float, float]] = []
    wal: list[tuple[float, float]] = []
    for _ in range(stage.size(5, 1)):
        mine = await run(stage, tallyd, 1, jobs)
        other = await run(stage, theirs, 1, jobs)
        both = await run(stage, tallyd, 2, jobs)
        plain = await run(stage, plain_sql, 1, jobs)
        one.append((mine.jobs_s, other.jobs_s))
        two.append((both.jobs_s, other.jobs_s))
        bare.append((mine.jobs_s, plain.jobs_s))
        wal.append((mine.wal_bytes / 1024, other.wal_bytes / 1024))
    tuned = f"PgQueuer: batch_size={batch}, {managers} queue manager(s)"
    return [
        _line("drain, one process", one, "PgQueuer, one process", Target("≥", 3.5), tuned),
        _line("drain, two processes", two, "PgQueuer, one process", Target("≥", 5)),
        _line("drain, one process", bare, "bare SQL, one process"),
        Line(
            "WAL of claim and settle", *_three(wal, "KiB/job"), "PgQueuer", summarise(wal).ratio,
            Target("≤", 0.75, "ours"),
        ),
    ]  # fmt: skip


def _line(
    name: str, pairs: list[tuple[float, float]], reference: str, target: Target | None = None, note: str = ""
) -> Line:
    return Line(name, *_three(pairs, "jobs/s"), reference, summarise(pairs).ratio, target, note)


def _three(pairs: list[tuple[float, float]], unit: str) -> tuple[float, str, float]:
    rounds = summarise(pairs)
    return rounds.ours, unit, rounds.reference


async def _tuned(stage: Stage) -> tuple[int, int]:
    """PgQueuer's best settings on this machine."""
    rates = {}
    for batch, managers in TRIALS:
        rates[batch, managers] = (await run(stage, _pgqueuer(batch, managers), 1, stage.size(8_000, 100))).jobs_s
    return max(rates, key=rates.__getitem__)


def _pgqueuer(batch: int, managers: int) -> Side:
    return Side(partial(drain_pgqueuer, batch=batch, managers=managers), _fill_pgqueuer, "pgqueuer")


async def run(stage: Stage, side: Side, processes: int, jobs: int) -> Drained:
    """Fill a fresh database, let the processes loose on it, and wait until everything is settled."""
    async with stage.database() as url:
        await side.fill(url, jobs)
        gate = Gate.make(processes, jobs)
        children = [spawn.Process(target=side.drain, args=(url, gate), daemon=True) for _ in range(processes)]
        watch: asyncpg.Connection = await asyncpg.connect(url)
        try:
            # No checkpoint or vacuum here: they would charge the drain with full images of pages that were just written.
            await watch.execute("analyze")
            for child in children:
                child.start()
            await anyio.to_thread.run_sync(gate.ready.wait, 60)
            before = await watch.fetchval("select pg_current_wal_insert_lsn()")
            began = monotonic()
            await gate.until_done()
            took = gate.last.value - began
            written = await watch.fetchval("select pg_current_wal_insert_lsn() - $1::pg_lsn", before)
            for child in children:
                await anyio.to_thread.run_sync(child.join, 60)
            assert gate.settled.value == jobs, gate.settled.value
            left = await watch.fetchval(f"select count(*) from {side.table}")
            assert left == 0, left
        finally:
            await watch.close()
    return Drained(jobs / took, float(written) / jobs)


def _body(number: int) -> bytes:
    return b"%016d" % number * 64  # 1 KiB


async def _fill_tallyd(url: str, jobs: int) -> None:
    db = await Database.open(url)
    queue = PostgresQueue(db)
    for at in range(0, jobs, 5_000):
        await queue.enqueue([NewJob("noop", _body(n), key=n % KEYS) for n in range(at, min(jobs, at + 5_000))])
    await db.close()


async def _fill_pgqueuer(url: str, jobs: int) -> None:
    from pgqueuer.db import AsyncpgDriver
    from pgqueuer.queries import Queries

    connection = await asyncpg.connect(url)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    for at in range(0, jobs, 5_000):
        count = min(5_000, jobs - at)
        await queries.enqueue(["noop"] * count, [_body(at + n) for n in range(count)], [0] * count)
    await connection.close()


def in_loop(main: Callable[[], Any]) -> None:
    configure(level="warning")
    anyio.run(main, backend_options={"use_uvloop": has_uvloop()})


class _CountingQueue(PostgresQueue):
    def __init__(self, db: Database, gate: Gate) -> None:
        super().__init__(db)
        self._gate = gate

    async def settle(self, settlements: Iterable[Settlement]) -> set[JobId]:
        accepted = await super().settle(settlements)
        self._gate.count(len(accepted))
        return accepted


def drain_tallyd(url: str, gate: Gate) -> None:
    async def noop(_job: Job) -> Outcome:
        return Completed()

    async def main() -> None:
        db = await Database.open(url, pool_min=4)
        loop = WorkerLoop(_CountingQueue(db, gate), noop, concurrency=CONCURRENCY, drain_s=5)
        await anyio.to_thread.run_sync(gate.ready.wait, 60)
        async with anyio.create_task_group() as group:
            group.start_soon(loop.run)
            await gate.until_done()
            loop.stop()
        await db.close()

    in_loop(main)


def drain_pgqueuer(url: str, gate: Gate, *, batch: int, managers: int) -> None:
    from pgqueuer import PgQueuer
    from pgqueuer.db import AsyncpgDriver
    from pgqueuer.models import Job as TheirJob
    from pgqueuer.queries import Queries

    class CountingQueries(Queries):
        async def log_jobs(self, job_status: list[Any]) -> None:
            await super().log_jobs(job_status)
            gate.count(len(job_status))

    async def main() -> None:
        queuers = []
        for _ in range(managers):
            driver = AsyncpgDriver(await asyncpg.connect(url))
            queuer = PgQueuer(driver, queries=CountingQueries(driver))

            @queuer.entrypoint("noop")
            async def noop(_job: TheirJob) -> None:
                pass

            queuers.append(queuer)
        await anyio.to_thread.run_sync(gate.ready.wait, 60)
        runs = [asyncio.create_task(queuer.run(batch_size=batch)) for queuer in queuers]
        await gate.until_done()
        for queuer in queuers:
            queuer.shutdown.set()
        await asyncio.wait(runs, timeout=30)

    in_loop(main)


_BARE_CLAIM = """
with h as materialized (
  select ctid as t from ready where key_id = $1 order by prio, born, id limit $2 for update skip locked),
x as (delete from ready where ctid = any(array(select t from h)) returning *),
l as (
  insert into lease (id, token, attempt, losses, worker, key_id, prio, lease_until)
  select id, token + 1, attempt + 1, 0, 0, key_id, prio, now() + interval '75 s' from x returning id, token)
select l.id, l.token, j.kind, j.body from l join job j using (id)
"""
_BARE_SETTLE = """
with i as (select * from unnest($1::bigint[], $2::bigint[]) as i(id, token)),
x as (delete from lease l using i where l.id = i.id and l.token = i.token returning l.id, l.attempt),
g as (insert into attempt (id, attempt, worker, outcome) select id, attempt, 0, 1 from x),
f as (delete from job where id = any(array(select id from x)))
select id from x
"""


def drain_bare(url: str, gate: Gate) -> None:
    """Claim and settle in turn, on two connections, so that one claims while the other settles."""

    async def drain(keys: range) -> None:
        connection: asyncpg.Connection = await asyncpg.connect(url)
        for key in keys:
            while jobs := await connection.fetch(_BARE_CLAIM, key, BARE_BATCH):
                done = await connection.fetch(
                    _BARE_SETTLE, sorted(job["id"] for job in jobs), [j["token"] for j in jobs]
                )
                gate.count(len(done))
        await connection.close()

    async def main() -> None:
        await anyio.to_thread.run_sync(gate.ready.wait, 60)
        async with anyio.create_task_group() as group:
            group.start_soon(drain, range(0, KEYS, 2))
            group.start_soon(drain, range(1, KEYS, 2))

    in_loop(main)
