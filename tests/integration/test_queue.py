"""The queue as a whole: conservation under random histories, and statements whose cost does not grow with the tables."""

import json
from datetime import timedelta

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.db.pool import Database, query
from daemon.domain.job import (
    KEY_END,
    Cancelled,
    Completed,
    Discarded,
    Job,
    JobId,
    NewJob,
    Outcome,
    Retryable,
    Settlement,
    Snoozed,
    WorkerId,
)
from daemon.queue.maintenance import QueueMaintenance
from daemon.queue.postgres import FIRST_KEY, NOTHING_TOLD, PostgresQueue

pytestmark = pytest.mark.anyio

OUTCOMES: list[Outcome] = [
    Completed(),
    Retryable("again"),
    Retryable("soon", delay_s=0),
    Snoozed(5),
    Discarded("no"),
    Cancelled("no"),
]

STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("enqueue"), st.integers(1, 4), st.sampled_from([0, 0, 30]), st.sampled_from([None, "x", "y"])
        ),
        st.tuples(st.just("claim"), st.integers(0, 1), st.integers(2, 8)),
        st.tuples(st.just("claim"), st.integers(0, 1), st.integers(2, 8)),
        st.tuples(st.just("settle"), st.integers(0, 5), st.sampled_from(OUTCOMES)),
        st.tuples(st.just("release"), st.integers(0, 5)),
        st.tuples(st.just("crash"), st.integers(0, 1)),
        st.tuples(st.just("time"), st.sampled_from([1, 20, 4000])),
        st.tuples(st.sampled_from(["rescue", "promote", "floor", "replay", "drop", "forward", "cancel", "prune"])),
    ),
    min_size=10,
    max_size=40,
)


class History:
    """A queue, and what must be true of it whatever happens."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.queue = PostgresQueue(db)
        self.care = QueueMaintenance(db)
        self.workers: list[WorkerId] = []
        self.held: list[Job] = []  # every lease ever handed out, stale ones included
        self.tokens: dict[JobId, int] = {}
        self.stored: set[JobId] = set()
        self.gone: set[JobId] = set()

    async def start(self) -> None:
        await self.db.execute("truncate job, ready, due, lease, dead, dedup, worker, attempt")
        self.workers = [await self.queue.register_worker() for _ in range(2)]

    async def step(self, name: str, *args) -> None:
        match name:
            case "enqueue":
                count, delay_s, dedup_id = args
                jobs = [
                    NewJob("k", key=i, delay=timedelta(seconds=delay_s), dedup_id=dedup_id, max_attempts=2)
                    for i in range(count)
                ]
                self.stored |= set(await self.queue.enqueue(jobs))
            case "claim":
                which, limit = args
                for job in (await self.queue.claim(self.workers[which], limit, FIRST_KEY)).jobs:
                    assert job.token > self.tokens.get(job.id, 0), "a token never comes twice"
                    assert job.attempt <= job.max_attempts
                    self.tokens[job.id] = job.token
                    self.held.append(job)
            case "settle" if self.held:
                which, outcome = args
                job = self.held[which % len(self.held)]
                accepted = await self.queue.settle([Settlement(job, outcome, 1)])
                if accepted:
                    assert job.token == self.tokens[job.id], "only the newest lease may settle"
                    if isinstance(outcome, Completed | Cancelled):
                        self.gone.add(job.id)
            case "release" if self.held:
                job = self.held[args[0] % len(self.held)]
                if await self.queue.release([job]):
                    assert job.token == self.tokens[job.id]
            case "crash":
                await self.db.execute("update worker set seen_at = '-infinity' where id = $1", self.workers[args[0]])
                self.workers[args[0]] = await self.queue.register_worker()
                await self.queue.rescue()
            case "time":
                for table, column in (("due", "run_at"), ("dedup", "expires_at"), ("lease", "lease_until")):
                    await self.db.execute(
                        f"update {table} set {column} = {column} - make_interval(secs => $1)", float(args[0])
                    )
            case "rescue":
                await self.queue.rescue()
            case "promote":
                await self.queue.promote()
            case "floor":
                await self.queue.raise_floor()
            case "replay":
                await self.care.dead_replay(self.stored)
            case "drop":
                self.gone |= await self.care.dead_drop(sorted(self.stored)[:1])
            case "forward":
                await self.queue.bring_forward(self.stored)
            case "cancel":
                self.gone |= await self.queue.cancel(sorted(self.stored)[:1])
            case "prune":
                await self.care.prune()

    async def check(self) -> None:
        assert await self.care.conservation() == []
        rows = await self.db.fetch("select id from job")
        assert {row["id"] for row in rows} == self.stored - self.gone, "a job is there until it is finished or removed"

    async def finish(self) -> None:
        """Whatever has happened, every job can still be brought to its end."""
        await self.care.dead_replay(self.stored)
        await self.queue.bring_forward(self.stored)
        await self.db.execute("update lease set lease_until = '-infinity', losses = 0")
        await self.queue.rescue()
        for _ in range(1000):
            jobs = (await self.queue.claim(self.workers[0], 100)).jobs
            if not jobs:
                break
            done = await self.queue.settle([Settlement(job, Completed(), 0) for job in jobs])
            assert len(done) == len(jobs)
        assert await self.db.fetchval("select count(*) from job") == 0


@pytest.mark.timeout(60)
def test_no_history_loses_or_doubles_a_job(database_url: str) -> None:
    """Jobs are enqueued, claimed, settled (by zombies too), lost, rescued, replayed and dropped in any order."""

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(STEPS)
    def run(steps: list[tuple]) -> None:
        async def history() -> None:
            db = await Database.open(database_url, pool_max=2)
            try:
                story = History(db)
                await story.start()
                for step in steps:
                    await story.step(*step)
                    await story.check()
                await story.finish()
            finally:
                await db.close()

        anyio.run(history)

    run()


async def test_replicas_that_die_and_return_settle_each_job_once(db: Database) -> None:
    """Workers race for the same jobs while some of them forget what they hold and others come back as zombies."""
    queue, care = PostgresQueue(db), QueueMaintenance(db)
    ids = await queue.enqueue([NewJob("k", key=i % 9, max_attempts=100) for i in range(400)])
    finished: list[JobId] = []
    zombies: list[Settlement] = []

    async def replica(seed: int) -> None:
        worker, turn = await queue.register_worker(), seed
        while len(finished) < len(ids):
            turn += 1
            jobs = (await queue.claim(worker, 13)).jobs
            batch = [Settlement(job, Completed(), 1) for job in jobs]
            if turn % 4 == 0:
                zombies.extend(batch)
                await db.execute("update worker set seen_at = '-infinity' where id = $1", worker)
                worker = await queue.register_worker()
                await db.execute("update lease set losses = 0")
                await queue.rescue()
                continue
            accepted = await queue.settle(batch + zombies[-3:])
            finished.extend(accepted)
            if not jobs:
                await queue.rescue()
                await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        for seed in range(5):
            group.start_soon(replica, seed)
    assert sorted(finished) == sorted(ids)
    assert await care.conservation() == []


async def rows_read(db: Database, name: str, *args: object) -> int:
    """How many rows the scans of a statement really produced or discarded."""

    def scanned(node: dict) -> int:
        own = 0
        if "Scan" in node["Node Type"] and "Relation Name" in node:
            loops = node["Actual Loops"]
            own = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * loops
        return int(own) + sum(scanned(child) for child in node.get("Plans", []))

    async with db.transaction() as tx:
        await tx.execute("set local plan_cache_mode = force_generic_plan")
        (row,) = await tx.fetch("explain (analyze, format json) " + query(name), *args)
    return scanned(json.loads(row[0])[0]["Plan"])


@pytest.mark.parametrize("is_analysed", [False, True])
async def test_cost_of_the_hot_statements_follows_the_batch_not_the_tables(db: Database, is_analysed: bool) -> None:
    """Neither 50,000 future jobs nor 20,000 that wait make a claim, a settle or a promotion read more."""
    queue = PostgresQueue(db)
    worker = await queue.register_worker()
    await db.execute("""
        with j as (insert into job (kind, key_id, body)
          select 'x', i % 50, '' from generate_series(1, 70000) i returning id, key_id),
        d as (insert into due select now() + id * interval '1 s', key_id, 100, id, 0, 0, 0 from j where id <= 50000)
        insert into ready select key_id, 100, now(), id, 0, 0, 0 from j where id > 50000
    """)
    if is_analysed:
        await db.execute("analyze")
    whole = (-1, 100, worker, 15.0, KEY_END, 100, [], [])
    assert await rows_read(db, "claim_fair", *whole) < 100 * 20
    assert await rows_read(db, "promote", 100) < 100 * 5
    jobs = (await queue.claim(worker, 50)).jobs
    columns = [[job.id for job in jobs], [job.token for job in jobs], [1] * 50, [1] * 50, [0.0] * 50, [None] * 50]
    assert await rows_read(db, "settle", *columns, *NOTHING_TOLD) < 50 * 20
    assert await rows_read(db, "bring_forward", [1, 2, 3]) < 50


async def test_notifications_are_few_and_the_last_one_is_not_lost(db: Database) -> None:
    heard: list[None] = []
    queue = PostgresQueue(db)
    listening = anyio.Event()

    def on_wake() -> None:
        heard.append(None)
        listening.set()

    async with anyio.create_task_group() as group:
        group.start_soon(queue.waker.run)
        group.start_soon(queue.waker.listen, on_wake)
        await listening.wait()  # the wake that follows a new connection
        for _ in range(50):
            await queue.enqueue([NewJob("a")])
        before = len(heard)
        await queue.enqueue([NewJob("last")])
        while len(heard) == before:  # noqa: ASYNC110 (the trailing edge comes by itself)
            await anyio.sleep(0.005)
        group.cancel_scope.cancel()
    assert len(heard) < 50


async def test_lost_listener_connects_again_and_wakes_at_once(db: Database) -> None:
    """Whatever was notified in between is lost, so it must look for itself."""
    queue = PostgresQueue(db)
    wakes = [anyio.Event(), anyio.Event()]

    def on_wake() -> None:
        next(event for event in wakes if not event.is_set()).set()

    async with anyio.create_task_group() as group:
        group.start_soon(queue.waker.listen, on_wake)
        await wakes[0].wait()
        await db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and query ilike 'listen%'"
        )
        await wakes[1].wait()
        group.cancel_scope.cancel()


async def test_enqueue_in_a_transaction_wakes_only_after_its_commit(db: Database) -> None:
    queue = PostgresQueue(db)
    async with db.transaction() as tx:
        await queue.enqueue([NewJob("a")], tx)
        assert not queue.waker._wanted.is_set()
    assert queue.waker._wanted.is_set()
