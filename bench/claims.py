"""Claims: how soon work is picked up, whether that stays so as tables grow, and whether a small tenant gets its turn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median, quantiles
from time import perf_counter

import anyio
import asyncpg

from bench.report import Line, Target
from bench.stage import Stage
from daemon.db.pool import Database
from daemon.domain.job import Completed, Job, NewJob, Outcome, Settlement, WorkerId
from daemon.queue.postgres import FIRST_KEY, PostgresQueue
from daemon.worker.loop import WorkerLoop

LIMIT = 100
FAIR_LIMIT = 50
CHURN_JOBS_S = 1_000
"""Jobs enqueued, claimed and settled each second under the held snapshot: 300,000 in a tick of five minutes."""

_FUTURE = """
with j as (
  insert into job (kind, key_id, body) select 'noop', i % 10, '' from generate_series(1, $1) i returning id, key_id)
insert into due (run_at, key_id, prio, id, attempt, losses, token)
select now() + interval '1 day', key_id, 100, id, 0, 0, 0 from j
"""


async def pickup(stage: Stage) -> list[Line]:
    """From the commit of an enqueue to the start of the job, in an idle loop of another connection pool."""
    tries = stage.size(200, 10)
    ours: list[float] = []
    bare: list[float] = []
    async with stage.database() as url:
        there, here = await Database.open(url), await Database.open(url)
        started = anyio.Event()
        at = 0.0

        async def note(_job: Job) -> Outcome:
            nonlocal at
            at = perf_counter()
            started.set()
            return Completed()

        loop = WorkerLoop(PostgresQueue(there), note, concurrency=10, drain_s=1)
        queue = PostgresQueue(here)
        async with anyio.create_task_group() as group, here.listen("bench") as notices:
            group.start_soon(loop.run)
            group.start_soon(queue.waker.run)
            await anyio.sleep(0.5)  # until it listens
            for number in range(tries + 1):
                started = anyio.Event()
                await queue.enqueue([NewJob("noop", b"x" * 1024)])
                committed = perf_counter()
                await started.wait()
                ours.append((at - committed) * 1000)
                began = perf_counter()
                await here.execute("select pg_notify('bench', $1)", str(number))
                await notices.receive()
                bare.append((perf_counter() - began) * 1000)
                # Longer than the loop's debounce and than its settling, and never in step with its polls.
                await anyio.sleep(random.uniform(0.06, 0.12))
            loop.stop()
            group.cancel_scope.cancel()
        await there.close()
        await here.close()
    p50, theirs = median(ours[1:]), median(bare[1:])
    p99 = quantiles(ours[1:], n=100)[98]
    return [
        Line(
            "pickup p50, commit to start", p50, "ms", theirs, "bare NOTIFY there and back", p50 / theirs,
            Target("≤", 5, "ours"), f"p99 {p99:.1f} ms",
        )
    ]  # fmt: skip


async def flatness(stage: Stage) -> list[Line]:
    """What a claim takes with half a million jobs due later, and after a minute under somebody's open snapshot."""
    async with stage.database() as url:
        bench = await _Claims.open(url)
        await bench.fill(20_000 if not stage.is_quick else 500)
        before = await bench.sample(stage.size(60, 5))
        future = stage.size(500_000, 2_000)
        await bench.db.execute(_FUTURE, future, timeout_s=300)
        await bench.db.execute("analyze")
        crowded = await bench.sample(stage.size(60, 5))
        await bench.close()
    async with stage.database() as url:
        bench = await _Claims.open(url)
        await bench.churn(stage.size(5, 1))
        fresh = median(await bench.churn(stage.size(5, 1)))
        holder: asyncpg.Connection = await asyncpg.connect(url)
        await holder.execute("begin isolation level repeatable read; select count(*) from job")
        seconds = stage.size(60, 2)
        times = await bench.churn(seconds)
        held = median(times[-max(1, len(times) // 10) :])
        await holder.execute("rollback")
        await holder.close()
        await bench.close()
    target = Target("≤", 1.5)
    return [
        Line(
            f"claim of {LIMIT} with {future:,} jobs due later", crowded, "ms", before, "with none", crowded / before, target
        ),
        Line(
            f"claim of {LIMIT} after {seconds} s under a held snapshot", held, "ms", fresh, "before it",
            held / fresh, target, f"{CHURN_JOBS_S:,} jobs/s enqueued, claimed and settled meanwhile",
        ),
    ]  # fmt: skip


class _Claims:
    def __init__(self, db: Database, queue: PostgresQueue, worker: WorkerId) -> None:
        self.db = db
        self._queue = queue
        self._worker = worker
        self._cursor = FIRST_KEY

    @classmethod
    async def open(cls, url: str) -> _Claims:
        db = await Database.open(url)
        queue = PostgresQueue(db)
        return cls(db, queue, await queue.register_worker("bench"))

    async def close(self) -> None:
        await self.db.close()

    async def fill(self, jobs: int) -> None:
        for at in range(0, jobs, 5_000):
            await self._queue.enqueue([NewJob("noop", b"x" * 1024, key=n % 10) for n in range(min(5_000, jobs - at))])

    async def sample(self, claims: int) -> float:
        """Median milliseconds of a claim; what was claimed is given back."""
        times = []
        for _ in range(claims):
            jobs, took_ms = await self._claim()
            assert len(jobs) == LIMIT, len(jobs)
            times.append(took_ms)
            await self._queue.release(jobs)
        return median(times)

    async def churn(self, seconds: float) -> list[float]:
        """Milliseconds of each claim while jobs come and go at a steady rate."""
        times: list[float] = []
        began = perf_counter()
        for number in range(int(seconds * CHURN_JOBS_S / LIMIT)):
            await self.fill(LIMIT)
            jobs, took_ms = await self._claim()
            times.append(took_ms)
            if number % (CHURN_JOBS_S // LIMIT) == 0:
                await self._queue.promote()  # once a second, as an idle loop does
            await self._queue.settle([Settlement(job, Completed(), 1) for job in jobs])
            await anyio.sleep(max(0.0, began + number * LIMIT / CHURN_JOBS_S - perf_counter()))
        return times

    async def _claim(self) -> tuple[Sequence[Job], float]:
        began = perf_counter()
        claimed = await self._queue.claim(self._worker, LIMIT, self._cursor)
        took_ms = (perf_counter() - began) * 1000
        self._cursor = claimed.last_key
        return claimed.jobs, took_ms


async def fairness(stage: Stage) -> list[Line]:
    """A tenant with 200,000 jobs that were there first, and 1,000 tenants with one each."""
    hog, small = stage.size(200_000, 2_000), stage.size(1_000, 50)
    async with stage.database() as url:
        db = await Database.open(url)
        queue = PostgresQueue(db)
        for at in range(0, hog, 10_000):
            await queue.enqueue([NewJob("noop", b"{}", key=1) for _ in range(min(10_000, hog - at))])
        await queue.enqueue([NewJob("noop", b"{}", key=2 + n) for n in range(small)])
        worker = await queue.register_worker("bench")
        waiting = small
        claims, cursor = 0, FIRST_KEY
        while waiting and claims < 10_000:
            claimed = await queue.claim(worker, FAIR_LIMIT, cursor)
            claims, cursor = claims + 1, claimed.last_key
            waiting -= sum(job.key != 1 for job in claimed.jobs)
        await db.close()
    first_come = (hog + small) / FAIR_LIMIT
    return [
        Line(
            f"claims of {FAIR_LIMIT} until {small:,} tenants with one job are served",
            claims, "claims", first_come, f"first come, first served, behind {hog:,}", claims / first_come,
            Target("≤", 30, "ours"),
        )
    ]  # fmt: skip
